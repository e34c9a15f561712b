"""Which episodes of a step teach: dynamic sampling, over-turn masking, selective sample replay."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import tiny_rft
from pixelis_jax import batch, rft, sharding, timing
from pixelis_jax.data.streams import training_tasks
from pixelis_jax.types import Status, Step, Trajectory
from tests import fakes


@pytest.fixture
def config():
  """2 questions of 4 samples; right answers earn 1, all else nothing."""
  c = tiny_rft.get_config("debug").copy_and_resolve_references().unlock()
  c.reward.weights = dict.fromkeys(c.reward.weights, 0.0) | {"task": 1.0}
  return c.lock()


def episode(task, answer, status=Status.ANSWERED) -> Trajectory:
  return Trajectory(
    task=task,
    steps=(
      Step(
        completion=fakes.completion("xyz"),
      ),
    ),
    status=status,
    answer=answer,
  )


@pytest.fixture
def play(config, policy, monkeypatch, tmp_path):
  """play(config, rights) -> (what a step plays, rounds): of each round, who is right."""
  mesh = sharding.make_mesh(data=1)
  watch = timing.Stopwatch(mesh, tmp_path, profile=False, playing=mesh)
  tasks = training_tasks(config.data, seed=0, sees=policy.sees)

  def played(c, rights, step=3):
    rounds = []

    def bind(sampler, params, *, first, key, **how):
      rounds.append(SimpleNamespace(first=first, key=key))
      return lambda requests: []

    def answered(asked, **how):
      right = rights[len(rounds) - 1]
      rounds[-1].asked = [task.id for task in asked[:: c.grpo.group]]
      pairs = zip(asked, right, strict=True)
      return [episode(task, task.answer if ok else "no such answer") for task, ok in pairs]

    monkeypatch.setattr(type(policy.sampler), "bind", bind)
    monkeypatch.setattr(rft.agent, "play", answered)
    return rft.play(c, policy, tasks, watch, step, step, policy.params), rounds, tasks

  return played


ALIKE, HALF = [1, 1, 1, 1], [0, 1, 0, 1]


def filtering(config, rounds: int):
  c = config.copy_and_resolve_references().unlock()
  c.grpo.filter_groups.enable, c.grpo.filter_groups.max_num_gen_batches = True, rounds
  return c


def test_without_a_filter_a_step_has_its_questions(config, play):
  played, rounds, tasks = play(config, [ALIKE + HALF])
  assert [t.task.id for t in played[::4]] == [tasks[6].id, tasks[7].id]  # Step 3 of 2 each.
  assert len(rounds) == 1 and rounds[0].first == 0


def test_groups_of_one_reward_are_asked_anew(config, play):
  played, rounds, tasks = play(filtering(config, 5), [ALIKE + HALF, HALF + HALF, HALF + HALF])
  # Two are needed: the second of the first round and the first of the next; no third round.
  first, second = (r.asked for r in rounds)
  assert [t.task.id for t in played[::4]] == [first[1], second[0]] and len(played) == 8
  # Step 3 has the questions from 3 * 5 * 2 on to itself, however many it asks.
  assert first + second == [tasks[n].id for n in range(30, 34)]
  # An episode's draws are its own: the second round's do not repeat the first's.
  assert [r.first for r in rounds] == [0, 8]
  assert (jax.random.key_data(rounds[0].key) == jax.random.key_data(rounds[1].key)).all()


def test_a_step_gives_up_after_its_rounds(config, play):
  played, rounds, _ = play(filtering(config, 2), [ALIKE + ALIKE] * 2)
  # The last round, so that the step can say that nothing differed.
  assert len(rounds) == 2 and [t.task.id for t in played[::4]] == rounds[1].asked
  played, _, _ = play(filtering(config, 2), [ALIKE + HALF, ALIKE + ALIKE])
  assert len(played) == 4  # One group is fewer than usual, and better than a wrong one.
  with pytest.raises(ValueError, match="max_num_gen_batches 0 must be at least 1"):
    play(filtering(config, 0), [])


def compared(c, policy, group):
  return rft.compare(c, rft.make_score(c, policy), dict(c.reward.weights), group)


def test_what_the_limits_cut_off_counts_in_the_mean_and_teaches_nothing(config, policy):
  task = fakes.task("a")
  group = [episode(task, "7"), episode(task, "8"), episode(task, "8")]
  group.append(episode(task, None, Status.OUT_OF_STEPS))
  _, rows, pushes, spread = compared(config, policy, group)
  assert len(rows) == 4 and pushes.tolist() == [0.75, -0.25, -0.25, -0.25]
  # Rewards 1, 0, 0, 0.
  parts = lambda name: [spread[f"{name}/{part}"] for part in ("mean", "max", "min")]
  assert parts("critic/score") == parts("critic/rewards") == [0.25, 1.0, 0.0]
  assert parts("critic/advantages") == [0.0, 0.75, -0.25]  # All episodes have as many tokens.
  c = config.copy_and_resolve_references().unlock()
  c.grpo.over_turn_masking = True
  _, rows, pushes, measured = compared(c, policy, group)
  # Left out of the mean, too, it would be 2/3 and -1/3.
  assert len(rows) == 3 and pushes.tolist() == [0.75, -0.25, -0.25]
  assert measured["zero_variance"] == 0.0
  # What teaches nothing was still earned: the spread is that of all samples.
  assert measured.items() >= spread.items()


def test_the_estimator_is_the_configured_one(config, policy):
  task = fakes.task("a")
  c = config.copy_and_resolve_references().unlock()
  c.grpo.adv_estimator = "rloo"
  _, _, pushes, _ = compared(c, policy, [episode(task, a) for a in ("7", "8", "8", "8")])
  np.testing.assert_allclose(pushes, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


def test_replay_fills_up_what_is_missing_until_the_next_checkpoint(config):
  """2 questions of 4: a step lacks 8 less its rows. Nothing outlives a checkpoint."""
  c = config.copy_and_resolve_references().unlock()
  c.grpo.replay.capacity, c.save_every = 16, 3
  row = batch.trajectory_row(episode(fakes.task("a"), "7"))
  replay, pushes = rft.Replay(16, alpha=1.0), np.float32([1.0, -1.0, 0.0, 0.5, -0.5, 0.25])
  steps = [rft.replayed(c, replay, [row] * 6, pushes, step) for step in range(4)]
  # 8 - 6; before its own are remembered, so that none is in a step twice. The 0 is not kept.
  assert [len(rows) for rows, _ in steps] == [0, 2, 2, 0]
  assert set(steps[1][1].tolist()) <= {1.0, -1.0, 0.5, -0.5, 0.25}
  # The same draw whenever step 1 is taken.
  again = rft.Replay(16, alpha=1.0)
  rft.replayed(c, again, [row] * 6, pushes, 0)
  assert rft.replayed(c, again, [row] * 6, pushes, 1)[1].tolist() == steps[1][1].tolist()
