import dataclasses
import json

import pytest

from pixelis_jax.algo.data_curriculum import DataCurriculum, Settings

SETTINGS = Settings(
  enable=True,
  simple=(1.0, 0.5, 0.2),
  medium=(0.0, 0.5, 0.3),
  hard=(0.0, 0.0, 0.5),
  target=0.7,
  tolerance=0.05,
  window=2,
  patience=2,
  min_steps=30,
  max_steps=100,
  cooldown=20,
  backoff=2.0,
)
BEGUN = DataCurriculum(settings=SETTINGS)


def after(curriculum, *accuracies, every=10):
  """After evaluations each `every` steps from the last change on."""
  first = curriculum.since
  for i, accuracy in enumerate(accuracies, 1):
    curriculum = curriculum.update(first + every * i, accuracy)
    if curriculum.since != first:
      assert i == len(accuracies), f"changed at evaluation {i} of {len(accuracies)}"
  return curriculum


def second():
  """Promoted at step 30, where the last two were 0.8 and 0.9."""
  return after(BEGUN, 0.7, 0.8, 0.9)


def test_a_stage_has_its_shares():
  assert BEGUN.shares == {"simple": 1.0, "medium": 0.0, "hard": 0.0}
  third = dataclasses.replace(BEGUN, stage=2)
  assert third.shares == {"simple": 0.2, "medium": 0.3, "hard": 0.5}


def test_a_stage_is_left_when_it_is_learned_for_long_enough():
  assert after(BEGUN, 0.9, 0.9).stage == 0  # Ready twice, and min_steps are 30.
  ended = second()
  assert (ended.stage, ended.changes, ended.since, ended.promoted_at) == (1, 1, 30, 30)
  assert ended.reference == pytest.approx(0.85)  # The window is 2; of all three it were 0.8.
  assert ended.accuracies == () and ended.streak == 0
  # Means 0.9, 0.8, 0.65, 0.65, 0.75, 0.8: the streak breaks at the third, and begins at the fifth.
  assert after(BEGUN, 0.9, 0.7, 0.6, 0.7, 0.8, 0.8).stage == 1
  assert after(BEGUN, 0.9, 0.7, 0.6, 0.7, 0.8).stage == 0


def test_a_stage_ends_at_the_latest_after_its_steps():
  assert after(BEGUN, *[0.1] * 9).stage == 0
  assert after(BEGUN, *[0.1] * 10).stage == 1
  endless = dataclasses.replace(BEGUN, settings=dataclasses.replace(SETTINGS, max_steps=0))
  assert after(endless, *[0.1] * 50).stage == 0


def test_evaluations_in_a_cooldown_do_not_count():
  # 20 steps: that at 10 is not heard. Were it, 0.1 and 0.1 would be two falls at step 20.
  settling = after(second(), 0.1)
  assert settling == second()
  assert after(second(), 0.1, 0.1).streak == 1
  assert BEGUN.update(10, 0.5).accuracies == (0.5,)  # At the beginning nothing has changed.


def test_a_stage_that_falls_is_gone_back_from():
  # The reference is 0.85: above 0.80 is no fall. Held to the last accuracy, 0.9, it would be one.
  assert after(second(), 0.0, 0.81).verdict == "ready"
  assert after(second(), 0.0, 0.79).verdict == "fallen"
  back = after(second(), 0.0, 0.79, 0.79)
  assert (back.stage, back.changes, back.since, back.falls) == (0, 2, 60, 1)
  assert back.promoted_at is None
  # One fall alone, then the mean is 0.84: nothing.
  assert after(second(), 0.0, 0.79, 0.89).stage == 1
  # Steps alone leave no stage that is falling: the mean at 100 is 0.79, for the first time.
  unlearned = dataclasses.replace(second(), settings=dataclasses.replace(SETTINGS, target=0.99))
  falling = after(unlearned, *[0.85] * 8, 0.81, 0.77)
  assert (falling.stage, falling.verdict, falling.streak) == (1, "fallen", 1)


def test_a_stage_that_was_gone_back_to_lasts_longer_and_is_kept():
  back = after(second(), 0.0, 0.7, 0.7)
  assert after(back, *[0.9] * 5).stage == 0  # 50 steps, and min_steps is 60 now.
  again = after(back, *[0.9] * 6)
  assert again.stage == 1 and again.falls == 1
  # It is held to nothing: where it came from is no better.
  assert after(back, *[0.0] * 5).verdict == ""
  # max_steps is 200.
  assert after(back, *[0.0] * 19).stage == 0 and after(back, *[0.0] * 20).stage == 1
  # Falls of one stage add up, and those of another don't: 30 * 2 ** 2 after the second.
  twice = after(again, 0.0, 0.7, 0.7)
  assert twice.falls == 2
  assert after(twice, *[0.9] * 11).stage == 0 and after(twice, *[0.9] * 12).stage == 1
  third = after(again, 0.0, 0.9, 0.9)
  assert (third.stage, third.falls) == (2, 0)


def test_the_last_stage_has_no_end():
  third = dataclasses.replace(BEGUN, stage=2)
  assert after(third, *[0.9] * 30).stage == 2


def test_each_change_begins_another_stream():
  back = after(second(), 0.0, 0.7, 0.7)
  seeds = [curriculum.seed(0) for curriculum in (BEGUN, second(), back)]
  assert len(set(seeds)) == 3 and BEGUN.seed(1) not in seeds  # Stage 0 again is read anew.
  assert BEGUN.seed(0) == after(BEGUN, 0.5, 0.5).seed(0)


def test_without_it_nothing_changes():
  off = DataCurriculum(settings=dataclasses.replace(SETTINGS, enable=False))
  assert after(off, *[0.9] * 30) is off


def test_a_resumed_run_goes_on_where_it_was():
  straight = resumed = BEGUN
  for step, accuracy in enumerate([0.9] * 4 + [0.6] * 4 + [0.9] * 8, 1):
    straight = straight.update(10 * step, accuracy)
    saved = json.loads(json.dumps(resumed.to_dict()))
    resumed = DataCurriculum.from_dict(SETTINGS, saved).update(10 * step, accuracy)
    assert resumed == straight
  # Promoted at 30; 50 and 60 have fallen: back; again at 120, as min_steps are 60; and at 150.
  assert (straight.stage, straight.changes, straight.since) == (2, 4, 150)
  with pytest.raises(ValueError, match="stage 3 is beyond the last of the settings, 2"):
    DataCurriculum.from_dict(SETTINGS, straight.to_dict() | {"stage": 3})


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"hard": (0.0, 0.5)}, r"have \(3, 3, 2\) stages"),
    (
      {"hard": (0.0, 0.1, 0.5)},
      r"stage 1: shares \(0.5, 0.5, 0.1\) must be 0 or more and sum to 1",
    ),
    (
      {"simple": (1.5, 0.5, 0.2), "medium": (-0.5, 0.5, 0.3)},
      r"stage 0: shares \(1.5, -0.5, 0.0\)",
    ),
    ({"patience": 0}, "patience 0 must be at least 1"),
    ({"backoff": 0.5}, "backoff 0.5 at least 1"),
    ({"cooldown": -1}, "cooldown -1"),
    ({"max_steps": 20}, "max_steps 20 must be 0 or at least 30"),
  ],
)
def test_wrong_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SETTINGS, **changes)
