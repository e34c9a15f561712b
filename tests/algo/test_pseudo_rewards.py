import dataclasses
import math

import numpy as np
import pytest

from pixelis_jax.algo import voting
from pixelis_jax.algo.pseudo_rewards import RULES, PseudoReward, by_label, pseudo_rewards
from pixelis_jax.types import Ballot, Status, Step, Trajectory, Vote
from tests import fakes


def sample(answer: str | None, text: str = "same", *, nats: float = 0.0) -> Trajectory:
  """One turn of these words, each token of which has this entropy."""
  said = fakes.completion(text)
  said = dataclasses.replace(said, entropies=np.full(said.tokens.shape, nats, np.float32))
  return Trajectory(
    task=fakes.task("t"), steps=(Step(completion=said),), status=Status.ANSWERED, answer=answer
  )


def vote(*answers: str | None) -> Vote:
  return voting.majority([Ballot(answer=a, weight=1.0, view="identity") for a in answers])


def earned(rule: str, samples: list[Trajectory], by: Vote, **constants: float) -> list[float]:
  return pseudo_rewards(samples, by, PseudoReward(rule=rule, **constants))


def test_agreement_pays_the_winners_answer_by_meaning():
  samples = [sample("1/2"), sample("0.5"), sample("2"), sample(None)]
  assert earned("agreement", samples, vote("50%", "0.5", "2")) == [1.0, 1.0, 0.0, 0.0]


def test_a_vote_is_compared_with_the_label():
  """Voted 2, true 1/2: the first and the third are paid wrongly, the second is wrong either way."""
  got = by_label(["2", "7", "0.5", None], "2", "1/2", verifier="equal")
  assert got == {
    "label_accuracy": 0.0,
    "reward_accuracy": 0.5,  # "7" and no answer: neither right nor paid.
    "ground_truth_ratio": 0.25,
    "pass@4": 1.0,
  }
  # Nobody is right: a wrong vote then pays those who said it, a vote for nothing nobody.
  assert by_label(["7", "7"], "7", "1", verifier="equal")["reward_accuracy"] == 0.0
  nothing = by_label(["7", "7"], None, "1", verifier="equal")
  assert (nothing["reward_accuracy"], nothing["pass@2"]) == (1.0, 0.0)
  right = by_label(["1", "2"], "1.0", "1", verifier="equal")
  assert (right["label_accuracy"], right["reward_accuracy"]) == (1.0, 1.0)


def test_soft_pays_shares_less_the_entropy_of_the_vote():
  """By agreement the second would earn as little as the third, which nobody voted for."""
  by = vote("a", "a", "b", None)  # Shares 1/2 and 1/4: of what was answered 2/3 and 1/3.
  spread = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2)
  got = earned("soft", [sample("a"), sample("b"), sample("c"), sample(None)], by)
  assert got == pytest.approx([x - 0.75 * spread for x in (0.5, 0.25, 0.0, 0.0)])
  assert earned("soft", [sample("a")], by, entropy=0.0) == pytest.approx([0.5])


def test_soft_takes_nothing_from_a_unanimous_vote():
  # One answer has no entropy, and the logarithm of its number is 0.
  assert earned("soft", [sample("a"), sample("b")], vote("a", "a")) == [1.0, 0.0]


def test_scrl_rewards_what_leads_and_punishes_what_is_rare_and_unsure():
  by = vote(*"aaaaaabbbc")  # 0.6, 0.3, 0.1
  samples = [sample("a", nats=1.0), sample("b", nats=1.0), sample("c", nats=3.0), sample(None)]
  # Mean entropies 1, 1, 3 and 0: 1.25 on average. a: 0.6, and 0.1 for each nat it is surer; b is
  # neither trusted nor rare; c: 0.1 - 0.125, and less for 1.75 nats above the average.
  expected = [0.6 + 0.025, 0.025, -0.025 - 0.175, -1.0]
  assert earned("scrl", samples, by) == pytest.approx(expected)


