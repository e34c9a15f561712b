"""What a run is taken to compile and to hold is what it does."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import rft, tiny_rft, tiny_sft
from pixelis_jax import batch, learner, online, packing, sampler, sft, sharding, ttrl, workloads
from pixelis_jax.data import demos
from pixelis_jax.handover import Published
from pixelis_jax.model import trainable
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model
from tests import episodes, fakes
from tests.episodes import seen, unlabelled

ROOT = Path(__file__).parents[1]
described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
cut = lambda tree: [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)]


def test_an_episode_counts_its_images():
  episode = workloads.Episode(images=3, patches=400, asked=50, written=20)
  assert (episode.prompt(4), episode.tokens(4)) == (150, 370)
  assert workloads.Episode(images=0, asked=50, written=20).tokens(4) == 70


def test_an_sft_update_is_planned_as_it_is_run(policy):
  """The same program from abstract arrays as from real ones: shapes, dtypes and places."""
  c = tiny_sft.get_config().copy_and_resolve_references().unlock()
  c.model.path, c.batch, c.packed = str(ROOT / "assets/tiny-vl"), 6, False
  c.mesh.data, c.mesh.fsdp, c.model.lora.rank, c.max_row = 2, 2, 2, 96
  # Demonstrations as in the plan: 6 of 96 tokens, two images of 64 patches each, on 4 devices.
  episode = workloads.Episode(images=2, patches=64, asked=40, written=24)
  _, (update,) = workloads.runs(c, jax.devices()[:4], episode)
  name, mesh, step, (state, packed, *rest), *_ = update
  assert name == "update" and mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1}

  model = sampler.adapted_model(c.model, Model(load_config(c.model.path), mesh=mesh))
  params = model.init(jax.random.key(0))
  params = learner.with_heads(model, params, jax.random.key(0), labels=demos.LABELS)
  trained, base = trainable.parts(model, params["policy"])
  real_step, tx, _ = sft.make_step(c, model)
  real_state = learner.init_state({**params, "policy": trained}, tx, seed=0)
  images = [
    [policy.images.process(fakes.image(80, 80, seed=2 * i + j)) for j in range(2)] for i in range(6)
  ]
  rows = [demonstration(model.config, shown) for shown in images]
  real = batch.pack_sft(
    rows, model.config, max_tokens=c.max_row, multiple_of=4, blocks=4, labels=demos.LABELS
  )
  real = sharding.put_rows(real, mesh)
  assert described(state) == described(real_state)
  assert described(packed) == described(real)
  assert described(rest[0]) == described({"policy": base})
  assert cut((state.params, packed)) == cut((real_state.params, real))
  out, _ = step.trace(state, packed, *rest).out_info
  assert described(out) == described(real_state)


def test_rollouts_that_lag_are_planned_on_devices_of_their_own():
  """The update on four, rollouts on the two behind, with weights for the next step beside."""
  c = tiny_rft.get_config().copy_and_resolve_references().unlock()
  c.model.path, c.mesh.data, c.mesh.fsdp = str(ROOT / "assets/tiny-vl"), 1, 4
  c.staleness, c.rollout_mesh.data, c.rollout_mesh.tensor = 1, -1, 2
  episode = workloads.Episode(patches=64, asked=40, written=24)
  held, planned = workloads.runs(c, jax.devices()[:6], episode)
  on = {run.name: ([d.id for d in run.mesh.devices.flat], run.beside) for run in planned}
  plays = [4, 5], held["weights that play"]
  assert on == {"update": ([0, 1, 2, 3], 0), "look": plays, "read": plays, "write": plays}


@pytest.mark.parametrize(
  "size, devices, rows, length",
  [
    # 32 questions of 4 episodes of 256 + 512 + 2 * 1024 tokens, of which 5 fit into a row: 26 rows,
    # for 2 devices 13 each, which round up to 16, and 5 * 2,816 tokens to 16,384.
    ("qwen2_5_vl_3b", 2, 32, 16_384),
    # On 64 parts each row holds 2 of them.
    ("qwen2_5_vl_3b", 8, 64, 6144),
    # Without images 21 episodes fit, and 16 are there for each of 8: 12,288 tokens.
    ("qwen3_8b", 8, 8, 12_288),
  ],
)
def test_rows_of_an_update_are_those_that_are_packed(size, devices, rows, length):
  c = rft.get_config(size).copy_and_resolve_references().unlock()
  c.mesh.data, c.mesh.fsdp, c.grpo.group = devices, 1, 4
  c.rollout_mesh.tensor, c.accumulate = 1, 8 if rows == 64 else 1
  _, (update, *_) = workloads.runs(c, jax.devices()[:devices], workloads.Episode())
  _, packed, *_ = update.arguments
  assert packed.inputs.tokens.shape == (rows, length)
  tokens = 768 if size == "qwen3_8b" else 2816
  placed = packing.place(
    [tokens] * 128,
    max_tokens=c.max_row,
    packed=True,
    blocks=devices * c.accumulate,
    multiple_of=devices * c.accumulate,
  )
  assert placed.shape == (rows, length)


@pytest.fixture(scope="module", params=["as it answers", "in other parts"])
def learning(request, model_config, tmp_path_factory):
  """(config, a learner on two devices, what it served first, what its programs were given)."""
  c = episodes.online_config(model_config.path).copy_and_resolve_references().unlock()
  c.model.dtype, c.pace, c.mesh.data = "bfloat16", "lockstep", 1
  if request.param == "as it answers":
    c.mesh.fsdp = 2
  else:
    c.mesh.tensor, c.learn.mesh.fsdp = 2, 2
  c.learn.replay.experiences, c.learn.corrections = 0, 0  # None of these samples is in a box.
  c.kl.limit, c.probe.tolerance = 1e9, 1.0  # Random weights move far in one step.
  here, there = online.meshes(c, jax.devices()[:2])
  key = jax.random.key(0)
  learned = sampler.load_policy(c.model, mesh=there, rollouts=here, adapters=key)
  plays = sampler.serving(learned, here)
  probe = ttrl.make_probe(c, plays, [unlabelled(f"p{i}", seed=10 + i) for i in range(6)])
  published = Published(0, plays.params, plays.sampler.serve)
  learn = ttrl.Learner(c, learned, published, probe, tmp_path_factory.mktemp("learn"), list)
  given = {}

  def spied(name, function):
    return lambda *arguments: given.setdefault(name, arguments) and function(*arguments)

  learn.step, learn.logps = spied("update", learn.step), spied("score", learn.logps)
  learn.looks._encode = spied("targets", learn.looks._encode)
  learn.looks._step = spied("see", learn.looks._step)
  two = [seen(plays, "a", plain=1, clear=2), seen(plays, "b", plain=3, clear=4)]
  learn.update(two)
  learn.publish()
  learn.update([dataclasses.replace(one, id=f"{one.id}2") for one in two])
  assert (learn.applied, learn.refused) == (2, 0)
  yield c, learn, plays, given
  learn.close()


@pytest.fixture(scope="module")
def planned(learning):
  """(what is held, the programs by name) of that learner's config, an episode like its longest."""
  c, _, _, given = learning
  longest = int((np.asarray(given["score"][1].segments) > 0).sum(axis=1).max())
  episode = workloads.Episode(images=1, patches=64, asked=longest - 16 - 4, written=4)
  held, found = workloads.runs(c, jax.devices()[:2], episode)
  return held, {run.name: run for run in found}


