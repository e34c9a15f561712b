"""What benchmarks/grpo.py trains, and what it makes of the runs."""

import argparse

import pytest

from pixelis_jax.algo.policy_losses import POLICY_LOSSES, Objective


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("grpo")


def args() -> argparse.Namespace:
  return argparse.Namespace(model="m", steps=8, lr=1e-4, questions=4, n=16, requests=32)


def test_every_row_is_a_config(bench):
  """Fails where a field of a row is misspelt, or a loss does not go with its aggregation."""
  made = {row: bench.settings(args(), row, 2) for row in bench.ROWS}
  for c in made.values():
    Objective(**c.grpo.loss)
  assert {c.grpo.loss.loss_mode for c in made.values()} == set(POLICY_LOSSES)
  weights = lambda row: [made[row].reward.weights[name] for name in ("coherence", "curiosity")]
  assert weights("task") == [0.0, 0.0]
  assert weights("+ coherence")[0] > 0 == weights("+ coherence")[1]
  assert min(weights("+ curiosity")) > 0
  assert made["dapo"].grpo.filter_groups.enable and not made["grpo"].grpo.filter_groups.enable
  # Questions and rate are one for all: a row is what it names.
  assert len({(c.data.to_json(), c.optimizer.to_json()) for c in made.values()}) == 1


def test_a_line_has_means_over_seeds_and_the_curves_edges(bench):
  curve = [0.0] * 5 + [9.0] * 20 + [1.0] * 5
  lower = [0.2] * 5 + [9.0] * 20 + [0.4] * 5
  of = lambda c: dict.fromkeys(bench.CURVES, c)
  runs = [
    bench.Run(row="task", seed=0, accuracy=0.8, calls=1.0, curves=of(curve), commit="abc"),
    bench.Run(row="task", seed=1, accuracy=0.9, calls=2.0, curves=of(lower), commit="abc"),
  ]
  line = bench.line(runs)
  # Two values 10 apart: 12.706 * 10 / sqrt(2) / sqrt(2) to either side.
  assert line["interval"] == pytest.approx((85 - 63.53, 85 + 63.53), abs=0.01)
  assert line["edges"]["RaPR"] == pytest.approx([0.1, 0.7])
  sft = bench.Run(row="sft", seed=0, accuracy=0.5, calls=1.0, curves={}, commit="abc")
  shown = bench.table(bench.lines([*runs, sft]))
  assert shown.index("| sft") < shown.index("| task")
  assert "| sft | 50.0 | 1.00 | - | - | - | - |" in shown
  assert "| task | 85.0 (21.5 to 148.5) | 1.50 | 0.10 to 0.70 |" in shown


def test_online_comes_after_what_it_goes_on_from(bench, tmp_path):
  given = argparse.Namespace(**vars(args()), out=tmp_path)
  with pytest.raises(FileNotFoundError, match="'[+] online' comes after '[+] curiosity'"):
    bench.run(given, bench.ONLINE, 0)
