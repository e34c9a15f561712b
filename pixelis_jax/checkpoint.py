"""Training state on disk, atomically: a step's directory appears whole or not at all (Orbax)."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

from pixelis_jax.cluster import agree, first

PyTree: TypeAlias = Any
FOLDER, BEST = "checkpoints", "best"  # Of a run's directory: its last steps, its best one.
DIGESTS = "digests.json"  # Of a step's: the size and SHA-256 of each file.


class Checkpoints:
  """The last `keep` checkpoints of a directory, one numbered subdirectory a step.

  A process killed while saving leaves the earlier ones usable; what it half wrote is removed on the
  next opening. Orbax reads a damaged array without a word: the digests of all files are kept beside
  them, and a step that does not match is moved to `damaged/` and passed over.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 1,
    background: bool = False,
    read_only: bool = False,
  ):
    """Creates nothing before the first save. `background`: save() does not wait for the disk.

    `read_only`: for who reads beside the process that saves; nothing is removed.
    """
    if keep < 1:
      raise ValueError(f"keep {keep} must be at least 1")
    self.directory = Path(directory).absolute()
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      enable_async_checkpointing=background,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    self._opened: ocp.CheckpointManager | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def save(self, step: int, state: PyTree, extra: Mapping[str, Any]) -> None:
    """Writes the state (arrays, typed PRNG keys) and JSON-able `extra` as one unit.

    Raises ValueError if this step is already there.
    """
    self.wait()
    manager = self._manager()
    if step in manager.all_steps():
      raise ValueError(f"checkpoint {self.directory} already has step {step}")
    raw = jax.tree.map(_to_saved, state)
    extra = json.loads(json.dumps(dict(extra)))  # As it is now: it may be written later.
    manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(raw),
        extra=ocp.args.JsonSave(extra),
        layout=ocp.args.JsonSave({"leaves": _layout(state), "keys": _key_impls(state)}),
      ),
      force=True,
    )
    if not self._options.enable_async_checkpointing:
      self._sign()

  def restore(self, like: PyTree, *, step: int | None = None) -> tuple[PyTree, dict] | None:
    """(state, extra) of a step, by default the latest whole one; None where nothing was ever saved.

    `like` gives structure, shapes, dtypes and shardings: arrays or `jax.ShapeDtypeStruct`. Raises
    ValueError naming every leaf that is missing, unexpected, or of another shape or dtype, or the
    file that is damaged where a step was asked for or none is whole; and FileNotFoundError for a
    step that isn't there.
    """
    if step is None:
      step = self._latest_whole()  # Which reads its files: they are not checked again.
      if step is None:
        return None
    else:
      self._check(step)
    manager = self._holding(step)
    about = manager.restore(
      step, args=ocp.args.Composite(extra=ocp.args.JsonRestore(), layout=ocp.args.JsonRestore())
    )
    _check_layout(f"checkpoint {self.directory} step {step}", about.layout["leaves"], _layout(like))
    abstract = jax.tree.map(_abstract, like)
    raw = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
    impls = about.layout["keys"]
    state = jax.tree_util.tree_map_with_path(
      lambda path, leaf: _from_saved(leaf, impls.get(jax.tree_util.keystr(path))), raw.state
    )
    return state, dict(about.extra)

  def restore_part(self, places: Sequence[tuple[str, ...]], like: PyTree, *, step: int) -> PyTree:
    """One part of a state, a nested dict of arrays as `like`; the rest, moments say, is not read.

    Args:
      places: Paths of field names and keys at which it may be: the first that is there counts.

    Raises FileNotFoundError for a step that isn't there, ValueError as `restore` does.
    """
    self._check(step)
    manager = self._holding(step)
    where = f"checkpoint {self.directory} step {step}"
    about = manager.restore(step, args=ocp.args.Composite(layout=ocp.args.JsonRestore()))
    stored = {_names(path): spec for path, spec in about.layout["leaves"].items()}
    place = next((p for p in places if any(names[: len(p)] == p for names in stored)), None)
    if place is None:
      raise ValueError(f"{where} has none of {['/'.join(p) for p in places]}")
    inside = lambda names: names[: len(place)] == place
    part = {"/".join(names[len(place) :]): spec for names, spec in stored.items() if inside(names)}
    wanted = {"/".join(_names(path)): spec for path, spec in _layout(like).items()}
    _check_layout(f"{where}, {'/'.join(place)}", part, wanted)
    item = jax.tree.map(_abstract, like)
    targets = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), item)
    for name in reversed(place):
      item, targets = {name: item}, {name: targets}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      found = reader.restore(
        self.directory / str(step) / "state",
        args=ocp.args.PyTreeRestore(item=item, restore_args=targets, partial_restore=True),
      )
    for name in place:
      found = found[name]
    return found

  def extra(self, step: int) -> dict:
    """What was saved beside a step's state; FileNotFoundError for a step that isn't there."""
    manager = self._holding(step)
    about = manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
    return dict(about.extra)

  def latest_step(self) -> int | None:
    """The newest complete step, None if there is none."""
    return self._manager().latest_step() if self.directory.is_dir() else None

  def steps(self) -> list[int]:
    """The complete ones, rising."""
    return sorted(self._manager().all_steps()) if self.directory.is_dir() else []

  def wait(self) -> None:
    """Until a background save is complete on disk; raises what it raised."""
    if self._opened is not None:
      self._opened.wait_until_finished()
      self._sign()

  def close(self) -> None:
    """Waits, then releases Orbax's threads."""
    self.wait()
    if self._opened is not None:
      self._opened.close()
      self._opened = None

  def _holding(self, step: int) -> ocp.CheckpointManager:
    """The manager, where it holds this step; FileNotFoundError where it does not."""
    if not self.directory.is_dir() or step not in self._manager().all_steps():
      raise FileNotFoundError(f"checkpoint {self.directory} has no step {step}")
    return self._manager()

  def _check(self, step: int) -> None:
    """ValueError naming the file of this step that is damaged."""
    if problem := self._damage(step):
      raise ValueError(problem)

  def _latest_whole(self) -> int | None:
    """The newest step without damage; newer ones are moved aside, unless this is a reader."""
    problem = None
    while (step := self.latest_step()) is not None:
      problem = self._damage(step)
      if problem is None:
        return step
      if self._options.read_only:
        raise ValueError(problem)
      aside = self.directory.with_name("damaged") / str(step)
      logging.getLogger(__name__).warning("%s; moved to %s, an earlier one serves", problem, aside)
      self.close()
      if first():
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (self.directory / str(step)).rename(aside)
      agree(step)  # Nobody looks before it is gone.
    if problem is not None:
      raise ValueError(f"{problem}; there is no earlier checkpoint")
    return None

  def _damage(self, step: int) -> str | None:
    """What is wrong with a step's files. One killed before they were signed passes unchecked."""
    path = self.directory / str(step)
    if not (path / DIGESTS).is_file():
      return None
    try:
      digests = json.loads((path / DIGESTS).read_text())
    except ValueError:  # No UTF-8, or no JSON.
      return f"checkpoint {path} is damaged: {DIGESTS} is not what was written"
    for name, (size, sha256) in digests.items():
      if not (path / name).is_file():
        return f"checkpoint {path} is damaged: {name} is missing"
      if digest(path / name) != [size, sha256]:
        return f"checkpoint {path} is damaged: {name} is not what was written"
    return None

  def _sign(self) -> None:
    """Writes the digests of the steps that have none yet; all must be complete."""
    if self._options.read_only or not first():
      return
    for step in self._manager().all_steps():
      path = self.directory / str(step)
      if not (path / DIGESTS).exists():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        found = {file.relative_to(path).as_posix(): digest(file) for file in files}
        aside = path / f"{DIGESTS}.tmp"
        aside.write_text(json.dumps(found))
        aside.replace(path / DIGESTS)

  def _manager(self) -> ocp.CheckpointManager:
    if self._opened is None:
      # Orbax logs some 20 lines a save, and warns of what read_only means.
      level = logging.ERROR if self._options.read_only else logging.WARNING
      logging.getLogger("absl").setLevel(level)
      self._opened = ocp.CheckpointManager(self.directory, options=self._options)
    return self._opened


