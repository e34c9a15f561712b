"""What a run of `sft`, `rft` or `online` compiles: its programs, with abstract arrays, and what is
on the devices beside them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import FrozenConfigDict

from pixelis_jax import batch, learner, looks, online, packing, rft, sampler, sft, sharding, ttrl
from pixelis_jax.data import demos
from pixelis_jax.model import cost, lora, trainable
from pixelis_jax.model.decode import programs
from pixelis_jax.model.layers import KEYS
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model
from pixelis_jax.tools.views import VIEWS
from pixelis_jax.types import Patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
  """What one episode is taken to hold: images of so many patches, the first of them the question's;
  of a model that reads text only, none.

  `asked` and `written` are tokens of text that the policy reads and writes, in as many turns as
  there are images.
  """

  images: int = 2
  patches: int = 4096
  asked: int = 256
  written: int = 512

  def prompt(self, unit: int) -> int:
    """Tokens of the first turn's question; `unit` patches make a token."""
    return self.asked + (self.patches // unit if self.images else 0)

  def tokens(self, unit: int) -> int:
    """Of the whole episode."""
    return self.asked + self.written + self.images * self.patches // unit


class Run(NamedTuple):
  """A program on a mesh; `beside` is bytes on each device that are none of its arguments, `flops`
  those of all devices together.
  """

  name: str
  mesh: Mesh
  function: Any
  arguments: tuple
  options: Mapping[str, Any] = {}
  beside: int = 0
  flops: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lot:
  """What an update reads: sequences, of episodes whose tools showed pictures of their own, of
  questions whose pictures all their episodes share.

  Rows of at most `max_row` tokens lie in `parts` that are computed one after the other on each
  block of devices; together they are a multiple of `multiple`.
  """

  sequences: int
  episodes: int
  questions: int
  max_row: int
  parts: int
  multiple: int
  packed: bool


def lot(c: Any, blocks: int) -> Lot:
  """That of an update with this config, on so many blocks of devices."""
  if "arrivals" in c:
    read, parts = c.learn.requests + c.learn.replay.experiences, blocks * c.learn.accumulate
    samples = min(c.learn.contrast, c.learn.samples or c.samples)
    corrected = min(c.learn.corrections, samples)
    return Lot(
      sequences=read * (samples + corrected) + c.probe.rehearse,
      episodes=read * samples + c.probe.rehearse,
      questions=read + c.probe.rehearse,
      max_row=c.learn.max_tokens,
      parts=parts,
      multiple=math.lcm(c.learn.rows_multiple, parts),
      packed=False,
    )
  parts, plays = blocks * c.accumulate, "grpo" in c
  Q = c.grpo.questions if plays else c.batch
  count = Q * c.grpo.group if plays else Q
  return Lot(
    sequences=count,
    episodes=count,
    questions=Q,
    max_row=c.max_row,
    parts=parts,
    multiple=math.lcm(c.rows_multiple if plays else 1, parts),
    packed=c.packed,
  )


def runs(
  c: Any, devices: Sequence[jax.Device], episode: Episode
) -> tuple[dict[str, int], list[Run]]:
  """(bytes that lie on each device, what is run on them), nothing compiled."""
  if "arrivals" in c:
    return _online(c, devices, episode)
  plays = "grpo" in c
  mesh, rollouts = rft.meshes(c, devices) if plays else _one_mesh(c, devices)
  model, episode = _model(c, mesh, episode)
  played = dataclasses.replace(model, mesh=rollouts)
  trained, base = _parameters(c, model)
  step, tx, _ = (rft if plays else sft).make_step(c, model)
  state = _state(trained if plays else _with_heads(model, trained), tx, mesh)
  served = _served(c, played)
  held = {
    "weights that learn": size(state.params),
    "weights that do not": size(base),
    "optimizer": size(state.opt_state),
    "gradients": size(state.params),
    "weights that play": size(served),
  }
  read = lot(c, model.blocks)
  packed = _lesson(model, episode, read, sft=not plays)
  key, scalar = _drawn(mesh)
  rest = (base, key, scalar) if plays else ({"policy": base}, key)
  if plays and c.grpo.kl_coef:
    packed = packed.replace(ref_logps=packed.old_logps)
  trained = state.params if plays else state.params["policy"]
  flops = cost.update(model.config, _work(model, episode, read), **learner.passes(model, trained))
  planned = [Run("update", mesh, step, (state, packed, *rest), flops=flops)]
  if plays:
    # On devices of their own rollouts have the weights of each step that was asked for already.
    beside = c.staleness * size(served) if c.staleness else size(state) + size(base)
    Q, G = c.grpo.questions, c.grpo.group
    how = {"beside": beside, "questions": Q, "episodes": Q * G}
    planned += _rollouts(c, played, episode, served, **how)
  return held, planned


def _online(
  c: Any, devices: Sequence[jax.Device], episode: Episode
) -> tuple[dict[str, int], list[Run]]:
  """`runs` of test-time RL: what a `ttrl.Learner` computes, and answers with two sets of weights.

  No step donates, as an update may be refused, and what was published last is kept to go back to.
  """
  here, there = online.meshes(c, devices)
  model, episode = _model(c, there, episode)
  _check_episode(c.learn, episode, model)
  trained, base = _parameters(c, model)
  whole = lora.join(trained, base)
  settings, dtype = FrozenConfigDict(c.learn), c.model.dtype
  step, tx = ttrl.make_step(model, settings, dtype)
  state = _state(trained, tx, there)
  eyes = None
  if "visual" in trained and c.learn.look.updates:
    look, look_tx = looks.make_step(model, settings, dtype)
    eyes = _state({"visual": trained["visual"]}, look_tx, there)
  moments = size(state.opt_state) + (size(eyes.opt_state) if eyes else 0)
  played = dataclasses.replace(model, mesh=here)
  served = _served(c, played)
  together = {*here.devices.flat} == {*there.devices.flat}
  # Of the weights that answer those that are not there already, as in `Sampler.serve`, and as
  # `Published` replaces them.
  answers = size(served) if here != there else size(_differing(served, whole))
  learned = trainable.parts(played, served, c.model.freeze)[0]
  published = size(learned) if here != there else answers
  # The reference, the running average, and weights, average and moments as published last.
  copies = 4 * size(trained) + moments
  held = {
    "weights that learn": size(trained),
    "weights that do not": size(base),
    "optimizer": moments,
    "gradients": size(trained),
    "copies to go back to": copies,
    "weights that play": answers + published,  # The reference, and what is published.
  }
  idle = sum(held.values()) - held["gradients"]  # What lies where is learned, between updates.
  if not together:
    idle -= held["weights that play"]
  read = lot(c, model.blocks)
  packed, work = _lesson(model, episode, read), _work(model, episode, read)
  packed = packed.replace(ref_logps=packed.old_logps)
  key, scalar = _drawn(there)
  passes = learner.passes(model, trained)
  of = partial(Run, mesh=there)
  planned = [
    of(
      "update",
      function=step,
      arguments=(state, packed, base, key, scalar),
      beside=idle - size(state) - size(base),
      flops=cost.update(model.config, work, **passes),
    )
  ]
  # Behind that step lie its batch and what it proposes, until that is accepted or refused.
  beside = idle + size(packed) + moments - size(base)
  if eyes is not None:
    n = c.learn.look.pairs + c.learn.look.held
    seen = cost.Work(**_seen(model.config, episode, n))
    shown = _shown(model, episode, n, parts=model.blocks * c.learn.accumulate)
    others = {name: x for name, x in trained.items() if name != "visual"}
    planned += [
      of(
        "targets",
        function=learner.make_encode(model, dtype),
        arguments=(whole, shown.clear),
        beside=beside,
        flops=cost.forward(model.config, seen),
      ),
      of(
        "see",
        function=look,
        arguments=(eyes, shown, lora.join(others, base), key),
        beside=beside - size(eyes.opt_state),
        flops=cost.update(model.config, seen, **{**passes, "text": 0}),
      ),
    ]
  planned.append(
    of(
      "score",
      function=learner.make_logps(model, dtype, parts=c.learn.accumulate),
      arguments=(whole, packed.inputs),
      beside=beside,
      flops=cost.forward(model.config, work),
    )
  )
  beside = published  # What of two sets of weights is in the other alone.
  if together:  # The arguments are a copy, or the base and what of the reference is no copy.
    mine = answers if here != there else size(base) + (answers or size(trained))
    beside = idle - mine
  probed = c.probe.tasks.n - c.probe.canary
  asked = max(c.arrivals, c.probe.canary, probed, c.shifted.n, c.original.n)
  played_together = max(asked, c.arrivals * max(c.samples, len(VIEWS)))
  how = {"beside": beside, "questions": asked, "episodes": played_together}
  return held, [*planned, *_rollouts(c, played, episode, served, **how)]


def _check_episode(learn: Any, episode: Episode, model: Model) -> None:
  """ValueError where the learner would leave such an episode out."""
  tokens = episode.tokens(_unit(model))
  if tokens > learn.max_tokens or (episode.images and episode.patches > learn.max_patches):
    raise ValueError(
      f"an episode of {tokens} tokens with images of {episode.patches} patches is not learned from:"
      f" learn.max_tokens is {learn.max_tokens}, learn.max_patches {learn.max_patches}"
    )


def _one_mesh(c: Any, devices: Sequence[jax.Device]) -> tuple[Mesh, Mesh]:
  mesh = sharding.make_mesh(**c.mesh, devices=devices)
  return mesh, sharding.relaid(mesh, **c.rollout_mesh)


def size(tree: Any) -> int:
  """Bytes of arrays on one device."""
  each = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x)
  return sum(each(x) for x in jax.tree.leaves(tree))


