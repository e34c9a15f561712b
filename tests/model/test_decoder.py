"""What the cache promises its callers, and how tokens and positions enter the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.decoder import Cache, Decoder
from pixelis_jax.model.policy import Model
from tests.model import oracle

MODEL = Model(ModelConfig.from_hf(oracle.hf_config(tied=True).to_dict()))
WIDTH = MODEL.config.text.width
NOTHING = np.zeros((1, 0, WIDTH), np.float32)


@pytest.fixture(scope="module")
def params() -> dict:
  """Ten times the usual spread, so that attention is far from uniform."""
  return oracle.weights(MODEL, 1, spread=10.0)


@pytest.fixture(scope="module")
def decoder(params) -> Decoder:
  return nnx.merge(MODEL.graphdef, params).text


extend = jax.jit(MODEL.extend)
share = jax.jit(Cache.share, static_argnames=("copies", "capacity"))
gather = jax.jit(Cache.gather, static_argnames="capacity")


def positions_of(segments: np.ndarray) -> np.ndarray:
  """Text positions: each row counts its own tokens."""
  flat = np.maximum(np.cumsum(segments > 0, axis=1) - 1, 0).astype(np.int32)
  return np.repeat(flat[:, None], 3, axis=1)


def write(params, cache: Cache, tokens, positions, segments) -> tuple[jax.Array, Cache]:
  tokens = np.asarray(tokens, np.int32)
  nowhere = np.full(tokens.shape, -1, np.int32)
  return extend(params, cache, tokens, positions, NOTHING, nowhere, segments)


def test_rows_of_different_lengths_share_slots(params):
  """Row 1 skips slots that row 0 fills: its later tokens neither see them nor count them."""
  tokens = np.stack([oracle.text(9, 1), oracle.text(9, 2)])
  segments = np.ones((2, 9), np.int32)
  segments[1, 2:5] = 0
  positions = positions_of(segments)
  cache, pieces = MODEL.init_cache(2, 9, jnp.float32), []
  for here in (slice(0, 4), slice(4, 5), slice(5, 9)):
    piece, cache = write(params, cache, tokens[:, here], positions[:, :, here], segments[:, here])
    pieces.append(piece)
  got = np.concatenate(pieces, axis=1)
  # The kept tokens alone, in rows that padding makes as long: it is behind them, where none looks.
  behind = np.argsort(segments == 0, axis=1, kind="stable")
  alone = [np.take_along_axis(x, behind, axis=1) for x in (tokens, segments)]
  at, none = np.take_along_axis(positions, behind[:, None], axis=2), np.full((2, 9), -1, np.int32)
  hidden, _ = oracle.decoder_of(MODEL)(params, NOTHING, alone[0], at, none, alone[1])
  for row in range(2):
    kept = segments[row] > 0
    assert_allclose(got[row, kept], hidden[row, : kept.sum()], atol=1e-5)


def test_a_hidden_slot_is_forgotten(params):
  """Setting a slot's segment to 0 takes the token out: what a sampler does with a stopped row."""
  tokens = oracle.text(6, 3)[None]
  ones = np.ones((1, 6), np.int32)
  _, cache = write(params, MODEL.init_cache(1, 8, jnp.float32), tokens, positions_of(ones), ones)
  cache = cache.replace(segments=np.asarray(cache.segments) * (np.arange(8) < 2)[None])
  step = np.full((1, 3, 1), 2, np.int32)
  got, _ = write(params, cache, [[5]], step, np.ones((1, 1), np.int32))
  short = tokens[:, :2]
  _, cache = write(
    params, MODEL.init_cache(1, 8, jnp.float32), short, positions_of(ones[:, :2]), ones[:, :2]
  )
  expected, _ = write(params, cache, [[5]], step, np.ones((1, 1), np.int32))
  assert_allclose(got, expected, atol=1e-5)


def test_rows_that_share_a_prompt_grow_as_if_each_had_its_own(params):
  """Prompts of 4 and of 2 tokens, taken in another order, two rows each; then on by themselves."""
  tokens, flags = np.stack([oracle.text(4, 1), oracle.text(4, 2)]), np.ones((2, 4), np.int32)
  flags[1, 2:] = 0
  empty = MODEL.init_cache(2, 4, jnp.float32)
  _, read = write(params, empty, tokens, positions_of(flags), flags)
  order = np.array([1, 0], np.int32)
  shared = share(read, order, copies=2, capacity=3)
  apart = gather(read, np.repeat(order, 2), capacity=7)
  assert int(shared.length) == int(apart.length) == 4

  for step in range(3):  # Row 2 skips a slot.
    flags = np.ones((4, 1), np.int32)
    flags[2, 0] = step != 1
    at = np.full((4, 3, 1), 9 + step, np.int32), flags
    mine, shared = write(params, shared, oracle.text(4, step)[:, None], *at)
    other, apart = write(params, apart, oracle.text(4, step)[:, None], *at)
    kept = flags[:, 0] > 0
    assert_allclose(mine[kept], other[kept], atol=1e-5)

  rows = np.array([3, 0, 2], np.int32)
  mine, other = (gather(cache, rows, capacity=9) for cache in (shared, apart))
  assert mine.shared is None and int(mine.end) == int(other.end) == 7
  more = np.ones((3, 2), np.int32)
  at = np.broadcast_to(np.arange(12, 14), (3, 3, 2)), more
  mine, other = (write(params, cache, tokens[[0, 1, 0], :2], *at)[0] for cache in (mine, other))
  assert_allclose(mine, other, atol=1e-5)


