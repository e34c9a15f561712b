"""Whether a run fits devices that are not here: its programs compiled for them, memory and traffic.

    pixelis plan --config=configs/rft.py:qwen2_5_vl_7b --topology=v5e-64

The programs are those that `rft` runs, of `sft` its update; the compiler is the devices' own: what
exceeds a TPU's memory is refused here as it would be there. Needs the extra `aot` and config.json,
no weights. Nothing is run: no time is measured, and what the chips could do at most is arithmetic.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kernels.chips import GIB, Gpu, Tpu, slice_of
from pixelis_jax import batch, learner, packing, rft, sampler, sft, sharding
from pixelis_jax.data import demos
from pixelis_jax.model import cost
from pixelis_jax.model.decode import programs
from pixelis_jax.model.layers import KEYS
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One compiled program; sizes are bytes on one of its devices.

  `beside` is what else lies on the device while it runs. `flops` are of all devices together,
  `moved` bytes that a device receives, by kind of collective. An `error` is the compiler's.
  """

  name: str
  devices: int
  seconds: float
  beside: int
  arguments: int = 0
  temporary: int = 0
  peak: int = 0
  flops: int = 0
  moved: Mapping[str, int] = dataclasses.field(default_factory=dict)
  error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The programs of a run on a slice, and what lies on each device: name -> bytes."""

  chip: Tpu | Gpu
  devices: int
  held: Mapping[str, int]
  programs: tuple[Program, ...]

  def problems(self) -> list[str]:
    """Why it does not fit; empty where it does."""
    found = []
    for p in self.programs:
      if p.error:
        found.append(f"{p.name} does not compile: {p.error}")
      elif p.peak + p.beside > self.chip.memory:
        need = (p.peak + p.beside) / GIB
        found.append(f"{p.name} needs {need:.2f} of {self.chip.memory / GIB:.0f} GiB on a device")
    return found


def make(c: Any, topology: str, episode: Episode) -> Plan:
  """Compiles what `rft` or `sft` with this config runs on this slice, see `chips.slice_of`.

  Raises ValueError for an unknown slice, a mesh that does not fit it, and FileNotFoundError without
  the model's config.json.
  """
  chip, devices = slice_of(topology)
  held, planned = runs(c, devices, episode)
  programs = tuple(_compile(chip, *run) for run in planned)
  used = {device for _, mesh, *_ in planned for device in mesh.devices.flat}
  return Plan(chip=chip, devices=len(used), held=held, programs=programs)


# Name, mesh, function, arguments, options, beside, flops.
Run = tuple[str, Mesh, Any, tuple, dict, int, int]


def runs(
  c: Any, devices: Sequence[jax.Device], episode: Episode
) -> tuple[dict[str, int], list[Run]]:
  """(bytes that lie on each device, what is run on them), arrays abstract and nothing compiled."""
  plays = "grpo" in c
  mesh, rollouts = rft.meshes(c, devices) if plays else _one_mesh(c, devices)
  model = Model(load_config(c.model.path), mesh=mesh, remat=c.model.remat)
  model = sampler.adapted_model(c.model, model)
  if model.config.vision is None:
    episode = dataclasses.replace(episode, images=0)
  played = dataclasses.replace(model, mesh=rollouts)
  trained, base = _parameters(c, model)
  step, tx, _ = (rft if plays else sft).make_step(c, model)
  state = _state(trained if plays else _with_heads(model, trained), tx, mesh)
  served = _placed(played.shapes(jnp.dtype(c.model.dtype)), played.shardings())
  held = {
    "weights that learn": size(state.params),
    "weights that do not": size(base),
    "optimizer": size(state.opt_state),
    "gradients": size(state.params),
    "weights that play": size(served),
  }
  planned = [_update(c, model, episode, step, state, base)]
  if plays:
    # On devices of their own rollouts have the weights of each step that was asked for already.
    beside = c.staleness * size(served) if c.staleness else size(state) + size(base)
    planned += _rollouts(c, played, episode, served, beside=beside)
  return held, planned


def _one_mesh(c: Any, devices: Sequence[jax.Device]) -> tuple[Mesh, Mesh]:
  mesh = sharding.make_mesh(**c.mesh, devices=devices)
  return mesh, sharding.relaid(mesh, **c.rollout_mesh)


def size(tree: Any) -> int:
  """Bytes of arrays on one device."""
  each = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x)
  return sum(each(x) for x in jax.tree.leaves(tree))


def _itemsize(x: jax.ShapeDtypeStruct) -> int:
  return 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize


def _parameters(c: Any, model: Model) -> tuple[Any, Any]:
  """(what learns, what does not) of an abstract model, where each lies."""
  dtype = c.model.dtype if model.lora is not None else c.model.master
  params = _placed(model.shapes(jnp.dtype(dtype)), model.shardings())
  return learner.parts(model, params, c.model.freeze)


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


def _update(c: Any, model: Model, episode: Episode, step: Any, state: Any, base: Any) -> Run:
  """One update: of `rft` on the episodes of all questions, of `sft` on as many demonstrations."""
  config, mesh, plays = model.config, model.mesh, "grpo" in c
  unit = 1 if config.vision is None else config.vision.merge_unit
  Q = c.grpo.questions if plays else c.batch
  count = Q * c.grpo.group if plays else Q
  tokens = episode.tokens(unit)
  parts = model.blocks * c.accumulate
  multiple = math.lcm(c.rows_multiple if plays else 1, parts)
  placed = packing.place(
    [min(tokens, c.max_row)] * count,
    max_tokens=c.max_row,
    multiple_of=multiple,
    packed=c.packed,
    blocks=parts,
  )
  rows, length = placed.shape
  # A block's questions, and the pictures that its samples' tools showed.
  pictures = -(-Q // parts) + -(-count // parts) * max(episode.images - 1, 0)
  images = packing.round_up(pictures, multiple_of=max(multiple // parts, 1)) * parts
  one, how = _one_row(model, episode, length), {"max_tokens": length, "packed": c.packed}
  if plays:
    packed = batch.pack_grpo([one], np.ones(1), config, **how)
    held = {"vision": packed.inputs.vision}
  else:
    packed = batch.pack_sft([one], config, labels=demos.LABELS, **how)
    held = {"vision": packed.inputs.vision, "sights": packed.sights}
  held = _rows(held, mesh, images)
  text = packed.inputs.replace(vision=None)
  packed = packed.replace(inputs=text) if plays else packed.replace(inputs=text, sights=None)
  packed = _rows(packed, mesh, rows)
  packed = packed.replace(inputs=packed.inputs.replace(vision=held.pop("vision")), **held)
  key, scalar = _whole(jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(0.0))), mesh)
  rest = (base, key, scalar) if plays else ({"policy": base}, key)
  if plays and c.grpo.kl_coef:
    packed = packed.replace(ref_logps=packed.old_logps)
  work = cost.Work(
    tokens=count * tokens,
    pairs=count * tokens * tokens // 2,
    words=count * episode.written,
    **_seen(config, episode, Q + count * max(episode.images - 1, 0)),
  )
  trained = state.params if plays else state.params["policy"]
  flops = cost.update(config, work, **learner.passes(model, trained))
  return "update", mesh, step, (state, packed, *rest), {}, 0, flops


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


def _rollouts(c: Any, model: Model, episode: Episode, params: Any, *, beside: int) -> Iterator[Run]:
  """Reading all questions, and the last turn's tokens; what learns lies on the devices too."""
  config, mesh = model.config, model.mesh
  compiled = programs(model, (), ())  # As a sampler's; which tokens end a turn changes no shape.
  dtype = jnp.dtype(c.model.dtype)
  unit = 1 if config.vision is None else config.vision.merge_unit
  Q, G = c.grpo.questions, c.grpo.group
  multiple = math.lcm(c.model.rows_multiple, model.blocks)
  seats = lambda n: packing.seats(
    packing.spread(n, model.blocks), model.blocks, multiple_of=multiple
  )
  prompts, (rows, _) = seats(Q)[0], seats(min(Q * G, c.model.max_rows))
  prompt = packing.round_up(episode.prompt(unit), multiple_of=8)
  packed = batch.pack_inputs([_one_row(model, episode, prompt)], config, max_tokens=prompt)
  text = _rows((packed.tokens, packed.positions, packed.sources, packed.segments), mesh, prompts)
  last = _rows(np.zeros(1, np.int32), mesh, prompts)
  features = None
  if packed.vision is not None:
    vision = _rows(packed.vision, mesh, prompts)
    looked = cost.Work(**_seen(config, episode, Q))
    yield (
      "look",
      mesh,
      compiled.encode,
      (params, vision),
      {},
      beside,
      cost.forward(config, looked),
    )
    M, width = packed.vision.inverse.shape[1], config.feature_width
    features = jax.ShapeDtypeStruct(
      (prompts, M, width), dtype, sharding=sharding.batch_sharding(mesh)
    )
  cache = partial(_cache, model, dtype)
  asked = cost.Work(tokens=Q * prompt, pairs=Q * prompt**2 // 2)
  arguments = params, cache(prompts, prompt), features, *text, last
  yield "read", mesh, compiled.extend, arguments, {}, beside, cost.forward(config, asked)
  slots = packing.round_up(episode.tokens(unit), multiple_of=16)
  row = lambda shape, kind: _rows(np.zeros((1, *shape), kind), mesh, rows)
  hidden = row((config.text.width,), np.float32)
  hidden = jax.ShapeDtypeStruct(hidden.shape, dtype, sharding=hidden.sharding)
  key, temperature = _whole(jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(1.0))), mesh)
  arguments = params, cache(rows, slots), hidden, row((), np.int32), row((), bool)
  arguments = *arguments, row((2,), np.int32), key, temperature
  written = cost.Work(
    tokens=rows * c.model.max_tokens,
    pairs=rows * c.model.max_tokens * slots,
    words=rows * c.model.max_tokens,
  )
  options = {"max_tokens": c.model.max_tokens, "greedy": False}
  yield "write", mesh, compiled.decode, arguments, options, beside, cost.forward(config, written)


