"""A dataset in parts of a hundred records: all is planned first, then each part is made alone.

A part is a function of its plan: whoever makes it, in whatever order, makes the same bytes.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixelis_jax.data import sources
from pixelis_jax.data.built import Dataset, shown_sizes
from pixelis_jax.data.examples import Record, encode
from pixelis_jax.data.lines import line
from pixelis_jax.data.manifest import Manifest, Part, Recipe
from pixelis_jax.memory.values import Writer
from pixelis_jax.tools import Toolbox
from pixelis_jax.tools.sight import Mistake
from pixelis_jax.types import Demo, value

RECORDS = 128  # Of a part, at most.
PARTS = 16  # At least, where there are as many records: so many processes have something to do.
TRIES = 64  # Items that may turn out to have no demonstration, before that is an error.


@value
class Made:
  """A record to be made of item `number`, or where that is of no use each `stride`-th after it."""

  manifest: Manifest
  kind: str
  sort: str
  number: int
  stride: int


@value
class Copied:
  """A record of another dataset."""

  folder: Path
  number: int


@value
class Shard:
  """Encoded records, a line of JSON for each, and the files these name, by relative path.

  `tried` counts items by kind, `reasons` by kind why they had no demonstration.
  """

  records: tuple[bytes, ...]
  lines: tuple[str, ...]
  files: Mapping[str, bytes]
  tried: Mapping[str, int]
  reasons: Mapping[str, Mapping[str, int]]


def plan(manifest: Manifest) -> list[tuple[Made | Copied, ...]]:
  """The records of every part, a function of the manifest alone.

  Raises:
    FileNotFoundError, ValueError: a dataset that is a part is not whole, has too few records or is
      of another split.
  """
  records = _records(manifest, manifest.n)
  count = max(-(-len(records) // RECORDS), min(len(records), PARTS))
  edges = np.linspace(0, len(records), count + 1).round().astype(int).tolist()
  return [tuple(records[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def spread(shares: Mapping, n: int) -> list:
  """Names, each as often as its share of n says, to 1; and so in any stretch of them."""
  names, counts = [], dict.fromkeys(shares, 0)
  for i in range(1, n + 1):
    name = max(shares, key=lambda name: i * shares[name] - counts[name])
    counts[name] += 1
    names.append(name)
  return names


def _records(manifest: Manifest, n: int) -> list[Made | Copied]:
  """In random order."""
  order = _rng(manifest).permutation(n)
  if isinstance(manifest.of, Recipe):
    kinds = sorted(spread(manifest.of.kinds, n))  # Each kind is a stretch that has all sorts.
    cells = [*zip(kinds, spread(manifest.of.sorts, n), strict=True)]
    # An item belongs to one record: no two records of a manifest show the same scene.
    return [
      Made(manifest=manifest, kind=cells[i][0], sort=cells[i][1], number=number, stride=n)
      for number, i in enumerate(order)
    ]
  counts = collections.Counter(spread({i: part.share for i, part in enumerate(manifest.of)}, n))
  records = [
    record for i, part in enumerate(manifest.of) for record in _part(part, manifest, counts[i])
  ]
  return [records[i] for i in order]


def _part(part: Part, whole: Manifest, n: int) -> list[Made | Copied]:
  if part.manifest is not None:
    return _records(part.manifest, n)
  dataset = Dataset.open(part.dataset)
  if (split := dataset.about["manifest"]["split"]) != whole.split:
    raise ValueError(f"{part.dataset} is of split {split!r}, the whole of {whole.split!r}")
  if len(dataset) < n:
    raise ValueError(
      f"{part.dataset} has {len(dataset)} records; a share of {part.share} takes {n}"
    )
  return [
    Copied(folder=part.dataset, number=int(i)) for i in _rng(whole).permutation(len(dataset))[:n]
  ]


def _rng(manifest: Manifest) -> np.random.Generator:
  # The second number keeps these draws apart from those of the sources.
  return np.random.default_rng([manifest.seed, 2])


def make(records: Sequence[Made | Copied]) -> Shard:
  """What the plan says; pure, for `tools.workers`.

  Raises:
    Mistake: of a kind no demonstration came about in `TRIES` tries.
  """
  tried: dict[str, int] = collections.Counter()
  reasons: dict[str, dict[str, int]] = collections.defaultdict(collections.Counter)
  made = [
    _made(record, tried, reasons) if isinstance(record, Made) else _copied(record)
    for record in records
  ]
  files: dict[str, bytes] = {}
  writers = [Writer() for _ in made]  # Pictures are made into PNGs once, for both.
  return Shard(
    records=tuple(map(encode, made, writers)),
    lines=tuple(
      json.dumps(line(record, writer, files), ensure_ascii=False)
      for record, writer in zip(made, writers, strict=True)
    ),
    files=files,
    tried=dict(tried),
    reasons={kind: dict(counts) for kind, counts in reasons.items()},
  )


def _made(record: Made, tried: dict[str, int], reasons: dict[str, dict[str, int]]) -> Record:
  manifest, recipe = record.manifest, record.manifest.of
  toolbox = sources.toolbox_of(recipe.model, recipe.options)
  size = record.stride * TRIES
  source = _source(record.kind, manifest.split, manifest.seed, size, recipe.pictures, toolbox)
  for number in range(record.number, record.stride * TRIES, record.stride):
    demo = source(number, record.sort)
    tried[record.kind] += 1
    if isinstance(demo, Demo):
      weight = recipe.hard_negative_weight if record.sort == sources.TRAP else 1.0
      sizes = shown_sizes(demo.task, toolbox)
      return Record(demo=_timeless(demo), sort=record.sort, weight=weight, shown=sizes)
    reasons[record.kind][demo] += 1
  told = ", ".join(f"{reason} ({n})" for reason, n in reasons[record.kind].items())
  raise Mistake(
    f"none of {TRIES} items of kind {record.kind!r} gave a demonstration of sort {record.sort!r}: "
    f"{told}"
  )


def _copied(record: Copied) -> Record:
  return _dataset(record.folder)[record.number]


_dataset = functools.cache(Dataset.open)


@functools.cache
def _source(
  kind: str, split: str, seed: int, size: int, pictures: Path | None, toolbox: Toolbox
) -> sources.Source:
  return sources.KINDS[kind](split, seed, size, pictures, toolbox)


def _timeless(demo: Demo) -> Demo:
  """How long a tool took is not of the demonstration."""
  still = lambda turn: (
    turn
    if turn.result is None
    else dataclasses.replace(turn, result=dataclasses.replace(turn.result, seconds=0.0))
  )
  return dataclasses.replace(demo, turns=tuple(map(still, demo.turns)))
