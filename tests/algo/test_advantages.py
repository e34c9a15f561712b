import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pixelis_jax.algo import advantages as adv


def found(rewards, lengths=None, *, by: str):
  rewards = np.float32(rewards)
  lengths = np.full(rewards.shape, 2) if lengths is None else np.int64(lengths)
  result = adv.advantages(rewards, lengths, adv_estimator=by)
  assert result.dtype == np.float32 and result.shape == rewards.shape
  return result


def test_grpo_uses_the_sample_deviation():
  # mean 1/4; squares 9/16 + 3/16 = 3/4, over G - 1 = 3: deviation 1/2 -> 1.5, -0.5.
  # Over G the first would be 1.732. 1e-6 beside it moves the result by 2e-6 of itself.
  result = found([[1, 0, 0, 0]], by="grpo")
  np.testing.assert_allclose(result, [[1.5, -0.5, -0.5, -0.5]], rtol=5e-6)


def test_dr_grpo_only_centres():
  result = found([[1, 0, 0, 0]], by="dr_grpo")
  np.testing.assert_array_equal(result, np.float32([[0.75, -0.25, -0.25, -0.25]]))


def test_rloo_compares_with_the_others():
  # Others' means: 0; (1 + 0 + 0) / 3. With itself in it, 0.75 and -0.25.
  result = found([[1, 0, 0, 0]], by="rloo")
  np.testing.assert_allclose(result, [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)


def test_opo_weighs_the_baseline_by_length():
  # (3 * 1 + 1 * 0 + 1 * 0 + 1 * 0) / 6 = 1/2; by number of samples it would be 1/4.
  result = found([[1, 0, 0, 0]], [[3, 1, 1, 1]], by="opo")
  np.testing.assert_allclose(result, [[0.5, -0.5, -0.5, -0.5]], rtol=1e-6)


def test_passk_pays_the_best_for_its_lead():
  # mean 0.5, squares 0.25 + 0.09 + 0.04 + 0.36 = 0.74 over 3: deviation 0.49666. Lead 0.2.
  # Its distance from the mean would be 0.5.
  result = found([[1.0, 0.8, 0.3, -0.1]], by="grpo_passk")
  np.testing.assert_allclose(result, [[0.2 / np.sqrt(0.74 / 3), 0, 0, 0]], rtol=1e-5)
  np.testing.assert_array_equal(found([[1, 1, 0, 0]], by="grpo_passk"), 0)


def test_reinforce_plus_plus_standardises_over_tokens():
  # Tokens: 3 of reward 1, then 1 each of 0: mean 1/2, deviation of 6 values sqrt(6 * 1/4 / 5).
  # By sample the mean would be 1/4.
  result = found([[1, 0], [0, 0]], [[3, 1], [1, 1]], by="reinforce_plus_plus")
  scale = 0.5 / np.sqrt(0.3)
  np.testing.assert_allclose(result, [[scale, -scale], [-scale, -scale]], rtol=1e-5)


def test_its_baseline_variant_centres_groups_first():
  # Group means 1/2 and 0: values 1/2 (3 tokens), -1/2 (1), 0 (2): over 6 tokens mean 1/6,
  # squares 3 (1/3)^2 + (2/3)^2 + 2 (1/6)^2 = 1/3 + 4/9 + 1/18 = 5/6, over 5: 1/6.
  # A group of equal rewards gets -1/6 over it, too: verl does the same.
  result = found([[1, 0], [0, 0]], [[3, 1], [1, 1]], by="reinforce_plus_plus_baseline")
  expected = np.array([[1 / 3, -2 / 3], [-1 / 6, -1 / 6]]) * np.sqrt(6)
  np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_processes_standardise_over_all_of_their_tokens(monkeypatch):
  """A mean of the processes' means would weigh the second, with a tenth of the tokens, as much."""
  rewards, lengths = np.float32([[1, 0], [0, 3]]), np.int64([[9, 11], [1, 1]])
  whole = found(rewards, lengths, by="reinforce_plus_plus")
  said, both = {}, threading.Barrier(2)

  def summed(x):
    said[threading.get_ident()] = x
    both.wait()
    total = sum(said.values())
    both.wait()  # Nobody says more before all have read.
    return total

  monkeypatch.setattr(adv.cluster, "summed", summed)
  one = lambda i: found(rewards[i : i + 1], lengths[i : i + 1], by="reinforce_plus_plus")
  with ThreadPoolExecutor(2) as processes:
    parts = list(processes.map(one, range(2)))
  np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)


def test_groups_do_not_see_each_other():
  # Over the whole table (mean 4.75) the first row would be all negative.
  result = found([[1, 0], [10, 8]], by="dr_grpo")
  np.testing.assert_array_equal(result, np.float32([[0.5, -0.5], [1, -1]]))


@pytest.mark.parametrize("by", adv.ESTIMATORS)
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -0.3, 1e6 + 0.7])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_constant_rewards_are_exactly_zero(by, constant, size):
  """float32 means of 0.1 are not 0.1: over 1e-6 that rounding would be an advantage of 0.01."""
  rewards = np.full((2, size), constant, np.float32)
  np.testing.assert_array_equal(found(rewards, by=by), 0)
  assert not adv.keep_groups(rewards).any()


def test_keep_groups_keeps_any_difference():
  rewards = np.float32([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1.0001]])
  np.testing.assert_array_equal(adv.keep_groups(rewards), [False, True, False, True])


@pytest.mark.parametrize("by", ["grpo", "dr_grpo"])
def test_the_published_runs_formula_stands(by):
  """Bit for bit: BUILD.md's numbers were made with it."""
  rewards = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  rewards[1] = 0.1
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  if by == "grpo":
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.float32(7))
    centred = centred / (deviation + np.float32(1e-6))
  centred[1] = 0
  np.testing.assert_array_equal(found(rewards, by=by), centred)


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="rewards must be finite, got nan"):
    found([[1, np.nan]], by="dr_grpo")
  with pytest.raises(ValueError, match=r"adv_estimator 'gpro' must be one of \['grpo', 'dr_grpo'"):
    found([[1, 0]], by="gpro")


@pytest.mark.parametrize(
  ("n", "chosen"),
  [(0, []), (1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (4, [1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_contrast_takes_half_of_the_best_and_half_of_the_worst(n, chosen):
  """In the order 1, 3 (reward 1), 0, 2, 4 (reward 0): from the front, and one fewer if odd from
  the back. The first two, 0 and 1, would do; the first three would hold one best only."""
  assert adv.contrast(np.float32([0, 1, 0, 1, 0]), n) == chosen


@pytest.mark.parametrize("n", range(6))
def test_contrast_names_nobody_twice(n):
  for rewards in ([1, 1, 1], [0, 0, 0], [0.5, 1, 0]):
    chosen = adv.contrast(np.float32(rewards), n)
    assert len(chosen) == len(set(chosen)) == min(n, 3)


def test_contrast_of_a_negative_number_is_refused():
  with pytest.raises(ValueError, match="n -1 must not be negative"):
    adv.contrast(np.float32([0, 1]), -1)