def _itemsize(x: jax.Array | jax.ShapeDtypeStruct) -> int:
  return 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize


def _model(c: Any, mesh: Mesh, episode: Episode) -> tuple[Model, Episode]:
  """The model that learns, and the episode without images where it reads text only."""
  model = Model(load_config(c.model.path), mesh=mesh, remat=c.model.remat)
  if model.config.vision is None:
    episode = dataclasses.replace(episode, images=0)
  return sampler.adapted_model(c.model, model), episode


def _unit(model: Model) -> int:
  """Patches that make a token."""
  return 1 if model.config.vision is None else model.config.vision.merge_unit


def _parameters(c: Any, model: Model) -> tuple[Any, Any]:
  """(what learns, what does not) of an abstract model, where each lies, as `load_policy` has it."""
  learns = c.model.dtype if model.lora is not None else c.model.master
  parts = lambda dtype: trainable.parts(
    model, _placed(model.shapes(jnp.dtype(dtype)), model.shardings()), c.model.freeze
  )
  return parts(learns)[0], parts(c.model.dtype)[1]


def _served(c: Any, played: Model) -> Any:
  """Abstract weights as a sampler has them."""
  return _placed(played.shapes(jnp.dtype(c.model.dtype)), played.shardings())


def _differing(tree: Any, other: Any) -> list[Any]:
  """The leaves of `tree` whose dtype is not that of the other's."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return [x for x, y in pairs if x.dtype != y.dtype]


def _drawn(mesh: Mesh) -> tuple[Any, Any]:
  """(a random key, a float), abstract."""
  return _whole(jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(0.0))), mesh)


def _with_heads(model: Model, trained: Any) -> Any:
  """`learner.with_heads` of abstract parameters."""
  bare = dataclasses.replace(model, mesh=None)
  make = lambda: learner.with_heads(bare, {}, jax.random.key(0), labels=demos.LABELS)
  heads = {name: x for name, x in jax.eval_shape(make).items() if name != "policy"}
  places = sharding.shardings(learner.HEAD_AXES, heads, model.mesh)
  return {"policy": trained, **_placed(heads, places)}


def _placed(tree: Any, places: Any) -> Any:
  place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  return jax.tree.map(place, tree, places)


def _whole(tree: Any, mesh: Mesh) -> Any:
  """Abstract arrays that lie whole on every device."""
  return _placed(tree, jax.tree.map(lambda _: sharding.replicated(mesh), tree))


def _rows(tree: Any, mesh: Mesh, rows: int | None = None) -> Any:
  """Host arrays as abstract ones, rows on the mesh; with another number of rows where given."""
  place = sharding.batch_sharding(mesh)

  def one(x: Any) -> jax.ShapeDtypeStruct:
    shape = (x.shape[0] if rows is None else rows, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

  return jax.tree.map(one, tree)


def _state(trained: Any, tx: Any, mesh: Mesh) -> learner.TrainState:
  """`learner.init_state` without arrays: moments lie as their weights do."""
  everywhere = lambda x: _whole(x, mesh)
  beside = lambda x, weight: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight.sharding)
  moments = learner.map_moments(tx, jax.eval_shape(tx.init, trained), trained, beside, everywhere)
  scalars = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), jax.random.key(0)))
  step, key = everywhere(scalars)
  return learner.TrainState(step=step, params=trained, opt_state=moments, rng=key)


def _lesson(model: Model, episode: Episode, read: Lot, *, sft: bool = False) -> Any:
  """The abstract batch of an update: episodes, or with `sft` demonstrations."""
  config, tokens = model.config, episode.tokens(_unit(model))
  placed = packing.place(
    [min(tokens, read.max_row)] * read.sequences,
    max_tokens=read.max_row,
    multiple_of=read.multiple,
    packed=read.packed,
    blocks=read.parts,
  )
  rows, length = placed.shape
  # A block's questions, and the pictures that its episodes' tools showed.
  each = lambda n: -(-n // read.parts)
  pictures = each(read.questions) + each(read.episodes) * max(episode.images - 1, 0)
  multiple = max(read.multiple // read.parts, 1)
  images = packing.round_up(pictures, multiple_of=multiple) * read.parts
  one, how = _one_row(model, episode, length), {"max_tokens": length, "packed": read.packed}
  if sft:
    packed = batch.pack_sft([one], config, labels=demos.LABELS, **how)
    held = {"vision": packed.inputs.vision, "sights": packed.sights}
  else:
    packed = batch.pack_grpo([one], np.ones(1), config, **how)
    held = {"vision": packed.inputs.vision}
  held = _rows(held, model.mesh, images)
  text = packed.inputs.replace(vision=None)
  packed = packed.replace(inputs=text, sights=None) if sft else packed.replace(inputs=text)
  packed = _rows(packed, model.mesh, rows)
  return packed.replace(inputs=packed.inputs.replace(vision=held.pop("vision")), **held)


def _work(model: Model, episode: Episode, read: Lot) -> cost.Work:
  """What a pass over an update's batch computes."""
  tokens = episode.tokens(_unit(model))
  images = read.questions + read.episodes * max(episode.images - 1, 0)
  return cost.Work(
    tokens=read.sequences * tokens,
    pairs=read.sequences * tokens * tokens // 2,
    words=read.sequences * episode.written,
    **_seen(model.config, episode, images),
  )


