"""SEGMENT_OBJECT_AT: the pixels of the object at a point or in a box, as a mask with a number.

Heavy packages are imported in the functions that need them: `import pixelis_jax.tools` stays fast.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from scipy import ndimage

from pixelis_jax.tools import places, views
from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.tools.views import View
from pixelis_jax.types import Box, Mask, Picture, Pixels, ToolResult

SEGMENT_OBJECT_AT = {
  "type": "function",
  "function": {
    "name": "segment_object_at",
    "description": "Find the outline of one object. Returns a numbered mask, which later calls can"
    " use, and a picture of it. Give either point_2d or bbox_2d; a box around the object is surer.",
    "parameters": {
      "type": "object",
      "properties": {
        "point_2d": {
          **places.POINT,
          "description": "A point [x, y] on the object in pixels of the image as shown.",
        },
        "bbox_2d": {
          **places.BOX,
          "description": "A tight box [x1, y1, x2, y2] around the object in pixels of the image as"
          " shown.",
        },
        "image": places.IMAGE,
      },
      "required": [],
    },
  },
}

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
_SAM_SIDE = 1024
# Of segment_anything/modeling/sam.py, github.com/facebookresearch/segment-anything.
_SAM_MEAN, _SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

_POINT_BOX = 0.1  # Share of the picture's sides that a point counts as when a view moves it.
_AROUND = 0.25  # Margin of the overlay in parts of the mask's longer side.
_LEAST, _MOST = 224, 448  # Longer side of the overlay: its outline is legible, its tokens few.
_TINTS = ((255, 0, 255), (0, 255, 0))  # The farther one from the object's colour is taken.


# GrabCut. The object is reduced, or enlarged, to this many pixels on its longer side, or a window
# around a point: the cost of a call does not grow with the image. Chosen on split dev by
# benchmarks/segment.py; to begin with, a disc of `_NEAR` of the window may be the object.
_SIDE, _WINDOW, _ROUNDS = 160, 128, 4
_HALF, _NEAR, _SEED = (
  0.45,
  0.45,
  0.06,
)  # The window in shares of the picture; discs in shares of it.
_PART, _HOLE = 0.1, 0.05  # Smaller pieces are left out, smaller holes filled.
_SMALL, _LARGE, _FULL = 2e-4, 0.6, 0.98  # Shares of where was looked that are doubtful.
_GROUND, _SURE, _PERHAPS_GROUND, _PERHAPS = 0, 1, 2, 3  # OpenCV's GC_BGD, FGD, PR_BGD, PR_FGD.
_TWICE = View(name="twice", scale=2.0)  # A box with as much of its surroundings as it has itself.
_SAM_SURE = 0.5  # Predicted IoU below which the model's mask is doubtful.


class Found(NamedTuple):
  """A mask's tight box and where its upper left corner is; `doubt` is empty if there is none."""

  inside: Bool[np.ndarray, "height width"]
  x: int
  y: int
  doubt: str


def segment_object_at(
  arguments: Mapping[str, object], sight: Sight, *, sam_folder: str | None = None
) -> ToolResult:
  """The mask in source pixels, and an overlay. By GrabCut, or by the SAM-family model in a folder.

  A view's jitter moves the prompt. The overlay comes under the view; its outline is drawn on top.
  """
  if ("point_2d" in arguments) == ("bbox_2d" in arguments):
    raise Mistake("give either point_2d or bbox_2d")
  shown = places.pick(sight, arguments.get("image", 1), "image")
  pixels = sight.pixels(shown.source, shown.frame)
  if "bbox_2d" in arguments:
    box = views.jitter(sight.view, places.box(arguments, shown))
    prompt = (box.x0, box.y0, box.x1, box.y1)
    region = _part(views.jitter(_TWICE, box), pixels)
  else:
    prompt = _moved(places.point(arguments, shown), shown, sight.view, pixels)
    region = _part(shown.box, pixels)
  left, top, right, bottom = (int(edge) for edge in dataclasses.astuple(region))
  prompt = tuple(c - (left, top)[i % 2] for i, c in enumerate(prompt))
  around = pixels[top:bottom, left:right]
  if sam_folder is None:
    found = sight.compute(grabcut, around, prompt)
  else:
    found = sight.compute(sam, around, prompt, sam_folder)
  x, y, (height, width) = float(left + found.x), float(top + found.y), found.inside.shape
  mask = Mask(
    inside=found.inside,
    source=shown.source,
    box=Box(x, y, x + width, y + height),
    frame=shown.frame,
  )
  number = len(sight.masks()) + 1
  area = int(mask.inside.sum())
  share = min(1.0, area / (shown.box.width * shown.box.height))
  text = f"Mask {number}: {area:,} pixels, box {places.told(shown, mask.box)},"
  text += f" covers {share:.1%} of the image."
  if found.doubt:
    text += f" It may be wrong: {found.doubt}."
  return ToolResult(text=text, images=(picture(mask, sight),), masks=(mask,))


