"""What benchmarks/reluctant.py teaches, and what it counts."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from configs import tiny_rft
from pixelis_jax.data.mixture import Mixture
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.types import Status, Step, Trajectory
from tests import fakes


@pytest.fixture
def bench(load_benchmark):
  return load_benchmark("reluctant")


def args(out: Path) -> argparse.Namespace:
  given = {"start": "m", "looks": 0.25, "steps": 20, "lr": 1e-4, "seed": 3, "n": 8}
  return argparse.Namespace(**given, out=out)


def test_it_is_taught_under_the_prompt_that_rl_asks_it_by(bench, tmp_path):
  c, asked = bench.settings(args(tmp_path)), tiny_rft.get_config()
  assert tuple(c.model.tools) == tuple(asked.model.tools) == ("zoom_in",)
  assert tuple(c.data.kinds) == tuple(c.eval.kinds) == tuple(asked.data.kinds)
  # Of `sft.rows`: this share is demonstrations whole, under prompts that list the tool.
  assert (c.data.made, c.data.parts, c.data.direct, c.data.mistakes) == (0.25, 0, 0.0, 0.0)


def test_guesses_are_right_answers_at_once(bench, tmp_path):
  made = list(Mixture(split="train", seed=0, kinds=("framed", "parity"), size=4))
  bench.write_questions(tmp_path / "guesses.jsonl", made)
  read = QuestionFile.open(tmp_path / "guesses.jsonl", sees=True)
  assert len(read) == 4
  for i, task in enumerate(made):
    demo = read.demo(i)
    np.testing.assert_array_equal(demo.task.images[0], task.images[0])
    assert [turn.text for turn in demo.turns] == [rf"\boxed{{{task.answer}}}"]


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
