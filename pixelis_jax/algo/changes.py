"""Since when things are as they are now."""

from collections.abc import Sequence

import numpy as np


def since(values: Sequence[float], mean: float, weights: Sequence[float] | None = None) -> int:
  """From which of these values on they are like the last ones, whose mean this is.

  The likeliest place of a change from a mean of 0 to this one, where all are as far off theirs by
  chance (E. S. Page, Continuous Inspection Schemes, Biometrika 41, 1954); the latest of equals.
  The number of values, none, where the mean is not positive, or no change is likelier than none.

  Args:
    values: in order.
    mean: of those since the change.
    weights: how much each value counts; None: all alike.
  """
  if not (mean > 0 and len(values)):
    return len(values)
  off = np.asarray(values, np.float64) - mean / 2
  # Log likelihoods of all from one on with this mean, less those with 0, over mean / variance.
  likelier = np.cumsum((off if weights is None else off * np.asarray(weights))[::-1])
  last = int(np.argmax(likelier))
  return len(values) - 1 - last if likelier[last] > 0 else len(values)
