"""SEGMENT_OBJECT_AT: the pixels of the object at a point or in a box, as a mask with a number.

Heavy packages are imported in the functions that need them: `import pixelis_jax.tools` stays fast.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

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

# GrabCut's working resolution in pixels: small enough to be quick whatever the image, and large
# enough that its smoothing, which is in pixels, leaves thin parts.
_BOX_SIDE = (160, 256)  # Of a box's longer side: its own between these.
_RING = 0.3  # What is around a box and known to be background, in parts of its longer side.
_WINDOW_SIDE = 224  # Of a window around a point.
# Half sides of those windows in parts of the picture's shorter side: the object's size is unknown.
_WINDOWS = (0.3, 0.45, 0.65, 1.0)
_RIM = 0.02  # What is background at a window's edge, in parts of its side.
_GUESS, _SEED = 0.45, 0.1  # Radii in half windows: what may be the object, and what is.
_FRAME = 240  # Shorter side of the picture in which guesses are compared.
_AGREEING = 4  # A guess is as good as this many others are like it.
_DARK = 128  # A picture whose brightest half percent is below it is brightened.
_NOISE = 8.0  # Standard deviation of noise from which on it is removed.
_PIECE = 0.1  # Parts of a box's object that are smaller than this part of the largest are left out.
_HOLE = 0.05  # Holes that are smaller than this part of the mask are filled.

# Measured by benchmarks/segment.py on its development split: below these a mask is mostly wrong.
_LIKE_BOX = 0.5  # Intersection over union of a mask's box and the box it was asked for.
_AGREED = 0.6  # Mean intersection over union with the guesses most like it.
_ALL, _SPECK = 0.95, 2.0  # Part of the picture that is "all"; parts of the seed's area.

GRABCUT = "grabcut"
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
_SAM_SIDE = 1024
# Of segment_anything/modeling/sam.py, github.com/facebookresearch/segment-anything.
_SAM_MEAN, _SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_SAM_SURE = 0.5  # Of the intersection over union that the model predicts of itself.

_TWICE = View(name="twice", scale=2.0)
_HALF_MORE = View(name="half more", scale=1.5)
_POINT_BOX = 0.1  # Share of the picture's sides that a point counts as when a view moves it.
_AROUND = 0.25  # Margin of the overlay in parts of the mask's longer side.
_LEAST, _MOST = 224, 448  # Longer side of the overlay: its outline is legible, its tokens few.
_TINTS = ((255, 0, 255), (0, 255, 0))  # The farther one from the object's colour is taken.

Prompt = tuple[float, ...]  # x, y of a point, or x0, y0, x1, y1 of a box.
Image3 = UInt8[np.ndarray, "_ _ 3"]
Inside = Bool[np.ndarray, "_ _"]


class Found(NamedTuple):
  """A mask's tight box and where its upper left corner is; `doubt` is empty if there is none."""

  inside: Bool[np.ndarray, "height width"]
  x: int
  y: int
  doubt: str


