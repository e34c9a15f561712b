"""Resizes and patches an image bit for bit as Qwen's image processor does, without torch."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from pixelis_jax.types import Patches, Pixels, content_key

MAX_ASPECT = 200  # smart_resize of transformers' Qwen2VLImageProcessor refuses more.
# Defaults of Qwen2VLImageProcessor; a directory may leave any of them out.
DEFAULTS = {
  "do_resize": True,
  "do_rescale": True,
  "do_normalize": True,
  "resample": int(Image.Resampling.BICUBIC),
  "rescale_factor": 1 / 255,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
  "patch_size": 14,
  "temporal_patch_size": 2,
  "merge_size": 2,
}
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280
# In transformers' reading order.
_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))


@dataclasses.dataclass(frozen=True, eq=False)
class ImageProcessor:
  """Areas are in pixels after resizing; `table` maps [channel, byte] to normalised float32."""

  min_pixels: int
  max_pixels: int
  patch: int
  frames: int
  merge: int
  resample: int
  table: np.ndarray

  @classmethod
  def from_directory(cls, path: str | Path) -> "ImageProcessor":
    """Reads the image_processor part of processor_config.json, or preprocessor_config.json.

    Raises:
      FileNotFoundError: the directory has neither.
      ValueError: a setting that this processor does not serve, or bounds that no size satisfies.
    """
    c = read_settings(Path(path), _FILES)
    if c is None:
      raise FileNotFoundError(f"{path} has no preprocessor_config.json")
    values = with_defaults(c, DEFAULTS, path)
    # float64, then float32, then normalised in float32: the order that makes the table equal the
    # processor's output.
    scaled = (np.arange(256, dtype=np.float64) * values["rescale_factor"]).astype(np.float32)
    mean = np.array(values["image_mean"], np.float32)
    std = np.array(values["image_std"], np.float32)
    low, high = pixel_bounds(c, _MIN_PIXELS, _MAX_PIXELS, path)
    return cls(
      min_pixels=low,
      max_pixels=high,
      patch=values["patch_size"],
      frames=values["temporal_patch_size"],
      merge=values["merge_size"],
      resample=values["resample"],
      table=(scaled[None, :] - mean[:, None]) / std[:, None],
    )

  def shown_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) shown: multiples of patch * merge whose area lies between the bounds.

    smart_resize of transformers' Qwen2VLImageProcessor.

    Raises:
      ValueError: one side is more than 200 times the other, or the image is empty.
    """
    check_size(height, width)
    return fit(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)

  def process(self, pixels: Pixels) -> Patches:
    """One image as the vision tower takes it, bit for bit what Qwen2VLImageProcessorPil gives.

    Patches are in `patch_order`, a still image filling all frames.
    """
    height, width = self.shown_size(*pixels.shape[:2])
    image = Image.fromarray(pixels)
    resized = np.asarray(image.resize((width, height), resample=self.resample))
    return Patches(
      patches=patch_order(resized[None], self.patch, self.merge, self.frames, self.table),
      grid=(1, height // self.patch, width // self.patch),
      size=(height, width),
      key=content_key(resized.tobytes(), f"{height} x {width}"),
    )


def check_size(height: int, width: int) -> None:
  """ValueError where no size can be shown: an empty image, or a side over 200 times the other."""
  if min(height, width) < 1:
    raise ValueError(f"image of {height} x {width} pixels is empty")
  if max(height, width) > MAX_ASPECT * min(height, width):
    raise ValueError(
      f"image of {height} x {width} pixels: the longer side may be at most {MAX_ASPECT} times"
      " the shorter"
    )


def fit(
  height: int, width: int, unit: int, low: int, high: int, *, frames: int = 1, counted: int = 1
) -> tuple[int, int]:
  """(height, width) nearest in multiples of `unit` whose area, of all frames, is in [low, high].

  smart_resize of transformers' Qwen2VLImageProcessor; that of Qwen3VLVideoProcessor is the same
  with bounds for the whole clip. It compares the bounds with `counted` frames, their number rounded
  to whole temporal patches, and scales by `frames`, the number that there are.
  """
  rows, columns = round(height / unit) * unit, round(width / unit) * unit
  if counted * rows * columns > high:
    shrink = math.sqrt(frames * height * width / high)
    rows = max(unit, math.floor(height / shrink / unit) * unit)
    columns = max(unit, math.floor(width / shrink / unit) * unit)
  elif counted * rows * columns < low:
    grow = math.sqrt(low / (frames * height * width))
    rows, columns = (math.ceil(side * grow / unit) * unit for side in (height, width))
  return rows, columns


def patch_order(
  frames: UInt8[np.ndarray, "F height width 3"],
  patch: int,
  merge: int,
  depth: int,
  table: Float32[np.ndarray, "3 256"],
) -> Float32[np.ndarray, "P K"]:
  """Frames cut into patches of `depth` frames in the order of Qwen's vision tower, normalised.

  Ordered by temporal step, by merged block, then row by row inside the block; each patch is
  (channel, frame, row, column). The sides are multiples of patch * merge. The number of frames is a
  multiple of `depth`, or 1: a still image fills all of a patch's frames.
  """
  count, height, width, _ = frames.shape
  rows, columns, p, m = height // patch, width // patch, patch, merge
  deep = min(count, depth)
  blocks = frames.reshape(-1, deep, rows // m, m, p, columns // m, m, p, 3)
  # (step, block row, block column, row in block, column in block, channel, frame, y, x)
  ordered = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, deep, p * p)
  patches = np.empty((len(ordered), 3, depth, p * p), np.float32)
  for channel in range(3):
    patches[:, channel] = table[channel][ordered[:, channel]]
  return patches.reshape(len(ordered), -1)


def with_defaults(settings: dict, defaults: dict, path: str | Path) -> dict:
  """The settings that `defaults` names; None counts as left out.

  Raises:
    ValueError: a step of processing is switched off.
  """
  values = defaults | {k: v for k, v in settings.items() if k in defaults and v is not None}
  for flag in ("do_resize", "do_rescale", "do_normalize"):
    if not values[flag]:
      raise ValueError(f"{path}: {flag} is false; only true is supported")
  return values


def pixel_bounds(settings: dict, low: int, high: int, path: str | Path) -> tuple[int, int]:
  """(min_pixels, max_pixels); the older spelling wins where both are given, as in transformers.

  Raises:
    ValueError: bounds that no size satisfies.
  """
  size = settings.get("size") or {}
  low = settings.get("min_pixels") or size.get("shortest_edge") or low
  high = settings.get("max_pixels") or size.get("longest_edge") or high
  if not 0 < low <= high:
    raise ValueError(f"{path}: min_pixels {low} must be in [1, max_pixels = {high}]")
  return low, high


def read_image(path: str | Path) -> Pixels:
  """RGB pixels of a file, upright as its EXIF orientation says: transformers' `load_image`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a whole image, or has more pixels than Pillow decodes.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no image {path}")
  try:
    with Image.open(path) as image:
      return np.array(ImageOps.exif_transpose(image).convert("RGB"))
  # OSError: not an image, or cut off; SyntaxError: Pillow's for a bad PNG.
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"image {path} cannot be read: {error}") from error


def read_settings(path: Path, files: Sequence[tuple[str, str | None]]) -> dict | None:
  """The first of `files`, (name, part of it or None for the whole), that the directory has.

  Raises:
    ValueError: it is not a JSON object.
  """
  for name, part in files:
    if (path / name).is_file():
      content = read_object(path / name)
      content = content if part is None else content.get(part)
      if content is not None:
        return content
  return None


def read_object(file: Path) -> dict:
  """A file's JSON object; ValueError names a file that holds none."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{file} must be a JSON object, not {content!r}")
  return content
