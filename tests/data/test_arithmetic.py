"""Word problems: answers worked out again from the words, and splits that share no numbers."""

import itertools
import re
from collections import Counter

import pytest

from pixelis_jax.data import arithmetic
from pixelis_jax.data.arithmetic import SPLITS, TEMPLATES, numbers, problems
from pixelis_jax.data.questions import QuestionFile, write_questions
from pixelis_jax.data.requests import read_requests, write_requests
from pixelis_jax.data.tasks import drop_labels

# What the words say to do, in the order in which the numbers stand. Of products the words may name
# the factors in either order; all else is read from left to right.
WORDS = {
  r"buys (\d+) more\. |in a drawer|found": lambda x, y: x + y,
  r"of them away|took (\d+) out|needs": lambda x, y: x - y,
  r"in each\. How|days\. How|holds": lambda x, y: x * y,
  r"gives|sold": lambda x, y, z: x + y - z,
  r"more in a box|finds": lambda x, y, z: x * y + z,
  r"loses|took (\d+) \w+\. How many \w+ are left": lambda x, y, z: x * y - z,
}


def plain(tasks) -> list[tuple]:
  """Tasks are compared by identity; these are not."""
  return [(t.id, t.question, t.answer, t.kind, t.images) for t in tasks]


def said(question: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", question)]


@pytest.mark.parametrize("steps", [1, 2])
def test_answers_are_what_the_words_ask_for(steps):
  tasks = problems("stream", n=300, seed=0, steps=steps)
  for task in tasks:
    (rule,) = [rule for words, rule in WORDS.items() if re.search(words, task.question)]
    assert int(task.answer) == rule(*said(task.question)) > 0, task.question
  # Each kind about equally often, were none refused: of 300 with 3 kinds far more than 50 each;
  # differences below 1 are refused, which takes half of the subtractions.
  kinds = {t.kind for t in TEMPLATES[steps]}
  assert all(sum(t.kind == kind for t in tasks) > 30 for kind in kinds)
  assert all(max(said(t.question)) <= 20 and min(said(t.question)) >= 2 for t in tasks)


@pytest.mark.parametrize("steps, most", [(1, 4), (1, 9), (2, 20)])
def test_splits_share_no_numbers(steps, most):
  """Whatever the order and the seed: what is held out of one run is in no stream of another."""
  of = {split: set(numbers(split, steps=steps, most=most)) for split in SPLITS}
  assert all(of[a].isdisjoint(of[b]) for a, b in itertools.combinations(SPLITS, 2))
  values = range(2, most + 1)
  everything = set(itertools.combinations_with_replacement(values, steps + 1))
  assert set.union(*of.values()) == everything


def test_problems_have_the_numbers_of_their_split():
  for split in SPLITS:
    for seed in (0, 1):
      tasks = problems(split, n=60, seed=seed, most=9)
      assert {tuple(sorted(said(t.question))) for t in tasks} <= set(
        numbers(split, steps=1, most=9)
      )


def test_problems_are_different_and_reproducible():
  tasks = problems("stream", n=200, seed=3)
  assert len({t.question for t in tasks}) == len({t.id for t in tasks}) == 200
  assert plain(tasks) == plain(problems("stream", n=200, seed=3))
  # Were the seed not used, or only for names, all questions would be the other's.
  other = {t.question for t in problems("stream", n=200, seed=4)}
  assert len(other & {t.question for t in tasks}) < 20


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"split": "test"}, "split 'test' must be one of .*held_out"),
    ({"steps": 3}, "steps 3 must be one of"),
    # Pairs of 2 and 3 are three: 0.6, 0.2 and 0.2 of them are 1.8, 0.6, 0.6, and the middle one
    # would end where it begins, at 2.
    ({"most": 3}, "most 3 leaves a split without numbers"),
    # Pairs of 2, 3 and 4 are six, four of the stream: in two orders and 9 templates at most 72.
    ({"most": 4, "n": 73}, "of 73 different problems found: raise most 4"),
  ],
)
def test_what_cannot_be_made_is_refused(arguments, message, monkeypatch):
  monkeypatch.setattr(arithmetic, "NAMES", ("Anna",))
  monkeypatch.setattr(arithmetic, "THINGS", ("pens",))
  with pytest.raises(ValueError, match=message):
    problems(**{"split": "stream", "n": 4, "seed": 0, **arguments})


def test_files_are_read_back(tmp_path):
  """The labelled file whole; the stream without any answer in it."""
  tasks = problems("held_out", n=12, seed=0)
  write_questions(tmp_path / "held_out.jsonl", tasks)
  file = QuestionFile.open(tmp_path / "held_out.jsonl", sees=False)
  assert plain(file[i] for i in range(len(file))) == plain(tasks)
  write_requests(tmp_path / "stream.jsonl", [drop_labels(t) for t in tasks])
  assert "answer" not in (tmp_path / "stream.jsonl").read_text()
  found = read_requests(tmp_path / "stream.jsonl", report=pytest.fail, counts=Counter(), sees=False)
  assert plain(request.task for request in found) == plain(map(drop_labels, tasks))
