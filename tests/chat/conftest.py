"""Small tokenizer and processor directories of each family, made from scratch."""

import concurrent.futures
import json
import multiprocessing
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.chat import oracle

SPECIAL = (
  "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|>"
  " <|image_pad|> <|video_pad|>"
).split()
# The pattern of Qwen2's tokenizer.json.
QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
  "You are a helpful assistant. user assistant system What digit is in the red frame?",
  "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n",
  '<tool_call>\n{"name": "zoom_in", "arguments": {"bbox_2d": [34, 56, 44, 66]}}\n</tool_call>',
  "Here is the zoomed image. The digit is \\boxed{7}. <|im_end|> <|im_start|>",
] * 3

# Roles and images as Qwen2.5-VL's template has them: a default system turn, no knowledge of tools.
TEMPLATE = (
  "{% for m in messages %}"
  "{% if loop.first and m['role'] != 'system' %}"
  "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
  "<|im_start|>{{ m['role'] }}\n"
  "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
  "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
  "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Renders tools itself, as the templates of Qwen3-VL do.
TOOLS_TEMPLATE = (
  "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
  "\nCall within <tool_call></tool_call>.<|im_end|>\n{% endif %}" + TEMPLATE
)
# Of Qwen3: no parts, no default system turn; thinking may be switched off, and is not by default.
THINKING_TEMPLATE = (
  "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
  "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{% if m['content'] is string %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n"
  "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
  "{% endif %}{% endif %}"
)


def chat_directory(path: Path, *, template: str = TEMPLATE, pixels: int = 112 * 112) -> Path:
  """Writes tokenizer.json and its config, chat_template.jinja, preprocessor_config.json."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.normalizer = normalizers.NFC()
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  bpe.post_processor = processors.ByteLevel(trim_offsets=False)
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(CORPUS, trainer)
  bpe.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL]
  )
  bpe.add_tokens(
    [
      tokenizers.AddedToken(t, special=False, normalized=False)
      for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")
    ]
  )
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    clean_up_tokenization_spaces=False,
    chat_template=template,
  )
  tokenizer.save_pretrained(path)
  (path / "preprocessor_config.json").write_text(
    json.dumps({"min_pixels": pixels, "max_pixels": pixels, "patch_size": 14, "merge_size": 2})
  )
  return path


def write(path: Path, **settings) -> Path:
  path.write_text(json.dumps(settings))
  return path


def qwen3_vl_directory(path: Path) -> Path:
  """As the published files are spelled, with bounds that keep images and clips small."""
  chat_directory(path, template=TOOLS_TEMPLATE)
  common = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
  common |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
  write(
    path / "preprocessor_config.json",
    size={"longest_edge": 64 * 1024, "shortest_edge": 4096},
    image_processor_type="Qwen2VLImageProcessorFast",
    processor_class="Qwen3VLProcessor",
    **common,
  )
  write(
    path / "video_preprocessor_config.json",
    size={"longest_edge": 256 * 1024, "shortest_edge": 4096},
    video_processor_type="Qwen3VLVideoProcessor",
    **common,
  )
  write(path / "config.json", model_type="qwen3_vl")
  return path


@pytest.fixture(scope="session")
def transformers_process():
  """Calls a function of oracle.py in its process: `transformers_process(oracle.video, ...)`."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=oracle.prepare) as pool:
    yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="session")
def qwen3_vl(tmp_path_factory) -> Path:
  return qwen3_vl_directory(tmp_path_factory.mktemp("tiny-qwen3-vl"))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Path:
  """Text-only: no processor's settings."""
  path = chat_directory(tmp_path_factory.mktemp("tiny-qwen3"), template=THINKING_TEMPLATE)
  (path / "preprocessor_config.json").unlink()
  write(path / "config.json", model_type="qwen3")
  return path


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
  return chat_directory(tmp_path_factory.mktemp("tiny-vl"))


@pytest.fixture(scope="session")
def tools_directory(tmp_path_factory) -> Path:
  return chat_directory(tmp_path_factory.mktemp("tiny-vl-tools"), template=TOOLS_TEMPLATE)
