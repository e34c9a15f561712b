"""Index arrays against transformers' vision_utils and get_rope_index."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from transformers import vision_utils

from pixelis_jax.model import layout
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.types import Patches
from tests.model import oracle

HF = oracle.hf_config(tied=True)
CONFIG = ModelConfig.from_hf(HF.to_dict())
HF_3 = oracle.hf_config(tied=True, family="qwen3_vl")
CONFIG_3 = ModelConfig.from_hf(HF_3.to_dict())
TEXT = ModelConfig.from_hf(oracle.hf_config(tied=True, family="qwen3").to_dict())
SIDES = st.integers(1, 9).map(lambda n: 2 * n)
GRID = st.tuples(st.integers(1, 3), SIDES, SIDES)


@functools.cache
def without_weights(family: str):
  """transformers' model: its positions need only the config."""
  with torch.device("meta"):
    return oracle.MODELS[family]({"qwen2_5_vl": HF, "qwen3_vl": HF_3}[family]).model


def rope_index(tokens, images, hf=HF):
  """What transformers gives one unpadded row."""
  model = without_weights(hf.model_type)
  tokens = torch.tensor(tokens)[None].long()
  kinds = (tokens == oracle.IMAGE).int() + 2 * (tokens == oracle.VIDEO).int()
  stills = [i.grid for i in images if i.interval is None]
  clips = [i.grid for i in images if i.interval is not None]
  seconds = [i.interval for i in images if i.interval is not None]
  extra = {"second_per_grid_ts": torch.tensor(seconds)} if hf is HF and clips else {}
  positions, delta = model.get_rope_index(
    tokens,
    kinds,
    image_grid_thw=torch.tensor(stills) if stills else None,
    video_grid_thw=torch.tensor(clips) if clips else None,
    **extra,
  )
  return positions[:, 0].numpy(), int(delta)


@given(GRID)
@settings(max_examples=40, deadline=None)
def test_windows_equal_transformers(grid):
  order, windows = layout.window_order(grid, CONFIG.vision)
  index, bounds = vision_utils.get_vision_window_index(
    torch.tensor([grid]), spatial_merge_size=2, window_size=16, patch_size=4
  )
  assert_array_equal(order, index)
  # A window is a run between two bounds (in patches, 4 to the merged unit).
  lengths = np.diff(bounds.numpy()) // 4
  assert_array_equal(windows, np.repeat(np.arange(len(lengths)) + 1, lengths))


def test_without_windows_a_frame_is_one():
  """Qwen3-VL: 2 frames of 2 x 3 units, in reading order."""
  order, windows = layout.window_order((2, 4, 6), CONFIG_3.vision)
  assert_array_equal(order, np.arange(12))
  assert_array_equal(windows, np.repeat([1, 2], 6))


# Sides below, at and far above the table's 6.
@given(st.tuples(st.integers(1, 3), SIDES, SIDES.map(lambda n: 4 * n)))
@settings(max_examples=40, deadline=None)
def test_places_in_the_table_equal_transformers(grid):
  corners, shares = layout.table_places(grid, CONFIG_3.vision)
  expected = vision_utils.get_vision_interpolation_indices_and_weights(
    torch.tensor([grid]), 6, mode="bilinear", align_corners=True, spatial_merge_size=2
  )
  assert_array_equal(corners, expected[0])
  assert_array_equal(shares, expected[1])


@given(GRID)
@settings(max_examples=40, deadline=None)
def test_patch_positions_equal_transformers(grid):
  expected = vision_utils.get_vision_position_ids(torch.tensor([grid]), 2)
  assert_array_equal(layout.patch_positions(grid, CONFIG.vision), expected)


def test_a_window_by_hand():
  """6 x 4 patches = 3 x 2 units, windows of 2 x 2 units: rows 0-1 in one window, row 2 in the next.

  Width 6 instead: units 0 1 | 2 over 3 4 | 5, so the second window of a 4 x 6 grid is units 2, 5.
  """
  order, windows = layout.window_order((1, 6, 4), CONFIG.vision)
  assert_array_equal(order, [0, 1, 2, 3, 4, 5])
  assert_array_equal(windows, [1, 1, 1, 1, 2, 2])
  order, windows = layout.window_order((1, 4, 6), CONFIG.vision)
  assert_array_equal(order, [0, 1, 3, 4, 2, 5])
  assert_array_equal(windows, [1, 1, 1, 1, 2, 2])


