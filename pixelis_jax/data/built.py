"""A built dataset (data/build.py): demonstrations by number, and how often each is to be sampled.

Its folder holds
  manifest.json      what it was to be, what it became, and how: counts, yield, SHA-256 of the files
  *.array_record-*   records, as data/examples.py has them; features.json and dataset_info.json tell
                     TFDS of them
  demos.jsonl        the same for people: a line a record, pictures and films by relative path. It
                     is a file of questions too (data/questions.py)
  report.json        what data/validate.py found
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Float64, Int64

from pixelis_jax.chat.parse import parse_call
from pixelis_jax.data import difficulty
from pixelis_jax.data.examples import Record, decode
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Demo, Task

MANIFEST, LINES, REPORT = "manifest.json", "demos.jsonl", "report.json"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Dataset:
  """Random access to records, in the order of `lines`; pixels are decoded at each access.

  `about` is manifest.json. `weights` say how often a record is sampled where others are once; 0 for
  a trap that is wrong from the beginning, in which there is nothing to imitate. `difficulties` are
  those of data/difficulty.py; None where the dataset was built before it knew them.
  """

  folder: Path
  about: Mapping
  weights: Float64[np.ndarray, " N"]
  difficulties: Float64[np.ndarray, " N"] | None
  source: ArrayRecordDataSource

  @classmethod
  def open(cls, folder: str | Path) -> "Dataset":
    """Reads what is there beside the records.

    Raises:
      FileNotFoundError: the folder holds no dataset, or a file of it is gone.
      ValueError: it is not finished, or a file has another length than when it was built.
    """
    folder = Path(folder)
    about = read_about(folder)
    if "files" not in about:
      raise ValueError(f"{folder} is not finished: the command that builds it goes on")
    for name, file in about["files"].items():
      if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} lacks {name}, which {MANIFEST} lists")
      if (size := (folder / name).stat().st_size) != file["bytes"]:
        raise ValueError(f"{folder / name} has {size} bytes; it was built with {file['bytes']}")
    told = lines(folder)
    rated = all("difficulty" in line for line in told)
    return cls(
      folder=folder,
      about=about,
      weights=np.array([_weight(line) for line in told], np.float64),
      difficulties=np.array([line["difficulty"] for line in told], np.float64) if rated else None,
      source=ArrayRecordDataSource([str(folder / name) for name in records_of(about)]),
    )

  def __len__(self) -> int:
    return len(self.weights)

  def __getitem__(self, index: int) -> Record:
    """Raises ValueError, naming the record, where its bytes are not what was written."""
    index = range(len(self))[index]
    try:
      return decode(self.source[index])
    except (RuntimeError, ValueError) as e:  # RuntimeError: what array_record says.
      raise ValueError(f"{self.folder}, record {index}: {e}") from e

  def levels(self) -> Int64[np.ndarray, " N"]:
    """Of each record, an index in `difficulty.LEVELS`. Raises ValueError where none are known."""
    if self.difficulties is None:
      raise ValueError(
        f"{self.folder} was built before records had a difficulty: build it anew, or a dataset of "
        "which it is a part"
      )
    return difficulty.levels(self.difficulties, self.weights)

  def demo(self, index: int, toolbox: Toolbox) -> Demo:
    """The demonstration of a record, for a policy with this toolbox.

    Raises:
      ValueError: the policy could not have made its calls, as it lacks a tool or is shown images at
        other sizes, in which places would be others; or see `__getitem__`.
    """
    record = self[index]
    where, demo = f"{self.folder}, record {index}", record.demo
    sizes = shown_sizes(demo.task, toolbox)
    if sizes != record.shown:
      raise ValueError(
        f"{where}: its calls are for images seen at {[*record.shown]}, this policy sees them at "
        f"{[*sizes]}: build it with the model that is trained"
      )
    calls = {parse_call(turn.text).name for turn in demo.turns[:-1]}
    if missing := sorted(calls - toolbox.tools.keys()):
      raise ValueError(f"{where}: calls {missing}, model.tools has {[*toolbox.tools]}")
    return demo


def shown_sizes(task: Task, toolbox: Toolbox) -> tuple[tuple[int, int], ...]:
  """(height, width) in which calls give places: of each image, then of each video's frames.

  Raises ValueError where the task has videos, and the toolbox is of a policy that is shown none.
  """
  if task.videos and toolbox.shown_frames is None:
    raise ValueError(f"task {task.id} has {len(task.videos)} videos, and the policy is shown none")
  images = [toolbox.shown_size(*image.shape[:2]) for image in task.images]
  return (*images, *(toolbox.shown_frames(video)[1] for video in task.videos))


def read_about(folder: Path) -> dict:
  """manifest.json of a dataset's folder. Raises FileNotFoundError, or ValueError for another's."""
  path = folder / MANIFEST
  if not path.is_file():
    raise FileNotFoundError(f"{folder} holds no dataset: it has no {MANIFEST}")
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise ValueError(f"{path} is not JSON: {e}") from e
  if not isinstance(about, dict) or "manifest" not in about:
    raise ValueError(f"{path} is not what data/build.py writes")
  return about


def records_of(about: Mapping) -> list[str]:
  """The files of a finished dataset that hold records, in their order."""
  return [name for name, file in about["files"].items() if "records" in file]


def _weight(line: Mapping) -> float:
  return line["weight"] if any(turn["supervised"] for turn in line["turns"]) else 0.0


def lines(folder: Path) -> list[dict]:
  """demos.jsonl, parsed."""
  with (folder / LINES).open(encoding="utf-8") as f:
    return [json.loads(line) for line in f]


def sha256(file: Path) -> str:
  with file.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
