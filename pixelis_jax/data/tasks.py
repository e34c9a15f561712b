"""Random-access sources: item `i` is a function of the settings and `i` alone."""

import dataclasses

import numpy as np

from pixelis_jax.data import demos, digits, scenes
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Demo, Task, content_key

SIZE = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
  """Digit scenes. Other seeds, splits or indices are other scenes; ids tell all of them apart.

  Args:
    split: One of `digits.SPLITS`: where the handwriting comes from.
    shift: A name in `shifts.SHIFTS`; changes pixels only, not layout, question or answer.
    skew: The digit that most questions ask about, or None; see `scenes.compose`.
    kinds: Question kinds, equally often.
    size: Length; items do not depend on it.
  """

  split: str
  seed: int = 0
  shift: str = "none"
  skew: int | None = None
  kinds: tuple[str, ...] = scenes.KINDS
  size: int = SIZE

  def __post_init__(self):
    if not self.kinds or not set(self.kinds) <= set(scenes.KINDS):
      raise ValueError(f"kinds {self.kinds} must be some of {scenes.KINDS}")
    if self.seed < 0 or self.size < 1:
      raise ValueError(f"seed {self.seed} must be >= 0 and size {self.size} >= 1")
    digits.load(self.split)
    scenes.check(kind=None, shift=self.shift, skew=self.skew)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Task:
    return self.scene(index).task

  def scene(self, index: int) -> scenes.Scene:
    """The item with all its plates."""
    index = range(self.size)[index]  # Negative indices count from the end; beyond it: IndexError.
    rng = np.random.default_rng([self.seed, digits.SPLITS.index(self.split), int(index)])
    return scenes.compose(
      rng,
      digits.load(self.split),
      id=f"{self.split}-{self.seed}-{index}{self._variant()}",
      kind=self.kinds[int(rng.integers(len(self.kinds)))],
      shift=self.shift,
      skew=self.skew,
    )

  def _variant(self) -> str:
    """What the id of an unusual source ends with. Hashed where it would tell of the answers."""
    shift = "" if self.shift == "none" else f"-{self.shift}"
    if self.skew is None and self.kinds == scenes.KINDS:
      return shift
    return f"{shift}-{content_key(f'{self.skew} {self.kinds}')[:8]}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoSource:
  """Demonstrations of a source's tasks; item `i` belongs to task `i`.

  Args:
    mistakes: Share that first looks at another plate and then corrects itself.
  """

  tasks: TaskSource
  toolbox: Toolbox
  mistakes: float = 0.0

  def __len__(self) -> int:
    return len(self.tasks)

  def __getitem__(self, index: int) -> Demo:
    index = range(len(self))[index]
    scene = self.tasks.scene(index)
    # The fourth number keeps these draws apart from those of the scene itself.
    split = digits.SPLITS.index(self.tasks.split)
    rng = np.random.default_rng([self.tasks.seed, split, int(index), 1])
    demo = demos.demo(
      scene.task,
      rng,
      self.toolbox,
      mistakes=self.mistakes,
      elsewhere=[plate.box for plate in scene.plates if plate.box not in scene.task.boxes],
    )
    labels = digits.load(self.tasks.split).labels
    return demos.described(demo, scene.plates, [int(labels[plate.digit]) for plate in scene.plates])


def drop_labels(task: Task) -> Task:
  """The task as the online stream may see it: no answer, no evidence."""
  return dataclasses.replace(task, answer=None, boxes=())
