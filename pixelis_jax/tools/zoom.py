"""ZOOM_IN: the source pixels under a box, in three wire formats of released policies."""

import math
from collections.abc import Mapping

from pixelis_jax.tools import places
from pixelis_jax.tools.sight import Mistake, Shown, Sight, Size
from pixelis_jax.types import Box, ToolResult

SIDE = 30  # Pixels that both sides of DeepEyes' boxes must exceed.

ZOOM_IN = {
  "type": "function",
  "function": {
    "name": "zoom_in",
    "description": "Zoom in on a region of an image to see its details.",
    "parameters": {
      "type": "object",
      "properties": {
        "bbox_2d": {
          **places.BOX,
          "description": "The region [x1, y1, x2, y2] in pixels of the image as shown.",
        },
        "image": places.IMAGE,
      },
      "required": ["bbox_2d"],
    },
  },
}

# Name, texts and key order as in the prompts of the released Pixel-Reasoner checkpoints.
CROP_IMAGE_NORMALIZED = {
  "type": "function",
  "function": {
    "name": "crop_image_normalized",
    "description": "Zoom in on the image based on the bounding box coordinates. It is useful when"
    " the object or text in the image is too small to be seen.",
    "parameters": {
      "type": "object",
      "properties": {
        "bbox_2d": {
          "type": "array",
          "description": "coordinates for bounding box of the area you want to zoom in. Values"
          " should be within [0.0,1.0].",
          "items": {"type": "number"},
        },
        "target_image": {
          "type": "number",
          "description": "The index of the image to crop. Index from 1 to the number of images."
          " Choose 1 to operate on original image.",
        },
      },
      "required": ["bbox_2d", "target_image"],
    },
  },
}

IMAGE_ZOOM_IN_TOOL = {
  "type": "function",
  "function": {
    "name": "image_zoom_in_tool",
    "description": "Zoom in on a region of the original image.",
    "parameters": {
      "type": "object",
      "properties": {
        "bbox_2d": {
          **places.BOX,
          "description": "The region [x1, y1, x2, y2] in pixels of the image.",
        },
        "label": {"type": "string", "description": "What is in the region."},
      },
      "required": ["bbox_2d"],
    },
  },
}


