import dataclasses
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelis_jax.algo import voting
from pixelis_jax.algo.voting import AnswerPrior
from pixelis_jax.types import Ballot

ANSWERS = st.sampled_from(["1", "2", "1/2", "0.5", "cat", "", None])
TABLES = st.lists(
  st.builds(Ballot, answer=ANSWERS, weight=st.floats(0.0, 10.0), view=st.just("identity")),
  max_size=12,
)


def ballots(*pairs: tuple[str | None, float]) -> list[Ballot]:
  return [Ballot(answer=answer, weight=weight, view="identity") for answer, weight in pairs]


def heads(**counts: int) -> list[Ballot]:
  """`heads(a=2)` is two ballots for "a" of weight 1; `none` stands for no answer."""
  return ballots(*[(None if a == "none" else a, 1.0) for a, n in counts.items() for _ in range(n)])


def prior(counts: dict[str, float], smoothing: float = 1.0) -> AnswerPrior:
  return AnswerPrior(counts=counts, smoothing=smoothing)


def test_majority_counts_heads_whatever_their_weight():
  vote = voting.majority(ballots(("1", 0.1), ("1", 0.1), ("2", 100.0), (None, 1.0)))
  # 2 of 4 ballots, the runner-up has 1: margin 1/4. By weight "2" would win.
  assert (vote.answer, vote.share, vote.confidence, vote.margin) == ("1", 0.5, 0.5, 0.25)
  assert vote.counts == {"1": 0.5, "2": 0.25}
  assert len(vote.ballots) == 4


def test_spellings_of_one_answer_do_not_split_the_vote():
  vote = voting.majority(ballots(("1/2", 1.0), ("0.5", 1.0), ("50%", 1.0), ("3", 1.0), ("3", 1.0)))
  # By strings "3" would win with 2 of 5.
  assert (vote.answer, vote.share) == ("0.5", 0.6)
  assert vote.margin == pytest.approx(0.2)


def test_the_strongest_ballot_is_the_requests_own_heaviest_for_what_was_voted():
  cast = ballots(("1", 0.2), ("2", 0.9), ("0.5", 0.4), ("1/2", 0.4), ("0.5", 0.1), (None, 3.0))
  cast.append(dataclasses.replace(cast[2], weight=2.0, view="memory", source="e"))
  vote = voting.entropy_weighted(cast)
  # "0.5" has 2.9 of 7; its heaviest ballot saw nothing here, and of equals the first counts.
  assert (vote.answer, voting.strongest(vote, verifier="equal")) == ("0.5", 2)
  for answer in ("7", None):  # The ballot without an answer is for nothing, not for None.
    other = dataclasses.replace(vote, answer=answer)
    assert voting.strongest(other, verifier="equal") is None
  near = dataclasses.replace(vote, answer="0.97")
  assert voting.strongest(near, verifier="relaxed") == 0  # 1 is within a twentieth of it.


def test_entropy_weighted_adds_weights():
  vote = voting.entropy_weighted(ballots(("1", 1.0), ("1", 1.0), ("2", 5.0), (None, 1.0)))
  # 5 of 8, runner-up 2 of 8.
  assert (vote.answer, vote.share, vote.margin) == ("2", 0.625, 0.375)


