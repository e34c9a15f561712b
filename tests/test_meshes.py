"""Eight devices compute what one does: the same losses, updates and samples on any mesh.

Float32 sums in another order differ by a few 1e-7 of what is summed; 1e-5 holds for gradients of up
to about 1, and no wrong mean, missing row or doubled image is as small as that.
"""

import dataclasses
import functools
import re
from collections import Counter

import jax
import numpy as np
import optax
import pytest

from pixelis_jax import batch, learner, sampler, sharding
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.model.policy import Model
from tests import episodes, fakes
from tests.episodes import max_difference

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.25], np.float32)


def on(policy: sampler.Policy, shape: tuple[int, int, int]) -> sampler.Policy:
  """The same policy on a mesh of (data, fsdp, tensor) devices."""
  return sampler.on_mesh(policy, sharding.make_mesh(*shape))


@pytest.fixture(scope="module", params=MESHES, ids=str)
def sharded(policy, request):
  return on(policy, request.param)


# Enough where rows, weights and heads are split as in the others.
on_all_axes = pytest.mark.parametrize("sharded", [(2, 2, 2)], ids=str, indirect=True)
on_two = pytest.mark.parametrize("sharded", [(1, 8, 1), (2, 2, 2)], ids=str, indirect=True)


@pytest.fixture(scope="module")
def played(policy):
  """Seven two-turn episodes, each longer than the one before; two share a question's picture."""
  generate = policy.sampler.bind(policy.params, key=jax.random.key(0), version=0)
  seeds = [0, 1, 2, 2, 4, 5, 6]
  tasks = [episodes.task(f"q{i}", "what? " * (i + 1), seed=seed) for i, seed in enumerate(seeds)]
  return episodes.two_turns(generate, tasks, [episodes.crop(i) for i in range(7)])


@functools.cache  # Batches of one shape share a program.
def grpo_step(model: Model):
  """Plain SGD at rate 1: the update is the gradient."""
  loss = learner.grpo_loss(model, Objective(clip_ratio_high=0.28, entropy_coeff=0.01))
  return learner.make_step(loss, optax.sgd(1.0), donate=False)


def grpo_batch(policy: sampler.Policy, played, *, packed: bool = False) -> batch.GrpoBatch:
  """Seven rows: none of the meshes' blocks divides them."""
  return batch.pack_grpo(
    [batch.trajectory_row(t) for t in played],
    ADVANTAGES,
    policy.model.config,
    max_tokens=256,
    multiple_of=policy.model.blocks,
    blocks=policy.model.blocks,
    packed=packed,
  )


COMPILED = {}


def compiled(policy: sampler.Policy, packed: batch.GrpoBatch):
  """(the compiled step of such a batch, what it is given): once a model and shape."""
  state = learner.init_state(policy.params, optax.sgd(1.0), seed=0)
  # A reference that differs, so that the KL has a gradient.
  packed = packed.replace(ref_logps=packed.old_logps - np.float32(0.1))
  given = state, sharding.put_rows(packed, policy.model.mesh), np.float32(0.5)
  key = policy.model, str(jax.tree.map(np.shape, packed))
  if key not in COMPILED:
    COMPILED[key] = grpo_step(policy.model).lower(*given).compile()
  return COMPILED[key], given


def update(policy: sampler.Policy, packed: batch.GrpoBatch):
  """(state, measured) after one step held to the policy's own reference."""
  step, given = compiled(policy, packed)
  return step(*given)


@pytest.fixture(scope="module")
def alone(policy, played):
  return update(policy, grpo_batch(policy, played))


