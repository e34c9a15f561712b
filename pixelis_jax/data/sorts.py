"""Demonstrations of puzzles: solved with the tools, compared with the truth, and of three sorts.

  golden     the solver's calls, and its answer
  trap       ends wrong: after a call at something else (a perceptual error), or by a wrong
             conclusion from right results (a logical one). For context, or as a negative
  corrected  a call at something else, which going on from it would have led to a wrong answer;
             then the right ones

Only what is right is supervised: of a trap's turns those before its error, if there are any.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pixelis_jax.algo.answers import equal
from pixelis_jax.data import demos
from pixelis_jax.data.demos import ANSWER, call_text
from pixelis_jax.data.kinds import KINDS, PuzzleSource
from pixelis_jax.data.kinds.puzzle import Kind, Puzzle, one, some
from pixelis_jax.data.scenes import COLORS
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Box, Demo, DemoTurn, ToolCall, ToolResult, content_key, value

SORTS = ("golden", "trap", "corrected")
# Why there is no demonstration of a puzzle: whoever builds counts them.
TOOLS_WRONG = "the tools were wrong"
NOT_WRONG = "the wrong call was not wrong"


@value
class Step:
  """A call and what it returned."""

  call: ToolCall
  result: ToolResult


@value
class Solved:
  """The answer, and the steps that were made for it."""

  answer: str
  steps: tuple[Step, ...]


class _Run:
  """A solver at work: what it was shown, and its next call, or else its answer."""

  def __init__(
    self,
    puzzle: Puzzle,
    kind: Kind,
    seed: int,
    toolbox: Toolbox,
    before: Sequence[DemoTurn] = (),
  ):
    self.results = [turn.result for turn in before]
    self.answer: str | None = None
    self._task, self._toolbox = puzzle.task, toolbox
    sight = toolbox.sight(puzzle.task, self.results)
    self._solver = kind.solve(puzzle, np.random.default_rng(seed), sight)
    self.call: ToolCall | None = next(self._solver)

  def repeat(self, steps: Sequence[Step]) -> int:
    """Takes the first steps as its own as long as it would make these calls; how many they are."""
    for i, step in enumerate(steps):
      if self.call is None or call_text(self.call) != call_text(step.call):
        return i
      self._show(step.result)
    return len(steps)

  def finish(self) -> Solved:
    """Makes its other calls."""
    steps = []
    while self.call is not None:
      steps.append(self._step())
    return Solved(answer=self.answer, steps=tuple(steps))

  def pointing(self, count: int) -> list[Step]:
    """Makes its calls before the one that is the `count`th to point at a place."""
    steps = []
    while count := count - ("bbox_2d" in self.call.arguments):
      steps.append(self._step())
    return steps

  def _step(self) -> Step:
    step = Step(call=self.call, result=self._toolbox.run(self.call, self._task, self.results))
    self._show(step.result)
    return step

  def _show(self, result: ToolResult) -> None:
    self.results.append(result)
    try:
      self.call = self._solver.send(result)
    except StopIteration as e:
      self.call, self.answer = None, e.value


def solve(puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox) -> Solved:
  """What the solver makes of it with these tools, right or wrong."""
  return _Run(puzzle, kind, _seed(rng), toolbox).finish()


def demonstrate(
  puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox, sort: str = "golden"
) -> Demo | str:
  """A demonstration of this sort; or `TOOLS_WRONG` or `NOT_WRONG`, if there is none.

  Args:
    toolbox: holds the kind's tools; its frames are those of the policy that will be taught.
    sort: one of `SORTS`.
  """
  if sort not in SORTS:
    raise ValueError(f"sort {sort!r} must be one of {SORTS}")
  make = {"golden": _golden, "trap": _trap, "corrected": _corrected}[sort]
  return make(puzzle, kind, rng, toolbox)


def tour(puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox) -> Demo:
  """The calls that point, of questions about each of its boards, frames or things.

  In the place of what the last of a question's returns stands the next question, see `demos.tour`;
  those before it are executed, as the places of later ones are in what they show. Raises ValueError
  for a kind whose questions are about several things at once.
  """
  if kind.about is None:
    raise ValueError(f"kind {puzzle.task.kind!r} asks about several things at once: no tour")
  places: dict[str, tuple] = {}
  for looks in (puzzle.looks, *puzzle.mistakes):
    places[looks[0].name] = (*places.get(looks[0].name, ()), looks)
  asked = [one(rng, choices) for choices in some(rng, tuple(places.values()), len(places))]
  words = [kind.about(rng, puzzle, looks) for looks in asked]
  turns: list[DemoTurn] = []
  for looks, later in zip(asked, [*words[1:], None], strict=True):
    run = _Run(dataclasses.replace(puzzle, looks=looks), kind, _seed(rng), toolbox, turns)
    for step in run.pointing(len(looks)):
      turns.append(_turn(step))
    told = None if later is None else ToolResult(text=later)
    turns.append(DemoTurn(text=call_text(run.call), result=told))
  task = dataclasses.replace(puzzle.task, question=words[0])
  return Demo(task=task, turns=tuple(turns), sights=demos.framed(_boards(puzzle), task))


def source(puzzles: PuzzleSource, toolbox: Toolbox) -> Callable[[int, str], Demo | str]:
  """Of a source's item and a sort: its demonstration, or why there is none."""

  def made(index: int, sort: str) -> Demo | str:
    puzzle = puzzles.puzzle(index)
    seed = int(content_key(puzzle.task.id, sort)[:16], 16)
    return demonstrate(puzzle, KINDS[puzzle.task.kind], np.random.default_rng(seed), toolbox, sort)

  return made


