"""Attention of one new token a row over a key-value cache; rows may share their prompt's keys.

G samples of a prompt read its keys once: their queries are rows of one matrix product. What they
wrote themselves is read row by row, and both parts are joined under one softmax, see
https://arxiv.org/abs/2402.05099 (Hydragen).

Axes: B rows, S slots, N query heads, K key heads, R = N / K, H head width; G prompts of P tokens,
each of C = B / G rows that follow each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import attention
from kernels.tiles import HIDDEN, product


class Prompts(NamedTuple):
  """Keys and values of prompts, head-major as products read them, and which tokens are there."""

  keys: Float[Array, "G K P H"]
  values: Float[Array, "G K P H"]
  seen: Bool[Array, "G P"]


class _Part(NamedTuple):
  """A softmax over some of the keys that is not divided by its sum yet."""

  top: Float[Array, "B N"]
  total: Float[Array, "B N"]
  out: Float[Array, "B N H"]


def decode_attention(
  q_BNH: Float[Array, "B N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  seen_BS: Bool[Array, "B S"],
  prompts: Prompts | None = None,
) -> Float[Array, "B N H"]:
  """Row b sees the slots of `seen_BS` and all that its prompt, b // C, has.

  Logits are scaled by H^-0.5 and normalised in float32; a row that sees nothing returns zeros.
  Raises ValueError if N is not a multiple of K, or B of the prompts.
  """
  B, N, _ = q_BNH.shape
  if N % k_BSKH.shape[2]:
    raise ValueError(f"{N} query heads must be a multiple of {k_BSKH.shape[2]}")
  part = _own(q_BNH, k_BSKH, v_BSKH, seen_BS)
  if prompts is not None:
    if B % len(prompts.keys):
      raise ValueError(f"{B} rows must be a multiple of {len(prompts.keys)} prompts")
    part = _joined(part, _shared(q_BNH, prompts))
  total_BN = jnp.where(part.total == 0.0, 1.0, part.total)
  return (part.out / total_BN[..., None]).astype(q_BNH.dtype)


def reference(
  q_BNH: Float[Array, "B N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  seen_BS: Bool[Array, "B S"],
  prompts: Prompts | None = None,
) -> Float[Array, "B N H"]:
  """The definition: `attention`'s, with each row's prompt in front of what it wrote itself."""
  if prompts is not None:
    B = len(q_BNH)
    whole = lambda x: jnp.repeat(x, B // len(x), axis=0)
    before = lambda x: whole(x).swapaxes(1, 2)
    k_BSKH = jnp.concatenate([before(prompts.keys), k_BSKH], axis=1)
    v_BSKH = jnp.concatenate([before(prompts.values), v_BSKH], axis=1)
    seen_BS = jnp.concatenate([whole(prompts.seen), seen_BS], axis=1)
  return attention.reference(q_BNH[:, None], k_BSKH, v_BSKH, seen_BS[:, None])[:, 0]


def _own(q_BNH, k_BSKH, v_BSKH, seen_BS) -> _Part:
  """Over the cache, reading keys and values where they lie.

  A head-major product would first transpose the whole cache (6 times slower on a CPU). Here each
  query head is a row of width K H, zero outside its own key head, against the flat [S, K H] cache;
  the K-fold arithmetic is free where reading the cache is what takes the time.
  """
  B, S, K, H = k_BSKH.shape
  R = q_BNH.shape[1] // K
  own_K1K1 = jnp.eye(K, dtype=q_BNH.dtype)[:, None, :, None]
  q_BNX = (q_BNH.reshape(B, K, R, 1, H) * own_K1K1[None]).reshape(B, K * R, K * H)
  k_BSX, v_BSX = k_BSKH.reshape(B, S, K * H), v_BSKH.reshape(B, S, K * H)
  logits_BNS = product("BNX,BSX->BNS", q_BNX, k_BSX) * H**-0.5
  top_BN, total_BN, weights_BNS = _weights(logits_BNS, seen_BS[:, None])
  out_BNX = product("BNS,BSX->BNX", weights_BNS.astype(v_BSX.dtype), v_BSX)
  out_BKRKH = out_BNX.reshape(B, K, R, K, H)
  out_BKRH = jnp.stack([out_BKRKH[:, k, :, k] for k in range(K)], axis=1)
  return _Part(top_BN, total_BN, out_BKRH.reshape(B, K * R, H))


def _shared(q_BNH, prompts: Prompts) -> _Part:
  """Over the prompts: the C R queries of a prompt and key head are rows of one product."""
  G, K, _, H = prompts.keys.shape
  B, N, _ = q_BNH.shape
  C, R = B // G, N // K
  q_GKMH = q_BNH.reshape(G, C, K, R, H).swapaxes(1, 2).reshape(G, K, C * R, H)
  logits_GKMP = product("GKMH,GKPH->GKMP", q_GKMH, prompts.keys) * H**-0.5
  top, total, weights_GKMP = _weights(logits_GKMP, prompts.seen[:, None, None])
  out = product("GKMP,GKPH->GKMH", weights_GKMP.astype(prompts.values.dtype), prompts.values)
  by_row = lambda x: x.reshape(G, K, C, R, *x.shape[3:]).swapaxes(1, 2).reshape(B, N, *x.shape[3:])
  return _Part(by_row(top), by_row(total), by_row(out))


def _weights(logits, seen):
  """(largest logit, sum of the weights, weights) of what is seen; 0 where nothing is."""
  logits = jnp.where(seen, logits, HIDDEN)
  top = jax.lax.stop_gradient(logits.max(axis=-1))
  weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
  return top, weights.sum(axis=-1), weights


def _joined(a: _Part, b: _Part) -> _Part:
  top = jnp.maximum(a.top, b.top)
  of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
  out = a.out * of_a[..., None] + b.out * of_b[..., None]
  return _Part(top, a.total * of_a + b.total * of_b, out)
