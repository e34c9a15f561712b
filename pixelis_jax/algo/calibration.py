"""From how sure a vote is to how often such votes are right, and how far apart the two are."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64

NONE = "none"
EDGE = 1e-3  # Confidences are kept this far from 0 and 1 where their log-odds are taken.
WEAK = 1e6  # Of Platt's fit: one over the weight of its regulariser.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
  """Straight lines between points, flat before the first and behind the last; it never falls.

  So votes keep their order: whoever agrees more is not believed less.

  Attributes:
    confidence: of the points, rising, each in [0, 1].
    right: share of such votes that are right.
  """

  confidence: tuple[float, ...]
  right: tuple[float, ...]

  def __post_init__(self):
    if len(self.confidence) != len(self.right) or not self.confidence:
      raise ValueError(f"{len(self.confidence)} confidences and {len(self.right)} shares: no map")
    rising = all(a < b for a, b in itertools.pairwise(self.confidence))
    falling = any(a > b for a, b in itertools.pairwise(self.right))
    if not rising or falling or not all(0 <= x <= 1 for x in (*self.confidence, *self.right)):
      raise ValueError(
        f"confidences {self.confidence} must rise and shares {self.right} not fall, in [0, 1]"
      )

  def __call__(self, confidence: float) -> float:
    return float(np.interp(confidence, self.confidence, self.right))

  @classmethod
  def from_dict(cls, values: Mapping[str, Sequence[float]]) -> "Calibration":
    """Back from the lists that JSON makes of `dataclasses.asdict`."""
    return cls(**{name: tuple(numbers) for name, numbers in values.items()})


def fit(confidences: Sequence[float], right: Sequence[bool], *, method: str) -> Calibration:
  """By one of `METHODS`; any other name, and no votes at all, are a ValueError."""
  check(method)
  if not confidences or len(confidences) != len(right):
    raise ValueError(f"{len(confidences)} confidences and {len(right)} outcomes cannot be compared")
  return METHODS[method](np.asarray(confidences, np.float64), np.asarray(right, bool))


def check(method: str) -> None:
  """Raises ValueError for a name that is not in `METHODS`."""
  if method not in METHODS:
    raise ValueError(f"calibration.method {method!r} must be one of {[NONE, *METHODS]}")


def isotonic(confidences: Float64[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Calibration:
  """The map of least squares among all that never fall: Zadrozny and Elkan, KDD 2002.

  It has any shape, and needs some hundreds of votes: where it has few, it is as sure as they were.
  """
  from sklearn.isotonic import IsotonicRegression  # Here: 2 seconds of each start.

  found = IsotonicRegression(y_min=0.0, y_max=1.0).fit(confidences, right.astype(np.float64))
  return _through(found.X_thresholds_, found.y_thresholds_)


def platt(confidences: Float64[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Calibration:
  """A line in log-odds: two numbers, for few votes. Platt 1999, with his smoothed targets.

  Where the surer votes are right less often, the map is flat.
  """
  from sklearn.linear_model import LogisticRegression

  wins, losses = int(right.sum()), int((~right).sum())
  target = np.where(right, (wins + 1) / (wins + 2), 1 / (losses + 2))
  n = len(right)
  odds = np.tile(_log_odds(confidences), 2)[:, None]
  outcome, weight = np.repeat([1, 0], n), np.concatenate([target, 1 - target])
  line = LogisticRegression(C=WEAK).fit(odds, outcome, weight)
  grid = np.linspace(0.0, 1.0, 101)
  if line.coef_[0, 0] > 0:
    return _through(grid, line.predict_proba(_log_odds(grid)[:, None])[:, 1])
  return _through(grid, np.full(grid.shape, target.mean()))


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Calibration]] = {
  "isotonic": isotonic,
  "platt": platt,
}


def ece(confidences: Sequence[float], right: Sequence[bool], *, bins: int = 10) -> float:
  """Expected calibration error: https://arxiv.org/abs/1706.04599, equation 3.

  Of equally wide bins of confidence, the mean over the votes of |share right - mean confidence|.
  Raises ValueError for no votes, or a confidence outside [0, 1].
  """
  sure, won = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
  if not len(sure) or sure.shape != won.shape or not ((sure >= 0) & (sure <= 1)).all():
    raise ValueError(
      f"{len(sure)} confidences and {len(won)} outcomes must be as many, and lie in [0, 1]"
    )
  place = np.minimum((sure * bins).astype(int), bins - 1)
  gaps = [abs(float((won - sure)[place == b].sum())) for b in range(bins)]
  return math.fsum(gaps) / len(sure)


def _log_odds(confidences: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
  kept = np.clip(confidences, EDGE, 1 - EDGE)
  return np.log(kept / (1 - kept))


def _through(x: np.ndarray, y: np.ndarray) -> Calibration:
  """Points of rising confidence; rounding must not make the shares fall."""
  shares = np.maximum.accumulate(np.clip(y, 0.0, 1.0))
  return Calibration(confidence=tuple(x.tolist()), right=tuple(shares.tolist()))
