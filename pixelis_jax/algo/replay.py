"""Selective sample replay: what told most lately is learned again where new samples tell nothing.

VL-Rethinker (https://arxiv.org/abs/2504.08837): as a policy gets better or stuck, ever more groups
have one reward, and an update has ever fewer samples that push anywhere.
"""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float

Sample = TypeVar("Sample")


class Replay(Generic[Sample]):
  """The latest samples with an advantage; drawn by |advantage| ** alpha.

  What is drawn keeps the log-probabilities of the policy that sampled it: the loss's ratio, or its
  rollout correction, makes up for how far the policy has moved since.
  """

  def __init__(self, capacity: int, *, alpha: float):
    """Of so many samples, 0 for none."""
    if capacity < 0 or alpha < 0:
      raise ValueError(f"capacity {capacity} and alpha {alpha} must not be negative")
    self._kept: deque[tuple[Sample, float]] = deque(maxlen=capacity)
    self._alpha = alpha

  def __len__(self) -> int:
    return len(self._kept)

  def add(self, samples: Sequence[Sample], advantages: Float[np.ndarray, " N"]) -> None:
    """Keeps those whose advantage is not 0; the oldest make room."""
    pairs = zip(samples, advantages.tolist(), strict=True)
    self._kept.extend((sample, push) for sample, push in pairs if push)

  def to_list(self) -> list[tuple[Sample, float]]:
    """What is kept, the oldest first: `add` takes it back."""
    return list(self._kept)

  def clear(self) -> None:
    """Forgets all."""
    self._kept.clear()

  def draw(self, n: int, rng: np.random.Generator) -> list[tuple[Sample, float]]:
    """n different samples and their advantages, all where there are fewer."""
    if not self._kept:
      return []
    weights = np.abs([push for _, push in self._kept]) ** self._alpha
    n = min(n, len(self._kept))
    chosen = rng.choice(len(self._kept), size=n, replace=False, p=weights / weights.sum())
    return [self._kept[i] for i in chosen.tolist()]