def _cache(model: Model, dtype: Any, rows: int, slots: int) -> Any:
  """An abstract key-value cache, each array where `Cache.constrained` holds it."""
  shapes = jax.eval_shape(
    lambda: dataclasses.replace(model, mesh=None).init_cache(rows, slots, dtype)
  )
  at = lambda *axes: NamedSharding(model.mesh, sharding.spec(axes))
  keys = at(None, *KEYS)
  places = shapes.replace(keys=keys, values=keys, segments=at("batch", None), end=at())
  return _placed(shapes, places)


def _compile(
  chip: Tpu | Gpu,
  name: str,
  mesh: Mesh,
  function: Any,
  arguments: tuple,
  options: dict,
  beside: int,
  flops: int,
) -> Program:
  began = time.monotonic()
  try:
    with jax.set_mesh(mesh):  # Mosaic learns from it which chip it compiles for.
      traced = function.trace(*arguments, **options)
      compiled = traced.lower(lowering_platforms=(chip.platform,)).compile()
  except jax.errors.JaxRuntimeError as e:  # What the compiler refuses is the finding.
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+", str(e))
    reason = found[0] if found else str(e).split("\n")[0]
    seconds = time.monotonic() - began
    about = {"name": name, "devices": mesh.size, "beside": beside, "flops": flops}
    return Program(seconds=seconds, error=reason, **about)
  memory = compiled.memory_analysis()
  return Program(
    name=name,
    devices=mesh.size,
    seconds=time.monotonic() - began,
    beside=beside,
    arguments=memory.argument_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
    flops=flops,
    moved=moved(compiled.as_text(), unknown=options.get("max_tokens", 1)),
  )


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_KIND = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def moved(text: str, *, unknown: int = 1) -> dict[str, int]:
  """Bytes that each device receives in a run of a compiled program, by kind of collective.

  Loops count as often as their condition compares with, others `unknown` times: decoding is one.
  An all-reduce moves its array twice, in and out.
  """
  bodies = dict(_computations(text))
  known: dict[str, dict[str, tuple[str, int]]] = {}

  def inside(name: str) -> dict[str, tuple[str, int]]:
    """Channel -> (kind, bytes): a collective that is cut into steps stands there several times."""
    if name not in known:
      known[name] = {}
      for number, line in enumerate(bodies[name]):
        if found := _received(line):
          channel = re.search(r"channel_id=(\d+)", line)
          known[name][channel[1] if channel else f"{name} {number}"] = found
        for called, times in _calls(line, bodies):
          often = times or unknown
          many = {at: (kind, often * size) for at, (kind, size) in inside(called).items()}
          known[name] = many | known[name]
    return known[name]

  total: Counter = Counter()
  for kind, size in inside(next(name for name in bodies if name.startswith("ENTRY "))).values():
    total[kind] += size
  return dict(total)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  """(name, lines) of each; the entry's name begins with "ENTRY "."""
  name, lines = None, []
  for line in text.splitlines():
    start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if start and not line.startswith(" "):
      name, lines = f"{start[1] or ''}{start[2]}", []
    elif line.startswith("}") and name:
      yield name, lines
      name = None
    else:
      lines.append(line)


