"""Prefill and decode with a KV cache; `Sampler.bind` gives the policy as one function, `Generate`.

Two things make rollouts cheap. Samples of one prompt share it: the prompt is read once, and where
all prompts have as many samples, its keys are kept once and read by all samples together. And a
later turn continues the row its previous turn left in the cache,
so only the new tokens (a tool's text and picture) are read; rows are found by the identity of the
`Completion` they produced.

All rows of a cache share one slot counter. A row that is shorter or already finished leaves a hole:
a slot with segment 0 that nobody attends to. Positions are explicit, so holes do not move them.

On a mesh rows lie in equal blocks (`Model.blocks`), each on devices of its own: a prompt, its
samples, their images and later turns stay in one, so rollouts send nothing between blocks.
"""

import atexit
import dataclasses
import importlib
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from pixelis_jax.batch import image_sources, pack_images
from pixelis_jax.chat.family import family_of, frame_of
from pixelis_jax.chat.images import ImageProcessor
from pixelis_jax.chat.template import Chat
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.cluster import agree
from pixelis_jax.model import lora, trainable
from pixelis_jax.model.decode import programs
from pixelis_jax.model.layout import VisionInputs, feature_count, mrope_positions
from pixelis_jax.model.load import load_config, save
from pixelis_jax.model.peft import load_adapter, save_adapter
from pixelis_jax.model.policy import Cache, Model
from pixelis_jax.packing import round_up, seats, spread
from pixelis_jax.sharding import Carrier, caster, own_blocks, own_rows, put_rows
from pixelis_jax.tools import Options, Toolbox, workers
from pixelis_jax.types import Completion, Generate, Patches, Segment, Task, Turns
from pixelis_jax.weights import load

Params = Any


@dataclasses.dataclass(frozen=True)
class Block:
  """Segments of several rows, right-padded, for `Model.extend`; `last` is each row's last token."""

  tokens: np.ndarray
  positions: np.ndarray
  sources: np.ndarray
  segments: np.ndarray
  last: np.ndarray
  next_position: np.ndarray
  vision: VisionInputs | None


@dataclasses.dataclass
class Prefix:
  """Where a completion's row lies: its cache, its row there, and the position of its next token.

  `episode` is the number that its random draws come from.
  """

  cache: Cache
  row: int
  next_position: int
  episode: int