def segment_object_at(
  arguments: Mapping[str, object], sight: Sight, *, segmenter: str = GRABCUT
) -> ToolResult:
  """The mask in source pixels, and an overlay.

  A view's jitter moves the prompt. The overlay comes under the view; its outline is drawn on top.

  Args:
    segmenter: "grabcut", or the folder of a SAM-family model; see `check_segmenter`.
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
    x, y = prompt = _moved(places.point(arguments, shown), shown, sight.view, pixels)
    around = views.jitter(_HALF_MORE, shown.box)  # A crop may cut the object.
    region = _part(_hull(around, Box(x - 1.0, y - 1.0, x + 1.0, y + 1.0)), pixels)
  left, top, right, bottom = (int(edge) for edge in dataclasses.astuple(region))
  prompt = tuple(c - (left, top)[i % 2] for i, c in enumerate(prompt))
  searched = pixels[top:bottom, left:right]
  if segmenter == GRABCUT:
    found = sight.compute(grabcut, searched, prompt)
  else:
    found = sight.compute(sam, searched, prompt, segmenter)
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


def check_segmenter(name: str) -> None:
  """Raises ValueError unless it is "grabcut" or a folder with `encoder.onnx` and `decoder.onnx`.

  The encoder takes float32 [1, 3, 1024, 1024], normalised and padded, and gives the embedding. The
  decoder is what segment-anything's and MobileSAM's scripts/export_onnx_model.py write.
  """
  if name == GRABCUT:
    return
  for file in (ENCODER, DECODER):
    if not (Path(name) / file).is_file():
      raise ValueError(
        f"segmenter {name!r} must be {GRABCUT!r} or a folder that holds {ENCODER} and {DECODER}:"
        f" there is no {file}"
      )


def grabcut(pixels: Image3, prompt: Prompt) -> Found:
  """The object in a box or at a point of these pixels: Rother et al., GrabCut, SIGGRAPH 2004.

  From a point, GrabCut guesses in windows of four sizes, watershed and GrabCut from its basin guess
  too, and the guess that the others agree with most is taken.

  Raises:
    Mistake: nothing is found.
  """
  return _in_box(pixels, prompt) if len(prompt) == 4 else _at_point(pixels, prompt)


def _in_box(pixels: Image3, prompt: Prompt) -> Found:
  """What differs from the ring around the box."""
  x0, y0, x1, y1 = prompt
  reach = _RING * max(x1 - x0, y1 - y0)
  around = _clipped((x0 - reach, y0 - reach, x1 + reach, y1 + reach), pixels)
  work, (x0, y0, x1, y1) = _scaled(pixels, around, _box_scale(x1 - x0, y1 - y0), prompt)
  left, top, right, bottom = round(x0), round(y0), max(round(x1), 1), max(round(y1), 1)
  marks = np.full(work.shape[:2], _NOT, np.uint8)
  marks[max(top, 0) : bottom, max(left, 0) : right] = _MAYBE
  if (marks == _MAYBE).all():  # The box is the picture: something must be background.
    _rim(marks, math.ceil(_RIM * max(marks.shape)))
  inside = _pieces(_cut(work, marks, 3))
  found = _found(_Guess(inside, around))
  asked = Box(*prompt)
  x, y, (height, width) = found.x, found.y, found.inside.shape
  like = asked.iou(Box(float(x), float(y), float(x + width), float(y + height)))
  if like < _LIKE_BOX:
    return found._replace(doubt="it fills only part of the box")
  return found


def _at_point(pixels: Image3, prompt: Prompt) -> Found:
  """What several guesses agree on."""
  x, y = prompt
  short = min(pixels.shape[:2])
  part = _clipped((x - 2 * short, y - 2 * short, x + 2 * short, y + 2 * short), pixels)
  guesses = [_in_window(pixels, prompt, window * short) for window in _WINDOWS]
  basin = _basin(pixels, prompt, part)
  guesses += [basin, _from_basin(pixels, prompt, basin)]
  framed = [_seen(guess, part, basin.inside.shape) for guess in guesses]
  likeness = _likeness(framed)
  best = int(likeness.argmax())
  found = _found(guesses[best])
  if framed[best].mean() > _ALL:
    return found._replace(doubt="it covers nearly all of the picture")
  if found.inside.sum() < _SPECK * math.pi * (_SEED * _WINDOWS[0] * short) ** 2:
    return found._replace(doubt="it is hardly more than the point")
  if likeness[best] < _AGREED:
    return found._replace(doubt="other outlines are as likely there, and a box would decide")
  return found


class _Guess(NamedTuple):
  """A mask at a working resolution, of the part (left, top, right, bottom) of the pixels."""

  inside: Inside
  part: tuple[int, int, int, int]


# Marks of GrabCut: certainly not and certainly the object, probably not and maybe.
_NOT, _SURE, _HARDLY, _MAYBE = range(4)


def _in_window(pixels: Image3, point: Prompt, half: float) -> _Guess:
  """GrabCut in a window around the point, whose edge is background."""
  import cv2

  x, y = point
  part = _clipped((x - half, y - half, x + half, y + half), pixels)
  scale = _WINDOW_SIDE / max(part[2] - part[0], part[3] - part[1])
  work, (x, y) = _scaled(pixels, part, scale, point)
  marks = np.full(work.shape[:2], _HARDLY, np.uint8)
  at = int(x), int(y)
  cv2.circle(marks, at, max(2, round(_GUESS * half * scale)), _MAYBE, -1)
  _rim(marks, round(_RIM * _WINDOW_SIDE))
  cv2.circle(marks, at, max(2, round(_SEED * half * scale)), _SURE, -1)
  return _Guess(_piece(_cut(work, marks, 2), at), part)


def _basin(pixels: Image3, point: Prompt, part: tuple[int, int, int, int]) -> _Guess:
  """Watershed of the colour gradient, from the point and from the part's edge."""
  import cv2
  from skimage.segmentation import watershed

  work, (x, y) = _scaled(pixels, part, _FRAME / min(pixels.shape[:2]), point)
  lab = cv2.cvtColor(work.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
  smooth = cv2.GaussianBlur(lab, (0, 0), 2.0)
  steps = [cv2.Sobel(smooth, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1))]
  gradient = np.sqrt(sum((step**2).sum(2) for step in steps))
  marks = np.zeros(work.shape[:2], np.int32)
  _rim(marks, 3, 1)
  cv2.circle(marks, (int(x), int(y)), 4, 2, -1)
  return _Guess(watershed(gradient, marks) == 2, part)


