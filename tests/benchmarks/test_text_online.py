"""What benchmarks/text_online.py makes of played samples: its measures, its table, its verdict."""

import re

import pytest

from pixelis_jax.types import Status, Task, Trajectory


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("text_online")


def group(truth: str, *said: str | None) -> tuple[Task, list[Trajectory]]:
  task = Task(id=truth, images=(), question="?", answer=truth, kind=f"kind {truth}")
  return task, [
    Trajectory(task=task, steps=(), status=Status.ANSWERED, answer=answer) for answer in said
  ]


def test_measures_of_samples(bench):
  """By meaning; a sample without an answer is wrong, and is in no majority."""
  asked, groups = zip(
    group("7", "7", "7.0", "3", None),
    group("5", "4", "4", "4", "5"),
    group("9", None, None, None, "9"),
    group("2", None, None, None, None),
    strict=True,
  )
  found = bench.outcomes(asked, groups)
  # Were only answered samples counted, the first share would be 2/3 and the third 1.
  assert found["avg"] == [0.5, 0.25, 0.25, 0.0]
  # Of the third question one answer of four is the majority of those that there are.
  assert found["majority"] == [1.0, 0.0, 1.0, 0.0]
  assert found["passed"] == [1.0, 1.0, 1.0, 0.0]
  assert found["answered"] == [0.75, 1.0, 0.25, 0.0]
  made = bench.summary(asked, found)
  assert made["avg"][0] == 0.25 and made["majority"][0] == 0.5 and made["passed"][0] == 0.75
  # Wilson's interval of 2 in 4: (0.5 + z^2/8 -+ z sqrt(1/16 + z^2/64)) / (1 + z^2/4), z 1.96.
  assert made["majority"][1:] == pytest.approx((0.150, 0.850), abs=1e-3)
  assert made["by_kind"] == {"kind 2": 0.0, "kind 5": 0.25, "kind 7": 0.5, "kind 9": 0.25}


def result(off: float, on: float) -> dict:
  """Of a seed: as good by every measure."""
  measured = lambda x: {name: (x, x, x) for name in ("avg", "majority", "passed", "answered")}
  return {"off": measured(off), "on": measured(on)}


def test_the_change_is_paired_by_seed(bench):
  rows = bench.rows([result(0.1, 0.2), result(0.3, 0.5), result(0.5, 0.8)], samples=8)
  assert [row["measure"] for row in rows] == ["avg@1", "maj@8", "pass@8", "with an answer"]
  # Changes of 10, 20 and 30: mean 20, deviation 10, and t of 2 degrees of freedom is 4.303, so
  # 4.303 * 10 / sqrt(3) = 24.8 to either side. Seeds taken as unpaired would give far more.
  assert rows[0]["change"] == pytest.approx((20.0, -4.84, 44.84), abs=0.01)
  # 10, 30 and 50: 30, and 4.303 * 20 / sqrt(3) = 49.7.
  assert rows[0]["off"] == pytest.approx((30.0, -19.68, 79.68), abs=0.01)
  (line,) = [line for line in bench.table(rows).splitlines() if "maj@8" in line]
  assert line.endswith("| +20.0 (-4.8 to +44.8) |") and "| 30.0 (-19.7 to 79.7) |" in line
  assert "includes 0" in bench.verdict(rows)


@pytest.mark.parametrize(
  "changes, said",
  [((0.2, 0.21, 0.22), "helped"), ((-0.2, -0.21, -0.22), "hurt"), ((0.2,), "one seed: .*[+]20.0")],
)
def test_the_verdict_says_what_the_interval_does(bench, changes, said):
  rows = bench.rows([result(0.5, 0.5 + change) for change in changes], samples=8)
  assert re.search(said, bench.verdict(rows))


def test_a_run_that_only_measures_has_no_change(bench):
  only = {"off": result(0.5, 0.5)["off"]}
  rows = bench.rows([only], samples=8)
  assert rows[0] == {"measure": "avg@1", "off": (50.0, 50.0, 50.0), "on": None, "change": None}
  assert "| avg@1 | 50.0 (50.0 to 50.0) | - | - |" in bench.table(rows)
  assert "nothing was learned" in bench.verdict(rows)