class Sampler:
  """Turns parameters into `Generate`. Samplers of one model share their compiled programs."""

  def __init__(
    self,
    model: Model,
    chat: Chat,
    *,
    max_tokens: int,
    max_rows: int,
    rows_multiple: int = 1,
    dtype=jnp.float32,
  ):
    """Args:
    max_tokens: sampled tokens a turn at most; a turn that reaches it is not `finished`.
    max_rows: rows decoded together at most; more requests are served in several batches.
    rows_multiple: rows and images are padded to multiples of this: the larger, the fewer programs
      are compiled and the more is computed for nothing.
    """
    self.model, self.chat, self.dtype = model, chat, dtype
    self.max_tokens, self.max_rows = max_tokens, max_rows
    self.blocks = own_blocks(model.mesh)
    self.rows_multiple = math.lcm(rows_multiple, self.blocks)
    unused = range(chat.vocab_size, model.config.text.vocab_size)  # Padding rows are no tokens.
    banned = sorted({*chat.banned_ids, *unused})
    self.programs = programs(model, tuple(banned), tuple(sorted(chat.stop_ids)))

  def serve(self, params: Params) -> Params:
    """Parameters, or some of them, in the dtype and on the mesh that `bind` takes; no copies of
    those that are that.

    They move from device to device. Adapters and int8 weights keep their dtypes.
    """
    leaves, tree = jax.tree.flatten(params)
    dtypes = [w.dtype for w in jax.tree.leaves(_these(self.model.shapes(self.dtype), params))]
    places = [x.sharding for x in leaves]
    if self.model.mesh is not None:
      places = jax.tree.leaves(_these(self.model.shardings(), params))
    other = [
      i
      for i, (x, dtype, place) in enumerate(zip(leaves, dtypes, places, strict=True))
      if x.dtype != dtype or not place.is_equivalent_to(x.sharding, x.ndim)
    ]
    if not other:
      return params
    cast = caster(tuple(dtypes[i] for i in other), tuple(places[i] for i in other))
    for i, x in zip(other, cast([leaves[i] for i in other]), strict=True):
      leaves[i] = x
    return jax.tree.unflatten(tree, leaves)

  def carrier(self, mesh: Mesh, params: Params) -> Carrier:
    """`serve` for parameters such as these, all or some, that lie on this mesh of other devices."""
    wanted = _these(self.model.shapes(self.dtype), params)
    cast = lambda params: jax.tree.map(lambda x, w: x.astype(w.dtype), params, wanted)
    return Carrier(_these(self.model.shardings(), params), mesh, cast)

  def bind(
    self,
    params: Params,
    *,
    key: PRNGKeyArray,
    version: int,
    temperature: float = 1.0,
    first: int = 0,
  ) -> Generate:
    """The policy with these parameters. Temperature 0 is greedy.

    Episodes draw from keys of their own, numbered from `first` in the order in which they are first
    asked for: what one samples does not depend on who is sampled beside it, or where. Where there
    are several processes all call the function together, each with its own requests, or none.

    The function keeps the cache of its latest call only: an episode continues cheaply in the next
    call, and is read again from its tokens if it is continued later.
    """
    return _Bound(self, params, key, version, temperature, first)

  def block(
    self, segments: Sequence[Segment], starts: Sequence[int], rows: int, at: Sequence[int]
  ) -> Block:
    """Segments as the model reads them, in rows `at`, each from its own m-RoPE position on."""
    config, size = self.model.config, rows // self.blocks
    longest, shows = agree(
      max((len(s.tokens) for s in segments), default=1), int(any(s.images for s in segments))
    )
    T = round_up(longest, multiple_of=8)
    tokens, sources, flags = (np.full((rows, T), fill, np.int32) for fill in (0, -1, 0))
    positions = np.zeros((rows, 3, T), np.int32)
    last, nexts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    shown: list[list[Patches]] = [[] for _ in range(self.blocks)]
    for b, segment in zip(at, segments, strict=True):
      shown[b // size].extend(segment.images)
    vision, first = self.pack(shown) if shows else (None, [{}] * self.blocks)
    for b, segment, start in zip(at, segments, starts, strict=True):
      t = len(segment.tokens)
      tokens[b, :t], flags[b, :t], last[b] = segment.tokens, 1, t - 1
      sources[b, :t] = image_sources(segment.tokens, segment.images, first[b // size], config)
      positions[b, :, :t], nexts[b] = mrope_positions(
        segment.tokens, segment.images, config, start=start
      )
    return Block(tokens, positions, sources, flags, last, nexts, vision)

  def pack(
    self, shown: Sequence[Sequence[Patches]]
  ) -> tuple[VisionInputs | None, list[dict[str, int]]]:
    """`pack_images` in this sampler's shapes, on its devices."""
    vision, first = pack_images(shown, self.model.config, multiple_of=self.rows_multiple)
    return self.put(vision), first

  def put(self, rows: Any) -> Any:
    """Host arrays of rows on the devices of their blocks."""
    return put_rows(rows, self.model.mesh)

  def seats(self, of: Sequence[int]) -> tuple[int, list[int]]:
    """`packing.seats` in one of few numbers of rows."""
    return seats(of, self.blocks, multiple_of=self.rows_multiple)

  def read(self, params: Params, cache: Cache, block: Block) -> tuple[Float[Array, "B D"], Cache]:
    """Appends a block to the cache; the hidden state at each row's last token."""
    if block.vision is None:
      features = None
    else:
      features = self.programs.encode(params, block.vision)
    inputs = (block.tokens, block.positions, block.sources, block.segments, block.last)
    return self.programs.extend(params, cache, features, *self.put(inputs))


def _these(tree: Params, like: Params) -> Params:
  """What a tree has in the places that another has."""
  pick = lambda at, of: _these(at, of) if isinstance(of, dict) else at
  return {name: pick(tree[name], of) for name, of in like.items()}


class _Bound:
  """`Generate` for one set of parameters."""

  def __init__(
    self, sampler: Sampler, params: Params, key, version: int, temperature: float, first: int
  ):
    self.sampler, self.params, self.key = sampler, params, key
    self.version, self.temperature, self.episodes = version, temperature, first
    self.caches: list[Cache] = []  # Of the latest call; as many, in one order, in all processes.
    self.prefixes: dict[int, tuple[Completion, Prefix]] = {}  # id -> (kept alive, its row)
    self.prompts: dict[int, tuple[Task, Segment]] = {}

  def __call__(self, requests: Sequence[tuple[Task, Turns]], /) -> list[Completion]:
    keys = [_identity(r) if self.temperature == 0 else i for i, r in enumerate(requests)]
    distinct = {key: request for key, request in zip(keys, requests, strict=True)}
    done: dict[Any, Completion] = {}
    old, self.prefixes = self.prefixes, {}
    caches, self.caches = self.caches, []
    for cache, group in self._groups(distinct, old, caches):
      (most,) = agree(len(group))
      for at in range(0, most, self.sampler.max_rows):
        part = group[at : at + self.sampler.max_rows]
        completions = self._turn([distinct[k] for k in part], old, cache)
        done.update(zip(part, completions, strict=True))
    return [done[key] for key in keys]

  def _groups(
    self, requests: dict, old: dict, caches: Sequence[Cache]
  ) -> list[tuple[Cache | None, list]]:
    """Requests that can be served together: new episodes, and those continued from each cache."""
    groups: dict[int, list] = {id(cache): [] for cache in (None, *caches)}
    for key, (_, steps) in requests.items():
      known = old.get(id(steps[-1].completion)) if steps else None
      groups[id(known[1].cache) if known else id(None)].append(key)
    return [(cache, groups[id(cache)]) for cache in (None, *caches)]

  def _turn(
    self, requests: list[tuple[Task, Turns]], old: dict, before: Cache | None
  ) -> list[Completion]:
    segments = [self._segment(task, steps) for task, steps in requests]
    if before is None:
      hidden, cache, starts, at = self._open(requests, segments)
      episodes = list(range(self.episodes, self.episodes + len(requests)))
      self.episodes += len(requests)
    else:
      prefixes = [old[id(steps[-1].completion)][1] for _, steps in requests]
      hidden, cache, starts, at = self._continue(segments, prefixes, before)
      episodes = [prefix.episode for prefix in prefixes]
    active = np.zeros(len(starts), bool)
    draws = np.zeros((len(starts), 2), np.int32)
    active[at], draws[at, 0] = True, episodes
    draws[at, 1] = [len(steps) for _, steps in requests]
    cache, out = self.sampler.programs.decode(
      self.params,
      cache,
      hidden,
      *self.sampler.put((starts, active, draws)),
      self.key,
      jnp.float32(max(self.temperature, 1e-6)),
      max_tokens=self.sampler.max_tokens,
      greedy=self.temperature == 0,
    )
    self.caches.append(cache)
    rows = [
      Prefix(cache, row, int(starts[row]), episode)
      for row, episode in zip(at, episodes, strict=True)
    ]
    return self._completions(segments, jax.tree.map(own_rows, out), rows)

  def _segment(self, task: Task, steps: Turns) -> Segment:
    if steps:
      return self.sampler.chat.result(steps[-1].result)
    if id(task) not in self.prompts:
      self.prompts[id(task)] = (task, self.sampler.chat.prompt(task))
    return self.prompts[id(task)][1]

  def _open(self, requests, segments):
    """Reads whole episodes, each distinct one once, and gathers their rows."""
    sampler = self.sampler
    whole = {
      _identity(request): _joined(request[1], segment)
      for request, segment in zip(requests, segments, strict=True)
    }
    number = {key: i for i, key in enumerate(whole)}
    prompts = [number[_identity(request)] for request in requests]  # Of each request.
    blocks = spread(len(whole), sampler.blocks)
    prompt_rows, prompt_at = sampler.seats(blocks)
    block = sampler.block(list(whole.values()), [0] * len(whole), prompt_rows, prompt_at)
    everywhere = prompt_rows * jax.process_count()
    cache = sampler.programs.empty(everywhere, block.tokens.shape[1], sampler.dtype)
    hidden, cache = sampler.read(self.params, cache, block)
    rows, at = sampler.seats([blocks[p] for p in prompts])
    index, starts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    index[at] = np.array(prompt_at)[prompts] % (prompt_rows // sampler.blocks)
    starts[at] = block.next_position[prompt_at][prompts]
    copies = len(requests) // max(len(whole), 1)
    # Rows of one prompt follow each other, and rows beyond the requests fill up whole prompts.
    alike = np.array_equal(prompts, np.repeat(np.arange(len(whole)), copies))
    known = copies if alike else 1
    copies, fewest = agree(known, -known) if requests else agree(0, -(1 << 30))
    if copies > 1 and copies == -fewest and rows // sampler.blocks % copies == 0:
      capacity = round_up(sampler.max_tokens, multiple_of=16)
      cache = sampler.programs.share(
        cache, sampler.put(index[::copies]), copies=copies, capacity=capacity
      )
    else:
      capacity = round_up(block.tokens.shape[1] + sampler.max_tokens, multiple_of=16)
      cache = sampler.programs.gather(cache, sampler.put(index), capacity=capacity)
    return sampler.programs.rows_of(hidden, sampler.put(index)), cache, starts, at

  def _continue(self, segments, prefixes, cache):
    """Appends each row's new segment to the row its previous turn left."""
    sampler = self.sampler
    size = cache.segments.shape[0] // sampler.model.blocks
    rows, at = sampler.seats([prefix.row // size for prefix in prefixes])
    block = sampler.block(segments, [prefix.next_position for prefix in prefixes], rows, at)
    capacity = round_up(
      int(cache.length) + block.tokens.shape[1] + sampler.max_tokens, multiple_of=16
    )
    index = np.zeros(rows, np.int32)
    index[at] = [prefix.row % size for prefix in prefixes]
    cache = sampler.programs.gather(cache, sampler.put(index), capacity=capacity)
    hidden, cache = sampler.read(self.params, cache, block)
    return hidden, cache, block.next_position, at

  def _completions(self, segments, out, prefixes) -> list[Completion]:
    """What was sampled in each request's row; `prefixes` end before it."""
    tokens, logps, entropies, lengths, finished = out
    completions = []
    for segment, prefix in zip(segments, prefixes, strict=True):
      row = prefix.row
      n = int(lengths[row])
      sampled = tokens[row, :n].astype(np.int32)
      completion = Completion(
        context=segment,
        tokens=sampled,
        logps=logps[row, :n].astype(np.float32),
        entropies=entropies[row, :n].astype(np.float32),
        text=self.sampler.chat.decode(sampled),
        finished=bool(finished[row]),
        policy_version=self.version,
      )
      after = dataclasses.replace(prefix, next_position=prefix.next_position + n)
      self.prefixes[id(completion)] = (completion, after)
      completions.append(completion)
    return completions


def _identity(request: tuple[Task, Turns]) -> tuple[int, ...]:
  task, steps = request
  return (id(task), *(id(step) for step in steps))


def _joined(steps: Turns, segment: Segment) -> Segment:
  """The whole sequence up to and including `segment`."""
  parts = [p for s in steps for p in (s.completion.context.tokens, s.completion.tokens)]
  images = [image for s in steps for image in s.completion.context.images]
  tokens = np.concatenate([*parts, segment.tokens]).astype(np.int32)
  return Segment(tokens=tokens, images=(*images, *segment.images))


@dataclasses.dataclass(frozen=True)
class Policy:
  """A checkpoint directory, ready to play: weights, chat, sampler, and its prompt's tools.

  `images` is None for a text-only model. `settings` are what it was opened with; their `path` is
  the directory that was, where a loader made one too.
  """

  settings: Any
  model: Model
  params: Params
  images: ImageProcessor | None
  chat: Chat
  sampler: Sampler
  tools: Toolbox

  @property
  def sees(self) -> bool:
    """Whether it can be shown images; else it only reads."""
    return self.images is not None


def load_policy(
  c: Any,
  *,
  mesh: Mesh | None = None,
  rollouts: Mesh | None = None,
  adapters: PRNGKeyArray | None = None,
) -> Policy:
  """Opens the directory `c.path`, Hugging Face or Orbax, or what `c.loader` makes.

  Args:
    c: fields path, loader, random_seed, adapter, int8, tools, preset, guidelines, dtype,
      max_tokens, max_rows, rows_multiple, tool_options, workers. A loader
      "package.module:function" is called with `c` and returns objects with `save_pretrained`, as
      the torch project's `load_model` returns (model, tokenizer, processor); it replaces the path.
      `adapter` is a PEFT directory, merged into the weights.
    mesh: Where parameters and rows lie, see sharding.py; None: on the default device.
    rollouts: Where the sampler has them, if not there; parameters come from `Sampler.serve`.
    adapters: For who trains: what learns has `c.master` as its dtype, what `c.freeze` names
      `c.dtype`, and `c.adapter` is not merged. `c.lora` with a rank makes adapters from this key;
      without either the model has none.
  """
  if c.loader:
    c = c.copy_and_resolve_references().unlock()
    c.path = str(_saved(c))
  if c.int8 and (adapters is not None or c.adapter or c.random_seed >= 0):
    raise ValueError(
      "model.int8 only answers, with the weights of model.path: it cannot be trained, take "
      f"model.adapter {c.adapter!r} or model.random_seed {c.random_seed}"
    )
  dtype = jnp.dtype(c.dtype if adapters is None or c.lora.rank or c.lora.ranks else c.master)
  if c.random_seed >= 0:
    model = Model(load_config(c.path), mesh=mesh)
    params = model.init(jax.random.key(c.random_seed), dtype)
  else:
    model, params = load(c.path, dtype=dtype, quantise=c.int8, mesh=mesh)
  if c.adapter:
    model, params = load_adapter(c.adapter, model, params)
  if adapters is not None:
    new = adapted_model(c, model)
    params = params if new is model else new.adapt(params, adapters)
    model = dataclasses.replace(new, remat=c.remat)
    params = trainable.held_in(jnp.dtype(c.dtype), model, params, c.freeze)
  elif model.lora is not None:
    model, params = dataclasses.replace(model, lora=None), lora.merge(params)
  if mesh is not None:
    params = jax.device_put(params, model.shardings())
  return with_tools(c, model, params, c.tools, rollouts=rollouts)


def adapted_model(c: Any, model: Model) -> Model:
  """With adapters where `c.lora` asks for some; ValueError where it has a checkpoint's already."""
  if not c.lora.rank and not c.lora.ranks:
    return model
  if model.lora is not None:
    raise ValueError(
      f"model.adapter {c.adapter!r} goes on as it is, model.lora makes new adapters: "
      "leave model.lora.rank 0 and model.lora.ranks empty, or the adapter"
    )
  ranks = lora.read_ranks(c.lora.ranks) if c.lora.ranks else ()
  settings = lora.LoraConfig(
    rank=c.lora.rank,
    alpha=float(c.lora.alpha),
    dropout=float(c.lora.dropout),
    targets=tuple(c.lora.targets),
    ranks=ranks,
  )
  return dataclasses.replace(model, lora=settings)


def save_policy(workdir: Path, c: Any, model: Model, params: Params) -> None:
  """`workdir`/model, a Hugging Face directory, adapters merged; these alone in `workdir`/adapter.

  Of several processes all take part, and the first writes.

  Args:
    c: field path, the directory that the model was loaded from: `Policy.settings`.
  """
  if model.lora is not None:
    save_adapter(workdir / "adapter", model, params, c.path)
    model, params = dataclasses.replace(model, lora=None), lora.merge(params)
  save(workdir / "model", model, params, source=Path(c.path))


def with_tools(
  c: Any, model: Model, params: Params, tools: Sequence[str], *, rollouts: Mesh | None = None
) -> Policy:
  """The same weights under a prompt that offers `tools`; none: a prompt without tools."""
  # The chat needs the tools' schemas, the tools its frame of coordinates: both read the directory.
  toolbox = Toolbox(
    tuple(tools),
    shown_size=frame_of(c.path),
    shown_frames=clips_of(c.path),
    preset=c.preset,
    unit=family_of(c.path).unit,
    compute=workers.shared(workers.Settings(**c.workers)).compute,
    options=Options(**c.tool_options),
  )
  chat = Chat.from_directory(c.path, tools=toolbox.schemas, guidelines=c.guidelines)
  sampler = Sampler(
    model if rollouts is None else dataclasses.replace(model, mesh=rollouts),
    chat,
    max_tokens=c.max_tokens,
    max_rows=c.max_rows,
    rows_multiple=c.rows_multiple,
    dtype=jnp.dtype(c.dtype),
  )
  return Policy(
    settings=c,
    model=model,
    params=params,
    images=chat.images,
    chat=chat,
    sampler=sampler,
    tools=toolbox,
  )


def on_mesh(policy: Policy, mesh: Mesh) -> Policy:
  """The same policy with its weights and rows on the devices of this mesh."""
  model = dataclasses.replace(policy.model, mesh=mesh)
  params = jax.device_put(policy.params, model.shardings())
  return with_tools(policy.settings, model, params, policy.settings.tools)


def serving(policy: Policy, mesh: Mesh) -> Policy:
  """What a policy that learns plays as on the devices of this mesh: its weights as they are served.

  No copies of weights that learn as they are served, in the same parts of the same devices.
  """
  if policy.sampler.model.mesh == mesh:
    served = policy.sampler.serve(policy.params)
    return dataclasses.replace(policy, model=policy.sampler.model, params=served)
  model = dataclasses.replace(policy.model, mesh=mesh)
  there = with_tools(policy.settings, model, policy.params, policy.settings.tools)
  carry = there.sampler.carrier(policy.model.mesh, policy.params)
  return dataclasses.replace(there, params=carry(policy.params))


def _saved(c: Any) -> Path:
  """A directory with what the loader returned, for as long as this process runs.

  ValueError names a loader that isn't there.
  """
  module, _, name = c.loader.partition(":")
  try:
    load_model = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as e:
    raise ValueError(f"model.loader {c.loader!r} must be 'package.module:function': {e}") from e
  directory = Path(tempfile.mkdtemp(prefix="pixelis-"))
  atexit.register(shutil.rmtree, directory, ignore_errors=True)
  for part in load_model(c):
    part.save_pretrained(directory)
  return directory


def embed(
  policy: Policy,
  tasks: Sequence[Task],
  steps: Sequence[Turns],
  said: Sequence[str] | None = None,
) -> Float32[np.ndarray, "N E"]:
  """Unit keys for the memory, E = 2D: what was looked at last, and what was asked.

  Half of the key is the mean vision feature of the last picture the episode was shown, half the
  mean token embedding of the question, or of `said` in its place; each half is normalised first, so
  both weigh the same. Several processes call it together, each with its own, or none.
  """
  config, params = policy.model.config, policy.params
  shown = []
  for task, turns in zip(tasks, steps, strict=True):
    pictures = [image for turn in turns for image in turn.completion.context.images]
    shown.append((pictures or list(policy.chat.prompt(task).images))[-1:])
  blocks = spread(len(shown), policy.sampler.blocks)
  by_block: list[list[Patches]] = [[] for _ in range(policy.sampler.blocks)]
  for block, images in zip(blocks, shown, strict=True):
    by_block[block].extend(images)
  vision, first = policy.sampler.pack(by_block)
  if vision is not None:
    features = own_rows(policy.sampler.programs.encode(params, vision)).astype(np.float32)
    features = features.reshape(len(by_block), -1, features.shape[-1])
  questions = [task.question for task in tasks]
  asked = [policy.chat.target(text) for text in (questions if said is None else said)]
  # The rows that are asked about only: the whole table of a large model is gigabytes.
  ids = np.concatenate([np.zeros(0, np.int32), *asked])
  (most,) = agree(len(ids))
  padded = np.pad(ids, (0, round_up(most, multiple_of=policy.sampler.blocks) - len(ids)))
  rows = own_rows(policy.sampler.programs.embedded(params, policy.sampler.put(padded)))
  ends = np.cumsum([len(a) for a in asked])
  keys = np.zeros((len(tasks), 2 * config.text.width), np.float32)
  for i, (words, images, block) in enumerate(zip(asked, shown, blocks, strict=True)):
    question = rows[ends[i] - len(words) : ends[i]].astype(np.float32).mean(axis=0)
    seen = np.zeros_like(question)
    if images:
      n = feature_count(images[0], config.vision)
      start = first[block][images[0].key]
      seen = features[block, start : start + n, : len(question)].mean(0)
    keys[i] = _unit(np.concatenate([_unit(seen), _unit(question)]))
  return keys


def _unit(x: np.ndarray) -> np.ndarray:
  norm = float(np.linalg.norm(x))
  return x / norm if norm > 0 else x
