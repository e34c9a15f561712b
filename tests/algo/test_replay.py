import numpy as np
import pytest

from pixelis_jax.algo.replay import Replay


def filled(advantages, *, capacity=10, alpha=1.0) -> Replay:
  replay = Replay(capacity, alpha=alpha)
  replay.add(list("abcdefgh"[: len(advantages)]), np.float32(advantages))
  return replay


@pytest.mark.parametrize(("alpha", "share"), [(1.0, 0.75), (2.0, 0.9), (0.0, 0.5)])
def test_samples_are_drawn_by_the_size_of_their_advantage(alpha, share):
  # |-3| against |1|: 3 / 4, 9 / 10, 1 / 2. By the signed advantage, the first would never come.
  replay, rng = filled([-3.0, 0.0, 1.0], alpha=alpha), np.random.default_rng(0)
  drawn = [replay.draw(1, rng)[0] for _ in range(2000)]
  assert set(drawn) == {("a", -3.0), ("c", 1.0)}
  # Three standard deviations of 2000 draws are at most 3 * sqrt(1/4 / 2000) = 0.034.
  assert np.mean([sample == "a" for sample, _ in drawn]) == pytest.approx(share, abs=0.034)


def test_nothing_is_drawn_twice_and_what_is_old_makes_room():
  replay, rng = filled([1.0, 2.0, 3.0, 4.0], capacity=3), np.random.default_rng(0)
  assert len(replay) == 3
  assert sorted(replay.draw(9, rng)) == [("b", 2.0), ("c", 3.0), ("d", 4.0)]
  assert len(replay.draw(2, rng)) == 2 and len(replay) == 3  # What is drawn stays.
  again = Replay(3, alpha=1.0)
  samples, pushes = zip(*replay.to_list(), strict=True)
  again.add(samples, np.float32(pushes))
  assert again.to_list() == [("b", 2.0), ("c", 3.0), ("d", 4.0)]
  replay.clear()
  assert replay.draw(2, rng) == []


def test_without_capacity_nothing_is_kept():
  assert filled([1.0, -1.0], capacity=0).draw(4, np.random.default_rng(0)) == []


def test_wrong_settings_are_named():
  with pytest.raises(ValueError, match="capacity -1 and alpha 1.0 must not be negative"):
    Replay(-1, alpha=1.0)
