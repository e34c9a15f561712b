"""UCI handwritten digits and their one fixed split.

The 1,797 images are scikit-learn's `load_digits` (the test part of the UCI "Optical Recognition of
Handwritten Digits" set): 8x8, ink 0 to 16. Sorted by (label, index), every fifth image from the
first goes to `stream`, every fifth from the second to `held_out`, the rest to `train`: 360, 360 and
1,077, each class divided 1 : 1 : 3 to one image, with no random number involved.

Another hand is OpenCV's sheet of 5,000 digits, 20x20, 500 a class, which scripts/fetch_pictures.py
fetches. Magnified to fill 8x8, as UCI's do, each of them stands in the place of one UCI image: the
one of its class and its rank in it. So a split has the same labels in the same order by either
hand.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from PIL import Image

from pixelis_jax.types import value

SPLITS = ("train", "stream", "held_out")
INK_MAX = 16
_PERIOD = 5
_REMAINDERS = {"train": (2, 3, 4), "stream": (0,), "held_out": (1,)}
HANDS = ("uci", "opencv")
SHEET = Path("pictures", "opencv-doc", "data", "digits.png")
_CELL, _ACROSS, _EACH = 20, 100, 500  # Pixels of a digit, digits in a line, digits of a class.


@value
class Digits:
  """Images of one split: ink 0 to 16; `indices` are rows of the whole set of 1,797.

  By another hand they are the rows whose places its images took.
  """

  split: str
  images: UInt8[np.ndarray, "N 8 8"]
  labels: Int32[np.ndarray, " N"]
  indices: Int32[np.ndarray, " N"]


@functools.cache
def load(split: str, hand: str = "uci") -> Digits:
  """The split's images in the order (label, index); cached, so its arrays are read-only.

  Raises:
    ValueError: no such split or hand, or the sheet is no sheet of digits.
    FileNotFoundError: the hand is OpenCV's, and its sheet was not fetched.
  """
  if split not in SPLITS or hand not in HANDS:
    raise ValueError(f"split {split!r} must be one of {SPLITS}, hand {hand!r} one of {HANDS}")
  images, labels = _everything()
  order = np.lexsort((np.arange(len(labels)), labels))
  if hand == "opencv":
    images = _in_place(_sheet(SHEET), labels[order], order)
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


def _in_place(
  sheet: UInt8[np.ndarray, "10 M 8 8"],
  labels: Int32[np.ndarray, " N"],
  order: Int64[np.ndarray, " N"],
) -> UInt8[np.ndarray, "N 8 8"]:
  """Of each row of the whole set the sheet's image; `labels` rise, as those of rows `order`."""
  rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
  images = np.empty((len(labels), 8, 8), np.uint8)
  images[order] = sheet[labels, rank]
  return images


@functools.cache  # Each split is a part of it.
def _sheet(path: Path) -> UInt8[np.ndarray, "10 500 8 8"]:
  """By class and place in it, ink 0 to 16."""
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not there: `python scripts/fetch_pictures.py pictures` fetches it"
    )
  with Image.open(path) as opened:
    sheet = np.asarray(opened.convert("L"), np.float32)
  lines = 10 * _EACH // _ACROSS
  if sheet.shape != (lines * _CELL, _ACROSS * _CELL):
    raise ValueError(f"{path} has shape {sheet.shape}: no {lines} lines of {_ACROSS} digits")
  cells = sheet.reshape(lines, _CELL, _ACROSS, _CELL).swapaxes(1, 2).reshape(-1, _CELL, _CELL)
  return np.stack([_filling(cell) for cell in cells]).reshape(10, _EACH, 8, 8)


def _filling(cell: Float32[np.ndarray, "side side"]) -> UInt8[np.ndarray, "8 8"]:
  """The least square around what is half as light as the lightest, by areas."""
  rows, columns = np.nonzero(cell >= cell.max() / 2)
  low = np.array([columns.min(), rows.min()], np.float64)
  high = np.array([columns.max() + 1, rows.max() + 1], np.float64)
  side = (high - low).max()
  left, top = np.clip((low + high - side) / 2, 0, len(cell) - side)
  box = (left, top, left + side, top + side)
  shown = Image.fromarray(cell).resize((8, 8), Image.Resampling.BOX, box=box)
  return np.rint(np.asarray(shown) * (INK_MAX / 255)).astype(np.uint8)
