"""A demonstration <-> one record of a dataset: a `tf.train.Example`, as TFDS has them.

Text fields, the sampling weight and the images are for whoever reads with TFDS; `demo` is JSON that
says where each image and array belongs, and everything comes back from it. No pickle.
"""

import functools
import json
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from pixelis_jax.memory.values import Reader, Writer, box_to_json
from pixelis_jax.types import Box, Demo, DemoTurn, Sight, value

VERSION = 1
_TEXTS = ("id", "kind", "sort", "question", "answer", "demo")
# What parsing bytes, JSON or a PNG that are none can raise.
_BROKEN = (DecodeError, LookupError, TypeError, ValueError, StopIteration, OSError, SyntaxError)


@value
class Record:
  """A demonstration in a dataset: of which sort, and how often it is sampled where others are once.

  `shown` are the (height, width) in which the calls of its turns give places: of each image, then
  of each video.
  """

  demo: Demo
  sort: str
  weight: float
  shown: tuple[tuple[int, int], ...]


def encode(record: Record, writer: Writer | None = None) -> bytes:
  """Everything `decode` gives back; equal records give equal bytes.

  Args:
    writer: a new one, for who wants its images too.

  Raises:
    ValueError: the task has no answer.
  """
  demo, task = record.demo, record.demo.task
  if task.answer is None:
    raise ValueError(f"task {task.id} needs an answer to be a demonstration's")
  writer = Writer() if writer is None else writer
  header = {
    "version": VERSION,
    "weight": record.weight,
    "task": writer.task(task),
    "sights": _sights_to_json(demo.sights),
    "turns": [_turn_to_json(turn, writer) for turn in demo.turns],
    "shown": [list(size) for size in record.shown],
    "tasks": writer.tasks,
    "videos": writer.videos,
  }
  images = set(writer.images.values())
  arrays = {at: blob for at, blob in enumerate(writer.blobs) if at not in images}
  header["arrays"] = [[at, len(blob)] for at, blob in arrays.items()]
  texts = {
    "id": task.id,
    "kind": task.kind,
    "sort": record.sort,
    "question": task.question,
    "answer": task.answer,
    "demo": json.dumps(header, separators=(",", ":"), ensure_ascii=False),
  }
  example = tf_example_pb2.Example()
  feature = example.features.feature
  for name, text in texts.items():
    feature[name].bytes_list.value.append(text.encode())
  feature["weight"].float_list.value.append(record.weight)
  feature["images"].bytes_list.value.extend(writer.blobs[at] for at in sorted(images))
  # One after the other: TFDS reads no list that may be empty.
  feature["arrays"].bytes_list.value.append(b"".join(arrays.values()))
  return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> Record:
  """The record that was encoded, bit for bit. Raises ValueError for anything else."""
  try:
    feature = tf_example_pb2.Example.FromString(data).features.feature
    header = json.loads(_text(feature, "demo"))
    if header["version"] != VERSION:
      raise ValueError(f"version {header['version']}, this code reads version {VERSION}")
    reader = Reader(header, _blobs(feature, header["arrays"]))
    return Record(
      demo=Demo(
        task=reader.tasks[header["task"]],
        turns=tuple(_turn_from_json(turn, reader) for turn in header["turns"]),
        sights=_sights_from_json(header["sights"]),
      ),
      sort=_text(feature, "sort"),
      weight=header["weight"],
      shown=tuple((height, width) for height, width in header["shown"]),
    )
  except _BROKEN as e:
    raise ValueError(f"{len(data)} bytes are no demonstration: {e}") from e


@functools.cache
def features() -> tfds.features.FeaturesDict:
  """The same, as TFDS describes it in a dataset's features.json."""
  return tfds.features.FeaturesDict(
    {name: tfds.features.Text() for name in (*_TEXTS, "arrays")}
    | {
      "weight": tfds.features.Scalar(np.float32),
      "images": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
    }
  )


def _blobs(feature: Mapping, arrays: list) -> list[bytes]:
  """The writer's: images with the arrays, of which (position, length) are given, between them."""
  images, (joined,) = iter(feature["images"].bytes_list.value), feature["arrays"].bytes_list.value
  lengths, start, blobs = dict(map(tuple, arrays)), 0, []
  for at in range(len(feature["images"].bytes_list.value) + len(lengths)):
    if at in lengths:
      blobs.append(joined[start : start + lengths[at]])
      start += lengths[at]
    else:
      blobs.append(next(images))
  return blobs


def _text(feature: Mapping, name: str) -> str:
  (text,) = feature[name].bytes_list.value
  return text.decode()


def _turn_to_json(turn: DemoTurn, writer: Writer) -> dict:
  return {
    "text": turn.text,
    "result": None if turn.result is None else writer.result(turn.result),
    "supervised": turn.supervised,
    "sights": _sights_to_json(turn.sights),
  }


def _turn_from_json(entry: Mapping, reader: Reader) -> DemoTurn:
  return DemoTurn(
    text=entry["text"],
    result=None if entry["result"] is None else reader.result(entry["result"]),
    supervised=entry["supervised"],
    sights=_sights_from_json(entry["sights"]),
  )


def _sights_to_json(sights: tuple[tuple[Sight, ...], ...]) -> list:
  return [[[sight.label, *box_to_json(sight.box)] for sight in image] for image in sights]


def _sights_from_json(entry: list) -> tuple[tuple[Sight, ...], ...]:
  return tuple(tuple(Sight(label, Box(*box)) for label, *box in image) for image in entry)
