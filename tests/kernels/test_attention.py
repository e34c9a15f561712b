"""Attention against loops over every query, and its two formulations against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from kernels.attention import attention, reference, single_query, tiled
from kernels.tiles import visible


def inputs(B=2, T=5, S=7, N=4, K=2, H=8, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H)


def segments(*rows):
  return jnp.asarray(rows, jnp.int32)


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
    "q_segments": jnp.asarray(rng.integers(0, 3, (2, T)), jnp.int32),
    "kv_segments": jnp.asarray(rng.integers(0, 3, (2, 6)), jnp.int32),
    "q_offset": offset,
  }
  # Float32 sums of at most 8 products of order 1.
  assert_allclose(attention(q, k, v, **kwargs), by_loops(q, k, v, **kwargs), atol=2e-6)


@pytest.mark.parametrize("T", [1, 3])
def test_a_query_that_sees_nothing_is_zero_with_zero_gradients(T):
  q, k, v = inputs(T=T, S=3)
  hidden = segments([1] * T, [0] * T), segments([2, 2, 0], [0, 0, 0])

  def run(q, k, v):
    return attention(q, k, v, causal=False, q_segments=hidden[0], kv_segments=hidden[1])

  assert_array_equal(run(q, k, v), np.zeros(q.shape))
  for gradient in jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2))(q, k, v):
    assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("K", [1, 2, 4])
def test_single_query_is_the_reference_at_one_token(K):
  q, k, v = inputs(T=1, K=K)
  mask = visible(True, segments([1], [1]), segments([1] * 7, [0, 1, 1, 1, 0, 0, 1]), 4)

  def squared(function):
    return jax.grad(lambda *x: jnp.square(function(*x, mask)).sum(), argnums=(0, 1, 2))(q, k, v)

  assert_allclose(single_query(q, k, v, mask), reference(q, k, v, mask), atol=1e-6)
  for ours, expected in zip(squared(single_query), squared(reference), strict=True):
    assert_allclose(ours, expected, atol=1e-5)


def test_large_logits_do_not_overflow():
  """exp(1000) is infinite in float32: the maximum must be taken out first."""
  q, k, v = inputs(T=3, S=3)
  ones = segments([1, 1, 1], [1, 1, 1])
  out = attention(q * 1e4, k, v, causal=True, q_segments=ones, kv_segments=ones)
  assert np.isfinite(out).all()
  assert_allclose(out[:, 0], jnp.repeat(v[:, 0], 2, axis=1), atol=1e-6)  # Only itself in sight.


@pytest.mark.parametrize("T", [1, 3])
def test_bfloat16_softmax_is_float32(T):
  """600 equal keys weigh 1/600 each; summed in bfloat16 they would stall at 256 of 600."""
  q, k = jnp.zeros((1, T, 1, 8), jnp.bfloat16), jnp.zeros((1, 600, 1, 8), jnp.bfloat16)
  out = attention(
    q,
    k,
    jnp.ones_like(k),
    causal=False,
    q_segments=jnp.ones((1, T), jnp.int32),
    kv_segments=jnp.ones((1, 600), jnp.int32),
  )
  assert out.dtype == jnp.bfloat16
  assert_allclose(out.astype(jnp.float32), 1.0, rtol=2**-7)


def test_offset_may_be_traced():
  q, k, v = inputs(T=2, S=6)
  ones, all_ones = segments([1] * 2, [1] * 2), segments([1] * 6, [1] * 6)

  @jax.jit
  def run(offset):
    return attention(q, k, v, causal=True, q_segments=ones, kv_segments=all_ones, q_offset=offset)

  fixed = attention(q, k, v, causal=True, q_segments=ones, kv_segments=all_ones, q_offset=3)
  assert_allclose(run(jnp.asarray(3, jnp.int32)), fixed, atol=1e-6)


def test_heads_that_do_not_divide_are_refused():
  """The Triton kernel that ships with JAX takes such shapes and returns wrong heads."""
  q, k, v = inputs(B=1, N=3, K=2)
  with pytest.raises(ValueError, match="3 query heads must be a multiple of 2"):
    attention(q, k, v, causal=True, q_segments=segments([1] * 5), kv_segments=segments([1] * 7))


def gradients(function, *inputs):
  """The value and the gradients for q, k, v of a sum that weighs every output differently."""
  value = function(*inputs)
  weights = jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
  loss = lambda *x: (function(*x).astype(jnp.float32) * weights).sum()
  return value, *jax.grad(loss, argnums=(0, 1, 2))(*inputs)


def poisoned(x, at):
  """NaN in the tokens of segment 0: what is padding must not matter."""
  return jnp.where((at == 0)[:, :, None, None], jnp.nan, x)


TILED = [
  ("xla", 7, 0, 3),
  ("xla", 5, 6, 4),
  ("xla", 4, 2, 64),
  ("tpu", 7, 0, 128),
  ("tpu", 130, 9, 128),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend, T, extra, tile", TILED)
def test_tiles_are_the_reference(backend, causal, T, extra, tile):
  """Any segments, in any order, tiles that do not divide the lengths, rows that see nothing."""
  S = T + extra

  @jax.jit
  def both(q, k, v, q_at, kv_at):
    mask = visible(causal, q_at, kv_at, extra)
    by_tiles = lambda *x: tiled(
      *x,
      causal=causal,
      q_segments=q_at,
      kv_segments=kv_at,
      q_offset=extra,
      backend=backend,
      tile=tile,
      interpret=True,
    )
    padded = poisoned(q, q_at), poisoned(k, kv_at), poisoned(v, kv_at)
    return gradients(by_tiles, *padded), gradients(lambda *x: reference(*x, mask), q, k, v)

  for seed in range(4):
    rng = np.random.default_rng(seed)
    at = (jnp.asarray(rng.integers(0, 3, (2, n)), jnp.int32) for n in (T, S))
    for ours, theirs in zip(*both(*inputs(T=T, S=S, K=2, seed=seed), *at), strict=True):
      # Float32 sums of up to 139 terms of order 1, in another order.
      assert_allclose(ours, theirs, atol=1e-5)


def test_memory_of_tiles_is_linear_in_tokens():
  """Temporaries of forward and backward at 4 times the tokens: 4 times as many bytes, not 16."""

  def temporary(T):
    q, k, v = inputs(B=1, T=T, S=T)
    at = {name: jnp.ones((1, T), jnp.int32) for name in ("q_segments", "kv_segments")}
    run = lambda *x: tiled(*x, causal=True, **at, backend="xla", tile=64).sum()
    compiled = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(q, k, v).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(4096) < 5 * temporary(1024)


def test_an_unknown_backend_is_refused():
  q, k, v = inputs()
  at = {"q_segments": segments([1] * 5, [1] * 5), "kv_segments": segments([1] * 7, [1] * 7)}
  with pytest.raises(ValueError, match=r"'triton' must be one of \('reference', .*'gpu'\)"):
    attention(q, k, v, causal=True, **at, backend="triton")


def test_a_backend_is_refused_what_it_does_not_compute_in():
  q, k, v = inputs()
  at = {"q_segments": segments([1] * 5, [1] * 5), "kv_segments": segments([1] * 7, [1] * 7)}
  with pytest.raises(ValueError, match='bfloat16 or float16, not in float32: .* choose "xla"'):
    attention(q, k, v, causal=True, **at, backend="gpu")
