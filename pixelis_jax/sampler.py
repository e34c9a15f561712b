"""Prefill and decode with a KV cache; `Sampler.bind` gives the policy as one function, `Generate`.

Two things make rollouts cheap. Samples of one prompt share it: the prompt is read once, and where
all prompts have as many samples, its keys are kept once and read by all samples together. And a
later turn continues the row its previous turn left in the cache,
so only the new tokens (a tool's text and picture) are read; rows are found by the identity of the
`Completion` they produced.

All rows of a cache share one slot counter. A row that is shorter or already finished leaves a hole:
a slot with segment 0 that nobody attends to. Positions are explicit, so holes do not move them.
"""

import atexit
import dataclasses
import importlib
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from pixelis_jax.batch import image_sources, pack_images, round_up
from pixelis_jax.chat.family import frame_of
from pixelis_jax.chat.images import ImageProcessor
from pixelis_jax.chat.template import Chat
from pixelis_jax.model import lora
from pixelis_jax.model.layout import VisionInputs, feature_count, mrope_positions
from pixelis_jax.model.load import load_config, save
from pixelis_jax.model.peft import load_adapter, save_adapter
from pixelis_jax.model.policy import Cache, Model
from pixelis_jax.tools import Toolbox
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
  """Where a completion's row lies: its cache, its row there, and the position of its next token."""

  cache: Cache
  row: int
  next_position: int


class Sampler:
  """Turns parameters into `Generate`. Programs are compiled once a shape; `bind`s share them."""

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
    self.rows_multiple = rows_multiple
    banned = np.zeros(model.config.text.vocab_size, bool)
    banned[list(chat.banned_ids)] = True
    banned[chat.vocab_size :] = True  # Padding rows of the embedding are no tokens.
    stop = np.zeros(model.config.text.vocab_size, bool)
    stop[list(chat.stop_ids)] = True
    self.encode = jax.jit(lambda params, vision: model.encode(params, vision))
    self._extend = jax.jit(partial(_extend, model), donate_argnums=(1,))
    self._decode = jax.jit(
      partial(_decode, model, jnp.asarray(banned), jnp.asarray(stop)),
      static_argnames=("max_tokens", "greedy"),
      donate_argnums=(1,),
    )
    self._gather = jax.jit(Cache.gather, static_argnames=("capacity",))
    self._share = jax.jit(Cache.share, static_argnames=("copies", "capacity"))

  def bind(
    self, params: Params, *, key: PRNGKeyArray, version: int, temperature: float = 1.0
  ) -> Generate:
    """The policy with these parameters. Temperature 0 is greedy.

    The function keeps the cache of its latest call only: an episode continues cheaply in the next
    call, and is read again from its tokens if it is continued later.
    """
    return _Bound(self, params, key, version, temperature)

  def block(self, segments: Sequence[Segment], starts: Sequence[int], rows: int) -> Block:
    """Segments as the model reads them, each starting at its own m-RoPE position."""
    config = self.model.config
    T = round_up(max(len(s.tokens) for s in segments), multiple_of=8)
    tokens, sources, flags = (np.full((rows, T), fill, np.int32) for fill in (0, -1, 0))
    positions = np.zeros((rows, 3, T), np.int32)
    last, nexts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    images = tuple(image for s in segments for image in s.images)
    vision, first = self.pack(images) if images else (None, {})
    for b, (segment, start) in enumerate(zip(segments, starts, strict=True)):
      t = len(segment.tokens)
      tokens[b, :t], flags[b, :t], last[b] = segment.tokens, 1, t - 1
      sources[b, :t] = image_sources(segment.tokens, segment.images, first, config)
      positions[b, :, :t], nexts[b] = mrope_positions(
        segment.tokens, segment.images, config, start=start
      )
    return Block(tokens, positions, sources, flags, last, nexts, vision)

  def pack(self, images: Sequence[Patches]) -> tuple[VisionInputs | None, dict[str, int]]:
    """`pack_images` in this sampler's shapes."""
    return pack_images(images, self.model.config, multiple_of=self.rows_multiple)

  def rows(self, n: int) -> int:
    """n rounded up to one of few numbers of rows."""
    return round_up(n, multiple_of=self.rows_multiple)

  def read(self, params: Params, cache: Cache, block: Block) -> tuple[Float[Array, "B D"], Cache]:
    """Appends a block to the cache; the hidden state at each row's last token."""
    if block.vision is None:
      features = jnp.zeros((1, self.model.config.text.width), self.dtype)
    else:
      features = self.encode(params, block.vision)
      features = features.reshape(-1, features.shape[-1])
    inputs = (block.tokens, block.positions, features, block.sources, block.segments, block.last)
    return self._extend(params, cache, *inputs)


