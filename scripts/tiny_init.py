"""Makes the Hugging Face directory of the embedded model, all but its weights.

python scripts/tiny_init.py --out assets/tiny-vl

A Qwen2.5-VL of under a million parameters that transformers loads as one: config.json, a
byte-level BPE tokenizer with Qwen's control tokens trained on the texts of all kinds of questions,
image processor settings, generation settings and a chat template. The same bytes on every run.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jinja2
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
from pixelis_jax.data.kinds import motion, objects, text
from pixelis_jax.tools import TOOLS, properties

VOCAB = 768  # Rows of the embedding; the tokenizer may fill a few less.
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
# What is always said in the same words is one token each, up to what varies. Else a prompt with all
# tools has 290 tokens more, and an episode that looks four times 1,200.
CALLS = (
  ("zoom_in", '"bbox_2d": ['),
  ("segment_object_at", '"bbox_2d": ['),
  ("get_properties", '"bbox_2d": ['),
  ("get_properties", '"mask": '),
  ("read_text", '"bbox_2d": ['),
  ("track_object", '"bbox_2d": ['),
  ("select_frames", '"times": ['),
)
PHRASES = (
  *(f'\n{{"name": "{name}", "arguments": {{{argument}' for name, argument in CALLS),
  '], "image": ',
  '], "frames": ',
  "system\n<tools>\n",
  "</tools>\nWrite ",
  "\none of these\n",
  "\nor an answer in \\boxed{}.",
  "Here is the zoomed image.",
  " pixels, box [",
  "], covers ",
  "% of the image.",
  "% of the image; ",
  "Region [",
  "]:\nColour: ",
  ":\nColour: ",
  "; mean RGB (",
  "), standard deviation (",
  ").\nTexture: ",
  " (contrast ",
  ", homogeneity ",
  ").\nShape: ",
  "; perimeter ",
  " pixels, circularity ",
  ", solidity ",
  ", eccentricity ",
  ", extent ",
  ", aspect ",
  ", no long axis.",
  ", long axis at ",
  " degrees.",
  "\nSize: ",
  ").\nSize: ",
  " as shown.\nPosition: centre [",
  " lines:\n[",
  "1 line:\n[",
  "Followed forward from ",
  " s, seen up to the end of the video at ",
  " s, lost after ",
  " s, found again at ",
  " s. Boxes are in the frame of image ",
  " s: seen at [",
  "]\nBy ",
  " s it had moved ",
  " in a straight line.\nImage ",
  ": the frame at ",
  " s, with its box and its path.",
  ": frame ",
)
# Of each kind of question what can stand in its blanks.
_COLORS = tuple((color,) for color in scenes.COLORS)
QUESTIONS = scenes.QUESTIONS | text.QUESTIONS | objects.QUESTIONS | motion.QUESTIONS
TARGETS = {
  "framed": _COLORS,
  "parity": _COLORS,
  "beside": [(f"{side} the {shape}",) for side in scenes.SIDES for shape in scenes.SHAPES],
  "read": _COLORS,
  "count": _COLORS,
  "clock": [(told.format(second),) for told in text.MOMENTS for second in range(text.SECONDS)],
  "larger": [(f"the {color} shape",) * 2 for color in scenes.COLORS],
  "color": tuple(itertools.product(objects.SPOTS, scenes.COLORS)),
  "shape": _COLORS,
  "moved": [(thing,) for thing in motion.SOLID],
  "hidden": tuple(itertools.product(motion.SOLID, motion.BEGAN.values())),
}
DOWN = ("upper", "middle", "lower")
TEXTURES = ("smooth", "textured", "rough")
SEPARATOR = ", "  # Of numbers; one token too.
# So are numbers: a coordinate next to the right one is then a likely mistake, and not, as where a
# tenth or a digit is missed, a look at something else. Others are digit by digit.
NUMBERS = range(10, 120)
# Patches of 10 pixels, not 14: the digits of a coordinate are then patch and place in it, which a
# small network learns; with 14 the last one stays at chance though the place is known to a pixel.
PATCH = 10
# A crop whose sides differ by less than about a quarter is shown at 80x80 and few at more. With a
# minimum equal to the maximum, rounding up to multiples of 20 would pass the maximum every time.
MIN_PIXELS, MAX_PIXELS = 60 * 80, 80 * 80
FRAMES = 2
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
  """What the tiny world is told, says and is shown, but for what is one token anyway.

  No random draws.
  """
  for kind, targets in TARGETS.items():
    for question in QUESTIONS[kind]:
      for target in targets:
        yield question.format(*target, target=target[0])
  for color in properties.NAMES:
    for number in range(10):
      yield f"{color} {number}%, {color} {number}%; "
  for words in (*motion.THIRDS, *map(" ".join, itertools.product(DOWN, motion.THIRDS)), "centre"):
    yield from [f"[7, 7], {words}."] * 10
  for across, down in itertools.product(("left", "right"), ("up", "down")):
    yield from [f"7 {across}, 7 {down}: 7"] * 10
  yield from (f"{word} " for word in (*TEXTURES, "Mask", "Image") * 20)
  yield from ["user\n", "assistant\n", "7]}}\n", "7}}\n", "Error: "] * 50
  digits = (*map(str, range(10)), "even", "odd")
  for answer in (*digits, *scenes.COLORS, *objects.NAMED, *motion.THIRDS):
    yield from [demos.ANSWER.format(answer)] * 10


def listed(schema: Mapping) -> str:
  """A tool as the template lists it in a prompt: its line."""
  prompt = jinja2.Template(TEMPLATE).render(tools=[schema], messages=[])
  return prompt.split("<tools>\n")[1].split("</tools>")[0]


def tokenizer() -> tokenizers.Tokenizer:
  """Qwen2's tokenizer in small: all 256 bytes, merges of the corpus, phrases, added tokens.

  Phrases are words of the vocabulary that no merges lead to: what a tool says is tokenised without
  added tokens, as it must not spell any.
  """
  phrases = (*PHRASES, *(listed(tool.schema) for tool in TOOLS["qwen"].values()))
  pieces = "|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))
  number = r"(?<![A-Za-z\d])(?:[1-9]\d|1[01]\d)(?![A-Za-z\d])"  # Codes are letter by letter.
  rule = rf"{pieces}|{SEPARATOR}(?=\d)|{number}|{PRETOKENIZE_REGEX}"
  as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
  made.normalizer = normalizers.NFC()
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(rule), behavior="isolated"), as_bytes]
  )
  made.decoder = decoders.ByteLevel()
  made.post_processor = processors.ByteLevel(trim_offsets=False)
  trainer = trainers.BpeTrainer(
    vocab_size=VOCAB - len(SPECIAL) - len(WRITTEN) - len(phrases) - len(NUMBERS) - 1,
    min_frequency=2,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(corpus(), trainer)
  told = json.loads(made.to_str())
  words = told["model"]["vocab"]
  for phrase in (SEPARATOR, *phrases, *map(str, NUMBERS)):
    ((word, _),) = as_bytes.pre_tokenize_str(phrase)
    words.setdefault(word, len(words))
  made = tokenizers.Tokenizer.from_str(json.dumps(told))
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
  # Of a film so many frames are seen, evenly chosen; tools show others.
  settings = {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": True}
  settings |= {"num_frames": FRAMES, "size": dict(images.size)}
  settings |= {"patch_size": PATCH, "image_mean": MEAN, "image_std": STD}
  _write_json(out / "video_preprocessor_config.json", settings)
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
