"""Attention of one new token a row over a key-value cache; rows may share their prompt's keys.

G samples of a prompt read its keys once: their queries are rows of one matrix product. What they
wrote themselves is read row by row, and both parts are joined under one softmax, see
https://arxiv.org/abs/2402.05099 (Hydragen).

Axes: B rows, S slots, N query heads, K key heads, R = N / K, H head width; G prompts of P tokens,
each of C = B / G rows that follow each other.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels import attention, attention_gpu
from kernels.tiles import HIDDEN, product

BACKENDS = ("reference", "xla", "gpu")

_BLOCKS = 264  # Of a kernel on a GPU: two for each of an H100's 132 multiprocessors.
_LN2 = math.log(2.0)


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
  *,
  backend: str = "xla",
) -> Float[Array, "B N H"]:
  """Row b sees the slots of `seen_BS` and all that its prompt, b // C, has.

  Logits are scaled by H^-0.5 and normalised in float32; a row that sees nothing returns zeros.

  Args:
    backend: "reference", the definition; "xla", anywhere; "gpu", where the kernel of `attention`
      for Hopper GPUs reads the prompts, without gradients. That has not been timed, so nothing
      prefers it.

  Raises ValueError if N is not a multiple of K, or B of the prompts, for an unknown backend, and
  for what "gpu" does not have.
  """
  B, N, _ = q_BNH.shape
  if N % k_BSKH.shape[2]:
    raise ValueError(f"{N} query heads must be a multiple of {k_BSKH.shape[2]}")
  if prompts is not None and B % len(prompts.keys):
    raise ValueError(f"{B} rows must be a multiple of {len(prompts.keys)} prompts")
  if backend not in BACKENDS:
    raise ValueError(f"decode_attention backend {backend!r} must be one of {BACKENDS}")
  if backend == "gpu":
    _check_gpu(prompts)
  if backend == "reference":
    return reference(q_BNH, k_BSKH, v_BSKH, seen_BS, prompts)
  part = _own(q_BNH, k_BSKH, v_BSKH, seen_BS)
  if prompts is not None:
    shared = _shared_on_gpu if backend == "gpu" else _shared
    part = _joined(part, shared(q_BNH, prompts))
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
  q_GKMH = _by_prompt(q_BNH, prompts)
  logits_GKMP = product("GKMH,GKPH->GKMP", q_GKMH, prompts.keys) * q_BNH.shape[-1] ** -0.5
  top, total, weights_GKMP = _weights(logits_GKMP, prompts.seen[:, None, None])
  out = product("GKMP,GKPH->GKMH", weights_GKMP.astype(prompts.values.dtype), prompts.values)
  return _Part(*(_by_row(x, q_BNH) for x in (top, total, out)))


def _shared_on_gpu(q_BNH, prompts: Prompts) -> _Part:
  """The same rows, each once for every piece of its prompt, so that many blocks read at once.

  To the kernel, pieces are segments: it copies no keys of others.
  """
  G, K, P, _ = prompts.keys.shape
  q_GKMH = _by_prompt(q_BNH, prompts)
  M, tile = q_GKMH.shape[2], attention_gpu.TILE
  tiles = P // tile
  pieces = min(-(-_BLOCKS // (G * K)), tiles)
  q_GKMH = jnp.pad(q_GKMH, ((0, 0), (0, 0), (0, -M % tile), (0, 0)))
  q_at = jnp.arange(pieces * q_GKMH.shape[2], dtype=jnp.int32) // q_GKMH.shape[2] + 1
  kv_at = jnp.arange(P, dtype=jnp.int32) // tile * pieces // tiles + 1
  out, logs = attention_gpu.part(
    jnp.tile(q_GKMH, (1, 1, pieces, 1)),
    prompts.keys,
    prompts.values,
    jnp.broadcast_to(q_at, (G, len(q_at))),
    jnp.where(prompts.seen, kv_at[None], 0),
  )
  by_piece = lambda x: x.reshape(G, K, pieces, -1, *x.shape[3:])[:, :, :, :M]
  out, logs = by_piece(out.astype(jnp.float32)), by_piece(logs)
  top = logs.max(axis=2)
  weights = jnp.exp2(logs - top[:, :, None])
  joined = top * _LN2, weights.sum(axis=2), (out * weights[..., None]).sum(axis=2)
  return _Part(*(_by_row(x, q_BNH) for x in joined))


def _by_prompt(q_BNH, prompts: Prompts):
  """[G, K, C R, H]: the queries that read the same keys."""
  G, K, _, H = prompts.keys.shape
  B, N, _ = q_BNH.shape
  return q_BNH.reshape(G, B // G, K, N // K, H).swapaxes(1, 2).reshape(G, K, -1, H)


def _by_row(x, q_BNH):
  """[B, N, ...] of [G, K, C R, ...]."""
  B, N, _ = q_BNH.shape
  G, K = x.shape[:2]
  x = x.reshape(G, K, B // G, N // K, *x.shape[3:])
  return x.swapaxes(1, 2).reshape(B, N, *x.shape[4:])


def _check_gpu(prompts: Prompts | None) -> None:
  told = 'decode_attention backend "gpu" reads prompts'
  if prompts is None:
    raise ValueError(f'{told}, and there are none: choose "xla"')
  _, _, P, H = prompts.keys.shape
  dtype, tile = prompts.keys.dtype, attention_gpu.TILE
  if P % tile or not attention_gpu.serves(dtype, H):
    raise ValueError(
      f"{told} of a multiple of {tile} tokens in bfloat16 or float16 on heads at most"
      f' {attention_gpu.WIDEST} wide, not {P} in {dtype} on {H}: choose "xla"'
    )


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
