"""What a training run reads, for ever: a file or a dataset, reshuffled each epoch, or made ones."""

from typing import Any

import grain
import numpy as np
from jaxtyping import Float64

from pixelis_jax.data.mixture import Mixture
from pixelis_jax.data.questions import QuestionFile


def training_tasks(c: Any, *, seed: int, sees: bool) -> grain.MapDataset:
  """The tasks of a training run, for ever: a file's, reshuffled each epoch, or those of a mixture.

  Args:
    c: field file, "" for a mixture; of this n, tasks before the first repeats, and kinds.
    sees: Whether the model can be shown images; ValueError where it is to be shown a mixture's.
  """
  if c.file:
    file = QuestionFile.open(c.file, sees=sees)
    return shuffled(file, seed=seed).map(file.__getitem__)
  if not sees:
    raise ValueError("the model only reads: data.file must name a file of questions, not be empty")
  tasks = Mixture(split="train", seed=seed, kinds=tuple(c.kinds), size=c.n)
  return grain.MapDataset.source(tasks).repeat()


def shuffled(file: QuestionFile, *, seed: int) -> grain.MapDataset:
  """The file's indices for ever, in another order each epoch."""
  return grain.MapDataset.range(len(file)).seed(seed).shuffle().repeat()


def weighted(weights: Float64[np.ndarray, " N"], *, seed: int) -> grain.MapDataset:
  """Indices for ever, each as often as its weight says: one of 1.5 three times where 1 is twice.

  Those of one weight come in another order each of their epochs; weights take turns. Raises
  ValueError where all are 0.
  """
  if not weights.any():
    raise ValueError(f"none of the {len(weights)} weights is above 0")
  values = np.unique(weights[weights > 0])
  groups = [np.flatnonzero(weights == value).tolist() for value in values]
  parts = [grain.MapDataset.source(group).seed(seed).shuffle().repeat() for group in groups]
  return grain.MapDataset.mix(parts, weights=[float(weights[group].sum()) for group in groups])
