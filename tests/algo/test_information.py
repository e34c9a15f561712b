"""Voters that see tell more than voters that guess, however sure these are of it."""

import json
import math

import numpy as np
import pytest

from pixelis_jax.algo.information import Information, Lead, Tally


def after(requests, **more) -> Information:
  """Requests of one kind: (answer of the seeing voter, ...) with the entropies given beside.

  All with one vote, under which they weigh alike.
  """
  state = Information(**more)
  for voters in requests:
    state = state.update("digit", voters, None)
  return state


def test_what_is_told_is_the_answers_entropy_minus_the_mean_of_each():
  # No forgetting to speak of: four answers equally often, each given with 0.3 nats.
  state = after([[("v", str(i % 4), 0.3)] for i in range(8)], decay=1 - 1e-12)
  assert state.told("v") == pytest.approx(math.log(4) - 0.3)
  assert state.told("unheard") == 0.0


def test_always_the_same_answer_tells_nothing_and_guessing_tells_nothing():
  rng = np.random.default_rng(0)
  seen = rng.integers(10, size=400)
  state = after(
    [
      [("sees", str(digit), 0.2), ("stuck", "1", 0.0), ("guesses", str(guess), math.log(10))]
      for digit, guess in zip(seen, rng.integers(10, size=400), strict=True)
    ],
    decay=0.995,
  )
  assert state.told("stuck") == pytest.approx(0.0, abs=1e-9)
  # The entropy of what about 200 draws of ten answers show is up to 9 / 400 below ln 10.
  assert -0.1 < state.told("guesses") <= 1e-9
  assert state.told("sees") == pytest.approx(math.log(10) - 0.2, abs=0.1)
  weights = state.weights(["sees", "stuck", "guesses"], temperature=0.2)
  assert weights["sees"] > 2.99 and sum(weights.values()) == pytest.approx(3.0)


def test_kinds_are_kept_apart():
  """A voter that always says 1 to one kind and odd to the other knows the kind and nothing else."""
  state = Information()
  for _ in range(50):
    state = state.update("digit", [("v", "1", 0.0)], "1").update("parity", [("v", "odd", 0.0)], "1")
  assert state.told("v") == pytest.approx(0.0, abs=1e-9)


def test_requests_without_an_answer_dilute_what_is_told():
  spoken = [[("v", str(i % 2), 0.0)] for i in range(4)]
  silent = [[("v", None, 5.0)], [("v", "", 5.0)]] * 2
  state = after(spoken + silent, decay=1 - 1e-12)
  assert state.told("v") == pytest.approx(math.log(2) / 2)


def test_requests_weigh_as_if_all_votes_were_as_frequent():
  state = Information(decay=1 - 1e-12, vote_decay=1 - 1e-12, vote_smoothing=5.0)
  for voted in ("1", "1.0", "2"):
    state = state.update("digit", [("v", voted, 0.0)], voted)
  # 2, 1 and no vote for others, each with the 5 of the smoothing: 7, 6, 5 of 18, where 6 is even.
  assert state.balance("digit", "1") == pytest.approx(6 / 7)
  assert state.balance("digit", "2") == pytest.approx(1.0)
  assert state.balance("digit", "3") == pytest.approx(6 / 5)
  assert state.balance("parity", "1") == 1.0  # Of which nothing was asked.
  # So 2 * 6/7 and 1 of 19/7 in all; and an answer on which others voted otherwise weighs as theirs.
  assert state.tells("digit", "v", "2", 0.1) == pytest.approx(math.log(19 / 7) - 0.1)
  told = -(12 / 19) * math.log(12 / 19) - (7 / 19) * math.log(7 / 19)
  assert state.told("v") == pytest.approx(told)
  state = state.update("digit", [("v", "2", 0.0)], "1")  # Weights are now 23/3 / (8, 6).
  assert state.tells("digit", "v", "2", 0.0) == pytest.approx(
    math.log((3 / 8 + 1 / 6) / (1 / 8 + 1 / 6))
  )


