"""Hugging Face checkpoint directories, in and out, through one name table."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import DTypeLike
from safetensors.numpy import save_file

from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.qwen2_5_vl import Model, Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Row:
  """One weight: our path, its Hugging Face name ("{}" is the layer), and how the two are laid out.

  "same" is the array as it is; "kernel" is [out, in] there and [in, out] here, any further axes of
  either flattened. Names are those that `save_pretrained` of transformers 5.23 writes.
  """

  path: str
  name: str
  layout: str


def _linear(path: str, name: str, *, bias: bool) -> list[Row]:
  rows = [Row(f"{path}/kernel", f"{name}.weight", "kernel")]
  return rows + [Row(f"{path}/bias", f"{name}.bias", "same")] if bias else rows


def _norm(path: str, name: str) -> list[Row]:
  return [Row(f"{path}/scale", f"{name}.weight", "same")]


_LAYER, _LAYER_HF = "text/layers", "model.layers.{}"
_BLOCK, _BLOCK_HF = "visual/blocks", "visual.blocks.{}"
TABLE: tuple[Row, ...] = (
  Row("text/embedding", "model.embed_tokens.weight", "same"),
  *_norm(f"{_LAYER}/norm1", f"{_LAYER_HF}.input_layernorm"),
  *_linear(f"{_LAYER}/attn/q", f"{_LAYER_HF}.self_attn.q_proj", bias=True),
  *_linear(f"{_LAYER}/attn/k", f"{_LAYER_HF}.self_attn.k_proj", bias=True),
  *_linear(f"{_LAYER}/attn/v", f"{_LAYER_HF}.self_attn.v_proj", bias=True),
  *_linear(f"{_LAYER}/attn/o", f"{_LAYER_HF}.self_attn.o_proj", bias=False),
  *_norm(f"{_LAYER}/norm2", f"{_LAYER_HF}.post_attention_layernorm"),
  *_linear(f"{_LAYER}/mlp/gate", f"{_LAYER_HF}.mlp.gate_proj", bias=False),
  *_linear(f"{_LAYER}/mlp/up", f"{_LAYER_HF}.mlp.up_proj", bias=False),
  *_linear(f"{_LAYER}/mlp/down", f"{_LAYER_HF}.mlp.down_proj", bias=False),
  *_norm("text/norm", "model.norm"),
  Row("head", "lm_head.weight", "same"),
  *_linear("visual/patch", "visual.patch_embed.proj", bias=False),
  *_norm(f"{_BLOCK}/norm1", f"{_BLOCK_HF}.norm1"),
  *_linear(f"{_BLOCK}/attn/qkv", f"{_BLOCK_HF}.attn.qkv", bias=True),
  *_linear(f"{_BLOCK}/attn/proj", f"{_BLOCK_HF}.attn.proj", bias=True),
  *_norm(f"{_BLOCK}/norm2", f"{_BLOCK_HF}.norm2"),
  *_linear(f"{_BLOCK}/mlp/gate", f"{_BLOCK_HF}.mlp.gate_proj", bias=True),
  *_linear(f"{_BLOCK}/mlp/up", f"{_BLOCK_HF}.mlp.up_proj", bias=True),
  *_linear(f"{_BLOCK}/mlp/down", f"{_BLOCK_HF}.mlp.down_proj", bias=True),
  *_norm("visual/merger/norm", "visual.merger.ln_q"),
  *_linear("visual/merger/fc1", "visual.merger.mlp.0", bias=True),
  *_linear("visual/merger/fc2", "visual.merger.mlp.2", bias=True),
)
# The module paths of transformers >= 4.52 in memory, which some exporters write to disk.
_ALIASES = {"model.language_model.": "model.", "model.visual.": "visual."}


def load_config(path: str | os.PathLike) -> ModelConfig:
  """The model described by `path`/config.json; FileNotFoundError or ValueError naming the file."""
  return ModelConfig.from_hf(_json(Path(path) / "config.json"))


def load(path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32) -> tuple[Model, Params]:
  """(model, params) of a Qwen2.5-VL directory: config.json and one or several safetensors files.

  Raises FileNotFoundError for a missing file and ValueError for a damaged one, naming it; and
  ValueError listing every missing, unexpected and misshaped tensor.
  """
  path = Path(path)
  model = Model(load_config(path))
  files = _tensor_files(path)
  if model.config.text.tied:
    files.pop("lm_head.weight", None)  # Some exporters write the copy; transformers ignores it too.
  shapes = _flatten(model.shapes())
  wanted = {name: shape for row in _rows(shapes) for name, shape in _names(row, shapes, model)}
  _check(wanted, {name: entry.shape for name, entry in files.items()}, path)
  flat = {}
  for row in _rows(shapes):
    shape = shapes[row.path].shape
    parts = [_ours(row, files[name].read()) for name, _ in _names(row, shapes, model)]
    array = (np.stack(parts) if "{}" in row.name else parts[0]).reshape(shape)
    flat[row.path] = jnp.asarray(array, dtype)
  return model, _unflatten(flat)


def save(
  path: str | os.PathLike, model: Model, params: Params, *, source: str | os.PathLike
) -> None:
  """Writes a directory that transformers loads: our weights, everything else copied from `source`.

  `dtype` in config.json follows the weights. Weights go to one file, complete or not there at all.
  Raises ValueError if `path` is `source` or params do not have the model's shapes.
  """
  path, source = Path(path), Path(source)
  if path.resolve() == source.resolve():
    raise ValueError(f"path {path} must differ from source {source}")
  shapes, arrays = _flatten(model.shapes()), _flatten(params)
  _check({k: v.shape for k, v in shapes.items()}, {k: v.shape for k, v in arrays.items()}, "params")
  tensors = {}
  for row in _rows(shapes):
    array = np.asarray(arrays[row.path])
    for i, (name, shape) in enumerate(_names(row, shapes, model)):
      tensors[name] = _theirs(row, array[i] if "{}" in row.name else array).reshape(shape)
  path.mkdir(parents=True, exist_ok=True)
  for file in sorted(source.iterdir()):
    if file.is_file() and ".safetensors" not in file.name and file.suffix != ".bin":
      shutil.copyfile(file, path / file.name)
  _write_config(path / "config.json", str(arrays["text/embedding"].dtype))
  partial = path / f"{WEIGHTS}.partial"
  save_file(tensors, partial, metadata={"format": "pt"})
  partial.replace(path / WEIGHTS)


@dataclasses.dataclass(frozen=True)
class _Entry:
  """A tensor in an open file: its shape is known, its bytes are not read yet."""

  file: safetensors.safe_open
  name: str
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    return self.file.get_tensor(self.name)


def _tensor_files(path: Path) -> dict[str, _Entry]:
  """Canonical name -> entry, over all files of the checkpoint."""
  if (path / INDEX).exists():
    weight_map = _json(path / INDEX)["weight_map"]
    names = sorted(set(weight_map.values()))
  else:
    weight_map, names = {}, [WEIGHTS]
  entries, located = {}, {}
  for file_name in names:
    file = _open(path / file_name)
    for key in file.keys():
      located[key] = file_name
      name = _canonical(key)
      if name in entries:
        raise ValueError(f"{path} holds {name} twice ({entries[name].name} and {key})")
      entries[name] = _Entry(file, key, tuple(file.get_slice(key).get_shape()))
  lost = sorted(k for k, file_name in weight_map.items() if located.get(k) != file_name)
  if lost:
    raise ValueError(f"{path / INDEX} lists tensors that their files do not hold: {lost}")
  return entries


def _open(file: Path) -> safetensors.safe_open:
  if not file.exists():
    raise FileNotFoundError(f"{file} is missing: the checkpoint needs it")
  try:
    return safetensors.safe_open(file, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _json(file: Path) -> dict:
  if not file.exists():
    raise FileNotFoundError(f"{file} is missing: not a Hugging Face checkpoint directory?")
  try:
    return json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{file} is not JSON: {error}") from error


def _canonical(name: str) -> str:
  for prefix, short in _ALIASES.items():
    if name.startswith(prefix):
      return short + name.removeprefix(prefix)
  return name


def _rows(shapes: Mapping) -> Iterator[Row]:
  """The table, less what this model does not have (the head of a tied one)."""
  return (row for row in TABLE if row.path in shapes)


def _names(row: Row, shapes: Mapping, model: Model) -> list[tuple[str, tuple[int, ...]]]:
  """(Hugging Face name, shape there) of each layer's part of a weight."""
  shape = shapes[row.path].shape
  stacked = "{}" in row.name
  one = shape[1:] if stacked else shape
  if row.path == "visual/patch/kernel":  # A convolution whose stride is its size.
    v = model.config.vision
    theirs = (v.width, v.channels, v.temporal_patch, v.patch, v.patch)
  elif row.layout == "kernel":
    theirs = (int(np.prod(one[1:])), one[0])
  else:
    theirs = (int(np.prod(one)),) if row.path.endswith("bias") else one
  return [(row.name.format(i), theirs) for i in range(shape[0] if stacked else 1)]


