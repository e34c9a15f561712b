"""A curriculum of rewards: first the goal, then coherence, then everything, by what is reached.

The torch project's (Pixelis, configs/rft_config.yaml): a stage ends when its own number says so, or
at the latest after so many steps; what has not had its turn weighs nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

Curriculum = TypeVar("Curriculum")
STAGES = ("goal", "coherence", "full")
# What weighs nothing yet.
LATER = {
  "goal": ("coherence", "curiosity", "dynamics", "tool_bonus", "call_target"),
  "coherence": ("curiosity", "dynamics", "tool_bonus", "call_target"),
  "full": (),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
  """When stages end.

  Attributes:
    start: the first stage; "full" is no curriculum.
    check_every: steps between checks of a stage's end.
    min_steps: of a stage, before its first check.
    window: steps over which rewards are averaged.
    goal_success: mean task reward above which the goal is learned.
    goal_steps: steps after which "goal" ends anyway.
    slope: mean coherence gained a check below which it no longer improves.
    patience: checks in a row that must say so, each over as many averages.
    combined: mean of task and coherence reward above which "coherence" ends.
    coherence_steps: steps after which it ends anyway.
  """

  start: str
  check_every: int
  min_steps: int
  window: int
  goal_success: float
  goal_steps: int
  slope: float
  patience: int
  combined: float
  coherence_steps: int

  def __post_init__(self):
    if self.start not in STAGES:
      raise ValueError(f"start {self.start!r} must be one of {list(STAGES)}")
    if min(self.check_every, self.window) < 1 or self.patience < 2:
      raise ValueError(
        f"check_every {self.check_every} and window {self.window} must be at least 1, "
        f"patience {self.patience} at least 2"
      )


class Resumable:
  """A dataclass of `settings`, which a run is given anew, and of plain fields, which it saves."""

  __slots__ = ()

  def to_dict(self) -> dict[str, Any]:
    """Plain values that `from_dict` takes back; JSON can hold them."""
    fields = [f.name for f in dataclasses.fields(self) if f.name != "settings"]
    return {name: getattr(self, name) for name in fields}

  @classmethod
  def from_dict(cls: type[Curriculum], settings: Any, values: Mapping[str, Any]) -> Curriculum:
    """Where a run was; lists, as JSON gives them, are read as tuples."""
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(settings=settings, **plain)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewardCurriculum(Resumable):
  """Where a run is. `task` and `coherence` are the last steps' means, `checked` averages of these.

  `flat` counts the checks in a row at which coherence no longer improved.
  """

  settings: Settings
  stage: str
  steps: int = 0
  task: tuple[float, ...] = ()
  coherence: tuple[float, ...] = ()
  checked: tuple[float, ...] = ()
  flat: int = 0

  @classmethod
  def begin(cls, settings: Settings) -> "RewardCurriculum":
    """Before the first step."""
    return cls(settings=settings, stage=settings.start)

  def weights(self, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights with nothing for what comes later."""
    later = LATER[self.stage]
    return {part: 0.0 if part in later else weight for part, weight in weights.items()}

  def update(self, *, task: float, coherence: float) -> "RewardCurriculum":
    """After one step with these mean rewards, each in its own units."""
    if self.stage == STAGES[-1]:
      return self
    c, kept = self.settings, lambda old, new: (*old, new)[-self.settings.window :]
    after = dataclasses.replace(
      self,
      steps=self.steps + 1,
      task=kept(self.task, task),
      coherence=kept(self.coherence, coherence),
    )
    if after.steps < c.min_steps or after.steps % c.check_every:
      return after
    after = after._checked()
    if not after._done():
      return after
    following = STAGES[STAGES.index(self.stage) + 1]
    return RewardCurriculum(settings=c, stage=following)

  def _checked(self) -> "RewardCurriculum":
    patience = self.settings.patience
    checked = (*self.checked, float(np.mean(self.coherence)))[-patience:]
    rising = np.polyfit(np.arange(len(checked)), checked, 1)[0] if len(checked) == patience else 1.0
    flat = self.flat + 1 if rising < self.settings.slope else 0
    return dataclasses.replace(self, checked=checked, flat=flat)

  def _done(self) -> bool:
    c, task = self.settings, float(np.mean(self.task))
    if self.stage == "goal":
      return task > c.goal_success or self.steps >= c.goal_steps
    combined = (task + float(np.mean(self.coherence))) / 2
    return combined > c.combined or self.flat >= c.patience or self.steps >= c.coherence_steps
