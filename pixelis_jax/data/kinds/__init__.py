"""Questions that cannot be answered without a tool: one table of their kinds, and a stream."""

import dataclasses
from pathlib import Path

import numpy as np

from pixelis_jax.data import pictures
from pixelis_jax.data.kinds import motion, objects, text
from pixelis_jax.data.kinds.puzzle import Kind, Puzzle, materials
from pixelis_jax.types import Task, content_key

KINDS: dict[str, Kind] = {**text.KINDS, **objects.KINDS, **motion.KINDS}
SIZE = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PuzzleSource:
  """Random access: item `i` is a function of the settings and `i` alone; ids tell all items apart.

  Args:
    split: One of `pictures.SPLITS`: where the pictures come from.
    kinds: Names in `KINDS`, equally often.
    size: Length; items do not depend on it.
    folder: What `scripts/fetch_pictures.py` fetched, for more photos and real things.
  """

  split: str
  seed: int = 0
  kinds: tuple[str, ...] = tuple(KINDS)
  size: int = SIZE
  folder: Path | None = None

  def __post_init__(self):
    if not self.kinds or not set(self.kinds) <= set(KINDS):
      raise ValueError(f"kinds {self.kinds} must be some of {tuple(KINDS)}")
    if self.seed < 0 or self.size < 1:
      raise ValueError(f"seed {self.seed} must be >= 0 and size {self.size} >= 1")
    materials(self.split, self.folder)

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Task:
    return self.puzzle(index).task

  def puzzle(self, index: int) -> Puzzle:
    """The item with its exact truth, and what a solver may know of it."""
    rng, kind = self._drawn(index)
    fetched = "" if self.folder is None else "-fetched"
    id = f"{kind}-{self.split}-{self.seed}-{range(self.size)[index]}{fetched}"
    return KINDS[kind].compose(rng, materials(self.split, self.folder), id)

  def _drawn(self, index: int) -> tuple[np.random.Generator, str]:
    """What a puzzle is drawn from, whatever other kinds there are; and its kind."""
    index = range(self.size)[index]  # Negative indices count from the end; beyond it: IndexError.
    at = [self.seed, pictures.SPLITS.index(self.split), int(index)]
    kind = self.kinds[int(np.random.default_rng(at).integers(len(self.kinds)))]
    return np.random.default_rng([*at, int(content_key(kind)[:8], 16)]), kind
