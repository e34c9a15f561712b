"""ZOOM_IN: the source pixels under a box, in three wire formats of released policies."""

from collections.abc import Mapping

from pixelis_jax.tools import places
from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.types import Box, ToolResult

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
  height, width = _original(shown) if number <= len(sight.task.images) else shown.size
  x_unit, y_unit = (1, 1) if all(c < 1 for c in corners) else (width, height)
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


def image_zoom_in_tool(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """DeepEyes' zoom: the first image in its own pixels; the clipped sides must exceed 30.

  From visual_toolbox_v2.py, github.com/Visual-Agent/DeepEyes. Its enlarging of boxes below 28
  pixels is left out: the test for 30 comes first there, so no call reaches it.
  """
  shown = sight.shown()[0]
  height, width = _original(shown)
  x0, y0, x1, y1 = places.clipped(arguments["bbox_2d"], height, width)
  if min(x1 - x0, y1 - y0) <= 30:
    raise Mistake(
      f"bbox_2d is too small: {x1 - x0:g} x {y1 - y0:g} pixels, more than 30 x 30 needed"
    )
  picture = sight.crop(shown.source, Box(x0, y0, x1, y1))
  return ToolResult(text="Here is the zoomed image.", images=(picture,))


def _original(shown: Shown) -> tuple[int, int]:
  """Height and width of a task image in its own pixels."""
  return int(shown.box.height), int(shown.box.width)


def _fraction(x: float) -> float:
  return min(max(0.0, x), 1.0)
