"""The whole model against transformers, float32; and against itself, token by token."""

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from kernels.attention import reference
from pixelis_jax.model import layout, vision
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.load import load
from pixelis_jax.model.policy import Model
from tests.model import oracle

# Logits have a spread of 9 (tied) and 1; float32 sums in other orders left 3e-5 and 4e-6.
TOLERANCE = 1e-4


def seen(pair, *, params=None, batch=None, tower=None, decoder=None, change=lambda f: f) -> bool:
  """Whether the logits are wrong by far more than the tolerance.

  With other weights, inputs, models for tower and decoder, or with `change` made to the features.
  """
  params, batch = params or pair.params, batch or pair.batch
  features = change(oracle.encoded(tower or pair.model, params, batch.vision))
  wrong = np.asarray(oracle.forward(decoder or pair.model, params, batch, features)[1])
  return np.abs(wrong[pair.batch.valid] - pair.logits).max() > 30 * TOLERANCE


# Each family; whether the embedding is the head, too, is one matter in all.
KINDS = [
  ("qwen2_5_vl", True),
  ("qwen2_5_vl", False),
  ("qwen3_vl", True),
  ("qwen3", True),
  ("llama", False),
]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request, tmp_path_factory) -> SimpleNamespace:
  """Both models and, on the same batch, what transformers says: layers, logits and gradients."""
  family, tied = request.param
  path = tmp_path_factory.mktemp("pair")
  theirs = oracle.hf_model(tied=tied, family=family)
  model, params = load(oracle.saved(theirs, path / "model"))
  batch = oracle.two_rows(model.config)
  inputs, valid = oracle.hf_inputs(theirs, batch), torch.tensor(batch.valid)
  logits = theirs(**inputs).logits[valid]
  weights = np.random.default_rng(9).standard_normal(logits.shape).astype(np.float32)
  (logits * torch.tensor(weights)).mean().backward()
  layers = [h[valid].numpy() for h in depths(theirs, inputs)]
  return SimpleNamespace(
    model=model,
    params=params,
    batch=batch,
    weights=jnp.asarray(weights),
    logits=logits.detach().numpy(),
    layers=layers,
    gradients=load(oracle.saved_gradients(theirs, path / "gradients"))[1],
  )


def depths(theirs, inputs) -> Iterator[torch.Tensor]:
  """The normed hidden states of transformers' decoder cut off after 1, 2, ... layers."""
  decoder = oracle.decoder(theirs)
  whole = decoder.layers
  for count in range(1, len(whole) + 1):
    decoder.layers = whole[:count]
    with torch.no_grad():
      yield theirs.model(**inputs).last_hidden_state
  decoder.layers = whole


# One is enough where a test compares our model with a changed one of ours.
on_one = pytest.mark.parametrize("pair", KINDS[:1], ids=str, indirect=True)
on_3 = pytest.mark.parametrize("pair", [("qwen3_vl", True)], ids=str, indirect=True)
on_text = pytest.mark.parametrize("pair", [("qwen3", True)], ids=str, indirect=True)


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def test_logits_equal_transformers(pair):
  assert pair.logits.std() > 0.5  # 1e-4 is small against the signal.
  assert_allclose(oracle.logits(pair.model, pair.params, pair.batch), pair.logits, atol=TOLERANCE)


def test_hidden_states_equal_transformers_after_each_layer(pair):
  for count, expected in enumerate(pair.layers, start=1):
    got = oracle.hidden(pair.model, cut_off(pair.params, count), pair.batch)
    assert_allclose(got, expected, atol=TOLERANCE)


def cut_off(params, count):
  """The same weights, but later layers add nothing, and nothing is added behind them: zeros."""

  def until(module):
    kept = lambda w: np.arange(len(w)).reshape(-1, *[1] * (w.ndim - 1)) < count
    return jax.tree.map(lambda w: np.where(kept(w), w, np.float32(0)), module)

  text, visual = params["text"], params.get("visual", {})
  attn, mlp = text["layers"]["attn"], text["layers"]["mlp"]
  layers = {
    **text["layers"],
    "attn": {**attn, "o": until(attn["o"])},
    "mlp": {**mlp, "down": until(mlp["down"])},
  }
  cut = {**params, "text": {**text, "layers": layers}}
  if "deep" in visual:
    cut["visual"] = {**visual, "deep": until(visual["deep"])}
  return cut


