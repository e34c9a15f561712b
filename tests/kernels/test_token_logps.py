"""Chunked log-probs against the formula in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from kernels import token_logps as kernel

# One program a shape in the place of one an operation.
token_logps = jax.jit(kernel.token_logps, static_argnames=("temperature", "chunk", "backend"))


def inputs(B=3, T=7, D=8, V=11, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((B, T, D)).astype(dtype)
  head = rng.standard_normal((V, D)).astype(dtype)
  return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32)


def exact(hidden, head, targets, temperature):
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logps, np.asarray(targets)[..., None], -1)[..., 0]
  return chosen, -(np.exp(logps) * logps).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 12, 21, 1000])
def test_equals_the_formula(chunk, temperature):
  """3 rows of 7 tokens: one by one, 4 and then 3 and one of padding, in one, with room to spare."""
  arguments = inputs()
  logps, entropies = token_logps(*arguments, temperature=temperature, chunk=chunk)
  expected = exact(*arguments, temperature)
  assert_allclose(logps, expected[0], atol=1e-5)
  assert_allclose(entropies, expected[1], atol=1e-5)


@given(
  B=st.integers(1, 3),
  T=st.integers(1, 4),
  V=st.integers(1, 5),
  chunk=st.integers(1, 5),
  backend=st.sampled_from(["xla", "reference"]),
)
@settings(max_examples=6, deadline=None)
def test_any_small_shape(B, T, V, chunk, backend):
  """One word too, which is certain: log-prob and entropy 0."""
  arguments = inputs(B=B, T=T, V=V)
  found = token_logps(*arguments, chunk=chunk, backend=backend)
  for mine, other in zip(found, exact(*arguments, 1.0), strict=True):
    assert_allclose(mine, other, atol=1e-5)


def test_by_hand():
  """Logits 0 and log 3 at temperature 1: p = 1/4 and 3/4, H = ln 4 - 3/4 ln 3 = 0.5623."""
  hidden, head = np.ones((1, 2, 1), np.float32), np.array([[0.0], [np.log(3.0)]], np.float32)
  logps, entropies = token_logps(hidden, head, np.array([[0, 1]], np.int32))
  assert_allclose(np.exp(logps), [[0.25, 0.75]], rtol=1e-6)
  assert_allclose(entropies, np.full((1, 2), np.log(4) - 0.75 * np.log(3)), rtol=1e-6)


def test_gradients_do_not_depend_on_the_chunk():
  hidden, head, targets = inputs()

  def gradient(chunk):
    def loss(hidden, head):
      logps, entropies = token_logps(hidden, head, targets, temperature=0.9, chunk=chunk)
      return (logps * 2 + entropies).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head)

  for chunked, whole in zip(gradient(12), gradient(21), strict=True):
    assert np.abs(whole).max() > 0.1
    assert_allclose(chunked, whole, atol=1e-5)


def test_results_are_float32_from_bfloat16():
  """The product is accumulated in float32; inputs are exact here, so only that sum is in error."""
  arguments = inputs(D=64, dtype=jnp.bfloat16)
  logps, entropies = token_logps(*arguments)
  assert logps.dtype == entropies.dtype == jnp.float32
  assert_allclose(logps, exact(*arguments, 1.0)[0], atol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
def test_the_logits_of_all_tokens_never_exist(backward):
  """64 tokens x 128 words in chunks of 8: no array of 64 * 128 numbers in the compiled program."""
  hidden, head, targets = inputs(B=4, T=16, D=8, V=128)
  run = lambda h, w: token_logps(h, w, targets, chunk=8)[0].sum()
  run = jax.grad(run, argnums=(0, 1)) if backward else run
  memory = jax.jit(run).lower(hidden, head).compile().memory_analysis()
  # All logits at once are 64 * 128 * 4 = 32 KiB; a chunk's are 4 KiB, and a few of them are alive.
  assert memory.temp_size_in_bytes < 32 * 1024


@pytest.mark.parametrize("backward", [False, True])
def test_words_on_several_devices_exchange_tokens_not_logits(backward):
  """Each device computes the logits of its own words: nothing of the vocabulary's size is sent."""
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
  hidden, head, targets = inputs(V=128)
  both = lambda h, w: jnp.stack(token_logps(h, w, targets, chunk=8))
  run = jax.grad(lambda *x: (both(*x) ** 2).sum(), argnums=(0, 1)) if backward else both
  run = jax.jit(run)
  compiled = run.lower(place(hidden), place(head, "tensor")).compile()
  sent = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)", compiled.as_text())
  assert sent == [] and "all-reduce" in compiled.as_text()
  for mine, whole in zip(
    compiled(place(hidden), place(head, "tensor")), run(hidden, head), strict=True
  ):
    assert_allclose(mine, whole, atol=1e-4)  # Gradients of up to 60, in float32.


def test_nonsense_is_refused():
  for wrong in ({"temperature": 0.0}, {"chunk": 0}):
    with pytest.raises(ValueError, match="must be positive"):
      token_logps(*inputs(), **wrong)
  with pytest.raises(ValueError, match=r"'triton' must be one of \('reference', .*'gpu'\)"):
    token_logps(*inputs(), backend="triton")