def _calls(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
  """(computation, how often) that an operation runs; 0 where nobody knows."""
  if " while(" in line:
    body = re.search(r"body=%?([\w.\-]+)", line)[1]
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    counts = re.findall(r'known_trip_count":\{"n":"(\d+)"', line)
    # A counter from 0 is compared with a constant, or the condition depends on the data.
    counts = counts or re.findall(r"constant\((\d+)\)", "\n".join(bodies[condition]))
    yield body, int(counts[0]) if len(counts) == 1 else 0
    return
  for names in re.findall(r"(?:calls|to_apply|branch_computations)=\{?([%\w.\-, ]+)", line):
    for name in names.split(","):
      if (called := name.strip().lstrip("%")) in bodies:
        yield called, 1


def _received(line: str) -> tuple[str, int] | None:
  """(kind, bytes) of an operation, if it is a collective of several devices."""
  kind = _KIND.search(line)
  if not kind or "=" not in line[: kind.start()]:
    return None
  arrays = re.findall(r"(\w+)\[([\d,]*)\]", line[line.index("=") : kind.start()])
  sizes = [_SIZES.get(t, 4) * math.prod(int(n) for n in s.split(",") if n) for t, s in arrays]
  if kind[2]:  # (operands, results)
    sizes = sizes[len(sizes) // 2 :]
  members = _members(line)
  if members == 1:
    return None
  factor = {"all-reduce": 2, "reduce-scatter": members}.get(kind[1], 1)
  return kind[1], factor * sum(sizes)


def _members(line: str) -> int:
  """How many devices a collective joins, in any of the spellings of its groups; 0: not said."""
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(found[1])
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line):
    axes = dict(axis.split("=") for axis in found[1].split(","))
    return math.prod(int(axes[name]) for name in found[2].split(","))
  return 0


def record(plan: Plan) -> dict[str, Any]:
  """For json."""
  programs = [dataclasses.asdict(p) for p in plan.programs]
  about = {"chip": plan.chip.name, "devices": plan.devices, "memory": plan.chip.memory}
  return {**about, "held": dict(plan.held), "programs": programs, "problems": plan.problems()}


def advice(c: Any, plan: Plan) -> list[str]:
  """What to change where it does not fit, the most telling first."""
  over = [p for p in plan.programs if p.error or p.peak + p.beside > plan.chip.memory]
  if not over:
    return []
  said = []
  learning = sum(plan.held[k] for k in ("weights that learn", "optimizer", "gradients"))
  if learning > plan.chip.memory / 2:
    said.append(
      f"what learns takes {learning / GIB:.1f} GiB a device: raise mesh.fsdp (more devices), set"
      " optimizer.mu_dtype=bfloat16, or train adapters (model.lora.rank)"
    )
  playing = plan.held["weights that play"]
  if "grpo" in c and playing > plan.chip.memory / 2:
    said.append(
      f"what plays takes {playing / GIB:.1f} GiB a device: raise rollout_mesh.tensor (now"
      f" {c.rollout_mesh.tensor}; devices of one process), or rollout_mesh.fsdp (now"
      f" {c.rollout_mesh.fsdp}), whose weights are gathered at each token"
    )
  if update := next((p for p in over if p.name == "update"), None):
    parts = update.devices // c.mesh.tensor * c.accumulate
    count = c.grpo.questions * c.grpo.group if "grpo" in c else c.batch
    if parts < count:
      said.append(
        f"update: raise accumulate (now {c.accumulate}, {count // parts} episodes at a time)"
      )
    else:
      said.append(
        f"update: one episode at a time is too much: raise mesh.tensor (now {c.mesh.tensor})"
      )
  if any(p.name in ("look", "read") for p in over):
    said.append(f"look, read: lower grpo.questions (now {c.grpo.questions})")
  if any(p.name == "write" for p in over):
    said.append(
      f"write: lower model.max_rows (now {c.model.max_rows}), or raise rollout_mesh.tensor"
      f" (now {c.rollout_mesh.tensor})"
    )
  return said


def table(c: Any, plan: Plan) -> str:
  """What lies on a device, what each program takes, and whether it fits."""
  memory = plan.chip.memory
  lines = [f"{plan.devices} devices of {memory / GIB:.0f} GiB; on each, GiB:"]
  lines += [f"  {name:<22} {bytes_ / GIB:8.3f}" for name, bytes_ in plan.held.items()]
  lines.append(
    f"{'program':<8} {'compile':>8} {'arguments':>10} {'temporary':>10} {'peak':>8} {'beside':>8}"
    f" {'TFLOP':>9} {'at least':>9}  moved, GiB"
  )
  for p in plan.programs:
    if p.error:
      lines.append(f"{p.name:<8} {p.seconds:7.1f}s  {p.error}")
      continue
    seconds = p.flops / (p.devices * plan.chip.rate)
    traffic = ", ".join(f"{kind} {n / GIB:.2f}" for kind, n in sorted(p.moved.items())) or "nothing"
    lines.append(
      f"{p.name:<8} {p.seconds:7.1f}s {p.arguments / GIB:10.2f} {p.temporary / GIB:10.2f}"
      f" {p.peak / GIB:8.2f} {p.beside / GIB:8.2f} {p.flops / 1e12:9.1f} {seconds:8.3f}s  {traffic}"
    )
  problems = plan.problems()
  lines += [f"does not fit: {problem}" for problem in problems] or ["fits"]
  lines += [f"  {said}" for said in advice(c, plan)]
  return "\n".join(lines)
