"""What is seen clearly once: the tower learns to see it plainly, and keeps what it is held to."""

import dataclasses

import jax
import numpy as np
import pytest

from pixelis_jax import batch, learner, sharding
from pixelis_jax.looks import Looks
from pixelis_jax.model import trainable
from pixelis_jax.model.policy import Model
from pixelis_jax.types import Status, Step, ToolCall, Trajectory
from tests import episodes, fakes
from tests.episodes import experience, look, max_difference, seen, unlabelled


@pytest.fixture(scope="module")
def config(model_config):
  c = episodes.online_config(model_config.path).copy_and_resolve_references().unlock()
  # Rates for random weights: each step goes far enough to be seen, and not too far.
  c.learn.look.update({"updates": 4, "pairs": 4, "held": 4, "weight": 1.0, "lr": 1e-3})
  c.learn.look.capacity, c.learn.warmup, c.learn.patch_scale = 2, 2, 1.0
  return c.lock()


def zoomed(policy, id: str, *, seed: int, kind: str = "what") -> Trajectory:
  """An episode that zoomed in, as the tool has it."""
  task = dataclasses.replace(unlabelled(id, seed), kind=kind)
  call = ToolCall(name="zoom_in", arguments={"bbox_2d": [10, 10, 60, 60]})
  result = policy.tools.run(call, task, [])
  called = Step(completion=fakes.completion("zoom"), call=call, result=result)
  said = dataclasses.replace(fakes.completion("7"), context=policy.chat.result(result))
  return Trajectory(
    task=task, steps=(called, Step(completion=said)), status=Status.ANSWERED, answer="7"
  )


@pytest.fixture(scope="module")
def held(policy):
  return [look(policy, unlabelled(f"h{i}"), seed=50 + i) for i in range(3)]


def made(config, policy, held, **changes):
  c = config.copy_and_resolve_references().unlock()
  c.update_from_flattened_dict(
    {f"learn.{name.replace('__', '.')}": v for name, v in changes.items()}
  )
  return Looks(c, policy, policy.params, held)


def error(policy, params, pairs):
  """The loss itself over these pairs, each once."""
  packed = batch.pack_looks(pairs, np.ones(len(pairs), np.float32), policy.model.config)
  packed = packed.replace(targets=policy.model.encode(policy.params, packed.clear))
  return float(learner.look_loss(policy.model)(params, packed)[0])


def test_a_plain_look_comes_to_show_what_the_clearer_one_did(config, policy, held):
  one = seen(policy, "a", plain=1, clear=2)
  looks = made(config, policy, held)
  looks.add([one])
  params = policy.params
  pair = batch.shared_look(one.looks)
  before = error(policy, params, [pair])
  for update in range(4):
    params, looks.state, measured = looks.teach(params, {}, update)
  kept = [(image, image) for t in held for image in t.steps[-1].completion.context.images]
  # 16 steps: far nearer, and what is held moved by much less than what was learned.
  assert error(policy, params, [pair]) < 0.5 * before
  assert error(policy, params, kept) < 0.2 * before
  assert 0.0 < measured["look_loss"] < before
  # The tower alone has moved.
  assert max_difference(params["text"], policy.params["text"]) == 0.0
  assert max_difference(params["visual"], policy.params["visual"]) > 0.0


def taught(config, policy, held, view: str, **changes):
  """The weights after 16 steps towards one pair that was clearer in this view."""
  looks, params = made(config, policy, held, **changes), policy.params
  looks.add([seen(policy, "a", plain=1, clear=2, view=view)])
  for update in range(4):
    params, looks.state, _ = looks.teach(params, {}, update)
  return params


