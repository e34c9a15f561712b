"""The kernels for Hopper GPUs: their program on a host, and on the chip where there is one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from kernels import specs, token_logps_gpu
from kernels.token_logps import reference, token_logps


def inputs(M=130, D=128, V=600):
  """Logits of order 1."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * D**-0.25, jnp.bfloat16)
  return draw(1, M, D), draw(V, D), jnp.asarray(rng.integers(0, V, (1, M)), jnp.int32)


def both(function, hidden, head):
  """Both results, and the gradients of a sum that weighs every token differently."""
  results, back = jax.vjp(function, hidden, head)
  weights = jnp.cos(jnp.arange(2 * hidden.shape[1], dtype=jnp.float32)).reshape(2, 1, -1)
  return results, back((weights[0], weights[1]))


def agree(ours, theirs):
  for mine, other in zip(ours[0], theirs[0], strict=True):
    assert_allclose(mine, other, atol=2e-5)  # Products of two bfloat16 are exact in float32.
  for mine, other in zip(ours[1], theirs[1], strict=True):
    mine, other = np.asarray(mine, np.float32), np.asarray(other)
    # Gradients of logits are rounded to 8 bits, and sums of them again: 2^-9 each at most.
    assert np.linalg.norm(mine - other) < 4e-3 * np.linalg.norm(other)


def by_reference(targets, temperature):
  wide = lambda x: x.astype(jnp.float32)
  run = lambda h, w: reference(h, targets, w, temperature)
  return lambda hidden, head: both(run, wide(hidden), wide(head))


def test_the_program_is_the_reference(on_the_host):
  """Neither tokens nor words fill whole tiles: the last tile of words begins before its words do,
  and so, backward, does the last of three pieces of the words."""
  hidden, head, targets = inputs()
  score = lambda *x: token_logps(*x, targets, temperature=0.7, chunk=60, backend="gpu")
  agree(jax.jit(lambda *x: both(score, *x))(hidden, head), by_reference(targets, 0.7)(hidden, head))


@pytest.mark.parametrize(
  "V, most, W",
  [
    (512, 512, 512),
    (600, 256, 256),
    (600, 9999, 512),  # All at once would be 768 words, more than there are.
    (300, 1, 256),
    (152_064, 19_008, 19_200),  # 8 pieces, 75 tiles each, and 6 tiles twice.
    (151_936, 999_999, 76_032),
  ],
)
def test_pieces_of_the_words(V, most, W):
  """Whole tiles, inside the vocabulary, that cover it without one too many."""
  assert token_logps_gpu.words_at_once(V, most) == W


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"dtype": jnp.float32}, "computes in bfloat16, not in float32"),
    ({"D": 96}, "a width that is a multiple of 64 and 256 words, not 96 and 300"),
    ({"V": 255}, "not 64 and 255"),
  ],
)
def test_what_the_kernels_do_not_have_is_refused(changes, match):
  sizes = {"D": 64, "V": 300, "dtype": jnp.bfloat16} | changes
  hidden, head = (jnp.zeros((*n, sizes["D"]), sizes["dtype"]) for n in ((1, 4), (sizes["V"],)))
  with pytest.raises(ValueError, match=f'backend "gpu" .*{match}: choose "xla"'):
    token_logps(hidden, head, jnp.zeros((1, 4), jnp.int32), backend="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n, s in specs.TOKEN_LOGPS.items() if s.V > 100_000])
def test_the_chip_agrees_with_the_reference(name):
  """At the named shapes, of 300 tokens, so that the reference's logits fit in float32."""
  spec = dataclasses.replace(specs.TOKEN_LOGPS[name], C=300)
  hidden, head, targets = spec.inputs(np.random.default_rng(0))
  score = jax.jit(lambda *x: both(lambda *y: token_logps(*y, targets, backend="gpu"), *x))
  agree(score(hidden, head), jax.jit(by_reference(targets, 1.0))(hidden, head))
