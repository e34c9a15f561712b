"""ICM's forward model by hand, and what its gradients reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelis_jax.model.icm import ForwardModel

MODEL = ForwardModel(width=4, actions=1, hidden=2)
STATES = jnp.float32([[1, 0, 0, 0], [0, 1, 0, 0]])
FOLLOWING = jnp.float32([[0, 1, 0, 0], [0, 1, 0, 0]])
ACTIONS = jnp.float32([[1], [0]])


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def test_at_first_it_predicts_that_nothing_changes(params):
  np.testing.assert_array_equal(MODEL.predict(params, STATES, ACTIONS), STATES)
  # Two unit vectors at a right angle; the second did stay.
  np.testing.assert_array_equal(MODEL.errors(params, STATES, ACTIONS, FOLLOWING), [2.0, 0.0])


def test_prediction_by_hand(params):
  """Of width 4 entries count twice in the layers, and what these say half."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  fc1, fc2 = zeros["mlp"]["fc1"], zeros["mlp"]["fc2"]
  fc1["kernel"] = fc1["kernel"].at[0, 0].set(1.0).at[4, 0].set(2.0)  # phi[0] and the action.
  fc2["kernel"] = fc2["kernel"].at[0, 1].set(1.0)
  fc2["bias"] = fc2["bias"].at[3].set(0.5)
  silu = lambda x: x / (1 + np.exp(-x))
  # First row: silu(2 * 1 + 2 * 1) / 2 on entry 1; second: silu(0) = 0. Both 0.5 / 2 on entry 3.
  expected = STATES + np.array([[0, silu(4.0) / 2, 0, 0.25], [0, 0, 0, 0.25]])
  found = MODEL.predict(zeros, STATES, ACTIONS)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  errors = MODEL.errors(zeros, STATES, ACTIONS, FOLLOWING)
  # |(1, s - 1, 0, 1/4)|^2 and (1/4)^2.
  np.testing.assert_allclose(errors, [1 + (silu(4.0) / 2 - 1) ** 2 + 1 / 16, 1 / 16], rtol=1e-6)


def test_nothing_is_learned_through_what_followed(params):
  total = lambda params, following: MODEL.errors(params, STATES, ACTIONS, following).sum()
  mine, target = jax.grad(total, argnums=(0, 1))(params, FOLLOWING)
  assert float(jnp.abs(mine["mlp"]["fc2"]["kernel"]).max()) > 0.01
  # Without the stop it would be 2 (following - predicted), 2 in size.
  assert float(jnp.abs(target).max()) == 0.0


def test_weights_are_a_function_of_the_key(params):
  same = jax.tree.map(lambda a, b: bool((a == b).all()), params, MODEL.init(jax.random.key(0)))
  assert all(jax.tree.leaves(same))
  other = MODEL.init(jax.random.key(1))["mlp"]["fc1"]["kernel"]
  assert not bool((other == params["mlp"]["fc1"]["kernel"]).any())
