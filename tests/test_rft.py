"""RFT steps on the tokens it sampled; a resumed run is the same run."""

import json
import shutil

import numpy as np
import pytest

from configs import tiny_rft
from pixelis_jax import rft
from pixelis_jax.types import Reward, Status, Step, ToolCall, ToolResult, Trajectory
from tests import fakes
from tests.episodes import max_difference


def score(group, *, curiosity, target):
  """Random weights earn nothing, so here an odd first token does: a fact of what was sampled."""
  assert target == group[0].task.answer is not None
  return [Reward(task=float(t.steps[0].completion.tokens[0] % 2)) for t in group]


@pytest.fixture(scope="module")
def config(model_config):
  """Four steps of 2 x 4 samples, one tiny evaluation at the end."""
  c = tiny_rft.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed, c.model.max_tokens = model_config.path, 0, 3
  c.limits.turns, c.eval.n = 2, 2
  return c.lock()


@pytest.fixture(scope="module", autouse=True)
def scored():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rft.rewards, "score", score)
    yield


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
  """(workdir, final state) of a run from 0 to 4."""
  workdir = tmp_path_factory.mktemp("rft") / "run"
  return workdir, rft.main(config, workdir)


def logged(workdir, name="metrics.jsonl"):
  lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
  timeless = lambda line: {k: v for k, v in line.items() if "time" != k and "seconds" not in k}
  return [timeless(line) for line in lines]


def test_a_run_learns_from_its_own_samples(config, straight, policy):
  workdir, state = straight
  assert int(state.step) == config.optimizer.steps == 4
  lines = logged(workdir)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
  steps = [line for line in lines if "loss" in line]
  assert steps, "no group had two outcomes: the test says nothing"
  for line in steps:
    assert line["skipped"] == 0.0 and 0 < line["grad_norm"] < np.inf
    # The learner's probabilities of the tokens are the sampler's.
    assert line["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and line["clip_fraction"] == 0.0
  assert max_difference(state.params, policy.params) > 1e-5
  assert (workdir / "model" / "model.safetensors").exists()
  assert [line["step"] for line in logged(workdir, "trajectories.jsonl")] == [1, 2, 3, 4]


def test_resuming_at_two_of_four_is_bit_identical(config, straight, tmp_path):
  workdir, state = straight
  killed = tmp_path / "killed"
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  resumed = rft.main(config, killed)
  assert int(resumed.step) == 4
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(workdir)
  assert logged(killed, "trajectories.jsonl") == logged(workdir, "trajectories.jsonl")


def test_groups_without_a_difference_teach_nothing(config, tmp_path, monkeypatch, policy):
  same = lambda group, *, curiosity, target: [Reward(task=1.0) for _ in group]
  monkeypatch.setattr(rft.rewards, "score", same)
  c = config.copy_and_resolve_references().unlock()
  c.optimizer.steps, c.save_every = 1, 1
  state = rft.main(c, tmp_path / "run")
  assert int(state.step) == 1
  # Not even weight decay moves it.
  assert max_difference(state.params, policy.params) == 0.0
  assert logged(tmp_path / "run")[0]["zero_variance"] == 1.0


def test_summary_is_means_over_trajectories():
  look = Step(
    completion=fakes.completion("x"),
    call=ToolCall(name="zoom_in", arguments={}),
    result=ToolResult(text="seen"),
  )
  end = Step(completion=fakes.completion("y"))
  episode = lambda *steps: Trajectory(
    task=fakes.task("a"), steps=steps, status=Status.NO_ANSWER, answer=None
  )
  played = [episode(look, look, end), episode(end)]
  rewards = [Reward(task=1.0, curiosity=0.5), Reward(format=1.0)]
  expected = {"task": 0.5, "format": 0.5, "curiosity": 0.25, "tool_rate": 0.5, "calls": 1.0}
  assert rft.summary(rewards, played) == expected


def test_a_wrong_model_path_is_named(config, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed = str(tmp_path / "no-such-model"), -1
  with pytest.raises(FileNotFoundError, match="no-such-model"):
    rft.main(c, tmp_path / "run")
