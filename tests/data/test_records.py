"""What is common to all questions in files; `test_requests.py` reads whole files of them."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from pixelis_jax.data import records
from pixelis_jax.tools.sight import Sight
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import Box

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def record(**fields):
  return {"request_id": 7, "question": "What?", "kind": "k", **fields}


def test_a_record_becomes_a_task(tmp_path):
  Image.fromarray(PIXELS).save(tmp_path / "a.png")
  read = records.read(record(image="a.png", other=[1]), sees=True)
  assert (read.id, read.question, read.images, read.kind) == ("7", "What?", ("a.png",), "k")
  assert read.fields["other"] == [1]
  task = read.task(tmp_path, "five")
  assert (task.id, task.question, task.answer, task.kind) == ("7", "What?", "five", "k")
  np.testing.assert_array_equal(task.images[0], PIXELS)
  assert read.task(tmp_path).answer is None


@pytest.mark.parametrize("inline", [False, True])
def test_a_turned_photo_is_upright_for_model_and_tools(tmp_path, inline):
  """Orientation 6: the stored top is the right side. Read as stored, it would lie on its side."""
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
  name = "a.png"
  if inline:
    code = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    name = f"data:image/png;base64,{code}"
  task = records.read(record(image=name), sees=True).task(tmp_path)
  upright = np.rot90(PIXELS, -1)  # 7 high, 5 wide.
  np.testing.assert_array_equal(task.images[0], upright)
  # Tools crop the same pixels: once upright, nothing is turned again.
  sight = Sight(task=task, results=(), shown_size=lambda h, w: (h, w), view=IDENTITY)
  np.testing.assert_array_equal(sight.crop(0, Box(1.0, 2.0, 4.0, 6.0)).pixels, upright[2:6, 1:4])


def test_pixels_are_read_late_and_refused_then(tmp_path):
  read = records.read(record(image="a.png"), sees=True)
  with pytest.raises(records.Malformed, match="there is no image .*a.png"):
    read.task(tmp_path)


@pytest.mark.parametrize("sees", [True, False])
def test_no_images_can_be_said(sees):
  assert records.read(record(images=[]), sees=sees).images == ()


def test_only_who_reads_need_not_say_it():
  """For a model that sees, a record without images is more likely a misspelt field than text."""
  assert records.read(record(), sees=False).images == ()
  with pytest.raises(records.Malformed, match="image or images must be .* empty if there is none"):
    records.read(record(), sees=True)
  with pytest.raises(records.Malformed, match="only reads, and cannot be shown 1 images"):
    records.read(record(image="a.png"), sees=False)


def test_lines_and_lists_are_told_apart(tmp_path):
  path = tmp_path / "r.json"
  path.write_text("\n  " + json.dumps([record(), 3]))
  assert list(records.items(path)) == [("item 1", record()), ("item 2", 3)]
  path.write_text("\n" + json.dumps(record()) + "\n\nnonsense")
  where, raw = zip(*records.items(path), strict=True)
  assert where == ("line 2", "line 4") and raw[1] == b"nonsense"
  assert records.read(raw[0], sees=False).id == "7"
  with pytest.raises(records.Malformed, match="not JSON"):
    records.read(raw[1], sees=False)
