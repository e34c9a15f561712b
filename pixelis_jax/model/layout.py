"""Grids become index arrays here, on the host: no (t, h, w) reaches a compiled function.

Window order, segments and places in the learned table follow transformers 5.24 `vision_utils.py` (a
window is 8 x 8 patches of one frame, cut off at the right and lower edge; full attention stays
within one frame); m-RoPE positions follow `get_rope_index` of its modeling_qwen2_5_vl.py and
modeling_qwen3_vl.py.
"""

import functools
from collections.abc import Sequence
from typing import TypeAlias, no_type_check

import flax.struct
import jax
import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from pixelis_jax.model.config import ModelConfig, VisionConfig
from pixelis_jax.types import Patches

Grid: TypeAlias = tuple[int, int, int]


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class VisionInputs:
  """Images for the tower, one a row, patches in window order, padded with segment 0.

  `positions` are the (h, w) rotary indices; a patch attends to the patches of its row with its own
  window segment (frame segment in full-attention blocks); `inverse` gathers merged outputs back
  into reading order. `corners` are the four entries of the learned position table (C is 0 where a
  tower has none) between which a patch lies, `shares` their weights.
  """

  patches: Float[jax.Array, "N P K"]
  positions: Int[jax.Array, "N P 2"]
  window_segments: Int[jax.Array, "N P"]
  frame_segments: Int[jax.Array, "N P"]
  inverse: Int[jax.Array, "N M"]
  corners: Int[jax.Array, "N P C"]
  shares: Float[jax.Array, "N P C"]


def feature_count(image: Patches, config: VisionConfig) -> int:
  """Tokens of the language model that the image takes: t h w / merge^2."""
  return _merged_count(image.grid, config.merge)


