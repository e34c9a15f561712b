"""Tools by hand: which there are, and calls of them from a shell."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from pixelis_jax.chat.family import Size, frame_of
from pixelis_jax.chat.images import read_image
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.data.video import DEFAULT, read_video
from pixelis_jax.tools import TOOLS, USUAL, Options, Toolbox
from pixelis_jax.tools.workers import Settings, Workers
from pixelis_jax.types import Mask, Picture, Pixels, Task, ToolCall, ToolResult, Video

NEXT = "+"  # Between two calls.


def table(preset: str) -> str:
  """What each tool does, and a line for each of its arguments.

  Raises:
    ValueError: a preset that does not exist.
  """
  toolbox = Toolbox(tuple(TOOLS.get(preset, ())), shown_size=_own_pixels, preset=preset)
  lines = []
  for function in (schema["function"] for schema in toolbox.schemas):
    lines += ["", f"{function['name']}: {function['description']}"]
    for name, schema in function["parameters"]["properties"].items():
      optional = "" if name in function["parameters"]["required"] else ", optional"
      about = schema.get("description", "")
      lines.append(f"  {name:<12}  {_type(schema) + optional:<20}  {about}".rstrip())
  return "\n".join(lines[1:])


def parse(words: Sequence[str]) -> list[ToolCall]:
  """Calls of the form NAME ARGUMENT=JSON ..., with + between them; what is no JSON is a string.

  Raises:
    ValueError: a call without a name, or what is no argument.
  """
  calls, rest = [], [*words]
  while True:
    end = rest.index(NEXT) if NEXT in rest else len(rest)
    calls.append(_call(rest[:end]))
    if end == len(rest):
      return calls
    rest = rest[end + 1 :]


def run(
  calls: Sequence[ToolCall],
  *,
  images: Sequence[Path],
  videos: Sequence[Path] = (),
  model: Path | None,
  preset: str,
  out: Path | None,
  options: Options = USUAL,
) -> Iterator[str]:
  """What the calls of one episode return, line by line; with `out` pictures and masks go there.

  They are named by the numbers that later calls refer to them with. Limits are those of `Settings`.

  Args:
    model: whose coordinate frame holds, and which frames of a video it is shown; None: the images'
      own pixels, and all frames that are read.

  Raises:
    ValueError: a call is wrong, as the policy would be told; an image, a video or a preset is.
    FileNotFoundError: there is no such image or video.
  """
  if not images and not videos:
    raise ValueError("there is nothing to look at: give an --image or a --video")
  task = Task(
    id="tools",
    images=tuple(read_image(path) for path in images),
    question="",
    answer=None,
    videos=tuple(read_video(path, DEFAULT) for path in videos),
  )
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
  with contextlib.closing(Workers(Settings(processes=1))) as workers:
    toolbox = Toolbox(
      tuple(TOOLS.get(preset, ())),
      shown_size=_own_pixels if model is None else frame_of(model),
      shown_frames=_own_frames if model is None else clips_of(model),
      preset=preset,
      compute=workers.compute,
      options=options,
    )
    results: list[ToolResult] = []
    for number, call in enumerate(calls, start=1):
      result = toolbox.run(call, task, results)
      if result.error is not None:
        raise ValueError(f"call {number}: {result.error}" if len(calls) > 1 else result.error)
      yield result.text.strip()
      yield from _returned(result, task, results, out)
      results.append(result)


def _returned(
  result: ToolResult, task: Task, before: Sequence[ToolResult], out: Path | None
) -> Iterator[str]:
  """A line for each picture, and where they are written for each mask."""
  first = 1 + len(task.images) + sum(len(r.images) for r in before)
  for number, picture in enumerate(result.images, start=first):
    height, width = picture.pixels.shape[:2]
    name = f"image {number}" if out is None else _write(out, f"image-{number}", picture.pixels)
    x0, y0, x1, y1 = (round(edge) for edge in dataclasses.astuple(picture.box))
    yield f"{name}: {width} x {height}, pixels [{x0}, {y0}, {x1}, {y1}] of {_source(picture)}"
  first = 1 + sum(len(r.masks) for r in before)
  for number, mask in enumerate(result.masks if out is not None else (), start=first):
    yield f"{_write(out, f'mask-{number}', _lit(mask, task))}: mask {number} of {_source(mask)}"


def _source(place: Picture | Mask) -> str:
  if place.frame is None:
    return f"image {place.source + 1}"
  return f"frame {place.frame + 1} of video {place.source + 1}"


def _lit(mask: Mask, task: Task) -> Pixels:
  """The mask's image, dark where the mask is not."""
  if mask.frame is None:
    pixels = task.images[mask.source]
  else:
    pixels = task.videos[mask.source].frames[mask.frame]
  x0, y0, x1, y1 = (int(edge) for edge in dataclasses.astuple(mask.box))
  lit = pixels // 4
  lit[y0:y1, x0:x1][mask.inside] = pixels[y0:y1, x0:x1][mask.inside]
  return lit


def _write(out: Path, name: str, pixels: Pixels) -> str:
  path = out / f"{name}.png"
  Image.fromarray(pixels).save(path)
  return str(path)


def _call(words: Sequence[str]) -> ToolCall:
  if not words or "=" in words[0]:
    raise ValueError(f"a call must begin with a tool's name, not {words[0] if words else NEXT!r}")
  arguments = {}
  for word in words[1:]:
    name, given, value = word.partition("=")
    if not given or name in arguments:
      wrong = "is given twice" if given else f"must be NAME=JSON, or come behind a {NEXT}"
      raise ValueError(f"argument {word!r} of {words[0]} {wrong}")
    arguments[name] = _value(value)
  return ToolCall(name=words[0], arguments=arguments)


def _value(text: str) -> object:
  try:
    return json.loads(text)
  except ValueError:
    return text


def _type(schema: Mapping) -> str:
  """In words: `integer`, `"a" or "b"`, `4 numbers`, `lists of 4 numbers`."""
  if "enum" in schema:
    return " or ".join(json.dumps(choice) for choice in schema["enum"])
  if schema["type"] != "array":
    return schema["type"]
  low, high = schema.get("minItems", 0), schema.get("maxItems")
  count = f"{low} " if low == high else "" if high is None else f"{low} to {high} "
  item = _type(schema["items"])
  return f"{count}lists of {item}" if schema["items"]["type"] == "array" else f"{count}{item}s"


def _own_pixels(height: int, width: int) -> Size:
  return height, width


def _own_frames(video: Video) -> tuple[Int[np.ndarray, " N"], Size]:
  return np.arange(len(video.frames)), video.frames.shape[1:3]
