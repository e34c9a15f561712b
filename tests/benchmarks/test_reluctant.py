"""What benchmarks/reluctant.py teaches, and what it counts."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from configs import tiny_rft
from pixelis_jax.data.mixture import Mixture
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.data.scenes import DIGIT
from pixelis_jax.types import Box, Status, Step, Trajectory
from tests import fakes


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("reluctant")


def args(out: Path, **more) -> argparse.Namespace:
  given = {"start": "m", "looks": 0.25, "abstain": 0.0, "steps": 20, "lr": 1e-4, "seed": 3, "n": 8}
  return argparse.Namespace(**{**given, **more}, out=out)


def test_it_is_taught_under_the_prompt_that_rl_asks_it_by(bench, tmp_path):
  c, asked = bench.settings(args(tmp_path)), tiny_rft.get_config()
  assert tuple(c.model.tools) == tuple(asked.model.tools) == ("zoom_in",)
  assert tuple(c.data.kinds) == tuple(c.eval.kinds) == tuple(asked.data.kinds)
  # Of `sft.rows`: this share is demonstrations whole, under prompts that list the tool.
  assert (c.data.made, c.data.parts, c.data.direct, c.data.mistakes) == (0.25, 0, 0.0, 0.0)


def test_guesses_are_right_answers_at_once(bench, toolbox, tmp_path):
  made = list(Mixture(split="train", seed=0, kinds=("framed", "parity"), size=4))
  bench.write_questions(tmp_path / "rows.jsonl", bench.rows(args(tmp_path), made))
  read = QuestionFile.open(tmp_path / "rows.jsonl", sees=True)
  assert len(read) == 4
  for i, task in enumerate(made):
    demo = read.demo(i, toolbox)
    np.testing.assert_array_equal(demo.task.images[0], task.images[0])
    assert [turn.text for turn in demo.turns] == [rf"\boxed{{{task.answer}}}"]


def test_who_abstains_has_looked_at_the_right_place(bench, toolbox, tmp_path):
  """Of all rows half look, and of these four fifths for nothing: 0.1 is made, 0.4 of 0.9 here."""
  given = args(tmp_path, looks=0.5, abstain=0.8)
  assert bench.settings(given).data.made == pytest.approx(0.1)
  asked = list(Mixture(split="train", seed=0, size=400))
  made = bench.rows(given, asked)
  abstaining = [i for i, task in enumerate(made) if task.boxes]
  # 4 / 9 of 400 are 178, and the binomial's deviation 10.
  assert abs(len(abstaining) - 178) < 40
  bench.write_questions(tmp_path / "rows.jsonl", made)
  look, answer = (
    QuestionFile.open(tmp_path / "rows.jsonl", sees=True).demo(abstaining[0], toolbox).turns
  )
  assert answer.text == r"\boxed{unreadable}"
  # As demonstrations look: at the digit in the middle of its plate, and at no frame.
  plate, shown = asked[abstaining[0]].boxes[0], look.result.images[0].box
  (x, y), half = plate.center, DIGIT / 2
  assert plate.holds(shown) and shown.width < plate.width
  assert shown.holds(Box(x - half, y - half, x + half, y + half))


def played(*, looks: bool, answer: str | None) -> Trajectory:
  task = fakes.task("t", answer="7")
  result = fakes.ToolResult(text="seen") if looks else None
  steps = (Step(completion=fakes.completion("a call"), result=result),) * looks
  steps = (*steps, Step(completion=fakes.completion("an answer")))
  return Trajectory(task=task, steps=steps, status=Status.ANSWERED, answer=answer)


def test_who_looks_is_counted_apart(bench):
  guessed = [played(looks=False, answer=a) for a in ("7", "3", None, "3", "3", "3")]
  looked = [played(looks=True, answer=a) for a in ("7.0", "3")]
  assert bench.shares([*guessed, *looked]) == pytest.approx(
    {"rapr": 2 / 8, "right": 2 / 8, "right_looked": 1 / 2, "right_guessed": 1 / 6}
  )
  assert bench.shares(guessed)["right_looked"] is None
