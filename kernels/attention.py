"""Segment-masked attention with grouped query heads: the one description every backend lowers from.

Axes: B rows, T query tokens, S key tokens, N query heads, K key heads, R = N / K, H head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

BACKENDS = ("reference", "blocked")

# Tokens: the side of a tile of `blocked`, up to `_SHORT` tokens and beyond. Measured on a CPU.
_TILE, _SHORT, _LONG_TILE = 64, 1024, 256
_HIDDEN = -1e30  # A logit that is not seen; finite, so that a difference of two is no NaN.
_NO_SEGMENT = 2**31 - 1


def attention(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  *,
  causal: bool,
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
  backend: str = "blocked",
) -> Float[Array, "B T N H"]:
  """Query t sees key s iff their segments are equal and not 0 and, if causal, s <= q_offset + t.

  Logits are scaled by H^-0.5 and normalised in float32. A query that sees nothing returns zeros.
  Query head n reads key head n // R. Raises ValueError if N is not a multiple of K.
  """
  if q_BTNH.shape[2] % k_BSKH.shape[2]:
    raise ValueError(f"{q_BTNH.shape[2]} query heads must be a multiple of {k_BSKH.shape[2]}")
  if backend not in BACKENDS:
    raise ValueError(f"attention backend {backend!r} must be one of {BACKENDS}")
  if q_BTNH.shape[1] == 1:
    mask_BTS = visible(causal, q_segments, kv_segments, q_offset)
    return single_query(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
  if backend == "reference":
    mask_BTS = visible(causal, q_segments, kv_segments, q_offset)
    return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
  return blocked(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    causal=causal,
    q_segments=q_segments,
    kv_segments=kv_segments,
    q_offset=q_offset,
  )


def visible(
  causal: bool,
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
  """The mask of `attention`, written out."""
  seen = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments != 0)[:, :, None]
  if causal:
    t = jnp.arange(q_segments.shape[1], dtype=jnp.int32) + jnp.asarray(q_offset, jnp.int32)
    s = jnp.arange(kv_segments.shape[1], dtype=jnp.int32)
    seen &= (s[None, :] <= t[:, None])[None, :, :]
  return seen


def reference(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
  """The definition, in plain XLA: quadratic in memory."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H)
  logits_BKRTS = _product("BTKRH,BSKH->BKRTS", q_BTKRH, k_BSKH)
  probs_BKRTS = _masked_softmax(logits_BKRTS * H**-0.5, mask_BTS[:, None, None])
  out_BTKRH = jnp.einsum("BKRTS,BSKH->BTKRH", probs_BKRTS.astype(v_BSKH.dtype), v_BSKH)
  return out_BTKRH.reshape(B, T, N, H)


