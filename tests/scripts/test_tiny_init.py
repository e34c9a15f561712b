import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixelis_jax.chat.template import Chat
from pixelis_jax.data import demos
from pixelis_jax.data.tasks import DemoSource, TaskSource
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import ToolCall
from scripts import tiny_init

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("tiny")
  tiny_init.write(path)
  return path


@pytest.fixture(scope="module")
def tokenizer(directory):
  return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def pieces(tokenizer, text):
  return [tokenizer.decode([id]) for id in tokenizer(text)["input_ids"]]


def call(*corners):
  return demos.call_text(ToolCall(name="zoom_in", arguments={"bbox_2d": list(corners)}))


def test_a_call_is_head_numbers_separators_and_tail(tokenizer):
  # Fails if the pre-tokenizer of the file is replaced by Qwen2's own, as Qwen2Tokenizer does: 37.
  assert pieces(tokenizer, call(34, 56, 44, 66)) == [
    "<tool_call>",
    '\n{"name": "zoom_in", "arguments": {"bbox_2d": [',
    *["34", ", ", "56", ", ", "44", ", ", "66"],
    "]}}\n",
    "</tool_call>",
  ]


def test_calls_are_as_long_wherever_they_look(tokenizer):
  """Every coordinate below 120 is one token; frames are 80 pixels wide, few crops above 100."""
  for corners in ((0, 9, 10, 99), (98, 100, 110, 119)):
    assert len(pieces(tokenizer, call(*corners))) == 11


def test_numbers_in_codes_and_times_are_digits(tokenizer):
  assert pieces(tokenizer, "R42K 42K") == ["R", "4", "2", "K", " ", "4", "2", "K"]
  assert pieces(tokenizer, "0:07 120 0.97") == [
    *["0", ":", "0", "7", " ", "1", "2", "0", " ", "0", ".", "97"]
  ]


def test_any_text_comes_back(tokenizer):
  for text in ("Ünïcödé 数字 🙂", "100,5 and 1, 2", "\t \r\n", "\\boxed{7}", "\x00\x7f"):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ids_fit_the_embedding_and_are_the_configs(directory, tokenizer):
  config = AutoConfig.from_pretrained(directory)
  assert config.model_type == "qwen2_5_vl"
  assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
  assert len(tokenizer) <= config.text_config.vocab_size == tiny_init.VOCAB
  id_of = tokenizer.convert_tokens_to_ids
  assert config.image_token_id == id_of("<|image_pad|>")
  assert config.video_token_id == id_of("<|video_pad|>")
  assert config.vision_start_token_id == id_of("<|vision_start|>")
  assert config.vision_end_token_id == id_of("<|vision_end|>")
  assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
  generation = GenerationConfig.from_pretrained(directory)
  assert generation.eos_token_id == [id_of("<|im_end|>"), id_of("<|endoftext|>")]
  # All 256 bytes, or some text would be lost.
  assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256


def test_tool_call_tags_are_text_and_control_tokens_are_not(tokenizer):
  special = {t.content: t.special for t in tokenizer.added_tokens_decoder.values()}
  assert not special["<tool_call>"] and not special["</tool_call>"]
  assert special["<|im_end|>"] and special["<|image_pad|>"]


def test_our_model_reads_the_config(directory):
  config = ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))
  theirs = AutoConfig.from_pretrained(directory)
  assert config.text.rope_theta == theirs.text_config.rope_parameters["rope_theta"]
  assert config.vision.full_blocks == tuple(theirs.vision_config.fullatt_block_indexes)
  # Frequencies of a head: half its width, divided between time, height and width.
  assert sum(config.text.mrope_section) == config.text.width // config.text.heads // 2
  assert config.text.tied
  assert config.vision.out_width == config.text.width


