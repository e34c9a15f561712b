"""Kernels for GPUs as a host runs them."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import (
  InterpretGPUParams,
  force_gpu_interpret_mode,
)

from kernels import attention_gpu, hopper


@pytest.fixture
def on_the_host(monkeypatch, capsys):
  """Interprets kernels: grid, copies, barriers and masks as written, on numbers of the host.

  JAX's interpreter has no layouts of registers and only some of wgmma, so these stand aside: a
  product is one of the host, in float32 as on the chip. Memory that nobody has written is NaN, and
  two warpgroups that meet in it without a barrier between them are an error.
  """

  def summed(steps, shape, operands, done):
    def one(step, total):
      a, b = (x[...] for x in operands(step))
      axes = ((1,), (1,)), ((), ())
      more = jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
      done(step)
      return total + more

    return jax.lax.fori_loop(0, steps, one, jnp.zeros(shape, jnp.float32))

  plgpu = hopper.plgpu
  monkeypatch.setattr(hopper, "summed", summed)
  monkeypatch.setattr(hopper, "load", lambda source, layout: source[...])
  monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
  iota = lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis)
  monkeypatch.setattr(plgpu, "broadcasted_iota", iota)
  with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
    yield
  assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.fixture
def products_too(on_the_host, monkeypatch):
  """Those with an operand in registers are the host's as well."""

  def product(a, b, acc=None, *, transposed=False):
    read = lambda x: x if isinstance(x, jax.Array) and "Ref" not in str(x.aval) else x[...]
    axes = ((1,), (1 if transposed else 0,)), ((), ())
    made = jax.lax.dot_general(read(a), read(b), axes, preferred_element_type=jnp.float32)
    return made if acc is None else acc + made

  monkeypatch.setattr(attention_gpu, "_product", product)
