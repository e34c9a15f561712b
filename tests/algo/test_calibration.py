import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelis_jax.algo.calibration import METHODS, Calibration, ece, fit

VOTES = st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=30)


def overconfident(n: int = 2000) -> tuple[list[float], list[bool]]:
  """Votes of confidence c that are right with probability c^2: never too little confident."""
  rng = np.random.default_rng(0)
  sure = rng.uniform(size=n)
  return sure.tolist(), (rng.uniform(size=n) < sure**2).tolist()


def test_ece_weighs_the_gap_of_each_bin_by_its_votes():
  sure, right = [0.95, 0.95, 0.95, 0.95, 0.15], [True, True, True, False, False]
  # Four votes: 0.75 right at 0.95, a gap of 0.2. One: 0 at 0.15. 4/5 * 0.2 + 1/5 * 0.15.
  assert ece(sure, right) == pytest.approx(0.19)
  # A mean over bins that forgets how many votes each has would be 0.175.
  assert ece([0.2, 0.8], [True, False]) == pytest.approx(0.8)
  assert ece([0.2, 0.8], [True, False], bins=1) == pytest.approx(0.0)  # They make up for it.


def test_ece_of_certainty_has_a_bin():
  # 1.0 belongs to the last bin, not to one behind it.
  assert ece([1.0, 1.0], [True, True]) == 0.0
  assert ece([1.0], [False]) == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_calibration_brings_overconfidence_down(method):
  found = fit(*overconfident(), method=method)
  sure, right = overconfident(4000)
  sure, right = sure[2000:], right[2000:]  # Others than it was made with.
  before = ece(sure, right)
  # The mean of c - c^2 over [0, 1] is 1/6, and it is never negative.
  assert before == pytest.approx(1 / 6, abs=0.03)
  assert ece([found(c) for c in sure], right) < 0.05
  assert found(0.5) == pytest.approx(0.25, abs=0.1)


@settings(deadline=None, max_examples=10)
@given(VOTES, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8))
@pytest.mark.parametrize("method", METHODS)
def test_whoever_agrees_more_is_not_believed_less(method, votes, asked):
  """Whatever the votes were, even where the surer ones were wrong."""
  found = fit([c for c, _ in votes], [right for _, right in votes], method=method)
  believed = [found(c) for c in sorted(asked)]
  assert believed == sorted(believed)
  assert 0.0 <= believed[0] and believed[-1] <= 1.0


def test_platt_is_flat_where_confidence_misleads():
  found = fit([0.1, 0.2, 0.8, 0.9], [True, True, False, False], method="platt")
  # Smoothed targets (2 + 1) / (2 + 2) and 1 / (2 + 2): their mean is 1/2.
  assert {found(c) for c in (0.0, 0.3, 1.0)} == {0.5}


def test_platt_of_votes_that_are_all_right_is_not_certain():
  # 4 right of 4: the target is (4 + 1) / (4 + 2).
  assert fit([0.6] * 4, [True] * 4, method="platt")(0.6) == pytest.approx(5 / 6, abs=0.02)


def test_a_calibration_survives_json():
  found = Calibration(confidence=(0.1, 0.9), right=(0.3, 0.5))
  assert found(0.0) == 0.3 and found(1.0) == 0.5 and found(0.5) == pytest.approx(0.4)
  assert Calibration.from_dict(json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize(
  ("confidence", "right"),
  [((), ()), ((0.1,), (0.1, 0.2)), ((0.5, 0.5), (0.1, 0.2)), ((0.1, 0.2), (0.5, 0.4))],
)
def test_what_is_no_map_is_refused(confidence, right):
  with pytest.raises(ValueError, match="no map|must rise"):
    Calibration(confidence=confidence, right=right)


def test_wrong_votes_are_refused():
  with pytest.raises(ValueError, match="'beta' must be one of"):
    fit([0.5], [True], method="beta")
  with pytest.raises(ValueError, match="cannot be compared"):
    fit([], [], method="platt")
  with pytest.raises(ValueError, match=r"must be as many, and lie in \[0, 1\]"):
    ece([1.5], [True])
