"""Random-access sources: item `i` is a function of the settings and `i` alone."""

import dataclasses
from typing import Any

import numpy as np

from pixelis_jax.data import demos, digits, scenes
from pixelis_jax.data.shifts import SHIFTS
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Demo, Task, content_key

SIZE = 1_000_000
_DEMO, _TOUR = 1, 4  # Of `draws`: for the demonstration of a scene, and for a tour of it.


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
    scenes.check(kind=None, shift=self.shift, skew=self.skew)
    _ = self._digits  # Checks the split, and whether the hand is there.

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Task:
    return self.scene(index).task

  def scene(self, index: int) -> scenes.Scene:
    """The item with all its plates."""
    index = range(self.size)[index]
    rng = draws(self, index)
    return scenes.compose(
      rng,
      self._digits,
      id=f"{self.split}-{self.seed}-{index}{self._variant()}",
      kind=self.kinds[int(rng.integers(len(self.kinds)))],
      shift=self.shift,
      skew=self.skew,
    )

  @property
  def _digits(self) -> digits.Digits:
    return digits.load(self.split, SHIFTS[self.shift].hand)

  def _variant(self) -> str:
    """What the id of an unusual source ends with. Hashed where it would tell of the answers."""
    shift = "" if self.shift == "none" else f"-{self.shift}"
    if self.skew is None and self.kinds == scenes.KINDS:
      return shift
    return f"{shift}-{content_key(f'{self.skew} {self.kinds}')[:8]}"


def draws(source: Any, index: int, *what: int) -> np.random.Generator:
  """Of item `index` of a source with a seed and a split; `what` keeps those of other things apart.

  Negative indices count from the end; beyond it: IndexError.
  """
  split = digits.SPLITS.index(source.split)
  return np.random.default_rng([source.seed, split, range(len(source))[index], *what])


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
    scene = self.tasks.scene(index)
    demo = demos.demo(
      scene.task,
      draws(self.tasks, index, _DEMO),
      self.toolbox,
      mistakes=self.mistakes,
      elsewhere=[plate.box for plate in scene.plates if plate.box not in scene.task.boxes],
    )
    return demos.described(demo, scene.plates, self._labels(scene))

  def tour(self, index: int) -> Demo:
    """A lesson in where to look: task `index`'s scene, asked about all of its plates in any order.

    Each question is answered by the call alone, and behind it comes the next one.
    """
    scene, rng = self.tasks.scene(index), draws(self.tasks, index, _TOUR)
    asked = [scene.plates[i] for i in rng.permutation(len(scene.plates))]
    kinds = [str(rng.choice(scenes.kinds_of(plate))) for plate in asked]
    words = [scenes.worded(rng, kind, plate) for kind, plate in zip(kinds, asked, strict=True)]
    task = dataclasses.replace(scene.task, question=words[0])
    calls = [demos.zoom(task, plate.box, rng, self.toolbox.shown_size) for plate in asked]
    demo = demos.tour(task, calls, words[1:])
    return demos.described(demo, scene.plates, self._labels(scene))

  def _labels(self, scene: scenes.Scene) -> list[int]:
    labels = digits.load(self.tasks.split).labels
    return [int(labels[plate.digit]) for plate in scene.plates]


def drop_labels(task: Task) -> Task:
  """The task as the online stream may see it: no answer, no evidence."""
  return dataclasses.replace(task, answer=None, boxes=())