def test_gradients_equal_transformers(pair):
  # Recomputed where weights are tied, kept where not: either way they are transformers'.
  model = dataclasses.replace(
    pair.model, remat="layers" if pair.model.config.text.tied else "products"
  )
  batch = pair.batch
  rows, columns = np.nonzero(batch.valid)

  def loss(params):
    logits = oracle.forward(model, params, batch)[1]
    return (logits[rows, columns] * pair.weights).mean()

  ours = jax.jit(jax.grad(loss))(pair.params)
  assert jax.tree.structure(ours) == jax.tree.structure(pair.gradients)
  for path, expected in jax.tree_util.tree_leaves_with_path(pair.gradients):
    got = ours
    for key in path:
      got = got[key.key]
    got, expected = np.asarray(got), np.asarray(expected)
    scale = np.abs(expected).max()
    assert scale > 0, f"transformers gives {path} no gradient"
    # Relative to the largest entry: gradients of different weights differ by orders of magnitude.
    assert_allclose(got / scale, expected / scale, atol=TOLERANCE, err_msg=str(path))


def other(config, part: str, **changes):
  """A model with fields of its config's "text" or "vision" part changed."""
  changed = dataclasses.replace(getattr(config, part), **changes)
  return Model(dataclasses.replace(config, **{part: changed}))


@on_one
@pytest.mark.parametrize(
  "part, change",
  [
    ("text", {"rope_theta": 1e6}),
    ("text", {"norm_eps": 1e-2}),
    ("text", {"mrope_section": (4, 3, 1)}),
    ("text", {"activation": "relu"}),
    ("vision", {"rope_theta": 1e5}),
    ("vision", {"full_blocks": ()}),
    ("vision", {"full_blocks": (0, 1, 2)}),
    ("vision", {"full_blocks": (2,)}),
    ("vision", {"activation": "relu"}),
  ],
  ids=str,
)
def test_a_wrong_config_is_seen(pair, part, change):
  half = {"text": "decoder", "vision": "tower"}[part]
  assert seen(pair, **{half: other(pair.model.config, part, **change)})


def flat_positions(batch):
  flat = np.arange(batch.tokens.shape[1], dtype=np.int32)
  return dataclasses.replace(batch, positions=np.broadcast_to(flat, batch.positions.shape))


def seen_padding(batch):
  return dataclasses.replace(batch, segments=np.ones_like(batch.segments))


def with_vision(**changes):
  return lambda batch: dataclasses.replace(
    batch, vision=batch.vision.replace(**{k: f(batch.vision) for k, f in changes.items()})
  )


MUTATED_BATCHES = {
  "1-D positions": flat_positions,
  "padding in sight": seen_padding,
  "no windows": with_vision(window_segments=lambda v: v.frame_segments),
  "windows of a fixed length": with_vision(
    window_segments=lambda v: np.where(
      v.frame_segments > 0, np.arange(v.frame_segments.shape[1])[None] // 16 + 1, 0
    ).astype(np.int32)
  ),
  "window order kept": with_vision(
    inverse=lambda v: np.tile(np.arange(v.inverse.shape[1], dtype=np.int32), (len(v.inverse), 1))
  ),
  "rows and columns swapped": with_vision(positions=lambda v: v.positions[..., ::-1].copy()),
  "raster patch positions": with_vision(positions=lambda v: v.positions // 2),
}


@on_one
@pytest.mark.parametrize("name", MUTATED_BATCHES)
def test_a_wrong_layout_is_seen(pair, name):
  assert seen(pair, batch=MUTATED_BATCHES[name](pair.batch))


@on_one
def test_a_sliding_band_instead_of_windows_is_seen(pair, monkeypatch):
  def band(q, k, v, q_segments, kv_segments, *, causal, mesh):
    near = np.abs(np.subtract.outer(np.arange(112), np.arange(112))) <= 16
    same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments > 0)[:, :, None]
    whole = (kv_segments > 0)[:, None, :] & (q_segments > 0)[:, :, None] & near[None]
    # The full block stays as it is; elsewhere the band replaces the windows.
    full = jnp.array_equal(kv_segments, pair.batch.vision.frame_segments)
    return reference(q, k, v, jnp.where(full, same, whole))

  monkeypatch.setattr(vision, "attend", band)
  monkeypatch.setattr(oracle, "tower", oracle.tower.__wrapped__)  # Not what is kept.
  assert seen(pair)


def attention_with(params, **changes):
  """The parameters with parts of the decoder's attention replaced."""
  text = params["text"]
  attn = {**text["layers"]["attn"], **changes}
  return {**params, "text": {**text, "layers": {**text["layers"], "attn": attn}}}