def digest(file: Path) -> list:
  """[bytes, SHA-256] of a file."""
  with file.open("rb") as opened:
    return [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]


def _is_key(leaf) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saved(leaf):
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _from_saved(leaf, impl: str | None):
  return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)


def _abstract(leaf):
  if _is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf)
  if isinstance(leaf, np.ndarray | np.generic):
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _key_impls(tree: PyTree) -> dict[str, str]:
  """Path of each typed PRNG key -> the name of its implementation."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path): str(jax.random.key_impl(leaf))
    for path, leaf in leaves
    if _is_key(leaf)
  }


def _layout(tree: PyTree) -> dict[str, list]:
  """Path of each leaf -> [shape, dtype]."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path): [list(np.shape(leaf)), str(leaf.dtype)] for path, leaf in leaves
  }


def _names(path: str) -> tuple[str, ...]:
  """The names in what `keystr` gives: ".params['text']" -> ("params", "text")."""
  return tuple("".join(found) for found in re.findall(r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]", path))


def _check_layout(where: str, stored: Mapping[str, list], wanted: Mapping[str, list]) -> None:
  problems = [f"{p} is not in the checkpoint" for p in sorted(wanted.keys() - stored.keys())]
  problems += [f"{p} is only in the checkpoint" for p in sorted(stored.keys() - wanted.keys())]
  problems += [
    f"{p} is {stored[p]} in the checkpoint, {wanted[p]} is wanted"
    for p in sorted(wanted.keys() & stored.keys())
    if stored[p] != wanted[p]
  ]
  if problems:
    raise ValueError(f"{where} does not fit: " + "; ".join(problems))
