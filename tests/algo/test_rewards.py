import numpy as np
import pytest

from pixelis_jax.algo import rewards
from pixelis_jax.types import Reward, Status, Step, ToolCall, ToolResult, Trajectory
from tests import fakes


def played(
  answer: str | None = "7",
  *,
  label: str | None = "7",
  calls: int = 0,
  errors: int = 0,
  status: Status = Status.ANSWERED,
  task: str = "a",
) -> Trajectory:
  """`calls` good calls, `errors` malformed ones (no call, a result that says so), the answer."""
  good = Step(
    completion=fakes.completion("zoom"),
    call=ToolCall(name="zoom_in", arguments={}),
    result=ToolResult(text="here"),
  )
  bad = Step(completion=fakes.completion("zoo"), result=ToolResult(text="", error="malformed"))
  return Trajectory(
    task=fakes.task(task, answer=label),
    steps=(*[good] * calls, *[bad] * errors, Step(completion=fakes.completion("7"))),
    status=status,
    answer=answer,
  )


@pytest.mark.parametrize(
  ("answer", "expected"), [("7.0", 1.0), ("seven", 1.0), ("70", 0.0), (None, 0.0), ("", 0.0)]
)
def test_task_reward_compares_meaning(answer, expected):
  assert rewards.task_reward(played(answer)) == expected


@pytest.mark.parametrize("label", [None, "", " . "])
def test_a_task_without_a_label_cannot_be_scored(label):
  """Even where the policy gave no answer: None must never meet None and earn 1."""
  for answer in (None, "", "7"):
    with pytest.raises(ValueError, match="task 'a' cannot be scored against"):
      rewards.task_reward(played(answer, label=label))


def test_agreement_reads_the_vote_and_never_the_label():
  assert rewards.agreement(played("3", label="7"), "3") == 1.0
  assert rewards.agreement(played("7", label="7"), "3") == 0.0
  assert rewards.agreement(played("3", label=None), "3") == 1.0


def test_score_takes_its_target_from_the_caller_only():
  (reward,) = rewards.score([played("7", label="7")], curiosity="off", target="3")
  assert reward.task == 0.0
  with pytest.raises(ValueError, match="cannot be scored against None"):
    rewards.score([played("7", label="7")], curiosity="off", target=None)


@pytest.mark.parametrize(
  ("trajectory", "expected"),
  [
    (played(calls=2), 1.0),
    (played(answer="wrong but boxed"), 1.0),
    (played(calls=1, errors=1), 0.0),
    (played(answer=""), 0.0),
    (played(answer=None, status=Status.NO_ANSWER), 0.0),
    (played(status=Status.OUT_OF_TOKENS), 0.0),
  ],
)
def test_format_reward(trajectory, expected):
  assert rewards.format_reward(trajectory) == expected


def test_score_fills_every_part_in_its_own_units():
  group = [played("7", calls=2), played("1", errors=1)]
  first, second = rewards.score(group, curiosity="paper", target="7")
  # Half the group looks, above 0.3: no bonus. Two calls, one over the free one: -0.05.
  assert (first.task, first.format, first.curiosity, first.tool_cost) == (1.0, 1.0, -0.05, 2.0)
  # The malformed call is a call made, not a look.
  assert (second.task, second.format, second.curiosity, second.tool_cost) == (0.0, 0.0, 0.0, 1.0)
  assert first.coherence == second.coherence == 0.0


def test_curiosity_off_pays_nothing():
  (reward,) = rewards.score([played(calls=5)], curiosity="off", target="7")
  assert reward.curiosity == 0.0


def test_a_group_is_samples_of_one_task():
  with pytest.raises(
    ValueError, match=r"samples of one task, got 2 trajectories of tasks \['a', 'b'\]"
  ):
    rewards.score([played(), played(task="b")], curiosity="off", target="7")
  with pytest.raises(ValueError, match="samples of one task, got 0"):
    rewards.score([], curiosity="off", target="7")


def test_an_unknown_curiosity_names_the_known_ones():
  with pytest.raises(
    ValueError, match=r"curiosity 'papre' must be one of \['off', 'paper', 'release'\]"
  ):
    rewards.score([played()], curiosity="papre", target="7")


def test_totals_has_a_row_for_each_question():
  weights = dict(task=1.0, format=0.5, curiosity=1.0, coherence=0.0, tool_cost=-0.1)
  parts = [Reward(task=1.0), Reward(format=1.0), Reward(tool_cost=2.0), Reward()]
  table = rewards.totals(parts, weights=weights, group=2)
  assert table.dtype == np.float32
  # -0.1 * 2 = -0.2; columns first would put 0.5 below 1.
  np.testing.assert_array_equal(table, np.float32([[1.0, 0.5], [-0.2, 0.0]]))
  with pytest.raises(ValueError, match="4 rewards do not fill groups of 3"):
    rewards.totals(parts, weights=weights, group=3)
