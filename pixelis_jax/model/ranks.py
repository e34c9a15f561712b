"""LoRA ranks from a fine-tuned model: how many directions each decoder matrix was moved along."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm
from jaxtyping import Float64, Shaped

from pixelis_jax.model.load import DTYPES, Entry, load_config, read_entries
from pixelis_jax.model.names import TABLES

# Our paths of the matrices that get adapters, in each decoder layer.
MODULES = tuple(
  f"text/layers/{module}/kernel"
  for module in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
)
BLOCK = 1024  # Rows or columns of a matrix that are differenced at once.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """`energy` is a share of the squared singular values, `smooth` the weight of the module's mean.

  Raises ValueError for a setting that is out of its range.
  """

  energy: float
  min: int
  max: int
  smooth: float

  def __post_init__(self):
    if not 0 < self.energy <= 1:
      raise ValueError(f"energy {self.energy} must be in (0, 1]")
    if not 1 <= self.min <= self.max:
      raise ValueError(f"min {self.min} and max {self.max} must satisfy 1 <= min <= max")
    if not 0 <= self.smooth <= 1:
      raise ValueError(f"smooth {self.smooth} must be in [0, 1]")


def plan(base: str | os.PathLike, tuned: str | os.PathLike, settings: Settings) -> dict:
  """Ranks for the seven matrices of each decoder layer, from two Hugging Face directories.

  `ranks` and `energy` hold, by our path of a weight, a value a layer: the rank, and the share of
  the delta's squared Frobenius norm that this many singular directions retain (1 where nothing
  changed). `parameters` counts r * (rows + columns) over all matrices, `share` is that against the
  matrices themselves. The host holds two tensors and one square matrix of the smaller side.
  Raises FileNotFoundError or ValueError for a missing or damaged file, for two models that cannot
  be compared (every reason at once), and for a tensor that is not finite.
  """
  base, tuned = Path(base), Path(tuned)
  pairs = _pairs(base, tuned)
  ranks, energies, parameters, weights = {}, {}, 0, 0
  for path, layers in pairs.items():
    bar = tqdm.tqdm(layers, desc=path, unit="layer", disable=None)
    spectra = [_spectrum_of(*pair) for pair in bar]
    shape = layers[0][0].shape
    needed = [needed_rank(squares, settings.energy) for squares in spectra]
    ranks[path] = assign(needed, settings, largest=min(shape))
    energies[path] = [
      retained(squares, rank) for squares, rank in zip(spectra, ranks[path], strict=True)
    ]
    parameters += sum(ranks[path]) * sum(shape)
    weights += len(layers) * math.prod(shape)
  return {
    "ranks": ranks,
    "energy": energies,
    "settings": dataclasses.asdict(settings),
    "base": base.resolve().name,
    "tuned": tuned.resolve().name,
    "parameters": parameters,
    "share": parameters / weights,
  }


def spectrum(
  base: Shaped[np.ndarray, "rows columns"], tuned: Shaped[np.ndarray, "rows columns"]
) -> Float64[np.ndarray, " directions"]:
  """Squared singular values of tuned - base, falling; all zero exactly where nothing changed.

  All min(rows, columns) of them, as eigenvalues of the smaller Gram matrix in float64: errors are
  about 1e-15 of the largest, and their sum is the squared Frobenius norm, so that a share of energy
  is a share of all of it. `base` is taken in the dtype of `tuned`: weights that were only rounded
  to bfloat16 on saving differ from a float32 base in every number, and none of that was learned.
  """
  if base.shape[0] > base.shape[1]:
    base, tuned = base.T, tuned.T
  side, long = base.shape
  gram = np.zeros((side, side))
  for start in range(0, long, BLOCK):
    here = np.s_[:, start : start + BLOCK]
    with np.errstate(over="ignore", invalid="ignore"):  # What is not finite is refused below.
      delta = tuned[here].astype(np.float64) - base[here].astype(tuned.dtype).astype(np.float64)
      gram += delta @ delta.T
  if not np.isfinite(gram).all():
    raise ValueError("its numbers or their changes are not finite")
  if not gram.any():
    return np.zeros(side)
  return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def needed_rank(squares: Float64[np.ndarray, " directions"], energy: float) -> int:
  """The fewest directions whose squares sum to `energy` of all squares; 0 if all are zero."""
  total = squares.sum()
  if total == 0:
    return 0
  reached = np.cumsum(squares) >= energy * total * (1 - 1e-12)  # Two orders of summation differ.
  return int(np.argmax(reached)) + 1


def assign(needed: Sequence[int], settings: Settings, *, largest: int) -> list[int]:
  """Ranks of one module's layers from what each needs; `largest` is the matrix's smaller side.

  In this order: clip to [min, max]; above 16, the power of two nearest in the logarithm (22 -> 16,
  23 -> 32), clipped again; then round(smooth * mean + (1 - smooth) * rank), the mean over the
  module's layers, so that what comes out need not be a power of two. A layer that needs none (0)
  stays at 0 and out of the mean.
  """
  high = min(settings.max, largest)
  low = min(settings.min, high)
  clip = lambda rank: min(max(rank, low), high)
  clipped = [clip(_power_of_two(clip(rank))) for rank in needed if rank > 0]
  mean = sum(clipped) / len(clipped) if clipped else 0.0
  smoothed = iter([round(settings.smooth * mean + (1 - settings.smooth) * r) for r in clipped])
  return [next(smoothed) if rank > 0 else 0 for rank in needed]


def _power_of_two(rank: int) -> int:
  return rank if rank <= 16 else 2 ** round(math.log2(rank))


def retained(squares: Float64[np.ndarray, " directions"], rank: int) -> float:
  """The share of all squares in the `rank` largest; 1 if all are zero."""
  total = squares.sum()
  return 1.0 if total == 0 else min(float(squares[:rank].sum() / total), 1.0)


def table(planned: dict) -> str:
  """A plan to read: a line for each module, then what the adapters come to."""
  lines = [
    f"{'module':<10} {'rank min':>8} {'median':>8} {'max':>8} {'energy min':>11} {'mean':>7}"
  ]
  for path, ranks in planned["ranks"].items():
    energy = planned["energy"][path]
    module = path.removeprefix("text/layers/").removesuffix("/kernel")
    lines.append(
      f"{module:<10} {min(ranks):>8} {np.median(ranks):>8g} {max(ranks):>8}"
      f" {min(energy):>11.4f} {np.mean(energy):>7.4f}"
    )
  every = [rank for ranks in planned["ranks"].values() for rank in ranks]
  lines.append(
    f"{planned['parameters']} adapter parameters, {planned['share']:.2%} of these matrices"
  )
  if unchanged := every.count(0):
    lines.append(f"{unchanged} of {len(every)} matrices did not change: rank 0, no adapter")
  return "\n".join(lines)


def _spectrum_of(base: Entry, tuned: Entry) -> Float64[np.ndarray, " directions"]:
  try:
    return spectrum(base.read(), tuned.read())
  except ValueError as error:
    raise ValueError(f"{tuned.name} of {tuned.file} against {base.file}: {error}") from error


def _pairs(base: Path, tuned: Path) -> dict[str, list[tuple[Entry, Entry]]]:
  """Path of each planned weight -> (base, tuned) a layer; ValueError lists all that forbids it."""
  if base.resolve() == tuned.resolve():
    raise ValueError(f"base and tuned are both {base}: name two directories")
  configs = {path: load_config(path) for path in (base, tuned)}
  if configs[base].family != configs[tuned].family:
    families = [f"{path} is {config.family}" for path, config in configs.items()]
    raise ValueError(f"base and tuned must be of one family: {', '.join(families)}")
  family, layers = configs[base].family, configs[base].text.layers
  problems = []
  if configs[tuned].text.layers != layers:
    problems.append(f"{base} has {layers} layers, {tuned} has {configs[tuned].text.layers}")
  entries = {path: read_entries(path, family) for path in (base, tuned)}
  names = {
    row.path: [row.name.format(layer) for layer in range(layers)]
    for row in TABLES[family]
    if row.path in MODULES
  }
  for name in (name for path in MODULES for name in names[path]):
    problems += _problems(name, {path: of.get(name) for path, of in entries.items()})
  if problems:
    raise ValueError(f"{base} and {tuned} cannot be compared: {'; '.join(problems)}")
  return {
    path: [(entries[base][name], entries[tuned][name]) for name in names[path]] for path in MODULES
  }


def _problems(name: str, found: dict[Path, Entry | None]) -> list[str]:
  """What is wrong with one tensor of the two checkpoints."""
  there = {path: entry for path, entry in found.items() if entry is not None}
  problems = [f"{name} is not in {path}" for path in found.keys() - there.keys()]
  problems += [
    f"{name} in {path} is {entry.dtype}, must be one of {sorted(DTYPES)}"
    for path, entry in there.items()
    if entry.dtype not in DTYPES
  ]
  shapes = {entry.shape for entry in there.values()}
  if len(shapes) > 1:
    told = " and ".join(f"{list(entry.shape)} in {path}" for path, entry in there.items())
    problems.append(f"{name} is {told}")
  elif any(len(shape) != 2 for shape in shapes):
    problems.append(f"{name} is {list(*shapes)}, must be a matrix")
  return problems
