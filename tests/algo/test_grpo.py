import numpy as np
import pytest

from pixelis_jax.algo import grpo


def test_std_uses_the_sample_deviation():
  rewards = np.float32([[1, 0, 0, 0]])
  # mean 1/4; squares 9/16 + 3/16 = 3/4, over G - 1 = 3: deviation 1/2 -> 1.5, -0.5.
  # Over G the first would be 1.732.
  advantages = grpo.group_advantages(rewards, normalize="std")
  assert advantages.dtype == np.float32
  # 1e-6 in the denominator moves the result by 2e-6 of itself.
  np.testing.assert_allclose(advantages, [[1.5, -0.5, -0.5, -0.5]], rtol=5e-6)


def test_mean_only_centres():
  advantages = grpo.group_advantages(np.float32([[1, 0, 0, 0]]), normalize="mean")
  np.testing.assert_array_equal(advantages, np.float32([[0.75, -0.25, -0.25, -0.25]]))


def test_groups_do_not_see_each_other():
  advantages = grpo.group_advantages(np.float32([[1, 0], [10, 8]]), normalize="mean")
  # Over the whole table (mean 4.75) the first row would be all negative.
  np.testing.assert_array_equal(advantages, np.float32([[0.5, -0.5], [1, -1]]))


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -0.3, 1e6 + 0.7])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_constant_group_is_exactly_zero(normalize, constant, size):
  """float32 means of 0.1 are not 0.1: over 1e-6 that rounding would be an advantage of 0.01."""
  rewards = np.full((2, size), constant, np.float32)
  np.testing.assert_array_equal(grpo.group_advantages(rewards, normalize=normalize), 0)
  assert not grpo.keep_groups(rewards).any()


def test_keep_groups_keeps_any_difference():
  rewards = np.float32([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1.0001]])
  np.testing.assert_array_equal(grpo.keep_groups(rewards), [False, True, False, True])


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="rewards must be finite, got nan"):
    grpo.group_advantages(np.float32([[1, np.nan]]), normalize="mean")


@pytest.mark.parametrize(
  ("n", "chosen"),
  [(0, []), (1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (4, [1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_contrast_takes_half_of_the_best_and_half_of_the_worst(n, chosen):
  """In the order 1, 3 (reward 1), 0, 2, 4 (reward 0): from the front, and one fewer if odd from
  the back. The first two, 0 and 1, would do; the first three would hold one best only."""
  assert grpo.contrast(np.float32([0, 1, 0, 1, 0]), n) == chosen


@pytest.mark.parametrize("n", range(6))
def test_contrast_names_nobody_twice(n):
  for rewards in ([1, 1, 1], [0, 0, 0], [0.5, 1, 0]):
    chosen = grpo.contrast(np.float32(rewards), n)
    assert len(chosen) == len(set(chosen)) == min(n, 3)


def test_contrast_of_a_negative_number_is_refused():
  with pytest.raises(ValueError, match="n -1 must not be negative"):
    grpo.contrast(np.float32([0, 1]), -1)