def interleaved_heads(params, config):
  """Query heads tiled over key heads (0 1 0 1) instead of grouped (0 0 1 1)."""
  K, R, H = config.kv_heads, config.heads // config.kv_heads, config.head_width
  swap = lambda w: w.reshape(*w.shape[:-1], K, R, H).swapaxes(-3, -2).reshape(w.shape)
  return attention_with(params, q=jax.tree.map(swap, params["text"]["layers"]["attn"]["q"]))


def without_bias(params, config):
  k = params["text"]["layers"]["attn"]["k"]
  return attention_with(params, k={**k, "bias": jnp.zeros_like(k["bias"])})


def swapped_norms(params, config):
  attn = params["text"]["layers"]["attn"]
  return attention_with(params, q_norm=attn["k_norm"], k_norm=attn["q_norm"])


def without_patch_bias(params, config):
  patch = params["visual"]["patch"]
  patch = {**patch, "bias": jnp.zeros_like(patch["bias"])}
  return {**params, "visual": {**params["visual"], "patch": patch}}


def one_deep_merger(params, config):
  """Both levels through the first level's merger."""
  deep = jax.tree.map(lambda w: jnp.stack([w[0], w[0]]), params["visual"]["deep"])
  return {**params, "visual": {**params["visual"], "deep": deep}}


@on_one
@pytest.mark.parametrize("mutate", [interleaved_heads, without_bias])
def test_wrong_weights_are_seen(pair, mutate):
  assert seen(pair, params=mutate(pair.params, pair.model.config.text))


@on_3
@pytest.mark.parametrize("mutate", [swapped_norms, without_patch_bias, one_deep_merger])
def test_wrong_weights_of_qwen3_vl_are_seen(pair, mutate):
  assert seen(pair, params=mutate(pair.params, pair.model.config.text))


@on_3
@pytest.mark.parametrize(
  "part, change",
  [
    ("text", {"rope_theta": 1e6}),
    ("text", {"interleaved": False}),
    ("text", {"mrope_section": (10, 1, 1)}),
    ("text", {"activation": "relu"}),
    ("vision", {"rope_theta": 1e5}),
    ("vision", {"activation": "silu"}),
    ("vision", {"deepstack": (1, 2)}),
    ("vision", {"deepstack": (0, 1)}),
  ],
  ids=str,
)
def test_a_wrong_config_of_qwen3_vl_is_seen(pair, part, change):
  half = {"text": "decoder", "vision": "tower"}[part]
  assert seen(pair, **{half: other(pair.model.config, part, **change)})


@on_3
@pytest.mark.parametrize(
  "name, change",
  [
    ("1-D positions", flat_positions),
    ("padding in sight", seen_padding),
    ("attention across frames", with_vision(frame_segments=lambda v: v.frame_segments.clip(max=1))),
    ("no places in the table", with_vision(shares=lambda v: v.shares * 0)),
    ("the nearest place", with_vision(shares=lambda v: v.shares.round())),
    ("places in raster order", with_vision(corners=lambda v: np.sort(v.corners, axis=1))),
  ],
)
def test_a_wrong_layout_of_qwen3_vl_is_seen(pair, name, change):
  assert seen(pair, batch=change(pair.batch))


@on_3
@pytest.mark.parametrize(
  "change",
  [
    lambda parts: parts * np.array([1, 0, 0], np.float32)[None, :, None],
    lambda parts: parts[:, [0, 2, 1]],
    lambda parts: parts[:, [0, 1, 0]],
  ],
  ids=["dropped", "swapped", "one lost"],
)
def test_wrong_deepstack_levels_are_seen(pair, change):
  parts = lambda features: np.asarray(features).reshape(len(features), 3, -1)
  assert seen(pair, change=lambda features: change(parts(features)).reshape(features.shape))


@on_text
def test_wrong_models_of_text_are_seen(pair):
  config = pair.model.config
  assert seen(pair, decoder=other(config, "text", rope_theta=1e6))
  assert seen(pair, batch=seen_padding(pair.batch))
  assert seen(pair, params=swapped_norms(pair.params, config.text))
  assert seen(pair, params=interleaved_heads(pair.params, config.text))


@on_text
def test_a_text_model_refuses_images(pair):
  config = ModelConfig.from_hf(oracle.hf_config(tied=True).to_dict())
  images = [oracle.image((1, 4, 4), config, 0)]
  vision = layout.vision_inputs(images, config.vision, rows=1, patches=16)
  with pytest.raises(ValueError, match="qwen3 model has no vision tower"):
    pair.model.encode(pair.params, vision)


def test_head_is_the_embedding_only_when_tied(pair):
  head, embedding = pair.model.head(pair.params), pair.model.embedding(pair.params)
  tied = pair.model.config.text.tied
  assert ("head" not in pair.params) == tied
  assert (head is embedding) == tied


