"""Advantages: how much better each sample did than what it is compared with, most often its group.

Names and formulas are verl's (verl/trainer/ppo/core_algos.py); rewards are of whole samples, so a
sample's tokens share one advantage.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int

from pixelis_jax import cluster

EPSILON = np.float32(1e-6)  # Beside a deviation that is divided by, as in verl and TRL.
ROUNDING = 1e-12  # Of a variance, relative to the mean's square: below it all values are one.


def advantages(
  rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"], *, adv_estimator: str
) -> Float32[np.ndarray, "Q G"]:
  """By one of `ESTIMATORS`; any other name is a ValueError that lists them.

  A group whose rewards are all equal (a group of one, too) is exactly zero to estimators that look
  at nothing but the group: rounding in its mean over a deviation near zero would otherwise be a
  signal made of noise. Those that also compare all samples see it as one more value.

  Args:
    rewards: total rewards; a row is the samples of one question. Not finite raises ValueError.
    lengths: trained tokens of each sample.
    adv_estimator: the name.
  """
  if adv_estimator not in ESTIMATORS:
    raise ValueError(f"adv_estimator {adv_estimator!r} must be one of {list(ESTIMATORS)}")
  differs = keep_groups(rewards)
  found = ESTIMATORS[adv_estimator](rewards, lengths)
  if adv_estimator in WHITENED:
    return found
  return np.where(differs[:, None], found, np.float32(0))


def grpo(rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]) -> np.ndarray:
  """Over the group's sample deviation (divided by G - 1): sec. 4.1.2 of arXiv 2402.03300."""
  centred = dr_grpo(rewards, lengths)
  return centred / (_deviation(rewards) + EPSILON)


def dr_grpo(rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]) -> np.ndarray:
  """Minus the group's mean alone (arXiv 2503.20783; Pixel-Reasoner, too).

  It keeps a nearly unanimous group from being blown up.
  """
  return rewards - rewards.mean(axis=1, keepdims=True)


def rloo(rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]) -> np.ndarray:
  """Minus the mean of the others: arXiv 2402.14740."""
  G = rewards.shape[1]
  return dr_grpo(rewards, lengths) * np.float32(G / max(G - 1, 1))


def opo(rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]) -> np.ndarray:
  """Minus the group's mean weighed by length, the baseline of least variance: arXiv 2505.23585."""
  weights = lengths.astype(np.float32)
  mean = (weights * rewards).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
  return rewards - mean


def grpo_passk(rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]) -> np.ndarray:
  """The best sample's lead over the second, over the deviation; all others zero.

  It pays for what pass@k counts (arXiv 2503.19595). Several best samples have no lead.
  """
  lead = np.zeros_like(rewards)
  if rewards.shape[1] > 1:
    ranked = np.sort(rewards, axis=1)
    best = rewards.argmax(axis=1)
    lead[np.arange(len(rewards)), best] = ranked[:, -1] - ranked[:, -2]
  return lead / (_deviation(rewards) + EPSILON)


def reinforce_plus_plus(
  rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]
) -> np.ndarray:
  """Standardised over all samples' tokens; no group is needed: arXiv 2501.03262."""
  return _whitened(rewards, lengths)


def reinforce_plus_plus_baseline(
  rewards: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]
) -> np.ndarray:
  """Minus the group's mean, then standardised over all samples' tokens: arXiv 2501.03262."""
  return _whitened(dr_grpo(rewards, lengths), lengths)


Estimator = Callable[[np.ndarray, np.ndarray], np.ndarray]
ESTIMATORS: dict[str, Estimator] = {
  "grpo": grpo,
  "dr_grpo": dr_grpo,
  "rloo": rloo,
  "reinforce_plus_plus": reinforce_plus_plus,
  "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
  "opo": opo,
  "grpo_passk": grpo_passk,
}
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


def _deviation(rewards: Float32[np.ndarray, "Q G"]) -> Float32[np.ndarray, "Q 1"]:
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  degrees = np.float32(max(rewards.shape[1] - 1, 1))
  return np.sqrt((centred**2).sum(axis=1, keepdims=True) / degrees)


def _whitened(
  values: Float32[np.ndarray, "Q G"], lengths: Int[np.ndarray, "Q G"]
) -> Float32[np.ndarray, "Q G"]:
  """Standardised by mean and sample deviation over the tokens of all processes' samples.

  Zero where all values are one.
  """
  over = lambda x: cluster.summed(np.float32([(lengths * x).sum(), lengths.sum()])).astype(float)
  total, tokens = over(values.astype(float))
  mean = total / max(tokens, 1.0)
  centred = values - mean
  variance = over(centred**2)[0] / max(tokens - 1.0, 1.0)
  if variance <= ROUNDING * max(mean**2, 1.0):
    return np.zeros_like(values)
  return (centred / np.sqrt(variance + 1e-8)).astype(np.float32)


def contrast(rewards: Float32[np.ndarray, " G"], n: int) -> list[int]:
  """Indices of the n of a group's samples whose rewards vary most: so many best, so many worst.

  Max-variance down-sampling (PODS, https://arxiv.org/abs/2504.13818), which for rewards of two
  values takes half of n from either end; an odd one is a best. n of at least G takes all.
  """
  if n < 0:
    raise ValueError(f"n {n} must not be negative")
  order = np.argsort(-rewards, kind="stable").tolist()
  worst = min(n, len(order)) // 2
  best = min(n, len(order)) - worst
  return sorted([*order[:best], *order[len(order) - worst :]])


def keep_groups(rewards: Float32[np.ndarray, "Q G"]) -> Bool[np.ndarray, " Q"]:
  """Which groups can teach anything: rewards not all equal (DAPO, arXiv 2503.14476)."""
  if not np.isfinite(rewards).all():
    raise ValueError(f"rewards must be finite, got {rewards[~np.isfinite(rewards)][0]}")
  return rewards.max(axis=1) > rewards.min(axis=1)
