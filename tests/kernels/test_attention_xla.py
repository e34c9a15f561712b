"""Attention in tiles of plain XLA: the reference, in memory that grows with the tokens."""

import jax
import jax.numpy as jnp
import pytest

from kernels.attention import tiled
from tests.kernels import qkv


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T, extra, tile", [(7, 0, 3), (5, 6, 4), (4, 2, 64)])
def test_tiles_are_the_reference(causal, T, extra, tile):
  qkv.tiles_are_the_reference("xla", causal=causal, T=T, extra=extra, tile=tile)


def test_memory_of_tiles_is_linear_in_tokens():
  """Temporaries of forward and backward at 4 times the tokens: 4 times as many bytes, not 16."""

  def temporary(T):
    q, k, v = qkv.inputs(B=1, T=T, S=T)
    at = {name: jnp.ones((1, T), jnp.int32) for name in ("q_segments", "kv_segments")}
    run = lambda *x: tiled(*x, causal=True, **at, backend="xla", tile=64).sum()
    compiled = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(q, k, v).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(4096) < 5 * temporary(1024)
