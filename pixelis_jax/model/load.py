"""Hugging Face checkpoint directories, in and out, tensor by tensor, through one name table."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Int
from safetensors.numpy import save_file

from pixelis_jax.cluster import fetched, first
from pixelis_jax.model import int8
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.names import TABLES, Row, canonical
from pixelis_jax.model.policy import Model, Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # As Hugging Face shards by default.
# Of a stack of layers. One up to this size is whole on the host before it is placed, and after it
# was fetched; of a larger one the host holds a layer. To write and to read one in place are
# programs, one for each shape: of a small model they take longer to compile than to run all else.
STACK_BYTES = 2**26
_flatten = partial(nnx.traversals.flatten_mapping, sep="/")
_unflatten = partial(nnx.traversals.unflatten_mapping, sep="/")
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}  # As the files say them.


def load_config(path: str | os.PathLike) -> ModelConfig:
  """The model described by `path`/config.json; FileNotFoundError or ValueError naming the file."""
  file = Path(path) / "config.json"
  raw = _json(file)
  try:
    return ModelConfig.from_hf(raw)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def load(
  path: str | os.PathLike,
  *,
  dtype: DTypeLike | None = jnp.float32,
  mesh: Mesh | None = None,
  quantise: bool = False,
) -> tuple[Model, Params]:
  """(model, params) of a directory: config.json and one or several safetensors files.

  `dtype` None keeps each weight's own, bit for bit; ValueError lists the weights that then cannot
  be arrays: layers of several dtypes, or a dtype that is not in `DTYPES`.

  With `quantise` the layers' kernels become int8 as they are read (int8.py), for inference.

  Tensors are read one at a time and go straight to where they are kept: the default device, or the
  mesh's devices by the weights' logical axes. Beside the result the host holds one tensor, and
  the stacks of layers of up to `STACK_BYTES`.
  Raises FileNotFoundError for a missing file and ValueError for a damaged one, naming it; and
  ValueError listing every missing, unexpected and misshaped tensor, before any is read.
  """
  path = Path(path)
  model = Model(load_config(path), int8=quantise, mesh=mesh)
  entries = read_entries(path, model.config.family)
  if model.config.text.tied:
    entries.pop("lm_head.weight", None)  # Some exporters write the copy; transformers ignores it.
  shapes = _flatten(model.shapes(jnp.float32 if dtype is None else dtype))
  parts = {part.name: part for row in _rows(model, shapes) for part in _parts(row, shapes, model)}
  _check(
    {name: part.shape for name, part in parts.items()},
    {name: entry.shape for name, entry in entries.items()},
    path,
  )
  if dtype is None:
    stored = _stored_dtypes(parts, entries, path)
    keep = lambda k, v: v.dtype if v.dtype == jnp.int8 else stored.get(k, v.dtype)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, keep(k, v)) for k, v in shapes.items()}
  kept = _flatten(model.shardings() or {})
  flat: dict[str, Array | np.ndarray] = {}
  by_file = sorted(entries.items(), key=lambda item: str(item[1].file))
  for file, group in itertools.groupby(by_file, key=lambda item: item[1].file):
    opened = _open(file)
    for name, entry in group:
      part = parts[name]
      ours = _ours(part.row, opened.get_tensor(entry.name))
      for weight, array in _weights(part, ours, shapes):
        flat[weight] = _stacked(flat, weight, part.layer, array, shapes[weight], kept)
  return model, _unflatten({weight: _placed(x, kept.get(weight)) for weight, x in flat.items()})


def save(
  path: str | os.PathLike,
  model: Model,
  params: Params,
  *,
  source: str | os.PathLike,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a directory that transformers loads: our weights, everything else copied from `source`.

  `dtype` in config.json follows the weights. Weights that exceed `shard_bytes` go to several files
  and an index. The host holds one file's tensors, and all weights of up to `STACK_BYTES`; all files
  are there, or none is. Of several processes all call this, and the first writes.
  Raises ValueError if `path` is `source`, params do not have the model's shapes or are int8.
  """
  path, source = Path(path), Path(source)
  if model.int8:
    raise ValueError(f"{path}: int8 weights are not saved: the directory they came from holds more")
  if path.resolve() == source.resolve():
    raise ValueError(f"path {path} must differ from source {source}")
  shapes, arrays = _flatten(model.shapes()), _flatten(params)
  _check({k: v.shape for k, v in shapes.items()}, {k: v.shape for k, v in arrays.items()}, "params")
  if first():
    path.mkdir(parents=True, exist_ok=True)
    copy_files(source, path)
    _write_config(path / "config.json", str(arrays["text/embedding"].dtype))
  arrays = {k: _whole(x) if _is_small(x) else x for k, x in arrays.items()}
  parts = [part for row in _rows(model, shapes) for part in _parts(row, shapes, model)]
  shards = _shards(parts, arrays, shard_bytes)
  names = _file_names(len(shards))
  for name, shard in zip(names, shards, strict=True):
    tensors = {part.name: _theirs(part, arrays[part.row.path]) for part in shard}
    if first():
      save_file(tensors, path / f"{name}.partial", metadata={"format": "pt"})
  if first():
    _show(path, dict(zip(names, shards, strict=True)), arrays)


