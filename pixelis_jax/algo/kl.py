"""The KL coefficient that holds a policy at a chosen distance from its reference."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveKl:
  """Proportional control of the KL coefficient: sec. 2.2 of https://arxiv.org/abs/1909.08593.

  Attributes:
    coef: the coefficient to use now.
    target: nats a token that the policy may drift.
    tolerance: nats a token around the target within which nothing changes.
    horizon: updates over which a full error of 0.2 changes the coefficient by about 20%; the paper
      counts samples instead.
    low: smallest coefficient. It must be positive: from 0 a product never comes back.
    high: largest coefficient.
  """

  coef: float
  target: float = 0.05
  tolerance: float = 0.0
  horizon: float = 10.0
  low: float = 1e-4
  high: float = 10.0

  def __post_init__(self):
    if not 0 < self.low <= self.coef <= self.high < math.inf:
      raise ValueError(
        f"coef {self.coef} must lie in [low, high] = [{self.low}, {self.high}], low > 0"
      )
    if not (self.target > 0 and self.horizon >= 1):
      raise ValueError(
        f"target {self.target} must be positive and horizon {self.horizon} at least 1"
      )
    if not 0 <= self.tolerance < self.target:
      raise ValueError(f"tolerance {self.tolerance} must lie in [0, target), target {self.target}")

  def update(self, measured: float) -> "AdaptiveKl":
    """The controller after one measurement in nats a token; ValueError if it is not finite."""
    if not math.isfinite(measured):
      raise ValueError(
        f"measured KL must be finite, got {measured}: refuse the update that caused it"
      )
    if abs(measured - self.target) <= self.tolerance:
      return self
    error = min(max(measured / self.target - 1, -0.2), 0.2)
    coef = self.coef * (1 + error / self.horizon)
    return dataclasses.replace(self, coef=min(max(coef, self.low), self.high))
