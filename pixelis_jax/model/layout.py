"""Grids become index arrays here, on the host: no (t, h, w) reaches a compiled function.

Window order and segments follow transformers 5.23 `vision_utils.py` (a window is 8 x 8 patches of
one frame, cut off at the right and lower edge; full attention stays within one frame); m-RoPE
positions follow `get_rope_index` of its modeling_qwen2_5_vl.py.
"""

from collections.abc import Sequence
from typing import TypeAlias, no_type_check

import flax.struct
import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from pixelis_jax.model.config import ModelConfig, VisionConfig
from pixelis_jax.types import Patches

Grid: TypeAlias = tuple[int, int, int]


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class VisionInputs:
  """Images for the tower, one a row, patches in window order, padded with segment 0.

  `positions` are the (h, w) rotary indices; a patch attends to the patches of its row with its own
  window segment (frame segment in full-attention blocks); `inverse` gathers merged outputs back
  into reading order.
  """

  patches: Float[jax.Array, "N P K"]
  positions: Int[jax.Array, "N P 2"]
  window_segments: Int[jax.Array, "N P"]
  frame_segments: Int[jax.Array, "N P"]
  inverse: Int[jax.Array, "N M"]


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
  packed = VisionInputs(
    patches=np.zeros((rows, patches, config.patch_values), np.float32),
    positions=np.zeros((rows, patches, 2), np.int32),
    window_segments=np.zeros((rows, patches), np.int32),
    frame_segments=np.zeros((rows, patches), np.int32),
    inverse=np.tile(np.arange(patches // unit, dtype=np.int32), (rows, 1)),
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
    order, windows = window_order(image.grid, config)
    units = np.arange(count).reshape(-1, unit)[order].reshape(-1)  # unit order -> patch order
    frames = np.repeat(np.arange(image.grid[0]), image.grid[1] * image.grid[2]) + 1
    packed.patches[row, :count] = image.patches[units]
    packed.positions[row, :count] = patch_positions(image.grid, config)[units]
    packed.window_segments[row, :count] = np.repeat(windows, unit)
    packed.frame_segments[row, :count] = frames[units]
    packed.inverse[row, : len(order)] = np.argsort(order)
  return packed


def window_order(
  grid: Grid, config: VisionConfig
) -> tuple[Int32[np.ndarray, " M"], Int32[np.ndarray, " M"]]:
  """(order, window): merged units sorted window by window, and each one's window number from 1.

  Windows are numbered frame by frame, row by row; units inside one keep their reading order.
  """
  t, h, w = grid[0], grid[1] // config.merge, grid[2] // config.merge
  side = config.window_side
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


def mrope_positions(
  tokens: Int32[np.ndarray, " T"],
  grids: Sequence[Grid],
  config: ModelConfig,
  *,
  start: int = 0,
  seconds_per_grid: float = 1.0,
) -> tuple[Int32[np.ndarray, "3 T"], int]:
  """(t, h, w) rotary positions, and where the next segment of the same sequence starts.

  `grids` are those of the image and video placeholders in `tokens`, in order. Text advances all
  three axes by one; an image holds (0, row, column) from where it starts and then advances by its
  longer merged side. A video's frames are `tokens_per_second * seconds_per_grid` apart.
  Raises ValueError where placeholders and grids do not match: an image may not be split.
  """
  merge = config.vision.merge
  interval = config.vision.tokens_per_second * seconds_per_grid
  visual = np.isin(tokens, (config.image_token, config.video_token))
  expected = sum(_merged_count(grid, merge) for grid in grids)
  if int(visual.sum()) != expected:
    raise ValueError(f"{int(visual.sum())} placeholders must be {expected} for grids {list(grids)}")
  pieces, at, position = [], 0, start
  for grid in grids:
    first = at + int(np.argmax(visual[at:]))
    count = _merged_count(grid, merge)
    kinds = np.unique(tokens[first : first + count])
    if not visual[first : first + count].all() or len(kinds) != 1:
      raise ValueError(f"placeholders at {first} must be {count} in a row for grid {tuple(grid)}")
    pieces.append(_text_positions(first - at, position))
    position += first - at
    step = interval if kinds[0] == config.video_token else 1.0
    pieces.append(_grid_positions(grid, merge, step) + np.int32(position))
    position += max(grid[1], grid[2]) // merge
    at = first + count
  pieces.append(_text_positions(len(tokens) - at, position))
  return np.concatenate(pieces, axis=1), position + len(tokens) - at


def _merged_count(grid: Grid, merge: int) -> int:
  t, h, w = grid
  if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
    raise ValueError(f"grid {tuple(grid)} must be positive with h and w multiples of {merge}")
  return t * h * w // merge**2


def _text_positions(count: int, start: int) -> Int32[np.ndarray, "3 T"]:
  return np.tile(np.arange(start, start + count, dtype=np.int32), (3, 1))


def _grid_positions(grid: Grid, merge: int, step: float) -> Int32[np.ndarray, "3 T"]:
  times = (np.arange(grid[0]) * np.float32(step)).astype(np.int32)  # Truncated, as in the original.
  axes = (times, np.arange(grid[1] // merge), np.arange(grid[2] // merge))
  return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1).astype(np.int32)
