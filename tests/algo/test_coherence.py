import numpy as np
import pytest

from pixelis_jax.algo.coherence import coherence
from pixelis_jax.types import Status, Step, ToolCall, ToolResult, Trajectory
from tests import fakes

SEGMENT, AT = (
  ("segment_object_at", {"point_2d": [3, 4]}),
  ("segment_object_at", {"point_2d": [5, 6]}),
)
MEASURE, READ, ZOOM = ("get_properties", {"mask": 1}), ("read_text", {}), ("zoom_in", {"image": 1})


def episode(*calls, status: Status = Status.NO_ANSWER) -> Trajectory:
  steps = [
    Step(
      completion=fakes.completion("x"),
      call=ToolCall(name=name, arguments=arguments),
      result=ToolResult(text="seen"),
    )
    for name, arguments in calls
  ]
  end = Step(completion=fakes.completion("y"))
  return Trajectory(task=fakes.task("a"), steps=(*steps, end), status=status, answer=None)


@pytest.mark.parametrize(
  ("calls", "expected"),
  [
    ([], 0.0),
    ([READ], 0.0),
    ([SEGMENT, MEASURE], 0.2),
    # Good, nothing (the torch project takes 0.3 off here), good: comparing two objects.
    ([SEGMENT, MEASURE, AT, MEASURE], 0.2),
    ([ZOOM, ZOOM], -0.5),
    # The same operation on something else is a detour, not a repetition.
    ([ZOOM, ("zoom_in", {"image": 2})], -0.3),
    ([("image_zoom_in_tool", {}), ("image_zoom_in_tool", {"label": "a"})], -0.3),
    ([ZOOM, READ], 0.2),
    # 0.2 and -0.5: the mean, not the sum.
    ([ZOOM, READ, READ], -0.15),
    # What was cut out before is cut out again: 0.2, and -0.3 once.
    ([SEGMENT, MEASURE, SEGMENT], -0.05),
    # Twice in a row is a repetition, and no second fault.
    ([SEGMENT, SEGMENT], -0.5),
  ],
)
def test_rules_of_calls(calls, expected):
  assert coherence(episode(*calls), None) == pytest.approx(expected, abs=1e-12)


def test_an_answer_follows_from_what_was_read():
  # 0.2 for reading after zooming, 0.2 for answering; without an answer the first alone.
  assert coherence(episode(READ, status=Status.ANSWERED), None) == pytest.approx(0.2)
  assert coherence(episode(ZOOM, status=Status.ANSWERED), None) == 0.0


@pytest.mark.parametrize(
  ("degrees", "expected"),
  [(0, -0.2), (35, 0.0), (60, 0.3), (80, 0.0), (90, -0.3), (180, -0.3)],
)
def test_embeddings_should_go_on_without_standing_still(degrees, expected):
  # cos 35 = 0.82 and cos 80 = 0.17 are neither. Lengths do not count: dot products would be 6x.
  angle = np.deg2rad(degrees)
  embeddings = np.float32([[2, 0], [3 * np.cos(angle), 3 * np.sin(angle)]])
  assert coherence(episode(), embeddings) == pytest.approx(expected, abs=1e-6)


def test_embeddings_are_one_more_thing_said():
  # Neighbours at 60 degrees, though first and last are 120 apart: 0.3, with 0.2 of the call.
  turned = np.float32([[np.cos(a), np.sin(a)] for a in np.deg2rad([0, 60, 120])])
  assert coherence(episode(SEGMENT, MEASURE), turned) == pytest.approx(0.25, abs=1e-6)
  assert coherence(episode(SEGMENT, MEASURE), turned[:1]) == pytest.approx(0.2, abs=1e-6)
