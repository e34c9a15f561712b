"""Can a digit be read in the overview, and in the crop? Readers that are told where to look.

PYTHONPATH=. python benchmarks/readability.py --scenes 6000

Trains a logistic regression, a 5-nearest-neighbour reader and a one-layer network on scenes of the
`train` split and tests them on `held_out`:
  overview        the 10x10 patch of the 80x80 overview around the asked plate's centre
  crop            the asked plate resized to 80x80 as a zoom shows it: its middle, halved
  crop, SHIFT     the same under a shift, with the readers of `crop`: how far the shift takes them
  crop, SHIFT *   readers trained under the shift: what is there to be learned
Prints accuracies with n and 95% Wilson intervals. Chance is 10%.
"""

import argparse

import numpy as np
from PIL import Image
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

from pixelis_jax.data import scenes
from pixelis_jax.data.shifts import SHIFTS
from pixelis_jax.data.tasks import TaskSource
from pixelis_jax.metrics import interval
from pixelis_jax.types import Task

SHOWN = 80
PATCH = 10


def overview(task: Task) -> np.ndarray:
  """The asked plate's surroundings as the model first sees them."""
  shown = Image.fromarray(task.images[0]).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
  scale = SHOWN / task.images[0].shape[0]
  x, y = (round(c * scale) - PATCH // 2 for c in task.boxes[0].center)
  return features(shown.crop((x, y, x + PATCH, y + PATCH)))


def crop(task: Task) -> np.ndarray:
  """The middle of the asked plate as a zoom shows it, at half the size to keep readers small."""
  box = task.boxes[0]
  whole = Image.fromarray(task.images[0]).crop((int(box.x0), int(box.y0), int(box.x1), int(box.y1)))
  shown = whole.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)
  middle = shown.crop((SHOWN // 4, SHOWN // 4, SHOWN * 3 // 4, SHOWN * 3 // 4))
  return features(middle.resize((SHOWN // 4, SHOWN // 4), Image.Resampling.BOX))


def features(image: Image.Image) -> np.ndarray:
  """Gray values, scaled to about unit variance."""
  return (np.asarray(image.convert("L"), np.float32).ravel() - 100) / 40


def pictures(split: str, n: int, shift: str = "none") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Overview patches, crops and labels of n scenes."""
  source = TaskSource(split=split, shift=shift, kinds=("framed", "beside"))
  tasks = [source[i] for i in range(n)]
  labels = np.asarray([int(task.answer) for task in tasks])
  return np.stack([overview(t) for t in tasks]), np.stack([crop(t) for t in tasks]), labels


def readers() -> dict[str, ClassifierMixin]:
  """Fresh ones."""
  return {
    "logistic": LogisticRegression(max_iter=2000, C=0.03),
    "5-nn": KNeighborsClassifier(5),
    "network": MLPClassifier((128,), max_iter=200, early_stopping=True, random_state=0),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--scenes", type=int, default=6000, help="to train on; a quarter to test")
  n = parser.parse_args().scenes
  print(f"digit {scenes.DIGIT} px, plate {scenes.PLATE} px, trained on {n} scenes")
  print(f"{'sees':18}{'reader':10}{'accuracy':>9}{'n':>7}   95% interval")
  patches, crops, labels = pictures("train", n)
  test_patches, test_crops, test_labels = pictures("held_out", n // 4)
  for name, reader in readers().items():
    report("overview", name, reader.fit(patches, labels).predict(test_patches), test_labels)
  usual = {name: reader.fit(crops, labels) for name, reader in readers().items()}
  for name, reader in usual.items():
    report("crop", name, reader.predict(test_crops), test_labels)
  for shift in (name for name in SHIFTS if name != "none"):
    _, shifted, _ = pictures("train", n, shift)
    _, test_shifted, _ = pictures("held_out", n // 4, shift)
    for name, reader in usual.items():
      report(f"crop, {shift}", name, reader.predict(test_shifted), test_labels)
    network = readers()["network"].fit(shifted, labels)
    report(f"crop, {shift} *", "network", network.predict(test_shifted), test_labels)


def report(sees: str, reader: str, predicted: np.ndarray, truth: np.ndarray) -> None:
  """One row of the table."""
  hits, count = int((predicted == truth).sum()), len(truth)
  low, high = interval(hits, count)
  print(f"{sees:18}{reader:10}{hits / count:9.3f}{count:7}   [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
  main()
