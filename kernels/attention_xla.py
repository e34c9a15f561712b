"""Attention in plain XLA, a tile of logits at a time: for CPUs, and wherever no kernel serves.

The softmax is accumulated over tiles as in FlashAttention-2 (https://arxiv.org/abs/2307.08691);
tiles are recomputed in the backward pass, and those that nobody sees are never computed.

Axes: B rows, N query heads, K key heads, R = N / K, T query tokens, S key tokens, H head width, I
tiles of queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.tiles import HIDDEN, incoming, meeting, product, span, sum_dtype, visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
  q_BNTH: Float[Array, "B N T H"],
  k_BKSH: Float[Array, "B K S H"],
  v_BKSH: Float[Array, "B K S H"],
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""],
  causal: bool,
  tiles: tuple[int, int],
) -> Float[Array, "B N T H"]:
  """`attention.reference` on whole tiles, heads before tokens; padding must hold zeros."""
  return _forward(q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal, tiles)[0]


def _forward(q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal, tiles):
  B, K, _, H = k_BKSH.shape
  N, T = q_BNTH.shape[1:3]
  tile = _Tile(q_segments, kv_segments, q_offset, causal, tiles, H**-0.5)
  q_BKRTH = q_BNTH.reshape(B, K, N // K, T, H)
  low, high = tile.spans()
  empty_BKRT = jnp.zeros((B, K, N // K, tiles[0]), sum_dtype(q_BNTH))

  def row(_, i):
    q = tile.queries(q_BKRTH, i)

    def column(j, carry):
      top, total, out = carry
      logits, seen = tile.logits(q, tile.keys(k_BKSH, j), i, j)
      new_top = jnp.maximum(top, logits.max(axis=-1))
      weights = jnp.where(seen, jnp.exp(logits - new_top[..., None]), 0.0)
      fade = jnp.exp(top - new_top)
      v = tile.keys(v_BKSH, j)
      more = product("BKRTS,BKSH->BKRTH", weights.astype(v.dtype), v)
      return new_top, total * fade + weights.sum(axis=-1), out * fade[..., None] + more

    nothing = empty_BKRT + HIDDEN, empty_BKRT, jnp.zeros(q.shape, empty_BKRT.dtype)
    top, total, out = jax.lax.fori_loop(low[i], high[i], column, nothing)
    total = jnp.where(total == 0.0, 1.0, total)
    return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

  _, (out, sums) = jax.lax.scan(row, None, jnp.arange(T // tiles[0], dtype=jnp.int32))
  out_BNTH = _untiled(out).reshape(q_BNTH.shape)
  saved = q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, out_BNTH, _untiled(sums)
  return out_BNTH, saved


def _backward(causal, tiles, saved, grad_BNTH):
  q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, out_BNTH, sums_BKRT = saved
  B, K, _, H = k_BKSH.shape
  # A constant offset comes back from JAX as one of numpy's.
  tile = _Tile(q_segments, kv_segments, jnp.asarray(q_offset), causal, tiles, H**-0.5)
  low, high = tile.spans()
  dtype = sum_dtype(q_BNTH)
  grad_BNTH, own_BNT = incoming(grad_BNTH, out_BNTH, q_segments)
  grouped = lambda x: x.reshape(B, K, -1, *x.shape[2:])
  q_BKRTH, grad_BKRTH, own_BKRT = grouped(q_BNTH), grouped(grad_BNTH), grouped(own_BNT)

  def row(carry, i):
    q, grad, sums, own = (tile.queries(x, i) for x in (q_BKRTH, grad_BKRTH, sums_BKRT, own_BKRT))

    def column(j, carry):
      dq, dk_BKSH, dv_BKSH = carry
      k, v = tile.keys(k_BKSH, j), tile.keys(v_BKSH, j)
      logits, seen = tile.logits(q, k, i, j)
      weights = jnp.where(seen, jnp.exp(logits - sums[..., None]), 0.0)
      dv = product("BKRTS,BKRTH->BKSH", weights.astype(v.dtype), grad)
      dweights = product("BKRTH,BKSH->BKRTS", grad, v)
      dlogits = (weights * (dweights - own[..., None]) * H**-0.5).astype(q.dtype)
      dk = product("BKRTS,BKRTH->BKSH", dlogits, q)
      dq = dq + product("BKRTS,BKSH->BKRTH", dlogits, k)
      return dq, tile.add(dk_BKSH, dk, j), tile.add(dv_BKSH, dv, j)

    start = jnp.zeros(q.shape, dtype), *carry
    dq, dk_BKSH, dv_BKSH = jax.lax.fori_loop(low[i], high[i], column, start)
    return (dk_BKSH, dv_BKSH), dq

  start = jnp.zeros(k_BKSH.shape, dtype), jnp.zeros(v_BKSH.shape, dtype)
  rows = jnp.arange(q_BNTH.shape[2] // tiles[0], dtype=jnp.int32)
  (dk_BKSH, dv_BKSH), dq = jax.lax.scan(row, start, rows)
  dq_BNTH = _untiled(dq).reshape(q_BNTH.shape).astype(q_BNTH.dtype)
  return dq_BNTH, dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype), None, None, None


attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """Tile (i, j): query rows from i * tiles[0], key columns from j * tiles[1]."""

  q_segments: Int[Array, "B T"]
  kv_segments: Int[Array, "B S"]
  q_offset: Int[Array, ""]
  causal: bool
  tiles: tuple[int, int]
  scale: float

  def spans(self) -> tuple[Int[Array, " I"], Int[Array, " I"]]:
    """For each row of tiles the first that is computed, and one past the last."""
    at = self.q_segments, self.kv_segments, self.q_offset
    return span(meeting(*at, causal=self.causal, tiles=self.tiles).any(axis=0))

  def queries(self, x: Array, i: Int[Array, ""]) -> Array:
    """Tokens of x[B, K, R, T, ...] in row i of tiles."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.tiles[0], self.tiles[0], axis=3)

  def keys(self, x: Array, j: Int[Array, ""]) -> Array:
    """Tokens of x[B, K, S, ...] in column j of tiles."""
    return jax.lax.dynamic_slice_in_dim(x, j * self.tiles[1], self.tiles[1], axis=2)

  def add(self, x: Array, part: Array, j: Int[Array, ""]) -> Array:
    """x[B, K, S, H] with `part` added in column j of tiles."""
    part = self.keys(x, j) + part
    return jax.lax.dynamic_update_slice_in_dim(x, part, j * self.tiles[1], axis=2)

  def logits(
    self, q: Array, k: Array, i: Int[Array, ""], j: Int[Array, ""]
  ) -> tuple[Float[Array, "B K R T S"], Bool[Array, "B 1 1 T S"]]:
    """The tile's scaled logits, and what of it is seen."""
    part = lambda x, at, size: jax.lax.dynamic_slice_in_dim(x, at * size, size, axis=1)
    seen = visible(
      self.causal,
      part(self.q_segments, i, self.tiles[0]),
      part(self.kv_segments, j, self.tiles[1]),
      self.q_offset + i * self.tiles[0] - j * self.tiles[1],
    )[:, None, None]
    logits = product("BKRTH,BKSH->BKRTS", q, k) * self.scale
    return jnp.where(seen, logits, HIDDEN), seen


def _untiled(x: Array) -> Array:
  """[I, B, K, R, t, ...] -> [B, K, R, I t, ...]."""
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape(*x.shape[:3], -1, *x.shape[5:])
