import pytest

from pixelis_jax.algo.pace import Throttle, rate_share


class Clock:
  """Time passes where somebody sleeps, and where a test says so."""

  def __init__(self, wakes_early: float = 0.0):
    self.now, self.slept, self._early = 0.0, [], wakes_early

  def __call__(self) -> float:
    return self.now

  def sleep(self, seconds: float) -> None:
    self.slept.append(seconds)
    self.now += max(seconds - self._early, 0.5)


def throttle(per_minute: int, clock: Clock) -> Throttle:
  return Throttle(per_minute, clock=clock, sleep=clock.sleep)


def test_a_start_too_many_waits_until_the_first_is_a_minute_old():
  clock = Clock()
  limited = throttle(2, clock)
  assert limited.start() == 0.0
  clock.now = 50.0
  assert limited.start() == 0.0
  clock.now = 55.0
  # Starts at 0 and 50: the next at 60. A window that is emptied each minute would take two then.
  assert limited.start() == 5.0 and clock.now == 60.0
  assert limited.start() == 50.0 and clock.now == 110.0


def test_who_wakes_early_sleeps_again():
  clock = Clock(wakes_early=10.0)
  limited = throttle(1, clock)
  limited.start()
  limited.start()
  assert clock.slept[:2] == [60.0, 10.0] and clock.now >= 60.0


def test_no_limit_never_waits():
  clock = Clock()
  limited = throttle(0, clock)
  assert [limited.start() for _ in range(100)] == [0.0] * 100 and clock.slept == []
  with pytest.raises(ValueError, match="starts a minute -1"):
    throttle(-1, clock)


def test_the_rate_falls_as_votes_are_surer():
  rule = lambda *c: rate_share(c, rule="confidence", lr=1e-4, lr_min=1e-6)
  # clip(1e-4 (1 - 0.7), 1e-6, 1e-4) = 3e-5, the largest that passes the torch project's gate.
  assert rule(0.7) == pytest.approx(0.3)
  assert rule(0.5, 0.9) == pytest.approx(0.3)
  assert rule(1.0) == pytest.approx(0.01)  # Not 0: lr_min.
  assert rule(0.0) == 1.0
  assert rate_share([0.9], rule="fixed", lr=1e-4, lr_min=0.0) == 1.0


@pytest.mark.parametrize("lr_min", [0.0, 2e-4])
def test_impossible_rates_are_refused(lr_min):
  with pytest.raises(ValueError, match="learn.lr_min .* must be positive and at most"):
    rate_share([0.5], rule="confidence", lr=1e-4, lr_min=lr_min)
  with pytest.raises(ValueError, match="learn.lr_rule 'cosine' must be"):
    rate_share([0.5], rule="cosine", lr=1e-4, lr_min=1e-6)
