"""Resizes and patches an image bit for bit as Qwen's image processor does, without torch."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pixelis_jax.types import Patches, Pixels, content_key

MAX_ASPECT = 200  # smart_resize of transformers' Qwen2VLImageProcessor refuses more.
# Defaults of Qwen2VLImageProcessor; a directory may leave any of them out.
_DEFAULTS = {
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
    """Reads preprocessor_config.json, or the image_processor part of processor_config.json.

    Raises:
      FileNotFoundError: the directory has neither.
      ValueError: a setting that this processor does not serve, or bounds that no size satisfies.
    """
    c = _read(Path(path))
    values = _DEFAULTS | {k: v for k, v in c.items() if k in _DEFAULTS and v is not None}
    for flag in ("do_resize", "do_rescale", "do_normalize"):
      if not values[flag]:
        raise ValueError(f"{path}: {flag} is false; only true is supported")
    # The older spelling wins where both are given, as in transformers.
    size = c.get("size") or {}
    low = c.get("min_pixels") or size.get("shortest_edge") or _MIN_PIXELS
    high = c.get("max_pixels") or size.get("longest_edge") or _MAX_PIXELS
    if not 0 < low <= high:
      raise ValueError(f"{path}: min_pixels {low} must be in [1, max_pixels = {high}]")
    # float64, then float32, then normalised in float32: the order that makes the table equal the
    # processor's output.
    scaled = (np.arange(256, dtype=np.float64) * values["rescale_factor"]).astype(np.float32)
    mean = np.array(values["image_mean"], np.float32)
    std = np.array(values["image_std"], np.float32)
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
    if min(height, width) < 1:
      raise ValueError(f"image of {height} x {width} pixels is empty")
    if max(height, width) > MAX_ASPECT * min(height, width):
      raise ValueError(
        f"image of {height} x {width} pixels: the longer side may be at most {MAX_ASPECT} times"
        " the shorter"
      )
    unit = self.patch * self.merge
    shown_height, shown_width = round(height / unit) * unit, round(width / unit) * unit
    if shown_height * shown_width > self.max_pixels:
      shrink = math.sqrt(height * width / self.max_pixels)
      shown_height = max(unit, math.floor(height / shrink / unit) * unit)
      shown_width = max(unit, math.floor(width / shrink / unit) * unit)
    elif shown_height * shown_width < self.min_pixels:
      grow = math.sqrt(self.min_pixels / (height * width))
      shown_height = math.ceil(height * grow / unit) * unit
      shown_width = math.ceil(width * grow / unit) * unit
    return shown_height, shown_width

  def process(self, pixels: Pixels) -> Patches:
    """One image as the vision tower takes it, bit for bit what Qwen2VLImageProcessor gives.

    Patches are ordered by merged block, then row by row inside the block; each is (channel, frame,
    row, column), a still image filling all frames.
    """
    height, width = self.shown_size(*pixels.shape[:2])
    image = Image.fromarray(pixels)
    resized = np.asarray(image.resize((width, height), resample=self.resample))
    p, m = self.patch, self.merge
    rows, columns = height // p, width // p
    blocks = resized.reshape(rows // m, m, p, columns // m, m, p, 3)
    # (block row, block column, row in block, column in block, channel, y, x)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, p * p)
    patches = np.empty((rows * columns, 3, self.frames, p * p), np.float32)
    for channel in range(3):
      patches[:, channel] = self.table[channel][ordered[:, channel]][:, None, :]
    return Patches(
      patches=patches.reshape(rows * columns, -1),
      grid=(1, rows, columns),
      size=(height, width),
      key=content_key(resized.tobytes(), f"{height} x {width}"),
    )


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


def _read(path: Path) -> dict:
  for name, part in (
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
  ):
    if (path / name).is_file():
      try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
      except ValueError as error:
        raise ValueError(f"{path / name} is not JSON: {error}") from error
      if not isinstance(content, dict):
        raise ValueError(f"{path / name} must be a JSON object, not {content!r}")
      content = content if part is None else content.get(part)
      if content is not None:
        return content
  raise FileNotFoundError(f"{path} has no preprocessor_config.json")
