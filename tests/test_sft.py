"""SFT learns from a checkpointed stream of demonstrations; a resumed run is the same run."""

import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from configs import tiny_sft
from pixelis_jax import sampler, sft
from pixelis_jax.algo.data_curriculum import DataCurriculum, Settings
from pixelis_jax.data.built import Dataset
from pixelis_jax.data.difficulty import LEVELS
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
  c.data.parts = 0  # All batches are as large: one program.
  c.optimizer.muon_scale = 1.0
  c.mesh.data = 1  # Meshes: test_meshes.py, test_cluster.py.
  return c.lock()


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
  """(workdir, final state) of a run from 0 to 4."""
  workdir = tmp_path_factory.mktemp("sft") / "run"
  return workdir, sft.main(config, workdir)


def read(c, policy, **where):
  """The rows of a config, at the beginning of its curriculum or there."""
  blind = sampler.with_tools(policy.settings, policy.model, policy.params, ())
  return sft.rows(c, policy, blind, DataCurriculum(settings=Settings(**c.curriculum), **where))


def logged(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timeless = lambda line: {k: v for k, v in line.items() if not k.startswith(("tim", "perf/"))}
  return [timeless(line) for line in lines]


def test_a_run_trains_logs_and_saves_a_model(config, straight, policy):
  workdir, state = straight
  assert int(state.step) == config.optimizer.steps == 4
  assert [line["step"] for line in logged(workdir)] == [1, 2, 3, 4, 4]
  losses = [line["train/nll"] for line in logged(workdir) if "train/nll" in line]
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
  c.optimizer.muon_scale = 0.0
  return c.lock()


@pytest.fixture(scope="module")
def lora_run(lora_config, tmp_path_factory):
  """(workdir, final state, what the step was given as its base) of a run from 0 to 4."""
  workdir, bases, parts = tmp_path_factory.mktemp("lora") / "run", [], sft.trainable.parts

  def spied(*what):
    bases.append(parts(*what)[1])
    return parts(*what)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sft.trainable, "parts", spied)
    state = sft.main(lora_config, workdir)
  return workdir, state, bases[0]


def test_adapters_alone_are_trained_and_saved(lora_run, policy):
  workdir, state, base = lora_run
  last = lambda tree: [path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(tree)]
  leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
  moments = [x for x in leaves if hasattr(x[0][-1], "key")]  # Not counters and coefficients.
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
  c.see_steps, c.optimizer.muon_scale = 0, 0.0
  state = sft.main(c, tmp_path / "run")
  learned = state.params["policy"]
  assert learned.keys() == {"text"}
  assert max_difference(learned["text"], policy.params["text"]) > 1e-6
  _, whole = load(tmp_path / "run" / "model")
  assert max_difference(whole["visual"], policy.params["visual"]) == 0.0
  assert max_difference(whole["text"], learned["text"]) == 0.0


