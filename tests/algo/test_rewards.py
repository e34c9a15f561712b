from types import SimpleNamespace

import numpy as np
import pytest

from pixelis_jax.algo import rewards
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Box, Reward, Status, Step, ToolCall, ToolResult, Trajectory
from tests import fakes


def played(
  answer: str | None = "7",
  *,
  label: str | None = "7",
  calls: int = 0,
  errors: int = 0,
  at: list[int] | None = None,
  status: Status = Status.ANSWERED,
  task: str = "a",
) -> Trajectory:
  """`calls` good calls, `errors` malformed ones (no call, a result that says so), the answer.

  `at` is one more call's box.
  """
  call = lambda **arguments: Step(
    completion=fakes.completion("zoom"),
    call=ToolCall(name="zoom_in", arguments=arguments),
    result=ToolResult(text="here"),
  )
  good = call()
  bad = Step(completion=fakes.completion("zoo"), result=ToolResult(text="", error="malformed"))
  return Trajectory(
    task=fakes.task(task, answer=label),
    steps=(
      *[good] * calls,
      *([] if at is None else [call(bbox_2d=at)]),
      *[bad] * errors,
      Step(completion=fakes.completion("7")),
    ),
    status=status,
    answer=answer,
  )


def score(group, *, target="7", embeddings=None, surprises=None, **settings):
  """Rewards with everything off but what is given; the policy counts source pixels."""
  off = {"curiosity": "off", "verifier": "equal", "call_target": 0}
  c = SimpleNamespace(**off | settings, overlong={"tokens": 99, "buffer": 0})
  tools = Toolbox(("zoom_in",), shown_size=lambda height, width: (height, width))
  how = {"frame": tools.frame, "embeddings": embeddings, "surprises": surprises}
  return rewards.score(group, c, target=target, **how)


@pytest.mark.parametrize(
  ("answer", "expected"), [("7.0", 1.0), ("seven", 1.0), ("70", 0.0), (None, 0.0), ("", 0.0)]
)
def test_agreement_compares_meaning(answer, expected):
  assert rewards.agreement(played(answer), "7") == expected


def test_agreement_is_by_the_named_rule():
  # 8 is 14% off 7: (cos(pi * (1/7 - 0.05) / 0.15) + 1) / 2 = 0.319; equal it is not.
  half = 0.5 * (np.cos(np.pi * (1 / 7 - 0.05) / 0.15) + 1)
  found = rewards.agreement(played("8"), "7", verifier="tolerance")
  assert found == pytest.approx(half) and rewards.agreement(played("8"), "7") == 0.0
  with pytest.raises(ValueError, match="verifier 'close' must be one of"):
    rewards.agreement(played("8"), "7", verifier="close")


@pytest.mark.parametrize("label", [None, "", " . "])
def test_a_task_without_a_label_cannot_be_scored(label):
  """Even where the policy gave no answer: None must never meet None and earn 1."""
  for answer in (None, "", "7"):
    with pytest.raises(ValueError, match="task 'a' cannot be scored against"):
      rewards.agreement(played(answer, label=label), label)


def test_agreement_reads_the_vote_and_never_the_label():
  assert rewards.agreement(played("3", label="7"), "3") == 1.0
  assert rewards.agreement(played("7", label="7"), "3") == 0.0
  assert rewards.agreement(played("3", label=None), "3") == 1.0


def test_score_takes_its_target_from_the_caller_only():
  (reward,) = score([played("7", label="7")], target="3")
  assert reward.task == 0.0
  with pytest.raises(ValueError, match="cannot be scored against None"):
    score([played("7", label="7")], target=None)


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
  look = [played("7", calls=2), played("1", errors=1)]
  first, second = score(look, curiosity="paper", call_target=1)
  # Half the group looks, above 0.3: no bonus. Two calls, one over the free one: -0.05.
  assert (first.task, first.format, first.curiosity, first.tool_cost) == (1.0, 1.0, -0.05, 2.0)
  # The malformed call is a call made, not a look.
  assert (second.task, second.format, second.curiosity, second.tool_cost) == (0.0, 0.0, 0.0, 1.0)
  # The same call twice; two calls where one is the target; the first is right and looked.
  assert (first.coherence, first.call_target, first.tool_bonus) == (-0.5, -1.0, 1.0)
  assert (second.coherence, second.call_target, second.tool_bonus) == (0.0, 0.0, 0.0)
  assert first.misuse == second.misuse == first.overlong == second.overlong == 0.0
  (outside,) = score([played("7", at=[0, 0, 99, 1])])
  assert outside.misuse == 0.5
  # Steps at 60 degrees go on: +0.3, and -0.5 for the repeated call: their mean.
  turned = np.float32([[1, 0], [0.5, 0.75**0.5], [-0.5, 0.75**0.5]])
  (reward,) = score([played("7", calls=2)], embeddings=[turned])
  assert reward.coherence == pytest.approx(-0.1)
  # Surprise is what a run's forward model said; without one it is nothing.
  assert first.dynamics == 0.0
  assert [r.dynamics for r in score(look, surprises=[0.5, 2.0])] == [0.5, 2.0]