def _ours(row: Row, array: np.ndarray) -> np.ndarray:
  return array.reshape(array.shape[0], -1).T if row.layout == "kernel" else array


def _theirs(row: Row, array: np.ndarray) -> np.ndarray:
  if row.layout == "kernel":
    array = array.reshape(array.shape[0], -1).T
  return np.ascontiguousarray(array)


def _check(wanted: Mapping[str, tuple], found: Mapping[str, tuple], where: Path | str) -> None:
  missing = sorted(wanted.keys() - found.keys())
  unexpected = sorted(found.keys() - wanted.keys())
  wrong = [
    f"{name} is {list(found[name])}, must be {list(wanted[name])}"
    for name in sorted(wanted.keys() & found.keys())
    if tuple(found[name]) != tuple(wanted[name])
  ]
  if missing or unexpected or wrong:
    raise ValueError(
      f"{where} does not fit the model: missing {missing}, unexpected {unexpected}, "
      f"misshaped {wrong}"
    )


def _write_config(file: Path, dtype: str) -> None:
  raw = _json(file)
  raw.pop("torch_dtype", None)
  raw["dtype"] = dtype
  file.write_text(json.dumps(raw, indent=2) + "\n")


def _flatten(tree: Mapping, prefix: str = "") -> dict:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(_flatten(value, f"{prefix}{key}/"))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _unflatten(flat: Mapping) -> dict:
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree
