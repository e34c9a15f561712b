import numpy as np
import pytest

from pixelis_jax.data import pictures
from pixelis_jax.data.kinds import puzzle
from pixelis_jax.tools.sight import Sight
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import Box, Picture, Task, ToolResult


def sight(*pictures):
  """Of a picture of 400 x 600 that is shown in 40 x 60; crops in 80 x 80."""
  size = lambda height, width: (40, 60) if (height, width) == (400, 600) else (80, 80)
  task = Task(id="", images=(np.zeros((400, 600, 3), np.uint8),), question="", answer=None)
  results = [ToolResult(text="", images=pictures)]
  return Sight(task=task, results=results, shown_size=size, view=IDENTITY)


def test_boxes_are_told_in_units_of_the_picture_as_shown():
  # 10 source pixels a unit: 104 is nearer to 10 units, 116 to 12.
  assert puzzle.pointed(sight(), Box(104.0, 210.0, 296.0, 396.0)) == {"bbox_2d": [10, 21, 30, 40]}
  crop = Picture(
    pixels=np.zeros((100, 100, 3), np.uint8), source=0, box=Box(200.0, 100.0, 300.0, 200.0)
  )
  # (210 - 200) / 100 of 80 is 8; image 1 is the whole picture.
  told = puzzle.pointed(sight(crop), Box(210.0, 150.0, 225.0, 175.0), 2)
  assert told == {"bbox_2d": [8, 40, 20, 60], "image": 2}


def test_boxes_stay_inside_and_are_never_too_small_for_a_tool():
  assert puzzle.pointed(sight(), Box(-8.0, 390.0, 4.0, 420.0)) == {"bbox_2d": [0, 38, 2, 40]}
  assert puzzle.pointed(sight(), Box(597.0, 1.0, 599.0, 3.0)) == {"bbox_2d": [58, 0, 60, 2]}


def test_a_careless_box_holds_the_box_and_little_more():
  box, boxes = Box(10.0, 20.0, 30.0, 40.0), []
  for seed in range(20):
    boxes.append(puzzle.around(np.random.default_rng(seed), box, 3.0))
    assert boxes[-1].holds(box) and Box(7.0, 17.0, 33.0, 43.0).holds(boxes[-1])
  assert len(set(boxes)) == 20


def test_what_a_tool_said_or_did_not_say():
  result = ToolResult(text="Mask 2: 1,234 pixels\nShape: star; perimeter 5")
  assert puzzle.said(r"^Shape: (\w+)", result) == "star"
  assert puzzle.said(r"^Colour: (\w+)", result) is None


def test_no_picture_is_in_two_splits():
  splits = [puzzle.materials(split) for split in pictures.SPLITS]
  sources = [{p.source for p in (*m.photos, *m.shapes, *m.things)} for m in splits]
  assert all(a.isdisjoint(b) for i, a in enumerate(sources) for b in sources[:i])
  # 10 shapes in 6 colours, and no digits.
  assert [len(m.shapes) for m in splits] == [60] * 3
  with pytest.raises(ValueError, match="split 'valid' must be one of"):
    puzzle.materials("valid")