def test_held_pictures_stand_in_for_the_streams_where_a_view_can_be_undone(config, policy):
  """No picture of the stream is inverted here; a view that inverts says that it would be."""
  held = [zoomed(policy, f"h{i}", seed=50 + i) for i in range(3)]
  plainly = [t.steps[0].result.images[0].pixels for t in held]
  process = policy.chat.patches
  inverted = [(process(255 - pixels), process(pixels)) for pixels in plainly]
  same = [(process(pixels),) * 2 for pixels in plainly]
  before = error(policy, policy.params, inverted)
  half, none = (
    taught(config, policy, held, "invert", look__copies=copies, look__pairs=4) for copies in (2, 0)
  )
  # What is learned of three pictures in 32 draws; from one pair of noise, nothing about these.
  assert error(policy, half, inverted) < 0.5 * before < 0.8 * error(policy, none, inverted)
  assert error(policy, half, same) < 0.2 * before
  # What cannot be undone leaves every pair and every draw as it was; and what may not be asked.
  stretched = taught(config, policy, held, "stretch", look__copies=2, look__pairs=4)
  assert max_difference(stretched, none) == 0.0
  colours = [dataclasses.replace(t, task=dataclasses.replace(t.task, kind="color")) for t in held]
  kept = taught(config, policy, colours, "invert", look__copies=2, look__pairs=4)
  assert max_difference(kept, none) == 0.0


def test_an_overview_is_held_as_well_as_the_detail(config, policy):
  """Where to look was read off it: a tower that sees details better and places nothing is blind."""

  def opened(trajectory: Trajectory) -> Trajectory:
    """This episode, its overview shown as the prompt shows it."""
    first, *others = trajectory.steps
    context = policy.chat.prompt(trajectory.task)
    first = dataclasses.replace(
      first, completion=dataclasses.replace(first.completion, context=context)
    )
    return dataclasses.replace(trajectory, steps=(first, *others))

  blind = [look(policy, unlabelled(f"h{i}", 20 + i), seed=50 + i) for i in range(3)]
  held = [opened(trajectory) for trajectory in blind]
  overviews = [t.steps[0].completion.context.images[0] for t in held]
  details = [t.steps[1].completion.context.images[0] for t in held]
  assert not {i.key for i in overviews} & {i.key for i in details}
  drift = lambda shown: error(
    policy, taught(config, policy, shown, "stretch", look__held=8), [(i, i) for i in overviews]
  )
  # 16 steps of 8 draws from six pictures; from three none of which is an overview.
  assert drift(held) < 0.5 * drift(blind)


def test_muon_moves_the_towers_matrices(config, policy, held):
  """By steps whose singular values are alike; Adam's of one picture are of lower rank."""
  before = policy.params["visual"]["blocks"]

  def spreads(scale: float) -> list[float]:
    """Of each layer's first matrix behind the attention: the median of its move's singular values
    over the largest.
    """
    looks = made(config, policy, held, look__updates=1, look__muon_scale=scale)
    looks.add([seen(policy, "a", plain=1, clear=2)])
    after, *_ = looks.teach(policy.params, {}, 0)
    moves = jax.tree.map(np.subtract, after["visual"]["blocks"], before)["mlp"]["up"]["kernel"]
    values = [np.linalg.svd(move, compute_uv=False) for move in moves]
    return [float(np.median(v) / v[0]) for v in values]

  # Newton-Schulz leaves singular values within 0.7 and 1.2: see test_optimizer.
  assert min(spreads(1.0)) > 0.5 > max(spreads(0.0))


def test_the_loss_is_relative_to_what_should_be_seen(policy):
  """Features that are nothing at all are wrong by 1, whatever their size and the image's."""
  images = [policy.images.process(fakes.image(*size, seed=7)) for size in ((40, 40), (20, 60))]
  zero = jax.tree.map(lambda x: 0 * x, policy.params)
  # Not a mean over features: then the larger image would weigh more, and with weights 1 and 3 the
  # sum would not be their mean.
  packed = batch.pack_looks([(i, i) for i in images], np.float32([1, 3]), policy.model.config)
  packed = packed.replace(targets=policy.model.encode(policy.params, packed.clear))
  loss = learner.look_loss(policy.model)
  np.testing.assert_allclose(float(loss(zero, packed)[0]), 1.0, rtol=1e-5)
  np.testing.assert_allclose(float(loss(policy.params, packed)[0]), 0.0, atol=1e-9)
  # Padding, whose features are noise, has no part in it.
  noisy = packed.replace(targets=np.where(packed.weights[..., None] > 0, packed.targets, 1e6))
  np.testing.assert_allclose(float(loss(zero, noisy)[0]), 1.0, rtol=1e-5)


