import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from pixelis_jax.data import examples
from pixelis_jax.data.examples import Record, decode, encode
from pixelis_jax.memory.values import Writer
from pixelis_jax.types import Box, Demo, DemoTurn, Sight
from tests.memory.experiences import experience, plain


def record(**changes) -> Record:
  """Every field filled: images, a video, masks, an error, sights, a turn that isn't supervised."""
  first = experience().trajectories[0]
  task = dataclasses.replace(first.task, answer="7 é")
  sights = ((Sight(3, Box(0.1, 0.2, 1 / 3, 0.4)),), ())
  turns = tuple(
    DemoTurn(
      text=step.completion.text,
      result=step.result,
      supervised=i > 0,
      sights=sights if i == 0 else (),
    )
    for i, step in enumerate(first.steps)
  )
  demo = Demo(task=task, turns=turns, sights=sights)
  return dataclasses.replace(
    Record(demo=demo, sort="corrected", weight=1.2, shown=((56, 84), (80, 80), (28, 28))), **changes
  )


def test_a_record_comes_back_exactly():
  # 1.2 is not a float32: what is sampled by must not be what TFDS is told.
  assert plain(decode(encode(record()))) == plain(record())


def test_equal_records_give_equal_bytes():
  # The order of a proto's map differs from one serialisation to the next unless it is asked for.
  assert len({encode(record()) for _ in range(8)}) == 1


def test_images_are_kept_once_and_told_to_the_writer():
  writer = Writer()
  data = encode(record(), writer)
  # Two images, three different frames and a crop; a picture of a whole frame is one of these.
  assert data.count(b"\x89PNG\r\n") == len(writer.images) == 6


def test_tfds_reads_the_same():
  told = examples.features().deserialize_example_np(encode(record()))
  assert told["kind"] == b"read" and told["answer"].decode() == "7 é"
  assert told["sort"] == b"corrected" and told["weight"] == np.float32(1.2)
  task = record().demo.task
  np.testing.assert_array_equal(told["images"][1], task.images[1])
  assert len(told["images"]) == 6


def test_other_bytes_are_refused():
  with pytest.raises(ValueError, match="5 bytes are no demonstration"):
    decode(b"hello")
  with pytest.raises(ValueError, match="0 bytes are no demonstration"):
    decode(b"")
  data = encode(record())
  old = data.replace(b'{"version":1,', b'{"version":9,')
  with pytest.raises(ValueError, match="version 9, this code reads version 1"):
    decode(old)
  png = io.BytesIO()
  Image.fromarray(record().demo.task.images[0]).save(png, "png", compress_level=1)
  torn = data.replace(png.getvalue(), b"\0" * len(png.getvalue()))
  with pytest.raises(ValueError, match="cannot identify image"):
    decode(torn)


def test_a_demonstration_has_an_answer():
  demo = record().demo
  open_ended = dataclasses.replace(demo, task=dataclasses.replace(demo.task, answer=None))
  with pytest.raises(ValueError, match="task r1 needs an answer"):
    encode(record(demo=open_ended))
