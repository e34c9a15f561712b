"""Adapters in the format of Hugging Face's PEFT, in and out: a config and a safetensors file.

Names are the module paths that transformers 5.24 has in memory, as peft 0.21 writes them:
"base_model.model." + path + ".lora_A.weight" [r, in] and ".lora_B.weight" [out, r]. Layers of other
ranks than the usual one are listed in `rank_pattern`.
"""

import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file

from pixelis_jax.cluster import fetched, first
from pixelis_jax.model import lora
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.model.names import TABLES, canonical
from pixelis_jax.model.policy import Model, Params

flatten, unflatten = nnx.traversals.flatten_mapping, nnx.traversals.unflatten_mapping
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings that are read, and those that do not change what an adapter computes once it is trained.
_READ = "peft_type r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora".split()
_WITHOUT_EFFECT = """
  auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
  inference_mode layers_pattern layers_to_transform loftq_config lora_ga_config megatron_config
  megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type
""".split()
# The one value of the others that we compute; an empty one (null, false, {}) is always fine.
_ONLY = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


@dataclasses.dataclass(frozen=True)
class _Linear:
  """A linear layer as Hugging Face counts them: one of the layers that are stacked at `path`."""

  path: str
  layer: int | None  # None: nothing is stacked.
  inputs: int
  outputs: int

  def of(self, flat: Mapping, leaf: str) -> np.ndarray:
    """This layer's part of an adapter's leaf, a view."""
    whole = flat[(*self.path.split("/"), leaf)]
    return whole if self.layer is None else whole[self.layer]


Modules: TypeAlias = dict[str, _Linear]  # By the path that transformers has in memory.


@dataclasses.dataclass(frozen=True)
class _Pair:
  """An adapter as it is in a file, under the name that its module is `written` by there."""

  a: np.ndarray  # [r, in]
  b: np.ndarray  # [out, r]
  written: str


def save_adapter(
  path: str | os.PathLike, model: Model, params: Params, base_model_name: str
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors (float32) to the directory `path`.

  Raises ValueError if the model has no adapters.
  """
  if model.lora is None:
    raise ValueError(f"the model has no adapters to write to {path}")
  path, modules = Path(path), _modules(model)
  flat = {path: fetched(x) for path, x in flatten(lora.adapters(params)).items()}
  if not first():
    return
  chosen = model.lora.of(_counts(modules))
  ranks, alphas, tensors = {}, {}, {}
  for name, linear in modules.items():
    layer = linear.layer or 0
    if linear.path in chosen and (rank := int(chosen[linear.path][0][layer])):
      ranks[name], alphas[name] = rank, _number(chosen[linear.path][1][layer])
      a = linear.of(flat, "lora_a")[:, :rank].T
      b = linear.of(flat, "lora_b")[:rank].reshape(rank, -1).T
      if linear.path == "visual/patch":  # A convolution whose stride is its size.
        v = model.config.vision
        a = a.reshape(rank, v.channels, v.temporal_patch, v.patch, v.patch)
        b = b.reshape(-1, rank, 1, 1, 1)
      tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a)
      tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b)
  settings = _settings(ranks, alphas, modules) | {
    "base_model_name_or_path": base_model_name,
    "lora_dropout": model.lora.dropout,
  }
  path.mkdir(parents=True, exist_ok=True)
  partial = lambda name: path / f"{name}.partial"
  save_file(tensors, partial(WEIGHTS), metadata={"format": "pt"})
  partial(CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
  for name in (WEIGHTS, CONFIG):
    partial(name).replace(path / name)


def load_adapter(path: str | os.PathLike, model: Model, params: Params) -> tuple[Model, Params]:
  """The model and its parameters with the adapter in the directory `path` beside the kernels.

  Rank-stabilised scales (use_rslora) become alphas. Raises FileNotFoundError for a missing file;
  ValueError for a damaged one, for a setting that we do not compute, naming it, and for tensors
  that this model has no place for.
  """
  path, modules = Path(path), _modules(model)
  settings = _read_settings(path / CONFIG)
  pairs = _pairs(path / WEIGHTS, modules, model.config.family)
  counts = _counts(modules)
  touched = sorted({modules[name].path for name in pairs})
  ranks = {ours: [0] * counts[ours] for ours in touched}
  alphas = {ours: [0.0] * counts[ours] for ours in touched}
  for name, pair in pairs.items():
    rank, said = len(pair.a), _of_pattern(settings["rank_pattern"], pair.written, settings["r"])
    if said != rank:
      raise ValueError(f"{path}: {pair.written} has rank {rank}, {CONFIG} says {said}")
    alpha = _of_pattern(settings["alpha_pattern"], pair.written, settings["lora_alpha"])
    ours, layer = modules[name].path, modules[name].layer or 0
    ranks[ours][layer] = rank
    alphas[ours][layer] = alpha * rank**0.5 if settings["use_rslora"] else alpha
  adapter = LoraConfig(
    rank=0,
    alpha=float(settings["lora_alpha"]),
    dropout=float(settings["lora_dropout"]),
    targets=tuple(touched),
    ranks=tuple((ours, tuple(ranks[ours])) for ours in touched),
    alphas=tuple((ours, tuple(alphas[ours])) for ours in touched),
  )
  adapted = dataclasses.replace(model, lora=adapter)
  return adapted, lora.join(params, _leaves(adapted, pairs, modules))


def _leaves(model: Model, pairs: Mapping[str, _Pair], modules: Modules) -> Params:
  """The adapters of the tree, filled layer by layer; padding stays zero."""
  shapes = flatten(lora.adapters(model.shapes()))
  flat = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
  for ours, (ranks, alphas) in model.lora.of(_counts(modules)).items():
    scale = flat[(*ours.split("/"), "lora_scale")]
    scale[...] = lora.scales(ranks, alphas).reshape(scale.shape)
  for name, pair in pairs.items():
    into_a, into_b = (modules[name].of(flat, leaf) for leaf in lora.TRAINED)
    rank = len(pair.a)
    into_a[:, :rank] = pair.a.T
    into_b[:rank] = pair.b.T.reshape(rank, *into_b.shape[1:])
  return unflatten({path: jnp.asarray(x) for path, x in flat.items()})


def _modules(model: Model) -> Modules:
  """Every linear layer of the model."""
  modules, flat = {}, flatten(model.shapes())
  for row in TABLES[model.config.family]:
    ours = row.path.removesuffix("/kernel")
    if ours == row.path:
      continue
    shape = flat[tuple(row.path.split("/"))].shape
    name = _in_memory(row.name.removesuffix(".weight"), model.config.family)
    stacked = "{}" in name
    inputs, *outputs = shape[1:] if stacked else shape
    for layer in range(shape[0]) if stacked else (None,):
      modules[name.format(layer)] = _Linear(ours, layer, inputs, int(np.prod(outputs)))
  return modules


def _in_memory(name: str, family: str) -> str:
  """transformers keeps Qwen2.5-VL's old names on disk only."""
  if family != "qwen2_5_vl":
    return name
  head, _, rest = name.partition(".")
  return f"model.visual.{rest}" if head == "visual" else f"model.language_model.{rest}"


def _counts(modules: Modules) -> dict[str, int]:
  return dict(Counter(linear.path for linear in modules.values()))


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, Any], modules: Modules) -> dict:
  """What peft needs to build the same adapters."""
  (r, _), *_ = Counter(ranks.values()).most_common(1)
  (alpha, _), *_ = Counter(alphas.values()).most_common(1)
  short = lambda name: name.removeprefix("model.")  # Found with and without a language model head.
  return {
    "alpha_pattern": {short(name): x for name, x in alphas.items() if x != alpha},
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": alpha,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": r,
    "rank_pattern": {short(name): x for name, x in ranks.items() if x != r},
    "target_modules": [short(name) for name in _targets(ranks.keys(), modules)],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
  }


