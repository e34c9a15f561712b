"""Attention against loops over every query, and its two formulations against each other."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from configs import common
from kernels import attention as kernel
from kernels.token_logps import token_logps
from pixelis_jax import batch, learner, sampler
from pixelis_jax.data import demos
from pixelis_jax.model import layers, policy
from tests import fakes
from tests.kernels.qkv import inputs, segments

TINY = Path(__file__).parents[2] / "assets" / "tiny-vl"


def by_loops(q, k, v, *, causal, q_segments, kv_segments, q_offset):
  """The contract read aloud, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, H = q.shape
  out = np.zeros_like(q)
  for b in range(B):
    for t in range(T):
      seen = [
        s
        for s in range(k.shape[1])
        if q_segments[b, t] == kv_segments[b, s] != 0 and (not causal or s <= q_offset + t)
      ]
      for n in range(N):
        if seen:
          head = n // (N // k.shape[2])
          logits = k[b, seen, head] @ q[b, t, n] / np.sqrt(H)
          weights = np.exp(logits - logits.max())
          out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
  return out


# One program a shape in the place of one an operation.
attention = jax.jit(kernel.attention, static_argnames=("causal", "backend"))


@given(
  causal=st.booleans(),
  T=st.sampled_from([1, 3]),
  K=st.sampled_from([1, 2, 4]),
  offset=st.integers(0, 5),
  seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_equals_loops(causal, T, K, offset, seed):
  rng = np.random.default_rng(seed)
  q, k, v = inputs(T=T, S=6, K=K, seed=seed)
  kwargs = {
    "causal": causal,
    "q_segments": rng.integers(0, 3, (2, T)).astype(np.int32),
    "kv_segments": rng.integers(0, 3, (2, 6)).astype(np.int32),
    "q_offset": offset,
  }
  # Float32 sums of at most 8 products of order 1.
  assert_allclose(attention(q, k, v, **kwargs), by_loops(q, k, v, **kwargs), atol=2e-6)


@pytest.mark.parametrize("T", [1, 3])
def test_a_query_that_sees_nothing_is_zero_with_zero_gradients(T):
  q, k, v = inputs(T=T, S=3)
  hidden = segments([1] * T, [0] * T), segments([2, 2, 0], [0, 0, 0])

  @jax.jit
  def run(q, k, v):
    at = {"q_segments": hidden[0], "kv_segments": hidden[1]}
    out, back = jax.vjp(lambda *x: attention(*x, causal=False, **at), q, k, v)
    return out, *back(jnp.ones_like(out))

  for found in run(q, k, v):
    assert_array_equal(found, np.zeros(found.shape))


def test_large_logits_do_not_overflow():
  """exp(1000) is infinite in float32: the maximum must be taken out first."""
  q, k, v = inputs(T=3, S=3)
  ones = segments([1, 1, 1], [1, 1, 1])
  large = np.float32(1e4)
  out = attention(q * large, k, v, causal=True, q_segments=ones, kv_segments=ones)
  out = np.asarray(out)
  assert np.isfinite(out).all()
  assert_allclose(out[:, 0], np.repeat(v[:, 0], 2, axis=1), atol=1e-6)  # Only itself in sight.


@pytest.mark.parametrize("T", [1, 3])
def test_bfloat16_softmax_is_float32(T):
  """600 equal keys weigh 1/600 each; summed in bfloat16 they would stall at 256 of 600."""
  q, k = np.zeros((1, T, 1, 8), jnp.bfloat16), np.zeros((1, 600, 1, 8), jnp.bfloat16)
  out = attention(
    q,
    k,
    np.ones_like(k),
    causal=False,
    q_segments=np.ones((1, T), np.int32),
    kv_segments=np.ones((1, 600), np.int32),
  )
  assert out.dtype == jnp.bfloat16
  assert_allclose(np.asarray(out, np.float32), 1.0, rtol=2**-7)


def test_offset_may_be_traced():
  q, k, v = inputs(T=2, S=6)
  ones, all_ones = segments([1] * 2, [1] * 2), segments([1] * 6, [1] * 6)

  at = {"q_segments": ones, "kv_segments": all_ones}
  fixed = jax.jit(functools.partial(kernel.attention, causal=True, q_offset=3))(q, k, v, **at)
  traced = attention(q, k, v, causal=True, **at, q_offset=np.int32(3))
  assert_allclose(traced, fixed, atol=1e-6)


def test_heads_that_do_not_divide_are_refused():
  """The Triton kernel that ships with JAX takes such shapes and returns wrong heads."""
  q, k, v = inputs(B=1, N=3, K=2)
  with pytest.raises(ValueError, match="3 query heads must be a multiple of 2"):
    attention(q, k, v, causal=True, q_segments=segments([1] * 5), kv_segments=segments([1] * 7))


def test_an_unknown_backend_is_refused():
  q, k, v = inputs()
  at = {"q_segments": segments([1] * 5, [1] * 5), "kv_segments": segments([1] * 7, [1] * 7)}
  with pytest.raises(ValueError, match=r"'triton' must be one of \('reference', .*'gpu'\)"):
    attention(q, k, v, causal=True, **at, backend="triton")


@pytest.mark.parametrize(
  "dtype, H, told", [(jnp.float32, 8, "float32 on 8"), (jnp.bfloat16, 136, "bfloat16 on 136")]
)
def test_a_backend_is_refused_what_it_does_not_have(dtype, H, told):
  q, k, v = (x.astype(dtype) for x in inputs(H=H))
  at = {"q_segments": segments([1] * 5, [1] * 5), "kv_segments": segments([1] * 7, [1] * 7)}
  with pytest.raises(ValueError, match=f'at most 128 wide, not in {told}: cast, or choose "xla"'):
    attention(q, k, v, causal=True, **at, backend="gpu")


def test_the_embedded_models_loss_is_that_of_the_definitions(monkeypatch):
  """Tiles and chunks are how it is computed, not what: the mean over 2 rows' supervised tokens."""
  model = sampler.load_policy(common.model(str(TINY)))
  rows = [
    batch.demo_row(demos.direct(fakes.task(f"q{i}", answer="7", images=[image])), model.chat)
    for i, image in enumerate((fakes.image(40, 40), fakes.image(60, 30)))
  ]
  packed = batch.pack_sft(rows, model.model.config, max_tokens=512)
  heads = learner.with_heads(model.model, model.params, jax.random.key(0), labels=0)
  taken = []

  def loss(attending, **logps):
    prefer = lambda *_: taken.append(attending) or attending
    monkeypatch.setattr(layers, "preferred_backend", prefer)
    monkeypatch.setattr(policy.kernel, "token_logps", functools.partial(token_logps, **logps))
    weights = {"entropy_weight": 0.1, "aim_weight": 0.0, "sight_weight": 0.0}
    return jax.jit(learner.sft_loss(model.model, **weights))(heads, packed)[0]

  assert packed.inputs.tokens.size > 100  # So that there are chunks.
  tiled = loss("xla", chunk=100)
  assert_allclose(tiled, loss("reference", backend="reference"), rtol=1e-6)
  assert {"xla", "reference"} == set(taken) and tiled > 0
