"""The kernels for TPUs: their program on a host. `test_aot.py` compiles them for the chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import attention_tpu
from kernels.attention import tiled
from tests.kernels import qkv


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T, extra, tile", [(7, 0, 128), (130, 9, 128)])
def test_tiles_are_the_reference(causal, T, extra, tile):
  qkv.tiles_are_the_reference("tpu", causal=causal, T=T, extra=extra, tile=tile)


def on_two_cores(run, *, N, T, S):
  """`run(attention, q, k, v)` by an interpreter of the chip: blocks in flight, parallel axes of the
  grid in any order and on two cores, memory that nobody has written NaN. It prints of races."""
  at = lambda n: jnp.asarray(np.where(np.arange(n) < 100, 1, 2)[None], jnp.int32)
  kwargs = {"causal": False, "q_segments": at(T), "kv_segments": at(S)}
  by_tiles = lambda *x: tiled(*x, **kwargs, backend="tpu", tile=128)
  params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  with pltpu.force_tpu_interpret_mode(params):
    program = jax.jit(lambda *x: run(by_tiles, *x))
    return jax.block_until_ready(program(*qkv.inputs(B=1, T=T, S=S, N=N, K=1)))


def test_no_two_cores_meet_in_memory(capsys):
  gradients = lambda f, *x: jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2))(*x)
  for gradient in on_two_cores(gradients, N=2, T=130, S=130):
    assert np.isfinite(gradient).all()
  assert "RACE DETECTED" not in capsys.readouterr().out


def test_an_axis_that_is_summed_over_is_not_parallel(monkeypatch, capsys):
  """Were it said to be, each core would write its half of the keys' sum to the same place."""
  all_parallel = lambda axes: pltpu.CompilerParams(dimension_semantics=("parallel",) * axes)
  monkeypatch.setattr(attention_tpu, "_last_in_order", all_parallel)
  on_two_cores(lambda f, *x: f(*x), N=1, T=100, S=200)
  assert "RACE DETECTED" in capsys.readouterr().out
