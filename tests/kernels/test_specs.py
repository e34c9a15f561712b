"""Shapes, inputs and counts of the named specs."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import specs

SMALL = [
  specs.ATTENTION["tiny"],
  specs.ATTENTION["tiny_windows"],
  specs.TOKEN_LOGPS["tiny"],
  specs.DECODE_ATTENTION["tiny"],
]


@pytest.mark.parametrize("spec", SMALL)
def test_inputs_have_the_shapes(spec):
  inputs = spec.inputs(np.random.default_rng(0))
  described = [(x.shape, x.dtype) for x in inputs]
  assert described == [(x.shape, x.dtype) for x in spec.shapes()]


def test_counts_by_hand():
  spec = specs.Attention(B=2, T=8, N=4, K=2, H=16, causal=False)
  # q k^T and weights v: 2 * 8 * 8 * 16 operations each, for 4 heads of 2 rows.
  assert spec.operations() == 2 * 4 * 2 * (2 * 8 * 8 * 16)
  # Two of 4 heads (q, out) and two of 2 (k, v), 2 bytes a number.
  assert spec.traffic() == 2 * 8 * 16 * (4 + 4 + 2 + 2) * 2
  causal = specs.Attention(B=2, T=8, N=4, K=2, H=16, causal=True, segment=4)
  # A quarter: half the keys of half the row each.
  assert causal.operations() == spec.operations() / 4
  logps = specs.TokenLogps(C=3, D=5, V=7, dtype=jnp.float32)
  assert (logps.operations(), logps.traffic()) == (2 * 3 * 5 * 7, 4 * (3 + 7) * 5)
  decode = specs.DecodeAttention(B=6, S=5, N=4, K=2, H=8, G=3, P=7)
  # Each of 4 heads of 6 rows reads 5 + 7 keys and values; 6 caches and 3 prompts of 2 heads each.
  assert decode.operations() == 2 * 6 * 4 * (2 * 8 * (5 + 7))
  assert decode.traffic() == 2 * 2 * 2 * 8 * (6 * 5 + 3 * 7)


def test_segments_and_padding():
  spec = specs.Attention(B=1, T=16, N=1, K=1, H=8, causal=False, segment=4)
  *_, at, _ = spec.inputs(np.random.default_rng(0))
  assert at[0].tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2 + [0] * 2