def test_template_shows_how_to_call(tokenizer):
  toolbox = Toolbox(["zoom_in"], shown_size=lambda height, width: (80, 80))
  turns = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": call(1, 2, 3, 4)},
    {"role": "tool", "content": [{"type": "text", "text": "Here."}, {"type": "image"}]},
    {"role": "assistant", "content": "\\boxed{7}"},
  ]
  text = tokenizer.apply_chat_template(
    turns, tools=[dict(s) for s in toolbox.schemas], tokenize=False
  )
  assert text == (
    "<|im_start|>system\n<tools>\n"
    '{"name": "zoom_in", "arguments": {"bbox_2d": [number x 4], "image": integer}}\n'
    "</tools>\nWrite <tool_call>\none of these\n</tool_call>\nor an answer in \\boxed{}."
    "<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
    f"<|im_start|>assistant\n{call(1, 2, 3, 4)}<|im_end|>\n"
    "<|im_start|>user\nHere.<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    "<|im_start|>assistant\n\\boxed{7}<|im_end|>\n"
  )


def test_template_renders_structured_calls_like_written_ones(tokenizer):
  arguments = {"bbox_2d": [1, 2, 3, 4]}
  made = [{"function": {"name": "zoom_in", "arguments": arguments}}]
  structured = {"role": "assistant", "content": "", "tool_calls": made}
  written = {"role": "assistant", "content": call(1, 2, 3, 4)}
  first, second = (
    tokenizer.apply_chat_template([{"role": "user", "content": "What?"}, turn], tokenize=False)
    for turn in (structured, written)
  )
  assert first == second


def test_template_without_tools_has_no_system_turn_of_its_own(tokenizer):
  user = {"role": "user", "content": "What?"}
  apply = lambda turns: tokenizer.apply_chat_template(
    turns, tokenize=False, add_generation_prompt=True
  )
  bare = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
  assert apply([user]) == bare
  system = {"role": "system", "content": "Be brief."}
  assert apply([system, user]) == f"<|im_start|>system\nBe brief.<|im_end|>\n{bare}"
  parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
  assert apply([parts, user]) == apply([system, user])


def test_demonstrations_are_short_and_their_pictures_are_80_square(directory):
  toolbox = Toolbox(["zoom_in"], shown_size=lambda height, width: (80, 80))
  chat = Chat.from_directory(directory, tools=toolbox.schemas)
  assert chat.shown_size(400, 400) == (80, 80)
  source = DemoSource(tasks=TaskSource(split="train"), toolbox=toolbox)
  for i in range(20):
    demo = source[i]
    prompt = chat.prompt(demo.task)
    result = chat.result(demo.turns[0].result)
    # 8x8 patches are 16 image tokens.
    assert [image.grid for image in (*prompt.images, *result.images)] == [(1, 8, 8)] * 2
    assert len(prompt.tokens) <= 64 + 16 and len(result.tokens) <= 20 + 16
    assert len(chat.target(demo.turns[0].text)) == 12


def test_no_crop_of_ordinary_shape_has_more_patches_than_the_overview(directory):
  images = Qwen2VLImageProcessorPil.from_pretrained(directory)
  assert (images.size["shortest_edge"], images.size["longest_edge"]) == (4800, 6400)
  chat = Chat.from_directory(directory, tools=())
  for height in range(24, 104, 4):
    for width in range(24, 104, 4):
      if max(height, width) <= 1.5 * min(height, width):
        shown = chat.shown_size(height, width)
        # With min_pixels = max_pixels 44 x 52 would be shown at 80 x 100: 80 patches.
        assert shown[0] * shown[1] <= 80 * 80, (height, width, shown)


def test_same_bytes_every_time_and_in_the_assets(directory, tmp_path):
  tiny_init.write(tmp_path)
  names = sorted(path.name for path in directory.iterdir())
  assert names == sorted(path.name for path in tmp_path.iterdir())
  for name in names:
    assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
  # The trained weights are for these tokens and this prompt.
  for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
    embedded = ROOT / "assets" / "tiny-vl" / name
    assert embedded.read_bytes() == (directory / name).read_bytes(), name