def test_rows_are_a_function_of_the_config_and_resume_anywhere(config, policy):
  c = config.copy_and_resolve_references().unlock()
  c.data.parts = 8  # The second batch's: after the tower's step, before whole demonstrations.
  batches = list(itertools.islice(read(c, policy), 3))
  data = read(c, policy)
  next(data)
  position = json.loads(json.dumps(data.get_state()))  # What a checkpoint keeps is JSON.
  other = read(c, policy)
  other.set_state(position)
  for one, two in zip(batches[1:], other, strict=False):
    for a, b in zip(one, two, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize(
  "settings, calls, answers, images",
  [
    ({"parts": 0, "direct": 0.0}, True, True, 2),  # A whole demonstration: scene, look, crop.
    ({"parts": 0, "direct": 1.0}, False, True, 1),  # Answered from the scene.
    ({"parts": 64, "look": 1.0}, True, False, 1),  # Only where to look in the scene: everywhere.
    ({"parts": 64, "look": 0.0}, False, True, 1),  # Only how to read the crop.
  ],
)
def test_kinds_of_rows(config, policy, settings, calls, answers, images):
  c = config.copy_and_resolve_references().unlock()
  c.data.update(settings)
  c.see_steps = 0
  for row in next(read(c, policy)):
    said = policy.chat.decode(row.tokens[row.loss_mask])
    assert ("zoom_in" in said, r"\boxed{" in said, len(row.images)) == (calls, answers, images)
    # Who is to call is told of the tool; who isn't, is not.
    assert ("zoom_in" in policy.chat.decode(row.tokens[~row.loss_mask])) == calls


def test_parts_of_other_kinds(config, policy):
  """Tours of puzzles, which no demonstration made here solves, and recitals without pictures."""
  tools = ("zoom_in", "read_text")
  both = sampler.with_tools(policy.settings, policy.model, policy.params, tools)
  c = config.copy_and_resolve_references().unlock()
  c.data.parts, c.data.look, c.data.recite, c.see_steps = 64, 0.5, 0.5, 0
  c.data.toured, c.data.zoom_only, c.batch = ("read",), 1.0, 32
  calls = {"zoom_in": 0, "read_text": 0, r"\boxed{": 0}
  for row in next(read(c, both)):
    said = both.chat.decode(row.tokens[row.loss_mask])
    listed = both.chat.decode(row.tokens).split("</tools>")[0]
    (kind,) = [name for name in calls if name in said]
    calls[kind] += 1
    assert len(row.images) == (kind != r"\boxed{")
    assert said.count(kind) == {"read_text": 3, r"\boxed{": sft.RECITED}.get(kind, said.count(kind))
    # Only scenes do without the other tools.
    assert ("read_text" in listed) == (kind != "zoom_in")
  # Half are recitals; of the others, one kind in four is toured.
  assert all(count >= 2 for count in calls.values()), calls


def test_demonstrations_are_recited_without_their_pictures(config, policy, tmp_path):
  """Of the made rows half tell a record's calls and results: only its answer is supervised."""
  tools = ("zoom_in", "read_text")
  both = sampler.with_tools(policy.settings, policy.model, policy.params, tools)
  c = config.copy_and_resolve_references().unlock()
  c.data.parts, c.data.look, c.data.recite, c.see_steps, c.batch = 64, 0.0, 1.0, 0, 32
  c.data.file, c.data.made = str(built(tmp_path, n=4, sorts={"golden": 1}).folder), 0.5
  records = [row for row in next(read(c, both)) if row.images]
  answers = {
    both.chat.decode(row.tokens[row.loss_mask]).rsplit("</tool_call>")[-1] for row in records
  }
  told = [row for row in next(read(c, both)) if not row.images]
  said = [both.chat.decode(row.tokens[row.loss_mask]) for row in told]
  retold = [text for text in said if text.count(r"\boxed{") == 1]
  assert len(records) == len(told) == 16 and 4 <= len(retold) <= 12
  assert all(any(text.strip() in answer for answer in answers) for text in retold)
  for row, text in zip(told, said, strict=True):
    assert "tool_call" not in text
    assert ("zoom_in" in both.chat.decode(row.tokens).split("</tools>")[1]) == (text in retold)


def test_a_dataset_of_nothing_but_traps_has_nothing_to_recite(config, policy, tmp_path):
  dataset = built(tmp_path, n=6, kinds={"color": 1}, sorts={"trap": 1})
  c = config.copy_and_resolve_references().unlock()
  c.data.parts, c.data.look, c.data.recite, c.data.made, c.see_steps = 64, 0.0, 1.0, 0.5, 0
  c.data.file = str(dataset.folder)
  tools = ("zoom_in", "get_properties")
  sees = sampler.with_tools(policy.settings, policy.model, policy.params, tools)
  with pytest.raises(ValueError, match="64 records in a row have no supervised answer to recite"):
    list(itertools.islice(read(c, sees), 2))


def test_rows_that_are_kept_are_made_once(config, policy, tmp_path, monkeypatch):
  c = config.copy_and_resolve_references().unlock()
  c.data.file, c.see_steps = str(built(tmp_path, n=4).folder), 0
  made = []
  demo = Dataset.demo
  monkeypatch.setattr(Dataset, "demo", lambda *of: made.append(of[1]) or demo(*of))
  seen = {}
  for kept in (0, 4):
    c.data.kept = kept
    made.clear()
    rows = [key(row) for rows in itertools.islice(read(c, policy), 3) for row in rows]
    seen[kept] = rows, list(made)
  assert seen[0][0] == seen[4][0]
  # Grain reads ahead, so more than 12 may have been made; threads may both miss one at first.
  assert len(seen[0][1]) >= 12 and len(seen[4][1]) <= 8


def test_while_only_the_tower_learns_rows_hold_all_images(config, policy):
  c = config.copy_and_resolve_references().unlock()
  c.data.parts, c.data.look, c.see_steps = 64, 0.0, 1
  rows = read(c, policy)
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
  losses = [line["train/nll"] for line in logged(tmp_path / "run") if "train/nll" in line]
  assert len(losses) == 4 and all(3 < loss < 12 for loss in losses)
  assert max_difference(state.params, straight[1].params) > 1e-6


def test_rows_of_a_dataset_teach_its_supervised_turns(config, policy, model_config, tmp_path):
  blind = sampler.with_tools(model_config, policy.model, policy.params, ())
  c = config.copy_and_resolve_references().unlock()
  c.data.file = str(built(tmp_path, n=8).folder)
  rows = [row for rows in itertools.islice(read(c, policy), 2) for row in rows]
  # Eight rows of four a step: each record once. A correction shows its scene and two looks, and
  # teaches one call; were its wrong look taught too, it would teach two.
  assert sorted(len(row.images) for row in rows) == [2] * 4 + [3] * 4
  for row in rows:
    said = policy.chat.decode(row.tokens[row.loss_mask])
    assert (said.count("zoom_in"), said.count(r"\boxed{")) == (1, 1)
  with pytest.raises(ValueError, match=r"calls \['zoom_in'\], model.tools has \[\]"):
    next(read(c, blind))


def test_made_rows_come_among_those_of_a_dataset(config, policy, tmp_path):
  """Three of four are made, as by themselves, and all until the tower has learned."""
  c = config.copy_and_resolve_references().unlock()
  c.data.parts, c.data.look, c.data.direct, c.see_steps = 64, 1.0, 0.0, 1
  made = [key(row) for rows in itertools.islice(read(c, policy), 5) for row in rows]
  c.data.file = str(built(tmp_path, n=4).folder)
  c.see_steps = 0
  records = [key(row) for rows in itertools.islice(read(c, policy), 2) for row in rows]
  c.data.made, c.see_steps = 0.75, 1
  read_rows = [key(row) for rows in itertools.islice(read(c, policy), 5) for row in rows]
  # The last of four is the dataset's, in its own order; what its first would be the tower has read.
  turns = [index for index, row in enumerate(read_rows) if row in records]
  assert turns == [7, 11, 15, 19]
  assert [read_rows[index] for index in turns] == records[1:5]
  others = [index for index in range(20) if index not in turns]
  assert [read_rows[index] for index in others] == [made[index] for index in others]
  assert [len(images) for _, images in made] == [2] * 4 + [1] * 16
  # The first rows of scenes put the records off.
  c.data.scenes = 8
  later = [key(row) for rows in itertools.islice(read(c, policy), 5) for row in rows]
  assert [index for index, row in enumerate(later) if row in records] == [11, 15, 19]


def test_first_rows_are_of_scenes_alone(config, policy):
  c = config.copy_and_resolve_references().unlock()
  both = sampler.with_tools(policy.settings, policy.model, policy.params, ("zoom_in", "read_text"))
  c.data.parts, c.data.look, c.data.recite, c.see_steps, c.batch = 64, 1.0, 0.0, 0, 16
  c.data.toured, c.data.scenes, c.data.n = ("read",), 16, 24
  said = lambda row: both.chat.decode(row.tokens[row.loss_mask])
  rows = read(c, both)
  first, second = next(rows), next(rows)
  assert not any("read_text" in said(row) for row in first)
  assert any("read_text" in said(row) for row in second)
  # 24 tasks, and from the 65th row on no more parts: which come again does not begin them anew.
  whole = [row for _ in range(3) for row in next(rows)][32:]
  assert all(r"\boxed{" in said(row) for row in whole)


@pytest.mark.parametrize("made", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(config, tmp_path, made):
  c = config.copy_and_resolve_references().unlock()
  c.data.made = made
  with pytest.raises(ValueError, match=rf"data.made {made} must lie in \[0, 1\)"):
    sft.main(c, tmp_path)


@pytest.mark.parametrize(("see", "scenes"), [(1, 0), (0, 8)])
def test_a_file_alone_teaches_neither_seeing_nor_scenes(config, tmp_path, see, scenes):
  c = config.copy_and_resolve_references().unlock()
  c.data.file, c.see_steps, c.data.scenes = "questions.jsonl", see, scenes
  with pytest.raises(ValueError, match=rf"see_steps is {see} and data.scenes {scenes}: no file"):
    sft.main(c, tmp_path)


def key(row):
  """What tells a record's row from others'."""
  return row.tokens.tobytes(), tuple(image.key for image in row.images)


def test_hard_negatives_come_as_often_as_they_weigh(config, policy, tmp_path):
  """Traps of which something is supervised weigh 4; one that is wrong at once is never read."""
  sorts = {"golden": 0.5, "trap": 0.5}
  dataset = built(tmp_path, n=12, kinds={"color": 1}, sorts=sorts, hard_negative_weight=4.0)
  c = config.copy_and_resolve_references().unlock()
  c.data.file, c.batch = str(dataset.folder), 32
  tools = ("zoom_in", "get_properties")
  sees = sampler.with_tools(policy.settings, policy.model, policy.params, tools)
  demos = [dataset.demo(i, sees.tools) for i in range(12)]
  number = {key(sft.batch.demo_row(demo, sees.chat)): i for i, demo in enumerate(demos)}
  drawn = [number[key(row)] for rows in itertools.islice(read(c, sees), 3) for row in rows]
  weights = np.array([4.0 if demo.turns[-1].supervised is False else 1.0 for demo in demos])
  taught = np.array([any(turn.supervised for turn in demo.turns) for demo in demos])
  assert len(drawn) == 96 and 2 <= ((weights == 4) & taught).sum() < 6  # Some traps are idle.
  assert set(drawn) == set(np.flatnonzero(taught).tolist())
  # A share p of n independent draws has a deviation of (p (1 - p) / n) ** 0.5; ours take turns, and
  # have less. Were all weights equal, the share would be farther off than four deviations.
  share = 4.0 * ((weights == 4) & taught).sum() / (weights * taught).sum()
  deviation = np.sqrt(share * (1 - share) / len(drawn))
  assert abs(np.mean(weights[drawn] == 4) - share) <= 4 * deviation
  assert abs(np.mean(weights[taught] == 4) - share) > 4 * deviation
  # And so each record by itself.
  counts = np.bincount(drawn, minlength=12)
  expected = 96 * weights * taught / (weights * taught).sum()
  assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()


@pytest.fixture(scope="module")
def staged(config, policy, tmp_path_factory):
  """(config, level by `key`) of two stages, simple and the rest, that one evaluation ends.

  Batches are of different records, and so as large as those of the run on scenes.
  """
  folder = tmp_path_factory.mktemp("staged")
  c = config.copy_and_resolve_references().unlock()
  dataset = built(folder, n=18, sorts={"golden": 1})  # 7 simple, 6 medium, 5 hard.
  c.data.file, c.see_steps, c.eval.every = str(dataset.folder), 0, 1
  c.curriculum.update(enable=True, simple=(1.0, 0.0), medium=(0.0, 0.5), hard=(0.0, 0.5))
  c.curriculum.update(window=1, patience=1, min_steps=1, max_steps=0, cooldown=0)
  demos = [dataset.demo(i, policy.tools) for i in range(18)]
  keys = [key(sft.batch.demo_row(demo, policy.chat)) for demo in demos]
  return c.lock(), {key: LEVELS[i] for key, i in zip(keys, dataset.levels(), strict=True)}


def scripted(monkeypatch, c, workdir):
  """A run whose evaluations promote after step 1 and roll back after step 3.

  (its state, of each step the rows, and the weights before and after the evaluation.)
  """
  accuracies, steps, weights = {1: 0.8, 2: 0.8, 3: 0.5, 4: 0.5}, [], []
  pack, heard = sft.batch.pack_sft, sft.Lessons.heard

  def packed(rows, *args, **kwargs):
    steps.append([key(row) for row in rows])
    return pack(rows, *args, **kwargs)

  def told(self, step, accuracy, state):
    before = jax.device_get(state.params)
    state = heard(self, step, accuracy, state)
    weights.append((before, jax.device_get(state.params)))
    return state

  answered = lambda self, step, *rest: SimpleNamespace(accuracy=accuracies[step])
  with monkeypatch.context() as patch:
    patch.setattr(sft.batch, "pack_sft", packed)
    patch.setattr(sft.evaluate.HeldOut, "ask", answered)
    patch.setattr(sft.Lessons, "heard", told)
    return sft.main(c, workdir), steps, weights


def test_a_curriculum_decides_what_is_read_and_resumes_bit_for_bit(
  staged, policy, tmp_path, monkeypatch
):
  c, level = staged
  state, steps, weights = scripted(monkeypatch, c, tmp_path / "run")
  assert [{level[row] for row in rows} for rows in steps] == [
    {"simple"},
    {"medium", "hard"},
    {"medium", "hard"},
    {"simple"},
  ]
  assert [line["stage"] for line in logged(tmp_path / "run")] == [0, 1, 1, 0]
  (promoted, _), _, (fallen, back), _ = weights
  assert max_difference(back, promoted) == 0.0 and max_difference(fallen, promoted) > 1e-5
  killed = tmp_path / "killed"
  shutil.copytree(tmp_path / "run", killed)
  shutil.rmtree(killed / "checkpoints" / "4")  # In the second stage, before it is rolled back.
  resumed, again, _ = scripted(monkeypatch, c, killed)
  assert again == steps[2:]
  assert max_difference(resumed.params, state.params) == 0.0
  assert logged(killed) == logged(tmp_path / "run")


@pytest.mark.parametrize("file", ["", "questions.jsonl"])
def test_what_has_no_difficulty_has_no_curriculum(staged, policy, file):
  c = staged[0].copy_and_resolve_references().unlock()
  c.data.file = file
  with pytest.raises(ValueError, match=f"needs a dataset .* not '{file}': scenes and files"):
    read(c, policy)


def test_a_level_that_a_later_stage_lacks_is_missed_at_once(staged, policy, tmp_path):
  c = staged[0].copy_and_resolve_references().unlock()
  c.data.file = str(built(tmp_path, n=1).folder)
  # One record alone is of middling difficulty.
  c.curriculum.update(simple=(0.0, 0.0), medium=(1.0, 0.5), hard=(0.0, 0.5))
  with pytest.raises(ValueError, match="no record is hard, of {'simple': 0, 'medium': 1"):
    read(c, policy)


def test_a_stage_mixes_its_levels(staged, policy):
  c, level = staged
  c = c.copy_and_resolve_references().unlock()
  c.curriculum.update(medium=(0.0, 0.25), hard=(0.0, 0.75))
  mixed = [
    level[key(row)] for rows in itertools.islice(read(c, policy, stage=1), 2) for row in rows
  ]
  # 2 of 8 where 6 of 11 records are medium: by records it were 4 of each, were none simple.
  assert sorted(mixed) == ["hard"] * 6 + ["medium"] * 2
