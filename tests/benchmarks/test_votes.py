"""What benchmarks/votes.py makes of votes whose answers are known."""

import math

import pytest

from configs import demo
from pixelis_jax.history import History
from tests.test_history import voter


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("votes")


def test_each_rule_counts_the_same_ballots(bench):
  """Five views say 1, unsurely, one 2, surely; three of four samples say 3."""
  c = demo.get_config("dim")
  views = [voter(i, "1", nats=1.0) for i in range(5)] + [voter(5, "2")]
  group = [voter(0, answer) for answer in ("3", "3", "4", "3")]  # All that is asked of samples.
  history = History.start(c.vote)
  for _ in range(64):  # 1 is what comes up anyway, so that one vote for 2 is worth more than five.
    history = history.voted(views[:5])
  cast = bench.votes(c, group, views, history)
  assert cast["majority of samples (TTRL)"].answer == "3"
  assert cast["majority of samples (TTRL)"].share == pytest.approx(3 / 4)
  assert cast["majority of views"].answer == "1"
  assert cast["views divided by answer frequency"].answer == "2"
  # exp(-1 / 0.5) = 0.135 each: 0.68 against 1.
  assert cast["views weighed by entropy"].answer == "2"
  assert cast["views weighed by entropy"].share == pytest.approx(1 / (1 + 5 * math.exp(-2)))


def test_a_voter_is_right_so_often_and_so_well_calibrated(bench):
  row = bench.vote_row("dim", "v", [(True, 0.75), (True, 0.75), (True, 0.75), (False, 0.75)], 4)
  assert (row["right"], row["n"], row["of"]) == (0.75, 4, 4)
  assert row["ece"] == pytest.approx(0.0)
  # Wilson: (0.75 + 1.96^2 / 8 -+ 1.96 sqrt(0.75 * 0.25 / 4 + 1.96^2 / 64)) / (1 + 1.96^2 / 4)
  assert (row["low"], row["high"]) == pytest.approx((0.3006, 0.9544), abs=1e-3)
  assert bench.vote_row("dim", "view", [(True, None)], 1)["ece"] is None
  assert bench.vote_row("dim", "sure", [(False, 0.9)], 1)["ece"] == pytest.approx(0.9)
  none = bench.vote_row("dim", "gated", [], 4)
  assert (none["right"], none["n"]) == (0.0, 0)


def test_a_reward_ranks_each_right_sample_with_each_wrong_one(bench):
  # 0.9 beats 0.1 and ties with 0.9; 0.1 ties and loses.
  assert bench.pairs([0.9, 0.1, 0.1, 0.9], [True, True, False, False]) == [1.0, 0.5, 0.5, 0.0]
  assert bench.pairs([1.0, 1.0], [True, True]) == []


def test_the_table_says_where_nothing_was_voted(bench):
  rows = [
    bench.vote_row("dim", "all", [(True, 0.5), (False, 0.5)], 2),
    bench.vote_row("dim", "gated", [(True, None)], 2),
    bench.vote_row("writers", "gated", [], 2),
    {"stream": "dim", "reward": "soft, all", "pairs": 12, "ranked": 0.75},
  ]
  text = bench.tables(rows)
  assert "| voter | dim | writers |" in text
  assert "| all | 50.0 (9.5 to 90.5) | - |" in text
  assert "| gated | 100.0 (20.7 to 100.0), n 1 | none |" in text
  assert "| all | 0.000 |" in text and "| soft, all | 75.0, n 12 |" in text
