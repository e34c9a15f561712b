"""What can be demonstrated: of each kind a source whose item `i` is a function of settings and `i`.

An item is a demonstration, or says in a few words why there is none: a tool did not find what it
was asked for, and nothing wrong is taught.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from pixelis_jax.algo.answers import equal
from pixelis_jax.chat.family import family_of, frame_of
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.data import digits, kinds, pictures, scenes, sorts
from pixelis_jax.data.demos import ANSWER, LABELS
from pixelis_jax.data.tasks import DemoSource, TaskSource
from pixelis_jax.tools import TOOLS, USUAL, Options, Toolbox
from pixelis_jax.types import Demo, DemoTurn

GOLDEN, TRAP, CORRECTED = sorts.SORTS

# Of one kind: item number and sort to the demonstration, or to why there is none.
Source = Callable[[int, str], Demo | str]
# Opens one from split, seed, size (items do not depend on it), folder of pictures and toolbox.
Open = Callable[[str, int, int, Path | None, Toolbox], Source]


def digit_scenes(
  kind: str, split: str, seed: int, size: int, folder: Path | None, toolbox: Toolbox
) -> Source:
  """Of `data/scenes.py`; they need no pictures."""
  handwriting = dict(zip(pictures.SPLITS, digits.SPLITS, strict=True))[split]
  tasks = TaskSource(split=handwriting, seed=seed, kinds=(kind,), size=size)
  golden, corrected = (
    DemoSource(tasks=tasks, toolbox=toolbox, mistakes=mistakes) for mistakes in (0.0, 1.0)
  )

  def made(index: int, sort: str) -> Demo | str:
    if sort == GOLDEN:
      return golden[index]
    return corrected[index] if sort == CORRECTED else _trap(corrected[index])

  return made


def puzzles(
  kind: str, split: str, seed: int, size: int, folder: Path | None, toolbox: Toolbox
) -> Source:
  """Of `data/kinds`."""
  source = kinds.PuzzleSource(split=split, seed=seed, kinds=(kind,), size=size, folder=folder)
  return sorts.source(source, toolbox)


KINDS: dict[str, Open] = {
  **{kind: functools.partial(digit_scenes, kind) for kind in scenes.KINDS},
  **{kind: functools.partial(puzzles, kind) for kind in kinds.KINDS},
}


@functools.cache
def toolbox_of(model: str, options: Options = USUAL) -> Toolbox:
  """Every tool, in the coordinates of the policy in this directory."""
  return Toolbox(
    tuple(TOOLS["qwen"]),
    shown_size=frame_of(model),
    shown_frames=clips_of(model),
    unit=family_of(model).unit,
    options=options,
  )


def _trap(corrected: Demo) -> Demo | str:
  """The wrong look of a correction, and what who does not notice then answers."""
  look, task = corrected.turns[0], corrected.task
  ((seen,),) = look.sights  # One digit.
  digit = seen.label - (LABELS - 10)
  answer = ("even", "odd")[digit % 2] if task.kind == "parity" else str(digit)
  if equal(answer, task.answer):
    return sorts.NOT_WRONG
  final = DemoTurn(text=ANSWER.format(answer), result=None, supervised=False)
  return dataclasses.replace(corrected, turns=(look, final))
