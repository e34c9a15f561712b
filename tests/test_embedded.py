"""The weights of assets/tiny-vl do what the README says of them."""

from pathlib import Path

import pytest

from configs import common
from pixelis_jax import agent, evaluate, sampler

ASSETS = Path(__file__).parents[1] / "assets" / "tiny-vl"
N = 60


@pytest.fixture(scope="module")
def arms():
  c = common.model(str(ASSETS))
  asked = evaluate.tasks(common.evaluation(n=N, seed=11))
  limits = agent.Limits(**common.limits())
  return evaluate.arms(sampler.load_policy(c), c, asked, limits=limits, seed=0)


def test_it_fits_in_the_repository():
  assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 10e6


def test_it_looks_once_and_is_right_because_of_it(arms):
  tools, moved = arms["tools"], arms["random_crop"]
  # BUILD.md publishes more than 90%: of 60 questions, fewer than 47 right has a chance below 0.1%.
  assert tools.accuracy >= 47 / N, evaluate.table(arms)
  assert tools.tool_errors == 0.0 and tools.tool_calls == pytest.approx(1.0, abs=0.05)
  # Elsewhere there is mostly nothing to read: half of the parity questions and a tenth of the
  # others, a fifth in all, with a deviation of 5 points.
  assert moved.accuracy < 0.45, evaluate.table(arms)


def test_without_tools_a_digit_is_a_guess(arms):
  blind = arms["no_tools"].by_kind
  # 40 questions with ten answers: more than 12 right by guessing has a chance below 0.1%.
  assert (blind["framed"] + blind["beside"]) / 2 <= 0.3, evaluate.table(arms)
