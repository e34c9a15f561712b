"""Curiosity about pixels: a bonus for looking while few samples of a group look."""

import dataclasses
from collections.abc import Sequence

from pixelis_jax.types import Trajectory

OFF = "off"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
  """Constants of the bonus, in units of the task reward.

  Attributes:
    alpha: bonus for each unit by which the looking rate falls short of `rate`.
    beta: penalty for each call beyond `calls`.
    rate: share of the samples that should look; at or above it there is no bonus.
    calls: calls that cost nothing.
    rescale: the bonus is multiplied by rescale / looking rate; None leaves it as it is.
  """

  alpha: float
  beta: float
  rate: float
  calls: int
  rescale: float | None


# "paper": https://arxiv.org/abs/2505.15966, equations 3-5 and appendix B. "release": what the
# published code (TIGER-AI-Lab/Pixel-Reasoner, experience_maker.py) pays for images; there a correct
# answer after an unrepaired failed call also scores 0, which `rewards.format_reward` says here
# instead.
PRESETS = {
  "paper": Preset(alpha=0.5, beta=0.05, rate=0.3, calls=1, rescale=None),
  "release": Preset(alpha=0.5, beta=0.05, rate=0.3, calls=1, rescale=0.25),
}


def curiosity_bonus(group: Sequence[Trajectory], preset: Preset) -> list[float]:
  """Bonus minus penalty of each sample in task-reward units; right and wrong answers alike.

  A sample looks if at least one call succeeded (both sources also count failed calls, which would
  pay for malformed ones); the penalty counts every call.
  """
  looks = [trajectory.calls > trajectory.errors for trajectory in group]
  rate = sum(looks) / len(group)
  bonus = preset.alpha * max(preset.rate - rate, 0.0)
  if preset.rescale is not None and rate > 0:
    bonus *= preset.rescale / rate
  return [
    bonus * look + preset.beta * min(preset.calls - trajectory.calls, 0)
    for look, trajectory in zip(looks, group, strict=True)
  ]