def same_update(one, other) -> None:
  for name, value in one[1].items():
    np.testing.assert_allclose(other[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  assert max_difference(other[0].params, one[0].params) < 1e-5
  assert float(one[1]["grad_norm"]) > 0.1


def test_a_grpo_step_is_that_of_one_device(sharded, played, alone):
  """Rows of different lengths, one image shown twice, and blocks that hold nothing but padding.

  Parameters stay where they were: an update that gathered them would fit no device that a large
  model needs.
  """
  state, measured = update(sharded, grpo_batch(sharded, played))
  same_update(alone, (state, measured))
  placed = jax.tree.map(lambda x: x.sharding, state.params)
  same = jax.tree.map(
    lambda a, b, x: a.is_equivalent_to(b, x.ndim), placed, sharded.model.shardings(), state.params
  )
  assert all(jax.tree.leaves(same))


@on_all_axes
def test_a_packed_step_is_that_of_one_device(sharded, played, alone):
  same_update(alone, update(sharded, grpo_batch(sharded, played, packed=True)))


def test_a_mesh_may_split_heads_alone(policy, played, alone):
  """Then no rows are apart, and nothing may be manual over them."""
  tensor = on(policy, (1, 1, 2))
  state, measured = update(tensor, grpo_batch(tensor, played))
  np.testing.assert_allclose(measured["loss"], alone[1]["loss"], rtol=1e-5)
  assert max_difference(state.params, alone[0].params) < 1e-5


@on_all_axes
def test_samples_are_those_of_one_device(policy, sharded):
  """Random ones too: an episode draws from its own key, wherever its row lies."""
  tasks = [episodes.task(f"q{i}", "what? " * (i + 1), seed=i) for i in range(5)]
  asked = [task for task in tasks for _ in range(4)]
  crops = [episodes.crop(i % 7, height=20 + 4 * (i % 3)) for i in range(len(asked))]

  def play(p):
    generate = p.sampler.bind(p.params, key=jax.random.key(1), version=0)
    return episodes.two_turns(generate, asked, crops)

  for one, many in zip(play(policy), play(sharded), strict=True):
    for mine, theirs in zip(one.steps, many.steps, strict=True):
      np.testing.assert_array_equal(mine.completion.tokens, theirs.completion.tokens)
      np.testing.assert_allclose(mine.completion.logps, theirs.completion.logps, atol=1e-4)


@on_two
def test_memory_keys_are_those_of_one_device(policy, sharded, played):
  tasks = [t.task for t in played]
  steps = [t.steps for t in played]
  np.testing.assert_allclose(
    sampler.embed(sharded, tasks, steps), sampler.embed(policy, tasks, steps), atol=1e-5
  )


def collectives(text: str) -> Counter:
  """Of a compiled program: how often each kind of collective stands in it."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  return Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def gathered_bytes(text: str) -> list[int]:
  """The size of each array that an all-gather makes."""
  sizes = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}
  found = re.findall(r"= (?:\()?(\w+)\[([\d,]*)\][^ ]* all-gather", text)
  return [sizes[kind] * int(np.prod([int(n) for n in shape.split(",")])) for kind, shape in found]


def test_a_layer_is_gathered_when_it_is_used_and_never_the_whole_tree(policy, played):
  """On 8 ways of `fsdp` the largest thing that is gathered is a layer's matrix, or the words.

  Gathered stacks of layers would be several times that.
  """
  sharded = on(policy, (1, 8, 1))
  step, _ = compiled(sharded, grpo_batch(sharded, played))
  text = step.as_text()
  leaves = jax.tree_util.tree_leaves_with_path(sharded.params)
  stacked = lambda path: any(getattr(e, "key", None) in ("layers", "blocks") for e in path)
  single = [x.nbytes // (len(x) if stacked(path) else 1) for path, x in leaves]
  assert max(gathered_bytes(text)) <= max(single)
  # Rows and images stay on their devices: nothing is exchanged but weights, each gathered forward
  # and backward, and sums; and once the embedding's gradient, its tokens in return for columns.
  found = collectives(text)
  assert found["all-gather"] <= 2 * len(leaves) and found["all-to-all"] <= 1
  assert found["all-reduce"] + found["reduce-scatter"] <= len(leaves)
  assert not found["collective-permute"]


def test_rollouts_on_data_devices_exchange_nothing_but_when_to_stop(policy):
  """Each device has its prompts, their images, their samples and later turns."""
  sharded = on(policy, (8, 1, 1))
  model, sampled = sharded.model, sharded.sampler
  compiled = sampled.programs
  cache = compiled.empty(8, 32, sampled.dtype)
  rows = sampled.put(np.zeros(32, np.int32))
  gathered = compiled.gather.lower(cache, rows, capacity=48).compile().as_text()
  shared = compiled.share.lower(cache, rows[::4], copies=4, capacity=16).compile().as_text()
  assert not collectives(gathered) and not collectives(shared)
  image = fakes.image(40, 40, seed=0)
  block = sampled.block(
    [sharded.chat.prompt(fakes.task("q", images=[image]))] * 8, [0] * 8, 8, list(range(8))
  )
  inputs = block.tokens, block.positions, block.sources, block.segments, block.last
  features = compiled.encode(sharded.params, block.vision)
  cache = compiled.empty(8, block.tokens.shape[1], sampled.dtype)
  read = compiled.extend.lower(sharded.params, cache, features, *sampled.put(inputs))
  assert not collectives(read.compile().as_text())
  assert model.blocks == 8


def test_a_mesh_that_cuts_heads_is_refused(policy):
  with pytest.raises(ValueError, match=r"mesh tensor=4 must divide .*num_key_value_heads=2"):
    dataclasses.replace(policy.model, mesh=sharding.make_mesh(data=2, tensor=4))
