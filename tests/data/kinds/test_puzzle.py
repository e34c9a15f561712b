import numpy as np
import pytest

from pixelis_jax.data import pictures
from pixelis_jax.data.kinds import puzzle
from pixelis_jax.types import Box, ToolResult


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
