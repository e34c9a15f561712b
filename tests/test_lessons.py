"""A stage has a stream of its own, and the weights with which it began."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import tiny_sft
from pixelis_jax import learner
from pixelis_jax.lessons import Lessons


@pytest.fixture
def config():
  """Two stages; one evaluation is enough for a change."""
  c = ConfigDict(tiny_sft.get_config().curriculum.to_dict())
  c.update(enable=True, simple=(1.0, 0.0), medium=(0.0, 0.0), hard=(0.0, 1.0))
  c.update(window=1, patience=1, min_steps=1, max_steps=0, cooldown=0)
  return c


TX = optax.adam(optax.linear_schedule(1.0, 0.0, 10))


def begun():
  return learner.init_state({"w": jnp.zeros(2)}, TX, seed=0)


def stepped(state, gradient=1.0):
  with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count.
    updates, moments = TX.update({"w": jnp.full(2, gradient)}, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=moments)


def numbers(curriculum):
  """Rows that tell the change and the stage from which they are read."""
  of = 100 * curriculum.changes + 10 * curriculum.stage
  return iter(grain.MapDataset.range(of, of + 10).to_iter_dataset())


def opened(c, folder):
  return Lessons(c, numbers, TX, folder)


def read(lessons, count):
  return [next(lessons.rows) for _ in range(count)]


def test_a_stage_begins_its_stream_and_falls_back_to_its_weights(config, tmp_path, capsys):
  lessons = opened(config, tmp_path)
  assert read(lessons, 2) == [0, 1]
  first = stepped(begun())
  assert lessons.heard(1, 0.6, first) is first  # Below the target, 0.7.
  assert read(lessons, 1) == [2] and lessons.measured() == {"stage": 0.0}
  second = stepped(first)
  assert lessons.heard(2, 0.8, second) is second
  assert read(lessons, 1) == [110] and lessons.measured() == {"stage": 1.0}
  third = stepped(second, 100.0)
  back = lessons.heard(3, 0.7, third)  # Below 0.8 - 0.05.
  assert read(lessons, 2) == [200, 201] and lessons.measured() == {"stage": 0.0}
  np.testing.assert_array_equal(back.params["w"], second.params["w"])
  (adam, rate), (then, _), (_, now) = back.opt_state, second.opt_state, third.opt_state
  np.testing.assert_array_equal(adam.mu["w"], then.mu["w"])
  np.testing.assert_array_equal(adam.nu["w"], then.nu["w"])
  # Time does not go back: neither the step nor what the rate is read off.
  assert int(back.step) == int(rate.count) == int(now.count) == int(adam.count) == 3
  said = capsys.readouterr().out.splitlines()
  assert said[0] == "step 2: stage 0 to 1 of the curriculum: 0% simple, 0% medium, 100% hard"
  assert said[1].startswith("step 3: stage 1 to 0 of the curriculum: 100% simple")
  lessons.close()


def test_a_killed_run_is_promoted_and_rolled_back_again(config, tmp_path):
  """Killed after its promotion, which its last checkpoint does not know; and before a rollback."""
  states = [stepped(begun())]
  for _ in range(3):
    states.append(stepped(states[-1]))
  lessons = opened(config, tmp_path)
  read(lessons, 3)
  before = json.loads(json.dumps(lessons.position()))
  lessons.heard(1, 0.8, states[0])
  read(lessons, 1)
  between = json.loads(json.dumps(lessons.position()))
  lessons.close()

  again = opened(config, tmp_path)
  again.restore(before)
  assert read(again, 1) == [3]
  again.heard(1, 0.8, states[0])  # What it saves is there.
  assert json.loads(json.dumps(again.position()["curriculum"])) == between["curriculum"]
  again.close()

  last = opened(config, tmp_path)
  last.restore(between)
  assert read(last, 1) == [111]
  back = last.heard(3, 0.1, states[2])
  np.testing.assert_array_equal(back.params["w"], states[0].params["w"])
  last.close()


def test_without_a_curriculum_nothing_is_there_and_nothing_changes(config, tmp_path):
  config.enable = False
  lessons, state = opened(config, tmp_path), begun()
  assert read(lessons, 1) == [0]
  for accuracy in (0.9, 0.1):
    assert lessons.heard(1, accuracy, state) is state
  assert lessons.position().keys() == {"data"} and lessons.measured() == {}
  assert read(lessons, 1) == [1]
  lessons.close()
  assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_to_whether_it_has_a_curriculum(config, tmp_path):
  with_one = opened(config, tmp_path).position()
  config.enable = False
  without = opened(config, tmp_path)
  with pytest.raises(ValueError, match="curriculum.enable is False, and was True when"):
    without.restore(with_one)
  config.enable = True
  with pytest.raises(ValueError, match="curriculum.enable is True, and was False when"):
    opened(config, tmp_path).restore(without.position())
