"""How hard a demonstration is, from itself alone, and the thirds of a dataset that this makes.

The torch project's idea (scripts/preprocess_data.py of Pixelis): 0.30 length, 0.25 tools, 0.20 text
that thinks, 0.15 errors, 0.10 kind of task. What is ours: in the place of thoughts, which it called
hardest where they were as usual, the size of what is looked for; in that of a table of kinds, the
question's length. Nothing that is rare is thrown away, and levels are thirds of whatever is there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from pixelis_jax.chat.parse import parse_call
from pixelis_jax.types import Box, Demo, Task

LEVELS = ("simple", "medium", "hard")
PARTS = {"steps": 0.30, "tools": 0.25, "size": 0.20, "correction": 0.15, "question": 0.10}
# How much there is to get right in a call of a tool, of 3.
COMPLEXITY = {
  "track_object": 3.0,
  "segment_object_at": 3.0,
  "get_properties": 2.0,
  "zoom_in": 2.0,
  "select_frames": 2.0,
  "read_text": 1.0,
}
_CALLS = 15  # From here on more calls, words or halvings of a side are no harder.
_WORDS = 40
_HALVINGS = 5


def difficulty(demo: Demo) -> float:
  """0 to 1: `parts` weighed by `PARTS`. To 4 digits, so that equal ones are equal everywhere."""
  found = parts(demo)
  return round(sum(weight * found[name] for name, weight in PARTS.items()), 4)


def parts(demo: Demo) -> dict[str, float]:
  """What makes it hard, each 0 to 1.

  steps: ln(calls + 1) / ln 16.
  tools: mean `COMPLEXITY` of the calls over 3, and 0.2 for each different tool but the first; 0
    without calls. A call of none of these counts 3.
  size: halvings, of 5, from the side of an image to that of the smallest thing in it that is
    evidence, or that a right call returned; sides are square roots of areas. 0 where there is none.
  correction: 1 where some turn is wrong, and context only.
  question: its words, of 40.
  """
  calls = [turn.text for turn in demo.turns if turn.result is not None]
  return {
    "steps": min(1.0, math.log(len(calls) + 1) / math.log(_CALLS + 1)),
    "tools": _tools([_name(text) for text in calls]),
    "size": max((min(1.0, _halvings(share) / _HALVINGS) for share in _shares(demo)), default=0.0),
    "correction": float(not all(turn.supervised for turn in demo.turns)),
    "question": min(1.0, len(demo.task.question.split()) / _WORDS),
  }


def _name(text: str) -> str | None:
  try:
    call = parse_call(text)
  except ValueError:
    return None
  return None if call is None else call.name


def _tools(names: Sequence[str | None]) -> float:
  if not names:
    return 0.0
  hardest = max(COMPLEXITY.values())
  mean = sum(COMPLEXITY.get(name, hardest) for name in names) / len(names)
  return min(1.0, mean / hardest + 0.2 * (len(set(names)) - 1))


def _halvings(share: float) -> float:
  """Of a side, from an image's to that of a thing with this share of its area."""
  return max(0.0, -math.log2(share) / 2)


def _shares(demo: Demo) -> Iterator[float]:
  """Parts of an image's or frame's area that evidence, and what right calls returned, has."""
  task = demo.task
  for box in task.boxes:
    yield _area(box) / _pixels(task, source=0, frame=None)
  for turn in demo.turns:
    if turn.supervised and turn.result is not None:
      for thing in (*turn.result.images, *turn.result.masks):
        yield _area(thing.box) / _pixels(task, thing.source, thing.frame)


def _area(box: Box) -> float:
  return box.width * box.height


def _pixels(task: Task, source: int, frame: int | None) -> int:
  pixels = task.images[source] if frame is None else task.videos[source].frames[frame]
  return pixels.shape[0] * pixels.shape[1]


def levels(
  difficulties: Float64[np.ndarray, " N"], weights: Float64[np.ndarray, " N"]
) -> Int64[np.ndarray, " N"]:
  """The index in `LEVELS` of each record: thirds of those that are sampled, by rank.

  Equal ones stay together, at the middle of their ranks: where there are many, a level may be
  larger or smaller than a third, or empty. Records of weight 0 are placed among the others.
  """
  ranked = np.sort(difficulties[weights > 0])
  below = np.searchsorted(ranked, difficulties, "left")
  up_to = np.searchsorted(ranked, difficulties, "right")
  twice_middle = below + up_to
  found = len(LEVELS) * twice_middle // (2 * max(len(ranked), 1))
  return np.minimum(found, len(LEVELS) - 1).astype(np.int64)


def staged(
  weights: Float64[np.ndarray, " N"],
  of: Int64[np.ndarray, " N"],
  shares: Mapping[str, float],
) -> Float64[np.ndarray, " N"]:
  """The weights with each level's made to sum to its share, in which they keep their proportions.

  Args:
    of: each record's level, an index in `LEVELS`.
    shares: of each level in what is sampled.

  Raises:
    ValueError: a level with a share has no record that is sampled.
  """
  totals = np.array([weights[of == level].sum() for level in range(len(LEVELS))])
  wanted = np.array([shares[level] for level in LEVELS])
  if (empty := (wanted > 0) & (totals == 0)).any():
    names = [name for name, none in zip(LEVELS, empty, strict=True) if none]
    counts = {name: int((weights[of == i] > 0).sum()) for i, name in enumerate(LEVELS)}
    raise ValueError(
      f"no record is {' or '.join(names)}, of {counts}: too many are equally hard for thirds; a "
      "curriculum of this dataset must give that level no share"
    )
  return weights * (wanted / np.where(totals == 0, 1.0, totals))[of]
