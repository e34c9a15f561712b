"""The tower against transformers' own, beyond what the whole-model test shows it."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose

from pixelis_jax.model import layout
from pixelis_jax.model.load import load
from pixelis_jax.model.policy import Model
from tests.model import oracle

# One frame that fills its windows, one that does not, and a video of three frames.
GRIDS = ((1, 8, 8), (1, 6, 10), (3, 6, 4))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def pair(request, tmp_path_factory) -> SimpleNamespace:
  """Both towers, and features of each image by transformers, DeepStack levels beside them."""
  theirs = oracle.hf_model(tied=True, family=request.param)
  model, params = load(oracle.saved(theirs, tmp_path_factory.mktemp("vision")))
  images = [oracle.image(grid, model.config, i) for i, grid in enumerate(GRIDS)]
  with torch.no_grad():
    outs = [theirs.model.visual(torch.tensor(i.patches), torch.tensor([i.grid])) for i in images]
  deep = lambda out: getattr(out, "deepstack_features", None) or []
  features = [torch.cat([out.pooler_output, *deep(out)], dim=-1).numpy() for out in outs]
  return SimpleNamespace(
    theirs=theirs, model=model, params=params, images=images, features=features
  )


on_2_5 = pytest.mark.parametrize("pair", ["qwen2_5_vl"], indirect=True)


def encode(pair, images, *, rows=4, patches=80, change=lambda v: v, model=None) -> np.ndarray:
  model = model or pair.model
  vision = layout.vision_inputs(images, model.config.vision, rows=rows, patches=patches)
  return np.asarray(oracle.tower(model)(pair.params, change(vision)))


def test_each_image_equals_transformers(pair):
  got = encode(pair, pair.images)
  assert got.shape == (4, 20, pair.model.config.feature_width)
  for row, expected in zip(got, pair.features, strict=False):
    assert expected.std() > 0.3
    assert_allclose(row[: len(expected)], expected, atol=1e-4)


@on_2_5
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_blocks_equal_transformers_one_by_one(pair, depth):
  """Block 1 is the full one: a flag scanned out of step with its block fails here."""
  vision = dataclasses.replace(
    pair.model.config.vision, depth=depth, full_blocks=(1,) if depth > 1 else ()
  )
  short = Model(dataclasses.replace(pair.model.config, vision=vision))
  visual = pair.params["visual"]
  blocks = jax.tree.map(lambda w: np.asarray(w)[:depth], visual["blocks"])
  params = {**pair.params, "visual": {**visual, "blocks": blocks}}
  packed = layout.vision_inputs(pair.images, vision, rows=3, patches=72)
  got = jax.jit(short.encode)(params, packed)
  theirs = pair.theirs.model.visual
  kept = theirs.blocks
  theirs.blocks = kept[:depth]
  try:
    with torch.no_grad():
      for row, image in zip(got, pair.images, strict=True):
        expected = theirs(torch.tensor(image.patches), torch.tensor([image.grid])).pooler_output
        assert_allclose(row[: len(expected)], expected.numpy(), atol=1e-4)
  finally:
    theirs.blocks = kept


def test_video_frames_do_not_see_each_other(pair):
  """Full attention is per frame: one segment over the clip gives something else."""

  def whole_clip(vision):
    return vision.replace(frame_segments=np.minimum(vision.frame_segments, 1))

  got = encode(pair, pair.images, change=whole_clip)
  assert_allclose(got[0, :16], pair.features[0], atol=1e-4)  # One frame: nothing changes.
  assert np.abs(got[2, :18] - pair.features[2]).max() > 3e-3


def test_padding_reaches_no_feature(pair):
  """NaN would spread through any sum it enters, so padding is made large instead and compared."""

  def noisy(vision):
    padding = vision.window_segments[..., None] == 0
    return vision.replace(patches=np.where(padding, np.float32(1e3), vision.patches))

  clean, dirty = encode(pair, pair.images), encode(pair, pair.images, change=noisy)
  for row, expected in enumerate(pair.features):
    np.testing.assert_array_equal(dirty[row, : len(expected)], clean[row, : len(expected)])
  assert np.isfinite(dirty).all()


def test_the_buffer_does_not_matter(pair):
  wide = encode(pair, pair.images, rows=3, patches=128)
  for row, expected in enumerate(pair.features):
    assert_allclose(wide[row, : len(expected)], expected, atol=1e-4)


def test_remat_changes_nothing(pair):
  vision = layout.vision_inputs(pair.images, pair.model.config.vision, rows=4, patches=80)

  def gradient(model):
    loss = lambda params: jnp.square(model.encode(params, vision)).mean()
    return jax.jit(jax.grad(loss))(pair.params)["visual"]

  plain, again = gradient(pair.model), gradient(dataclasses.replace(pair.model, remat="layers"))
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(plain))


@on_2_5
def test_rotary_angles_are_float32_whatever_the_weights_are(pair):
  """bfloat16 rounds 127 * 0.158 = 20.13 to 20.125: angles must not follow the weights' dtype."""
  low = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), pair.params)
  tower = nnx.merge(pair.model.graphdef, low).visual
  angles = tower.angles(jnp.asarray([[[127, 3]]], jnp.int32))
  # Head width 20: 10 pairs, 5 for the row, 5 for the column, at 10000^(-j / 5).
  expected = np.concatenate([p * 1e4 ** (-np.arange(5) / 5) for p in (127, 3)])
  assert angles.dtype == jnp.float32
  assert_allclose(angles[0, 0], expected, rtol=1e-6)