def _shown(model: Model, episode: Episode, n: int, *, parts: int) -> batch.LookBatch:
  """An abstract `batch.LookBatch` of n pairs."""
  (image,) = _one_row(model, episode, episode.prompt(_unit(model))).images
  rows, _ = packing.seats(packing.spread(n, parts), parts)
  packed = batch.pack_looks([(image, image)], np.ones(1, np.float32), model.config)
  features = np.zeros((*packed.weights.shape, model.config.feature_width), np.float32)
  return _rows(packed.replace(targets=features), model.mesh, rows)


def _seen(config: Any, episode: Episode, images: int) -> dict[str, int]:
  if config.vision is None:
    return {}
  window = (config.vision.window or 0) // config.vision.patch
  return {
    "patches": images * episode.patches,
    "patch_pairs": images * episode.patches**2,
    "window_pairs": images * episode.patches * window**2,
  }


def _one_row(model: Model, episode: Episode, length: int) -> batch.Row:
  """A conversation of this many tokens with one image; only its shapes are used."""
  config = model.config
  tokens, images = np.zeros(length, np.int32), ()
  if config.vision is not None:
    side = config.vision.merge * max(math.isqrt(episode.patches // config.vision.merge_unit), 1)
    count = side * side // config.vision.merge_unit
    tokens[1 : 1 + count] = config.image_token
    patches = np.zeros((side * side, config.vision.patch_values), np.float32)
    pixels = side * config.vision.patch
    images = (Patches(patches=patches, grid=(1, side, side), size=(pixels, pixels), key=""),)
  zeros = np.zeros(length, np.float32)
  return batch.Row(tokens=tokens, images=images, loss_mask=zeros == 0, logps=zeros)


def _rollouts(
  c: Any,
  model: Model,
  episode: Episode,
  params: Any,
  *,
  beside: int,
  questions: int,
  episodes: int,
) -> Iterator[Run]:
  """Reading all questions, and the last turn's tokens of their episodes.

  Each process plays its share, at most `model.max_rows` at a time.
  """
  config, mesh = model.config, model.mesh
  compiled = programs(model, (), ())  # As a sampler's; which tokens end a turn changes no shape.
  dtype = jnp.dtype(c.model.dtype)
  unit = _unit(model)
  most = c.model.max_rows * len({device.process_index for device in mesh.devices.flat})
  multiple = math.lcm(c.model.rows_multiple, model.blocks)
  seats = lambda n: packing.seats(
    packing.spread(min(n, most), model.blocks), model.blocks, multiple_of=multiple
  )
  (prompts, _), (rows, _) = seats(questions), seats(episodes)
  prompt = packing.round_up(episode.prompt(unit), multiple_of=8)
  packed = batch.pack_inputs([_one_row(model, episode, prompt)], config, max_tokens=prompt)
  text = _rows((packed.tokens, packed.positions, packed.sources, packed.segments), mesh, prompts)
  last = _rows(np.zeros(1, np.int32), mesh, prompts)
  of = partial(Run, mesh=mesh, beside=beside)
  asked = min(questions, most)
  features = None
  if packed.vision is not None:
    vision = _rows(packed.vision, mesh, prompts)
    looked = cost.Work(**_seen(config, episode, asked))
    flops = cost.forward(config, looked)
    yield of("look", function=compiled.encode, arguments=(params, vision), flops=flops)
    M, width = packed.vision.inverse.shape[1], config.feature_width
    features = jax.ShapeDtypeStruct(
      (prompts, M, width), dtype, sharding=sharding.batch_sharding(mesh)
    )
  cache = partial(_cache, model, dtype)
  work = cost.Work(tokens=asked * prompt, pairs=asked * prompt**2 // 2)
  arguments = params, cache(prompts, prompt), features, *text, last
  flops = cost.forward(config, work)
  yield of("read", function=compiled.extend, arguments=arguments, flops=flops)
  slots = packing.round_up(episode.tokens(unit), multiple_of=16)
  row = lambda shape, kind: _rows(np.zeros((1, *shape), kind), mesh, rows)
  hidden = row((config.text.width,), np.float32)
  hidden = jax.ShapeDtypeStruct(hidden.shape, dtype, sharding=hidden.sharding)
  key, temperature = _drawn(mesh)
  arguments = params, cache(rows, slots), hidden, row((), np.int32), row((), bool)
  arguments = *arguments, row((2,), np.int32), key, temperature
  written = cost.Work(
    tokens=rows * c.model.max_tokens,
    pairs=rows * c.model.max_tokens * slots,
    words=rows * c.model.max_tokens,
  )
  yield of(
    "write",
    function=compiled.decode,
    arguments=arguments,
    options={"max_tokens": c.model.max_tokens, "greedy": False},
    flops=cost.forward(config, written),
  )


def _cache(model: Model, dtype: Any, rows: int, slots: int) -> Any:
  """An abstract key-value cache, each array where `Cache.constrained` holds it."""
  shapes = jax.eval_shape(
    lambda: dataclasses.replace(model, mesh=None).init_cache(rows, slots, dtype)
  )
  at = lambda *axes: NamedSharding(model.mesh, sharding.spec(axes))
  keys = at(None, *KEYS)
  places = shapes.replace(keys=keys, values=keys, segments=at("batch", None), end=at())
  return _placed(shapes, places)
