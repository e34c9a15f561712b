"""UCI handwritten digits and their one fixed split.

The 1,797 images are scikit-learn's `load_digits` (the test part of the UCI "Optical Recognition of
Handwritten Digits" set): 8x8, ink 0 to 16. Sorted by (label, index), every fifth image from the
first goes to `stream`, every fifth from the second to `held_out`, the rest to `train`: 360, 360 and
1,077, each class divided 1 : 1 : 3 to one image, with no random number involved.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from pixelis_jax.types import value

SPLITS = ("train", "stream", "held_out")
INK_MAX = 16
_PERIOD = 5
_REMAINDERS = {"train": (2, 3, 4), "stream": (0,), "held_out": (1,)}


@value
class Digits:
  """Images of one split: ink 0 to 16; `indices` are rows of the whole set of 1,797."""

  split: str
  images: UInt8[np.ndarray, "N 8 8"]
  labels: Int32[np.ndarray, " N"]
  indices: Int32[np.ndarray, " N"]


@functools.cache
def load(split: str) -> Digits:
  """The split's images in the order (label, index); cached, so its arrays are read-only."""
  if split not in SPLITS:
    raise ValueError(f"split {split!r} must be one of {SPLITS}")
  images, labels = _everything()
  order = np.lexsort((np.arange(len(labels)), labels))
  rank = np.arange(len(order))
  indices = order[np.isin(rank % _PERIOD, _REMAINDERS[split])].astype(np.int32)
  chosen = Digits(split=split, images=images[indices], labels=labels[indices], indices=indices)
  for array in (chosen.images, chosen.labels, chosen.indices):
    array.setflags(write=False)
  return chosen


@functools.cache
def _everything() -> tuple[np.ndarray, np.ndarray]:
  # What `sklearn.datasets.load_digits` reads, without importing it: 2 seconds of each start.
  [package] = importlib.util.find_spec("sklearn").submodule_search_locations
  path = Path(package, "datasets", "data", "digits.csv.gz")
  rows = np.loadtxt(path, delimiter=",", dtype=np.int32)
  return rows[:, :-1].reshape(-1, 8, 8).astype(np.uint8), rows[:, -1]
