"""Tokens sampled one after the other, on a random text model small enough to write down."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.decode import decode_rows, embedded_rows, extend_rows
from pixelis_jax.model.policy import Model
from tests.model import oracle

MODEL = Model(ModelConfig.from_hf(oracle.hf_config(tied=False, family="qwen3").to_dict()))
V = MODEL.config.text.vocab_size
STEPS = 6


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def sampled(params, prompts, draws, *, stop=(), banned=(), greedy=False, temperature=1.0):
  """(tokens, log-probs, entropies, lengths, finished) behind prompts of one length."""
  tokens = jnp.asarray(prompts, jnp.int32)
  B, T = tokens.shape
  flags = lambda ids: jnp.zeros(V, bool).at[jnp.asarray(ids, jnp.int32)].set(True)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, None], (B, 3, T))
  read = jax.jit(partial(extend_rows, MODEL))
  write = jax.jit(
    partial(decode_rows, MODEL, flags(banned), flags(stop)),
    static_argnames=("max_tokens", "greedy"),
  )
  cache = MODEL.init_cache(B, T + STEPS)
  last = jnp.full(B, T - 1, jnp.int32)
  at = tokens, positions, jnp.full_like(tokens, -1), jnp.ones_like(tokens), last
  hidden, cache = read(params, cache, None, *at)
  _, out = write(
    params,
    cache,
    hidden,
    jnp.full(B, T, jnp.int32),
    jnp.ones(B, bool),
    jnp.asarray(draws, jnp.int32),
    jax.random.key(3),
    jnp.float32(temperature),
    max_tokens=STEPS,
    greedy=greedy,
  )
  return [np.asarray(x) for x in out]


def test_what_an_episode_samples_is_its_own(params):
  """The same prompt, episode and turn give the same tokens in any row, beside anybody."""
  a, b = [5, 6, 7], [9, 8, 7]
  one, *_ = sampled(params, [a, b, a], [(0, 0), (1, 0), (2, 0)])
  two, *_ = sampled(params, [a, a, b], [(2, 0), (0, 0), (1, 0)])
  assert_array_equal(one[[2, 0, 1]], two)
  assert (one[0] != one[2]).any()  # Another episode of the prompt, other tokens;
  other, *_ = sampled(params, [a, b, a], [(0, 1), (1, 0), (2, 0)])
  assert (one[0] != other[0]).any()  # and another turn.
  assert_array_equal(one[1:], other[1:])


def test_log_probabilities_are_those_of_temperature_one(params):
  """Of the tokens taken, banned ones counted in: as the learner computes them."""
  prompts = [[5, 6, 7]]
  tokens, logps, entropies, *_ = sampled(params, prompts, [(0, 0)], temperature=2.0, banned=[1])
  whole = jnp.asarray([[*prompts[0], *tokens[0]]], jnp.int32)
  T = whole.shape[1]
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, None], (1, 3, T))
  nothing = jnp.zeros((1, 0, MODEL.config.text.width))
  at = whole, positions, nothing, jnp.full_like(whole, -1), jnp.ones_like(whole)
  logits = MODEL.hidden(params, *at) @ MODEL.head(params).T
  expected = jax.nn.log_softmax(logits)[0, 2:-1]
  np.testing.assert_allclose(
    logps[0], np.take_along_axis(np.asarray(expected), tokens[0][:, None], 1)[:, 0], atol=1e-4
  )
  entropy = -(np.exp(expected) * np.asarray(expected)).sum(-1)
  np.testing.assert_allclose(entropies[0], entropy, atol=1e-4)


def test_a_row_ends_at_its_stop_token_and_others_go_on(params):
  """Greedy: the third token of the first row stops it; it counts, and is the last that does."""
  free, *_ = sampled(params, [[5, 6, 7], [9, 8, 7]], [(0, 0), (1, 0)], greedy=True)
  stop = int(free[0, 2])
  first = {row: int(np.argmax(free[row] == stop)) if stop in free[row] else None for row in (0, 1)}
  tokens, *_, lengths, finished = sampled(
    params, [[5, 6, 7], [9, 8, 7]], [(0, 0), (1, 0)], greedy=True, stop=[stop]
  )
  for row, at in first.items():
    assert lengths[row] == (STEPS if at is None else at + 1)
    assert finished[row] == (at is not None)
    assert_array_equal(tokens[row, : lengths[row]], free[row, : lengths[row]])
  allowed, *_ = sampled(params, [[5, 6, 7]], [(0, 0)], greedy=True, banned=[int(free[0, 0])])
  assert free[0, 0] not in allowed


def test_rows_of_the_embedding(params):
  ids = jnp.asarray([4, 1, 4], jnp.int32)
  table = np.asarray(params["text"]["embedding"])
  assert_array_equal(embedded_rows(MODEL, params, ids), table[[4, 1, 4]])