def with_segmenter(folder: str) -> Callable[[Mapping[str, object], Sight], ToolResult]:
  """The tool with a SAM-family model: `encoder.onnx` and `decoder.onnx` in a folder.

  The encoder takes float32 [1, 3, 1024, 1024], normalised and padded, and gives the embedding. The
  decoder is what segment-anything's and MobileSAM's scripts/export_onnx_model.py write.

  Raises:
    ValueError: the folder lacks one of the two.
  """
  for name in (ENCODER, DECODER):
    if not (Path(folder) / name).is_file():
      raise ValueError(f"{folder} must hold {ENCODER} and {DECODER}: there is no {name}")
  return functools.partial(segment_object_at, sam_folder=folder)


def grabcut(pixels: UInt8[np.ndarray, "height width 3"], prompt: tuple[float, ...]) -> Found:
  """A box's or a point's object, by Rother et al., GrabCut, SIGGRAPH 2004.

  Args:
    prompt: x, y of a point, or x0, y0, x1, y1 of a box, in these pixels.

  Raises:
    Mistake: nothing is found.
  """
  found = _in_box(pixels, prompt) if len(prompt) == 4 else _around_point(pixels, prompt)
  height, width = found.shape
  at_edge = found[0].sum() + found[-1].sum() + found[:, 0].sum() + found[:, -1].sum()
  share, most = found.mean(), _FULL if len(prompt) == 4 else _LARGE
  doubt = ""
  if at_edge > 0.25 * (height + width):
    doubt = "it goes on beyond where was looked"
  elif share > most:
    doubt = "it fills all of where was looked"
  elif share < _SMALL:
    doubt = "it is hardly more than a spot"
  return _found(found, doubt)


def _in_box(
  pixels: UInt8[np.ndarray, "height width 3"], box: tuple[float, ...]
) -> Bool[np.ndarray, "height width"]:
  """What is in the box is what is unlike its surroundings; all else is ground."""
  x0, y0, x1, y1 = box
  scale = _SIDE / max(x1 - x0, y1 - y0)
  seen = _resized(pixels, scale)
  mask = np.full(seen.shape[:2], _GROUND, np.uint8)
  inside = tuple(slice(round(a * scale), round(b * scale)) for a, b in ((y0, y1), (x0, x1)))
  mask[inside] = _PERHAPS
  cut = _cut(seen, mask)
  parts, _ = ndimage.label(cut)
  areas = np.bincount(parts.ravel())
  areas[0] = 0
  return _back(np.isin(parts, np.flatnonzero(areas >= _PART * areas.max())) & cut, pixels)


def _around_point(
  pixels: UInt8[np.ndarray, "height width 3"], point: tuple[float, ...]
) -> Bool[np.ndarray, "height width"]:
  """An object of about a fifth of the picture's shorter side around the point, to begin with.

  The scale is that of the picture: to point in a zoomed one is to say how large the object is.
  """
  x, y = point
  half = _HALF * min(pixels.shape[:2])
  height, width = pixels.shape[:2]
  left, top = max(0, math.floor(x - half)), max(0, math.floor(y - half))
  right, bottom = min(width, math.ceil(x + half)), min(height, math.ceil(y + half))
  window = pixels[top:bottom, left:right]
  scale = _WINDOW / max(window.shape[:2])
  seen = _resized(window, scale)
  rows, columns = np.indices(seen.shape[:2])
  far = np.hypot(columns - (x - left) * scale, rows - (y - top) * scale) / (half * scale)
  mask = np.where(far <= _NEAR, _PERHAPS, _PERHAPS_GROUND).astype(np.uint8)
  edge = max(2, round(0.02 * _WINDOW))
  mask[:edge] = mask[-edge:] = mask[:, :edge] = mask[:, -edge:] = _GROUND
  mask[far <= max(_SEED, 1.5 / (half * scale))] = _SURE
  parts, _ = ndimage.label(_cut(seen, mask))
  at = parts[far == far.min()][0]
  found = np.zeros((height, width), bool)
  found[top:bottom, left:right] = _back((parts == at) & (at > 0), window)
  return found


