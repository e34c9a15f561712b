"""Questions in files: JSON lines or one JSON list, and the fields that every question there has.

A record is an object with
  request_id      string or integer, once a file
  question        text; or `input_ids` (and `attention_mask`), decoded to the question
  image, images   a path relative to the file, or a data URI with base64; or a list of them, empty
                  for a question about none; a model that only reads needs neither
  video, videos   a path of a file or a folder of frames, relative too; or an object with `path` and
                  optionally `fps` and `max_frames`, which say how much of it is read, and for a
                  folder `rate`, its frames a second; or a list of them; then images may be left out
  kind            optional, the question's kind
`requests.py` and `questions.py` say what else they read there. Other fields are ignored.
"""

import base64
import binascii
import collections
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from PIL import Image, ImageOps

from pixelis_jax.data.video import DEFAULT, Budget, read_video, save_frames
from pixelis_jax.types import Pixels, Task, Video, value

Decode = Callable[[Int32[np.ndarray, " T"]], str]


class Malformed(ValueError):
  """What is wrong with one record."""


@value
class Clip:
  """A video that is not yet read; where `fps` and `max_frames` are None, the budget's hold."""

  path: str
  fps: float | None = None
  max_frames: int | None = None
  rate: float | None = None

  def read(self, folder: Path, budget: Budget) -> Video:
    """The path is relative to `folder`. Raises Malformed, also for more frames than the budget."""
    frames = budget.max_frames if self.max_frames is None else self.max_frames
    if frames > budget.max_frames:
      raise Malformed(
        f"video {self.path}: max_frames {frames} must be at most {budget.max_frames} here"
      )
    fps = budget.fps if self.fps is None else self.fps
    mine = dataclasses.replace(budget, fps=fps, max_frames=frames)
    try:
      return read_video(folder / self.path, mine, rate=self.rate)
    except (
      OSError,
      ValueError,
    ) as e:  # ValueError: no video or none of it whole; or no valid path.
      raise Malformed(str(e)) from e


@value
class Record:
  """The checked common fields; `fields` is the whole object.

  `images` are names, `videos` paths: nothing of either has been read.
  """

  id: str
  question: str
  images: tuple[str, ...]
  videos: tuple[Clip, ...]
  kind: str
  fields: Mapping

  def task(self, folder: Path, answer: str | None = None, budget: Budget = DEFAULT) -> Task:
    """The record with its pixels; names are relative to `folder`. Raises Malformed."""
    return Task(
      id=self.id,
      images=tuple(_pixels(name, folder) for name in self.images),
      question=self.question,
      answer=answer,
      kind=self.kind,
      videos=tuple(clip.read(folder, budget) for clip in self.videos),
    )


