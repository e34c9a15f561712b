from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pixelis_jax.algo import losses


def table(*rows):
  return jnp.asarray(rows, jnp.float32)


def flags(*rows):
  return jnp.asarray(rows, bool)


# Three sequences in two rows, and padding that holds anything. Trained are 2, 1 and 2 tokens of
# them: 1 + 2, 6, 3 + 4.
X = table([1, 2, 6, 50], [60, 3, 4, np.nan])
SEGMENTS = jnp.asarray([[1, 1, 2, 2], [1, 1, 1, 0]], jnp.int32)
MASK = flags([1, 1, 1, 0], [0, 1, 1, 0])


def test_a_sequence_is_a_segment_and_not_a_row():
  firsts = losses.first_tokens(MASK, SEGMENTS)
  # By row the 6 would be no first; the second row's first token is not trained.
  np.testing.assert_array_equal(firsts, flags([1, 0, 1, 0], [0, 1, 0, 0]))
  sums, means = (f(X, MASK, SEGMENTS) for f in (losses.by_sequence, losses.sequence_mean))
  np.testing.assert_array_equal(sums, table([3, 3, 6, 6], [7, 7, 7, 0]))
  np.testing.assert_array_equal(means, table([1.5, 1.5, 6, 6], [3.5, 3.5, 3.5, 0]))
  # A sequence of which nothing is trained is none.
  nothing = losses.first_tokens(flags([0, 0, 1, 1], [0, 0, 0, 0]), SEGMENTS)
  assert nothing.sum() == 1 and nothing[0, 2]


aggregate = partial(jax.jit, static_argnames=("mode", "scale"))(losses.aggregate)


@pytest.mark.parametrize(
  ("mode", "expected"),
  [
    ("token-mean", 16 / 5),
    # By row it would be (9 + 7) / 2.
    ("seq-mean-token-sum", (3 + 6 + 7) / 3),
    # By row (3 + 3.5) / 2; over all tokens 16 / 5.
    ("seq-mean-token-mean", (1.5 + 6 + 3.5) / 3),
    # Over the constant, not over its own length or the row's width.
    ("seq-mean-token-sum-norm", (3 + 6 + 7) / 3 / 8),
  ],
)
def test_aggregates_have_one_denominator_however_a_batch_is_cut(mode, expected):
  how = {"mode": mode, "scale": 8.0}
  whole = aggregate(X, MASK, SEGMENTS, **how)
  np.testing.assert_allclose(whole, expected, rtol=1e-6)
  # Each row alone with the whole's counts: shares that add up. Means of its own would not.
  counts = {"tokens": jnp.float32(5), "sequences": jnp.float32(3)}
  rows = [slice(0, 1), slice(1, 2)]
  parts = [aggregate(X[r], MASK[r], SEGMENTS[r], counts=counts, **how) for r in rows]
  np.testing.assert_allclose(sum(parts), expected, rtol=1e-6)
  alone = np.mean([aggregate(X[r], MASK[r], SEGMENTS[r], **how) for r in rows])
  assert abs(alone - expected) > 0.01
  # Rows on two devices: sums are global.
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  split = jax.device_put((X, MASK, SEGMENTS), NamedSharding(mesh, PartitionSpec("data", None)))
  np.testing.assert_allclose(aggregate(*split, **how), expected, rtol=1e-6)
  # And no row is sent anywhere: sums of sequences are each device's own.
  text = aggregate.lower(*split, **how).compile().as_text()
  assert "all-reduce" in text and "all-gather" not in text and "permute" not in text


def test_an_empty_mask_is_zero():
  for mode in losses.AGGREGATIONS:
    assert aggregate(X, MASK & False, SEGMENTS, mode=mode, scale=8.0) == 0


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


@pytest.mark.parametrize(
  ("kl_loss_type", "value", "gradient"),
  [
    # d = logps - ref = ln 2. k1's gradient is 1 whatever the reference; k2's is d; k3's 1 - e^-d.
    ("k1", np.log(2), 1.0),
    ("k2", np.log(2) ** 2 / 2, np.log(2)),
    ("k3", np.log(2) - 0.5, 0.5),
    ("k1+", np.log(2), np.log(2)),
    ("k3+", np.log(2) - 0.5, np.log(2)),
  ],
)
def test_estimates_of_the_kl(kl_loss_type, value, gradient):
  estimate = lambda x: losses.KL[kl_loss_type](x, table([-2.0 - np.log(2)])).sum()
  found = jax.value_and_grad(estimate)(table([-2.0]))
  np.testing.assert_allclose([found[0], found[1][0, 0]], [value, gradient], rtol=1e-5)


def test_extreme_differences_stay_finite():
  logps, ref = table([-1000.0, 0.0]), table([0.0, -1000.0])
  for estimate in losses.KL.values():
    assert jnp.isfinite(estimate(logps, ref)).all()


def test_cross_entropy_rewards_entropy():
  logps, entropies, mask = table([-1.0, -3.0, -9.0]), table([0.5, 1.5, 9.0]), flags([1, 1, 0])
  loss, aux = losses.cross_entropy(logps, entropies, mask, entropy_weight=0.1)
  # nll (1 + 3) / 2 = 2, entropy (0.5 + 1.5) / 2 = 1: 2 - 0.1. With the sign wrong it is 2.1.
  np.testing.assert_allclose(loss, 1.9, rtol=1e-6)
  np.testing.assert_allclose([aux["nll"], aux["entropy"]], [2.0, 1.0], rtol=1e-6)
