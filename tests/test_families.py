"""Every family through the same engines: what is sampled is what the learner reads."""

import json

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from configs import common, demo
from configs import evaluate as evaluate_config
from configs import rft as rft_config
from configs import sft as sft_config
from pixelis_jax import batch, evaluate, learner, online, rft, sampler, sft
from pixelis_jax.memory.store import Memory
from pixelis_jax.model.load import load
from pixelis_jax.types import Task, ToolCall, ToolResult, Video
from tests import episodes, fakes
from tests.chat import conftest as chats
from tests.model import oracle

# Two float32 evaluations in other orders of summation: some 1e-6 of a log-prob.
CLOSE = 1e-5


def settings(family: str, path, **vision):
  """The config of a random model whose token ids are those of the directory's tokenizer."""
  tokenizer = AutoTokenizer.from_pretrained(str(path))
  raw = oracle.hf_config(tied=True, family=family).to_dict()
  # Rounded up: the embedding has rows that stand for no token, as the released models' have.
  raw.get("text_config", raw)["vocab_size"] = -(-len(tokenizer) // 64) * 64
  if vision:
    for name, token in (
      ("image_token_id", "<|image_pad|>"),
      ("video_token_id", "<|video_pad|>"),
      ("vision_start_token_id", "<|vision_start|>"),
      ("vision_end_token_id", "<|vision_end|>"),
    ):
      raw[name] = tokenizer.convert_tokens_to_ids(token)
    raw["vision_config"] |= vision
  (path / "config.json").write_text(json.dumps(raw))
  c = common.model(str(path))
  c.random_seed, c.max_tokens = 0, 6
  return c


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
  """Qwen3-VL with windows none, levels two, coordinates 0 to 1000."""
  path = chats.qwen3_vl_directory(tmp_path_factory.mktemp("qwen3-vl"))
  return sampler.load_policy(settings("qwen3_vl", path, patch_size=16))


@pytest.fixture(scope="module")
def text_settings(tmp_path_factory):
  path = chats.chat_directory(tmp_path_factory.mktemp("qwen3"), template=chats.TOOLS_TEMPLATE)
  (path / "preprocessor_config.json").unlink()
  return settings("qwen3", path)


@pytest.fixture(scope="module")
def reading(text_settings):
  return sampler.load_policy(text_settings)


def bound(policy):
  # Random weights repeat one token; tilted ones sample a spread that any mix-up would change.
  params = episodes.tilted(policy.params, {})
  return params, policy.sampler.bind(params, key=jax.random.key(0), version=0)


def assert_read_as_sampled(policy, params, played, *, packed):
  rows = [batch.trajectory_row(t) for t in played]
  zeros = np.zeros(len(rows), np.float32)
  given = batch.pack_grpo(rows, zeros, policy.model.config, max_tokens=1024, packed=packed)
  logps = np.asarray(learner.make_logps(policy.model)(params, given.inputs))
  assert given.loss_mask.sum() == sum(len(s.completion.tokens) for t in played for s in t.steps)
  np.testing.assert_allclose(
    logps[given.loss_mask], given.old_logps[given.loss_mask], rtol=0, atol=CLOSE
  )
  assert np.ptp(given.old_logps[given.loss_mask]) > 0.1


def clip(seed: int, frames: int = 5) -> Video:
  pixels = np.stack([fakes.image(40, 60, seed=seed + i) for i in range(frames)])
  return Video(frames=pixels, times=np.arange(frames, dtype=np.float32) / 2)


@pytest.mark.parametrize("packed", [False, True])
def test_qwen3_vl_plays_images_videos_and_tool_pictures(seeing, packed):
  """Images, a video behind its times, and a picture in a later turn: positions carry over."""
  tasks = [
    episodes.task("still"),
    Task(id="clip", images=(), question="what moves?", answer=None, videos=(clip(3),)),
    Task(id="both", images=(fakes.image(70, 33),), question="?", answer=None, videos=(clip(9),)),
  ]
  results = [episodes.crop(7), ToolResult(text="", error="no such box"), episodes.crop(8)]
  params, generate = bound(seeing)
  played = episodes.two_turns(generate, tasks, results)
  assert seeing.chat.video_id in played[1].steps[0].completion.context.tokens
  assert_read_as_sampled(seeing, params, played, packed=packed)


def test_qwen3_vl_points_in_thousandths(seeing):
  """The same box in 0-1000 whatever the image's size: the right half is x from 500 to 1000."""
  task = episodes.task("box")
  call = ToolCall(name="zoom_in", arguments={"bbox_2d": [500, 0, 1000, 1000]})
  result = seeing.tools.run(call, task, ())
  (picture,) = result.images
  height, width = task.images[0].shape[:2]
  assert (picture.box.x0, picture.box.x1) == (width / 2, width)
  assert (picture.box.y0, picture.box.y1) == (0, height)


@pytest.mark.parametrize("packed", [False, True])
def test_qwen3_plays_text(reading, packed):
  questions = ("what is 2 + 2?", "name a fish", "say nothing at all, in as many words as you like")
  tasks = [Task(id=q, images=(), question=q, answer=None) for q in questions]
  results = [ToolResult(text=f"result {i}") for i in range(3)]
  params, generate = bound(reading)
  played = episodes.two_turns(generate, tasks, results)
  assert_read_as_sampled(reading, params, played, packed=packed)


SUMS = ((1, 1), (3, 1), (2, 4), (5, 3))


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
  """Four solved questions without a picture."""
  path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
  solved = [
    {
      "request_id": f"{a}+{b}",
      "question": f"What is {a} and {b}?",
      "answer": a + b,
      "solution": f"The digit is \\boxed{{{a + b}}}",
    }
    for a, b in SUMS
  ]
  path.write_text("\n".join(map(json.dumps, solved)))
  return str(path)


@pytest.fixture(scope="module")
def taught(text_settings, sums, tmp_path_factory):
  """(workdir, config) of a random Qwen3 that SFT taught four sums by heart."""
  c = sft_config.get_config("text").unlock()
  c.model.path, c.model.random_seed, c.model.max_tokens = text_settings.path, 0, 16
  c.data.file = c.eval.file = sums
  c.batch, c.max_row, c.mesh.data = 4, 128, 1
  c.optimizer.steps, c.optimizer.warmup, c.optimizer.lr = 60, 10, 1e-2
  c.eval.every, c.save_every = 60, 60
  workdir = tmp_path_factory.mktemp("sft") / "run"
  sft.main(c.lock(), workdir)
  return workdir, c


def own(config, workdir, sums):
  """A config of a program, for the taught model."""
  c = config.get_config("text").unlock()
  c.model.path, c.model.max_tokens = str(workdir / "model"), 16
  if "mesh" in c:
    c.mesh.data = 1
  for part in ("data", "eval", "shifted", "original"):
    if part in c:
      c[part].file = sums
  return c


def test_sft_teaches_a_text_model_its_solutions(taught, sums, tmp_path):
  workdir, _ = taught
  c = own(evaluate_config, workdir, sums)
  results = evaluate.main(c, tmp_path / "out")
  # There are no tools to take away and no crops to move.
  assert list(results) == ["no_tools"] and results["no_tools"].score.n == len(SUMS)
  # By heart: a program that mixed up rows, answers or positions would miss some.
  assert results["no_tools"].accuracy == 1.0
  said = [t.steps[0].completion.text for t in results["no_tools"].trajectories]
  assert said == [f"The digit is \\boxed{{{a + b}}}" for a, b in SUMS]


def test_rft_of_a_text_model(taught, sums, tmp_path):
  """Steps on text move the weights; there is no tower to encode with."""
  c = own(rft_config, taught[0], sums)
  c.grpo.questions, c.grpo.group, c.grpo.temperature = 4, 4, 2.0
  c.optimizer.steps, c.optimizer.warmup, c.optimizer.lr, c.max_row = 3, 1, 1e-3, 256
  state = rft.main(c.lock(), tmp_path / "run")
  lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert lines[0]["task"] > 0, "at temperature 2 it is still right at times"
  updates = [line for line in lines if "actor/loss" in line]
  assert updates and all(line["actor/skipped"] == 0 for line in updates)
  assert all(line["actor/grad_norm"] > 0 for line in updates)
  assert updates[0]["actor/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
  # The first step has rate 0: it warms up.
  _, before = load(taught[0] / "model")
  assert episodes.max_difference(state.params, before) > 1e-4


def test_online_answers_and_learns_from_text(taught, sums, tmp_path):
  c = own(demo, taught[0], sums)
  c.requests = c.probe.tasks.file = sums
  c.temperature, c.samples, c.arrivals, c.memory.backend = 2.0, 6, 2, "exact"
  c.gate.confidence, c.gate.margin, c.gate.clearer = 0.0, 0.0, False
  c.learn.requests, c.learn.publish_every = 2, 1
  c.probe.canary, c.probe.rehearse = 2, 2
  result = online.main(c.lock(), tmp_path / "run")
  assert result["n"] == len(SUMS) and result["requests"] == len(SUMS)
  assert result["shift"] == "sums" and result["shifted_before"] == 1.0
  assert result["updates_applied"] + result["updates_refused"] == 2
  dim = 2 * 64
  with Memory(tmp_path / "run" / "memory.sqlite", dim=dim, backend="exact") as memory:
    assert memory.ids() == [f"{a}+{b}" for a, b in SUMS]


def test_a_text_model_is_not_shown_scenes(taught, sums, tmp_path):
  c = own(rft_config, taught[0], sums)
  c.data.file = ""
  with pytest.raises(ValueError, match="data.file must name a file of questions"):
    rft.main(c, tmp_path / "run")
  c.data.file, c.eval.file = sums, ""
  with pytest.raises(ValueError, match="give it questions from a file"):
    rft.main(c, tmp_path / "run")


def test_a_file_cannot_teach_a_tower_alone(taught, tmp_path):
  c = taught[1].copy_and_resolve_references().unlock()
  c.see_steps = 1
  with pytest.raises(ValueError, match="see_steps is 1 .* must be 0, or data.made above 0"):
    sft.main(c, tmp_path / "run")


def test_the_memory_key_of_text_is_its_question(reading):
  tasks = [Task(id=q, images=(), question=q, answer=None) for q in ("a fish", "a fish", "2 + 2")]
  params, generate = bound(reading)
  steps = [t.steps for t in episodes.two_turns(generate, tasks, [ToolResult(text="")] * 3)]
  keys = sampler.embed(reading, tasks, steps)
  assert keys.shape == (3, 2 * reading.model.config.text.width)
  np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1.0, rtol=1e-5)
  assert keys[0] @ keys[1] > 0.999 > keys[0] @ keys[2]
