"""Values are frozen and complete; the few that compute compute what they say."""

import dataclasses
import math

import numpy as np
import pytest

from pixelis_jax.types import (
  Box,
  Generate,
  Reward,
  Segment,
  Status,
  Step,
  ToolCall,
  ToolResult,
  Trajectory,
  Video,
  content_key,
)
from tests import fakes


def test_values_are_frozen_keyword_only_and_compared_by_identity():
  result = ToolResult(text="seen")
  with pytest.raises(dataclasses.FrozenInstanceError):
    result.text = "other"
  with pytest.raises(TypeError):
    ToolResult("seen")
  with pytest.raises(TypeError, match="tokens"):
    Segment()  # Complete when built: what has no default must be given.
  assert not hasattr(result, "__dict__")
  # Fields are arrays: field-wise equality would have no truth value.
  assert result == result and result != ToolResult(text="seen")


@pytest.mark.parametrize("corners", [(2, 0, 2, 4), (0, 4, 2, 3), (3, 0, 2, 4), (math.nan, 0, 1, 1)])
def test_a_box_has_an_inside(corners):
  with pytest.raises(ValueError, match="must satisfy x0 < x1 and y0 < y1"):
    Box(*map(float, corners))


def test_box_measures():
  box = Box(1.0, 2.0, 5.0, 4.0)
  assert (box.width, box.height, box.center) == (4.0, 2.0, (3.0, 3.0))
  # Overlap 2 x 1 = 2; union 8 + 8 - 2 = 14. Areas not subtracted would give 2 / 16.
  assert box.iou(Box(3.0, 3.0, 7.0, 5.0)) == pytest.approx(2 / 14)
  assert box.iou(box) == 1.0
  # Apart on both axes: two negative overlaps must not multiply to a positive one.
  assert box.iou(Box(6.0, 5.0, 8.0, 6.0)) == 0.0
  assert box.iou(Box(5.0, 2.0, 6.0, 4.0)) == 0.0  # Half-open: a shared edge is no overlap.


def test_trajectory_counts_failed_and_malformed_calls():
  call = ToolCall(name="zoom_in", arguments={})
  done = fakes.completion("x")
  steps = (
    Step(completion=done, call=call, result=ToolResult(text="a crop")),
    Step(completion=done, call=call, result=ToolResult(text="", error="outside")),
    Step(completion=done, result=ToolResult(text="", error="not JSON")),  # No call came of it.
    Step(completion=done, call=call),  # Asked, but the episode was over.
    Step(completion=done),
  )
  trajectory = Trajectory(task=fakes.task("a"), steps=steps, status=Status.NO_ANSWER, answer=None)
  assert (trajectory.calls, trajectory.errors) == (4, 2)


def test_reward_total_needs_a_weight_for_every_part():
  reward = Reward(task=1.0, format=0.5, curiosity=2.0, coherence=4.0, tool_cost=3.0)
  weights = {"task": 1.0, "format": 0.2, "curiosity": 0.5, "coherence": 0.25, "tool_cost": -0.1}
  weights |= dict.fromkeys(("dynamics", "misuse", "tool_bonus", "call_target", "overlong"), 1.0)
  assert reward.total(weights) == pytest.approx(1.0 + 0.1 + 1.0 + 1.0 - 0.3)
  with pytest.raises(KeyError, match="coherence"):
    reward.total({name: w for name, w in weights.items() if name != "coherence"})


def test_content_key_tells_parts_apart():
  assert content_key("ab", b"c") == content_key(b"ab", "c")
  assert len({content_key("ab", "c"), content_key("a", "bc"), content_key("abc")}) == 3
  assert len(content_key()) == 32 and int(content_key(), 16) >= 0


def test_generate_is_any_function():
  assert isinstance(fakes.scripted(fakes.Bytes(), {}), Generate)


def test_a_box_holds_what_does_not_leave_it():
  box = Box(0.0, 0.0, 10.0, 20.0)
  assert box.holds(box) and box.holds(Box(1.0, 2.0, 3.0, 20.0))
  for edges in ((-1.0, 2.0, 3.0, 4.0), (1.0, -1.0, 3.0, 4.0), (1.0, 2.0, 11.0, 4.0)):
    assert not box.holds(Box(*edges)), edges
  assert not box.holds(Box(1.0, 2.0, 3.0, 21.0))


@pytest.mark.parametrize("times", [[0.0, 0.0], [1.0, 0.5], [-1.0, 0.0], []])
def test_a_video_has_rising_times(times):
  frames = np.zeros((len(times), 4, 4, 3), np.uint8)
  with pytest.raises(ValueError, match=rf"must be {len(times)} >= 1 rising seconds"):
    Video(frames=frames, times=np.array(times, np.float32))
