"""Group-relative advantages: each sample against the other samples of the same question."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32


def group_advantages(
  rewards: Float32[np.ndarray, "Q G"], *, normalize: Literal["std", "mean"]
) -> Float32[np.ndarray, "Q G"]:
  """Rewards minus their group's mean; "std" also divides by the group's deviation.

  A group whose rewards are all equal (a group of one, too) gets exactly zero: rounding in its mean
  over a deviation near zero would otherwise be a signal made of noise.

  Args:
    rewards: total rewards; a row is the samples of one question. Not finite raises ValueError.
    normalize: "std" is GRPO, sec. 4.1.2 of https://arxiv.org/abs/2402.03300, with the sample
      deviation (divided by G - 1) plus 1e-6, as verl and TRL compute it. "mean" is
      https://arxiv.org/abs/2503.20783 and Pixel-Reasoner, and keeps a nearly unanimous group from
      being blown up.
  """
  if normalize not in ("std", "mean"):
    raise ValueError(f"normalize {normalize!r} must be 'std' or 'mean'")
  keep = keep_groups(rewards)[:, None]
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  if normalize == "std":
    degrees = np.float32(max(rewards.shape[1] - 1, 1))
    centred = centred / (
      np.sqrt((centred**2).sum(axis=1, keepdims=True) / degrees) + np.float32(1e-6)
    )
  return np.where(keep, centred, np.float32(0))


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