def test_scrl_spares_what_is_rare_but_sure():
  by = vote(*"aaaaaabbbc")
  got = earned("scrl", [sample("a", nats=2.0), sample("c", nats=1.0)], by)
  # It is surer than the average of 1.5, by half a nat: the negative share is not taken off.
  assert got[1] == pytest.approx(0.05)


@pytest.mark.parametrize(
  ("answers", "trusted"),
  [
    ("aaabbccd", True),  # 0.375 leads by 0.125: in binary exactly, and the margin must be more.
    ("aaabcdef", True),
    ("aabcdefg", False),
  ],
)
def test_scrl_trusts_by_share_and_margin(answers, trusted):
  c = PseudoReward(rule="scrl", margin=0.124)
  assert c.trusts(vote(*answers)) == trusted
  assert not PseudoReward(rule="scrl").trusts(vote(*"aaabbccd"))
  assert PseudoReward(rule="agreement").trusts(vote(*answers))


def test_scrl_rewards_nothing_where_nothing_leads():
  # "a" is the answer of two of eight votes: neither trusted nor rare. "b" is rare, and as unsure.
  assert earned("scrl", [sample("a"), sample("b")], vote(*"aabcdefg")) == [0.0, 0.0]
  # Under 1/8: five of 16 lead by 4/16 but have less than 3/8; the others lack 1/16.
  got = earned("scrl", [sample("a"), sample("b")], vote(*"aaaaabcdefghijkl"))
  assert got == pytest.approx([0.0, -1 / 16])


def test_evol_pays_novelty_on_either_side_of_the_vote():
  """Of three right samples two say the same; a wrong one that differs is worse than none."""
  samples = [sample("a", "same words"), sample("a", "same words"), sample("a", "other text")]
  samples += [sample("b", "same words"), sample("b", "1234567"), sample(None, "?")]
  got = earned("evol", samples, vote("a", "a", "b"))
  # The twins have a likeness of 1, the third is the least alike: 1/2, 1/2 and 1.
  assert got[:3] == pytest.approx([0.5, 0.5, 1.0])
  # The two others are as unlike each other; one says what the right ones say: -1 and -1/2.
  assert got[3:5] == pytest.approx([-1.0, -0.5])
  assert got[5] == -1.0


def test_evol_of_samples_that_are_all_alike_is_agreement():
  # Nothing to stretch: the middle of either range.
  got = earned("evol", [sample("a"), sample("a"), sample("b"), sample("b")], vote("a"))
  assert got == [0.75, 0.75, -0.75, -0.75]


def test_likeness_hears_order():
  """Equal letters in another order: counts of tokens alone would find no novelty at all."""
  samples = [sample("a", "abcdef"), sample("a", "abcdef"), sample("a", "fedcba")]
  assert earned("evol", samples, vote("a")) == pytest.approx([0.5, 0.5, 1.0])


@pytest.mark.parametrize("rule", RULES)
def test_a_verifier_says_what_agrees(rule):
  """Within 5% of the winner; by `equal` the second would be a stranger to the vote."""
  by = vote("100", "100", "7")
  samples = [sample("100"), sample("103"), sample("7")]
  near = pseudo_rewards(samples, by, PseudoReward(rule=rule), verifier="relaxed")
  assert near[0] == near[1] > near[2]
  exact = pseudo_rewards(samples, by, PseudoReward(rule=rule))
  assert exact[0] > exact[1]


def test_a_vote_without_an_answer_pays_nobody():
  with pytest.raises(ValueError, match="behind the gate"):
    earned("agreement", [sample("a")], vote(None))


@pytest.mark.parametrize(
  "wrong",
  [dict(rule="majority"), dict(share=1.5), dict(rare=-0.1), dict(entropy=-1.0)],
)
def test_wrong_constants_are_refused(wrong):
  with pytest.raises(ValueError, match="must"):
    PseudoReward(**wrong)
