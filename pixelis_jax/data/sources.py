"""What can be demonstrated: of each kind a source whose item `i` is a function of settings and `i`.

An item is a demonstration, or says in a few words why there is none: a tool did not find what it
was asked for, and nothing wrong is taught.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from pixelis_jax.chat.family import family_of, frame_of
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.data import digits, pictures, scenes
from pixelis_jax.data.tasks import DemoSource, TaskSource
from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.types import Demo, value

# Right at once; wrong in the end, as a negative or for context; a wrong step that is taken back.
SORTS = (GOLDEN, TRAP, CORRECTED) = ("golden", "trap", "corrected")


# Of one kind: item number and sort to the demonstration, or to why there is none.
Source = Callable[[int, str], Demo | str]


@value
class Kind:
  """The sorts that a kind has, and how its source is opened.

  `open` takes split, seed, size (items do not depend on it), folder of pictures and toolbox.
  """

  sorts: tuple[str, ...]
  open: Callable[[str, int, int, Path | None, Toolbox], Source]


def digit_scenes(
  kind: str, split: str, seed: int, size: int, folder: Path | None, toolbox: Toolbox
) -> Source:
  """Of `data/scenes.py`; they need no pictures."""
  handwriting = dict(zip(pictures.SPLITS, digits.SPLITS, strict=True))[split]
  tasks = TaskSource(split=handwriting, seed=seed, kinds=(kind,), size=size)
  demos = {
    sort: DemoSource(tasks=tasks, toolbox=toolbox, mistakes=mistakes)
    for sort, mistakes in ((GOLDEN, 0.0), (CORRECTED, 1.0))
  }
  return lambda index, sort: demos[sort][index]


KINDS = {
  kind: Kind(sorts=(GOLDEN, CORRECTED), open=functools.partial(digit_scenes, kind))
  for kind in scenes.KINDS
}


@functools.cache
def toolbox_of(model: str) -> Toolbox:
  """Every tool, in the coordinates of the policy in this directory."""
  return Toolbox(
    tuple(TOOLS["qwen"]),
    shown_size=frame_of(model),
    shown_frames=clips_of(model),
    unit=family_of(model).unit,
  )
