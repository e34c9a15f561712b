import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pixelis_jax.algo import losses

CLIP = dict(clip_low=0.2, clip_high=0.28)


def table(*rows):
  return jnp.asarray(rows, jnp.float32)


def flags(*rows):
  return jnp.asarray(rows, bool)


def random_batch(rows: int, length: int):
  rng = np.random.default_rng(0)
  logps = table(*-rng.exponential(size=(rows, length)))
  old = logps + table(*rng.normal(scale=0.3, size=(rows, length)))
  advantages = table(*rng.normal(size=(rows, 1)))
  # Rows of very different length: a mean of means would show.
  mask = (
    jnp.arange(length)[None, :]
    < jnp.asarray([1 + r * length // rows for r in range(rows)])[:, None]
  )
  return logps, old, advantages, mask


def test_positive_advantages_are_clipped_from_above_only():
  logps = table([0.0, 1.0, -1.0, 5.0])
  old = jnp.zeros_like(logps)
  loss, aux = losses.clipped_surrogate(logps, old, table([2.0]), flags([1, 1, 1, 0]), **CLIP)
  # ratios 1, e, 1/e -> 1, 1.28, 0.3679 (low side free), fourth masked.
  # Clipping both sides at 0.2 would make it -2 * (1 + 1.2 + 0.8) / 3.
  np.testing.assert_allclose(loss, -2 * (1 + 1.28 + np.exp(-1)) / 3, rtol=1e-6)
  np.testing.assert_allclose(aux["clip_fraction"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(aux["ratio_mean"], (1 + np.e + np.exp(-1)) / 3, rtol=1e-6)
  # (e^d - 1 - d) at d = 0, 1, -1: 0, e - 2, 1/e.
  np.testing.assert_allclose(aux["approx_kl"], (np.e - 2 + np.exp(-1)) / 3, rtol=1e-6)


def test_negative_advantages_are_clipped_from_below_and_dual_clip_bounds_them():
  logps = table([1.0, -1.0, 2.0])
  old, mask = jnp.zeros_like(logps), flags([1, 1, 1])
  loss, _ = losses.clipped_surrogate(logps, old, table([-1.0]), mask, **CLIP)
  # ratios e (free), 1/e -> 0.8, e^2 (free).
  np.testing.assert_allclose(loss, (np.e + 0.8 + np.e**2) / 3, rtol=1e-6)
  loss, aux = losses.clipped_surrogate(logps, old, table([-1.0]), mask, dual_clip=3.0, **CLIP)
  # e < 3 stays, e^2 = 7.39 becomes 3. Clipped tokens: the second and the third.
  np.testing.assert_allclose(loss, (np.e + 0.8 + 3) / 3, rtol=1e-6)
  np.testing.assert_allclose(aux["clip_fraction"], 2 / 3, rtol=1e-6)
  loss, _ = losses.clipped_surrogate(logps, old, table([1.0]), mask, dual_clip=3.0, **CLIP)
  # Positive advantages know nothing of it.
  np.testing.assert_allclose(loss, -(1.28 + np.exp(-1) + 1.28) / 3, rtol=1e-6)


def test_on_policy_gradient_is_the_advantage():
  """At ratio 1 the surrogate is REINFORCE: gradient -A / tokens on trained tokens, 0 elsewhere."""
  logps = table([-1.0, -2.0], [-3.0, -4.0])
  mask = flags([1, 1], [1, 0])
  gradient = jax.grad(
    lambda x: losses.clipped_surrogate(x, logps, table([2.0], [-1.0]), mask, **CLIP)[0]
  )(logps)
  np.testing.assert_allclose(gradient, [[-2 / 3, -2 / 3], [1 / 3, 0]], rtol=1e-6)


@pytest.mark.parametrize(
  ("shift", "advantage", "moves"),
  [(1.0, 1.0, False), (-1.0, 1.0, True), (-1.0, -1.0, False), (1.0, -1.0, True)],
)
def test_gradient_stops_only_where_the_ratio_has_gone_far_enough(shift, advantage, moves):
  old = table([-2.0])
  gradient = jax.grad(
    lambda x: losses.clipped_surrogate(x, old, table([advantage]), flags([1]), **CLIP)[0]
  )(old + shift)
  assert bool(gradient[0, 0] != 0) == moves


def test_masked_garbage_reaches_neither_loss_nor_gradient():
  logps, old = table([-1.0, jnp.nan, jnp.inf]), table([-1.5, -jnp.inf, jnp.nan])
  mask = flags([1, 0, 0])

  def loss(x):
    surrogate = losses.clipped_surrogate(x, old, table([1.0]), mask, entropies=old, **CLIP)[0]
    return surrogate + losses.cross_entropy(x, old, mask, entropy_weight=0.1)[0]

  value, gradient = jax.value_and_grad(loss)(logps)
  assert jnp.isfinite(value)
  np.testing.assert_array_equal(jnp.isfinite(gradient), True)
  np.testing.assert_array_equal(gradient[:, 1:], 0)


def test_extreme_ratios_stay_finite():
  logps, old = table([-1000.0, 0.0]), table([0.0, -1000.0])
  for advantage in (1.0, -1.0):
    f = lambda x, a=advantage: losses.clipped_surrogate(x, old, table([a]), flags([1, 1]), **CLIP)[
      0
    ]
    value, gradient = jax.value_and_grad(f)(logps)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
  assert jnp.isfinite(losses.kl_k3(logps, old)).all()


def test_an_empty_mask_is_zero_with_zero_gradient():
  logps = table([-1.0, -2.0])
  f = lambda x: losses.clipped_surrogate(x, logps, table([1.0]), flags([0, 0]), **CLIP)[0]
  value, gradient = jax.value_and_grad(f)(logps)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_parts_with_the_whole_count_add_up_to_the_whole():
  """Loss, auxiliary values and gradient; the mean of the parts' means is another number."""
  batch = random_batch(4, 8)

  def loss(logps, old, advantages, mask, count):
    return losses.clipped_surrogate(
      logps, old, advantages, mask, entropies=-old, count=count, **CLIP
    )

  differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
  halves = [[x[rows] for x in batch] for rows in (slice(0, 2), slice(2, 4))]
  (whole, aux), gradient = differentiate(*batch, None)
  count = batch[-1].sum(dtype=jnp.float32)
  parts = [differentiate(*half, count) for half in halves]
  np.testing.assert_allclose(sum(p[0][0] for p in parts), whole, rtol=1e-5)
  np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), gradient, atol=1e-7)
  assert set(aux) == {"clip_fraction", "ratio_mean", "approx_kl", "entropy"}
  for name in aux:
    np.testing.assert_allclose(sum(p[0][1][name] for p in parts), aux[name], rtol=1e-5)
  naive = np.mean([differentiate(*half, None)[0][0] for half in halves])
  assert abs(naive - whole) > 1e-3


def test_rows_sharded_over_devices_give_the_global_mean():
  batch = random_batch(4, 8)
  f = jax.jit(lambda *b: losses.clipped_surrogate(*b, **CLIP)[0])
  expected = f(*batch)
  assert len(jax.devices()) >= 2, "conftest asks for two CPU devices"
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data", None)))
  np.testing.assert_allclose(f(*sharded), expected, rtol=1e-6)


def test_token_mean_weighs_tokens_not_rows():
  # Tokens 1, 1, 1, 5: mean 2. A mean of row means would be 3.
  x, mask = table([1, 1, 1], [5, 9, 9]), flags([1, 1, 1], [1, 0, 0])
  np.testing.assert_allclose(losses.token_mean(x, mask), 2.0, rtol=1e-6)
  np.testing.assert_allclose(losses.token_mean(x, mask, count=jnp.float32(8)), 1.0, rtol=1e-6)


def test_k3_by_hand():
  # d = ref - policy = ln 2, -ln 2, 0: 2 - ln 2 - 1, 0.5 + ln 2 - 1, 0.
  # With d's sign wrong the first two swap.
  ref = table([np.log(2), -np.log(2), 0.0])
  expected = [[1 - np.log(2), np.log(2) - 0.5, 0.0]]
  np.testing.assert_allclose(losses.kl_k3(jnp.zeros_like(ref), ref), expected, rtol=1e-6)
  # Near 0 it is d^2 / 2; exp(d) - 1 - d in float32 would give 0 or 1.2e-7.
  np.testing.assert_allclose(losses.kl_k3(table([0.0]), table([1e-4])), [[5e-9]], rtol=1e-2)
  # exp(5) - 6 = 142 is held at 10, without a gradient.
  assert losses.kl_k3(table([0.0]), table([5.0]))[0, 0] == 10.0
  assert jax.grad(lambda x: losses.kl_k3(x, table([5.0])).sum())(table([0.0]))[0, 0] == 0.0


def test_k3_gradient_pulls_towards_the_reference():
  # d/d logps of exp(r - l) - (r - l) - 1 is 1 - exp(r - l): at r - l = ln 2 it is -1.
  gradient = jax.grad(lambda x: losses.kl_k3(x, table([np.log(2)])).sum())(table([0.0]))
  np.testing.assert_allclose(gradient, [[-1.0]], rtol=1e-6)


def test_k3_is_unbiased_on_the_policys_samples():
  policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
  k3 = losses.kl_k3(table(np.log(policy)), table(np.log(reference)))
  exact = (policy * np.log(policy / reference)).sum()
  np.testing.assert_allclose((policy * np.asarray(k3)[0]).sum(), exact, rtol=1e-5)


def test_cross_entropy_rewards_entropy():
  logps, entropies, mask = table([-1.0, -3.0, -9.0]), table([0.5, 1.5, 9.0]), flags([1, 1, 0])
  loss, aux = losses.cross_entropy(logps, entropies, mask, entropy_weight=0.1)
  # nll (1 + 3) / 2 = 2, entropy (0.5 + 1.5) / 2 = 1: 2 - 0.1. With the sign wrong it is 2.1.
  np.testing.assert_allclose(loss, 1.9, rtol=1e-6)
  np.testing.assert_allclose([aux["nll"], aux["entropy"]], [2.0, 1.0], rtol=1e-6)
