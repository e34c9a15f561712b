"""What the forms of attention share: who sees whom, in which tiles, and how sums are kept.

Axes: B rows, T query tokens, S key tokens, I tiles of queries, J tiles of keys.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Int

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
) -> Bool[Array, "I J"]:
  """Whether a query of tile i may see a key of tile j, in any row.

  Ranges of segment numbers stand for the segments in a tile. Where numbers rise along a row, as for
  the windows of an image and for packed conversations, that is exact.
  """
  q, kv = (
    x.reshape(x.shape[0], -1, size)
    for x, size in zip((q_segments, kv_segments), tiles, strict=True)
  )
  least = lambda x: jnp.where(x == 0, _NO_SEGMENT, x).min(axis=-1)
  meet_BIJ = (least(q)[:, :, None] <= kv.max(axis=-1)[:, None, :]) & (
    least(kv)[:, None, :] <= q.max(axis=-1)[:, :, None]
  )
  meet_IJ = meet_BIJ.any(axis=0)
  if not causal:
    return meet_IJ
  last_I = (jnp.arange(q.shape[1], dtype=jnp.int32) + 1) * tiles[0] - 1 + q_offset
  first_J = jnp.arange(kv.shape[1], dtype=jnp.int32) * tiles[1]
  return meet_IJ & (first_J[None, :] <= last_I[:, None])


def span(meet_IJ: Bool[Array, "I J"]) -> tuple[Int[Array, " I"], Int[Array, " I"]]:
  """Of each row of tiles the first that holds anything, and one past the last; equal if none."""
  low = jnp.argmax(meet_IJ, axis=1).astype(jnp.int32)
  high = meet_IJ.shape[1] - jnp.argmax(meet_IJ[:, ::-1], axis=1).astype(jnp.int32)
  return low, jnp.where(meet_IJ.any(axis=1), high, low)


def even(tokens: int, most: int) -> int:
  """The side, at most `most`, of as few tiles as that allows with the least padding."""
  return -(-tokens // -(-tokens // most))


def sum_dtype(x: Array) -> DTypeLike:
  """What logits, their softmax and sums over tokens are computed in: float32 at least."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def product(axes: str, a: Array, b: Array) -> Array:
  """An einsum in `sum_dtype`."""
  return jnp.einsum(axes, a, b, preferred_element_type=sum_dtype(a))