def copy_files(source: Path, path: Path) -> None:
  """Every file of a checkpoint directory but its weights; folders stay behind."""
  for file in sorted(source.iterdir()):
    if file.is_file() and ".safetensors" not in file.name and file.suffix != ".bin":
      shutil.copyfile(file, path / file.name)


@dataclasses.dataclass(frozen=True)
class _Part:
  """One tensor of a checkpoint: its name and shape there, and which layer of the row, -1: all."""

  row: Row
  layer: int
  name: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor in a file, by its name there: shape and dtype ("BF16") are known, its bytes unread."""

  file: Path
  name: str
  shape: tuple[int, ...]
  dtype: str

  def read(self) -> np.ndarray:
    """The tensor as it is in the file."""
    return _open(self.file).get_tensor(self.name)


def read_entries(path: Path, family: str) -> dict[str, Entry]:
  """The table's spelling of a name -> entry, over all files of the checkpoint.

  Raises FileNotFoundError for a missing file and ValueError for a damaged one, naming it.
  """
  if (path / INDEX).exists():
    weight_map = _json(path / INDEX)["weight_map"]
    files = sorted(set(weight_map.values()))
  else:
    weight_map, files = {}, [WEIGHTS]
  entries, located = {}, {}
  for file in files:
    opened = _open(path / file)
    for key in opened.keys():
      located[key] = file
      name = canonical(key, family)
      if name in entries:
        raise ValueError(f"{path} holds {name} twice ({entries[name].name} and {key})")
      about = opened.get_slice(key)
      entries[name] = Entry(path / file, key, tuple(about.get_shape()), about.get_dtype())
  lost = sorted(k for k, file in weight_map.items() if located.get(k) != file)
  if lost:
    raise ValueError(f"{path / INDEX} lists tensors that their files do not hold: {lost}")
  return entries


def _stored_dtypes(
  parts: Mapping[str, _Part], entries: Mapping[str, Entry], path: Path
) -> dict[str, DTypeLike]:
  """Each weight's dtype in the files."""
  found: dict[Row, set[str]] = {}
  for name, part in parts.items():
    found.setdefault(part.row, set()).add(entries[name].dtype)
  wrong = [
    f"{row.name} is {sorted(dtypes)}"
    for row, dtypes in found.items()
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys()
  ]
  if wrong:
    raise ValueError(
      f"{path}: the layers of a weight must share one dtype of {sorted(DTYPES)}, but {wrong}"
    )
  return {row.path: DTYPES[dtype] for row, (dtype,) in found.items()}


def _weights(
  part: _Part, ours: np.ndarray, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, np.ndarray]]:
  """What becomes of a tensor: one array, or where that is kept as int8 two. Paths and arrays."""
  whole = shapes[part.row.path]
  ours = ours.reshape(whole.shape[1:] if part.layer >= 0 else whole.shape)
  if whole.dtype != jnp.int8:
    yield part.row.path, ours.astype(whole.dtype, copy=False)
    return
  quantised, scale = int8.quantise(ours)
  yield part.row.path, quantised
  yield f"{part.row.path}_scale", scale