@pytest.mark.parametrize("name", ["update", "targets", "see", "score"])
def test_a_learners_programs_are_planned_as_they_are_run(learning, planned, name):
  """The same shapes, dtypes and places: nothing else decides what is compiled."""
  given, run = learning[3][name], planned[1][name]
  if name == "see":  # The average replaces nothing; `state.params` is the tower that is taught.
    assert given[0].params.keys() == {"visual"}
  assert described(run.arguments) == described(given)
  assert cut(run.arguments) == cut(given)


def test_what_is_planned_to_be_held_is_what_lies_there(learning, planned):
  """Each array of a learner that has published and gone on once, on one of its devices.

  Beside counters and keys these are the weights, moments and copies that the plan names.
  """
  _, learn, plays, _ = learning
  trees = [learn._tree(), learn.stable, learn.base, learn.policy.params]
  trees += [plays.params, learn.published.latest()[1]]
  lie = {id(x): x for x in jax.tree.leaves(trees)}
  held = dict(planned[0])
  assert held.pop("gradients") == held["weights that learn"]  # Inside the update alone.
  few = 200  # Bytes: two steps and two random keys of 8 or 16 bytes, and the optimizers' counts.
  assert 0 <= workloads.size([*lie.values()]) - sum(held.values()) < few
  total = sum(held.values())
  update, state = planned[1]["update"], learn.state
  assert abs(total - update.beside - workloads.size((state, learn.base))) < few


def test_answers_beside_learning_are_planned_where_they_are_given(model_config):
  """On a device of their own lie the reference and what is published, and nothing that learns."""
  c = episodes.online_config(model_config.path).copy_and_resolve_references().unlock()
  c.pace, c.mesh.fsdp, c.mesh.tensor = "learner", 1, 1
  c.learn.mesh.data, c.learn.mesh.fsdp = 1, 2
  episode = workloads.Episode(images=1, patches=64, asked=40, written=24)
  held, found = workloads.runs(c, jax.devices()[:3], episode)
  at = {run.name: [device.id for device in run.mesh.devices.flat] for run in found}
  assert at == {
    **dict.fromkeys(("update", "targets", "see", "score"), [1, 2]),
    **dict.fromkeys(("look", "read", "write"), [0]),
  }
  rollout = found[-1]
  played = workloads.size(rollout.arguments[0])
  tower = workloads.size(rollout.arguments[0]["visual"])
  assert (rollout.beside, held["weights that play"]) == (tower, played + tower)


def test_an_episode_that_would_teach_nothing_is_not_planned(model_config):
  c = episodes.online_config(model_config.path)
  with pytest.raises(ValueError, match=r"episode of 1152 tokens .* learn.max_tokens is 128"):
    workloads.runs(c, jax.devices()[:1], workloads.Episode(images=1, patches=64, asked=624))


def demonstration(config, images) -> batch.Row:
  """96 tokens, the two images' among them."""
  tokens = np.zeros(96, np.int32)
  for at, image in zip((1, 40), images, strict=True):
    tokens[at : at + len(image.patches) // 4] = config.image_token
  zeros = np.zeros(96, np.float32)
  return batch.Row(tokens=tokens, images=tuple(images), loss_mask=zeros == 0, logps=zeros)