class _Bound:
  """`Generate` for one set of parameters."""

  def __init__(self, sampler: Sampler, params: Params, key, version: int, temperature: float):
    self.sampler, self.params, self.key = sampler, params, key
    self.version, self.temperature, self.calls = version, temperature, 0
    self.prefixes: dict[int, tuple[Completion, Prefix]] = {}  # id -> (kept alive, its row)
    self.prompts: dict[int, tuple[Task, Segment]] = {}

  def __call__(self, requests: Sequence[tuple[Task, Turns]], /) -> list[Completion]:
    keys = [_identity(r) if self.temperature == 0 else i for i, r in enumerate(requests)]
    distinct = {key: request for key, request in zip(keys, requests, strict=True)}
    done: dict[Any, Completion] = {}
    old, self.prefixes = self.prefixes, {}
    for group in self._groups(distinct, old):
      for at in range(0, len(group), self.sampler.max_rows):
        part = group[at : at + self.sampler.max_rows]
        done.update(zip(part, self._turn([distinct[k] for k in part], old), strict=True))
    return [done[key] for key in keys]

  def _groups(self, requests: dict, old: dict) -> list[list]:
    """Requests that can be served together: new episodes, and those continued from each cache."""
    groups: dict[int, list] = {}
    for key, (_, steps) in requests.items():
      known = old.get(id(steps[-1].completion)) if steps else None
      groups.setdefault(id(known[1].cache) if known else 0, []).append(key)
    return list(groups.values())

  def _turn(self, requests: list[tuple[Task, Turns]], old: dict) -> list[Completion]:
    segments = [self._segment(task, steps) for task, steps in requests]
    rows = self.sampler.rows(len(requests))
    _, steps = requests[0]
    known = old.get(id(steps[-1].completion)) if steps else None
    if known is None:
      hidden, cache, starts = self._open(requests, segments, rows)
    else:
      hidden, cache, starts = self._continue(requests, segments, old, known[1].cache, rows)
    self.calls += 1
    key = jax.random.fold_in(self.key, self.calls)
    active = jnp.arange(rows) < len(requests)
    cache, out = self.sampler._decode(
      self.params,
      cache,
      hidden,
      starts,
      active,
      key,
      jnp.float32(max(self.temperature, 1e-6)),
      max_tokens=self.sampler.max_tokens,
      greedy=self.temperature == 0,
    )
    return self._completions(segments, jax.device_get(out), np.asarray(starts), cache)

  def _segment(self, task: Task, steps: Turns) -> Segment:
    if steps:
      return self.sampler.chat.result(steps[-1].result)
    if id(task) not in self.prompts:
      self.prompts[id(task)] = (task, self.sampler.chat.prompt(task))
    return self.prompts[id(task)][1]

  def _open(self, requests, segments, rows):
    """Reads whole episodes, each distinct one once, and gathers their rows."""
    whole = {
      _identity(request): _joined(request[1], segment)
      for request, segment in zip(requests, segments, strict=True)
    }
    at = {key: row for row, key in enumerate(whole)}
    distinct = list(whole.values())
    block = self.sampler.block(distinct, [0] * len(whole), self.sampler.rows(len(whole)))
    cache = self.sampler.model.init_cache(
      len(block.tokens), block.tokens.shape[1], self.sampler.dtype
    )
    hidden, cache = self.sampler.read(self.params, cache, block)
    index = np.array([at[_identity(r)] for r in requests] + [0] * (rows - len(requests)), np.int32)
    copies = len(requests) // len(whole)
    # Rows of one prompt follow each other, and rows beyond the requests fill up whole prompts.
    alike = np.repeat(np.arange(len(whole)), copies)
    if copies > 1 and rows % copies == 0 and np.array_equal(index[: len(requests)], alike):
      capacity = round_up(self.sampler.max_tokens, multiple_of=16)
      cache = self.sampler._share(cache, index[::copies], copies=copies, capacity=capacity)
    else:
      capacity = round_up(block.tokens.shape[1] + self.sampler.max_tokens, multiple_of=16)
      cache = self.sampler._gather(cache, index, capacity=capacity)
    return hidden[index], cache, block.next_position[index]

  def _continue(self, requests, segments, old, cache, rows):
    """Appends each row's new segment to the row its previous turn left."""
    known = [old[id(steps[-1].completion)][1] for _, steps in requests]
    block = self.sampler.block(segments, [k.next_position for k in known], rows)
    new = block.tokens.shape[1] + self.sampler.max_tokens
    capacity = round_up(int(cache.length) + new, multiple_of=16)
    index = np.array([k.row for k in known] + [0] * (rows - len(known)), np.int32)
    cache = self.sampler._gather(cache, index, capacity=capacity)
    hidden, cache = self.sampler.read(self.params, cache, block)
    return hidden, cache, block.next_position

  def _completions(self, segments, out, starts, cache) -> list[Completion]:
    tokens, logps, entropies, lengths, finished = out
    completions = []
    for row, segment in enumerate(segments):
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
      self.prefixes[id(completion)] = (completion, Prefix(cache, row, int(starts[row]) + n))
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


