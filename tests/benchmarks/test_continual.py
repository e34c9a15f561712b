"""What benchmarks/continual.py streams, and its measures."""

import argparse

import numpy as np
import pytest


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("continual")


# Rows: before, after a, after b, after c. Columns: a, b, c, the original domain.
ACCURACY = np.array(
  [
    [0.40, 0.50, 0.60, 0.95],
    [0.80, 0.55, 0.60, 0.94],
    [0.85, 0.90, 0.50, 0.93],
    [0.70, 0.80, 0.90, 0.92],
  ]
)


def test_measures(bench):
  found = bench.measures(ACCURACY)
  # Each domain right after it: 80 - 40, 90 - 50, 90 - 60.
  assert found["learned"] == pytest.approx((40 + 40 + 30) / 3)
  assert found["retained"] == pytest.approx((30 + 30 + 30) / 3)
  # Of the best ever, which of `a` came after `b`: 85 - 70, 90 - 80. From R[j][j] it would be 10.
  assert found["forgotten"] == pytest.approx((15 + 10) / 2)
  assert found["original"] == pytest.approx(-3)


def test_table(bench):
  text = bench.table(("a", "b", "c"), [ACCURACY, ACCURACY])
  assert "| before | 40.0 | 50.0 | 60.0 | 95.0 |" in text
  assert "| after c | 70.0 | 80.0 | 90.0 | 92.0 |" in text
  assert "| forgotten | +12.5 (+12.5 to +12.5) |" in text


def test_requests_of_domains_differ_and_held_out_questions_share_no_handwriting(bench):
  c = bench.settings(argparse.Namespace(model="m"), 0)
  first = bench.asked(c, "stream", "dim", n=4, seed=2000)
  second = bench.asked(c, "stream", "blur", n=4, seed=2001)
  assert len({task.id for task in (*first, *second)}) == 8
  assert {c.stream.split, c.shifted.split} == {"stream", "held_out"}
  assert [t.answer for t in bench.asked(c, "shifted", "dim", n=4, seed=1)] == [
    t.answer for t in bench.asked(c, "shifted", "blur", n=4, seed=1)
  ]