@pytest.mark.parametrize("rule", voting.RULES.values(), ids=voting.RULES)
class TestEveryRule:
  def test_unanimous(self, rule):
    vote = rule(heads(a=5), prior({"a": 60.0, "b": 4.0}))
    assert (vote.answer, vote.confidence, vote.margin) == ("a", 1.0, 1.0)
    assert voting.gate(vote, confidence=1.0, margin=1.0)

  @pytest.mark.parametrize("table", [[], ballots((None, 1.0)), ballots(("", 1.0), (None, 2.0))])
  def test_no_answers_abstain(self, rule, table):
    vote = rule(table, AnswerPrior())
    assert (vote.answer, vote.confidence, vote.share, vote.margin) == (None, 0.0, 0.0, 0.0)
    assert not voting.gate(vote, confidence=0.0, margin=0.0)

  def test_missing_answers_lower_the_share_and_never_win(self, rule):
    vote = rule(heads(none=6, a=3, b=1), AnswerPrior())
    # 3 of 10, not 3 of 4; None has most and does not win.
    assert vote.answer == "a"
    assert vote.share == pytest.approx(0.3)
    assert vote.margin == pytest.approx(0.2)

  def test_a_tie_is_deterministic_and_never_learned_from(self, rule):
    for table in (heads(b=2, a=2, c=1), heads(c=1, a=2, b=2)):
      vote = rule(table, AnswerPrior())
      assert (vote.answer, vote.margin) == ("a", 0.0)
      assert not voting.gate(vote, confidence=0.0, margin=0.0)

  @settings(deadline=None, max_examples=50)
  @given(TABLES, st.randoms(use_true_random=False))
  def test_order_does_not_matter_and_shares_are_shares(self, rule, table, shuffler: random.Random):
    state = prior({"1": 3.0, "cat": 1.0})
    vote = rule(table, state)
    again = rule(shuffler.sample(table, len(table)), state)
    assert (again.answer, again.margin) == (vote.answer, pytest.approx(vote.margin, abs=1e-9))
    assert math.fsum(vote.counts.values()) <= 1 + 1e-9
    assert 0 <= vote.margin <= vote.share <= 1 + 1e-9
    assert 0 <= vote.confidence <= vote.share

  @settings(deadline=None, max_examples=50)
  @given(TABLES.filter(bool), st.data())
  def test_confidence_never_falls_as_agreement_grows(self, rule, table, data):
    """A voter changes to the winner's side. The torch project's rule lost 0.1 by it."""
    state = prior({"1": 3.0, "cat": 1.0})
    before = rule(table, state)
    if before.answer is None:
      return
    i = data.draw(st.integers(0, len(table) - 1))
    table[i] = dataclasses.replace(table[i], answer=before.answer)
    after = rule(table, state)
    assert after.confidence >= before.confidence - 1e-9
    assert after.answer == before.answer


def test_dividing_by_the_prior_changes_the_winner_of_a_collapsed_stream():
  """The policy says "1" to 60% of all questions: a lead of 14 to 12 speaks against "1"."""
  seen = {"1": 60.0} | {str(d): 40 / 9 for d in (0, *range(2, 10))}
  table = heads(**{"1": 14, "7": 12, "3": 6})
  assert voting.majority(table).answer == "1"
  vote = voting.prior_divided(table, prior(seen))
  # Divisors are as 60 + 1 to 40/9 + 1 = 49/9.
  # Scores 14/61 = 0.2295082, 12 * 9/49 = 2.2040816, 6 * 9/49 = 1.1020408: sum 3.5356306.
  assert vote.answer == "7"
  assert vote.share == pytest.approx(2.2040816 / 3.5356306, rel=1e-6)
  assert vote.margin == pytest.approx(1.1020408 / 3.5356306, rel=1e-6)
  # A vote near what the prior expects of every question says nothing, one well above it does.
  assert voting.prior_divided(heads(**{"1": 31, "7": 1}), prior(seen)).answer == "1"


def test_dividing_keeps_the_share_of_missing_answers():
  vote = voting.prior_divided(heads(none=2, a=1, b=1), prior({"a": 9.0, "b": 1.0}))
  # Half the voters had no answer. a : b = 1/10 : 1/2, so b gets 5/6 of the other half.
  assert vote.answer == "b"
  assert vote.share == pytest.approx(5 / 12)


def test_weights_and_prior_together():
  table = ballots(("a", 4.0), ("b", 1.0), ("b", 1.0))
  # a: 4 / (3 + 1) = 1; b: 2 / (0 + 1) = 2.
  vote = voting.entropy_weighted_prior_divided(table, prior({"a": 3.0}))
  assert (vote.answer, vote.share) == ("b", pytest.approx(2 / 3))
  assert voting.entropy_weighted(table).answer == "a"


