"""The shared layers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose
from transformers.activations import ACT2FN

from pixelis_jax.model import layers
from pixelis_jax.model.config import ACTIVATIONS


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_hugging_faces(name):
  """The two geluses differ by up to 5e-4, so 1e-6 tells them apart."""
  x = np.linspace(-5, 5, 101, dtype=np.float32)
  expected = ACT2FN[name](torch.tensor(x)).numpy()
  assert_allclose(layers.ACTIVATION[name](jnp.asarray(x)), expected, atol=1e-6)


def test_every_supported_activation_is_there():
  assert set(layers.ACTIVATION) == set(ACTIVATIONS)


def test_norm_by_hand():
  """[3, 4]: mean square 12.5. With the mean removed (a LayerNorm) it would be -1 and 1."""
  norm = layers.Norm(2, "embed", eps=0.0)
  expected = np.array([[3.0, 4.0]], np.float32) / 12.5**0.5
  assert_allclose(norm(jnp.asarray([[3.0, 4.0]])), expected, rtol=1e-6)


def test_norm_is_float32_inside():
  """300^2 + 1 squares to more than bfloat16's 8 bits keep; the result is rounded once."""
  x = jnp.asarray([[300.0, 1.0, -2.0, 0.5]], jnp.bfloat16)
  got = layers.Norm(4, "embed", eps=1e-6)(x)
  x32 = np.asarray(x, np.float32)
  expected = x32 / np.sqrt((x32**2).mean() + 1e-6)
  assert got.dtype == jnp.bfloat16
  assert_allclose(got.astype(jnp.float32), expected, rtol=2**-8)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_keeps_all_output_axes(bias):
  linear = layers.Linear((3, 2, 4), ("embed", None, "heads"), bias=bias, rngs=nnx.Rngs(0))
  if bias:
    linear.bias[...] = jnp.asarray(normal(2, 4, seed=1))
  x = normal(5, 6, 3)
  expected = np.einsum("abi,ijk->abjk", x, np.asarray(linear.kernel[...]))
  if bias:
    expected = expected + np.asarray(linear.bias[...])[None, None]
    assert linear.bias.get_metadata("axes") == (None, "heads")
  assert_allclose(linear(jnp.asarray(x)), expected, atol=1e-6)


def test_gated_mlp_gates_with_the_activation():
  """Gate and up swapped would give silu(up) * gate."""
  mlp = layers.GatedMlp(3, 5, ("embed", "mlp"), "silu", bias=False, rngs=nnx.Rngs(0))
  gate, up, down = (np.asarray(part.kernel[...]) * 50 for part in (mlp.gate, mlp.up, mlp.down))
  for part, kernel in zip((mlp.gate, mlp.up, mlp.down), (gate, up, down), strict=True):
    part.kernel[...] = jnp.asarray(kernel)
  x = normal(2, 3)
  g = x @ gate
  assert_allclose(mlp(jnp.asarray(x)), (g / (1 + np.exp(-g)) * (x @ up)) @ down, rtol=1e-4)


def test_frequencies_by_hand():
  """Width 8, theta 1e4: 1, 1e4^-1/4 = 0.1, 0.01, 0.001."""
  assert_allclose(layers.frequencies(8, 1e4), [1, 0.1, 0.01, 0.001], rtol=1e-7)


def test_rotation_by_hand():
  """A quarter turn of the pair (x[j], x[j + H/2]): (1, 2, 3, 4) -> (-3, 2, 1, 4) for j = 0 only.

  Neighbouring pairs (GPT-J's order) would give (-2, 1, 3, 4).
  """
  x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  angles = jnp.asarray([np.pi / 2, 0.0], jnp.float32).reshape(1, 1, 2)
  assert_allclose(layers.rotate(x, angles).ravel(), [-3, 2, 1, 4], atol=1e-6)


def test_rotation_keeps_relative_angles():
  """The product of two turned vectors depends on the difference of their positions alone."""
  q, k = (jnp.asarray(normal(1, 1, 1, 8, seed=s)) for s in (1, 2))
  inverse = layers.frequencies(8, 1e4)
  turn = lambda x, p: layers.rotate(x, jnp.asarray(p * inverse, jnp.float32).reshape(1, 1, 4))
  near = (turn(q, 7.0) * turn(k, 3.0)).sum()
  far = (turn(q, 1007.0) * turn(k, 1003.0)).sum()
  assert_allclose(near, far, atol=1e-3)  # 1007 rad is a float32 to 6e-5.


def test_rotation_of_bfloat16_is_done_in_float32():
  x, angles = normal(1, 3, 2, 8), normal(1, 3, 4, seed=1) * 100
  low = jnp.asarray(x, jnp.bfloat16)
  exact = layers.rotate(low.astype(jnp.float32), jnp.asarray(angles))
  got = layers.rotate(low, jnp.asarray(angles))
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_stack_names_and_draws_each_layer():
  build = lambda rngs: layers.Linear((3, 4), ("embed", "mlp"), bias=True, rngs=rngs)
  stacked = layers.stack(5, build, nnx.Rngs(0))
  assert stacked.kernel[...].shape == (5, 3, 4) and stacked.bias[...].shape == (5, 4)
  assert stacked.kernel.get_metadata("axes") == ("layers", "embed", "mlp")
  assert stacked.bias.get_metadata("axes") == ("layers", "mlp")
  kernels = np.asarray(stacked.kernel[...]).reshape(5, -1)
  assert len(np.unique(kernels.round(6))) == kernels.size
  _, state = nnx.split(stacked)
  assert jax.tree.leaves(state)[0].shape[0] == 5
