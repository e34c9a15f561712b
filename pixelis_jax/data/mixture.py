"""Digit scenes and puzzles as one source: tasks, their demonstrations, and how one would look.

Which kinds there are is all that says which questions come: training, rollouts, evaluation and the
online stream name kinds and read from here.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from pixelis_jax.data import demos, digits, kinds, pictures, scenes, shifts, sorts
from pixelis_jax.data.kinds import PuzzleSource
from pixelis_jax.data.kinds.puzzle import Puzzle, Solving
from pixelis_jax.data.tasks import SIZE, DemoSource, TaskSource, draws
from pixelis_jax.tools import Tool, Toolbox
from pixelis_jax.tools.sight import Sight
from pixelis_jax.types import Demo, Task, ToolCall, value

KINDS = (*scenes.KINDS, *kinds.KINDS)
_PICTURES = dict(zip(digits.SPLITS, pictures.SPLITS, strict=True))
_TRIES = 64  # Puzzles of one kind until the tools solve one.
# Draws of an item apart from those of the scene or puzzle itself.
_WHICH, _SHIFT, _SHOWN = 2, 3, 4


@value
class Asked:
  """A task, and how one would look who knows where: calls, up to the answer.

  `solve` is None where nobody knows; `tools` are the operations that it calls.
  """

  task: Task
  tools: tuple[str, ...] = ()
  solve: Callable[[Sight], Solving] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Random access: item `i` is a function of the settings and `i` alone; ids tell all items apart.

  Of digit scenes alone it is their `TaskSource`.

  Args:
    split: one of `digits.SPLITS`; pictures are of train, dev and test in their order.
    shift: a name in `shifts.SHIFTS`; of a puzzle it changes whole pictures.
    skew: the digit that most questions ask about, or None; puzzles have none.
    kinds: names in `KINDS`, equally often.
    size: length; items do not depend on it.
  """

  split: str
  seed: int = 0
  shift: str = "none"
  skew: int | None = None
  kinds: tuple[str, ...] = scenes.KINDS
  size: int = SIZE

  def __post_init__(self):
    if not self.kinds or not set(self.kinds) <= set(KINDS):
      raise ValueError(f"kinds {self.kinds} must be some of {KINDS}")
    if self._puzzles:
      shifts.check_whole(self.shift)
      if self.skew is not None:
        raise ValueError(f"skew {self.skew} is a digit: kinds {self._puzzles} have other answers")
    _ = self._digits and self.scenes, self._puzzles and self.puzzles  # Each checks its settings.

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Task:
    return self.scenes[index] if self.is_scene(index) else self.puzzle(index).task

  def asked(self, index: int) -> Asked:
    """The item, and the scripted solver of its kind."""
    if self.is_scene(index):
      task = self.scenes[index]
      return Asked(task=task, tools=("zoom_in",), solve=functools.partial(look_at_plate, task))
    puzzle = self.puzzle(index)
    kind = kinds.KINDS[puzzle.task.kind]
    solve = lambda sight: kind.solve(puzzle, draws(self, index, _SHOWN), sight)
    return Asked(task=puzzle.task, tools=kind.tools, solve=solve)

  def is_scene(self, index: int) -> bool:
    """Whether the item is a digit scene; else it is a puzzle."""
    if not self._puzzles:
      return True
    share = len(self._digits) / len(self.kinds)
    return bool(draws(self, index, _WHICH).random() < share)

  def puzzle(self, index: int, attempt: int = 0) -> Puzzle:
    """The item with its exact truth; or in later attempts others of its kind."""
    index = range(self.size)[index]
    puzzle = self.puzzles.puzzle(index)
    if attempt:
      alike = dataclasses.replace(self.puzzles, kinds=(puzzle.task.kind,))
      puzzle = alike.puzzle(index + attempt * self.size)
    if self.shift == "none":
      return puzzle
    change = functools.partial(shifts.whole, self.shift, rng=draws(self, index, _SHIFT))
    task = dataclasses.replace(
      puzzle.task,
      id=f"{puzzle.task.id}-{self.shift}",
      images=tuple(change(image) for image in puzzle.task.images),
      videos=tuple(
        dataclasses.replace(video, frames=np.stack([change(frame) for frame in video.frames]))
        for video in puzzle.task.videos
      ),
    )
    return dataclasses.replace(puzzle, task=task)

  @functools.cached_property
  def scenes(self) -> TaskSource:
    """Of its digit kinds."""
    how = {"shift": self.shift, "skew": self.skew, "size": self.size}
    return TaskSource(split=self.split, seed=self.seed, kinds=self._digits, **how)

  @functools.cached_property
  def puzzles(self) -> PuzzleSource:
    """Of its other kinds, with the puzzles of later attempts behind the items."""
    split, size = _PICTURES[self.split], self.size * _TRIES
    return PuzzleSource(split=split, seed=self.seed, kinds=self._puzzles, size=size)

  @property
  def _digits(self) -> tuple[str, ...]:
    return tuple(kind for kind in self.kinds if kind in scenes.KINDS)

  @property
  def _puzzles(self) -> tuple[str, ...]:
    return tuple(kind for kind in self.kinds if kind in kinds.KINDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
  """Of a mixture's tasks; item `i` is of task `i`, or where tools fail of another of its kind.

  Args:
    mistakes: share that first looks at something else and then corrects itself.
  """

  tasks: Mixture
  toolbox: Toolbox
  mistakes: float = 0.0

  def __len__(self) -> int:
    return len(self.tasks)

  def __getitem__(self, index: int) -> Demo:
    if self.tasks.is_scene(index):
      return self._scenes[index]
    rng, why = draws(self.tasks, index, _SHOWN), set()
    for attempt in range(_TRIES):
      puzzle = self.tasks.puzzle(index, attempt)
      sort = "corrected" if rng.random() < self.mistakes else "golden"
      kind = kinds.KINDS[puzzle.task.kind]
      found = sorts.demonstrate(puzzle, kind, rng, self.toolbox, sort)
      if isinstance(found, Demo):
        return found
      why.add(found)
    raise ValueError(f"none of {_TRIES} puzzles of kind {puzzle.task.kind!r} is solved: {why}")

  def tour(self, index: int) -> Demo:
    """A lesson in where to look: item `index`, asked about all that it holds.

    Of a kind whose questions are about several things at once it is the demonstration up to the
    answer.
    """
    if self.tasks.is_scene(index):
      return self._scenes.tour(index)
    puzzle = self.tasks.puzzle(index)
    kind = kinds.KINDS[puzzle.task.kind]
    if kind.about is not None:
      return sorts.tour(puzzle, kind, draws(self.tasks, index, _SHOWN), self.toolbox)
    demo = self[index]
    return dataclasses.replace(demo, turns=demo.turns[:-1])

  @functools.cached_property
  def _scenes(self) -> DemoSource:
    return DemoSource(tasks=self.tasks.scenes, toolbox=self.toolbox, mistakes=self.mistakes)


def look_at_plate(task: Task, sight: Sight) -> Solving:
  """As a digit scene is demonstrated: one zoom into the middle of the evidence.

  What stands there nobody says: the answer is empty.
  """
  box = demos.shown_box(task, task.boxes[0], np.random.default_rng(0), sight.shown_size)
  yield ToolCall(name="zoom_in", arguments={"bbox_2d": [*box]})
  return ""


def look_at_boxes(task: Task, zoom: Tool, sight: Sight) -> Solving:
  """Zooms into the first image's evidence, box by box. The answer is empty."""
  for box in task.boxes:
    yield ToolCall(name=zoom.name, arguments=zoom.look(sight, box))
  return ""