def test_which_answers_are_rare_is_known_from_more_requests_than_who_sees_best():
  """Ten votes in a row for one answer, behind thirty for either of two: they are as frequent."""
  state = Information(decay=0.5, vote_decay=1 - 1e-12, vote_smoothing=1.0)
  for voted in [*"12" * 30, *"1" * 10]:
    state = state.update("digit", [("v", voted, 0.0)], voted)
  # 40, 30 and none, each with 1: of 73, where 73/3 is even. By `decay` 2 would be all but unseen.
  assert state.balance("digit", "1") == pytest.approx(73 / 3 / 41)
  assert state.balance("digit", "2") == pytest.approx(73 / 3 / 31)
  assert state.balance("digit", "3") == pytest.approx(73 / 3)


def test_who_sees_that_most_is_alike_tells_more_than_who_errs():
  """Six of ten are 8. Who errs on half of these says more different things, and is sure of it."""
  truth, errs = "8888881234", "8881232341"
  even = balanced = Information(decay=1 - 1e-12, vote_decay=1 - 1e-12)
  for _ in range(100):
    for right, wrong in zip(truth, errs, strict=True):
      voters = [("sees", right, 0.1), ("errs", wrong, 0.2)]
      even, balanced = even.update("digit", voters, None), balanced.update("digit", voters, right)
  # Of .6 and four of .1 the entropy is 1.23; of .3, three of .2 and .1 it is 1.56.
  assert even.told("errs") - even.told("sees") == pytest.approx(1.56 - 0.2 - (1.23 - 0.1), abs=0.01)
  # An 8 weighs a sixth of another: the one nears ln 5 = 1.61, the other 3, 7, 7, 7, 6 of 30: 1.57.
  assert balanced.told("sees") - balanced.told("errs") == pytest.approx(1.51 - 1.37, abs=0.01)


def test_spellings_of_one_answer_are_one_answer():
  assert Tally().add("0.5", 0.1).add("1/2", 0.1).told == pytest.approx(-0.2)


def test_weights_begin_equal_and_part_with_requests():
  assert after([]).weights(["a", "b"], temperature=0.1) == {"a": 1.0, "b": 1.0}
  requests = [[("a", str(i % 8), 0.0), ("b", "1", 0.0)] for i in range(64)]
  few, many = after(requests[:8]), after(requests)
  shares = [s.weights(["a", "b"], temperature=1.0)["a"] for s in (few, many)]
  assert 1.0 < shares[0] < shares[1] < 2.0
  assert many.weights(["a", "b"], temperature=math.inf) == {"a": 1.0, "b": 1.0}
  # With n requests behind it, a difference counts n / (n + smoothing): here half.
  half = after(requests[:16], decay=1 - 1e-12).weights(["a", "b"], temperature=1.0)
  assert half["b"] / half["a"] == pytest.approx(math.exp(-math.log(8) / 2))


def test_voters_are_trusted_by_the_best_of_them():
  # "sees" tells ln 4 = 1.386 nats: trust 1.386 / (1.386 + 0.5). One blind voter takes nothing away.
  requests = [[("sees", str(i % 4), 0.0), ("stuck", "1", 0.0)] for i in range(64)]
  state = after(requests, decay=1 - 1e-12)
  half = 0.5
  assert state.trust(["sees", "stuck"], half=half) == pytest.approx(
    math.log(4) / (math.log(4) + half)
  )
  assert state.trust(["stuck"], half=half) == pytest.approx(0.0, abs=1e-9)
  assert state.trust([], half=half) == 0.0 == after([]).trust(["sees"], half=half)


def test_noise_is_not_trusted_however_the_voters_agree():
  """Shown noise, a voter that answers at all answers alike, or guesses: below 0 is 0, not more."""
  rng = np.random.default_rng(1)
  guesses = [[("v", str(rng.integers(10)), math.log(10))] for _ in range(50)]
  state = after(guesses)
  assert state.told("v") < 0.0
  assert state.trust(["v"], half=0.1) == 0.0
  with pytest.raises(ValueError, match="half 0.0 must be positive"):
    state.trust(["v"], half=0.0)


