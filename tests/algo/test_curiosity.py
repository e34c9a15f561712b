import pytest

from pixelis_jax.algo.curiosity import PRESETS, curiosity_bonus
from pixelis_jax.types import Status, Step, ToolCall, ToolResult, Trajectory
from tests import fakes


def calling(*errors: str | None) -> Trajectory:
  """One call for each argument; a text is the error it met."""
  steps = [
    Step(
      completion=fakes.completion("zoom"),
      call=ToolCall(name="zoom_in", arguments={}),
      result=ToolResult(text="", error=error),
    )
    for error in errors
  ]
  return Trajectory(task=fakes.task("a"), steps=tuple(steps), status=Status.ANSWERED, answer="7")


@pytest.mark.parametrize(
  ("preset", "expected"),
  [
    # 0.5 * (0.3 - 1/8)
    ("paper", 0.0875),
    # 0.5 * (0.3 - 1/8) * 0.25 / (1/8): the release's rescaling doubles it here.
    ("release", 0.175),
  ],
)
def test_the_only_one_of_eight_to_look_is_paid(preset, expected):
  group = [calling(None)] + [calling()] * 7
  bonus = curiosity_bonus(group, PRESETS[preset])
  assert bonus[0] == pytest.approx(expected, abs=1e-12)
  assert bonus[1:] == [0.0] * 7


@pytest.mark.parametrize("preset", PRESETS)
def test_nobody_looks_nobody_is_paid(preset):
  """The release divides by the looking rate, which is zero here."""
  assert curiosity_bonus([calling()] * 8, PRESETS[preset]) == [0.0] * 8


@pytest.mark.parametrize("preset", PRESETS)
def test_no_bonus_at_or_above_the_rate_and_never_a_negative_one(preset):
  # 3 of 8 look: 0.375 > 0.3. Without max(., 0) the bonus would be -0.0375.
  assert curiosity_bonus([calling(None)] * 3 + [calling()] * 5, PRESETS[preset]) == [0.0] * 8


@pytest.mark.parametrize("preset", PRESETS)
def test_calls_beyond_the_first_cost_and_no_call_is_no_credit(preset):
  group = [calling(None, None, None)] * 2 + [calling()] * 2
  # 2 of 4 look, so no bonus: 0.05 * min(1 - 3, 0) = -0.1. Without min, no call would earn +0.05.
  assert curiosity_bonus(group, PRESETS[preset]) == pytest.approx([-0.1, -0.1, 0.0, 0.0], abs=1e-12)


def test_a_failed_call_is_not_a_look_but_costs():
  group = [calling("no such box", "no such box")] + [calling()] * 7
  assert curiosity_bonus(group, PRESETS["paper"]) == pytest.approx([-0.05] + [0.0] * 7, abs=1e-12)
  # One success among failures is a look: 0.0875 - 0.05.
  group = [calling("no such box", None)] + [calling()] * 7
  assert curiosity_bonus(group, PRESETS["paper"])[0] == pytest.approx(0.0375, abs=1e-12)