def test_parts_add_up_to_the_whole(policy):
  pairs = [(policy.images.process(fakes.image(40, 40, seed=i)),) * 2 for i in range(4)]
  weights = np.float32([1, 2, 0, 1])
  packed = batch.pack_looks(pairs, weights, policy.model.config, blocks=2)
  packed = packed.replace(targets=0.5 * policy.model.encode(policy.params, packed.clear))
  packed = jax.device_put(packed)
  loss = learner.look_loss(policy.model)
  (whole, _), grads = jax.value_and_grad(loss, has_aux=True)(policy.params, packed)
  (parts, _), summed = learner.accumulated(loss, 2, None)(policy.params, packed)
  np.testing.assert_allclose(float(parts), float(whole), rtol=1e-5)
  assert max_difference(summed, grads) < 1e-5 * float(
    max(map(np.max, map(np.abs, jax.tree.leaves(grads))))
  )


def test_only_the_latest_clearer_looks_are_kept(config, policy, held):
  looks = made(config, policy, held)
  plain = experience(policy, unlabelled("p"), {0}, id="p")
  one = seen(policy, "a", plain=1, clear=2)
  same = seen(policy, "s", plain=1, clear=1)  # The view showed what the plain look did.
  looks.add([plain, same, one])
  assert looks.ids == ["a"]
  looks.add([seen(policy, "b", plain=3, clear=4), one, seen(policy, "c", plain=5, clear=6)])
  assert looks.ids == ["b", "c"]  # The capacity is 2.


@pytest.mark.parametrize("changes", [{"look__updates": 0}, {"max_patches": 1}])
def test_nothing_is_taught_where_nothing_may_be(config, policy, held, changes):
  looks = made(config, policy, held, **changes)
  looks.add([seen(policy, "a", plain=1, clear=2)])
  params, state, measured = looks.teach(policy.params, {}, 0)
  assert (params is policy.params, state is looks.state, measured) == (True, True, {})
  assert not looks.ids


def test_a_frozen_tower_is_not_taught(config, policy, held):
  trained, base = trainable.parts(policy.model, policy.params, ("visual",))
  looks = Looks(config, policy, trained, held)
  looks.add([seen(policy, "a", plain=1, clear=2)])
  assert looks.state is None and looks.teach(trained, base, 0) == (trained, None, {})


@pytest.mark.parametrize("parts", [1, 2])
def test_several_devices_teach_what_one_does(config, policy, held, parts):
  """And each of them in parts, one after the other."""
  one = seen(policy, "a", plain=1, clear=2)
  mesh = sharding.make_mesh(data=2)
  model = Model(policy.model.config, mesh=mesh)
  placed = jax.device_put(policy.params, model.shardings())
  taught = []
  for which, params in (
    (policy, policy.params),
    (dataclasses.replace(policy, model=model, params=placed), placed),
  ):
    looks = made(config, which, held, accumulate=1 if which is policy else parts)
    looks.add([one])
    taught.append(jax.device_get(looks.teach(params, {}, 0)[0]["visual"]))
  # Adam's first steps are the signs of gradients, of which the smallest are rounding: a few weights
  # move the other way, by the rate at most.
  gaps = np.concatenate(
    [np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, taught), strict=True)]
  )
  assert np.mean(gaps > 1e-5) < 0.01