def test_old_requests_fade():
  blind = [[("v", "1", 0.0)]] * 100
  seeing = [[("v", str(i % 4), 0.0)] for i in range(100)]
  assert after(blind + seeing, decay=0.9).told("v") == pytest.approx(math.log(4), abs=0.01)


def test_samples_share_one_name():
  """Repeats within a request fade nothing: three samples of one request count three times."""
  state = after([[("self", "1", 0.5)] * 3], decay=0.5)
  assert state.tallies["self"]["digit"] == {"": Tally(asked=3.0, entropy=1.5, counts={"1": 3.0})}


def test_it_survives_json():
  state = after([[("v", str(i % 3), 0.3), ("w", None, 0.0)] for i in range(5)], smoothing=3.0)
  state = state.update("digit", [("v", "1", 0.1)], "1")
  assert Information.from_dict(json.loads(json.dumps(state.to_dict()))) == state
  assert Information.from_dict({"decay": 0.5}) == Information(decay=0.5)


@pytest.mark.parametrize("entropy", [-0.1, math.nan, math.inf])
def test_impossible_entropies_are_refused(entropy):
  with pytest.raises(ValueError, match="entropy .* of voter 'v' must be finite"):
    Information().update("digit", [("v", "1", entropy)], "1")


@pytest.mark.parametrize(
  "bad",
  [
    {"decay": 1.0},
    {"decay": 0.0},
    {"smoothing": 0.0},
    {"vote_decay": 1.0},
    {"vote_decay": 0.0},
    {"vote_smoothing": 0.0},
  ],
)
def test_impossible_constants_are_refused(bad):
  with pytest.raises(ValueError, match="must lie in|must be"):
    Information(**bad)
  with pytest.raises(ValueError, match="temperature 0.0 must be positive"):
    Information().weights(["a"], temperature=0.0)


def test_a_lead_is_measured_in_its_standard_errors():
  lead = Lead()
  for nats in (0.0, 2.0, 1.0, 1.0):
    lead = lead.add(nats, decay=1.0)
  # Mean 1; squares off it 1 + 1 and the one nat that is always there, over 4 requests: 0.75, and
  # the error of their mean the root of 0.75 / 4.
  assert lead.errors == pytest.approx(1.0 / math.sqrt(0.75 / 4))
  assert Lead().errors == 0.0
  # One request, or two alike, prove nothing: 1 / sqrt(1 / 1), 1 / sqrt(1 / 2 / 2).
  assert Lead().add(1.0, decay=0.99).errors == pytest.approx(1.0)
  assert Lead().add(1.0, decay=1.0).add(1.0, decay=1.0).errors == pytest.approx(2.0)


def test_faded_requests_are_fewer():
  """Weights of 1/2 and 1 make the error that of (1.5)^2 / 1.25 = 1.8 requests, not of 2 or 1.5."""
  lead = Lead().add(3.0, decay=0.5).add(1.0, decay=0.5)
  mean = 2.5 / 1.5
  variance = (0.5 * (3.0 - mean) ** 2 + (1.0 - mean) ** 2 + 1.0) / 1.5
  assert lead.errors == pytest.approx(mean / math.sqrt(variance / 1.8))


def test_requests_of_a_lead_may_weigh_more():
  """Weights 2 and 1 make the mean (2 * 3 + 1) / 3, and the requests 3^2 / 5."""
  lead = Lead().add(3.0, decay=1.0, weight=2.0).add(1.0, decay=1.0)
  mean = 7 / 3
  variance = (2 * (3 - mean) ** 2 + (1 - mean) ** 2 + 1.0) / 3
  assert lead.errors == pytest.approx(mean / math.sqrt(variance / (9 / 5)))


def test_what_an_answer_tells_is_how_rare_it_was():
  state = after([[("v", "1", 0.5)], [("v", "1", 0.5)], [("v", "2", 0.25)]], decay=1 - 1e-12)
  assert state.tells("digit", "v", "2", 0.25) == pytest.approx(math.log(3) - 0.25)
  assert state.tells("digit", "v", "1", 0.5) == pytest.approx(math.log(3 / 2) - 0.5)
  assert state.tells("digit", "v", None, 3.0) == state.tells("digit", "v", "", 3.0) == 0.0