def test_rows_that_share_prompts_take_one_token_at_a_time(params):
  shared = MODEL.init_cache(1, 2, jnp.float32).share(jnp.zeros(1, jnp.int32), copies=2, capacity=4)
  two = np.ones((2, 2), np.int32)
  with pytest.raises(ValueError, match="grow by one token, not 2"):
    write(params, shared, two, positions_of(two), two)


def test_padding_rows_stay_finite(params):
  zeros = np.zeros((2, 3), np.int32)
  hidden, cache = write(
    params, MODEL.init_cache(2, 3, jnp.float32), zeros, positions_of(zeros), zeros
  )
  assert np.isfinite(hidden).all()
  assert int(cache.end) == 3 and not np.asarray(cache.segments).any()


def test_the_cache_may_be_coarser_than_the_weights(params):
  """bfloat16 keys and values: 8 bits, so the states move by about 1 % and keep their dtype."""
  tokens, ones = oracle.text(6, 3)[None], np.ones((1, 6), np.int32)
  arguments = tokens, positions_of(ones), ones
  exact, _ = write(params, MODEL.init_cache(1, 6, jnp.float32), *arguments)
  coarse, cache = write(params, MODEL.init_cache(1, 6, jnp.bfloat16), *arguments)
  assert coarse.dtype == jnp.float32 and cache.keys.dtype == jnp.bfloat16
  assert 0 < float(jnp.abs(coarse - exact).max()) < 0.1


def test_each_rotary_pair_turns_with_its_axis(decoder):
  """Sections (1, 3, 4) of 8 pairs: pair 0 is time, 1-3 the row, 4-7 the column."""
  angles = decoder.angles(jnp.asarray([[[2], [3], [5]]], jnp.int32))
  axis = np.array([2, 3, 3, 3, 5, 5, 5, 5])
  assert_allclose(angles[0, 0], axis * 5e6 ** (-np.arange(8) / 8), rtol=1e-6)
  assert angles.dtype == jnp.float32


def test_features_replace_the_embedding_where_a_source_says_so(decoder):
  features = np.arange(3 * WIDTH, dtype=np.float32).reshape(3, WIDTH)
  tokens = np.array([[7, oracle.IMAGE, oracle.IMAGE]], np.int32)
  sources = np.array([[-1, 2, 0]], np.int32)
  got = np.asarray(jax.jit(decoder.embed)(tokens, features[None], sources))
  assert_array_equal(got[0, 0], np.asarray(decoder.embedding[...])[7])
  assert_array_equal(got[0, 1], features[2])
  assert_array_equal(got[0, 2], features[0])


def test_a_feature_used_twice_gets_both_gradients(decoder):
  """The group's samples share one image: its gradient is their sum."""

  def loss(features):
    tokens, sources = np.full((2, 1), oracle.IMAGE, np.int32), np.ones((2, 1), np.int32)
    return decoder.embed(jnp.asarray(tokens), features[None], jnp.asarray(sources)).sum()

  gradient = jax.jit(jax.grad(loss))(np.zeros((2, WIDTH), np.float32))
  assert_array_equal(gradient, np.stack([np.zeros(WIDTH), np.full(WIDTH, 2.0)]))


def test_remat_changes_nothing(params):
  tokens, ones = oracle.text(12, 5)[None], np.ones((1, 12), np.int32)
  at = tokens, positions_of(ones), NOTHING, -ones, ones

  def gradient(model):
    loss = lambda p, at: jnp.square(model.hidden(p, *at)[:, ::3]).sum()
    return jax.jit(jax.grad(loss))(params, at)["text"]

  again = gradient(dataclasses.replace(MODEL, remat="layers"))
  jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(MODEL), again)


def test_compile_time_does_not_grow_with_depth():
  """One scanned layer: twelve layers lower to about the text of two."""

  def size(layers: int) -> int:
    text = dataclasses.replace(MODEL.config.text, layers=layers)
    model = Model(dataclasses.replace(MODEL.config, text=text))
    row = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    arguments = row, jax.ShapeDtypeStruct((1, 3, 4), jnp.int32), NOTHING, row, row
    return len(jax.jit(model.hidden).lower(model.shapes(), *arguments).as_text())

  assert size(12) < 1.05 * size(2)