def test_vision_inputs_undo_their_own_order():
  images = [oracle.image(grid, CONFIG, i) for i, grid in enumerate([(1, 6, 10), (2, 4, 6)])]
  packed = layout.vision_inputs(images, CONFIG.vision, rows=3, patches=64)
  assert packed.patches.shape == (3, 64, CONFIG.vision.patch_values)
  for row, image in enumerate(images):
    count = len(image.patches)
    units = packed.patches[row].reshape(16, 4, -1)[packed.inverse[row]].reshape(64, -1)
    assert_array_equal(units[:count], image.patches)
    positions = packed.positions[row].reshape(16, 4, 2)[packed.inverse[row]].reshape(64, 2)
    assert_array_equal(positions[:count], layout.patch_positions(image.grid, CONFIG.vision))
    assert (packed.window_segments[row, :count] > 0).all()
    assert not packed.window_segments[row, count:].any()
    assert not packed.frame_segments[row, count:].any()
    # No window crosses frames.
    pairs = set(zip(packed.window_segments[row], packed.frame_segments[row], strict=True))
    assert len(pairs) == len({window for window, _ in pairs})
  assert_array_equal(packed.frame_segments[1, :48], np.repeat([1, 2], 24))
  assert not packed.frame_segments[2].any()
  assert_array_equal(np.sort(packed.inverse, axis=1), np.tile(np.arange(16), (3, 1)))


@pytest.mark.parametrize(
  "grids, rows, patches, message",
  [
    ([(1, 4, 4)], 1, 18, "patches 18 must be a multiple of merge\\^2 = 4"),
    ([(1, 4, 4)] * 2, 1, 16, "2 images do not fit 1 rows"),
    ([(1, 4, 4), (1, 6, 4)], 2, 16, "image 1 has 24 patches, more than the row's 16"),
  ],
)
def test_what_does_not_fit_is_refused(grids, rows, patches, message):
  images = [oracle.image(grid, CONFIG, 0) for grid in grids]
  with pytest.raises(ValueError, match=message):
    layout.vision_inputs(images, CONFIG.vision, rows=rows, patches=patches)


def test_patches_that_are_not_the_grid_are_refused():
  image = oracle.image((1, 4, 4), CONFIG, 0)
  wrong = type(image)(patches=image.patches, grid=(1, 4, 6), size=image.size, key="")
  with pytest.raises(ValueError, match=r"\(16, 96\) of image 0 must be .* \[24, 96\]"):
    layout.vision_inputs([wrong], CONFIG.vision, rows=1, patches=64)


def test_feature_count():
  assert layout.feature_count(oracle.image((2, 4, 6), CONFIG, 0), CONFIG.vision) == 12


def test_positions_by_hand():
  """Text 0 1, image of 2 x 3 units at 2 (t stays, rows 2-3, columns 2-4), then 2 + 3 = 5."""
  tokens = np.array([1, 2, *[oracle.IMAGE] * 6, 3], np.int32)
  image = oracle.image((1, 4, 6), CONFIG, 0)
  positions, following = layout.mrope_positions(tokens, [image], CONFIG)
  assert_array_equal(positions[0], [0, 1, 2, 2, 2, 2, 2, 2, 5])
  assert_array_equal(positions[1], [0, 1, 2, 2, 2, 3, 3, 3, 5])
  assert_array_equal(positions[2], [0, 1, 2, 3, 4, 2, 3, 4, 5])
  assert following == 6


# A still image fills its one time step: t is 1.
SEGMENTS = st.lists(
  st.tuples(st.integers(1, 5), st.lists(st.tuples(st.just(1), SIDES, SIDES), max_size=2)),
  min_size=1,
  max_size=4,
)


