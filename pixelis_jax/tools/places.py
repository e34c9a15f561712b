"""Where the policy points: its coordinates to source pixels, and back for what it is told."""

from collections.abc import Mapping, Sequence

from pixelis_jax.tools.sight import Mistake, Shown, Sight, Size
from pixelis_jax.types import Box, Mask

MAX_ASPECT = 100.0

# What descriptions of coordinates say, of a policy whose frame is the image as shown.
PIXELS = "pixels of the image as shown"
# Arguments that several tools have. Coordinates are in the policy's frame.
IMAGE = {
  "type": "integer",
  "description": "Which image, counted from 1 in the order shown. Default: 1.",
  "minimum": 1,
}
BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
MASK = {
  "type": "integer",
  "description": "Number of a mask that an earlier call returned.",
  "minimum": 1,
}


def pick(sight: Sight, number: float | int, name: str) -> Shown:
  """The image with this number, counted from 1."""
  images = sight.shown()
  if number != int(number) or not 1 <= number <= len(images):
    raise Mistake(f"Incorrect `{name}` {number:g}: choose one of the images 1 to {len(images)}")
  return images[int(number) - 1]


def mask(sight: Sight, number: float | int) -> Mask:
  """The mask with this number, counted from 1 over the whole episode."""
  masks = sight.masks()
  if not masks:
    raise Mistake(f"there is no mask {number:g}: no call has returned one")
  if number > len(masks):
    raise Mistake(f"mask {number:g} must be one of 1 to {len(masks)}")
  return masks[int(number) - 1]


def box(arguments: Mapping[str, object], shown: Shown) -> Box:
  """`bbox_2d` in source pixels: its part inside the image as shown, at least 2 units a side."""
  height, width = shown.size
  x0, y0, x1, y1 = clipped(arguments["bbox_2d"], height, width)
  if min(x1 - x0, y1 - y0) < 2:
    raise Mistake(f"bbox_2d is too small: {x1 - x0:g} x {y1 - y0:g} pixels, at least 2 x 2 needed")
  return shown.to_source(x0 / width, y0 / height, x1 / width, y1 / height)


def point(arguments: Mapping[str, object], shown: Shown) -> tuple[float, float]:
  """`point_2d` in source pixels, (x, y); it must lie inside the image as shown."""
  height, width = shown.size
  x, y = (float(c) for c in arguments["point_2d"])
  if not (0 <= x < width and 0 <= y < height):
    raise Mistake(f"point_2d [{x:g}, {y:g}] must satisfy 0 <= x < {width} and 0 <= y < {height}")
  half = 0.5 / max(width, height)
  return shown.to_source(
    x / width - half, y / height - half, x / width + half, y / height + half
  ).center


def told(shown: Shown, box: Box) -> list[int]:
  """[x1, y1, x2, y2] of a source box in whole units of the image as shown: how a policy is told."""
  height, width = shown.size
  x0, y0, x1, y1 = shown.from_source(box)
  return [round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)]


def pointed(sight: Sight, box: Box, image: int = 1) -> dict[str, object]:
  """Arguments for a source box in an image, in whole units of that image as shown, at least 2."""
  shown = sight.shown()[image - 1]
  height, width = shown.size
  x0, y0, x1, y1 = told(shown, box)
  x0, y0 = min(max(x0, 0), width - 2), min(max(y0, 0), height - 2)
  corners = [x0, y0, min(max(x1, x0 + 2), width), min(max(y1, y0 + 2), height)]
  return {"bbox_2d": corners} if image == 1 else {"bbox_2d": corners, "image": image}


def frame(arguments: Mapping[str, object], sight: Sight) -> Size:
  """(height, width) of what a call's coordinates are in: its image, as the policy was shown it."""
  return pick(sight, arguments.get("image", 1), "image").size


def clipped(
  corners: Sequence[float | int], height: int, width: int
) -> tuple[float, float, float, float]:
  """The part of the box inside an image of this size; it must exist, not thinner than 1 : 100."""
  x0, y0, x1, y1 = (float(c) for c in corners)
  x0, y0, x1, y1 = max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)
  if not (x0 < x1 and y0 < y1):
    asked = ", ".join(f"{c:g}" for c in corners)
    raise Mistake(
      f"bbox_2d [{asked}] must satisfy 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}"
    )
  if max(x1 - x0, y1 - y0) > MAX_ASPECT * min(x1 - x0, y1 - y0):
    raise Mistake(f"bbox_2d is too thin: {x1 - x0:g} x {y1 - y0:g} pixels, at most 100 to 1")
  return x0, y0, x1, y1
