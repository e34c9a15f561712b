import base64
import collections
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from pixelis_jax.data.requests import read_requests, write_requests
from pixelis_jax.data.tasks import TaskSource
from pixelis_jax.data.video import Budget, save_frames
from pixelis_jax.types import Task, Video

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
FRAMES = np.random.default_rng(1).integers(0, 256, (12, 5, 7, 3), np.uint8)
CLIP = Video(frames=FRAMES, times=np.arange(12, dtype=np.float32) / 4)


def data_uri(pixels=PIXELS):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def record(id="a", **fields):
  return {"request_id": id, "question": "What?", "image": data_uri(), **fields}


class Stream:
  """A file read to its end."""

  def __init__(self, path, **kwargs):
    self.reports: list[str] = []
    self.counts = collections.Counter()
    self.requests = list(
      read_requests(path, report=self.reports.append, counts=self.counts, **kwargs)
    )
    self.tasks = [request.task for request in self.requests]


def lines(path, *items):
  """JSON lines; a string is written as it is."""
  path.write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items))
  return path


def test_written_tasks_come_back_without_their_labels(tmp_path):
  source = TaskSource(split="stream", seed=3)
  tasks = [source[i] for i in range(4)]
  path = tmp_path / "stream.jsonl"
  write_requests(path, tasks)
  read = Stream(path)
  assert read.counts == {"read": 4} and read.reports == []
  for task, back in zip(tasks, read.tasks, strict=True):
    assert (back.id, back.question, back.kind) == (task.id, task.question, task.kind)
    assert back.answer is None and back.boxes == ()
    np.testing.assert_array_equal(back.images[0], task.images[0])
  # Nor are they in the file.
  fields = {key for line in path.read_text().splitlines() for key in json.loads(line)}
  assert fields == {"request_id", "question", "images", "kind"}


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
  folder = tmp_path / "deep"
  folder.mkdir()
  Image.fromarray(PIXELS).save(folder / "a.png")
  monkeypatch.chdir(tmp_path)
  read = Stream(lines(folder / "s.jsonl", record(image="a.png"), record("b", image=["a.png"] * 2)))
  assert [len(task.images) for task in read.tasks] == [1, 2]
  np.testing.assert_array_equal(read.tasks[0].images[0], PIXELS)


def test_written_videos_come_back_whole(tmp_path):
  """At irregular times, and more of them than the reader's own rate would take."""
  times = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 3.0], np.float32)
  still = Video(frames=FRAMES[:1], times=np.zeros(1, np.float32))
  fast = Video(frames=FRAMES, times=times)
  tasks = [
    Task(id="a", images=(PIXELS,), question="?", answer="7", videos=(still, fast)),
    Task(id="b", images=(), question="?", answer=None, videos=(CLIP,)),
  ]
  path = tmp_path / "stream.jsonl"
  write_requests(path, tasks)
  read = Stream(path)
  assert read.reports == [] and [len(t.images) for t in read.tasks] == [1, 0]
  for task, back in zip(tasks, read.tasks, strict=True):
    for video, again in zip(task.videos, back.videos, strict=True):
      np.testing.assert_array_equal(again.frames, video.frames)
      np.testing.assert_array_equal(again.times, video.times)
  # A budget is the reader's to set.
  (_, fast), (slow,) = (t.videos for t in Stream(path, budget=Budget(max_frames=4)).tasks)
  assert (len(fast.times), len(slow.times)) == (4, 4)


def test_videos_are_paths_or_say_how_much_of_them_is_read(tmp_path):
  folder = tmp_path / "deep"
  save_frames(folder / "walk", CLIP)
  path = lines(
    folder / "s.jsonl",
    {"request_id": "a", "question": "?", "video": "walk"},
    {"request_id": "b", "question": "?", "videos": ["walk", {"path": "walk", "fps": 4}]},
    {"request_id": "c", "question": "?", "video": {"path": "walk", "max_frames": 2, "rate": 8}},
    record("d", video="walk"),
  )
  read = Stream(path)
  assert read.reports == []
  assert [len(task.images) for task in read.tasks] == [0, 0, 0, 1]
  # 3 seconds at 2 a second are 6; 12 at 4 a second.
  assert [[len(v.times) for v in t.videos] for t in read.tasks] == [[6], [6, 12], [2], [6]]
  assert read.tasks[2].videos[0].times.tolist() == [0, 11 / 8]


