"""What a run's directory says of it, and any of its checkpoints as a model's directory."""

import json

import jax
import optax
import pytest

from configs import demo, tiny_rft, tiny_sft
from pixelis_jax import learner, runs
from pixelis_jax.checkpoint import BEST, FOLDER, Checkpoints
from pixelis_jax.data import demos
from pixelis_jax.model import trainable
from pixelis_jax.model.load import load
from pixelis_jax.model.lora import merge
from pixelis_jax.model.peft import load_adapter
from pixelis_jax.sampler import load_policy
from tests.episodes import max_difference


@jax.jit
def moved(params, by):
  return jax.tree.map(lambda x: x + by, params)


def run(workdir, config, model_config, states):
  """A directory with a config and a checkpoint of each of `states`, by step."""
  c = config.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed, c.model.freeze = model_config.path, 0, ()
  runs.keep_config(workdir, c)
  with Checkpoints(workdir / FOLDER, keep=3) as checkpoints:
    for step, state in states.items():
      checkpoints.save(step, state, {})
  return workdir


def sft_state(policy, by):
  params = learner.with_heads(
    policy.model, moved(policy.params, by), jax.random.key(0), labels=demos.LABELS
  )
  return learner.init_state(params, optax.adam(1e-3), seed=0)


def rft_state(policy, by):
  return learner.init_state(moved(policy.params, by), optax.adam(1e-3), seed=0)


def online_state(policy, by):
  # What is published is the average, not what the learner is at.
  return {"state": rft_state(policy, 9.0), "average": moved(policy.params, by)}


@pytest.mark.parametrize(
  "config, state", [(tiny_sft, sft_state), (tiny_rft, rft_state), (demo, online_state)]
)
def test_a_checkpoint_becomes_a_model(config, state, policy, model_config, tmp_path):
  states = {step: state(policy, step / 10) for step in (2, 4)}
  workdir = run(tmp_path / "run", config, model_config, states)
  assert runs.save_checkpoint(workdir, tmp_path / "latest") == 4
  assert runs.save_checkpoint(workdir, tmp_path / "early", step=2) == 2
  for name, by in (("latest", 0.4), ("early", 0.2)):
    _, params = load(tmp_path / name / "model")
    assert max_difference(params, moved(policy.params, by)) == 0.0
    assert not (tmp_path / name / "adapter").exists()


def test_the_best_becomes_a_model(policy, model_config, tmp_path):
  """It holds nothing but the policy, whichever program kept it."""
  workdir = run(tmp_path / "run", tiny_sft, model_config, {4: sft_state(policy, 0.4)})
  with Checkpoints(workdir / BEST) as kept:
    kept.save(2, {"params": moved(policy.params, 0.2)}, {"accuracy": 0.5})
  assert runs.save_checkpoint(workdir, tmp_path / "out", best=True) == 2
  _, params = load(tmp_path / "out" / "model")
  assert max_difference(params, moved(policy.params, 0.2)) == 0.0


def test_adapters_of_a_checkpoint_are_saved_and_merged(policy, model_config, tmp_path):
  c = tiny_rft.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed, c.model.lora.rank = model_config.path, 0, 2
  adapted = load_policy(c.model, adapters=jax.random.key(c.seed))
  trained, base = trainable.parts(adapted.model, adapted.params)
  trained = moved(trained, 0.1)
  runs.keep_config(tmp_path, c)
  with Checkpoints(tmp_path / FOLDER) as checkpoints:
    checkpoints.save(3, learner.init_state(trained, optax.adam(1e-3), seed=0), {})
  assert runs.save_checkpoint(tmp_path, tmp_path / "out") == 3
  expected = learner.lora.join(trained, base)
  _, merged = load(tmp_path / "out" / "model")
  assert max_difference(merged, merge(expected)) == 0.0
  _, found = load_adapter(tmp_path / "out" / "adapter", policy.model, policy.params)
  assert max_difference(learner.lora.split(found)[0], trained) == 0.0


def test_what_is_not_there_is_named(model_config, tmp_path):
  with pytest.raises(FileNotFoundError, match="is no run of .*: it has no config.json"):
    runs.save_checkpoint(tmp_path, tmp_path / "out")
  workdir = run(tmp_path / "run", tiny_rft, model_config, {})
  with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
    runs.save_checkpoint(workdir, tmp_path / "out")
  with pytest.raises(FileNotFoundError, match="has no step 7"):
    runs.save_checkpoint(workdir, tmp_path / "out", step=7)
  with pytest.raises(FileNotFoundError, match="best has no checkpoint yet"):
    runs.save_checkpoint(workdir, tmp_path / "out", best=True)


def test_a_workdir_may_belong_to_one_config(tmp_path):
  c = tiny_rft.get_config("debug")
  runs.keep_config(tmp_path, c, same=True)
  runs.keep_config(tmp_path, c, same=True)
  other = c.copy_and_resolve_references().unlock()
  other.wandb.mode = "offline"  # Who is told changes nothing that is computed.
  runs.keep_config(tmp_path, other, same=True)
  other.seed = 1
  with pytest.raises(ValueError, match=r"other values of \['seed'\]: {'seed': 0}"):
    runs.keep_config(tmp_path, other, same=True)
  # A run of sft or rft may go on with more steps: what it was last started with is kept.
  runs.keep_config(tmp_path, other)
  assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
