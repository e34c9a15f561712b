"""The online stream as files: JSON lines or a JSON list in, tasks without labels out.

A request is an object with
  request_id      string or integer, once a file
  question        text; or `input_ids` (and `attention_mask`), decoded to the question
  image, images   a path relative to the file, or a data URI with base64; or a list of them
  kind            optional, the question's kind
  embedding       optional, the request's own key vector
Other fields are ignored; `labels` among them, so a label in the file cannot reach learning.
What is wrong with one request is reported and the stream goes on.
"""

import base64
import binascii
import collections
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32
from PIL import Image

from pixelis_jax.types import Pixels, Task, value

Decode = Callable[[Int32[np.ndarray, " T"]], str]
Report = Callable[[str], None]


@value
class Request:
  """A task with no answer and no boxes; `embedding` is the sender's key vector, not normalised."""

  task: Task
  embedding: Float32[np.ndarray, " D"] | None = None


def read_requests(
  path: str | Path,
  *,
  report: Report,
  counts: collections.Counter,
  decode: Decode | None = None,
  embedding_size: int | None = None,
) -> Iterator[Request]:
  """Requests in the order of the file, images decoded one request at a time.

  Args:
    report: Called with one sentence a refused request: file, line (or item of a list) and reason.
    counts: Raised as the stream goes: "read", "malformed", "duplicate".
    decode: Token ids to text, for requests that bring `input_ids` in place of a question.
    embedding_size: What embeddings must have; None takes any length.

  Raises:
    FileNotFoundError: at the call, not at the first request.
    ValueError: at the call: the file is one JSON list, and broken.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"request stream {path} is not a file")
  items = _items(path)

  def stream() -> Iterator[Request]:
    seen: dict[str, str] = {}
    for where, raw in items:
      try:
        record = _parse(raw) if isinstance(raw, bytes) else raw
        request = _request(record, path.parent, decode, embedding_size)
      except _Malformed as e:
        counts["malformed"] += 1
        report(f"{path}, {where}: {e}; skipped")
        continue
      if (first := seen.setdefault(request.task.id, where)) != where:
        counts["duplicate"] += 1
        report(f"{path}, {where}: request_id {request.task.id!r} was given on {first}; skipped")
        continue
      counts["read"] += 1
      yield request

  return stream()


def write_requests(path: str | Path, tasks: Sequence[Task]) -> None:
  """Tasks as JSON lines, images as PNG in a folder beside the file; answers and boxes stay out.

  The folder is the file's name without suffix, plus `_images`.
  """
  path = Path(path)
  repeated = [id for id, n in collections.Counter(task.id for task in tasks).items() if n > 1]
  if repeated:
    raise ValueError(f"task ids must differ to become request ids; repeated: {repeated[:5]}")
  folder = path.parent / f"{path.stem}_images"
  folder.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8") as f:
    for number, task in enumerate(tasks):
      names = [f"{number:06d}-{i}.png" for i in range(len(task.images))]
      for name, pixels in zip(names, task.images, strict=True):
        Image.fromarray(pixels).save(folder / name)
      record = {
        "request_id": task.id,
        "question": task.question,
        "images": [f"{folder.name}/{name}" for name in names],
        "kind": task.kind,
      }
      f.write(json.dumps(record, ensure_ascii=False) + "\n")


class _Malformed(ValueError):
  """What is wrong with one request."""


def _items(path: Path) -> Iterator[tuple[str, object]]:
  """(where, raw line or parsed item). A list is parsed here, at once."""
  with path.open("rb") as f:
    opening = next((line.lstrip()[:1] for line in f if line.strip()), b"")
  if opening != b"[":
    return _lines(path)
  try:
    items = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} begins with [ but is not a JSON list: {e}") from e
  return ((f"item {number}", item) for number, item in enumerate(items, start=1))


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
  with path.open("rb") as f:
    for number, line in enumerate(f, start=1):
      if line.strip():
        yield f"line {number}", line


def _parse(line: bytes) -> object:
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as e:
    raise _Malformed(f"not JSON: {e}") from e


def _request(
  record: object, folder: Path, decode: Decode | None, embedding_size: int | None
) -> Request:
  if not isinstance(record, Mapping):
    raise _Malformed(f"a request must be a JSON object, not {type(record).__name__}")
  id = record.get("request_id")
  if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
    raise _Malformed(f"request_id must be a string or an integer, not {id!r}")
  kind = record.get("kind", "")
  if not isinstance(kind, str):
    raise _Malformed(f"kind must be a string, not {kind!r}")
  task = Task(
    id=str(id),
    images=_images(record, folder),
    question=_question(record, decode),
    answer=None,
    kind=kind,
  )
  return Request(task=task, embedding=_embedding(record.get("embedding"), embedding_size))


def _question(record: Mapping, decode: Decode | None) -> str:
  question = record.get("question")
  if question is None and "input_ids" in record:
    if decode is None:
      raise _Malformed("input_ids in place of a question need a tokenizer, and none was given")
    ids = _integers("input_ids", record["input_ids"])
    if record.get("attention_mask") is not None:
      mask = _integers("attention_mask", record["attention_mask"])
      if mask.shape != ids.shape:
        raise _Malformed(f"attention_mask has {len(mask)} entries and input_ids {len(ids)}")
      ids = ids[mask != 0]
    question = decode(ids)
  if not isinstance(question, str) or not question.strip():
    raise _Malformed(f"question must be a text, not {question!r}; fields: {sorted(record)}")
  return question


def _integers(name: str, given: object) -> Int32[np.ndarray, " T"]:
  """A list of non-negative integers, or one such list inside a list: a batch of one."""
  if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
    given = given[0]
  if not isinstance(given, list) or not all(
    isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in given
  ):
    raise _Malformed(f"{name} must be a list of integers from 0, one sequence")
  return np.array(given, np.int32)


def _embedding(given: object, size: int | None) -> Float32[np.ndarray, " D"] | None:
  if given is None:
    return None
  # The bound refuses NaN, infinities, and what float32 cannot square.
  if not isinstance(given, list) or not all(
    isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e18 for x in given
  ):
    raise _Malformed("embedding must be a list of numbers below 1e18")
  if not given or (size is not None and len(given) != size):
    raise _Malformed(f"embedding must have {size or 'some'} numbers, not {len(given)}")
  return np.array(given, np.float32)


def _images(record: Mapping, folder: Path) -> tuple[Pixels, ...]:
  given = record.get("images", record.get("image"))
  names = [given] if isinstance(given, str) else given
  if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
    raise _Malformed("image or images must be a path or data URI, or a list of them")
  return tuple(_image(name, folder) for name in names)


def _image(name: str, folder: Path) -> Pixels:
  """Pixels of a path or a data URI, as RGB."""
  shown = name if len(name) < 80 else f"{name[:40]}... ({len(name)} characters)"
  file = io.BytesIO(_decoded(name)) if name.startswith("data:") else folder / name
  try:
    with Image.open(file) as image:
      return np.array(image.convert("RGB"))
  except FileNotFoundError as e:
    raise _Malformed(f"there is no image {folder / name}") from e
  # OSError: not an image, or cut off; ValueError: no valid path; SyntaxError: a broken PNG.
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise _Malformed(f"image {shown} cannot be read: {e}") from e


def _decoded(uri: str) -> bytes:
  head, comma, body = uri.partition(",")
  if not comma or not head.endswith(";base64"):
    raise _Malformed(f"data URI {head[:40]!r} must end with ;base64 before its comma")
  try:
    return base64.b64decode(body, validate=True)
  except binascii.Error as e:
    raise _Malformed(f"data URI holds no valid base64: {e}") from e
