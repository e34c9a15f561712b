"""Segment-masked attention with grouped query heads: the one description every backend lowers from.

Axes: B rows, T query tokens, S key tokens, N query heads, K key heads, R = N / K, H head width.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Backend: TypeAlias = Literal["reference"]


def attention(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  *,
  causal: bool,
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
  backend: Backend = "reference",
) -> Float[Array, "B T N H"]:
  """Query t sees key s iff their segments are equal and not 0 and, if causal, s <= q_offset + t.

  Logits are scaled by H^-0.5 and normalised in float32. A query that sees nothing returns zeros.
  Query head n reads key head n // R. Raises ValueError if N is not a multiple of K.
  """
  if q_BTNH.shape[2] % k_BSKH.shape[2]:
    raise ValueError(f"{q_BTNH.shape[2]} query heads must be a multiple of {k_BSKH.shape[2]}")
  if backend != "reference":
    raise ValueError(f"attention backend {backend!r} must be one of ('reference',)")
  mask_BTS = visible(causal, q_segments, kv_segments, q_offset)
  if q_BTNH.shape[1] == 1:
    return single_query(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
  return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


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
  logits_BKRTS = jnp.einsum(
    "BTKRH,BSKH->BKRTS", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32
  )
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
  logits_BNS = jnp.einsum("BNX,BSX->BNS", q_BNX, k_BSX, preferred_element_type=jnp.float32)
  probs_BNS = _masked_softmax(logits_BNS * H**-0.5, mask_BTS)
  out_BNX = jnp.einsum("BNS,BSX->BNX", probs_BNS.astype(v_BSX.dtype), v_BSX)
  out_BKRKH = out_BNX.reshape(B, K, R, K, H)
  out_BKRH = jnp.stack([out_BKRKH[:, k, :, k] for k in range(K)], axis=1)
  return out_BKRH.reshape(B, 1, K * R, H)


def _masked_softmax(logits: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
  """Softmax over what `mask` (same rank, axes of 1) shows; zeros where it hides everything."""
  logits = jnp.where(mask, logits, -1e30)
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0.0, 1.0, total)