def single_query(
  q_BTNH: Float[Array, "B 1 N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  mask_BTS: Bool[Array, "B 1 S"],
) -> Float[Array, "B 1 N H"]:
  """`reference` at T = 1 (decoding), reading keys and values where they lie.

  A head-major product would first transpose the whole cache (6 times slower on a CPU). Here each
  query head is a row of width K H, zero outside its own key head, against the flat [S, K H] cache;
  the K-fold arithmetic is free where reading the cache is what takes the time.
  """
  B, S, K, H = k_BSKH.shape
  R = q_BTNH.shape[2] // K
  own_K1K1 = jnp.eye(K, dtype=q_BTNH.dtype)[:, None, :, None]
  q_BNX = (q_BTNH.reshape(B, K, R, 1, H) * own_K1K1[None]).reshape(B, K * R, K * H)
  k_BSX, v_BSX = k_BSKH.reshape(B, S, K * H), v_BSKH.reshape(B, S, K * H)
  logits_BNS = _product("BNX,BSX->BNS", q_BNX, k_BSX)
  probs_BNS = _masked_softmax(logits_BNS * H**-0.5, mask_BTS)
  out_BNX = jnp.einsum("BNS,BSX->BNX", probs_BNS.astype(v_BSX.dtype), v_BSX)
  out_BKRKH = out_BNX.reshape(B, K, R, K, H)
  out_BKRH = jnp.stack([out_BKRKH[:, k, :, k] for k in range(K)], axis=1)
  return out_BKRH.reshape(B, 1, K * R, H)


def blocked(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  *,
  causal: bool,
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
  tile: int | None = None,
) -> Float[Array, "B T N H"]:
  """`reference` with one [tile, tile] square of logits a head at a time, in the backward pass too.

  Tiles in which no row of the batch sees anything are not computed: those above the diagonal, and
  those between segments (windows of an image, conversations of a packed row), for which ranges of
  segment numbers stand. The softmax is accumulated over tiles as in FlashAttention-2
  (https://arxiv.org/abs/2307.08691), tiles are recomputed in the backward pass. Padding (segment 0)
  may hold anything, NaN too.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  tile = tile or (_TILE if max(T, S) <= _SHORT else _LONG_TILE)
  tiles = _even(T, tile), _even(S, tile)
  q_pad, kv_pad = -T % tiles[0], -S % tiles[1]
  hide = lambda x, segments: jnp.where((segments != 0)[:, :, None, None], x, 0)
  widen = lambda x, pad: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
  q_BTKRH = widen(hide(q_BTNH, q_segments), q_pad).reshape(B, T + q_pad, K, N // K, H)
  k_BSKH, v_BSKH = (widen(hide(x, kv_segments), kv_pad) for x in (k_BSKH, v_BSKH))
  out_BKTRH = _tiled(
    q_BTKRH.swapaxes(1, 2),
    k_BSKH.swapaxes(1, 2),
    v_BSKH.swapaxes(1, 2),
    widen(q_segments, q_pad),
    widen(kv_segments, kv_pad),
    jnp.asarray(q_offset, jnp.int32),
    causal,
    tiles,
  )
  return out_BKTRH.swapaxes(1, 2).reshape(B, T + q_pad, N, H)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _tiled(q_BKTRH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal, tiles):
  """`blocked` on whole tiles, heads before tokens: each product reads contiguous memory."""
  return _tiled_forward(q_BKTRH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal, tiles)[
    0
  ]


def _tiled_forward(q_BKTRH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal, tiles):
  B, K, T, R, H = q_BKTRH.shape
  tile = _Tile(q_segments, kv_segments, q_offset, causal, tiles, H**-0.5)
  low, high = tile.spans()

  def row(_, i):
    q_BKTRH_i = tile.queries(q_BKTRH, i)

    def column(j, carry):
      top, total, out = carry
      logits, seen = tile.logits(q_BKTRH_i, tile.keys(k_BKSH, j), i, j)
      new_top = jnp.maximum(top, logits.max(axis=-1))
      weights = jnp.where(seen, jnp.exp(logits - new_top[..., None]), 0.0)
      fade = jnp.exp(top - new_top)
      v = tile.keys(v_BKSH, j)
      more = _product("BKTRS,BKSH->BKTRH", weights.astype(v.dtype), v)
      return new_top, total * fade + weights.sum(axis=-1), out * fade[..., None] + more

    flat = jnp.zeros((B, K, tiles[0], R), _sum_dtype(q_BKTRH))
    nothing = flat + _HIDDEN, flat, jnp.zeros((B, K, tiles[0], R, H), flat.dtype)
    top, total, out = jax.lax.fori_loop(low[i], high[i], column, nothing)
    total = jnp.where(total == 0.0, 1.0, total)
    return None, ((out / total[..., None]).astype(q_BKTRH.dtype), top + jnp.log(total))

  _, found = jax.lax.scan(row, None, jnp.arange(T // tiles[0], dtype=jnp.int32))
  out_BKTRH, sums_BKTR = (_untiled(x) for x in found)
  return out_BKTRH, (
    q_BKTRH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, out_BKTRH, sums_BKTR
  )  # fmt: skip


def _tiled_backward(causal, tiles, saved, grad_BKTRH):
  q_BKTRH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, out_BKTRH, sums_BKTR = saved
  H = q_BKTRH.shape[-1]
  # A constant offset comes back from JAX as one of numpy's.
  tile = _Tile(q_segments, kv_segments, jnp.asarray(q_offset), causal, tiles, H**-0.5)
  low, high = tile.spans()
  grad_BKTRH = jnp.where((q_segments != 0)[:, None, :, None, None], grad_BKTRH, 0)
  dtype = _sum_dtype(q_BKTRH)
  own_BKTR = (grad_BKTRH.astype(dtype) * out_BKTRH.astype(dtype)).sum(axis=-1)

  def row(carry, i):
    q, grad, sums, own = (tile.queries(x, i) for x in (q_BKTRH, grad_BKTRH, sums_BKTR, own_BKTR))

    def column(j, carry):
      dq, dk_BKSH, dv_BKSH = carry
      k, v = tile.keys(k_BKSH, j), tile.keys(v_BKSH, j)
      logits, seen = tile.logits(q, k, i, j)
      weights = jnp.where(seen, jnp.exp(logits - sums[..., None]), 0.0)
      dv = _product("BKTRS,BKTRH->BKSH", weights.astype(v.dtype), grad)
      dweights = _product("BKTRH,BKSH->BKTRS", grad, v)
      dlogits = (weights * (dweights - own[..., None]) * H**-0.5).astype(q.dtype)
      dk = _product("BKTRS,BKTRH->BKSH", dlogits, q)
      dq = dq + _product("BKTRS,BKSH->BKTRH", dlogits, k)
      return dq, tile.add(dk_BKSH, dk, j), tile.add(dv_BKSH, dv, j)

    start = jnp.zeros(q.shape, dtype), *carry
    dq, dk_BKSH, dv_BKSH = jax.lax.fori_loop(low[i], high[i], column, start)
    return (dk_BKSH, dv_BKSH), dq

  start = jnp.zeros(k_BKSH.shape, dtype), jnp.zeros(v_BKSH.shape, dtype)
  rows = jnp.arange(q_BKTRH.shape[2] // tiles[0], dtype=jnp.int32)
  (dk_BKSH, dv_BKSH), dq = jax.lax.scan(row, start, rows)
  same = lambda d, x: d.astype(x.dtype)
  return (
    same(_untiled(dq), q_BKTRH), same(dk_BKSH, k_BKSH), same(dv_BKSH, v_BKSH), None, None, None
  )  # fmt: skip


_tiled.defvjp(_tiled_forward, _tiled_backward)


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
    q, kv = (
      x.reshape(x.shape[0], -1, size)
      for x, size in zip((self.q_segments, self.kv_segments), self.tiles, strict=True)
    )
    least = lambda x: jnp.where(x == 0, _NO_SEGMENT, x).min(axis=-1)
    meet_BIJ = (least(q)[:, :, None] <= kv.max(axis=-1)[:, None, :]) & (
      least(kv)[:, None, :] <= q.max(axis=-1)[:, :, None]
    )
    meet_IJ = meet_BIJ.any(axis=0)
    if self.causal:
      last_I = (jnp.arange(q.shape[1], dtype=jnp.int32) + 1) * self.tiles[0] - 1 + self.q_offset
      first_J = jnp.arange(kv.shape[1], dtype=jnp.int32) * self.tiles[1]
      meet_IJ &= first_J[None, :] <= last_I[:, None]
    low = jnp.argmax(meet_IJ, axis=1).astype(jnp.int32)
    high = meet_IJ.shape[1] - jnp.argmax(meet_IJ[:, ::-1], axis=1).astype(jnp.int32)
    return low, jnp.where(meet_IJ.any(axis=1), high, low)

  def queries(self, x: Array, i: Int[Array, ""]) -> Array:
    """Tokens of x[B, K, T, ...] in row i of tiles."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.tiles[0], self.tiles[0], axis=2)

  def keys(self, x: Array, j: Int[Array, ""]) -> Array:
    """Tokens of x[B, K, S, ...] in column j of tiles."""
    return jax.lax.dynamic_slice_in_dim(x, j * self.tiles[1], self.tiles[1], axis=2)

  def add(self, x: Array, part: Array, j: Int[Array, ""]) -> Array:
    """x[B, K, S, H] with `part` added in column j of tiles."""
    part = self.keys(x, j) + part
    return jax.lax.dynamic_update_slice_in_dim(x, part, j * self.tiles[1], axis=2)

  def logits(
    self, q: Array, k: Array, i: Int[Array, ""], j: Int[Array, ""]
  ) -> tuple[Float[Array, "B K T R S"], Bool[Array, "B 1 T 1 S"]]:
    """The tile's scaled logits, and what of it is seen."""
    part = lambda x, at, size: jax.lax.dynamic_slice_in_dim(x, at * size, size, axis=1)
    offset = self.q_offset + i * self.tiles[0] - j * self.tiles[1]
    seen = visible(
      self.causal,
      part(self.q_segments, i, self.tiles[0]),
      part(self.kv_segments, j, self.tiles[1]),
      offset,
    )[:, None, :, None, :]
    logits = _product("BKTRH,BKSH->BKTRS", q, k)
    return jnp.where(seen, logits * self.scale, _HIDDEN), seen


def _even(tokens: int, tile: int) -> int:
  """The side, at most `tile`, of as many tiles as are needed with the least padding."""
  return -(-tokens // -(-tokens // tile))


def _sum_dtype(x: Array) -> DTypeLike:
  """What logits, their softmax and sums over tokens are computed in: float32 at least."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _product(axes: str, a: Array, b: Array) -> Array:
  return jnp.einsum(axes, a, b, preferred_element_type=_sum_dtype(a))


def _untiled(x: Array) -> Array:
  """[I, B, K, t, ...] -> [B, K, I t, ...]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _masked_softmax(logits: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
  """Softmax over what `mask` (same rank, axes of 1) shows; zeros where it hides everything."""
  logits = jnp.where(mask, logits, _HIDDEN)
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0.0, 1.0, total)
