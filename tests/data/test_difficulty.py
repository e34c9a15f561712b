import dataclasses

import numpy as np
import pytest

from pixelis_jax.data.demos import call_text
from pixelis_jax.data.difficulty import COMPLEXITY, LEVELS, PARTS, difficulty, levels, parts, staged
from pixelis_jax.tools import TOOLS
from pixelis_jax.types import Box, Demo, DemoTurn, Mask, Picture, Task, ToolCall, ToolResult, Video


def call(name, *, supervised=True, images=(), masks=()):
  text = call_text(ToolCall(name=name, arguments={}))
  result = ToolResult(text="", images=images, masks=masks)
  return DemoTurn(text=text, result=result, supervised=supervised)


def crop(box, frame=None):
  return Picture(pixels=np.zeros((4, 4, 3), np.uint8), source=0, box=box, frame=frame)


def demo(*turns, words=4, boxes=()):
  """Asks of an image of 64 x 64 and a film of 32 x 32."""
  task = Task(
    id="t",
    images=(np.zeros((64, 64, 3), np.uint8),),
    videos=(Video(frames=np.zeros((2, 32, 32, 3), np.uint8), times=np.array([0, 1], np.float32)),),
    question=" ".join(["word"] * words),
    answer="7",
    boxes=boxes,
  )
  return Demo(task=task, turns=(*turns, DemoTurn(text="7", result=None)))


def test_it_is_the_weighed_sum_of_its_parts():
  sixteenth = Box(0.0, 0.0, 16.0, 16.0)
  two = demo(call("zoom_in", images=(crop(sixteenth),)), call("read_text"), words=10)
  # ln 3 / ln 16; (2 + 1) / 2 / 3 and one more tool; a side of 16 in 64 is 2 halvings of 5; 10 / 40.
  expected = {"steps": 0.39624, "tools": 0.7, "size": 0.4, "correction": 0.0, "question": 0.25}
  assert parts(two) == pytest.approx(expected, abs=1e-5)
  # 0.3 * 0.39624 + 0.25 * 0.7 + 0.2 * 0.4 + 0.1 * 0.25
  assert difficulty(two) == 0.3989
  assert sum(PARTS.values()) == pytest.approx(1.0)


def test_a_demonstration_without_calls_is_as_hard_as_its_question():
  assert parts(demo()) == {
    "steps": 0.0,
    "tools": 0.0,
    "size": 0.0,
    "correction": 0.0,
    "question": 0.1,
  }
  assert difficulty(demo()) == 0.01


def test_no_part_is_above_one():
  speck = crop(Box(5.0, 5.0, 5.5, 5.5))  # 7 halvings.
  turns = [
    call(name, images=(speck,), supervised=i > 0) for i, name in enumerate([*COMPLEXITY] * 4)
  ]
  assert difficulty(demo(*turns, words=100)) == 1.0


def test_more_tools_are_harder_than_one_tool_as_often():
  """One call uses as many tools as there are calls: torch's share made that the most varied."""
  once, twice = demo(call("zoom_in")), demo(call("zoom_in"), call("zoom_in"))
  both = demo(call("zoom_in"), call("get_properties"))  # Of the same complexity.
  tools = [parts(one)["tools"] for one in (once, twice, both)]
  assert tools == pytest.approx([2 / 3, 2 / 3, 2 / 3 + 0.2])


def test_what_is_small_in_its_image_or_frame_is_harder():
  box = Box(8.0, 8.0, 16.0, 16.0)  # 3 halvings in the image, 2 in a frame.
  size = lambda *turns, **more: parts(demo(*turns, **more))["size"]
  assert size(boxes=(box,)) == pytest.approx(0.6)
  assert size(call("zoom_in", images=(crop(box),))) == pytest.approx(0.6)
  assert size(call("select_frames", images=(crop(box, frame=1),))) == pytest.approx(0.4)
  mask = Mask(inside=np.ones((8, 8), bool), source=0, box=box)
  assert size(call("segment_object_at", masks=(mask,))) == pytest.approx(0.6)
  # The smallest counts, and a wrong look says nothing of what is looked for.
  assert size(call("zoom_in", images=(crop(Box(0.0, 0.0, 64.0, 64.0)),)), boxes=(box,)) == 0.6
  assert size(call("zoom_in", images=(crop(box),), supervised=False)) == 0.0


def test_a_correction_is_harder_than_what_it_corrects():
  look = call("zoom_in")
  wrong = dataclasses.replace(look, supervised=False)
  # One call more, ln 3 / ln 16 in place of ln 2 / ln 16, and 0.15.
  more = 0.3 * (np.log(3) - np.log(2)) / np.log(16) + 0.15
  assert difficulty(demo(wrong, look)) - difficulty(demo(look)) == pytest.approx(more, abs=1e-4)


def test_every_tool_has_a_complexity():
  assert COMPLEXITY.keys() == {tool.name for tool in TOOLS["qwen"].values()}
  other = demo(DemoTurn(text="<tool_call>\n{", result=ToolResult(text="")))
  assert parts(other)["tools"] == parts(demo(call("no_such_tool")))["tools"] == 1.0


def test_levels_are_thirds_of_what_is_sampled():
  scores = np.array([0.5, 0.1, 0.9, 0.2, 0.8, 0.6])
  found = levels(scores, np.ones(6))
  # In the order of the scores 0.1 0.2 | 0.5 0.6 | 0.8 0.9.
  assert [LEVELS[i] for i in found] == ["medium", "simple", "hard", "simple", "hard", "medium"]
  # Thirds of the four that are sampled, 0.1 | 0.2 0.8 | 0.9: by fixed numbers 0.2 were simple.
  weights = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
  assert levels(scores, weights)[weights > 0].tolist() == [0, 2, 1, 1]
  assert levels(scores, weights)[0] == 1


def test_what_is_equally_hard_is_in_one_level():
  # Ranks 0 to 4 of 6 are equal: their middle is 2.5 / 6.
  assert levels(np.array([0.3] * 5 + [0.4]), np.ones(6)).tolist() == [1] * 5 + [2]
  assert levels(np.full(7, 0.2), np.ones(7)).tolist() == [1] * 7


def test_a_stage_gives_each_level_its_share():
  of, weights = np.array([0, 0, 1, 1, 2]), np.array([1.0, 1.5, 0.0, 2.0, 1.5])
  shares = {"simple": 0.5, "medium": 0.25, "hard": 0.25}
  # Within a level as before: 1 to 1.5 of a half.
  np.testing.assert_allclose(staged(weights, of, shares), [0.2, 0.3, 0.0, 0.25, 0.25])
  with pytest.raises(
    ValueError, match=r"no record is hard, of {'simple': 2, 'medium': 1, 'hard': 0"
  ):
    staged(np.array([1.0, 1.5, 0.0, 2.0, 0.0]), of, shares)
  none = {"simple": 1.0, "medium": 0.0, "hard": 0.0}
  assert staged(np.array([1.0, 1.0, 0.0, 2.0, 0.0]), of, none).tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