@settings(deadline=None)
@given(TABLES)
def test_cold_start_is_majority(table):
  plain, divided = voting.majority(table), voting.prior_divided(table, AnswerPrior())
  assert (divided.answer, divided.share, divided.margin) == (
    plain.answer,
    plain.share,
    plain.margin,
  )
  assert divided.counts == plain.counts


def test_a_stray_ballot_for_an_unseen_answer_does_not_win():
  """A prior without smoothing never expects a new answer; one ballot would beat any number."""
  saturated = AnswerPrior()
  for _ in range(1000):
    saturated = saturated.update({"1": 1.0})
  assert saturated.counts["1"] == pytest.approx(100, rel=1e-3)  # 1 / (1 - 0.99)
  # Raised by (100 + 5) / 5 = 21, not enough against 31.
  assert voting.prior_divided(heads(**{"1": 31, "9": 1}), saturated).answer == "1"
  assert voting.prior_divided(heads(**{"1": 29, "9": 3}), saturated).answer == "9"


def test_prior_is_a_decayed_frequency():
  first = AnswerPrior(decay=0.5, smoothing=1.0)
  second = first.update({"1/2": 1.0}).update({"0.5": 0.5, "cat": 0.5})
  # 1 * 0.5 + 0.5 for one half, by meaning; 0.5 for cat.
  assert second.counts == {"0.5": 1.0, "cat": 0.5}
  assert first.counts == {}
  # Smoothing 1 for each of two seen and one unseen: (1 + 1) / (1.5 + 3).
  assert second.expected("50%") == pytest.approx(2 / 4.5)
  assert second.expected("cat") == pytest.approx(1.5 / 4.5)
  assert second.expected("never seen") == pytest.approx(1 / 4.5)
  assert first.expected("anything") == 1.0


def test_balance_makes_answers_count_equally_often():
  """Of a stream with 60% of one answer, what is left of it weighs no more than the others."""
  state = AnswerPrior(counts={"8": 600.0, **{str(d): 50.0 for d in range(8)}}, smoothing=1.0)
  # Nine answers, one place for unseen ones: expected (600 + 1) / 1010 and (50 + 1) / 1010.
  assert state.balance("8") == pytest.approx(1010 / (10 * 601))
  assert state.balance("3") == pytest.approx(1010 / (10 * 51))
  weighed = [state.counts[a] * state.balance(a) for a in ("8", "3")]
  assert weighed[0] == pytest.approx(weighed[1], rel=0.02)  # But for the smoothing.
  assert AnswerPrior().balance("anything") == 1.0


def test_prior_forgets_what_it_no_longer_hears():
  state = AnswerPrior(decay=0.5).update({"old": 1.0})
  for _ in range(20):
    state = state.update({"new": 1.0})
  # 0.5^20 is about 1e-6, under FORGET.
  assert set(state.counts) == {"new"}


def test_prior_survives_json():
  state = AnswerPrior(decay=0.9, smoothing=2.0).update({"a": 0.75, "b": 0.25})
  restored = AnswerPrior(**json.loads(json.dumps(state.to_dict())))
  assert restored == state


@pytest.mark.parametrize(
  ("confidence", "margin", "passes"),
  [
    (0.5, 0.25, True),
    (0.51, 0.25, False),
    (0.5, 0.26, False),
    (0.375, 0.125, True),
    (0.0, 0.0, True),
  ],
)
def test_gate_needs_confidence_and_margin(confidence, margin, passes):
  vote = voting.majority(heads(a=2, b=1, c=1))  # share 0.5, margin 0.25, both exact in binary
  assert voting.gate(vote, confidence=confidence, margin=margin) == passes


