"""A conversation as it is read from a file, checked: turns for the template, and what they show."""

import dataclasses
import math
from collections.abc import Callable, Collection

import numpy as np

from pixelis_jax.types import Pixels, Video

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
  """A video that is not read yet: names of its frames, and how many follow each other a second."""

  frames: tuple[str, ...]
  fps: float

  def read(self, load: Callable[[str], Pixels]) -> Video:
    """Raises ValueError where the frames differ in size."""
    frames = [load(name) for name in self.frames]
    for name, frame in zip(self.frames, frames, strict=True):
      if frame.shape != frames[0].shape:
        raise ValueError(
          f"frame {name} is {frame.shape[0]} x {frame.shape[1]} pixels, the video's first"
          f" {frames[0].shape[0]} x {frames[0].shape[1]}"
        )
    times = (np.arange(len(frames)) / self.fps).astype(np.float32)
    return Video(frames=np.stack(frames), times=times)


def read_messages(messages: object) -> tuple[list[dict], list[str | Clip]]:
  """The messages as a template takes them, and the names of images and the clips in order.

  Args:
    messages: a list of {"role": ..., "content": text or parts}; a part is
      {"type": "text", "text": text}, {"type": "image", "image": name} or
      {"type": "video", "video": names of frames, "fps": frames a second}. All of it is checked.

  Raises:
    ValueError: messages of another form; it names the message and the part.
  """
  if not isinstance(messages, list) or not messages:
    raise ValueError("messages must be a list of at least one message")
  turns, shown = [], []
  for number, message in enumerate(messages, start=1):
    where = f"message {number}"
    _check_keys(message, ("role", "content"), where)
    role, content = message["role"], message["content"]
    if role not in ROLES:
      raise ValueError(f"{where}: role {role!r} must be one of {ROLES}")
    if isinstance(content, list):
      content = [_part(part, f"{where}, part {i}", shown) for i, part in enumerate(content, 1)]
    elif not isinstance(content, str):
      raise ValueError(f"{where}: content must be a text or a list of parts, not {content!r}")
    turns.append({"role": role, "content": content})
  return turns, shown


def _part(part: object, where: str, shown: list[str | Clip]) -> dict:
  """One checked part of a message; an image's name or a clip goes to `shown`."""
  kind = part.get("type") if isinstance(part, dict) else None
  if kind not in ("text", "image", "video"):
    raise ValueError(
      f'{where} must be an object whose type is "text", "image" or "video", not {part!r}'
    )
  if kind == "video":
    shown.append(_clip(part, where))
    return {"type": "video"}
  _check_keys(part, ("type", kind), where)
  if not isinstance(part[kind], str):
    raise ValueError(f"{where}: {kind} must be a string, not {part[kind]!r}")
  if kind == "text":
    return dict(part)
  shown.append(part["image"])
  return {"type": "image"}


def _clip(part: dict, where: str) -> Clip:
  _check_keys(part, ("type", "video", "fps"), where)
  names, fps = part["video"], part["fps"]
  if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
    raise ValueError(f"{where}: video must be a list of at least one frame's name, not {names!r}")
  number = isinstance(fps, int | float) and not isinstance(fps, bool)
  if not number or not 0 < fps < math.inf:
    raise ValueError(f"{where}: fps must be a positive number, not {fps!r}")
  return Clip(tuple(names), float(fps))


def _check_keys(given: object, wanted: Collection[str], where: str) -> None:
  if not isinstance(given, dict):
    raise ValueError(f"{where} must be an object with the keys {wanted}, not {given!r}")
  if unknown := sorted(given.keys() - set(wanted)):
    raise ValueError(f"{where} has unknown keys {unknown}; known: {wanted}")
  if missing := sorted(set(wanted) - given.keys()):
    raise ValueError(f"{where} lacks {missing}")