def _from_basin(pixels: Image3, point: Prompt, basin: _Guess) -> _Guess:
  """GrabCut that begins with the basin and ends in its box, somewhat widened."""
  import cv2

  whole = _found(basin)
  height, width = whole.inside.shape
  x, y, wider = whole.x, whole.y, (0.08 * width, 0.08 * height)
  box = (x - wider[0], y - wider[1], x + width + wider[0], y + height + wider[1])
  reach = 0.4 * max(width, height)
  part = _clipped((x - reach, y - reach, x + width + reach, y + height + reach), pixels)
  scale = _box_scale(box[2] - box[0], box[3] - box[1])
  work, (x0, y0, x1, y1, x, y) = _scaled(pixels, part, scale, (*box, *point))
  marks = np.full(work.shape[:2], _NOT, np.uint8)
  marks[max(round(y0), 0) : round(y1), max(round(x0), 0) : round(x1)] = _HARDLY
  marks[_seen(basin, part, work.shape[:2])] = _MAYBE
  at = min(int(x), work.shape[1] - 1), min(int(y), work.shape[0] - 1)
  cv2.circle(marks, at, 2, _SURE, -1)
  return _Guess(_piece(_cut(work, marks, 2), at), part)


def _rim(marks: np.ndarray, width: int, mark: int = _NOT) -> None:
  """Marks the outermost pixels, in place."""
  marks[:width], marks[-width:], marks[:, :width], marks[:, -width:] = mark, mark, mark, mark


def _likeness(guesses: list[Inside]) -> Float32[np.ndarray, " N"]:
  """Of each guess to the few others that are most like it: mean intersection over union."""
  flat = np.array([guess.ravel() for guess in guesses], np.float32)
  common, areas = flat @ flat.T, flat.sum(1)
  like = common / np.maximum(areas[:, None] + areas[None] - common, np.float32(1))
  np.fill_diagonal(like, -1)
  return np.sort(like, axis=1)[:, -_AGREEING:].mean(1)


def _cut(work: Image3, marks: UInt8[np.ndarray, "_ _"], rounds: int) -> Inside:
  """GrabCut; the same on every call. Without anything certain to learn from, the marks."""
  import cv2

  maybe = marks % 2 == 1  # _SURE or _MAYBE.
  if not maybe.all() and maybe.any():
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(work, marks, None, *models, rounds, cv2.GC_INIT_WITH_MASK)
  return marks % 2 == 1


def _piece(inside: Inside, at: tuple[int, int]) -> Inside:
  """The part that holds the pixel (x, y), which is inside."""
  import cv2

  _, labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)
  return _filled(labels == labels[at[1], at[0]])


def _pieces(inside: Inside) -> Inside:
  """The parts that are not much smaller than the largest."""
  import cv2

  _, labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)
  areas = np.bincount(labels.ravel())
  areas[0] = 0
  kept = areas >= max(1.0, _PIECE * areas.max())
  return _filled(kept[labels])


def _filled(inside: Inside) -> Inside:
  """Without its small holes."""
  import cv2
  from scipy.ndimage import binary_fill_holes

  holes = binary_fill_holes(inside) & ~inside
  _, labels = cv2.connectedComponents(holes.astype(np.uint8), connectivity=4)
  areas = np.bincount(labels.ravel())
  areas[0] = inside.size
  return inside | (areas < _HOLE * inside.sum())[labels]


def _box_scale(width: float, height: float) -> float:
  longer, (least, most) = max(width, height), _BOX_SIDE
  return min(max(longer, least), most) / longer


def _clipped(edges: tuple[float, ...], pixels: Image3) -> tuple[int, int, int, int]:
  """Whole pixels that hold these edges, inside the picture; at least one pixel."""
  height, width = pixels.shape[:2]
  left, top = (
    min(max(math.floor(c), 0), n - 1) for c, n in zip(edges, (width, height), strict=False)
  )
  right, bottom = (
    min(max(math.ceil(c), 1), n) for c, n in zip(edges[2:], (width, height), strict=True)
  )
  return left, top, max(right, left + 1), max(bottom, top + 1)


