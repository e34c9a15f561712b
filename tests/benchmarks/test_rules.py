"""What benchmarks/rules.py asks, and what it makes of the runs."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from pixelis_jax.algo.voting import RULES
from pixelis_jax.types import Box, Task


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("rules")


def args(**changed) -> argparse.Namespace:
  return argparse.Namespace(**{"model": "m", "requests": 32, "n": 8, **changed})


def cell(bench, stream: str, seed: int, before: float, after: float, **changed):
  found = {
    "original_before": 0.9,
    "original_after": 0.9,
    "votes_right": 0.5,
    "worst": 0.0,
    "applied": 4,
    "refused": 0,
    "commit": "abc",
    **changed,
  }
  ends = {"shifted_before": before, "shifted_after": after}
  return bench.Cell(row="views", stream=stream, seed=seed, **ends, **found)


def test_every_row_and_stream_is_a_config(bench):
  """Fails where a field of a row is misspelt: the config is locked. And every rule has a row."""
  made = {
    (row, stream): bench.settings(args(), row, stream, 3, Path("out"))
    for row in bench.ROWS
    for stream in bench.STREAMS
  }
  assert {c.vote.rule for c in made.values()} == set(RULES)
  plain, skewed = made["majority", "dim"], made["views", "dim-skewed"]
  assert tuple(plain.vote.voters) == ("samples",) and plain.vote.rule == "majority"
  assert (plain.stream.skew, skewed.stream.skew) == (-1, 8)
  assert {c.pace for c in made.values()} == {"lockstep"}
  assert made["views", "misled"].requests == "out/misled.jsonl" and not plain.requests
  # One stream for all rows: what differs is how it is learned from.
  streams = {c.stream.to_json() for (_, stream), c in made.items() if stream == "blur"}
  assert len(streams) == 1


def test_the_gain_is_of_weak_shifts_and_the_worst_of_all_streams(bench):
  cells = [
    cell(bench, "dim", 0, 0.4, 0.6, votes_right=0.9),
    cell(bench, "dim", 1, 0.4, 0.8, votes_right=0.7),
    cell(bench, "noise", 0, 0.9, 0.8, original_after=0.8, worst=-0.25),  # Not weak.
    cell(bench, "static", 0, 0.1, 0.05, votes_right=None, worst=None),  # No shift.
    cell(bench, "rotate-skewed", 0, 0.5, 0.6, votes_right=0.5),
    cell(bench, "rotate-skewed", 1, 0.5, 0.9, votes_right=0.5),
    cell(bench, "dim", 2, 0.4, 0.4, votes_right=0.5),  # Its other shift is yet to come.
  ]
  (line,) = bench.summary(cells)
  # Seed 0: the mean of 20 and 10; seed 1: of 40 and 40. Half of seed 2 is there: it would be
  # a third less. Noise, which starts at 90%, and static have no part in it.
  assert line["gain"] == pytest.approx((15 + 40) / 2)
  # Deviation 25 / sqrt(2), and t of one degree of freedom is 12.706.
  low, high = line["gain_interval"]
  assert (low, high) == pytest.approx((27.5 - 12.706 * 12.5, 27.5 + 12.706 * 12.5), abs=0.01)
  assert line["seeds"] == [0, 1, 2]
  assert line["end"] == pytest.approx(-10) and line["kept"] == pytest.approx(-10)
  assert line["worst"] == pytest.approx(-25)
  assert line["votes_right"] == pytest.approx(100 * (0.9 + 0.7 + 4 * 0.5) / 6)
  text = bench.table([line])
  assert "| views | 7 | +27.5 (-131.3 to +186.3) | -10.0 | -25.0 | -10.0 | 60.0 | 4 / 0 |" in text
  assert "| rule | dim | noise | rotate-skewed | static |" in text  # In the order of STREAMS.
  assert "| before | 40.0 | 90.0 | 50.0 | 10.0 |" in text
  assert "| views | 60.0 | 80.0 | 75.0 | 5.0 |" in text


def test_a_row_by_stream_has_each_seed(bench):
  cells = [
    cell(bench, "static", 0, 0.1, 0.1, votes_right=None),
    cell(bench, "dim", 0, 0.4, 0.6, votes_right=0.9, applied=3, refused=1),
    cell(bench, "dim", 1, 0.4, 0.8, votes_right=0.7, applied=5),
  ]
  assert bench.by_stream(cells).splitlines() == [
    "| views | dim | static |",
    "|---|---|---|",
    "| before | 40.0 | 10.0 |",
    "| after | 70.0 | 10.0 |",
    "| each seed | 60.0 80.0 | 10.0 |",
    "| original before | 90.0 | 90.0 |",
    "| original after | 90.0 | 90.0 |",
    "| votes right | 80.0 | - |",
    "| applied / refused | 4 / 0 | 4 / 0 |",  # 3 and 5; 1 and 0, of which half is even.
  ]


def test_groups_of_shifts_have_gains_of_their_own(bench):
  """Each of what is there whole: blur is in "all" alone, a skewed one in no even group."""
  even = {"rotate": 0.6, "dim": 0.9, "invert": 0.7, "noise": 0.7, "writers": 0.5}
  cells = [cell(bench, name, 0, 0.5, after) for name, after in even.items()]
  cells.append(cell(bench, "blur-skewed", 0, 0.5, 0.9))
  # 10, 40, 20, 20 and 0 points. With the skewed one in it, it would be 21.7.
  assert bench.by_group(cells).splitlines() == [
    "| over the shifts that start weak | without blur, even |",
    "|---|---|",
    "| gain | +18.0 |",
  ]
  cells.append(cell(bench, "blur", 0, 0.5, 0.8))
  assert bench.by_group(cells).splitlines()[::2] == [
    "| over the shifts that start weak | all, even | without blur, even |",
    "| gain | +20.0 | +18.0 |",
  ]
  assert bench.by_group(cells[:1]) == ""


def test_a_rule_that_lacks_a_stream_has_a_hole_there(bench):
  found = [cell(bench, "dim", 0, 0.4, 0.6), cell(bench, "noise", 0, 0.5, 0.6)]
  other = dataclasses.replace(found[1], row="majority", shifted_after=0.7)
  text = bench.table(bench.summary([*found, other]))
  assert "| majority | - | 70.0 |" in text and "| before | 40.0 | 50.0 |" in text


def test_the_worst_moment_is_a_window_s(bench):
  # Means of neighbours: 0.5, 0.3, 0.2, 0.6. A single arrival's least would be -0.4.
  assert bench.worst([0.5, 0.5, 0.1, 0.3, 0.9], 2) == pytest.approx(-0.3)
  assert bench.worst([0.5], 2) is None


@pytest.mark.parametrize(
  "said, misled",
  [
    (["3", "3", "7"], True),
    (["7", "7", "3"], False),
    (["3", "7"], False),  # A tie teaches nothing.
    (["7.0", "7", "3"], False),  # By meaning.
    ([None, None, "3"], True),  # Who has no answer is no voter.
    ([None], False),
  ],
)
def test_questions_that_mislead(bench, said, misled):
  assert bench.misleads(said, "7") is misled


def test_repeated_questions_have_ids_of_their_own_and_no_labels(bench):
  box = Box(0.0, 0.0, 1.0, 1.0)
  tasks = [Task(id=id, images=(), question=id, answer="7", boxes=(box,)) for id in "ab"]
  made = bench.renumbered(tasks, 5)
  assert [t.question for t in made] == ["a", "b", "a", "b", "a"]
  assert len({t.id for t in made}) == 5
  assert not any(t.answer or t.boxes for t in made)
  with pytest.raises(ValueError, match="no question is left"):
    bench.renumbered([], 5)