def test_gray_and_transparent_images_become_rgb(tmp_path):
  gray = np.arange(35, dtype=np.uint8).reshape(5, 7)
  (task,) = Stream(lines(tmp_path / "s.jsonl", record(image=data_uri(gray)))).tasks
  np.testing.assert_array_equal(task.images[0], np.repeat(gray[:, :, None], 3, axis=2))


def test_a_malformed_line_is_reported_with_its_number_and_the_stream_goes_on(tmp_path):
  path = lines(tmp_path / "s.jsonl", record("a"), "", '{"request_id": "b",', record("c"))
  read = Stream(path)
  assert [task.id for task in read.tasks] == ["a", "c"]
  assert read.counts == {"read": 2, "malformed": 1}
  # The blank line is counted as a line, not as a request.
  (report,) = read.reports
  assert "s.jsonl, line 3: not JSON" in report


@pytest.mark.parametrize(
  "bad, reason",
  [
    ("[1, 2]", "must be a JSON object, not list"),
    ("[" * 100_000, "not JSON"),
    ({"question": "What?", "image": data_uri()}, "request_id must be .* not None"),
    (record(True), "request_id must be .* not True"),
    (record(question=None), "question must be a text, not None; fields: .*'image'"),
    (record(question="  "), "question must be a text"),
    (record(kind=3), "kind must be a string, not 3"),
    ({"request_id": "b", "question": "What?"}, "image or images must be a path"),
    (record(image=[3]), "image or images must be a path"),
    (record(image="no.png"), "there is no image .*no.png"),
    (record(image="s.jsonl"), "image s.jsonl cannot be read: cannot identify"),
    (record(image="a\0b"), "cannot be read: .*null"),
    (record(image=data_uri()[:-40]), "cannot be read"),
    (record(image="data:image/png;base64,@@"), "no valid base64"),
    (record(image="data:image/png,abc"), "must end with ;base64"),
    (record(video=3), "video or videos must be a path or an object with a path"),
    (record(videos=["s", 3]), "video or videos must be a path or an object with a path"),
    (record(video={"fps": 2}), "video or videos must be a path or an object with a path"),
    (record(video={"path": "w", "frames": 2}), r"video w has unknown keys \['frames'\]; known:"),
    (record(video={"path": "w", "fps": 0}), "video w: fps must be a positive number, not 0"),
    (record(video={"path": "w", "fps": "2"}), "video w: fps must be a positive number, not '2'"),
    (record(video={"path": "w", "fps": float("inf")}), "fps must be a positive number, not inf"),
    (record(video={"path": "w", "rate": 10**400}), "rate must be a positive number, not 1000"),
    (record(video={"path": "w", "max_frames": 2.5}), "max_frames must be a whole number from 1"),
    (record(video={"path": "w", "max_frames": True}), "max_frames must be a whole number from 1"),
    (record(video={"path": "w", "max_frames": 769}), "max_frames 769 must be at most 768 here"),
    (record(video="no.mp4"), "there is no video .*no.mp4"),
    (record(video="s.jsonl"), "video .*s.jsonl cannot be read: "),
    (record(video="a\0b"), "there is no video"),
    (record(embedding=[1.0, 2.0]), "must have 3 numbers, not 2"),
    (record(embedding=[1.0, float("nan"), 0.0]), "must be a list of numbers below 1e18"),
    (record(embedding="abc"), "must be a list of numbers"),
    ({"request_id": "b", "image": data_uri(), "input_ids": [-1]}, "list of integers from 0"),
    (
      {"request_id": "b", "image": data_uri(), "input_ids": [1, 2], "attention_mask": [1]},
      "attention_mask has 1 entries and input_ids 2",
    ),
  ],
)
def test_what_is_wrong_is_said(tmp_path, bad, reason):
  path = lines(tmp_path / "s.jsonl", record("first"), bad, record("last"))
  read = Stream(path, decode=lambda ids: "decoded", embedding_size=3)
  assert [task.id for task in read.tasks] == ["first", "last"]
  assert read.counts["malformed"] == 1
  (report,) = read.reports
  assert re.search(f"line 2: .*{reason}", report), report


