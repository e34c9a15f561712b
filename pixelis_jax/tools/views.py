"""The 15 ways a ballot looks at the same place: small changes that must not change the answer.

A view acts on what a tool returns, never on the overview the policy located with. So a rotated crop
does not change the meaning of "left of": where things lie relative to each other was read off the
unrotated overview, and only the reading of the detail is perturbed. Rotations end at 30 degrees
because glyphs keep their identity there; at 180 a 6 reads as a 9. Inversion changes what colour
things have, so it is kept from questions about colour.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pixelis_jax.types import Box, Pixels

# Rows and columns beyond the rotated square, so that the bicubic kernel (2 on each side) never sees
# an edge.
_MARGIN = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class View:
  """One visual operation, in this order: jitter, crop, rotation, contrast, filter, inversion.

  `rotate` is in degrees, counter-clockwise as seen. `dx`, `dy` move the box by a share of its own
  width and height; `scale` multiplies both about its centre. Questions of a kind in
  `excluded_kinds` are not asked under this view.
  """

  name: str
  rotate: float = 0.0
  contrast: Literal["none", "stretch"] = "none"
  filter: Literal["none", "denoise", "sharpen"] = "none"
  invert: bool = False
  dx: float = 0.0
  dy: float = 0.0
  scale: float = 1.0
  excluded_kinds: frozenset[str] = frozenset()


IDENTITY = View(name="identity")
_COLOUR = frozenset({"color", "colour"})

VIEWS: tuple[View, ...] = (
  IDENTITY,
  *(View(name=f"rotate{angle:+d}", rotate=float(angle)) for angle in (-30, -20, -10, 10, 20, 30)),
  View(name="stretch", contrast="stretch"),
  View(name="invert", invert=True, excluded_kinds=_COLOUR),
  View(name="stretch_invert", contrast="stretch", invert=True, excluded_kinds=_COLOUR),
  View(name="denoise", filter="denoise"),
  View(name="sharpen", filter="sharpen"),
  View(name="up_left", dx=-0.1, dy=-0.1),
  View(name="down_right", dx=0.1, dy=0.1),
  View(name="wide", scale=1.15),
)


BY_NAME = {view.name: view for view in VIEWS}


def views_for(kind: str) -> tuple[View, ...]:
  """The views, in the order of `VIEWS`, under which a question of this kind keeps its answer."""
  return tuple(view for view in VIEWS if kind not in view.excluded_kinds)


def undone(view: View) -> View | None:
  """The view of whose pictures `view` shows the plain ones; None where what it does is for good.

  A turn, an inversion, a move and a change of scale have one. What a filter or a stretched contrast
  gave could have come from many pictures.
  """
  if view.contrast != "none" or view.filter != "none":
    return None
  back = {"rotate": -view.rotate, "dx": -view.dx, "dy": -view.dy, "scale": 1.0 / view.scale}
  return dataclasses.replace(view, name=f"{view.name}, undone", **back)


def jitter(view: View, box: Box) -> Box:
  """The box moved and scaled about its centre; it may leave the image, the caller clips."""
  x, y = box.center
  x, y = x + view.dx * box.width, y + view.dy * box.height
  half_width, half_height = view.scale * box.width / 2, view.scale * box.height / 2
  return Box(x - half_width, y - half_height, x + half_width, y + half_height)


def look(view: View, pixels: Pixels, box: Box) -> UInt8[np.ndarray, "_ _ 3"]:
  """A new array: the crop at `box` (whole pixels in the image), changed in `View`'s order."""
  x0, y0, x1, y1 = (int(edge) for edge in dataclasses.astuple(box))
  if view.rotate:
    crop = _rotated(pixels, (x0, y0, x1, y1), view.rotate)
  else:
    crop = pixels[y0:y1, x0:x1].copy()
  if view.contrast == "stretch":
    crop = _stretched(crop)
  crop = _FILTERS[view.filter](crop)
  return np.uint8(255) - crop if view.invert else crop


def _rotated(pixels: Pixels, box: tuple[int, int, int, int], degrees: float) -> np.ndarray:
  """The box's content turned about its centre; corners come from the image, edges replicated."""
  x0, y0, x1, y1 = box
  width, height = x1 - x0, y1 - y0
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  reach = math.ceil(math.hypot(width, height) / 2) + _MARGIN
  left, top = (x0 + x1) // 2 - reach, (y0 + y1) // 2 - reach
  columns = np.clip(np.arange(left, left + 2 * reach + 1), 0, pixels.shape[1] - 1)
  rows = np.clip(np.arange(top, top + 2 * reach + 1), 0, pixels.shape[0] - 1)
  around = Image.fromarray(pixels[rows[:, None], columns[None, :]])
  # Output point p shows source point c + R (p - p_c): pixel centres are at +0.5 in both, as Pillow
  # has it.
  center_x, center_y = (x0 + x1) / 2 - left, (y0 + y1) / 2 - top
  affine = (
    (cos, -sin, center_x - cos * width / 2 + sin * height / 2)
    + (sin, cos, center_y - sin * width / 2 - cos * height / 2)
  )  # fmt: skip
  turned = around.transform(
    (width, height), Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC
  )
  return np.array(turned)


def _stretched(pixels: np.ndarray) -> np.ndarray:
  """The middle's 1st and 99th percentile of luminance (Rec. 601) become 0 and 255, in all channels.

  The middle is the central half of each side: what a box is put around. With the whole crop, a
  bright frame would keep faint writing faint. A middle of one luminance has nothing to stretch.
  """
  height, width = pixels.shape[:2]
  middle = pixels[height // 4 : height - height // 4, width // 4 : width - width // 4]
  luminance = middle @ np.array([0.299, 0.587, 0.114])
  low, high = np.percentile(luminance, (1.0, 99.0))
  if high - low < 1.0:
    return pixels
  return np.clip(np.rint((pixels - low) * (255.0 / (high - low))), 0.0, 255.0).astype(np.uint8)


def _denoised(pixels: np.ndarray) -> np.ndarray:
  """Bilateral filter (Tomasi and Manduchi, 1998): means over 5 x 5 of what is of like colour.

  Edges stay where they differ by far more than 80 grey levels, summed over the channels.
  """
  import cv2

  return cv2.bilateralFilter(pixels, 5, 80.0, 2.0)


def _sharpened(pixels: np.ndarray) -> np.ndarray:
  """Unsharp mask: thrice the picture less twice its blur of sigma 1.5."""
  import cv2

  seen = pixels.astype(np.float32)
  blurred = cv2.GaussianBlur(seen, (0, 0), 1.5)
  return np.clip(np.rint(3 * seen - 2 * blurred), 0.0, 255.0).astype(np.uint8)


_FILTERS = {"none": lambda pixels: pixels, "denoise": _denoised, "sharpen": _sharpened}
