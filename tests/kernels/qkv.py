"""Inputs of attention, and what every tiled backend is held to."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from kernels.attention import reference, tiled
from kernels.tiles import visible


def inputs(B=2, T=5, S=7, N=4, K=2, H=8, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H)


def segments(*rows):
  return np.array(rows, np.int32)


def gradients(function, *inputs):
  """The value and the gradients for q, k, v of a sum that weighs every output differently."""
  value = function(*inputs)
  weights = jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)
  loss = lambda *x: (function(*x).astype(jnp.float32) * weights).sum()
  return value, *jax.grad(loss, argnums=(0, 1, 2))(*inputs)


def poisoned(x, at):
  """NaN in the tokens of segment 0: what is padding must not matter."""
  return jnp.where((at == 0)[:, :, None, None], jnp.nan, x)


def tiles_are_the_reference(backend, *, causal, T, extra, tile):
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
    at = (rng.integers(0, 3, (2, n)).astype(np.int32) for n in (T, S))
    for ours, theirs in zip(*both(*inputs(T=T, S=S, K=2, seed=seed), *at), strict=True):
      # Float32 sums of up to 139 terms of order 1, in another order.
      assert_allclose(ours, theirs, atol=1e-5)