def test_gate_refuses_agreement_that_is_not_believed():
  """The share is 1."""
  vote = dataclasses.replace(voting.majority(heads(a=4)), confidence=0.25)
  assert voting.gate(vote, confidence=0.25, margin=1.0)
  assert not voting.gate(vote, confidence=0.26, margin=0.0)


def test_gate_thresholds_are_fractions():
  with pytest.raises(ValueError, match="confidence 60.0 and margin 0.1 must lie in"):
    voting.gate(voting.majority(heads(a=1)), confidence=60.0, margin=0.1)


def test_near_ties_by_rounding_are_ties():
  # 0.1 + 0.2 > 0.3 in floating point.
  vote = voting.entropy_weighted(ballots(("b", 0.1), ("b", 0.2), ("a", 0.3)))
  assert (vote.answer, vote.margin) == ("a", 0.0)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weights_are_refused(weight):
  with pytest.raises(ValueError, match="ballot for '1' must be finite and not negative"):
    voting.entropy_weighted(ballots(("1", weight)))


def test_weights_of_voters():
  # A uniform guess among ten at temperature 1 counts a tenth of a certain voter.
  assert voting.entropy_weight(math.log(10), temperature=1.0) == pytest.approx(0.1)
  assert voting.entropy_weight(0.0, temperature=0.5) == 1.0
  assert voting.similarity_weight(1.0, bandwidth=0.1) == 1.0
  # float32 dot products of unit vectors may exceed 1 by rounding.
  assert voting.similarity_weight(1.0 + 1e-6, bandwidth=0.1) == 1.0
  assert voting.similarity_weight(0.9, bandwidth=0.1) == pytest.approx(math.exp(-1))
  with pytest.raises(ValueError, match="entropy -0.1"):
    voting.entropy_weight(-0.1, temperature=1.0)
  with pytest.raises(ValueError, match="cosine 2.0"):
    voting.similarity_weight(2.0, bandwidth=1.0)


def test_a_memory_neighbour_is_a_ballot():
  table = [*heads(a=1, b=1), Ballot(answer="b", weight=0.5, view="memory", source="experience-3")]
  vote = voting.entropy_weighted(table)
  assert (vote.answer, vote.share) == ("b", pytest.approx(0.6))
  assert [b.source for b in vote.ballots] == ["self", "self", "experience-3"]


def test_weighted_votes_are_believed_by_heads_too():
  """The torch project's defect: 1 of 6 voters agreed with itself, and 0.711 of it was believed."""
  stale = voting.weighted(ballots(("cat", 1.0), *[("dog", 0.001)] * 5))
  # By weight "cat" has 1 / 1.005. One voter of six, 1/6: 0.5 + 0.1 * (1/6) / 0.3 = 0.5556.
  assert stale.answer == "cat"
  assert stale.confidence == pytest.approx(1 / 1.005 * (0.5 + 1 / 18))
  assert not voting.gate(stale, confidence=0.7, margin=0.0)
  # Its other figures stand: 5 of 6 equal voters 5/6 * (0.8 + 0.2 * (5/6 - 0.7) / 0.3) = 0.741,
  # 4 of 6 4/6 * (0.6 + 0.2 * (4/6 - 0.3) / 0.4) = 0.522.
  assert voting.weighted(heads(a=5, b=1)).confidence == pytest.approx(0.7407, abs=1e-4)
  assert voting.weighted(heads(a=4, b=2)).confidence == pytest.approx(0.5222, abs=1e-4)


def test_unanimous_weights_are_no_more_than_sure():
  """Summed in floating point their shares may exceed 1: the torch project then raised an error."""
  table = ballots(*[("a", 0.1 * i) for i in range(1, 12)])
  for rule in (voting.weighted, voting.confident, voting.ensemble):
    assert rule(table).confidence == 1.0