def vision_inputs(
  images: Sequence[Patches], config: VisionConfig, *, rows: int, patches: int
) -> VisionInputs:
  """Image i in row i of a [rows, patches, K] buffer (numpy; `patches` a multiple of merge^2).

  Raises ValueError where an image or their number does not fit, or a grid and its patches disagree.
  """
  unit = config.merge_unit
  if patches % unit:
    raise ValueError(f"patches {patches} must be a multiple of merge^2 = {unit}")
  if len(images) > rows:
    raise ValueError(f"{len(images)} images do not fit {rows} rows")
  C = 4 if config.position_side else 0
  packed = VisionInputs(
    patches=np.zeros((rows, patches, config.patch_values), np.float32),
    positions=np.zeros((rows, patches, 2), np.int32),
    window_segments=np.zeros((rows, patches), np.int32),
    frame_segments=np.zeros((rows, patches), np.int32),
    inverse=np.tile(np.arange(patches // unit, dtype=np.int32), (rows, 1)),
    corners=np.zeros((rows, patches, C), np.int32),
    shares=np.zeros((rows, patches, C), np.float32),
  )
  for row, image in enumerate(images):
    count, values = image.patches.shape
    if count != int(np.prod(image.grid)) or values != config.patch_values:
      raise ValueError(
        f"patches {image.patches.shape} of image {row} must be [t h w, K] = "
        f"[{int(np.prod(image.grid))}, {config.patch_values}] for grid {image.grid}"
      )
    if count > patches:
      raise ValueError(f"image {row} has {count} patches, more than the row's {patches}")
    units, *arranged, inverse = _arranged(image.grid, config)
    packed.patches[row, :count] = image.patches[units]
    packed.inverse[row, : len(inverse)] = inverse
    places = packed.positions, packed.window_segments, packed.frame_segments
    for whole, own in zip((*places, packed.corners, packed.shares), arranged, strict=True):
      whole[row, :count] = own
  return packed


@functools.lru_cache(maxsize=64)  # Most images of a run have one of few sizes.
def _arranged(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, ...]:
  """Of each patch, in window order: its number in Qwen's order, position, window, frame, corners,
  shares. And of each merged unit, in reading order, its number in window order.
  """
  unit = config.merge_unit
  order, windows = window_order(grid, config)
  units = np.arange(len(order) * unit).reshape(-1, unit)[order].reshape(-1)
  frames = np.repeat(np.arange(grid[0]), grid[1] * grid[2]) + 1
  none = np.zeros((len(units), 0))
  corners, shares = table_places(grid, config) if config.position_side else (none, none)
  positions, windows = patch_positions(grid, config)[units], np.repeat(windows, unit)
  return units, positions, windows, frames[units], corners[units], shares[units], np.argsort(order)


def window_order(
  grid: Grid, config: VisionConfig
) -> tuple[Int32[np.ndarray, " M"], Int32[np.ndarray, " M"]]:
  """(order, window): merged units sorted window by window, and each one's window number from 1.

  Windows are numbered frame by frame, row by row; units inside one keep their reading order.
  """
  t, h, w = grid[0], grid[1] // config.merge, grid[2] // config.merge
  side = config.window_side or max(h, w)  # Without windows a frame is one.
  frame, row, column = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
  across, down = -(-w // side), -(-h // side)
  window = ((frame * down + row // side) * across + column // side).reshape(-1)
  order = np.argsort(window, kind="stable")
  return order.astype(np.int32), window[order].astype(np.int32) + 1


def patch_positions(grid: Grid, config: VisionConfig) -> Int32[np.ndarray, "P 2"]:
  """(h, w) of each patch in Qwen's patch order: merge x merge blocks are contiguous."""
  t, h, w = grid
  m = config.merge
  hw = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
  blocks = hw.reshape(h // m, m, w // m, m, 2).swapaxes(1, 2).reshape(h * w, 2)
  return np.tile(blocks, (t, 1)).astype(np.int32)


def table_places(
  grid: Grid, config: VisionConfig
) -> tuple[Int32[np.ndarray, "P 4"], Float32[np.ndarray, "P 4"]]:
  """(corners, shares): where each patch, in Qwen's order, lies in the learned position table.

  The table is stretched over the frame, its corners on the frame's corner patches, and read by
  bilinear interpolation: corner r * side + c for the two nearest rows and columns.
  """
  side = config.position_side
  sizes_2 = np.array(grid[1:], np.float32)
  where_P2 = patch_positions(grid, config).astype(np.float32)
  # float32 and this order of operations, as in the original: the floor must not slip.
  where_P2 = where_P2 * np.float32(side - 1) / np.maximum(sizes_2 - 1, 1)
  low_P2 = np.floor(where_P2)
  part_P2 = where_P2 - low_P2
  near_P22 = np.stack([low_P2, np.minimum(low_P2 + 1, side - 1)], axis=1).astype(np.int32)
  share_P22 = np.stack([1 - part_P2, 1 - np.abs(part_P2 - 1)], axis=1)
  corners = near_P22[:, :, None, 0] * side + near_P22[:, None, :, 1]
  shares = share_P22[:, :, None, 0] * share_P22[:, None, :, 1]
  return corners.reshape(-1, 4), shares.reshape(-1, 4)


def mrope_positions(
  tokens: Int32[np.ndarray, " T"],
  images: Sequence[Patches],
  config: ModelConfig,
  *,
  start: int = 0,
) -> tuple[Int32[np.ndarray, "3 T"], int]:
  """(t, h, w) rotary positions, and where the next segment of the same sequence starts.

  `images` are those of the image and video placeholders in `tokens`, in order. Text advances all
  three axes by one; an image holds (0, row, column) from where it starts, and what follows starts
  behind its largest position. Qwen2.5-VL spaces a video's frames by `tokens_per_second` times their
  interval; Qwen3-VL has text between them and takes each for an image. Behind a video whose time
  outgrows its sides, transformers >= 5.3 starts the text inside that time; the authors' code
  (https://github.com/huggingface/transformers/pull/35569), with which the model was trained, and
  this one behind it.
  Raises ValueError where placeholders and images do not match: an image may not be split.
  """
  if config.vision is None:
    if images:
      raise ValueError(f"{len(images)} images for a {config.family} model, which reads text only")
    return _text_positions(len(tokens), start), start + len(tokens)
  merge = config.vision.merge
  runs = [run for image in images for run in _runs(image, config)]
  visual = np.isin(tokens, (config.image_token, config.video_token))
  expected = sum(_merged_count(grid, merge) for grid, *_ in runs)
  if int(visual.sum()) != expected:
    grids = [image.grid for image in images]
    raise ValueError(f"{int(visual.sum())} placeholders must be {expected} for grids {grids}")
  pieces, at, position = [], 0, start
  for grid, token, step in runs:
    first = at + int(np.argmax(visual[at:]))
    count = _merged_count(grid, merge)
    if not (tokens[first : first + count] == token).all():
      raise ValueError(
        f"placeholders at {first} must be {count} times {token} for grid {tuple(grid)}"
      )
    pieces.append(_text_positions(first - at, position))
    position += first - at
    pieces.append(_grid_positions(grid, merge, step) + np.int32(position))
    position = int(pieces[-1].max()) + 1
    at = first + count
  pieces.append(_text_positions(len(tokens) - at, position))
  return np.concatenate(pieces, axis=1), position + len(tokens) - at


def _runs(image: Patches, config: ModelConfig) -> list[tuple[Grid, int, float]]:
  """(grid, placeholder, time step) of each run of placeholders that an image or video takes."""
  if image.interval is None:
    return [(image.grid, config.image_token, 1.0)]
  t, h, w = image.grid
  per_second = config.vision.tokens_per_second
  if per_second is None:
    return [((1, h, w), config.video_token, 1.0)] * t
  return [(image.grid, config.video_token, per_second * image.interval)]


def _merged_count(grid: Grid, merge: int) -> int:
  t, h, w = grid
  if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
    raise ValueError(f"grid {tuple(grid)} must be positive with h and w multiples of {merge}")
  return t * h * w // merge**2


def _text_positions(count: int, start: int) -> Int32[np.ndarray, "3 T"]:
  return np.tile(np.arange(start, start + count, dtype=np.int32), (3, 1))


@functools.lru_cache(maxsize=64)
def _grid_positions(grid: Grid, merge: int, step: float) -> Int32[np.ndarray, "3 T"]:
  times = (np.arange(grid[0]) * np.float32(step)).astype(np.int32)  # Truncated, as in the original.
  axes = (times, np.arange(grid[1] // merge), np.arange(grid[2] // merge))
  return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1).astype(np.int32)
