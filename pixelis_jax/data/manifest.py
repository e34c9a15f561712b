"""What a dataset is to be made of: a JSON file, checked before anything is made.

A manifest of made records is an object with exactly
  name                   of the dataset, as TFDS knows it: lower-case words joined by _
  seed                   a whole number from 0: other seeds are other records
  split                  train, dev or test: where pictures and handwriting come from
  n                      records
  kinds                  {kind: share}; shares are of 1
  sorts                  {sort: share} of every kind: golden, trap, corrected
  hard_negative_weight   how often a trap is sampled in training, where others are once
  pictures               folder of scripts/fetch_pictures.py, or null for none
  model                  directory of the policy in whose coordinates tools are called
  tool_options           what tools work with where there is a choice: fields of tools.Options
One of records that other manifests or datasets have has, beside name, seed, split and n,
  parts                  [{"manifest": FILE or "dataset": FOLDER, "share": ...}, ...]
Paths are relative to where the command runs, as in configs.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixelis_jax.data import built, sources
from pixelis_jax.data.pictures import SPLITS
from pixelis_jax.data.sorts import SORTS
from pixelis_jax.tools import Options
from pixelis_jax.types import value

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_COMMON = ("name", "seed", "split", "n")
_MADE = ("kinds", "sorts", "hard_negative_weight", "pictures", "model", "tool_options")
_FROM = ("manifest", "dataset")
_LIMIT = 100_000_000  # Of records and seeds.
_ROUNDING = 1e-6  # Of shares written as decimals.


@value
class Recipe:
  """Records to be made: `kinds` and `sorts` with their shares, in the order of the file."""

  kinds: Mapping[str, float]
  sorts: Mapping[str, float]
  hard_negative_weight: float
  pictures: Path | None
  model: str
  options: Options


@value
class Part:
  """A share of a fusion: of the records of a folder, or of those another manifest makes."""

  share: float
  dataset: Path | None = None
  manifest: "Manifest | None" = None


@value
class Manifest:
  """A checked manifest: `of` says what its records are. `fields` is all of it as JSON.

  There the manifests that it names stand in their own words, and datasets have the SHA-256 of
  theirs: equal fields are equal datasets.
  """

  name: str
  seed: int
  split: str
  n: int
  of: Recipe | tuple[Part, ...]
  fields: Mapping


def read(path: str | Path) -> Manifest:
  """The manifest in a file.

  Raises:
    FileNotFoundError: there is no such file, or no such dataset.
    ValueError: it is no JSON, with the line; or a key or value is wrong, with what would be right.
  """
  return _read(Path(path), within=())


def _read(path: Path, within: tuple[Path, ...]) -> Manifest:
  if not path.is_file():
    raise FileNotFoundError(f"manifest {path} is not a file")
  try:
    fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice)
  except json.JSONDecodeError as e:
    raise ValueError(f"{path}, line {e.lineno}: {e.msg} at column {e.colno}") from None
  except ValueError as e:  # A key twice, or no UTF-8.
    raise ValueError(f"{path}: {e}") from None
  try:
    return _checked(fields, (*within, path.resolve()))
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from None


def _checked(fields: object, within: tuple[Path, ...]) -> Manifest:
  fused = isinstance(fields, dict) and "parts" in fields
  given = _object("a manifest", fields, (*_COMMON, *(("parts",) if fused else _MADE)))
  name = given["name"]
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ValueError(f"name {name!r} must be lower-case words of letters and digits joined by _")
  n = _whole("n", given["n"], 1)
  split = _one_of("split", given["split"], SPLITS)
  of = _parts(given["parts"], split, within) if fused else _recipe(given)
  if fused:
    parts = zip(given["parts"], of, strict=True)
    given = given | {"parts": [_in_words(words, part) for words, part in parts]}
  return Manifest(
    name=name, seed=_whole("seed", given["seed"], 0), split=split, n=n, of=of, fields=given
  )


def _recipe(given: Mapping) -> Recipe:
  kinds = _shares("kinds", given["kinds"], tuple(sources.KINDS))
  sorts = _shares("sorts", given["sorts"], SORTS)
  weight = _number("hard_negative_weight", given["hard_negative_weight"])
  pictures = given["pictures"]
  if pictures is not None and not isinstance(pictures, str):
    raise ValueError(f"pictures must be a folder or null, not {pictures!r}")
  if pictures is not None and not Path(pictures).is_dir():
    raise ValueError(f"pictures {pictures!r} is no folder; scripts/fetch_pictures.py makes one")
  if not isinstance(given["model"], str) or not (Path(given["model"]) / "config.json").is_file():
    raise ValueError(f"model {given['model']!r} must be a folder with a config.json")
  return Recipe(
    kinds=kinds,
    sorts=sorts,
    hard_negative_weight=weight,
    pictures=None if pictures is None else Path(pictures),
    model=given["model"],
    options=_options(given["tool_options"]),
  )


def _options(given: object) -> Options:
  known = [field.name for field in dataclasses.fields(Options)]
  if not isinstance(given, dict):
    raise ValueError(f"tool_options must be an object of {known}, not {given!r}")
  for name, choice in given.items():
    _one_of("tool_options", name, known)
    if not isinstance(choice, str):
      raise ValueError(f"{name} of tool_options must be a string, not {choice!r}")
  return Options(**given)


def _parts(given: object, split: str, within: tuple[Path, ...]) -> tuple[Part, ...]:
  if not isinstance(given, list) or not given:
    raise ValueError(f"parts must be a list of objects, at least one, not {given!r}")
  parts = tuple(_part(words, within) for words in given)
  _sum_to_one("parts", [part.share for part in parts])
  for part in parts:
    if part.manifest is not None and part.manifest.split != split:
      name = part.manifest.name
      raise ValueError(f"part {name!r} is of split {part.manifest.split!r}, the whole of {split!r}")
  return parts


def _part(words: object, within: tuple[Path, ...]) -> Part:
  source = next((key for key in _FROM if isinstance(words, dict) and key in words), _FROM[0])
  given = _object("a part", words, (source, "share"), also=_FROM)
  share = _number("share", given["share"])
  if not isinstance(given[source], str):
    raise ValueError(f"{source} of a part must be a path, not {given[source]!r}")
  path = Path(given[source])
  if source == "dataset":
    built.read_about(path)
    return Part(share=share, dataset=path)
  if path.resolve() in within:
    raise ValueError(f"part {path} is what it is a part of")
  return Part(share=share, manifest=_read(path, within))


def _in_words(words: Mapping, part: Part) -> Mapping:
  if part.manifest is not None:
    return words | {"manifest": part.manifest.fields}
  return words | {"sha256": built.sha256(part.dataset / built.MANIFEST)}


def _object(what: str, given: object, keys: Sequence[str], also: Sequence[str] = ()) -> dict:
  """With exactly these keys; `also` are known elsewhere, and no reason to guess."""
  if not isinstance(given, dict):
    raise ValueError(f"{what} must be a JSON object, not {type(given).__name__}")
  missing = [key for key in keys if key not in given]
  if unknown := [key for key in given if key not in keys]:
    hints = [_nearest(key, missing or keys) for key in unknown if key not in also]
    known = ", ".join(keys)
    raise ValueError(f"{what} has unknown keys {unknown}{''.join(hints)}; it has {known}")
  if missing:
    raise ValueError(f"{what} lacks {missing}; it has {', '.join(keys)}")
  return given


def _nearest(word: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  return f" (did you mean {near[0]!r}?)" if near else ""


def _one_of(what: str, given: object, known: Sequence[str]) -> str:
  if not isinstance(given, str) or given not in known:
    hint = _nearest(given, known) if isinstance(given, str) else ""
    raise ValueError(f"{what} {given!r}{hint} must be one of {list(known)}")
  return given


def _shares(what: str, given: object, known: Sequence[str]) -> dict[str, float]:
  if not isinstance(given, dict) or not given:
    raise ValueError(f"{what} must be an object of shares, at least one, not {given!r}")
  shares = {_one_of(what, name, known): _number(name, share) for name, share in given.items()}
  _sum_to_one(what, tuple(shares.values()))
  return shares


def _sum_to_one(what: str, shares: Sequence[float]) -> None:
  if abs(sum(shares) - 1) > _ROUNDING:
    raise ValueError(f"shares of {what} sum to {sum(shares):g}, they must sum to 1")


def _number(what: str, given: object) -> float:
  if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < _LIMIT:
    raise ValueError(f"{what} must be a number above 0, not {given!r}")
  return float(given)


def _whole(what: str, given: object, least: int) -> int:
  if isinstance(given, bool) or not isinstance(given, int) or not least <= given < _LIMIT:
    raise ValueError(f"{what} must be a whole number from {least}, not {given!r}")
  return given


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
  given = dict(pairs)
  if len(given) < len(pairs):
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f"keys {twice} are given twice")
  return given
