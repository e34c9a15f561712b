import dataclasses
import json

import pytest

from pixelis_jax.algo.curriculum import RewardCurriculum, Settings

SETTINGS = Settings(
  start="goal",
  check_every=2,
  min_steps=4,
  window=2,
  goal_success=0.7,
  goal_steps=20,
  slope=0.01,
  patience=3,
  combined=0.65,
  coherence_steps=40,
)
WEIGHTS = {"task": 1.0, "format": 0.1, "coherence": 0.2, "curiosity": 0.5, "tool_bonus": 1.2}
WEIGHTS |= {"dynamics": 0.05}


def after(curriculum, steps, *, task=0.0, coherence=0.0):
  """After so many steps with these rewards, `coherence` a number or a function of the step."""
  for i in range(steps):
    value = coherence(i) if callable(coherence) else coherence
    curriculum = curriculum.update(task=task, coherence=value)
  return curriculum


def test_what_comes_later_weighs_nothing():
  begun = RewardCurriculum.begin(SETTINGS)
  later = begun.weights(WEIGHTS)
  paid_last = dict.fromkeys(("curiosity", "dynamics", "tool_bonus"), 0.0)
  assert later == {**WEIGHTS, "coherence": 0.0, **paid_last}
  second = dataclasses.replace(begun, stage="coherence")
  assert second.weights(WEIGHTS) == {**WEIGHTS, **paid_last}
  assert dataclasses.replace(begun, stage="full").weights(WEIGHTS) == WEIGHTS


def test_the_goal_is_learned_when_enough_succeed_and_not_before_the_first_check():
  begun = RewardCurriculum.begin(SETTINGS)
  assert after(begun, 3, task=1.0).stage == "goal"  # min_steps 4.
  ended = after(begun, 4, task=1.0)
  assert ended.stage == "coherence" and ended.steps == 0 and ended.task == ()
  # The window is 2 steps: failures before it are forgotten. Over all 6, 1/3 would not do.
  assert after(after(begun, 4), 2, task=1.0).stage == "coherence"
  # 5 is no check; at 0.7 itself it goes on.
  assert after(after(begun, 4), 1, task=1.0).stage == "goal"
  assert after(begun, 10, task=0.7).stage == "goal"


def test_every_stage_ends_at_the_latest_after_its_steps():
  begun = RewardCurriculum.begin(SETTINGS)
  assert after(begun, 19).stage == "goal" and after(begun, 20).stage == "coherence"
  second = dataclasses.replace(begun, stage="coherence")
  rising = lambda i: 0.01 * i - 0.5  # 0.02 a check: above the slope.
  assert after(second, 39, coherence=rising).stage == "coherence"
  assert after(second, 40, coherence=rising).stage == "full"


def test_coherence_ends_when_it_no_longer_improves():
  second = dataclasses.replace(RewardCurriculum.begin(SETTINGS), stage="coherence")
  # Checks at 4, 6, 8, ...; a slope needs 3 of them, so the first flat one is at 8, the third at 12.
  assert after(second, 11, coherence=0.1).stage == "coherence"
  assert after(second, 12, coherence=0.1).stage == "full"
  # Rising for 10 steps, then flat: the three averages at 10, 12, 14 still rise by more than 0.01 a
  # check; flat are 16, 18, 20.
  late = lambda i: 0.05 * min(i, 11)
  assert after(second, 19, coherence=late).stage == "coherence"
  # One rise in between starts the count anew: two flat checks, then none.
  jump = lambda i: 0.0 if i < 10 else 0.5
  assert after(second, 12, coherence=jump).flat == 0


def test_coherence_ends_when_both_are_good():
  second = dataclasses.replace(RewardCurriculum.begin(SETTINGS), stage="coherence")
  # (0.9 + 0.5) / 2 = 0.7 > 0.65; 0.9 alone would end it, too, were it not the mean.
  assert after(second, 4, task=0.9, coherence=0.5).stage == "full"
  assert after(second, 4, task=0.9, coherence=0.3).stage == "coherence"


def test_full_is_where_it_stays_and_no_curriculum_at_all():
  full = RewardCurriculum.begin(dataclasses.replace(SETTINGS, start="full"))
  assert after(full, 5, task=1.0) is full and full.weights(WEIGHTS) == WEIGHTS


def test_a_resumed_run_goes_on_where_it_was():
  values = [0.1, 0.5, 0.2, 0.3, 0.3, 0.31, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
  straight = dataclasses.replace(RewardCurriculum.begin(SETTINGS), stage="coherence")
  resumed = straight
  for value in values:
    straight = straight.update(task=value, coherence=value)
    resumed = resumed.update(task=value, coherence=value)
    saved = json.loads(json.dumps(resumed.to_dict()))
    resumed = RewardCurriculum.from_dict(SETTINGS, saved)
    assert resumed == straight


def test_wrong_settings_are_named():
  with pytest.raises(
    ValueError, match=r"start 'gaol' must be one of \['goal', 'coherence', 'full'"
  ):
    dataclasses.replace(SETTINGS, start="gaol")
  with pytest.raises(ValueError, match="patience 1 at least 2"):
    dataclasses.replace(SETTINGS, patience=1)
