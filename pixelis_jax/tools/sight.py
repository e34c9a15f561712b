"""What the policy has been shown, and the one way for a tool to get pixels."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from pixelis_jax.tools import views
from pixelis_jax.tools.views import View
from pixelis_jax.types import Box, Mask, Picture, Pixels, Task, ToolResult, Video

Size = tuple[int, int]
ShownFrames = Callable[[Video], tuple[Int[np.ndarray, " N"], Size]]

MAX_ASPECT = 200.0  # What Qwen's image processor can show: its smart_resize refuses more.
_ROUNDING = 1e-6  # Source pixels of float noise that must not widen a crop by a row.


class Mistake(ValueError):
  """The policy asked for what cannot be done; the message is what it is told."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
  """One image as the policy saw it, `size` = (height, width) large.

  `box` is in source pixels of task image `source`, or of frame `frame` of video `source`; all of it
  for a task image. `rotate` is the view's angle in degrees, 0 for a task image.
  """

  source: int
  box: Box
  size: Size
  rotate: float
  frame: int | None = None

  def to_source(self, x0: float, y0: float, x1: float, y1: float) -> Box:
    """The source box under a box given in fractions of this image.

    In a rotated image the centre is turned back; width and height are kept, as the next crop is
    rotated again.
    """
    half_width, half_height = (x1 - x0) * self.box.width / 2, (y1 - y0) * self.box.height / 2
    u = ((x0 + x1) / 2 - 0.5) * self.box.width
    v = ((y0 + y1) / 2 - 0.5) * self.box.height
    cos, sin = math.cos(math.radians(self.rotate)), math.sin(math.radians(self.rotate))
    x, y = self.box.center
    x, y = x + cos * u - sin * v, y + sin * u + cos * v
    return Box(x - half_width, y - half_height, x + half_width, y + half_height)

  def from_source(self, box: Box) -> tuple[float, float, float, float]:
    """The inverse of `to_source`: x0, y0, x1, y1 of a source box in fractions of this image."""
    half_width = box.width / 2 / self.box.width
    half_height = box.height / 2 / self.box.height
    x, y = (a - b for a, b in zip(box.center, self.box.center, strict=True))
    cos, sin = math.cos(math.radians(self.rotate)), math.sin(math.radians(self.rotate))
    u = 0.5 + (cos * x + sin * y) / self.box.width
    v = 0.5 + (cos * y - sin * x) / self.box.height
    return u - half_width, v - half_height, u + half_width, v + half_height


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
  """One call's world: the task, the results before it, and the view that pixels come under.

  `shown_size` is (height, width) of an image to the frame its coordinates have, `shown_frames` a
  video to the numbers of its frames that are shown and that frame. `compute` runs a costly function
  of a module's top level on arrays and plain values: here, or in a process with limits.
  """

  task: Task
  results: Sequence[ToolResult]
  shown_size: Callable[[int, int], Size]
  view: View
  shown_frames: ShownFrames | None = None
  compute: Callable[..., Any] = operator.call

  def shown(self) -> list[Shown]:
    """Every image in the order the policy saw them: the task's, then the pictures of the results.

    One view holds for a whole episode, so earlier pictures were rotated by this call's angle.
    """
    images = [
      self._shown(i, Box(0.0, 0.0, float(image.shape[1]), float(image.shape[0])), image.shape, 0.0)
      for i, image in enumerate(self.task.images)
    ]
    pictures = [picture for result in self.results for picture in result.images]
    return images + [
      self._shown(p.source, p.box, p.pixels.shape, self.view.rotate, p.frame) for p in pictures
    ]

  def masks(self) -> list[Mask]:
    """Every mask of the episode so far, in the order of their numbers."""
    return [mask for result in self.results for mask in result.masks]

  def pixels(self, source: int, frame: int | None = None) -> Pixels:
    """All of a task image, or of a video's frame."""
    task = self.task
    return task.images[source] if frame is None else task.videos[source].frames[frame]

  def crop(self, source: int, box: Box, frame: int | None = None) -> Picture:
    """Source pixels at the box, under the view.

    The box is moved by the view's jitter, clipped to the image and widened to whole pixels.

    Raises:
      Mistake: nothing is left inside the image, or the rest is too thin to be shown.
    """
    pixels = self.pixels(source, frame)
    height, width = pixels.shape[:2]
    box = views.jitter(self.view, box)
    x0, x1 = _whole(box.x0, box.x1, width)
    y0, y1 = _whole(box.y0, box.y1, height)
    if x0 >= x1 or y0 >= y1:
      raise Mistake("the box lies outside the image")
    if max(x1 - x0, y1 - y0) > MAX_ASPECT * min(x1 - x0, y1 - y0):
      raise Mistake(f"the box is too thin: {x1 - x0} x {y1 - y0} pixels")
    box = Box(float(x0), float(y0), float(x1), float(y1))
    seen = views.look(self.view, pixels, box)
    return Picture(pixels=seen, source=source, box=box, frame=frame)

  def _shown(
    self,
    source: int,
    box: Box,
    shape: tuple[int, ...],
    rotate: float,
    frame: int | None = None,
  ) -> Shown:
    size = self.shown_size(shape[0], shape[1])
    return Shown(source=source, box=box, size=size, rotate=rotate, frame=frame)


def _whole(low: float, high: float, limit: int) -> tuple[int, int]:
  return max(0, math.floor(low + _ROUNDING)), min(limit, math.ceil(high - _ROUNDING))
