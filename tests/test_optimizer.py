"""What optimizers do with rates and with matrices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from pixelis_jax import learner


def test_optimizer_warms_up_and_decays():
  c = SimpleNamespace(
    lr=1e-3,
    warmup=4,
    steps=20,
    final_fraction=0.1,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip_norm=1.0,
    mu_dtype="float32",
    muon_scale=0.0,
    patch_scale=1.0,
  )
  tx, schedule = learner.make_optimizer(c)
  with jax.numpy_dtype_promotion("standard"):  # As in `make_step`.
    rates = jax.jit(jax.vmap(schedule))(np.array([0, 2, 4, 20, 30], np.int32))
  np.testing.assert_allclose(rates, [0.0, 5e-4, 1e-3, 1e-4, 1e-4], rtol=1e-5)
  c.warmup = 0
  assert float(learner.make_optimizer(c)[1](0)) == pytest.approx(1e-3)  # No step is lost.
  # Clipped by the norm of all gradients together: 30 and 40 become 0.6 and 0.8.
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  clipped, _ = optax.clip_by_global_norm(c.clip_norm).update(
    {"a": jnp.asarray([30.0]), "b": jnp.asarray([40.0])}, optax.EmptyState()
  )
  np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [0.6, 0.8], rtol=1e-6)

  # Adam's first step is the rate times the gradient's sign, whatever its size.
  def first(tx, grads, params):
    update = lambda grads, params: tx.update(grads, tx.init(params), params)[0]
    with jax.numpy_dtype_promotion("standard"):
      return jax.jit(update)(grads, params)

  tx, _ = learner.make_optimizer(c)
  grads = {"a": jnp.asarray([30.0]), "b": jnp.asarray([-40.0])}
  updates = first(tx, grads, params)
  np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-1e-3, 1e-3], rtol=1e-4)
  # The patch embedding is slower, wherever in the tree it is.
  c.patch_scale = 0.25
  tx, _ = learner.make_optimizer(c)
  tower = {"policy": {"visual": {"patch": {"kernel": grads["a"]}, "merger": grads["b"]}}}
  visual = first(tx, tower, tower)["policy"]["visual"]
  found = [visual["patch"]["kernel"][0], visual["merger"][0]]
  np.testing.assert_allclose(found, [-0.25e-3, 1e-3], rtol=1e-4)


def test_muon_moves_matrices_and_adam_the_rest():
  """Layers' matrices by steps whose singular values are alike, each layer's for itself."""
  c = common.optimizer(lr=1e-3, steps=20, warmup=0).unlock()
  c.muon_scale, c.patch_scale, c.weight_decay = 3.0, 0.25, 0.0
  tx, schedule = learner.make_optimizer(c)
  draw = np.random.default_rng(0).normal
  shapes = {
    "policy/text/embedding": (6, 4),
    "policy/text/layers/attn/q/kernel": (2, 4, 16),
    "policy/text/layers/attn/q/bias": (2, 16),
    "policy/text/norm/scale": (4,),
    "policy/visual/blocks/attn/qkv/kernel": (2, 16, 3, 4),
    "policy/visual/merger/mlp/fc1/kernel": (16, 4),
    "policy/visual/patch/kernel": (12, 8),
    "aim/kernel_of_head": (4, 4),
  }
  grads = unflatten_dict(
    {name: jnp.asarray(draw(size=shape)) for name, shape in shapes.items()}, sep="/"
  )
  flat, state = flatten_dict(grads, sep="/"), tx.init(grads)
  with jax.numpy_dtype_promotion("standard"):
    updates = flatten_dict(jax.jit(tx.update)(grads, state, grads)[0], sep="/")
  rate = float(schedule(0))
  matrices = {
    **{f"q{i}": updates["policy/text/layers/attn/q/kernel"][i] for i in range(2)},
    **{
      f"qkv{i}{j}": updates["policy/visual/blocks/attn/qkv/kernel"][i, :, j]
      for i in range(2)
      for j in range(3)
    },
    "fc1": updates["policy/visual/merger/mlp/fc1/kernel"],
  }
  for name, step in matrices.items():
    # 0.2 sqrt(the longer side) makes the root mean square of such a step 0.2; five rounds of
    # Newton-Schulz leave singular values within 0.7 and 1.2 (Jordan, 2024).
    values = np.linalg.svd(step, compute_uv=False) / (3.0 * rate * 0.2 * max(step.shape) ** 0.5)
    assert values.min() > 0.6 and values.max() < 1.3, (name, values)
  # Adam's first step is the rate times the gradient's sign, and with Nesterov's momentum, which it
  # has beside Muon, b1 / (1 + b1) of that more.
  once = 1.0 + c.b1 / (1.0 + c.b1)
  for name, scale in {
    "policy/text/embedding": 1.0,
    "policy/text/layers/attn/q/bias": 1.0,
    "policy/visual/patch/kernel": 0.25,
    "policy/text/norm/scale": 1.0,
    "aim/kernel_of_head": 1.0,
  }.items():
    np.testing.assert_allclose(
      updates[name], -scale * once * rate * np.sign(flat[name]), rtol=1e-3, err_msg=name
    )