def _extend(model, params, cache, tokens, positions, features, sources, segments, last):
  hidden, cache = model.extend(params, cache, tokens, positions, features, sources, segments)
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


def _decode(
  model,
  banned,
  stop,
  params,
  cache,
  hidden,
  starts,
  active,
  key,
  temperature,
  *,
  max_tokens: int,
  greedy: bool,
):
  """Samples until every active row has stopped or `max_tokens` are out.

  Every sampled token is in the cache afterwards, the stop token too.
  """
  B = hidden.shape[0]
  head, apart = model.head(params), model.apart(params)
  nothing = jnp.zeros((1, hidden.shape[-1]), hidden.dtype)
  nowhere = jnp.full((B, 1), -1, jnp.int32)

  def more(carry):
    i, active = carry[0], carry[3]
    return (i < max_tokens) & jnp.any(active)

  def one(carry):
    i, cache, hidden, active, tokens, logps, entropies, lengths = carry
    logits = jnp.einsum("BD,VD->BV", hidden, head, preferred_element_type=jnp.float32)
    allowed = jnp.where(banned[None, :], -jnp.inf, logits)
    if greedy:
      token = jnp.argmax(allowed, axis=-1)
    else:
      token = jax.random.categorical(jax.random.fold_in(key, i), allowed / temperature)
    token = token.astype(jnp.int32)
    log_softmax = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(log_softmax, token[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_softmax) * log_softmax, axis=-1)
    tokens = tokens.at[:, i].set(token)
    logps, entropies = logps.at[:, i].set(taken), entropies.at[:, i].set(entropy)
    lengths = lengths + active.astype(jnp.int32)
    positions = jnp.broadcast_to((starts + i)[:, None, None], (B, 3, 1))
    segments = active.astype(jnp.int32)[:, None]
    hidden, cache = model.extend(
      params, cache, token[:, None], positions, nothing, nowhere, segments, apart
    )
    active = active & ~stop[token]
    return i + 1, cache, hidden[:, 0], active, tokens, logps, entropies, lengths

  flat = jnp.zeros((B, max_tokens), jnp.float32)
  carry = (
    jnp.zeros((), jnp.int32),
    cache,
    hidden,
    active,
    flat.astype(jnp.int32),
    flat,
    flat,
    jnp.zeros(B, jnp.int32),
  )
  _, cache, _, still, tokens, logps, entropies, lengths = jax.lax.while_loop(more, one, carry)
  return cache, (tokens, logps, entropies, lengths, ~still)


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


