"""What SFT reads, and with a curriculum when it gets harder and when it goes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
from optax import GradientTransformation

from pixelis_jax import learner, program
from pixelis_jax.algo.data_curriculum import DataCurriculum, Settings
from pixelis_jax.checkpoint import Checkpoints

PROMOTED = "promoted"  # Of a run's directory: the states in which its stages began.
# One to go back to, and the one before: a run that was killed may do its last promotion again.
KEPT = 2


class Lessons:
  """The rows of a run. Each stage of its curriculum reads a stream of its own, from its beginning.

  So rows are a function of the settings and of the steps at which the stage changed. All processes
  see the same accuracies, and change together.
  """

  def __init__(
    self,
    c: Any,
    read: Callable[[DataCurriculum], grain.DatasetIterator],
    tx: GradientTransformation,
    workdir: Path,
  ):
    """Args:
    c: fields of `data_curriculum.Settings`.
    read: of a curriculum the rows of its stage.
    tx: the optimizer of the states that `heard` is given.
    """
    self._read, self._tx = read, tx
    self._promoted = Checkpoints(workdir / PROMOTED, keep=KEPT, background=True)
    self.curriculum = DataCurriculum(settings=Settings(**c))
    self.rows = read(self.curriculum)

  def position(self) -> dict[str, Any]:
    """What `restore` takes: plain, for a checkpoint. A state that it names is on disk."""
    self._promoted.wait()
    where = {"data": self.rows.get_state()}
    if self.curriculum.settings.enable:
      where["curriculum"] = self.curriculum.to_dict()
    return where

  def restore(self, position: dict[str, Any]) -> None:
    """Goes on from there. Raises ValueError where one of the two has no curriculum."""
    settings = self.curriculum.settings
    if ("curriculum" in position) != settings.enable:
      raise ValueError(
        f"curriculum.enable is {settings.enable}, and was {not settings.enable} when the run's "
        "checkpoint was saved: set it to that, or use a new workdir"
      )
    if settings.enable:
      self.curriculum = DataCurriculum.from_dict(settings, position["curriculum"])
      self._read_on()
    self.rows.set_state(position["data"])

  def heard(self, step: int, accuracy: float, state: learner.TrainState) -> learner.TrainState:
    """After a held-out evaluation of this state, the one to go on with: where the stage is rolled
    back, with the weights and moments with which it began.
    """
    before, self.curriculum = self.curriculum, self.curriculum.update(step, accuracy)
    after = self.curriculum
    if after.changes == before.changes:
      return state
    self._read_on()
    shares = ", ".join(f"{share:.0%} {level}" for level, share in after.shares.items())
    program.say(f"step {step}: stage {before.stage} to {after.stage} of the curriculum: {shares}")
    if after.stage < before.stage:
      self._promoted.wait()
      then, _ = self._promoted.restore(state, step=before.promoted_at)
      return learner.rewound(state, then, self._tx)
    if step not in self._promoted.steps():  # A killed run comes here again, with the same state.
      self._promoted.save(step, state, {"accuracy": after.reference})
    return state

  def measured(self) -> dict[str, float]:
    """What goes into the metrics; nothing without a curriculum."""
    return {"stage": float(self.curriculum.stage)} if self.curriculum.settings.enable else {}

  def close(self) -> None:
    """Waits until what was promoted is on disk."""
    self._promoted.close()

  def _read_on(self) -> None:
    """From the beginning of the stream of this stage."""
    self.rows.close()
    self.rows = self._read(self.curriculum)