def test_extend_equals_hidden(pair):
  """Prefill in pieces and 6 tokens one by one: the same float32 states to 1e-5.

  One by one as the sampler decodes here, with each layer's weights by themselves.
  """
  extend_equals_hidden(pair, (157, 157, *[1] * 6))


@on_one
def test_extend_at_once_equals_hidden(pair):
  extend_equals_hidden(pair, (320,))


def extend_equals_hidden(pair, chunks):
  model, batch = pair.model, pair.batch
  features = oracle.encoded(model, pair.params, batch.vision)
  expected = oracle.hidden(model, pair.params, batch, features)
  extend = jax.jit(model.extend, donate_argnums=(1,))
  cache, at, pieces = model.init_cache(2, 333, jnp.float32), 0, []
  apart = model.apart(pair.params)
  assert len(apart) == model.config.text.layers
  for count in chunks:
    here = slice(at, at + count)
    piece, cache = extend(
      pair.params,
      cache,
      batch.tokens[:, here],
      batch.positions[:, :, here],
      features[None],
      batch.sources[:, here],
      batch.segments[:, here],
      apart if count == 1 else None,
    )
    pieces.append(piece)
    at += count
  got = np.concatenate(pieces, axis=1)
  assert_allclose(got[batch.valid], expected, atol=1e-5)
  assert int(cache.end) == 320
  np.testing.assert_array_equal(cache.segments[:, :320], batch.segments)
  assert not np.asarray(cache.segments[:, 320:]).any()


@on_one
def test_extend_refuses_more_tokens_than_slots(pair):
  row = jnp.zeros((1, 5), jnp.int32)
  with pytest.raises(ValueError, match="5 tokens do not fit 4 slots"):
    pair.model.extend(
      pair.params,
      pair.model.init_cache(1, 4, jnp.float32),
      row,
      jnp.zeros((1, 3, 5), jnp.int32),
      jnp.zeros((1, 0, 64)),
      row - 1,
      row + 1,
    )


@on_one
def test_segments_keep_packed_samples_apart(pair):
  """Two samples in one row give what each gives alone."""
  rows = lambda x: np.stack([x, x]).astype(np.int32)
  positions = rows([[*range(12), *range(18)]] * 3)
  # In the second row there is padding in the place of the first sample.
  segments = np.array([[1] * 12 + [2] * 18, [0] * 12 + [1] * 18], np.int32)
  nothing = np.zeros((1, 0, pair.model.config.text.width), np.float32)
  run, none = oracle.decoder_of(pair.model), np.full((2, 30), -1, np.int32)
  hidden, _ = run(pair.params, nothing, rows(oracle.text(30, 1)), positions, none, segments)
  assert_allclose(hidden[0, 12:], hidden[1, 12:], atol=1e-5)


@on_one
def test_init_shapes_and_axes_agree(pair):
  model = pair.model
  params = model.init(jax.random.key(0), jnp.bfloat16)
  axes = jax.tree.map(len, model.axes(), is_leaf=lambda node: isinstance(node, tuple))
  assert jax.tree.map(jnp.ndim, params) == axes
  described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  assert described == model.shapes(jnp.bfloat16)
  assert jax.tree.structure(params) == jax.tree.structure(pair.params)
  # 0.1 for embeddings, fan_in^-0.5 for kernels; some thousand draws estimate either to 1 %.
  spread = lambda x: float(x.astype(jnp.float32).std())
  assert_allclose(spread(params["text"]["embedding"]), 0.1, rtol=0.05)
  q = params["text"]["layers"]["attn"]["q"]["kernel"]
  assert_allclose(spread(q), q.shape[1] ** -0.5, rtol=0.05)
  # Layers are drawn apart, not one draw repeated.
  first, second = params["text"]["layers"]["attn"]["q"]["kernel"][:2].astype(jnp.float32)
  assert float(jnp.abs(first - second).max()) > 0.01


@on_one
def test_bfloat16_runs_and_stays_close(pair):
  """8 bits of mantissa: 0.4 % a rounding, some 20 of them in a row add up to 2 % of the signal."""
  low = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), pair.params)
  got = oracle.logits(pair.model, low, pair.batch)
  assert got.dtype == jnp.bfloat16
  assert np.abs(got.astype(np.float32) - pair.logits).mean() < 0.02 * pair.logits.std()


@on_one
def test_model_is_a_value(pair):
  same = Model(pair.model.config)
  assert same == pair.model and hash(same) == hash(pair.model)
  assert dataclasses.replace(same, remat="layers") != same