def _scaled(
  pixels: Image3, part: tuple[int, int, int, int], scale: float, at: Prompt
) -> tuple[Image3, Prompt]:
  """The part at a scale, and what x, y, x, y... are there."""
  import cv2

  left, top, right, bottom = part
  size = max(2, round((right - left) * scale)), max(2, round((bottom - top) * scale))
  work = pixels[top:bottom, left:right]
  if scale < 1:  # Cleared where it has fewer pixels.
    work = _clear(cv2.resize(work, size, interpolation=cv2.INTER_AREA))
  else:
    work = cv2.resize(_clear(work), size, interpolation=cv2.INTER_CUBIC)
  across, down = size[0] / (right - left), size[1] / (bottom - top)
  moved = [(c - top) * down if i % 2 else (c - left) * across for i, c in enumerate(at)]
  return work, tuple(moved)


def _clear(pixels: Image3) -> Image3:
  """Brightened if dark, and without noise if there is much: non-local means, Buades, CVPR 2005."""
  import cv2

  brightest = max(1.0, float(np.percentile(pixels, 99.5)))
  if brightest < _DARK:
    pixels = np.clip(pixels * (255 / brightest), 0, 255).astype(np.uint8)
  if min(pixels.shape[:2]) < 3:
    return pixels
  # Immerkaer, Fast noise variance estimation, 1996: this kernel has norm 6 and sees no slopes. The
  # median instead of the mean leaves out edges.
  kernel = np.outer([1, -2, 1], [1, -2, 1]).astype(np.float32)
  grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
  noise = float(np.median(abs(cv2.filter2D(grey, -1, kernel)[1:-1, 1:-1]))) / 0.6745 / 6
  if noise < _NOISE:
    return pixels
  return cv2.fastNlMeansDenoisingColored(pixels, None, noise, noise, 5, 15)


def _seen(guess: _Guess, part: tuple[int, int, int, int], size: tuple[int, ...]) -> Inside:
  """The guess in another part of the pixels, at that (height, width)."""
  import cv2

  left, top, right, bottom = part
  x0, y0, x1, y1 = guess.part
  rows, columns = guess.inside.shape
  across, down = columns / (x1 - x0), rows / (y1 - y0)
  wide, high = (right - left) / size[1], (bottom - top) / size[0]
  # Pixel centres are at + 0.5 in both.
  to_guess = np.array(
    [
      [wide * across, 0, (left - x0 + wide / 2) * across - 0.5],
      [0, high * down, (top - y0 + high / 2) * down - 0.5],
    ]
  )
  return (
    cv2.warpAffine(
      guess.inside.astype(np.uint8) * 255,
      to_guess,
      size[::-1],
      flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    )
    > 127
  )


def _found(guess: _Guess) -> Found:
  """The guess at the resolution of the pixels."""
  left, top, right, bottom = guess.part
  found = _tight(_seen(guess, guess.part, (bottom - top, right - left)))
  return found._replace(x=found.x + left, y=found.y + top)


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
  return _tight(sam_mask(masks[0, best], size))._replace(doubt=doubt)


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


def _tight(inside: Inside) -> Found:
  """Raises Mistake where nothing is inside."""
  rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
  if len(rows) == 0:
    raise Mistake("no object was found there: try a box around it, or a point nearer its middle")
  top, left = int(rows[0]), int(columns[0])
  return Found(inside[top : rows[-1] + 1, left : columns[-1] + 1].copy(), left, top, "")


def _moved(
  point: tuple[float, float], shown: Shown, view: View, pixels: Pixels
) -> tuple[float, float]:
  """A point under the view's jitter: as the centre of a box a tenth of the picture's sides wide."""
  (x, y), half_width, half_height = (
    point,
    shown.box.width * _POINT_BOX / 2,
    shown.box.height * _POINT_BOX / 2,
  )
  x, y = views.jitter(
    view, Box(x - half_width, y - half_height, x + half_width, y + half_height)
  ).center
  height, width = pixels.shape[:2]
  return min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)


def _hull(a: Box, b: Box) -> Box:
  return Box(min(a.x0, b.x0), min(a.y0, b.y0), max(a.x1, b.x1), max(a.y1, b.y1))


def _part(box: Box, pixels: Pixels) -> Box:
  """Widened to whole pixels and cut to the image."""
  height, width = pixels.shape[:2]
  x0, y0 = max(0, math.floor(box.x0)), max(0, math.floor(box.y0))
  x1, y1 = min(width, math.ceil(box.x1)), min(height, math.ceil(box.y1))
  if x0 >= x1 or y0 >= y1:
    raise Mistake("the box lies outside the image")
  return Box(float(x0), float(y0), float(x1), float(y1))
