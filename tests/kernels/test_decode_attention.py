"""Attention of single tokens: against loops in float64, with prompts and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from kernels import decode_attention as kernel
from kernels.decode_attention import Prompts

# One program a shape in the place of one an operation.
decode_attention = jax.jit(kernel.decode_attention, static_argnames="backend")
reference = jax.jit(kernel.reference)


def inputs(B=6, S=5, N=4, K=2, H=8, G=0, P=3, dtype=jnp.float32):
  """A cache of B rows; with G, as many prompts."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
  seen = lambda *shape: rng.random(shape) < 0.7
  own = draw(B, N, H), draw(B, S, K, H), draw(B, S, K, H), seen(B, S)
  prompts = Prompts(draw(G, K, P, H), draw(G, K, P, H), seen(G, P)) if G else None
  return (*own, prompts)


def by_loops(q, k, v, seen, prompts):
  """The contract read aloud, in float64."""
  wide = lambda x: np.asarray(x, np.float64)
  B, N, H = q.shape
  out = np.zeros((B, N, H))
  for b in range(B):
    for n in range(N):
      head = n // (N // k.shape[2])
      keys, values = wide(k)[b, seen[b], head], wide(v)[b, seen[b], head]
      if prompts is not None:
        g = b // (B // len(prompts.keys))
        shown = prompts.seen[g]
        keys = np.concatenate([wide(prompts.keys)[g, head, shown], keys])
        values = np.concatenate([wide(prompts.values)[g, head, shown], values])
      if len(keys):
        logits = keys @ wide(q)[b, n] / np.sqrt(H)
        weights = np.exp(logits - logits.max())
        out[b, n] = weights @ values / weights.sum()
  return out


@pytest.mark.parametrize("function", [decode_attention, reference])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("G", [0, 1, 2, 3, 6])
def test_equals_loops(function, K, G):
  """Six rows of as many prompts, of two, of one each, and of none; some of it hidden."""
  given = inputs(K=K, G=G)
  # Float32 sums of at most 8 products of order 1.
  assert_allclose(function(*given), by_loops(*given), atol=2e-6)


@pytest.mark.parametrize("G", [0, 2])
def test_what_sees_nothing_is_zero(G):
  q, k, v, seen, prompts = inputs(G=G)
  hidden = None if prompts is None else prompts._replace(seen=np.zeros_like(prompts.seen))
  assert_array_equal(decode_attention(q, k, v, np.zeros_like(seen), hidden), np.zeros(q.shape))


def test_either_part_alone():
  """A row that has written nothing sees its prompt; one whose prompt is hidden what it wrote."""
  q, k, v, seen, prompts = inputs(G=2)
  for own, shown in ((seen, prompts.seen & False), (seen & False, prompts.seen)):
    given = q, k, v, own, prompts._replace(seen=shown)
    assert_allclose(decode_attention(*given), by_loops(*given), atol=2e-6)


def test_large_logits_of_one_part_do_not_overflow():
  """exp(1000) is infinite in float32: the larger of both maxima must be taken out first."""
  q, k, v, seen, prompts = inputs(G=2)
  large = np.float32(1e4)
  for scaled in ((k * large, prompts), (k, prompts._replace(keys=prompts.keys * large))):
    out = decode_attention(q, scaled[0], v, seen, scaled[1])
    assert_allclose(out, by_loops(q, scaled[0], v, seen, scaled[1]), atol=2e-6)


def test_bfloat16_sums_are_float32():
  """600 equal keys weigh 1/600 each; summed in bfloat16 they would stall at 256 of 600."""
  zeros, ones = (lambda *shape, f=f: f(shape, jnp.bfloat16) for f in (np.zeros, np.ones))
  prompts = Prompts(zeros(1, 1, 300, 8), ones(1, 1, 300, 8), np.ones((1, 300), bool))
  given = zeros(2, 1, 8), zeros(2, 300, 1, 8), ones(2, 300, 1, 8), np.ones((2, 300), bool)
  out = decode_attention(*given, prompts)
  assert out.dtype == jnp.bfloat16
  assert_allclose(np.asarray(out, np.float32), 1.0, rtol=2**-7)


def test_the_kernel_reads_prompts_in_pieces(products_too, monkeypatch):
  """Two prompts of two pieces each; of the second all is hidden, of the first one piece, partly."""
  monkeypatch.setattr(kernel, "_BLOCKS", 4)
  q, k, v, seen, prompts = inputs(B=4, K=1, G=2, P=256, H=64, dtype=jnp.float16)
  hidden = np.arange(256)[None] >= np.array([[200], [0]])
  given = q, k, v, seen, prompts._replace(seen=~hidden)
  out = decode_attention(*given, backend="gpu")
  # Float16 has 11 bits: weights, the pieces' outputs and the result are rounded, each of order 1.
  assert_allclose(out, by_loops(*given), atol=2e-3)


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"G": 0}, "there are none"),
    ({"P": 100}, "a multiple of 128 tokens .*not 100 in float16 on 64"),
    ({"dtype": jnp.float32}, "not 128 in float32 on 64"),
    ({"H": 136}, "not 128 in float16 on 136"),
  ],
)
def test_what_the_kernel_does_not_have_is_refused(changes, match):
  given = inputs(**{"G": 2, "P": 128, "H": 64, "dtype": jnp.float16} | changes)
  with pytest.raises(ValueError, match=f'backend "gpu" reads prompts.*{match}.*: choose "xla"'):
    decode_attention(*given, backend="gpu")
  with pytest.raises(ValueError, match=r"'triton' must be one of \('reference', .*'gpu'\)"):
    decode_attention(*given, backend="triton")


@pytest.mark.parametrize("function", [decode_attention, reference])
def test_what_is_not_seen_does_not_matter(function):
  """A row's old tokens and a prompt's padding may hold anything finite: 1e4 for each key and value.

  NaN would stay: 0 times NaN is NaN, and a cache is too large to be copied for the sake of it.
  """
  q, k, v, seen, prompts = inputs(G=2)
  wild = lambda x, kept: np.where(kept, x, np.float32(1e4))
  tokens = prompts.seen[:, None, :, None]
  changed = Prompts(wild(prompts.keys, tokens), wild(prompts.values, tokens), prompts.seen)
  slots = seen[:, :, None, None]
  out = function(q, wild(k, slots), wild(v, slots), seen, changed)
  assert_allclose(out, by_loops(q, k, v, seen, prompts), atol=2e-6)


def test_sizes_that_do_not_divide_are_refused():
  q, k, v, seen, prompts = inputs(G=4)
  with pytest.raises(ValueError, match="6 rows must be a multiple of 4 prompts"):
    decode_attention(q, k, v, seen, prompts)
  with pytest.raises(ValueError, match="3 query heads must be a multiple of 2"):
    decode_attention(q[:, :3], k, v, seen)
