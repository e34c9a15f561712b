"""RFT steps on the tokens it sampled; a resumed run is the same run."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny_rft
from pixelis_jax import rft, runs
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.model import lora
from pixelis_jax.model.load import load
from pixelis_jax.model.peft import load_adapter
from pixelis_jax.surprise import Surprise
from pixelis_jax.types import Reward, Status, Step, ToolCall, ToolResult, Trajectory
from tests import episodes, fakes
from tests.episodes import max_difference

flat = nnx.traversals.flatten_mapping


def score(group, c, *, target, **how):
  """Random weights earn nothing, so here an odd first token does: a fact of what was sampled."""
  assert target == group[0].task.answer is not None
  return [Reward(task=float(t.steps[0].completion.tokens[0] % 2)) for t in group]


@pytest.fixture(scope="module")
def config(model_config):
  """Four steps of 2 x 4 samples, one tiny evaluation at the end."""
  c = tiny_rft.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed, c.model.max_tokens = model_config.path, 0, 3
  c.limits.turns, c.eval.n = 2, 2
  c.mesh.data = 1  # Meshes: test_meshes.py, test_cluster.py.
  c.model.rows_multiple = c.rows_multiple = 8  # All rows of a step, always: few programs.
  c.optimizer.lr = 1e-3  # So that an update more or less shows.
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
  timeless = lambda line: {k: v for k, v in line.items() if not k.startswith(("tim", "perf/"))}
  return [timeless(line) for line in lines]


def test_a_run_learns_from_its_own_samples(config, straight, policy):
  workdir, state = straight
  assert int(state.step) == config.optimizer.steps == 4
  lines = logged(workdir)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
  steps = [line for line in lines if "actor/loss" in line]
  assert steps, "no group had two outcomes: the test says nothing"
  for line in steps:
    assert line["actor/skipped"] == 0.0 and 0 < line["actor/grad_norm"] < np.inf
    # The learner's probabilities of the tokens are the sampler's.
    assert line["actor/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert line["actor/pg_clipfrac"] == 0.0
    assert line["actor/loss"] == pytest.approx(line["actor/pg_loss"], abs=1e-7)  # kl_coef is 0.
    assert line["critic/score/mean"] == line["task"] and line["tool_call_counts/max"] >= 0
    # A turn has up to 3 tokens here, an episode two turns, that is up to four of the chat.
    assert 1 <= line["response_length/min"] <= line["response_length/mean"]
    assert 2 <= line["num_turns/min"] <= line["num_turns/mean"] <= line["num_turns/max"] <= 4
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


@pytest.fixture(scope="module")
def lora_config(config):
  """The same with adapters of rank 2 on the decoder, held to their reference."""
  c = config.copy_and_resolve_references().unlock()
  c.model.lora.rank, c.model.lora.alpha = 2, 8.0
  c.grpo.kl_coef = 0.1
  return c.lock()


@pytest.fixture(scope="module")
def lora_run(lora_config, tmp_path_factory):
  """(workdir, final state, the step's base, [the reference's weights]) of a run from 0 to 4."""
  workdir, bases, references = tmp_path_factory.mktemp("lora") / "run", [], []
  parts, make_logps = rft.trainable.parts, rft.learner.make_logps

  def spied(*what):
    bases.append(parts(*what)[1])
    return parts(*what)

  def compared(model, *how, **options):
    assert model.lora is None
    compute = make_logps(model, *how, **options)
    return lambda params, inputs: references.append(params) or compute(params, inputs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rft.trainable, "parts", spied)
    patch.setattr(rft.learner, "make_logps", compared)
    state = rft.main(lora_config, workdir)
  return workdir, state, bases[0], references


def test_adapters_alone_are_trained_and_saved(lora_run, policy):
  workdir, state, base, _ = lora_run
  last = lambda tree: [path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(tree)]
  moments = [x for x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x[1].ndim]
  adapters = state.params
  assert set(last(adapters)) == {"lora_a", "lora_b"} == {path[-1].key for path, _ in moments}
  assert len(moments) == 2 * len(jax.tree.leaves(adapters))
  # What the steps were given is, bit for bit, what the same seed gave another program.
  assert max_difference(lora.plain(base), policy.params) == 0.0
  assert max(float(abs(x).max()) for p, x in flat(adapters).items() if p[-1] == "lora_b") > 1e-5
  model, params = load_adapter(workdir / "adapter", policy.model, policy.params)
  assert max_difference(lora.split(params)[0], adapters) == 0.0
  _, merged = load(workdir / "model")
  assert max_difference(merged, lora.merge(params)) == 0.0
  assert max_difference(merged, policy.params) > 1e-6


def test_a_run_with_adapters_resumes_bit_for_bit(lora_config, lora_run, tmp_path):
  workdir, state, *_ = lora_run
  killed = tmp_path / "killed"
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  resumed = rft.main(lora_config, killed)
  assert int(resumed.step) == 4
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(workdir)


def test_the_reference_is_the_base_without_adapters(lora_run, policy):
  """At the first step B is zero and the KL with it; what is compared with must not move later."""
  workdir, _, _, references = lora_run
  steps = [line for line in logged(workdir) if "actor/kl" in line]
  assert len(steps) > 1 and steps[0]["actor/kl"] < 1e-7 < steps[-1]["actor/kl"]
  # Of all tokens, as all rows push and weigh 1; the loss has a tenth of it.
  for line in steps:
    assert line["actor/kl_loss"] == pytest.approx(line["actor/kl"], rel=1e-5, abs=1e-9)
    whole = line["actor/pg_loss"] + 0.1 * line["actor/kl_loss"]
    assert line["actor/loss"] == pytest.approx(whole, rel=1e-5, abs=1e-7)
  assert len(references) == len(steps) and all(params is references[0] for params in references)
  assert max_difference(references[0], policy.params) == 0.0


def looked(trajectory: Trajectory) -> Trajectory:
  """As if its first turn had been a call: random weights never make one."""
  first = trajectory.steps[0].completion
  edge = 2.0 + int(first.tokens[0]) % 30
  call = ToolCall(name="zoom_in", arguments={"bbox_2d": [0, 0, edge, edge]})
  steps = (Step(completion=first, call=call, result=episodes.crop(0)), Step(completion=first))
  return dataclasses.replace(trajectory, steps=steps)


class Looking(Surprise):
  def __call__(self, played):
    return super().__call__([looked(t) for t in played])


def test_a_run_that_is_surprised_resumes_bit_for_bit(config, tmp_path, monkeypatch):
  """Its forward model and the unit with it; and what it saved beside the policy is no hindrance."""

  def score(group, c, *, surprises, **how):
    odd = [t.steps[0].completion.tokens[0] % 2 for t in group]
    return [Reward(task=float(o), dynamics=s) for o, s in zip(odd, surprises, strict=True)]

  monkeypatch.setattr(rft, "Surprise", Looking)
  monkeypatch.setattr(rft.rewards, "score", score)
  c = config.copy_and_resolve_references().unlock()
  c.reward.weights.dynamics, c.reward.dynamics.warmup, c.eval.every = 0.5, 9, 5
  workdir, killed = tmp_path / "run", tmp_path / "killed"
  state = rft.main(c, workdir)
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  resumed = rft.main(c, killed)
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(workdir)
  lines = [line for line in logged(workdir) if "dynamics" in line]
  # Eight episodes a step: nine are known after the second.
  assert [line["dynamics"] > 0 for line in lines] == [False, True, True, True]
  # Sixteen updates: it knows more by then than that calls change nothing, which it began with.
  first, last = lines[0], lines[-1]
  assert first["dynamics_error"] == pytest.approx(first["dynamics_change"], rel=1e-6)
  assert last["dynamics_error"] < 0.8 * last["dynamics_change"]
  with Checkpoints(workdir / FOLDER) as saved, Checkpoints(killed / FOLDER) as again:
    assert saved.extra(4) == again.extra(4) and saved.extra(4)["dynamics"]["count"] == 32.0
  assert runs.save_checkpoint(workdir, tmp_path / "out") == 4
  assert max_difference(load(tmp_path / "out" / "model")[1], state.params) == 0.0


def test_what_is_frozen_stays(config, tmp_path, policy):
  c = config.copy_and_resolve_references().unlock()
  c.model.freeze, c.optimizer.steps = ("visual",), 2
  # And with all that is off by default: correction, dynamic sampling, replay, a curriculum.
  c.grpo.rollout_correction.rollout_is = "token"
  c.grpo.filter_groups.enable, c.grpo.filter_groups.max_num_gen_batches = True, 2
  c.grpo.replay.capacity, c.reward.weights.coherence = 16, 0.1
  c.reward.curriculum.start, c.save_every = "goal", 1
  state = rft.main(c, tmp_path / "run")
  saved = Checkpoints(tmp_path / "run" / FOLDER, keep=2)
  curriculum = saved.extra(2)["curriculum"]
  saved.close()
  assert (curriculum["stage"], curriculum["steps"]) == ("goal", 2)
  # Sampler and learner are one program: there is next to nothing to correct.
  weights = [
    line["rollout_corr/rollout_is_mean"]
    for line in logged(tmp_path / "run")
    if "actor/loss" in line
  ]
  assert weights and weights == pytest.approx([1.0] * len(weights), abs=1e-5)
  assert state.params.keys() == {"text"}
  assert max_difference(state.params["text"], policy.params["text"]) > 1e-6
  _, whole = load(tmp_path / "run" / "model")
  assert max_difference(whole["visual"], policy.params["visual"]) == 0.0
  # A checkpoint has what learned alone, and is exported with the rest.
  assert runs.save_checkpoint(tmp_path / "run", tmp_path / "out", step=2) == 2
  assert max_difference(load(tmp_path / "out" / "model")[1], whole) == 0.0


def test_groups_without_a_difference_teach_nothing(config, tmp_path, monkeypatch, policy):
  same = lambda group, c, *, target, **how: [Reward(task=1.0) for _ in group]
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
  episode = lambda status, *steps: Trajectory(
    task=fakes.task("a"), steps=steps, status=status, answer=None
  )
  played = [episode(Status.NO_ANSWER, look, look, end), episode(Status.OUT_OF_TOKENS, end)]
  rewards = [Reward(task=1.0, curiosity=0.5), Reward(format=1.0)]
  weights = {"task": 0.0, "format": 0.1, "curiosity": 1.0, "coherence": 0.0}
  expected = {"task": 0.5, "format": 0.5, "curiosity": 0.25, "rapr": 0.5}
  expected["response_length/clip_ratio"] = 0.5  # The second episode was cut off.
  assert rft.summary(rewards, weights, played) == expected


def test_a_wrong_model_path_is_named(config, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed = str(tmp_path / "no-such-model"), -1
  with pytest.raises(FileNotFoundError, match="no-such-model"):
    rft.main(c, tmp_path / "run")


@pytest.fixture(scope="module")
def split_config(config):
  """Rollouts on a second device, an update behind; checkpoints after every second update."""
  c = config.copy_and_resolve_references().unlock()
  c.staleness, c.rollout_mesh.data = 1, 1
  c.grpo.rollout_correction.rollout_is = "token"
  return c.lock()


@pytest.fixture(scope="module")
def split(split_config, tmp_path_factory):
  """(workdir, final state, [what each rollout was played with], {updates: a weight after them})."""
  workdir, bound, after = tmp_path_factory.mktemp("split") / "run", [], {}
  bind, make_step = rft.sampler.Sampler.bind, rft.make_step
  weight = lambda params: np.array(params["text"]["layers"]["mlp"]["up"]["kernel"])
  where = lambda tree: {d.id for x in jax.tree.leaves(tree) for d in x.devices()}

  def spied_bind(self, params, **how):
    generate = bind(self, params, **how)

    def spied(requests):
      completions = generate(requests)
      at = where((params, how["key"], generate.caches))
      bound.append((how["version"], weight(params), at, threading.current_thread()))
      return completions

    return spied if how["temperature"] else generate

  def spied_make_step(c, model):
    step, *others = make_step(c, model)

    def spied(state, packed, *rest):
      after[int(state.step)] = weight(state.params)
      assert where((state.params, packed)) == {0}
      return step(state, packed, *rest)

    return spied, *others

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rft.sampler.Sampler, "bind", spied_bind)
    patch.setattr(rft, "make_step", spied_make_step)
    state = rft.main(split_config, workdir)
  return workdir, state, bound, after


def test_rollouts_elsewhere_are_played_with_weights_of_a_known_age(split):
  """Steps 1 and 3 one update behind, 0 and 2 with what the checkpoint has: each step's weights.

  Taken as they come these would be 0, 1, 2, 3 or fewer, from run to run; without waiting at the
  checkpoint 0, 0, 1, 2.
  """
  _, _, bound, after = split
  assert list(dict.fromkeys(version for version, *_ in bound)) == [0, 2]
  assert after.keys() == {0, 1, 2, 3} and np.abs(after[2] - after[1]).max() > 1e-4
  for version, weight, devices, thread in bound:
    np.testing.assert_array_equal(weight, after[version])
    # No program of one thread is on a device of the other's.
    assert devices == {1} and thread is not threading.main_thread()


def test_what_an_old_policy_sampled_is_weighed(split):
  """The ratio is taken to the weights that the update starts from, and so is 1 at any age."""
  steps = [line for line in logged(split[0]) if "actor/loss" in line]
  assert [line["staleness"] for line in steps] == [0, 1, 0, 1]
  away = [abs(line["rollout_corr/rollout_is_mean"] - 1) for line in steps]
  # After step 0, at a rate of 0, nothing had moved.
  assert max(away[:3]) < 1e-5 and away[3] > 1e-4
  assert [line["actor/ratio_mean"] for line in steps] == pytest.approx([1.0] * 4, abs=1e-5)


def test_a_run_that_is_behind_resumes_bit_for_bit(split_config, split, tmp_path):
  workdir, state, *_ = split
  killed = tmp_path / "killed"
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  resumed = rft.main(split_config, killed)
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(workdir)


def test_where_nothing_is_behind_the_run_is_that_of_one_device(config, straight, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.staleness, c.rollout_mesh.data, c.save_every = 1, 1, 1
  state = rft.main(c, tmp_path / "run")
  assert max_difference(state.params, straight[1].params) == 0.0
  assert logged(tmp_path / "run") == logged(straight[0])


@pytest.mark.parametrize(
  "staleness, data, match",
  [
    (-1, 1, "staleness -1 must be 0, or a number of updates"),
    (1, 0, "staleness 1: rollouts need devices of their own, set rollout_mesh.data"),
    (1, 8, "mesh data=8 .* needs 8 devices; .* have 7"),
  ],
)
def test_rollouts_that_lag_need_devices_of_their_own(config, staleness, data, match):
  c = config.copy_and_resolve_references().unlock()
  c.staleness, c.rollout_mesh.data = staleness, data
  with pytest.raises(ValueError, match=match):
    rft.meshes(c)


def test_rollouts_that_lag_are_of_one_process(split_config, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="staleness 1 needs one process, not 2"):
    rft.meshes(split_config)
