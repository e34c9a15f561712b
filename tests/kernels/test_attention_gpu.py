"""The kernels for Hopper GPUs: their program on a host, and on the chip where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kernels import attention_gpu, specs
from kernels.attention import attention, reference
from kernels.tiles import visible

# B, N, K, T, S, H, causal, the lengths of the segments of keys.
HOST = {
  "packed, two heads a key head, of a width to pad": (1, 2, 1, 128, 128, 80, True, (50, 60)),
  "after an offset": (1, 1, 1, 128, 256, 64, True, (200,)),
}


@pytest.mark.parametrize("case", HOST)
def test_the_program_is_the_reference(products_too, case):
  B, N, K, T, S, H, causal, lengths = HOST[case]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)
  numbers = np.repeat(np.arange(len(lengths) + 1), [*lengths, S - sum(lengths)])
  kv_at = np.where(numbers == len(lengths), 0, numbers + 1)[None].astype(np.int32)
  q_at, offset = kv_at[:, S - T :], np.int32(S - T)
  kept = lambda x, at: np.where((at != 0)[:, None, :, None], x, np.float16(0))
  q, k, v = (
    kept(draw(B, N, T, H), q_at),
    kept(draw(B, K, S, H), kv_at),
    kept(draw(B, K, S, H), kv_at),
  )
  grad = draw(B, N, T, H)

  turned = lambda *x: tuple(y.astype(jnp.float32).swapaxes(1, 2) for y in x)

  @jax.jit
  def both(q, k, v, grad, q_at, kv_at, offset):
    out, back = jax.vjp(lambda *x: attention_gpu.attend(*x, q_at, kv_at, offset, causal), q, k, v)
    mask = visible(causal, q_at, kv_at, offset)
    expected, back_too = jax.vjp(lambda *x: reference(*x, mask), *turned(q, k, v))
    return turned(out, *back(grad)), (expected, *back_too(*turned(grad)))

  for mine, other in zip(*both(q, k, v, grad, q_at, kv_at, offset), strict=True):
    # Float16 has 11 bits; sums of up to 200 products of order 1, each rounded.
    assert_allclose(mine, other, atol=4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n, s in specs.ATTENTION.items() if s.dtype == jnp.bfloat16])
def test_the_chip_agrees_with_the_reference(name):
  """At the named shapes, shortened to 2,048 tokens so that the quadratic form fits."""
  spec = specs.ATTENTION[name]
  short = dataclasses.replace(spec, T=2048, segment=min(spec.segment, 512))
  q, k, v, q_at, kv_at = short.inputs(np.random.default_rng(0))
  mask = visible(spec.causal, q_at, kv_at)
  shown = (q_at != 0)[:, :, None, None]

  def run(function):
    loss = lambda *x: (jnp.where(shown, function(*x), 0).astype(jnp.float32) ** 2).sum()
    out = jax.jit(function)(q, k, v)
    return jnp.where(shown, out, 0), *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

  at = {"q_segments": q_at, "kv_segments": kv_at}
  ours = run(lambda *x: attention(*x, causal=spec.causal, **at, backend="gpu"))
  wide = lambda *x: (y.astype(jnp.float32) for y in x)
  theirs = run(lambda *x: reference(*wide(*x), mask))
  for mine, other in zip(ours, theirs, strict=True):
    mine, other = wide(mine, other)
    # bfloat16 has 8 bits: each output and each weight of its sum is rounded by up to 2^-9.
    assert jnp.linalg.norm(mine - other) < 1e-2 * jnp.linalg.norm(other)
