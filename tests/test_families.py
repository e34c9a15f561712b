"""Every family through the same engines: what is sampled is what the learner reads."""

import json

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from configs import common
from pixelis_jax import batch, learner, sampler
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
def reading(tmp_path_factory):
  path = chats.chat_directory(tmp_path_factory.mktemp("qwen3"), template=chats.TOOLS_TEMPLATE)
  (path / "preprocessor_config.json").unlink()
  return sampler.load_policy(settings("qwen3", path))


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


def test_a_step_trains_a_text_model(reading):
  """One GRPO step on text moves the weights; there is no tower to encode with."""
  _, generate = bound(reading)
  tasks = [Task(id=str(i), images=(), question="what is 2 + 2?", answer=None) for i in range(2)]
  played = episodes.two_turns(generate, tasks, [ToolResult(text="4"), ToolResult(text="5")])
  rows = [batch.trajectory_row(t) for t in played]
  advantages = np.array([1.0, -1.0], np.float32)
  given = batch.pack_grpo(rows, advantages, reading.model.config, max_tokens=512)
  tx, _ = learner.make_optimizer(common.optimizer(lr=1e-3, steps=10, warmup=1))
  loss = learner.grpo_loss(reading.model, clip_low=0.2, clip_high=0.28, entropy_weight=0.0)
  step = learner.make_step(loss, tx, donate=False)
  state = learner.init_state(reading.params, tx, seed=0)
  for _ in range(2):  # The first has rate 0: it warms up.
    state, measured = step(state, given, given.old_logps, np.float32(0.0))
  assert float(measured["skipped"]) == 0.0 and float(measured["grad_norm"]) > 0.0
  assert episodes.max_difference(reading.params, state.params) > 1e-4


def test_the_memory_key_of_text_is_its_question(reading):
  tasks = [Task(id=q, images=(), question=q, answer=None) for q in ("a fish", "a fish", "2 + 2")]
  params, generate = bound(reading)
  steps = [t.steps for t in episodes.two_turns(generate, tasks, [ToolResult(text="")] * 3)]
  keys = sampler.embed(reading, tasks, steps)
  assert keys.shape == (3, 2 * reading.model.config.text.width)
  np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1.0, rtol=1e-5)
  assert keys[0] @ keys[1] > 0.999 > keys[0] @ keys[2]
