"""A question with its exact truth, and what a solver may know of it: where to look, no more."""

import dataclasses
import functools
import re
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pixelis_jax.data import pictures
from pixelis_jax.data.composites import Placed
from pixelis_jax.data.films import Track
from pixelis_jax.data.pictures import Cutout, Photo
from pixelis_jax.data.words import Line
from pixelis_jax.tools.sight import Sight
from pixelis_jax.types import Box, Task, ToolCall, ToolResult, value

# Yields calls, is sent what each returned, and returns the answer that it read from there.
Solving: TypeAlias = Generator[ToolCall, ToolResult, str]

TRIES = 200  # Draws of a puzzle until one meets its kind's conditions.


@value
class Look:
  """A place that a question points at, as an overview shows it: that it is there, not what it says.

  `box` is in source pixels of the first image, or of the first video's frame at `time` seconds.
  `name` is what the question or the answer calls it.
  """

  name: str
  box: Box
  time: float | None = None


@value
class Puzzle:
  """A task and its exact truth.

  Args:
    looks: what the question points at. A solver knows these beside the question, and nothing else.
    mistakes: in place of `looks`, what could be taken for it.
    slips: answers that who has seen all the right things may still give. None is right.
    objects, lines, tracks: all that was pasted, written, or moves, as its kind says.
    sources: of every picture in it.
  """

  task: Task
  looks: tuple[Look, ...]
  mistakes: tuple[tuple[Look, ...], ...]
  slips: tuple[str, ...]
  objects: tuple[Placed, ...] = ()
  lines: tuple[Line, ...] = ()
  tracks: tuple[Track, ...] = ()
  sources: tuple[str, ...] = ()


@value
class Materials:
  """Real pictures of one split. `shapes` have colours; `things` are what names alone tell apart.

  Without a fetched folder there are no such things.
  """

  split: str
  photos: tuple[Photo, ...]
  shapes: tuple[Cutout, ...]
  things: tuple[Cutout, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
  """A kind of question.

  Args:
    tools: operations that its solver calls.
    compose: a puzzle, a function of the generator's state, the materials and the id.
    solve: writes the calls for a policy with this sight, whose results grow with each call.
    about: a question that these looks of a puzzle answer; None where questions are about several
      things.
  """

  tools: tuple[str, ...]
  compose: Callable[[np.random.Generator, Materials, str], Puzzle]
  solve: Callable[[Puzzle, np.random.Generator, Sight], Solving]
  about: Callable[[np.random.Generator, Puzzle, Sequence[Look]], str] | None = None


@functools.cache
def materials(split: str, folder: Path | None = None) -> Materials:
  """Of a split in `pictures.SPLITS`, with what `scripts/fetch_pictures.py` fetched to a folder."""
  return Materials(
    split=split,
    photos=pictures.photos(split, folder),
    shapes=tuple(c for c in pictures.cutouts(split) if c.name in pictures.SHAPES),
    things=() if folder is None else pictures.cutouts(split, folder),
  )


def some(rng: np.random.Generator, choices: tuple, count: int) -> list:
  """Different ones, in random order."""
  return [choices[i] for i in rng.permutation(len(choices))[:count]]


def one(rng: np.random.Generator, choices: tuple) -> object:
  """Each as likely."""
  return choices[int(rng.integers(len(choices)))]


def said(pattern: str, result: ToolResult) -> str | None:
  """The first group of what the tool said; None where it said nothing like that."""
  found = re.search(pattern, result.text, re.MULTILINE)
  return found[1] if found else None


def around(rng: np.random.Generator, box: Box, by: float) -> Box:
  """The box, and up to so many pixels more on each side: as one points who is not careful."""
  left, up, right, down = rng.uniform(0, by, 4).tolist()
  return Box(box.x0 - left, box.y0 - up, box.x1 + right, box.y1 + down)
