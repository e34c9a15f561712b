"""A curriculum of data: how much of what is sampled is simple, medium or hard, by what is reached.

The torch project's (Pixelis, scripts/train_sft.py), with its stages and numbers where these make
sense. There only the steps of a stage ever ended it: its accuracy was never told, performance was
measured on what was trained on, and a stage whose loss was not below 0.67 was rolled back. Here
what decides is a held-out accuracy, and a stage is held to what there was when it began.
"""

import dataclasses

import numpy as np

from pixelis_jax.algo.curriculum import Resumable

_ROUNDING = 1e-6  # Of shares written as decimals.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
  """Stages, and when one ends. Accuracies are shares, 0 to 1, and steps those of training.

  Attributes:
    enable: without it nothing ever changes.
    simple, medium, hard: the share of each in a stage, one number a stage.
    target: mean held-out accuracy from which a stage is learned.
    tolerance: how far the mean may fall below what it was when the stage began.
    window: evaluations of a stage that are averaged, at most.
    patience: evaluations in a row that must say the same before something changes.
    min_steps: of a stage, before it is left for the next one.
    max_steps: after which it is left anyway; 0: never.
    cooldown: steps after a change in which evaluations do not count.
    backoff: how many times longer a stage lasts for each time that it was gone back to.
  """

  enable: bool
  simple: tuple[float, ...]
  medium: tuple[float, ...]
  hard: tuple[float, ...]
  target: float
  tolerance: float
  window: int
  patience: int
  min_steps: int
  max_steps: int
  cooldown: int
  backoff: float

  def __post_init__(self):
    lengths = len(self.simple), len(self.medium), len(self.hard)
    if len(set(lengths)) > 1 or not lengths[0]:
      raise ValueError(f"simple, medium and hard have {lengths} stages, they must have the same")
    for stage, shares in enumerate(zip(self.simple, self.medium, self.hard, strict=True)):
      if min(shares) < 0 or abs(sum(shares) - 1) > _ROUNDING:
        raise ValueError(f"stage {stage}: shares {shares} must be 0 or more and sum to 1")
    if min(self.window, self.patience) < 1:
      raise ValueError(f"window {self.window} and patience {self.patience} must be at least 1")
    if min(self.min_steps, self.max_steps, self.cooldown, self.tolerance) < 0 or self.backoff < 1:
      raise ValueError(
        f"min_steps {self.min_steps}, max_steps {self.max_steps}, cooldown {self.cooldown} and "
        f"tolerance {self.tolerance} must be 0 or more, backoff {self.backoff} at least 1"
      )
    if self.max_steps and self.max_steps < self.min_steps:
      raise ValueError(f"max_steps {self.max_steps} must be 0 or at least {self.min_steps}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataCurriculum(Resumable):
  """Where a run is.

  Attributes:
    stage: from 0.
    changes: of stage so far, back ones too: what is read between two of them is one stream.
    since: the step of the last change.
    accuracies: the stage's last evaluations.
    verdict: of the last of these: "ready" for the next stage, "fallen", or "".
    streak: how many in a row had it.
    promoted_at: the step at which the stage was promoted to, whose weights it may be gone back to;
      None for the first stage, and one that was gone back to.
    reference: the mean accuracy then.
    falls: how often the stage that was last promoted to has been left for the one before.
  """

  settings: Settings
  stage: int = 0
  changes: int = 0
  since: int = 0
  accuracies: tuple[float, ...] = ()
  verdict: str = ""
  streak: int = 0
  promoted_at: int | None = None
  reference: float = 0.0
  falls: int = 0

  def __post_init__(self):
    if self.stage > self._last:
      raise ValueError(f"stage {self.stage} is beyond the last of the settings, {self._last}")

  @property
  def stages(self) -> list[dict[str, float]]:
    """Of each stage how much of what is sampled is of each level; sums to 1."""
    c = self.settings
    shares = zip(c.simple, c.medium, c.hard, strict=True)
    return [dict(zip(("simple", "medium", "hard"), stage, strict=True)) for stage in shares]

  @property
  def shares(self) -> dict[str, float]:
    """Those of this stage."""
    return self.stages[self.stage]

  def seed(self, seed: int) -> int:
    """Of the stream that is read until the next change, in a run with this seed."""
    return int(np.random.SeedSequence([seed, self.changes]).generate_state(1)[0])

  def update(self, step: int, accuracy: float) -> "DataCurriculum":
    """After an evaluation at this step. Whoever trains acts on a change of `stage`.

    Back means: to the former stage, and to the weights of `promoted_at`.
    """
    c = self.settings
    if not c.enable or (self.changes and step - self.since < c.cooldown):
      return self
    accuracies = (*self.accuracies, accuracy)[-c.window :]
    mean = float(np.mean(accuracies))
    verdict = self._verdict(mean)
    streak = self.streak + 1 if verdict == self.verdict else 1
    if verdict == "fallen" and streak >= c.patience:
      return self._changed(step, stage=self.stage - 1, falls=self.falls + 1)
    if self._ends(step - self.since, verdict, streak):
      # The stage after one that was gone back to is tried again: its falls still count.
      falls = 0 if self.promoted_at is not None else self.falls
      ahead = {"promoted_at": step, "reference": mean, "falls": falls}
      return self._changed(step, stage=self.stage + 1, **ahead)
    return dataclasses.replace(self, accuracies=accuracies, verdict=verdict, streak=streak)

  @property
  def _last(self) -> int:
    return len(self.settings.simple) - 1

  def _verdict(self, mean: float) -> str:
    if self.promoted_at is not None and mean < self.reference - self.settings.tolerance:
      return "fallen"
    return "ready" if mean >= self.settings.target else ""

  def _ends(self, steps: int, verdict: str, streak: int) -> bool:
    """Whether the stage is left for the next one after so many steps."""
    c = self.settings
    longer = 1.0 if self.promoted_at is not None else c.backoff**self.falls
    if verdict == "fallen" or self.stage == self._last or steps < c.min_steps * longer:
      return False
    learned = verdict == "ready" and streak >= c.patience
    return learned or bool(c.max_steps and steps >= c.max_steps * longer)

  def _changed(self, step: int, **fields: int | float) -> "DataCurriculum":
    return DataCurriculum(settings=self.settings, changes=self.changes + 1, since=step, **fields)
