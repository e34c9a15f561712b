import json

import numpy as np

from pixelis_jax.data.lines import line, shown
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.memory.values import Writer
from tests.data.test_examples import record
from tests.memory.experiences import plain


def test_a_line_is_a_question_with_the_same_pixels(tmp_path):
  told, files = record(), {}
  text = json.dumps(line(told, Writer(), files))
  for name, data in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
  (tmp_path / "demos.jsonl").write_text(f"{text}\n")
  task = QuestionFile.open(tmp_path / "demos.jsonl", sees=True)[0]
  assert plain(task) == plain(told.demo.task)  # All frames of the video at their times, too.


def test_a_line_tells_what_was_done():
  files = {}
  told = line(record(), Writer(), files)
  assert (told["sort"], told["weight"], told["answer"]) == ("corrected", 1.2, "7 é")
  # 2 calls of no tool, evidence of 16 of 120 pixels, a wrong turn, 2 words: 0.3 ln 3 / ln 16 +
  # 0.25 + 0.2 (log2(7.5) / 2) / 5 + 0.15 + 0.1 * 2 / 40.
  assert told["difficulty"] == 0.582
  look, failed, last = told["turns"]
  assert [turn["supervised"] for turn in told["turns"]] == [False, True, True]
  assert look["result"] == "shown" and failed["error"] == "box outside" and "result" not in last
  crop, frame = look["images"]
  assert crop["box"] == [1.5, 2.0, 8.0, 9.25] and crop["path"] in files and frame["frame"] == 3
  assert [mask["source"] for mask in look["masks"]] == [1, 0]


def test_names_are_of_the_content():
  task = record().demo.task
  (first, other), (film,) = shown(task)
  assert first != other
  assert shown(task) == ([first, other], [film])
  again = record().demo.task
  again.images[1][0, 0] ^= 1
  again.videos[0].frames[2, 0, 0] ^= 1
  changed, changed_film = shown(again)
  assert changed[0] == first and changed[1] != other and changed_film != [film]
  assert np.array_equal(again.images[0], task.images[0])