def items(path: Path) -> Iterator[tuple[str, object]]:
  """(where, raw line or parsed item). A list is parsed here, at once.

  Raises ValueError where the file is one JSON list, and broken.
  """
  with path.open("rb") as f:
    opening = next((line.lstrip()[:1] for line in f if line.strip()), b"")
  if opening != b"[":
    return _lines(path)
  try:
    parsed = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} begins with [ but is not a JSON list: {e}") from e
  return ((f"item {number}", item) for number, item in enumerate(parsed, start=1))


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
  with path.open("rb") as f:
    for number, line in enumerate(f, start=1):
      if line.strip():
        yield f"line {number}", line


def read(item: object, *, sees: bool, decode: Decode | None = None) -> Record:
  """An item of `items`, checked. Raises Malformed.

  Args:
    sees: Whether the model can be shown images: then a record without videos has to say which, or
      that there are none; else it must have neither.
    decode: Token ids to text, for records that bring `input_ids` in place of a question.
  """
  fields = _parse(item) if isinstance(item, bytes) else item
  if not isinstance(fields, Mapping):
    raise Malformed(f"a request must be a JSON object, not {type(fields).__name__}")
  id = fields.get("request_id")
  if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
    raise Malformed(f"request_id must be a string or an integer, not {id!r}")
  kind = fields.get("kind", "")
  if not isinstance(kind, str):
    raise Malformed(f"kind must be a string, not {kind!r}")
  videos = _videos(fields, sees)
  return Record(
    id=str(id),
    question=_question(fields, decode),
    images=_images(fields, needed=sees and not videos, sees=sees),
    videos=videos,
    kind=kind,
    fields=fields,
  )


def write(
  path: str | Path,
  tasks: Sequence[Task],
  more: Callable[[Task], dict[str, object]] = lambda task: {},
) -> None:
  """Tasks as JSON lines, their images as PNG in a folder beside the file, which appears when whole.

  The folder is the file's name without suffix, plus `_images`. A video is a folder of PNGs in it,
  and comes back as it is where the reader's budget lets so many frames and pixels through.

  Args:
    more: fields beside the common ones.

  Raises:
    ValueError: two tasks have one id.
  """
  path = Path(path)
  repeated = [id for id, n in collections.Counter(task.id for task in tasks).items() if n > 1]
  if repeated:
    raise ValueError(f"task ids must differ to become request ids; repeated: {repeated[:5]}")
  folder, aside = path.parent / f"{path.stem}_images", path.with_name(f"{path.name}.partial")
  folder.mkdir(parents=True, exist_ok=True)
  with aside.open("w", encoding="utf-8") as f:
    for number, task in enumerate(tasks):
      record = {"request_id": task.id, "question": task.question, "kind": task.kind}
      record["images"] = [f"{folder.name}/{number:06d}-{i}.png" for i in range(len(task.images))]
      for name, pixels in zip(record["images"], task.images, strict=True):
        Image.fromarray(pixels).save(path.parent / name)
      if task.videos:
        record["videos"] = [
          _write_video(path.parent, f"{folder.name}/{number:06d}-v{i}", video)
          for i, video in enumerate(task.videos)
        ]
      f.write(json.dumps({**record, **more(task)}, ensure_ascii=False) + "\n")
  aside.replace(path)


def _write_video(folder: Path, name: str, video: Video) -> dict[str, object]:
  """The field that reads it again, all frames of it."""
  save_frames(folder / name, video)
  count, seconds = len(video.times), float(video.times[-1] - video.times[0])
  return {"path": name, "fps": (count + 1) / seconds} if count > 1 else {"path": name}


def _parse(line: bytes) -> object:
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as e:
    raise Malformed(f"not JSON: {e}") from e


def _question(fields: Mapping, decode: Decode | None) -> str:
  question = fields.get("question")
  if question is None and "input_ids" in fields:
    if decode is None:
      raise Malformed("input_ids in place of a question need a tokenizer, and none was given")
    ids = _integers("input_ids", fields["input_ids"])
    if fields.get("attention_mask") is not None:
      mask = _integers("attention_mask", fields["attention_mask"])
      if mask.shape != ids.shape:
        raise Malformed(f"attention_mask has {len(mask)} entries and input_ids {len(ids)}")
      ids = ids[mask != 0]
    question = decode(ids)
  if not isinstance(question, str) or not question.strip():
    raise Malformed(f"question must be a text, not {question!r}; fields: {sorted(fields)}")
  return question


def _integers(name: str, given: object) -> Int32[np.ndarray, " T"]:
  """A list of non-negative integers, or one such list inside a list: a batch of one."""
  if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
    given = given[0]
  if not isinstance(given, list) or not all(
    isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in given
  ):
    raise Malformed(f"{name} must be a list of integers from 0, one sequence")
  return np.array(given, np.int32)


def _images(fields: Mapping, *, needed: bool, sees: bool) -> tuple[str, ...]:
  given = fields.get("images", fields.get("image", None if needed else []))
  names = [given] if isinstance(given, str) else given
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise Malformed(
      "image or images must be a path or data URI, or a list of them, empty if there is none"
    )
  if names and not sees:
    raise Malformed(f"the model only reads, and cannot be shown {len(names)} images")
  return tuple(names)


def _videos(fields: Mapping, sees: bool) -> tuple[Clip, ...]:
  given = fields.get("videos", fields.get("video", []))
  clips = tuple(map(_clip, given if isinstance(given, list) else [given]))
  if clips and not sees:
    raise Malformed(f"the model only reads, and cannot be shown {len(clips)} videos")
  return clips


def _clip(given: object) -> Clip:
  if isinstance(given, str):
    return Clip(path=given)
  known = {"path", "fps", "max_frames", "rate"}
  if not isinstance(given, Mapping) or not isinstance(given.get("path"), str):
    raise Malformed("video or videos must be a path or an object with a path, or a list of them")
  if unknown := sorted(given.keys() - known):
    raise Malformed(f"video {given['path']} has unknown keys {unknown}; known: {sorted(known)}")
  for name in sorted(given.keys() - {"path"}):
    kinds = int if name == "max_frames" else int | float
    x = given[name]
    if isinstance(x, bool) or not isinstance(x, kinds) or not 0 < x < 1e9:
      what = "whole number from 1" if kinds is int else "positive number"
      raise Malformed(f"video {given['path']}: {name} must be a {what}, not {x!r}")
  return Clip(
    **{name: x if name in ("path", "max_frames") else float(x) for name, x in given.items()}
  )


def _pixels(name: str, folder: Path) -> Pixels:
  """Of a path or a data URI, as RGB, upright as its EXIF orientation says."""
  shown = name if len(name) < 80 else f"{name[:40]}... ({len(name)} characters)"
  file = io.BytesIO(_decoded(name)) if name.startswith("data:") else folder / name
  try:
    with Image.open(file) as image:
      return np.array(ImageOps.exif_transpose(image).convert("RGB"))
  except FileNotFoundError as e:
    raise Malformed(f"there is no image {folder / name}") from e
  # OSError: not an image, or cut off; ValueError: no valid path; SyntaxError: a broken PNG.
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise Malformed(f"image {shown} cannot be read: {e}") from e


def _decoded(uri: str) -> bytes:
  head, comma, body = uri.partition(",")
  if not comma or not head.endswith(";base64"):
    raise Malformed(f"data URI {head[:40]!r} must end with ;base64 before its comma")
  try:
    return base64.b64decode(body, validate=True)
  except binascii.Error as e:
    raise Malformed(f"data URI holds no valid base64: {e}") from e