def zoom_in(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """Absolute pixels of image `image` as the policy was shown it: Qwen2.5-VL's own frame.

  The box is clipped to the image; at least 2 shown pixels a side and an aspect of at most 100 must
  remain. A box in an earlier crop is resolved to the source, so zooming twice shows real detail.
  """
  shown = places.pick(sight, arguments.get("image", 1), "image")
  picture = sight.crop(shown.source, places.box(arguments, shown), shown.frame)
  return ToolResult(text="Here is the zoomed image.", images=(picture,))


def crop_image_normalized(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """Pixel-Reasoner's crop: fractions if all four numbers are below 1, else pixels.

  0.1 of the image is added on each side. A box holding exactly 1.0 is read in pixels: the policies
  were trained on that. Pixels are the source's for a task image and those shown for a crop, which
  is kept as resized. Both sides must exceed 28 of them. From execute_tool and crop_image_normalized
  of experience_maker.py, github.com/TIGER-AI-Lab/Pixel-Reasoner. Unlike there, a `target_image`
  below 1 is refused instead of counted from the end.
  """
  number, corners = arguments["target_image"], arguments["bbox_2d"]
  if len(corners) != 4:
    raise Mistake(f"bbox_2d must have 4 items, not {len(corners)}")
  shown = places.pick(sight, number, "target_image")
  height, width = _cropped_from(shown, number, sight)
  y_unit, x_unit = normalized_frame(arguments, sight)
  # Pillow's crop rounds the edges.
  x0 = round(width * _fraction(corners[0] / x_unit - 0.1))
  y0 = round(height * _fraction(corners[1] / y_unit - 0.1))
  x1 = round(width * _fraction(corners[2] / x_unit + 0.1))
  y1 = round(height * _fraction(corners[3] / y_unit + 0.1))
  if x1 < x0:
    raise Mistake("Coordinate 'right' is less than 'left'")
  if y1 < y0:
    raise Mistake("Coordinate 'lower' is less than 'upper'")
  if min(x1 - x0, y1 - y0) <= 28:
    raise Mistake(f"Cropped image is too small: {x1 - x0}x{y1 - y0}")
  box = shown.to_source(x0 / width, y0 / height, x1 / width, y1 / height)
  picture = sight.crop(shown.source, box, shown.frame)
  shown_height, shown_width = sight.shown_size(*picture.pixels.shape[:2])
  text = f"\nHere is the cropped image (Image Size: {shown_width}x{shown_height}):"
  return ToolResult(text=text, images=(picture,))


def normalized_frame(arguments: Mapping[str, object], sight: Sight) -> Size:
  """(height, width) of what the coordinates of a call of `crop_image_normalized` are in."""
  number = arguments["target_image"]
  if all(c < 1 for c in arguments["bbox_2d"]):
    return 1, 1
  return _cropped_from(places.pick(sight, number, "target_image"), number, sight)


def crop_image_normalized_at(sight: Sight, box: Box) -> dict[str, object]:
  """Arguments of `crop_image_normalized` for a source box of image 1, which it shows with more
  around it: fractions to a thousandth, below 1, as pixels begin there.
  """
  fractions = sight.shown()[0].from_source(box)
  corners = [min(max(round(c, 3), 0.0), 0.999) for c in fractions]
  return {"bbox_2d": corners, "target_image": 1}


def image_zoom_in_tool(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """DeepEyes' zoom: the first image in its own pixels; the clipped sides must exceed 30.

  From visual_toolbox_v2.py, github.com/Visual-Agent/DeepEyes. Its enlarging of boxes below 28
  pixels is left out: the test for 30 comes first there, so no call reaches it.
  """
  shown = _first(sight)
  x0, y0, x1, y1 = places.clipped(arguments["bbox_2d"], *_original(shown))
  if min(x1 - x0, y1 - y0) <= SIDE:
    raise Mistake(
      f"bbox_2d is too small: {x1 - x0:g} x {y1 - y0:g} pixels, more than {SIDE} x {SIDE} needed"
    )
  picture = sight.crop(shown.source, Box(x0, y0, x1, y1))
  return ToolResult(text="Here is the zoomed image.", images=(picture,))


def original_frame(arguments: Mapping[str, object], sight: Sight) -> Size:
  """(height, width) of what the coordinates of a call of `image_zoom_in_tool` are in."""
  return _original(_first(sight))


def image_zoom_in_tool_at(sight: Sight, box: Box) -> dict[str, object]:
  """Arguments of `image_zoom_in_tool` for a source box, made as large as the tool asks for."""
  height, width = _original(_first(sight))
  x0, x1 = _widened(box.x0, box.x1, width)
  y0, y1 = _widened(box.y0, box.y1, height)
  return {"bbox_2d": [x0, y0, x1, y1]}


def _first(sight: Sight) -> Shown:
  if not sight.task.images:
    raise Mistake("there is no image here to zoom in on")
  return sight.shown()[0]


def _widened(low: float, high: float, limit: int) -> tuple[int, int]:
  """Whole pixels around these, more than `SIDE` of them where the image has so many."""
  low, high = max(math.floor(low), 0), min(math.ceil(high), limit)
  missing = SIDE + 1 - (high - low)
  if missing <= 0:
    return low, high
  low = max(min(low - missing // 2, limit - (SIDE + 1)), 0)
  return low, min(low + SIDE + 1, limit)


def _cropped_from(shown: Shown, number: float | int, sight: Sight) -> Size:
  """The pixels that Pixel-Reasoner counts: of a task image its own, of a crop those shown."""
  return _original(shown) if number <= len(sight.task.images) else shown.size


def _original(shown: Shown) -> Size:
  """(height, width) of a task image in its own pixels."""
  return int(shown.box.height), int(shown.box.width)


def _fraction(x: float) -> float:
  return min(max(0.0, x), 1.0)