@given(SEGMENTS, st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_incremental_positions_equal_transformers_on_the_whole(segments, seed):
  """Each turn continues where the last stopped: the delta of an image in a later turn is kept."""
  pieces, parts, shown, start = [], [], [], 0
  for count, grids in segments:
    images = [oracle.image(grid, CONFIG, 0) for grid in grids]
    shown += images
    tokens = [oracle.text(count, seed), *(oracle.shown(image, CONFIG) for image in images)]
    pieces.append(np.concatenate(tokens))
    part, start = layout.mrope_positions(pieces[-1], images, CONFIG, start=start)
    parts.append(part)
  whole = np.concatenate(pieces)
  expected, delta = rope_index(whole, shown)
  got = np.concatenate(parts, axis=1)
  assert got.dtype == np.int32
  assert_array_equal(got, expected)
  assert start == len(whole) + delta  # Where transformers goes on decoding.


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("seconds", [0.25, 0.3])
def test_video_positions_equal_transformers(family, seconds):
  """Qwen2.5: frames are tokens_per_second * seconds apart, truncated: 4 * 0.3 = 1.2 -> 0, 1, 2.

  Qwen3: each frame is an image behind its own time.
  """
  hf, config = (HF, CONFIG) if family == "qwen2_5_vl" else (HF_3, CONFIG_3)
  video = oracle.image((3, 4, 6), config, 0, interval=seconds)
  picture = oracle.image((1, 6, 4), config, 0)
  tokens = [
    oracle.text(3, 0),
    oracle.shown(video, config),
    oracle.shown(picture, config),
    oracle.text(4, 1),
  ]
  tokens = np.concatenate(tokens)
  expected, delta = rope_index(tokens, [video, picture], hf)
  got, following = layout.mrope_positions(tokens, [video, picture], config)
  assert_array_equal(got, expected)
  assert following == len(tokens) + delta


def test_text_starts_behind_a_long_video():
  """Times 0, 2, 4 (4 * 0.6 = 2.4, truncated) on sides of 1 x 2 units: text goes on at 3 + 4 + 1.

  That is what Qwen2.5-VL was trained with; transformers 5.3 and later give 3 + 2.
  """
  video = oracle.image((3, 2, 4), CONFIG, 0, interval=0.6)
  tokens = np.array([1, 2, oracle.START, *[oracle.VIDEO] * 6, oracle.END, 5], np.int32)
  positions, following = layout.mrope_positions(tokens, [video], CONFIG)
  assert_array_equal(positions[0], [0, 1, 2, 3, 3, 5, 5, 7, 7, 8, 9])
  assert_array_equal(positions[1], [0, 1, 2, 3, 3, 3, 3, 3, 3, 8, 9])
  assert_array_equal(positions[2], [0, 1, 2, 3, 4, 3, 4, 3, 4, 8, 9])
  assert following == 10


def test_a_text_model_counts_tokens_and_refuses_images():
  tokens = np.array([1, oracle.IMAGE, 3], np.int32)  # No visual tokens: this one is text.
  positions, following = layout.mrope_positions(tokens, [], TEXT, start=7)
  assert_array_equal(positions, [[7, 8, 9]] * 3)
  assert following == 10
  with pytest.raises(ValueError, match="1 images for a qwen3 model, which reads text only"):
    layout.mrope_positions(tokens, [oracle.image((1, 4, 4), CONFIG, 0)], TEXT)


def test_text_only_and_empty():
  positions, following = layout.mrope_positions(np.zeros(3, np.int32), [], CONFIG, start=7)
  assert_array_equal(positions, [[7, 8, 9]] * 3)
  assert following == 10
  positions, following = layout.mrope_positions(np.zeros(0, np.int32), [], CONFIG, start=4)
  assert positions.shape == (3, 0) and following == 4


STILL, CLIP = oracle.image((1, 4, 4), CONFIG, 0), oracle.image((1, 4, 4), CONFIG, 0, interval=1.0)


@pytest.mark.parametrize(
  "tokens, images, message",
  [
    ([1, oracle.IMAGE], [STILL], r"1 placeholders must be 4 for grids \[\(1, 4, 4\)\]"),
    ([oracle.IMAGE] * 4, [], "4 placeholders must be 0"),
    (
      [oracle.IMAGE, oracle.IMAGE, 1, oracle.IMAGE, oracle.IMAGE],
      [STILL],
      "placeholders at 0 must be 4 times 90",
    ),
    ([oracle.IMAGE] * 2 + [oracle.VIDEO] * 2, [STILL], "at 0 must be 4 times 90"),
    ([oracle.IMAGE] * 4, [CLIP], "at 0 must be 4 times 91"),
  ],
)
def test_placeholders_that_are_not_the_images_are_refused(tokens, images, message):
  with pytest.raises(ValueError, match=message):
    layout.mrope_positions(np.array(tokens, np.int32), images, CONFIG)


def test_a_grid_that_does_not_merge_is_refused():
  odd = Patches(patches=np.zeros((12, 96), np.float32), grid=(1, 3, 4), size=(12, 16), key="")
  with pytest.raises(ValueError, match=r"grid \(1, 3, 4\) must be positive with h and w multiples"):
    layout.feature_count(odd, CONFIG.vision)