def load_policy(c: Any, *, adapters: PRNGKeyArray | None = None) -> Policy:
  """Opens the directory `c.path`, Hugging Face or Orbax, or what `c.loader` makes.

  Args:
    c: fields path, loader, random_seed, adapter, int8, tools, preset, guidelines, dtype,
      max_tokens, max_rows, rows_multiple. A loader "package.module:function" is called with `c` and
      returns objects with `save_pretrained`, as the torch project's `load_model` returns (model,
      tokenizer, processor); it replaces the path. `adapter` is a PEFT directory, merged into the
      weights.
    adapters: For who trains adapters: `c.adapter` is not merged, and `c.lora` with a rank makes new
      ones from this key. Without either the model has none.
  """
  if c.loader:
    c = c.copy_and_resolve_references().unlock()
    c.path = str(_saved(c))
  if c.int8 and (adapters is not None or c.adapter or c.random_seed >= 0):
    raise ValueError(
      "model.int8 only answers, with the weights of model.path: it cannot be trained, take "
      f"model.adapter {c.adapter!r} or model.random_seed {c.random_seed}"
    )
  dtype = jnp.dtype(c.dtype)
  if c.random_seed >= 0:
    model = Model(load_config(c.path))
    params = model.init(jax.random.key(c.random_seed), dtype)
  else:
    model, params = load(c.path, dtype=dtype, quantise=c.int8)
  if c.adapter:
    model, params = load_adapter(c.adapter, model, params)
  if adapters is not None:
    model, params = _with_adapters(c, model, params, adapters)
  elif model.lora is not None:
    model, params = dataclasses.replace(model, lora=None), lora.merge(params)
  return with_tools(c, model, params, c.tools)


def _with_adapters(c: Any, model: Model, params: Params, key: PRNGKeyArray) -> tuple[Model, Params]:
  """New adapters where `c.lora` asks for some."""
  if not c.lora.rank and not c.lora.ranks:
    return model, params
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
  model = dataclasses.replace(model, lora=settings)
  return model, model.adapt(params, key)


def save_policy(workdir: Path, c: Any, model: Model, params: Params) -> None:
  """`workdir`/model, a Hugging Face directory, adapters merged; these alone in `workdir`/adapter.

  Args:
    c: field path, the directory that the model was loaded from: `Policy.settings`.
  """
  if model.lora is not None:
    save_adapter(workdir / "adapter", model, params, c.path)
    model, params = dataclasses.replace(model, lora=None), lora.merge(params)
  save(workdir / "model", model, params, source=Path(c.path))


def with_tools(c: Any, model: Model, params: Params, tools: Sequence[str]) -> Policy:
  """The same weights under a prompt that offers `tools`; none: a prompt without tools."""
  # The chat needs the tools' schemas, the tools its frame of coordinates: both read the directory.
  toolbox = Toolbox(tuple(tools), shown_size=frame_of(c.path), preset=c.preset)
  chat = Chat.from_directory(c.path, tools=toolbox.schemas, guidelines=c.guidelines)
  sampler = Sampler(
    model,
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
  policy: Policy, tasks: Sequence[Task], steps: Sequence[Turns]
) -> Float32[np.ndarray, "N E"]:
  """Unit keys for the memory, E = 2D: what was looked at last, and what was asked.

  Half of the key is the mean vision feature of the last picture the episode was shown, half the
  mean token embedding of the question; each half is normalised first, so both weigh the same.
  """
  config, params = policy.model.config, policy.params
  shown = []
  for task, turns in zip(tasks, steps, strict=True):
    pictures = [image for turn in turns for image in turn.completion.context.images]
    shown.append((pictures or list(policy.chat.prompt(task).images))[-1:])
  vision, first = policy.sampler.pack([i for images in shown for i in images])
  if vision is not None:
    features = np.asarray(policy.sampler.encode(params, vision), np.float32)
  asked = [policy.chat.target(task.question) for task in tasks]
  # The rows that are asked about only: the whole table of a large model is gigabytes.
  table = policy.model.embedding(params)
  ids = np.concatenate(asked)
  rows = np.asarray(table[np.pad(ids, (0, round_up(len(ids)) - len(ids)))], np.float32)
  questions = np.split(rows[: len(ids)], np.cumsum([len(a) for a in asked])[:-1])
  keys = []
  for words, images in zip(questions, shown, strict=True):
    question = words.mean(axis=0)
    seen = np.zeros_like(question)
    if images:
      n = feature_count(images[0], config.vision)
      seen = features[first[images[0].key] // features.shape[1], :n, : len(question)].mean(0)
    keys.append(_unit(np.concatenate([_unit(seen), _unit(question)])))
  return np.stack(keys).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
  norm = float(np.linalg.norm(x))
  return x / norm if norm > 0 else x
