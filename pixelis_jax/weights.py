"""A model's directory in either form, Hugging Face or Orbax: reading both, and one from the other.

The Orbax form is the Hugging Face directory with `params/` in the place of the safetensors files:
one checkpoint of `checkpoint.Checkpoints`, and `files.json` with the dtype of each weight and the
size and SHA-256 of each file. Orbax itself reads a damaged array without a word.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from pixelis_jax.checkpoint import Checkpoints, digest
from pixelis_jax.model import load as hugging_face
from pixelis_jax.model.load import INDEX, load_config
from pixelis_jax.model.policy import Model, Params

PARAMS, FILES = "params", "files.json"


def is_orbax(path: str | os.PathLike) -> bool:
  """Which form a directory has; ValueError if it has both, or neither."""
  path = Path(path)
  orbax = (path / PARAMS).is_dir()
  safetensors = (path / INDEX).exists() or any(path.glob("*.safetensors"))
  if orbax == safetensors:
    found = "both" if orbax else "neither"
    raise ValueError(f"{path} has {found} of {PARAMS}/ (Orbax) and *.safetensors (Hugging Face)")
  return orbax


def load(
  path: str | os.PathLike,
  *,
  dtype: DTypeLike | None = jnp.float32,
  mesh: Mesh | None = None,
  quantise: bool = False,
) -> tuple[Model, Params]:
  """(model, params) of a directory in either form, as `model.load.load` gives them.

  Only the Hugging Face form can be quantised: ValueError. Of the Orbax form every file is checked
  before any is read: ValueError or FileNotFoundError names the one that is damaged or missing, or
  lists the weights that do not fit config.json.
  """
  path = Path(path)
  if not (path / PARAMS).is_dir():
    return hugging_face.load(path, dtype=dtype, mesh=mesh, quantise=quantise)
  is_orbax(path)
  if quantise:
    raise ValueError(f"{path} is an Orbax directory: int8 is made from the Hugging Face form")
  model = Model(load_config(path), mesh=mesh)
  stored = _checked(path / PARAMS)
  shapes = model.shapes()
  here = jnp.zeros(()).sharding  # Of the default device.
  places = model.shardings() or jax.tree.map(lambda _: here, shapes)
  like = jax.tree_util.tree_map_with_path(
    lambda at, x, place: jax.ShapeDtypeStruct(
      x.shape, stored.get(_name(at), x.dtype), sharding=place
    ),
    shapes,
    places,
  )
  with Checkpoints(path / PARAMS, keep=1) as checkpoints:
    restored = checkpoints.restore(like)
  if restored is None:
    raise FileNotFoundError(f"{path / PARAMS} holds no checkpoint")
  params, _ = restored
  return model, params if dtype is None else jax.tree.map(lambda w: w.astype(dtype), params)


def convert(source: str | os.PathLike, out: str | os.PathLike, *, force: bool = False) -> Params:
  """Writes `out`, the directory `source` in the other form; the weights, which are in host memory.

  Each weight keeps its dtype and its bits; every other file goes along as it is, and every folder
  that is not hidden. What a tied Hugging Face checkpoint holds twice is written once, names are in
  the table's spelling, shards are cut anew. `out` appears whole: until then it is `out`.partial.
  Raises ValueError if `out` holds anything and `force` is not given, or holds anything but a model.
  """
  source, out = Path(source), Path(out)
  orbax = is_orbax(source)
  _check_out(source, out, force)
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    model, params = load(source, dtype=None)
  with _whole(out) as aside:
    if orbax:
      hugging_face.save(aside, model, params, source=source)
      shutil.copyfile(source / "config.json", aside / "config.json")  # It holds for these dtypes.
    else:
      _save_orbax(aside / PARAMS, params)
      hugging_face.copy_files(source, aside)
    for folder in source.iterdir():
      if folder.is_dir() and folder.name != PARAMS and not folder.name.startswith("."):
        shutil.copytree(folder, aside / folder.name)
  return params


def _check_out(source: Path, out: Path, force: bool) -> None:
  whole, start = out.resolve(), source.resolve()
  if whole == start or whole in start.parents or start in whole.parents:
    raise ValueError(f"{out} and {source} must be two directories, neither inside the other")
  if not out.exists():
    return
  if not out.is_dir():
    raise ValueError(f"{out} is there already, and is not a directory")
  if any(out.iterdir()):
    if not force:
      raise ValueError(f"{out} is there already: --force replaces it")
    if not (out / "config.json").exists():
      raise ValueError(f"{out} is no model's directory, which is all that --force replaces")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
  """A new directory beside `out` that takes its name at the end, and is removed after a failure."""
  aside, old = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.replaced")
  shutil.rmtree(aside, ignore_errors=True)  # Of a run that was killed.
  aside.mkdir(parents=True)
  try:
    yield aside
    if out.exists():
      shutil.rmtree(old, ignore_errors=True)
      out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def _save_orbax(path: Path, params: Params) -> None:
  with Checkpoints(path, keep=1) as checkpoints:
    checkpoints.save(0, params, {})
  leaves = jax.tree_util.tree_leaves_with_path(params)
  files = sorted(file for file in path.rglob("*") if file.is_file())
  about = {
    "dtypes": {_name(at): str(leaf.dtype) for at, leaf in leaves},
    "files": {file.relative_to(path).as_posix(): digest(file) for file in files},
  }
  (path / FILES).write_text(json.dumps(about, indent=2) + "\n")


def _checked(path: Path) -> Mapping[str, str]:
  """The dtype of each weight, once every file is known to be what was written."""
  if not (path / FILES).exists():
    raise FileNotFoundError(f"{path / FILES} is missing: not written by pixelis convert?")
  try:
    about = json.loads((path / FILES).read_text())
    dtypes, files = about["dtypes"], about["files"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path / FILES} is damaged: {error!r}") from error
  for name, wanted in files.items():
    if not (path / name).is_file():
      raise FileNotFoundError(f"{path / name} is missing: the checkpoint needs it")
    found = digest(path / name)
    if found != wanted:
      raise ValueError(
        f"{path / name} is damaged: {found[0]} bytes with SHA-256 {found[1][:12]}, must be"
        f" {wanted[0]} with {wanted[1][:12]}"
      )
  return dtypes


def _name(at: tuple) -> str:
  """text/layers/mlp/up/kernel, as in the name table."""
  return jax.tree_util.keystr(at, simple=True, separator="/")
