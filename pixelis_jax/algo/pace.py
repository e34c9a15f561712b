"""How fast a policy may learn online: its rate by confidence, its updates a minute."""

import time
from collections import deque
from collections.abc import Callable, Sequence

FIXED, CONFIDENCE = "fixed", "confidence"
MINUTE = 60.0


def rate_share(confidences: Sequence[float], *, rule: str, lr: float, lr_min: float) -> float:
  """The share of the learning rate `lr` that an update on these votes is made with, in (0, 1].

  "fixed" is all of it. "confidence" is the torch project's rule, clip(lr (1 - c), lr_min, lr), for
  the mean confidence c: what all agree on is known already, and a wrong majority is sure, too.
  """
  if rule == FIXED:
    return 1.0
  if rule != CONFIDENCE:
    raise ValueError(f"learn.lr_rule {rule!r} must be {FIXED!r} or {CONFIDENCE!r}")
  if not 0 < lr_min <= lr:
    raise ValueError(f"learn.lr_min {lr_min} must be positive and at most learn.lr {lr}")
  mean = sum(confidences) / len(confidences)
  return min(max(1.0 - mean, lr_min / lr), 1.0)


class Throttle:
  """At most so many starts in any minute; the others wait.

  The clock and what waits are given, both in seconds: tests wait for nothing.
  """

  def __init__(
    self,
    per_minute: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    """`per_minute` 0: no limit."""
    if per_minute < 0:
      raise ValueError(f"starts a minute {per_minute} must not be negative; 0 is no limit")
    self._starts: deque[float] = deque(maxlen=per_minute)
    self._clock, self._sleep = clock, sleep

  def start(self) -> float:
    """Returns when one more may start; how many seconds that took."""
    if not self._starts.maxlen:
      return 0.0
    asked = self._clock()
    if len(self._starts) == self._starts.maxlen:
      # Asked again: a sleep may end early.
      while (left := self._starts[0] + MINUTE - self._clock()) > 0:
        self._sleep(left)
    now = self._clock()
    self._starts.append(now)  # The oldest drops out.
    return now - asked
