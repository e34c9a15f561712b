"""rollouts.py: which updates a policy has seen is a matter of the config, not of who is faster."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from pixelis_jax import sharding
from pixelis_jax.rollouts import Rollouts


def run(
  steps: range, *, staleness: int, play=lambda step, updates, params: (step, updates, params)
):
  """What each step is given, saves being due after every fourth; parameters are "v<updates>"."""
  mesh = sharding.make_mesh(1)
  taken = []
  with Rollouts(play, steps, staleness=staleness, save_every=4, mesh=mesh) as rollouts:
    for i in steps:
      rollouts.publish(i, f"v{i}")
      taken.append(rollouts.take())
      assert taken[-1][1] == rollouts.updates(i)
  return taken


def test_each_step_is_played_after_a_fixed_number_of_updates():
  """Two updates behind, but never behind what was saved: after 4 updates, and at the start.

  Whoever took the newest that was there would often find 1 at step 1; without the save step 4
  would be played after 2.
  """
  expected = [0, 0, 0, 1, 4, 4, 4]
  assert run(range(7), staleness=2) == [(i, v, f"v{v}") for i, v in enumerate(expected)]


@pytest.mark.parametrize("slow", ["playing", "learning"])
def test_whoever_is_slow_the_run_is_the_same(slow):
  seen = []

  def play(step, updates, params):
    time.sleep(0.01 * (slow == "playing"))
    seen.append((step, params))
    return step, updates, params

  steps = range(6)
  with Rollouts(play, steps, staleness=1, save_every=4, mesh=sharding.make_mesh(1)) as rollouts:
    for i in steps:
      rollouts.publish(i, f"v{i}")
      assert rollouts.take()[0] == i
      time.sleep(0.01 * (slow == "learning"))
  assert seen == [(0, "v0"), (1, "v0"), (2, "v1"), (3, "v2"), (4, "v4"), (5, "v4")]


def test_a_resumed_run_begins_with_what_was_saved():
  """From 4 it is the tail of the whole run; from 5, where a SIGTERM came, nothing older is left."""
  assert run(range(4, 7), staleness=2) == run(range(7), staleness=2)[4:]
  assert run(range(5, 7), staleness=2) == [(5, 5, "v5"), (6, 5, "v5")]


def test_without_staleness_it_is_played_when_due_by_who_asks():
  threads = set()

  def play(step, updates, params):
    threads.add(threading.current_thread())
    return step, updates, params

  assert run(range(3), staleness=0, play=play) == [(i, i, f"v{i}") for i in range(3)]
  assert threads == {threading.current_thread()}


def test_it_is_ahead_of_the_learner_on_its_own_device():
  """Step 1 is played while nobody has taken step 0, by the same thread; so is what is called."""
  mesh = sharding.make_mesh(1, devices=jax.devices()[3:])
  played = threading.Event()
  where = lambda *_: (threading.current_thread(), jnp.zeros(()).devices())

  def play(step, updates, params):
    if step == 1:
      played.set()
    return where()

  with Rollouts(play, range(4), staleness=1, save_every=4, mesh=mesh) as rollouts:
    rollouts.publish(0, None)
    assert played.wait(10)
    found = {str(rollouts.take()), str(rollouts.take()), str(rollouts.call(where))}
  (only,) = found
  assert str({jax.devices()[3]}) in only and str(threading.current_thread()) not in only


def test_what_goes_wrong_ahead_is_raised_when_it_is_taken():
  def play(step, updates, params):
    if step == 1:
      raise FloatingPointError("boom")
    return step

  with Rollouts(play, range(4), staleness=1, save_every=4, mesh=sharding.make_mesh(1)) as rollouts:
    rollouts.publish(0, None)
    assert rollouts.take() == 0
    with pytest.raises(FloatingPointError, match="boom"):
      rollouts.take()
