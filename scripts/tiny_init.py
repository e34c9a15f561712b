"""Makes the Hugging Face directory of the embedded model, all but its weights.

python scripts/tiny_init.py --out assets/tiny-vl

A Qwen2.5-VL of under a million parameters that transformers loads as one: config.json, a
byte-level BPE tokenizer with Qwen's control tokens trained on the digit scenes' own texts, image
processor settings, generation settings and a chat template. The same bytes on every run.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from transformers import GenerationConfig, Qwen2_5_VLConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixelis_jax.data import demos, scenes
from pixelis_jax.types import ToolCall

VOCAB = 512  # Rows of the embedding; the tokenizer may fill a few less.
SPECIAL = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|object_ref_start|>",
  "<|object_ref_end|>",
  "<|box_start|>",
  "<|box_end|>",
  "<|quad_start|>",
  "<|quad_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|vision_pad|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
WRITTEN = ("<tool_call>", "</tool_call>")  # Added, but text: a policy writes them itself.
# A call's fixed head and the separator of its numbers are single pieces, so BPE can make each one
# token, in the prompt's list of tools too; what follows is Qwen2's own rule.
PIECES = r"""<tools>(?=\n\{"name")|\n\{"name": "\w+", "arguments": \{"\w+": \[|, (?=\d)|"""
# Patches of 10 pixels, not 14: the digits of a coordinate are then patch and place in it, which a
# small network learns; with 14 the last one stays at chance though the place is known to a pixel.
PATCH = 10
# A crop whose sides differ by less than about a quarter is shown at 80x80 and few at more. With a
# minimum equal to the maximum, rounding up to multiples of 20 would pass the maximum every time.
MIN_PIXELS, MAX_PIXELS = 60 * 80, 80 * 80
# Of the digit scenes: with CLIP's, dark pictures are mostly one constant, and learning is slow.
MEAN, STD = [0.27] * 3, [0.2] * 3

TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content or [] -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools or (messages and messages[0].role == 'system') -%}
<|im_start|>system
{% if messages and messages[0].role == 'system' -%}
{{ show(messages[0].content) }}{{ "\\n" if tools }}
{%- endif -%}
{%- if tools -%}
<tools>
{% for tool in tools -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{"name": "{{ f.name }}", "arguments": {
{%- for key, value in f.parameters.properties.items() -%}
"{{ key }}": {% if value.type == 'array' -%}
[{{ value['items'].type }}{{ " x " ~ value.minItems if value.minItems }}]
{%- else -%}
{{ value.type }}
{%- endif -%}
{{ ", " if not loop.last }}
{%- endfor -%}
}}
{% endfor -%}
</tools>
Write <tool_call>
one of these
</tool_call>
or an answer in \\boxed{}.
{%- endif -%}
<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role != 'system' or not loop.first -%}
<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{{ show(message.content) }}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function if call.function is defined else call -%}
{{ "\\n" if message.content and loop.first or not loop.first }}<tool_call>
{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def corpus() -> Iterator[str]:
  """What the tiny world is told, says and is shown, without control tokens; no random draws."""
  targets = {
    "framed": scenes.COLORS,
    "parity": scenes.COLORS,
    "beside": [f"{side} the {shape}" for side in scenes.SIDES for shape in scenes.SHAPES],
  }
  fixed = (
    '<tools>\n{"name": "zoom_in", "arguments": {"bbox_2d": [number x 4], "image": integer}}\n'
    "</tools>\nWrite ",
    "\none of these\n",
    "\nor an answer in \\boxed{}.",
    "Here is the zoomed image.",
    "Error: bbox_2d is too small: pixels, at least 2 x 2 needed",
    "Error: bbox_2d must satisfy 0 <= x1 < x2 <= and 0 <= y1 < y2 <= ",
    "Error: unknown tool; known: zoom_in",
    "Error: missing argument",
    "system\n",
    "user\n",
    "assistant\n",
  )
  for kind, questions in scenes.QUESTIONS.items():
    for question in questions:
      for target in targets[kind]:
        yield question.format(target=target)
        yield from fixed
  for number in range(81):
    call = ToolCall(name="zoom_in", arguments={"bbox_2d": [number, 80 - number, 7, 56]})
    body = demos.call_text(call)
    yield body.removeprefix(WRITTEN[0]).removesuffix(WRITTEN[1])
  for answer in [*map(str, range(10)), "even", "odd"]:
    yield from [demos.ANSWER.format(answer)] * 10


def tokenizer() -> tokenizers.Tokenizer:
  """Qwen2's tokenizer in small: all 256 bytes, merges of the corpus, then the added tokens."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.normalizer = normalizers.NFC()
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(PIECES + PRETOKENIZE_REGEX), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  made.post_processor = processors.ByteLevel(trim_offsets=False)
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB - len(SPECIAL) - len(WRITTEN),
    min_frequency=2,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(corpus(), trainer)
  made.add_tokens(
    [AddedToken(t, normalized=False, special=True) for t in SPECIAL]
    + [AddedToken(t, normalized=False, special=False) for t in WRITTEN]
  )
  return made


def config(made: tokenizers.Tokenizer) -> Qwen2_5_VLConfig:
  """Qwen2.5-VL in small: windows of 2x2 merged tokens, four to a picture of 80x80."""
  id_of = made.token_to_id
  return Qwen2_5_VLConfig(
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    dtype="float32",
    vision_config={
      "depth": 3,
      "hidden_size": 64,
      "num_heads": 4,
      "intermediate_size": 192,
      "patch_size": PATCH,
      "temporal_patch_size": 2,
      "spatial_merge_size": 2,
      "window_size": 4 * PATCH,
      "fullatt_block_indexes": [1, 2],
      "out_hidden_size": 128,
      "tokens_per_second": 2,
    },
    text_config={
      "vocab_size": VOCAB,
      "hidden_size": 128,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "intermediate_size": 256,
      "max_position_embeddings": 32768,
      "rms_norm_eps": 1e-6,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 4.0,
        "mrope_section": [4, 6, 6],
      },
      "tie_word_embeddings": True,
      "bos_token_id": id_of("<|endoftext|>"),
      "eos_token_id": id_of("<|im_end|>"),
      "pad_token_id": id_of("<|endoftext|>"),
    },
    image_token_id=id_of("<|image_pad|>"),
    video_token_id=id_of("<|video_pad|>"),
    vision_start_token_id=id_of("<|vision_start|>"),
    vision_end_token_id=id_of("<|vision_end|>"),
    tie_word_embeddings=True,
  )


def write(out: Path) -> None:
  """All files of the directory; it is made if needed, and files of other names in it are kept."""
  out.mkdir(parents=True, exist_ok=True)
  made = tokenizer()
  made.save(str(out / "tokenizer.json"))
  _write_json(
    out / "tokenizer_config.json",
    {
      # Not Qwen2Tokenizer: that class puts its own pre-tokenizer in the place of the file's.
      "tokenizer_class": "PreTrainedTokenizerFast",
      "add_prefix_space": False,
      "bos_token": None,
      "clean_up_tokenization_spaces": False,
      "eos_token": "<|im_end|>",
      "errors": "replace",
      "model_max_length": 32768,
      "pad_token": "<|endoftext|>",
      "split_special_tokens": False,
      "unk_token": None,
    },
  )
  (out / "chat_template.jinja").write_text(TEMPLATE)
  config(made).save_pretrained(out)
  images = Qwen2VLImageProcessorPil(
    patch_size=PATCH, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, image_mean=MEAN, image_std=STD
  )
  images.save_pretrained(out)
  GenerationConfig(
    do_sample=True,
    temperature=1.0,
    bos_token_id=made.token_to_id("<|endoftext|>"),
    eos_token_id=[made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")],
    pad_token_id=made.token_to_id("<|endoftext|>"),
  ).save_pretrained(out)


def _write_json(path: Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True, help="directory to write")
  out = parser.parse_args().out
  write(out)
  print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} to {out}")


if __name__ == "__main__":
  main()
