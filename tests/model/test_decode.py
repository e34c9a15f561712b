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
  return oracle.weights(MODEL, 0)


read = jax.jit(partial(extend_rows, MODEL))
write = jax.jit(partial(decode_rows, MODEL), static_argnames=("max_tokens", "greedy"))


def sampled(params, prompts, draws, *, stop=(), banned=(), greedy=False, temperature=1.0):
  """(tokens, log-probs, entropies, lengths, finished) behind prompts of one length.

  The sampler's one program of these settings takes three rows: the first again where there are
  fewer.
  """
  N = len(prompts)
  three = lambda rows: np.array([*rows, *[rows[0]] * (3 - N)], np.int32)
  tokens = three(prompts)
  B, T = tokens.shape
  flags = lambda ids: np.isin(np.arange(V), ids)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, 3, T))
  last = np.full(B, T - 1, np.int32)
  at = tokens, positions, np.full_like(tokens, -1), np.ones_like(tokens), last
  hidden, cache = read(params, MODEL.init_cache(B, T + STEPS), None, *at)
  _, out = write(
    flags(banned),
    flags(stop),
    params,
    cache,
    hidden,
    np.full(B, T, np.int32),
    np.ones(B, bool),
    three(draws),
    jax.random.key(3),
    np.float32(temperature),
    max_tokens=STEPS,
    greedy=greedy,
  )
  return [np.asarray(x)[:N] for x in out]


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
  whole = np.array([[*prompts[0], *tokens[0]]], np.int32)
  T = whole.shape[1]
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (1, 3, T))
  nothing = np.zeros((1, 0, MODEL.config.text.width), np.float32)
  at = nothing, whole, positions, np.full_like(whole, -1), np.ones_like(whole)
  logits = oracle.decoder_of(MODEL)(params, *at)[1]
  expected = np.asarray(jax.nn.log_softmax(logits))[0, 2:-1]
  np.testing.assert_allclose(
    logps[0], np.take_along_axis(expected, tokens[0][:, None], 1)[:, 0], atol=1e-4
  )
  entropy = -(np.exp(expected) * expected).sum(-1)
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