def test_a_model_that_only_reads_is_shown_no_video(tmp_path):
  read = Stream(lines(tmp_path / "s.jsonl", record("a", image=[], video="walk")), sees=False)
  assert "line 1: the model only reads, and cannot be shown 1 videos" in read.reports[0]


def test_a_line_that_is_not_utf8_is_malformed(tmp_path):
  path = tmp_path / "s.jsonl"
  path.write_bytes(b'{"request_id": "\xff"}\n' + json.dumps(record()).encode())
  assert Stream(path).counts == {"read": 1, "malformed": 1}


def test_duplicates_are_reported_and_answered_once(tmp_path):
  read = Stream(lines(tmp_path / "s.jsonl", record(1), record("1", question="Again?")))
  assert [task.question for task in read.tasks] == ["What?"]
  assert read.counts == {"read": 1, "duplicate": 1}
  assert "line 2: request_id '1' was given on line 1" in read.reports[0]


def test_a_json_list_counts_items(tmp_path):
  path = tmp_path / "s.json"
  path.write_text(json.dumps([record("a"), 5, record("b")], indent=2))
  read = Stream(path)
  assert [task.id for task in read.tasks] == ["a", "b"]
  assert "item 2: a request must be a JSON object, not int" in read.reports[0]


def test_fields_of_the_torch_project(tmp_path):
  fields = {
    "request_id": "a",
    "image": data_uri(),
    "input_ids": [[5, 6, 7, 0]],
    "attention_mask": [[1, 1, 1, 0]],
    "labels": [[-100, -100, 41, 42]],
    "embedding": [0.5, -2, 1e3],
  }
  read = Stream(
    lines(tmp_path / "s.jsonl", fields), decode=lambda ids: f"ids {ids.tolist()}", embedding_size=3
  )
  (request,) = read.requests
  assert request.task.question == "ids [5, 6, 7]"  # The padding is masked.
  assert request.task.answer is None
  np.testing.assert_array_equal(request.embedding, np.array([0.5, -2, 1000], np.float32))
  # A request has these two fields, so nothing of `labels` can be in it.
  assert set(type(request).__slots__) == {"task", "embedding"}
  shown = repr(request.task.question) + repr(request.task.id) + request.task.kind
  assert "41" not in shown and "42" not in shown


def test_a_question_needs_no_tokenizer_but_input_ids_do(tmp_path):
  path = lines(
    tmp_path / "s.jsonl",
    record("a", input_ids=[1]),
    {"request_id": "b", "image": data_uri(), "input_ids": [1]},
  )
  read = Stream(path)
  assert [task.question for task in read.tasks] == ["What?"]
  assert "need a tokenizer" in read.reports[0]


def test_missing_and_broken_files_fail_at_the_call(tmp_path):
  def read(path):
    read_requests(path, report=print, counts=collections.Counter())

  with pytest.raises(FileNotFoundError, match="request stream .*none.jsonl is not a file"):
    read(tmp_path / "none.jsonl")
  path = tmp_path / "s.json"
  path.write_text("[{]")
  with pytest.raises(ValueError, match=r"s.json begins with \[ but is not a JSON list"):
    read(path)


def test_repeated_ids_cannot_be_written(tmp_path):
  task = Task(id="a", images=(PIXELS,), question="?", answer=None)
  with pytest.raises(ValueError, match=r"repeated: \['a'\]"):
    write_requests(tmp_path / "s.jsonl", [task, task])