def test_confident_hears_the_sure_voters_only():
  vote = voting.confident(ballots(("a", 2.0), ("b", 1.0), ("b", 0.9), ("b", 0.9)))
  # Below 1 nobody is heard. By squares 4 to 1; one of two heads: 0.6 + 0.2 * 0.2 / 0.4 = 0.7.
  assert (vote.answer, vote.share, vote.margin) == ("a", 0.8, pytest.approx(0.6))
  assert vote.confidence == pytest.approx(0.8 * 0.7)
  assert len(vote.ballots) == 4
  assert voting.weighted(vote.ballots).answer == "b"


def test_an_ensemble_is_the_mean_of_three():
  table = ballots(("a", 2.0), ("b", 1.0), ("b", 1.0))
  # majority: b 2/3 of 3. weighted: a tie of 2 to 2, for "a". confident: all heard, 4 to 2.
  vote = voting.ensemble(table)
  assert vote.counts == pytest.approx({"a": (1 / 3 + 1 / 2 + 2 / 3) / 3, "b": 0.5})
  assert vote.margin == 0.0  # Both have 1/2.
  # "a" leads by the alphabet; majority is not for it. One of three heads: 0.6 + 0.2/0.4 * 1/30.
  believed = 0.6 + 0.5 * (1 / 3 - 0.3)
  assert vote.confidence == pytest.approx((0.5 + 2 / 3) * believed / 3)


def test_a_vote_needs_ballots_with_answers():
  vote = voting.majority(heads(a=2, none=5))
  assert voting.gate(vote, confidence=0.0, margin=0.0, votes=2)
  assert not voting.gate(vote, confidence=0.0, margin=0.0, votes=3)


def test_almost_the_same_can_count_as_the_same():
  table = ballots(("9", 1.0), ("9", 1.0), ("9", 1.0), ("100", 1.0), ("100", 1.0), ("103", 1.5))
  assert voting.majority(voting.clustered(table, verifier="equal")).answer == "9"
  near = voting.majority(voting.clustered(table, verifier="relaxed"))
  # Three of each: a tie, which 9 or 100 would not have had by strings.
  assert near.counts == {"100": 0.5, "9": 0.5}
  assert voting.entropy_weighted(voting.clustered(table, verifier="relaxed")).answer == "100"


def test_ballots_without_a_cluster_are_for_nobody():
  table = ballots(("[0, 0, 10, 10]", 1.0), ("[0, 0, 10, 9]", 1.0), ("a cat", 3.0))
  vote = voting.entropy_weighted(voting.clustered(table, verifier="iou_50"))
  # 9/10 of the area is shared; words are no box: 2 of 5.
  assert (vote.answer, vote.share) == ("0, 0, 10, 10", 0.4)


@pytest.mark.parametrize(
  ("before", "weight", "kept"),
  [
    ((), 1.0, 1.0),  # The first visit.
    (("1",), 1.0, 1.0),
    (("2",), 1.0, 0.0),  # It changed at the only visit before.
    (("2",), 0.5, 0.5),
    (("2", "1", "2"), 1.0, 0.0),
    (("2", "2", "1.0"), 1.0, 2 / 3),  # 2, 2, 1, 1: one change of three.
  ],
)
def test_what_flips_from_visit_to_visit_is_believed_less(before, weight, kept):
  vote = voting.majority(heads(**{"1": 3, "2": 1}))
  guarded = voting.guarded(vote, before, weight=weight, verifier="equal")
  assert guarded.confidence == pytest.approx(0.75 * kept)
  assert (guarded.answer, guarded.share, guarded.margin) == ("1", 0.75, 0.5)


def test_the_guard_knows_what_counts_as_a_change():
  vote = voting.majority(heads(**{"100": 2}))
  assert voting.guarded(vote, ["103"], weight=1.0, verifier="relaxed").confidence == 1.0
  assert voting.guarded(vote, ["103"], weight=1.0, verifier="equal").confidence == 0.0
  nobody = voting.majority([])
  assert voting.guarded(nobody, ["1"], weight=1.0, verifier="equal") == nobody
  with pytest.raises(ValueError, match="guard.weight 2.0"):
    voting.guarded(vote, ["1"], weight=2.0, verifier="equal")
