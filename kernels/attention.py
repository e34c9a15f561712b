"""Segment-masked attention with grouped query heads: the one description every backend lowers from.

Axes: B rows, T query tokens, S key tokens, N query heads, K key heads, R = N / K, H head width.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels import attention_gpu, attention_tpu, attention_xla
from kernels.tiles import HIDDEN, even, product, visible

BACKENDS = ("reference", "xla", "tpu", "gpu")

# Tokens: the side of a tile of "xla", up to `_SHORT` tokens and beyond. Measured on a CPU.
_TILE, _SHORT, _LONG_TILE = 64, 1024, 256


def attention(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  *,
  causal: bool,
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
  backend: str | None = None,
) -> Float[Array, "B T N H"]:
  """Query t sees key s iff their segments are equal and not 0 and, if causal, s <= q_offset + t.

  Logits are scaled by H^-0.5 and normalised in float32. A query that sees nothing returns zeros.
  Query head n reads key head n // R.

  Args:
    backend: "reference", the definition; "xla", the same in tiles, anywhere; "tpu" and "gpu",
      Pallas kernels for TPUs and for Hopper GPUs. None is `preferred_backend`.

  Raises ValueError if N is not a multiple of K, for an unknown backend, and for a dtype or a width
  that the backend does not have.
  """
  if q_BTNH.shape[2] % k_BSKH.shape[2]:
    raise ValueError(f"{q_BTNH.shape[2]} query heads must be a multiple of {k_BSKH.shape[2]}")
  H = q_BTNH.shape[3]
  backend = backend or preferred_backend(q_BTNH.dtype, H)
  if backend not in BACKENDS:
    raise ValueError(f"attention backend {backend!r} must be one of {BACKENDS}")
  if backend == "gpu" and not attention_gpu.serves(q_BTNH.dtype, H):
    raise ValueError(
      f'attention backend "gpu" computes in bfloat16 or float16 on heads at most'
      f' {attention_gpu.WIDEST} wide, not in {q_BTNH.dtype} on {H}: cast, or choose "xla"'
    )
  if backend == "reference":
    mask_BTS = visible(causal, q_segments, kv_segments, q_offset)
    return reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
  _say_once(backend, q_BTNH.shape, k_BSKH.shape, str(q_BTNH.dtype))
  return tiled(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    causal=causal,
    q_segments=q_segments,
    kv_segments=kv_segments,
    q_offset=q_offset,
    backend=backend,
  )


def preferred_backend(dtype: DTypeLike, head_width: int, device: jax.Device | None = None) -> str:
  """ "tpu" on a TPU, "gpu" for 16-bit numbers on a Hopper GPU, "xla" elsewhere.

  Args:
    device: None for JAX's first; it may be one that is described only, to compile for.
  """
  device = device or jax.devices()[0]
  if device.platform == "tpu":
    return "tpu"
  # wgmma, which the kernel is made of, exists on compute capability 9 alone.
  hopper = device.platform == "gpu" and device.compute_capability.startswith("9.")
  return "gpu" if hopper and attention_gpu.serves(dtype, head_width) else "xla"


@functools.cache
def _say_once(backend: str, queries: tuple, keys: tuple, dtype: str) -> None:
  logging.getLogger(__name__).info("attention %s over %s, %s: %s", queries, keys, dtype, backend)


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
  logits_BKRTS = product("BTKRH,BSKH->BKRTS", q_BTKRH, k_BSKH)
  probs_BKRTS = _masked_softmax(logits_BKRTS * H**-0.5, mask_BTS[:, None, None])
  out_BTKRH = jnp.einsum("BKRTS,BSKH->BTKRH", probs_BKRTS.astype(v_BSKH.dtype), v_BSKH)
  return out_BTKRH.reshape(B, T, N, H)


def tiled(
  q_BTNH: Float[Array, "B T N H"],
  k_BSKH: Float[Array, "B S K H"],
  v_BSKH: Float[Array, "B S K H"],
  *,
  causal: bool,
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
  backend: str,
  tile: int | None = None,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """`attention` by a tiled backend: no [T, S] matrix exists, in the backward pass neither.

  Args:
    tile: Tokens, the side of a tile at most; None for the backend's own choice, the only one of
      "gpu".
    interpret: Runs the program of "tpu" on the host, in place of compiling it.
  """
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  tiles = _sides(T, S, backend, tile)
  pads = -T % tiles[0], -S % tiles[1]
  q_BNTH = _heads_first(q_BTNH, q_segments, pads[0])
  k_BKSH, v_BKSH = (_heads_first(x, kv_segments, pads[1]) for x in (k_BSKH, v_BSKH))
  numbers = (
    jnp.pad(at, ((0, 0), (0, pad))) for at, pad in zip((q_segments, kv_segments), pads, strict=True)
  )
  arguments = q_BNTH, k_BKSH, v_BKSH, *numbers, jnp.asarray(q_offset, jnp.int32), causal
  if backend == "tpu":
    out_BNTH = attention_tpu.attend(*arguments, tiles, interpret)
  elif backend == "gpu":
    out_BNTH = attention_gpu.attend(*arguments)
  else:
    out_BNTH = attention_xla.attend(*arguments, tiles)
  return out_BNTH.swapaxes(1, 2)[:, :T]


def _sides(T: int, S: int, backend: str, tile: int | None) -> tuple[int, int]:
  """Of the tiles: even ones in XLA, whole lanes on a TPU, as the kernel has them on a GPU."""
  if backend == "gpu":
    return attention_gpu.TILE, attention_gpu.TILE
  if backend == "tpu":
    lanes = lambda n: -(-min(n, tile or attention_tpu.TILE) // attention_tpu.LANES)
    return lanes(T) * attention_tpu.LANES, lanes(S) * attention_tpu.LANES
  most = tile or (_TILE if max(T, S) <= _SHORT else _LONG_TILE)
  return even(T, most), even(S, most)


def _heads_first(
  x: Float[Array, "B T N H"], segments: Int[Array, "B T"], pad: int
) -> Float[Array, "B N P H"]:
  """Zeros for whatever padding holds, NaN too, and `pad` tokens of it more."""
  x = jnp.where((segments != 0)[:, :, None, None], x, 0)
  return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)


def _masked_softmax(logits: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
  """Softmax over what `mask` (same rank, axes of 1) shows; zeros where it hides everything."""
  logits = jnp.where(mask, logits, HIDDEN)
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0.0, 1.0, total)
