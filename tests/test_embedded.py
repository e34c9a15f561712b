"""The shipped weights: they answer by looking, and they are small enough to ship."""

from pathlib import Path

import pytest

from configs import evaluate as config
from pixelis_jax import agent, evaluate, sampler

ASSETS = Path(__file__).parents[1] / "assets" / "tiny-vl"
N = 60


@pytest.fixture(scope="module")
def arms():
  c = config.get_config()
  c.unlock()
  c.model.path, c.eval.n = str(ASSETS), N
  policy = sampler.load_policy(c.model)
  asked = evaluate.questions(c.eval, policy)
  return evaluate.arms(policy, asked, limits=agent.Limits(**c.limits), seed=0)


@pytest.mark.parametrize("folder", [ASSETS, ASSETS.with_name("tiny-vl-sft")])
def test_the_weights_fit_a_repository(folder):
  """Those that are shipped, and those that GRPO made them from, with the same files beside them."""
  assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
  for file in ASSETS.iterdir():
    assert file.suffix == ".safetensors" or (folder / file.name).read_bytes() == file.read_bytes()


def test_looking_is_why_it_is_right(arms):
  # A policy that is right 90% of the time gets 47 of 60 or fewer once in 170 draws. One that does
  # not see the digit has a tenth of the two kinds and half of `parity`: 14 of 60 expected.
  assert arms["tools"].accuracy > 47 / N
  assert arms["oracle"].accuracy > 47 / N
  assert arms["tools"].tool_calls >= 1 and arms["tools"].tool_errors < 0.05
  assert arms["tools"].hit_rate > 0.8
  # 27 of 60 or more by chance: less than once in 10,000 draws.
  assert arms["random"].accuracy < 24 / N + 0.05
  assert arms["no_tools"].tool_calls == 0
  kinds = [arms["no_tools"].by_kind[kind].accuracy for kind in ("framed", "beside")]
  # 40 questions at a chance of a tenth: 12 or more right less than once in 1,000 draws.
  assert sum(kinds) / 2 < 0.3
