"""int8 kernels: how far they are from the weights, and that the model computes with just these."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixelis_jax.model.int8 import quantise, quantised
from pixelis_jax.model.load import load, save
from pixelis_jax.model.policy import Model
from tests.model import oracle

flat = partial(nnx.traversals.flatten_mapping, sep="/")
nested = partial(nnx.traversals.unflatten_mapping, sep="/")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3"])
def pair(request, tmp_path_factory):
  """(path, whole model, its weights, int8 model, its weights)."""
  path = tmp_path_factory.mktemp("int8")
  oracle.hf_model(tied=True, family=request.param).save_pretrained(path)
  return path, *load(path), *load(path, quantise=True)


def test_rounding_by_hand():
  """Column maxima 127 and 2.54: scales 1 and 0.02; 1.26 / 0.02 = 63, 0.031 / 0.02 = 1.55 -> 2."""
  kernel = np.array([[127.0, 1.26, 0.0], [-3.4, -2.54, 0.0], [0.6, 0.031, 0.0]], np.float32)
  q, scale = quantise(kernel)
  assert q.tolist() == [[127, 63, 0], [-3, -127, 0], [1, 2, 0]]
  np.testing.assert_allclose(scale, [1.0, 0.02, 0.0], rtol=1e-6)


def dequantised(whole: dict, small: dict) -> dict:
  """The whole weights with each int8 kernel multiplied out."""
  kernels = {path: np.asarray(w) for path, w in flat(small).items()}
  return nested(
    {
      path: kernels[path].astype(np.float32) * np.expand_dims(kernels[f"{path}_scale"], 1)
      if quantised(path)
      else np.asarray(weight)
      for path, weight in flat(whole).items()
    }
  )


def test_no_weight_is_off_by_more_than_half_a_step(pair):
  _, _, whole, _, small = pair
  given = flat(dequantised(whole, small))
  exact, kernels = ({path: np.asarray(w) for path, w in flat(x).items()} for x in (whole, small))
  chosen = [path for path in exact if quantised(path)]
  assert {path for path, w in kernels.items() if w.dtype == jnp.int8} == set(chosen)
  for path, weight in exact.items():
    if path not in chosen:
      np.testing.assert_array_equal(kernels[path], weight)
      continue
    step = np.expand_dims(kernels[f"{path}_scale"], 1)
    # Half a step, and float32 rounding of a quotient of up to 127.
    assert (np.abs(given[path] - weight) <= step * (0.5 + 1e-5)).all()
    assert np.abs(given[path] - weight).max() > 0


def run(model: Model, params: dict) -> np.ndarray:
  return oracle.logits(model, params, oracle.two_rows(model.config))


def test_the_model_computes_with_the_multiplied_out_kernels(pair):
  """(x q) scale and x (q scale) differ by float32 rounding alone; the exact weights by more."""
  _, model, whole, small_model, small = pair
  with jax.default_matmul_precision("highest"):
    got = run(small_model, small)
    expected = run(model, dequantised(whole, small))
    exact = run(model, whole)
  scale = np.abs(exact).max()
  np.testing.assert_allclose(got / scale, expected / scale, atol=2e-5)
  # 7 bits: each of some ten products in a row is off by about 1/4 of 1/127 of its largest weight.
  off = np.abs(got - exact).mean() / exact.std()
  assert 1e-3 < off < 0.1


def test_shapes_axes_and_dtypes_agree(pair):
  _, model, _, small_model, small = pair
  described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
  assert small_model.shapes() == described
  axes = jax.tree.map(len, small_model.axes(), is_leaf=lambda node: isinstance(node, tuple))
  assert jax.tree.map(jnp.ndim, small) == axes
  assert dataclasses.replace(model, int8=True) == small_model


def test_bfloat16_beside_int8(pair):
  path, *_ = pair
  model, params = load(path, dtype=jnp.bfloat16, quantise=True)
  dtypes = {str(w.dtype) for w in jax.tree.leaves(params)}
  assert dtypes == {"int8", "float32", "bfloat16"}  # Kernels, their scales, all else.
  assert run(model, params).dtype == jnp.bfloat16


def test_int8_is_not_saved(pair, tmp_path):
  path, _, _, model, params = pair
  with pytest.raises(ValueError, match="int8 weights are not saved"):
    save(tmp_path / "out", model, params, source=path)