def _targets(chosen: Collection[str], modules: Modules) -> list[str]:
  """Last names such as "q_proj" where they name nothing else (peft matches ends), else paths."""
  parts = [name.split(".") for name in modules]
  everything = {".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)}
  targets = set()
  for last, names in itertools.groupby(sorted(chosen, key=_last), key=_last):
    named = {name for name in everything if _last(name) == last}
    targets |= {last} if named <= set(chosen) else set(names)
  return sorted(targets)


def _last(name: str) -> str:
  return name.rpartition(".")[2]


def _number(x: float) -> int | float:
  return int(x) if x == int(x) else float(x)


def _of_pattern(patterns: Mapping[str, Any], name: str, usual: Any) -> Any:
  """peft's rule: the first pattern that matches the end of the name, from a dot on."""
  matching = (x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
  return next(matching, usual)


def _read_settings(file: Path) -> dict[str, Any]:
  if not file.is_file():
    raise FileNotFoundError(f"{file} is missing: not a PEFT adapter directory?")
  try:
    settings = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  if settings.get("peft_type") != "LORA":
    raise ValueError(f"{file}: peft_type {settings.get('peft_type')!r} must be 'LORA'")
  for field, value in settings.items():
    fine = value in _ONLY[field] if field in _ONLY else not value
    if field not in _READ and field not in _WITHOUT_EFFECT and not fine:
      raise ValueError(f"{file}: {field} {value!r} is not supported")
  if not isinstance(settings.get("r"), int):
    raise ValueError(f"{file}: r {settings.get('r')!r} must be a whole number")
  usual = {"lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
  patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
  return {**usual, **settings, **patterns}


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
  if not file.is_file():
    raise FileNotFoundError(f"{file} is missing: the adapter needs it")
  try:
    return load_file(file)
  except safetensors.SafetensorError as error:
    raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _pairs(file: Path, modules: Modules, family: str) -> dict[str, _Pair]:
  """What the file holds, by module."""
  by_name = {canonical(name, family): name for name in modules}
  sides: dict[str, dict[str, np.ndarray]] = {}
  written: dict[str, str] = {}
  for key, tensor in _read_tensors(file).items():
    match = _TENSOR.fullmatch(key)
    name = by_name.get(canonical(match[1], family)) if match else None
    if name is None:
      raise ValueError(f"{file}: {key} belongs to no linear layer of this {family} model")
    written[name] = match[1]
    sides.setdefault(name, {})[match[2]] = tensor.reshape(len(tensor), -1)  # Of a convolution too.
  if not sides:
    raise ValueError(f"{file} holds no adapter")
  for name, pair in sides.items():
    if len(pair) < 2:
      raise ValueError(f"{file}: {written[name]} has lora_{min(pair)} alone")
    a, b, linear = pair["A"].shape, pair["B"].shape, modules[name]
    if a[1] != linear.inputs or b != (linear.outputs, a[0]):
      raise ValueError(
        f"{file}: {written[name]} has A {list(a)} and B {list(b)}, must be "
        f"[r, {linear.inputs}] and [{linear.outputs}, r]"
      )
  return {name: _Pair(pair["A"], pair["B"], written[name]) for name, pair in sides.items()}
