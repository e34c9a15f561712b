"""Since when: places of changes that are known."""

import numpy as np
import pytest

from pixelis_jax.algo.changes import since


def test_a_change_is_where_values_begin_to_be_like_the_last():
  # Sums from the right of value - 1/2: 0.5, 1.0, 1.5, then down to 1.0 and up to 1.4.
  assert since([0.0, 0.9, 0.0, 1.0, 1.0, 1.0], 1.0) == 3
  # One that is off does not hide those before it: 0.5, 1.0, 0.5, 1.0, 1.5, where it ends highest.
  assert since([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], 1.0) == 1
  assert since([1.0, 1.0, 1.0], 1.0) == 0
  # As far as half the mean all are taken for the last ones: weaker, but no change to nothing.
  assert since([0.6, 0.6, 1.0], 1.0) == 0 and since([0.4, 0.4, 1.0], 1.0) == 2


def test_where_nothing_leads_nothing_is_alike():
  assert since([], 1.0) == 0
  for mean in (0.0, -1.0, float("nan")):
    assert since([1.0, 1.0], mean) == 2
  assert since([1.0, 1.0, 0.0], 4.0) == 3  # All are likelier to be of mean 0.


def test_weights_are_how_much_a_value_counts():
  # The zero between, of weight 4, takes away 4 / 2 where the ones give 1/2 each.
  values = [1.0, 1.0, 0.0, 1.0, 1.0]
  assert since(values, 1.0) == 0
  assert since(values, 1.0, [1.0, 1.0, 4.0, 1.0, 1.0]) == 3
  assert since(values, 1.0, [1.0] * 5) == 0


@pytest.mark.parametrize("at", (0, 100, 250))
def test_a_change_is_found_among_noise(at):
  """Errors as large as the mean: each value after the change adds 1/2, and 1 by chance."""
  rng = np.random.default_rng(at)
  values = rng.standard_normal(300) + (np.arange(300) >= at)
  # Beyond the change the sum drifts by -1/2 a value: it comes back by chance e^-k after k values
  # (a random walk of drift -1/2 and variance 1), so 12 too early or late is one in 10^5.
  assert abs(since(values.tolist(), 1.0) - at) <= 12