def test_looking_is_paid_only_where_it_helped():
  group = [played("7", calls=1), played("7"), played("1", calls=1), played("7", errors=1)]
  # Right and looked; right without; looked in vain; no call succeeded.
  assert [r.tool_bonus for r in score(group)] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
  ("calls", "target", "expected"),
  [(2, 2, 0.0), (1, 2, -0.5), (3, 2, -0.5), (5, 2, -1.0), (0, 0, 0.0), (1, 0, -1.0), (0, 3, -1.0)],
)
def test_calls_have_a_target(calls, target, expected):
  assert rewards.call_target(played(calls=calls), target) == expected


def test_evidence_is_a_target():
  box = Box(0.0, 0.0, 1.0, 1.0)
  task = fakes.task("a", boxes=[box, box])
  episode = Trajectory(task=task, steps=played(calls=1).steps, status=Status.ANSWERED, answer="7")
  assert rewards.call_target(episode, -1) == -0.5  # One of two.


@pytest.mark.parametrize(
  ("tokens", "buffer", "expected"),
  [
    # 9 tokens: two calls of "zoom" and the answer "7". From 4 to 12 it falls: 5 / 8.
    (12, 8, -0.625),
    (12, 3, 0.0),
    (8, 4, -1.0),  # Beyond the end it stays at -1: not -5/4.
    (9, 9, -1.0),
    (4, 0, 0.0),  # No buffer.
  ],
)
def test_the_last_tokens_cost(tokens, buffer, expected):
  found = rewards.overlong(played(calls=2), tokens=tokens, buffer=buffer)
  assert found == pytest.approx(expected)


def test_a_buffer_fits_into_what_there_is():
  with pytest.raises(ValueError, match=r"buffer 9 must lie in \[0, tokens\] = \[0, 8\]"):
    rewards.overlong(played(), tokens=8, buffer=9)


def test_curiosity_off_pays_nothing():
  (reward,) = score([played(calls=5)])
  assert reward.curiosity == 0.0


def test_a_group_is_samples_of_one_task():
  with pytest.raises(
    ValueError, match=r"samples of one task, got 2 trajectories of tasks \['a', 'b'\]"
  ):
    score([played(), played(task="b")])
  with pytest.raises(ValueError, match="samples of one task, got 0"):
    score([])


def test_an_unknown_curiosity_names_the_known_ones():
  with pytest.raises(
    ValueError, match=r"curiosity 'papre' must be one of \['off', 'paper', 'release'\]"
  ):
    score([played()], curiosity="papre")


def test_totals_has_a_row_for_each_question():
  weights = dict(task=1.0, format=0.5, curiosity=1.0, coherence=0.0, tool_cost=-0.1)
  weights |= dict.fromkeys(("dynamics", "misuse", "tool_bonus", "call_target", "overlong"), 0.0)
  parts = [Reward(task=1.0), Reward(format=1.0), Reward(tool_cost=2.0), Reward()]
  table = rewards.totals(parts, weights=weights, group=2)
  assert table.dtype == np.float32
  # -0.1 * 2 = -0.2; columns first would put 0.5 below 1.
  np.testing.assert_array_equal(table, np.float32([[1.0, 0.5], [-0.2, 0.0]]))
  with pytest.raises(ValueError, match="4 rewards do not fill groups of 3"):
    rewards.totals(parts, weights=weights, group=3)
