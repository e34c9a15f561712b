"""SFT learns from a checkpointed stream of demonstrations; a resumed run is the same run."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny_sft
from pixelis_jax import sampler, sft
from pixelis_jax.model import lora
from pixelis_jax.model.load import load
from pixelis_jax.model.peft import load_adapter
from tests.data.datasets import built
from tests.episodes import max_difference

flat = nnx.traversals.flatten_mapping


@pytest.fixture(scope="module")
def config(model_config):
  """Four steps, one tiny evaluation at the end."""
  c = tiny_sft.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed, c.model.max_tokens = model_config.path, 0, 3
  c.limits.turns, c.eval.n = 2, 2
  c.mesh.data = 1  # Meshes: test_meshes.py, test_cluster.py.
  return c.lock()


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
  """(workdir, final state) of a run from 0 to 4."""
  workdir = tmp_path_factory.mktemp("sft") / "run"
  return workdir, sft.main(config, workdir)


def logged(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timeless = lambda line: {k: v for k, v in line.items() if "time" != k and "second" not in k}
  return [timeless(line) for line in lines]


def test_a_run_trains_logs_and_saves_a_model(config, straight, policy):
  workdir, state = straight
  assert int(state.step) == config.optimizer.steps == 4
  assert [line["step"] for line in logged(workdir)] == [1, 2, 3, 4, 4]
  losses = [line["nll"] for line in logged(workdir) if "nll" in line]
  assert all(np.isfinite(losses)) and 3 < losses[0] < 12  # Random weights: around log 512.
  c = config.model.copy_and_resolve_references().unlock()
  c.path, c.random_seed = str(workdir / "model"), -1
  saved = sampler.load_policy(c)  # A whole directory: weights, tokenizer, processor.
  assert max_difference(saved.params, state.params["policy"]) == 0.0
  assert max_difference(saved.params, policy.params) > 1e-4


def test_resuming_at_two_of_four_is_bit_identical(config, straight, tmp_path):
  workdir, state = straight
  killed = tmp_path / "killed"
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "4")  # Steps 3 and 4 were logged, but not saved.
  resumed = sft.main(config, killed)
  assert int(resumed.step) == 4
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(workdir)  # Redone steps are there once.


def test_a_finished_run_has_nothing_to_do(config, straight, tmp_path):
  workdir, state = straight
  copy = tmp_path / "finished"
  shutil.copytree(workdir, copy)
  again = sft.main(config, copy)
  assert max_difference(again.params, state.params) == 0.0
  assert logged(copy) == logged(workdir)


@pytest.fixture(scope="module")
def lora_config(config):
  """The same with adapters of rank 2 on the decoder, with dropout."""
  c = config.copy_and_resolve_references().unlock()
  c.model.lora.rank, c.model.lora.alpha = 2, 8.0
  c.model.lora.dropout, c.see_steps = 0.5, 0
  return c.lock()


@pytest.fixture(scope="module")
def lora_run(lora_config, tmp_path_factory):
  """(workdir, final state, what the step was given as its base) of a run from 0 to 4."""
  workdir, bases, parts = tmp_path_factory.mktemp("lora") / "run", [], sft.learner.parts

  def spied(model, params):
    bases.append(parts(model, params)[1])
    return parts(model, params)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sft.learner, "parts", spied)
    state = sft.main(lora_config, workdir)
  return workdir, state, bases[0]


def test_adapters_alone_are_trained_and_saved(lora_run, policy):
  workdir, state, base = lora_run
  last = lambda tree: [path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(tree)]
  moments = [x for x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x[1].ndim]
  adapters = state.params["policy"]
  assert set(last(adapters)) == {"lora_a", "lora_b"}
  # Beside them the heads of the auxiliary losses, which nobody keeps.
  heads = {"aim", "sight", "sight_bias"}
  assert {path[-1].key for path, _ in moments} == {"lora_a", "lora_b"} | heads
  assert len(moments) == 2 * len(jax.tree.leaves(state.params))
  # What the steps were given is, bit for bit, what the same seed gave another program.
  assert max_difference(lora.plain(base), policy.params) == 0.0
  assert max(float(abs(x).max()) for p, x in flat(adapters).items() if p[-1] == "lora_b") > 1e-5
  model, params = load_adapter(workdir / "adapter", policy.model, policy.params)
  assert max_difference(lora.split(params)[0], adapters) == 0.0
  _, merged = load(workdir / "model")
  assert max_difference(merged, lora.merge(params)) == 0.0
  assert max_difference(merged, policy.params) > 1e-6


def test_a_run_with_adapters_resumes_bit_for_bit(lora_config, lora_run, tmp_path):
  workdir, state, _ = lora_run
  killed = tmp_path / "killed"
  shutil.copytree(workdir, killed)
  shutil.rmtree(killed / "checkpoints" / "4")
  resumed = sft.main(lora_config, killed)
  assert int(resumed.step) == 4
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(workdir)


def test_what_is_frozen_stays(config, tmp_path, policy):
  c = config.copy_and_resolve_references().unlock()
  c.model.freeze, c.optimizer.steps = ("visual",), 2
  c.see_steps = 0
  state = sft.main(c, tmp_path / "run")
  learned = state.params["policy"]
  assert max_difference(learned["visual"], policy.params["visual"]) == 0.0
  assert max_difference(learned["text"], policy.params["text"]) > 1e-6


def test_rows_are_a_function_of_the_config_and_resume_anywhere(config, policy, model_config):
  blind = sampler.with_tools(model_config, policy.model, policy.params, ())
  read = lambda: sft.rows(config, policy, blind)
  batches = list(itertools.islice(read(), 3))
  data = read()
  next(data)
  position = json.loads(json.dumps(data.get_state()))  # What a checkpoint keeps is JSON.
  other = read()
  other.set_state(position)
  for one, two in zip(batches[1:], other, strict=False):
    for a, b in zip(one, two, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize(
  "settings, calls, answers, images",
  [
    ({"parts": 0, "direct": 0.0}, True, True, 2),  # A whole demonstration: scene, look, crop.
    ({"parts": 0, "direct": 1.0}, False, True, 1),  # Answered from the scene.
    ({"parts": 64, "look": 1.0}, True, False, 1),  # Only where to look in the scene.
    ({"parts": 64, "look": 0.0}, False, True, 1),  # Only how to read the crop.
  ],
)
def test_kinds_of_rows(config, policy, model_config, settings, calls, answers, images):
  blind = sampler.with_tools(model_config, policy.model, policy.params, ())
  c = config.copy_and_resolve_references().unlock()
  c.data.update(settings)
  c.see_steps = 0
  for row in next(sft.rows(c, policy, blind)):
    said = policy.chat.decode(row.tokens[row.loss_mask])
    assert ("zoom_in" in said, r"\boxed{" in said, len(row.images)) == (calls, answers, images)
    # Who is to call is told of the tool; who isn't, is not.
    assert ("zoom_in" in policy.chat.decode(row.tokens[~row.loss_mask])) == calls


def test_while_only_the_tower_learns_rows_hold_all_images(config, policy, model_config):
  blind = sampler.with_tools(model_config, policy.model, policy.params, ())
  c = config.copy_and_resolve_references().unlock()
  c.data.parts, c.data.look, c.see_steps = 64, 0.0, 1
  rows = sft.rows(c, policy, blind)
  for images in (2, 1):  # The first step, then parts: reading only.
    assert [len(row.images) for row in next(rows)] == [images] * c.batch


def test_a_wrong_model_path_is_named(config, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.model.path = str(tmp_path / "no-such-model")
  with pytest.raises(FileNotFoundError, match="no-such-model"):
    sft.main(c, tmp_path / "run")


def test_a_built_dataset_is_trained_on(config, straight, tmp_path):
  """With the programs of the run on scenes: of golden demonstrations batches are as large."""
  c = config.copy_and_resolve_references().unlock()
  c.data.file, c.see_steps = str(built(tmp_path, n=8, sorts={"golden": 1}).folder), 0
  state = sft.main(c, tmp_path / "run")
  assert int(state.step) == 4
  losses = [line["nll"] for line in logged(tmp_path / "run") if "nll" in line]
  assert len(losses) == 4 and all(3 < loss < 12 for loss in losses)
  assert max_difference(state.params, straight[1].params) > 1e-6


def test_rows_of_a_dataset_teach_its_supervised_turns(config, policy, model_config, tmp_path):
  blind = sampler.with_tools(model_config, policy.model, policy.params, ())
  c = config.copy_and_resolve_references().unlock()
  c.data.file = str(built(tmp_path, n=8).folder)
  rows = [row for rows in itertools.islice(sft.rows(c, policy, blind), 2) for row in rows]
  # Eight rows of four a step: each record once. A correction shows its scene and two looks, and
  # teaches one call; were its wrong look taught too, it would teach two.
  assert sorted(len(row.images) for row in rows) == [2] * 4 + [3] * 4
  for row in rows:
    said = policy.chat.decode(row.tokens[row.loss_mask])
    assert (said.count("zoom_in"), said.count(r"\boxed{")) == (1, 1)
  with pytest.raises(ValueError, match=r"calls \['zoom_in'\], model.tools has \[\]"):
    next(sft.rows(c, blind, blind))