def _stacked(
  flat: Mapping[str, Array | np.ndarray],
  path: str,
  layer: int,
  ours: np.ndarray,
  whole: jax.ShapeDtypeStruct,
  kept: Mapping[str, NamedSharding],
) -> Array | np.ndarray:
  """The weight, or the stack of layers so far with it written in place; small ones on the host."""
  sharding = kept.get(path)
  if layer < 0:
    return _placed(ours, sharding)
  stack = flat.get(path)
  if _is_small(whole):
    stack = np.empty(whole.shape, whole.dtype) if stack is None else stack
    stack[layer] = ours
    return stack
  if stack is None:
    stack = jnp.zeros(whole.shape, whole.dtype, device=sharding)
  if sharding is not None:
    ours = jax.device_put(ours, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])))
  return _write(stack, ours, np.int32(layer))


def _is_small(stack: Array | np.ndarray | jax.ShapeDtypeStruct) -> bool:
  return stack.size * stack.dtype.itemsize <= STACK_BYTES


def _placed(array: Array | np.ndarray, sharding: NamedSharding | None) -> Array:
  if isinstance(array, jax.Array):
    return array
  return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _write_layer(stack: Array, layer: Array, index: Int[Array, ""]) -> Array:
  # As integers: on CPUs XLA moves bfloat16 through float32, which changes the bits of a NaN.
  bits = jnp.dtype(f"uint{8 * stack.dtype.itemsize}")
  stack_bits, layer_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (stack, layer))
  written = jax.lax.dynamic_update_index_in_dim(stack_bits, layer_bits, index, axis=0)
  return jax.lax.bitcast_convert_type(written, stack.dtype)


_write = jax.jit(_write_layer, donate_argnums=(0,))


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


def _rows(model: Model, shapes: Mapping) -> Iterator[Row]:
  """The family's table, less what this model does not have (the head of a tied one)."""
  return (row for row in TABLES[model.config.family] if row.path in shapes)


def _parts(row: Row, shapes: Mapping, model: Model) -> list[_Part]:
  """Each layer's part of a weight, as Hugging Face names and shapes it."""
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
  layers = range(shape[0]) if stacked else (-1,)
  return [_Part(row, layer, row.name.format(layer), theirs) for layer in layers]


def _ours(row: Row, array: np.ndarray) -> np.ndarray:
  return array.reshape(array.shape[0], -1).T if row.layout == "kernel" else array


def _whole(array: Array | np.ndarray) -> np.ndarray:
  return fetched(array) if isinstance(array, jax.Array) else np.asarray(array)


def _theirs(part: _Part, array: Array | np.ndarray) -> np.ndarray:
  one = _whole(array if part.layer < 0 else array[part.layer])
  if part.row.layout == "kernel":
    one = one.reshape(one.shape[0], -1).T
  return np.ascontiguousarray(one).reshape(part.shape)


def _show(path: Path, shards: Mapping[str, list[_Part]], arrays: Mapping[str, Any]) -> None:
  """Written files get their names, in the place of whatever weights were there."""
  for stale in path.glob("*.safetensors*"):
    if stale.suffix != ".partial":
      stale.unlink()
  for name in shards:
    (path / f"{name}.partial").replace(path / name)
  if len(shards) > 1:
    _write_index(path / INDEX, shards, arrays)


def _shards(parts: list[_Part], arrays: Mapping[str, Any], limit: int) -> list[list[_Part]]:
  """Parts in order, as many in each shard as fit `limit` bytes; a larger one is alone."""
  shards, room = [[]], limit
  for part in parts:
    size = _bytes(part, arrays)
    if shards[-1] and size > room:
      shards.append([])
      room = limit
    shards[-1].append(part)
    room -= size
  return shards


def _bytes(part: _Part, arrays: Mapping[str, Any]) -> int:
  return int(np.prod(part.shape)) * arrays[part.row.path].dtype.itemsize


def _file_names(count: int) -> list[str]:
  if count == 1:
    return [WEIGHTS]
  return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_index(file: Path, shards: Mapping[str, list[_Part]], arrays: Mapping[str, Any]) -> None:
  total = sum(_bytes(part, arrays) for shard in shards.values() for part in shard)
  located = {part.name: name for name, shard in shards.items() for part in shard}
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))}
  partial = file.with_name(f"{file.name}.partial")
  partial.write_text(json.dumps(index, indent=2) + "\n")
  partial.replace(file)


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
