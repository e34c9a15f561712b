import json

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from pixelis_jax.data.built import Dataset, lines, records_of, shown_sizes
from pixelis_jax.data.difficulty import difficulty
from pixelis_jax.data.examples import decode
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.tools import Toolbox
from tests.data.datasets import built
from tests.data.test_examples import record as filmed
from tests.memory.experiences import plain


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return built(tmp_path_factory.mktemp("built"))


def test_records_are_there_by_number_as_the_lines_say(dataset):
  told = lines(dataset.folder)
  assert len(dataset) == len(told) == 6
  for number in (0, 5):
    record = dataset[number]
    assert record.demo.task.id == told[number]["request_id"]
    assert (record.sort, record.weight) == (told[number]["sort"], 1.0)
  assert plain(dataset[-1]) == plain(dataset[5])
  with pytest.raises(IndexError):
    dataset[6]


def test_every_record_has_a_difficulty_and_a_level(dataset):
  found = [difficulty(dataset[number].demo) for number in range(6)]
  assert dataset.difficulties.tolist() == found
  # A corrected one has a call more and an error: none is of a simpler level than a golden one.
  golden = np.array([dataset[number].sort == "golden" for number in range(6)])
  levels = dataset.levels()
  assert levels[golden].max() <= levels[~golden].min()
  assert (levels.min(), levels.max()) == (0, 2)


def test_a_dataset_from_before_difficulties_says_so(tmp_path):
  folder = built(tmp_path, n=1).folder
  (told,) = lines(folder)
  del told["difficulty"]
  about, text = json.loads((folder / "manifest.json").read_text()), json.dumps(told) + "\n"
  (folder / "demos.jsonl").write_text(text)
  about["files"]["demos.jsonl"]["bytes"] = len(text)
  (folder / "manifest.json").write_text(json.dumps(about))
  old = Dataset.open(folder)
  assert old.difficulties is None and len(old) == 1
  with pytest.raises(ValueError, match="few was built before records had a difficulty"):
    old.levels()


def test_grain_and_tfds_read_it(dataset):
  files = [str(dataset.folder / name) for name in records_of(dataset.about)]
  source = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files))
  assert plain(decode(source[3])) == plain(dataset[3])
  told = tfds.builder_from_directory(dataset.folder).as_data_source("train")
  assert len(told) == 6
  assert told[3]["id"].decode() == dataset[3].demo.task.id
  np.testing.assert_array_equal(told[3]["images"][0], dataset[3].demo.task.images[0])


def test_the_lines_are_a_file_of_questions(dataset):
  questions = QuestionFile.open(dataset.folder / "demos.jsonl", sees=True)
  assert plain(questions[4]) == plain(dataset[4].demo.task)


def test_a_policy_is_taught_only_what_it_can_do(dataset, toolbox):
  assert plain(dataset.demo(2, toolbox)) == plain(dataset[2].demo)
  larger = Toolbox(["zoom_in"], shown_size=lambda height, width: (112, 112))
  with pytest.raises(ValueError, match=r"few, record 2: .* at \[\(80, 80\)\], this policy .*112"):
    dataset.demo(2, larger)
  with pytest.raises(ValueError, match="task r1 has 1 videos, and the policy is shown none"):
    shown_sizes(filmed().demo.task, toolbox)
  bare = Toolbox(["read_text"], shown_size=lambda height, width: (80, 80))
  with pytest.raises(ValueError, match=r"record 2: calls \['zoom_in'\], .* has \['read_text'\]"):
    dataset.demo(2, bare)


def test_what_is_no_dataset_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no dataset: it has no manifest.json"):
    Dataset.open(tmp_path)
  (tmp_path / "manifest.json").write_text("{")
  with pytest.raises(ValueError, match="manifest.json is not JSON"):
    Dataset.open(tmp_path)
  (tmp_path / "manifest.json").write_text("[]")
  with pytest.raises(ValueError, match="is not what data/build.py writes"):
    Dataset.open(tmp_path)
  (tmp_path / "manifest.json").write_text('{"manifest": {}}')
  with pytest.raises(ValueError, match="is not finished: the command that builds it goes on"):
    Dataset.open(tmp_path)


def test_what_was_changed_is_refused(tmp_path):
  dataset = built(tmp_path, n=2)
  first, other = (dataset.folder / name for name in records_of(dataset.about))
  data = bytearray(first.read_bytes())
  data[1000] ^= 1
  first.write_bytes(data)  # Of the same length.
  assert Dataset.open(dataset.folder)[1]
  with pytest.raises(ValueError, match="few, record 0: .*hash mismatch"):
    Dataset.open(dataset.folder)[0]
  other.write_bytes(b"")
  with pytest.raises(ValueError, match="00001-of-00002 has 0 bytes; it was built with"):
    Dataset.open(dataset.folder)
  other.unlink()
  with pytest.raises(FileNotFoundError, match="few lacks few-train.array_record-00001-of-00002"):
    Dataset.open(dataset.folder)