def _cut(seen: Pixels, mask: UInt8[np.ndarray, "_ _"]) -> Bool[np.ndarray, "_ _"]:
  import cv2

  if not (mask & 1).any() or (mask & 1).all():  # It needs pixels of both.
    return (mask & 1) == 1
  cv2.setRNGSeed(0)  # Its colour models begin with a random clustering.
  models = np.zeros((1, 65)), np.zeros((1, 65))
  blue_first = np.ascontiguousarray(seen[..., ::-1])
  cut, *_ = cv2.grabCut(blue_first, mask, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
  return (cut & 1) == 1


def _resized(pixels: Pixels, scale: float) -> Pixels:
  import cv2

  size = tuple(max(2, round(side * scale)) for side in pixels.shape[1::-1])
  return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _back(
  cut: Bool[np.ndarray, "_ _"], pixels: UInt8[np.ndarray, "height width 3"]
) -> Bool[np.ndarray, "height width"]:
  """At the size of the pixels, without its small holes."""
  import cv2

  holes, _ = ndimage.label(ndimage.binary_fill_holes(cut) & ~cut)
  areas = np.bincount(holes.ravel())
  areas[0] = 0
  small = np.flatnonzero((areas > 0) & (areas < _HOLE * max(1, cut.sum())))
  filled = (cut | np.isin(holes, small)).astype(np.float32)
  return cv2.resize(filled, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0.5


def sam(
  pixels: UInt8[np.ndarray, "height width 3"], prompt: tuple[float, ...], folder: str
) -> Found:
  """As `grabcut`, by the model in `folder`: of its masks the one it is surest of."""
  size = pixels.shape[:2]
  encoder, decoder = _sessions(folder)
  image, resized = sam_image(pixels)
  (embedding,) = encoder.run(None, {encoder.get_inputs()[0].name: image})
  coordinates, labels = sam_prompt(prompt, size, resized)
  given = {
    "image_embeddings": embedding,
    "point_coords": coordinates,
    "point_labels": labels,
    "mask_input": np.zeros((1, 1, 256, 256), np.float32),
    "has_mask_input": np.zeros(1, np.float32),
    # Not the size of the pixels: the masks of a large image would fill the memory.
    "orig_im_size": np.array(resized, np.float32),
  }
  masks, scores = decoder.run(["masks", "iou_predictions"], given)
  best = int(scores[0].argmax())
  doubt = "the model itself is unsure" if scores[0, best] < _SAM_SURE else ""
  return _found(sam_mask(masks[0, best], size), doubt)


def sam_image(
  pixels: UInt8[np.ndarray, "height width 3"],
) -> tuple[Float32[np.ndarray, "1 3 side side"], tuple[int, int]]:
  """The encoder's input, longer side 1024, zeros to the right and below; its (height, width).

  As predictor.py, utils/transforms.py and modeling/sam.py of
  github.com/facebookresearch/segment-anything.
  """
  scale = _SAM_SIDE / max(pixels.shape[:2])
  height, width = (int(side * scale + 0.5) for side in pixels.shape[:2])
  image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
  normal = (np.asarray(image, np.float32) - np.float32(_SAM_MEAN)) / np.float32(_SAM_STD)
  padded = np.zeros((1, 3, _SAM_SIDE, _SAM_SIDE), np.float32)
  padded[0, :, :height, :width] = normal.transpose(2, 0, 1)
  return padded, (height, width)


def sam_prompt(
  prompt: tuple[float, ...], size: tuple[int, int], resized: tuple[int, int]
) -> tuple[Float32[np.ndarray, "1 N 2"], Float32[np.ndarray, "1 N"]]:
  """`point_coords` and `point_labels`: a point and the padding point, or a box's two corners."""
  scale = np.array([resized[1] / size[1], resized[0] / size[0]])
  at = np.array(prompt).reshape(-1, 2) * scale
  if len(prompt) == 2:
    return np.float32([[*at, (0.0, 0.0)]]), np.float32([[1, -1]])
  return np.float32([at]), np.float32([[2, 3]])


def sam_mask(
  logits: Float32[np.ndarray, "_ _"], size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
  """The decoder's mask at the size of the pixels: bilinear, above 0."""
  import cv2

  return cv2.resize(logits, size[::-1], interpolation=cv2.INTER_LINEAR) > 0


@functools.lru_cache(maxsize=1)
def _sessions(folder: str) -> tuple[Any, Any]:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1  # There are as many workers as CPUs.
  encoder, decoder = (
    onnxruntime.InferenceSession(
      str(Path(folder) / name), options, providers=["CPUExecutionProvider"]
    )
    for name in (ENCODER, DECODER)
  )
  return encoder, decoder


def picture(mask: Mask, sight: Sight) -> Picture:
  """The source around the mask with outline and tint, 224 to 448 pixels on the longer side."""
  pixels = sight.pixels(mask.source, mask.frame)
  margin = _AROUND * max(mask.box.width, mask.box.height) + 2
  b = mask.box
  crop = _part(Box(b.x0 - margin, b.y0 - margin, b.x1 + margin, b.y1 + margin), pixels)
  seen = views.look(sight.view, pixels, crop)
  inside = np.zeros(seen.shape, np.uint8)
  top, left = int(b.y0 - crop.y0), int(b.x0 - crop.x0)
  height, width = mask.inside.shape
  inside[top : top + height, left : left + width][mask.inside] = 255
  turned = View(name="turn", rotate=sight.view.rotate)
  inside = views.look(turned, inside, Box(0.0, 0.0, crop.width, crop.height))[..., 0] > 127
  drawn = sight.compute(overlay, seen, inside)
  return Picture(pixels=drawn, source=mask.source, box=crop, frame=mask.frame)


def overlay(
  pixels: UInt8[np.ndarray, "height width 3"], inside: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "_ _ 3"]:
  """The mask tinted and outlined in magenta, or in green where the object is like magenta."""
  import cv2

  longer = max(inside.shape)
  scale = min(max(longer, _LEAST), _MOST) / longer
  size = (max(1, round(inside.shape[1] * scale)), max(1, round(inside.shape[0] * scale)))
  smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  drawn = cv2.resize(pixels, size, interpolation=smooth)
  within = cv2.resize(inside.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5
  if not within.any():  # Rotated out of sight, or thinner than a pixel.
    return drawn
  colour = drawn[within].mean(0)
  tint = max(_TINTS, key=lambda rgb: float(np.linalg.norm(colour - rgb)))
  drawn[within] = np.rint(0.75 * drawn[within] + 0.25 * np.array(tint)).astype(np.uint8)
  outlines, _ = cv2.findContours(within.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
  cv2.drawContours(drawn, outlines, -1, (0, 0, 0), 4)
  cv2.drawContours(drawn, outlines, -1, tint, 2)
  return drawn


def _found(inside: Bool[np.ndarray, "height width"], doubt: str) -> Found:
  rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
  if len(rows) == 0:
    raise Mistake("no object was found there: try a box around it, or a point nearer its middle")
  top, left = int(rows[0]), int(columns[0])
  return Found(inside[top : rows[-1] + 1, left : columns[-1] + 1].copy(), left, top, doubt)


def _moved(
  point: tuple[float, float], shown: Shown, view: View, pixels: Pixels
) -> tuple[float, float]:
  """A point under the view's jitter: as the centre of a box a tenth of the picture's sides wide."""
  (x, y), half_width, half_height = point, shown.box.width / 20, shown.box.height / 20
  x, y = views.jitter(
    view, Box(x - half_width, y - half_height, x + half_width, y + half_height)
  ).center
  height, width = pixels.shape[:2]
  return min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)


def _part(box: Box, pixels: Pixels) -> Box:
  """Widened to whole pixels and cut to the image."""
  height, width = pixels.shape[:2]
  x0, y0 = max(0, math.floor(box.x0)), max(0, math.floor(box.y0))
  x1, y1 = min(width, math.ceil(box.x1)), min(height, math.ceil(box.y1))
  if x0 >= x1 or y0 >= y1:
    raise Mistake("the box lies outside the image")
  return Box(float(x0), float(y0), float(x1), float(y1))
