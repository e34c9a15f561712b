"""Labelled questions: read whole or refused, with the place of what is wrong."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pixelis_jax.data.questions import QuestionFile, write_questions
from pixelis_jax.data.requests import read_requests
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Box, Task

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def question(id="a", **fields):
  return {"request_id": id, "question": "What?", "answer": "7", **fields}


def lines(tmp_path, *items):
  path = tmp_path / "q.jsonl"
  path.write_text("".join((i if isinstance(i, str) else json.dumps(i)) + "\n" for i in items))
  return path


def opened(tmp_path, *items, sees=False):
  return QuestionFile.open(lines(tmp_path, *items), sees=sees)


def test_questions_are_tasks_and_demonstrations(tmp_path, toolbox):
  Image.fromarray(PIXELS).save(tmp_path / "a.png")
  solution = r"Half of 14 is \boxed{7}."
  file = opened(
    tmp_path,
    question("a", image="a.png", boxes=[[1, 2, 3, 4.5]], kind="read"),
    question("b", images=[], answer=14, solution=r"\boxed{2} times 7 is \boxed{14.0}"),
    question("c", images=[], solution=solution),
    question("d", images=[]),
    sees=True,
  )
  assert len(file) == 4
  task = file[0]
  assert (task.id, task.answer, task.kind) == ("a", "7", "read")
  assert task.boxes == (Box(1.0, 2.0, 3.0, 4.5),)
  np.testing.assert_array_equal(task.images[0], PIXELS)
  assert file[1].answer == "14" and file[1].images == ()
  # Without a solution the answer alone is taught; a solution is taught as it is.
  assert [turn.text for turn in file.demo(3, toolbox).turns] == [r"\boxed{7}"]
  assert [turn.text for turn in file.demo(2, toolbox).turns] == [solution]
  assert file.demo(2, toolbox).turns[0].supervised and file.demo(2, toolbox).task.id == "c"


def test_evidence_is_looked_at_before_the_answer(tmp_path, toolbox):
  """The toolbox shows 160 x 160 pixels as 80 x 80."""
  Image.fromarray(np.zeros((160, 160, 3), np.uint8)).save(tmp_path / "a.png")
  boxes = [[20, 40, 60, 80], [100, 100, 140, 120]]
  solved = question("b", image="a.png", boxes=boxes, solution=r"\boxed{7}")
  file = opened(tmp_path, question("a", image="a.png", boxes=boxes), solved, sees=True)
  *looks, answer = file.demo(0, toolbox).turns
  assert [json.loads(look.text.split("\n")[1])["arguments"]["bbox_2d"] for look in looks] == [
    [10, 20, 30, 40],
    [50, 50, 70, 60],
  ]
  assert [look.result.images[0].box for look in looks] == [Box(*map(float, box)) for box in boxes]
  assert all(look.supervised for look in looks) and answer.text == r"\boxed{7}"
  # With a solution, and without the tool, there is one turn.
  blind = Toolbox([], shown_size=toolbox.shown_size)
  assert len(file.demo(1, toolbox).turns) == len(file.demo(0, blind).turns) == 1
  # In its own format where the policy has another: of 160 x 160 source pixels.
  deepeyes = Toolbox(["zoom_in"], shown_size=toolbox.shown_size, preset="deepeyes")
  one, two, _ = file.demo(0, deepeyes).turns
  assert json.loads(one.text.split("\n")[1]) == {
    "name": "image_zoom_in_tool",
    "arguments": {"bbox_2d": [20, 40, 60, 80]},
  }
  assert two.result.images[0].box == Box(100.0, 95.0, 140.0, 126.0)  # 31 high, which is more.
  with pytest.raises(ValueError, match=r"line 1: box \[160.0, .*beside the first image, 160x160"):
    opened(tmp_path, question("a", image="a.png", boxes=[[160, 0, 180, 20]]), sees=True)[0]


def test_written_questions_come_back_with_their_labels(tmp_path):
  box = Box(1.0, 2.0, 3.0, 4.5)
  shown = Task(id="a", images=(PIXELS,), question="What?", answer="7", kind="read", boxes=(box,))
  told = Task(id="b", images=(), question="Und größer?", answer="1/2", kind="one_step")
  write_questions(tmp_path / "q.jsonl", [shown, told])
  file = QuestionFile.open(tmp_path / "q.jsonl", sees=True)
  said = lambda t: (t.id, t.question, t.answer, t.kind, t.boxes)
  assert [said(file[i]) for i in range(len(file))] == [said(shown), said(told)]
  np.testing.assert_array_equal(file[0].images[0], PIXELS)
  assert file[1].images == ()
  with pytest.raises(ValueError, match=re.escape("without: ['b']")):
    write_questions(tmp_path / "q.jsonl", [shown, dataclasses.replace(told, answer=None)])


def test_a_file_whose_writing_was_ended_is_no_file(tmp_path, monkeypatch):
  save = Image.Image.save

  def full(picture, path):
    if path.name == "000001-0.png":
      raise OSError("no space left on device")
    save(picture, path)

  monkeypatch.setattr(Image.Image, "save", full)
  tasks = [
    Task(id=id, images=(PIXELS,), question="What?", answer="7", kind="read", boxes=())
    for id in "ab"
  ]
  with pytest.raises(OSError, match="no space left"):
    write_questions(tmp_path / "q.jsonl", tasks)
  assert not (tmp_path / "q.jsonl").exists()
  monkeypatch.undo()
  write_questions(tmp_path / "q.jsonl", tasks)  # Once more: what was left is written over.
  assert len(QuestionFile.open(tmp_path / "q.jsonl", sees=True)) == 2


def test_the_same_file_is_a_stream_without_labels(tmp_path):
  path = lines(tmp_path, question("a", solution=r"\boxed{7}"))
  (request,) = read_requests(path, report=print, counts=Counter(), sees=False)
  assert request.task.answer is None and request.task.boxes == ()


@pytest.mark.parametrize(
  "bad, reason",
  [
    ("{", "line 2: not JSON"),
    (question("b", answer=None), "answer must be a text or a number, not None"),
    (question("b", answer=True), "answer must be a text or a number, not True"),
    (question("b", answer=" "), "answer must be a text or a number, not ' '"),
    (question("b", solution=3), "solution must be a text, not 3"),
    (question("b", solution="It is 7."), r"must end with \\boxed\{7\}: the answer .* is None"),
    (question("b", solution=r"\boxed{7}, or \boxed{8}"), "the answer in its last box is '8'"),
    (question("b", boxes=[[1, 2, 3]]), r"boxes must be a list of \[x0, y0, x1, y1\]"),
    (question("b", boxes=[[3, 2, 1, 4]]), "must satisfy x0 < x1"),
    (question("b", boxes=[[1, 2, 3, 4]]), "boxes are places in the first image, and there is none"),
    (question("a", question="Again?"), "line 2: request_id 'a' was given on line 1"),
  ],
)
def test_a_file_with_a_wrong_question_is_refused(tmp_path, bad, reason):
  with pytest.raises(ValueError, match="1 wrong and 1 good questions") as refused:
    opened(tmp_path, question(), bad)
  assert re.search(reason, str(refused.value)), refused.value


def test_missing_videos_are_found_before_training(tmp_path):
  with pytest.raises(ValueError, match="line 1: there is no video .*a.mp4"):
    opened(tmp_path, question(video="a.mp4"), sees=True)


def test_missing_images_are_found_before_training(tmp_path):
  with pytest.raises(ValueError, match="line 1: there is no image .*a.png"):
    opened(tmp_path, question(image="a.png"), sees=True)


def test_an_image_that_cannot_be_read_is_named_with_its_place(tmp_path):
  (tmp_path / "a.png").write_bytes(b"no image")
  file = opened(tmp_path, question(image="a.png"), sees=True)
  with pytest.raises(ValueError, match=r"q.jsonl, line 1: image a.png cannot be read"):
    file[0]


def test_a_file_that_is_not_there_or_empty(tmp_path):
  with pytest.raises(FileNotFoundError, match="question file .*none.jsonl is not a file"):
    QuestionFile.open(tmp_path / "none.jsonl", sees=False)
  with pytest.raises(ValueError, match="0 wrong and 0 good questions:\nit is empty"):
    opened(tmp_path)


def test_all_that_is_wrong_is_said_at_once_up_to_five(tmp_path):
  with pytest.raises(ValueError, match="7 wrong and 0 good") as refused:
    opened(tmp_path, *[question(str(i), answer=None) for i in range(7)])
  assert str(refused.value).count("answer must be") == 5
