"""What the forms of attention share: who sees whom, in which tiles, and how sums are kept.

Axes: B rows, T query tokens, S key tokens, I tiles of queries, J tiles of keys.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

HIDDEN = -1e30  # A logit that is not seen; finite, so that a difference of two is no NaN.
_NO_SEGMENT = 2**31 - 1


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


def meeting(
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""],
  *,
  causal: bool,
  tiles: tuple[int, int],
) -> Bool[Array, "B I J"]:
  """Whether a query of tile i may see a key of tile j, in each row.

  Ranges of segment numbers stand for the segments in a tile. Where numbers rise along a row, as for
  the windows of an image and for packed conversations, that is exact.
  """
  q, kv = _in_tiles(q_segments, kv_segments, tiles)
  least = lambda x: jnp.where(x == 0, _NO_SEGMENT, x).min(axis=-1)
  meet_BIJ = (least(q)[:, :, None] <= kv.max(axis=-1)[:, None, :]) & (
    least(kv)[:, None, :] <= q.max(axis=-1)[:, :, None]
  )
  if not causal:
    return meet_BIJ
  last_I = (jnp.arange(q.shape[1], dtype=jnp.int32) + 1) * tiles[0] - 1 + q_offset
  first_J = jnp.arange(kv.shape[1], dtype=jnp.int32) * tiles[1]
  return meet_BIJ & (first_J[None, :] <= last_I[:, None])[None]


def whole(
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""],
  *,
  causal: bool,
  tiles: tuple[int, int],
) -> Bool[Array, "B I J"]:
  """Whether every query of tile i sees every key of tile j, in each row: nothing to mask."""
  q, kv = _in_tiles(q_segments, kv_segments, tiles)
  alone = lambda x: (x == x[..., :1]).all(axis=-1) & (x[..., 0] != 0)
  same_BIJ = q[:, :, None, 0] == kv[:, None, :, 0]
  whole_BIJ = same_BIJ & alone(q)[:, :, None] & alone(kv)[:, None, :]
  if not causal:
    return whole_BIJ
  first_I = jnp.arange(q.shape[1], dtype=jnp.int32) * tiles[0] + q_offset
  last_J = (jnp.arange(kv.shape[1], dtype=jnp.int32) + 1) * tiles[1] - 1
  return whole_BIJ & (last_J[None, :] <= first_I[:, None])[None]


def _in_tiles(
  q_segments: Int[Array, "B T"], kv_segments: Int[Array, "B S"], tiles: tuple[int, int]
) -> tuple[Int[Array, "B I _"], Int[Array, "B J _"]]:
  return tuple(
    x.reshape(x.shape[0], -1, size)
    for x, size in zip((q_segments, kv_segments), tiles, strict=True)
  )


def span(meet: Bool[Array, "*rows J"]) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
  """Of each row of tiles the first that holds anything, and one past the last; equal if none."""
  low = jnp.argmax(meet, axis=-1).astype(jnp.int32)
  high = meet.shape[-1] - jnp.argmax(meet[..., ::-1], axis=-1).astype(jnp.int32)
  return low, jnp.where(meet.any(axis=-1), high, low)


def bounds(
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""],
  *,
  causal: bool,
  tiles: tuple[int, int],
  columns: bool = False,
) -> Int[Array, "B I 4"]:
  """Of each row of tiles (of each column, if `columns`): where tiles are seen, and seen whole.

  [low, whole_low, whole_high, high], rising: tiles from whole_low to whole_high are seen whole;
  around them, from low to high, tiles may be seen in part.
  """
  at = q_segments, kv_segments, q_offset
  meet, all_of = (f(*at, causal=causal, tiles=tiles) for f in (meeting, whole))
  if columns:
    meet, all_of = meet.swapaxes(1, 2), all_of.swapaxes(1, 2)
  low, high = span(meet)
  whole_low = jnp.where(all_of.any(axis=-1), jnp.argmax(all_of, axis=-1).astype(jnp.int32), high)
  after = jnp.arange(meet.shape[-1], dtype=jnp.int32)[None, None] >= whole_low[..., None]
  broken = after & ~all_of
  end = jnp.argmax(broken, axis=-1).astype(jnp.int32)
  whole_high = jnp.where(broken.any(axis=-1), end, meet.shape[-1])
  return jnp.stack([low, whole_low, jnp.clip(whole_high, whole_low, high), high], axis=-1)


def even(tokens: int, most: int) -> int:
  """The side, at most `most`, of as few tiles as that allows with the least padding."""
  return -(-tokens // -(-tokens // most))


def incoming(
  grad_BNTH: Float[Array, "B N T H"],
  out_BNTH: Float[Array, "B N T H"],
  q_segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
  """What backward passes begin with: the output's gradient, zero at padding, and its product with
  the output, which the softmax takes out of the gradient of each of a query's logits."""
  grad_BNTH = jnp.where((q_segments != 0)[:, None, :, None], grad_BNTH, 0)
  dtype = sum_dtype(out_BNTH)
  return grad_BNTH, (grad_BNTH.astype(dtype) * out_BNTH.astype(dtype)).sum(axis=-1)


def sum_dtype(x: Array) -> DTypeLike:
  """What logits, their softmax and sums over tokens are computed in: float32 at least."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def product(axes: str, a: Array, b: Array) -> Array:
  """An einsum in `sum_dtype`."""
  return jnp.einsum(axes, a, b, preferred_element_type=sum_dtype(a))