def _seed(rng: np.random.Generator) -> int:
  """Of a solver's generator: wrong and right solvers of a demonstration draw alike."""
  return int(rng.integers(2**63))


def _golden(puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox) -> Demo | str:
  found = solve(puzzle, kind, rng, toolbox)
  if not equal(found.answer, puzzle.task.answer):
    return TOOLS_WRONG
  return _demo(puzzle, [_turn(step) for step in found.steps])


def _trap(puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox) -> Demo | str:
  return (_perceptual, _logical)[int(rng.integers(2))](puzzle, kind, rng, toolbox)


def _logical(puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox) -> Demo | str:
  found = solve(puzzle, kind, rng, toolbox)
  if not equal(found.answer, puzzle.task.answer):
    return TOOLS_WRONG
  slip = puzzle.slips[int(rng.integers(len(puzzle.slips)))]
  return _demo(puzzle, [_turn(step) for step in found.steps], wrong=slip)


def _perceptual(
  puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox
) -> Demo | str:
  seed = _seed(rng)
  found = _Run(_mistaken(puzzle, rng), kind, seed, toolbox).finish()
  if not found.answer or equal(found.answer, puzzle.task.answer):
    return NOT_WRONG
  right = _Run(puzzle, kind, seed, toolbox).repeat(found.steps)
  turns = [_turn(step, supervised=i < right) for i, step in enumerate(found.steps)]
  return _demo(puzzle, turns, wrong=found.answer)


def _corrected(
  puzzle: Puzzle, kind: Kind, rng: np.random.Generator, toolbox: Toolbox
) -> Demo | str:
  seed = _seed(rng)
  wrong = _Run(_mistaken(puzzle, rng), kind, seed, toolbox).finish()
  if equal(wrong.answer, puzzle.task.answer):
    return NOT_WRONG
  run = _Run(puzzle, kind, seed, toolbox)
  right = run.repeat(wrong.steps)
  if right == len(wrong.steps):  # Both lie at one place as it is shown.
    return TOOLS_WRONG
  kept = wrong.steps[: right + 1]  # What it shows tells that it is wrong.
  run.results.append(kept[-1].result)
  found = run.finish()
  if not equal(found.answer, puzzle.task.answer):
    return TOOLS_WRONG
  turns = [_turn(step, supervised=i < right) for i, step in enumerate(kept)]
  return _demo(puzzle, turns + [_turn(step) for step in found.steps])


def _mistaken(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
  """As who takes something else for what is asked for sees it."""
  looks = puzzle.mistakes[int(rng.integers(len(puzzle.mistakes)))]
  return dataclasses.replace(puzzle, looks=looks)


def _turn(step: Step, *, supervised: bool = True) -> DemoTurn:
  return DemoTurn(text=call_text(step.call), result=step.result, supervised=supervised)


def _demo(puzzle: Puzzle, turns: list[DemoTurn], *, wrong: str | None = None) -> Demo:
  """The turns and the right answer, or a wrong one that nobody is taught."""
  truth = puzzle.task.answer
  assert not equal(wrong, truth), f"puzzle {puzzle.task.id}: {wrong!r} is right: {truth!r}"
  answer = truth if wrong is None else wrong
  final = DemoTurn(text=ANSWER.format(answer), result=None, supervised=wrong is None)
  sights = demos.framed(_boards(puzzle), puzzle.task)
  return Demo(task=puzzle.task, turns=(*turns, final), sights=sights)


def _boards(puzzle: Puzzle) -> dict[str, Box]:
  """The boards and frames of the overview by the colours that they are called by."""
  looks = [puzzle.looks[0], *(mistaken[0] for mistaken in puzzle.mistakes)]
  return {look.name: look.box for look in looks if look.name in COLORS}
