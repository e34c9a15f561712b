"""Messages to tokens in the checkpoint's own chat format, and sampled tokens back to text.

A conversation is a sequence of runs: an added token (`<|im_end|>`, `<tool_call>`, an image
placeholder) or the plain text between two of them. Runs are found in the rendered template before
any user or tool text is put in, and plain runs are encoded by a copy of the tokenizer that knows no
added tokens. So a user or a tool can spell `<|im_end|>` and it stays text, while everything else is
tokenised as transformers does it: added tokens split the text there too, and nothing merges across
them.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Int32
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pixelis_jax.chat.family import Family, family_of, images_of
from pixelis_jax.chat.images import ImageProcessor
from pixelis_jax.chat.messages import Clip, read_messages
from pixelis_jax.chat.videos import VideoProcessor
from pixelis_jax.types import Patches, Pixels, Segment, Task, ToolResult, Video

START, END, IMAGE, VIDEO = "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_STOPS = (END, "<|endoftext|>")
# What a policy never writes: turns it does not own, and images that are not there.
_BANNED = (START, IMAGE, VIDEO, _VISION_START, _VISION_END, "<|vision_pad|>")
# Where the message's text goes in a rendered turn: private-use characters, which no template holds.
_SLOT = "\ue000text\ue001"

Runs: TypeAlias = tuple[int | str, ...]


class Chat:
  """One checkpoint's conversation format with one set of tools; made by `from_directory`.

  `stop_ids` end a turn. `banned_ids` must not be sampled. `vocab_size` counts the tokenizer's ids;
  the model's embedding may have more rows, which stand for nothing. `image_id` and `video_id` are
  the placeholders', None where the tokenizer has none; `images` and `videos` are None for a
  text-only model.
  """

  def __init__(
    self,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    images: ImageProcessor | None,
    videos: VideoProcessor | None,
    *,
    tools: Sequence[Mapping],
    guidelines: str = "",
  ):
    self.tokenizer, self.family, self.guidelines = tokenizer, family, guidelines
    self.images, self.videos = images, videos
    self.tools = [dict(tool) for tool in tools]
    added = tokenizer.added_tokens_decoder
    self._added = {token.content: id for id, token in added.items()}
    # Added tokens that a policy may write itself, such as <tool_call>; the others are control
    # tokens.
    self._written = {token.content: id for id, token in added.items() if not token.special}
    needed = (START, END, *((IMAGE, VIDEO, _VISION_START, _VISION_END) if family.sees else ()))
    if missing := [token for token in needed if token not in self._added]:
      raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no tokens {missing}")
    self._plain = _without_added_tokens(tokenizer, self._added)
    self._encode = lru_cache(maxsize=4096)(self._encode_plain)
    self._prompts: dict[tuple[int, int], Runs] = {}  # By numbers of images and videos.
    self._results: dict[int, Runs] = {}
    self.stop_ids = tuple(self._added[t] for t in _STOPS if t in self._added)
    self.banned_ids = tuple(self._added[t] for t in _BANNED if t in self._added)
    self.vocab_size = len(tokenizer)
    self.image_id, self.video_id = self._added.get(IMAGE), self._added.get(VIDEO)

  @classmethod
  def from_directory(
    cls, path: str | Path, *, tools: Sequence[Mapping], guidelines: str = ""
  ) -> "Chat":
    """Opens a Hugging Face directory: tokenizer, template, processors; without network.

    Qwen2.5-VL, Qwen3-VL, or text-only Qwen3 or Llama, as config.json says.

    Args:
      tools: schemas in OpenAI's function format, as `Toolbox.schemas` gives them.
      guidelines: added to every question after a blank line (Pixel-Reasoner puts its instructions
        there).

    Raises:
      FileNotFoundError: there is no tokenizer.json or no image processor's settings.
      ValueError: tokenizer.json is damaged, there is no chat template, the tokenizer lacks Qwen's
        control tokens, or the model is of no family we know.
    """
    path = Path(path)
    _check_tokenizer(path / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.chat_template:
      raise ValueError(f"{path} has no chat template (chat_template.jinja)")
    family, images = family_of(path), images_of(path)
    videos = VideoProcessor.from_directory(path) if family.sees else None
    return cls(tokenizer, family, images, videos, tools=tools, guidelines=guidelines)

  def prompt(self, task: Task) -> Segment:
    """System turn with the tools, user turn, the assistant's header.

    The user turn shows the images, then the videos, then the question. A video of Qwen2.5-VL is one
    run of placeholders. One of Qwen3-VL has a run for each step in its own vision brackets, behind
    "<t seconds>"; the template's brackets stay around all of them, as in transformers 5.24.

    Raises:
      ValueError: images or videos for a text-only model, or of a size that cannot be shown.
    """
    counts = len(task.images), len(task.videos)
    self._check_sight(*counts)
    if counts not in self._prompts:
      self._prompts[counts] = _split(self._render(*counts), self._added)
    question = f"{task.question}\n\n{self.guidelines}" if self.guidelines else task.question
    return self._segment(self._prompts[counts], question, (*task.images, *task.videos))

  def result(self, result: ToolResult) -> Segment:
    """What follows the policy's <|im_end|> up to its next turn: a user turn, text then pictures.

    A text is shown as it is; an error that brings none is shown as "Error: " and its message.
    """
    if result.error is not None and result.images:
      raise ValueError(f"a failed call returned {len(result.images)} images: {result.error!r}")
    count = len(result.images)
    self._check_sight(count, 0)
    if count not in self._results:
      closing = self._render(0, 0).partition(_SLOT)[2]
      picture = f"{_VISION_START}{IMAGE}{_VISION_END}"
      turn = f"\n{START}user\n{_SLOT}{picture * count}{closing}"
      self._results[count] = _split(turn, self._added)
    text = f"Error: {result.error}" if result.error is not None and not result.text else result.text
    return self._segment(self._results[count], text, [p.pixels for p in result.images])

  def messages(self, messages: object, load: Callable[[str], Pixels]) -> Segment:
    """A whole conversation as transformers renders it, with no header of a next turn after it.

    One difference: a text that spells a control token stays text (`<tool_call>` is none). This
    chat's tools and guidelines are left out; a system message may hold them.

    Args:
      messages: what `read_messages` takes, as read from a file: all of it is checked.
      load: the name of an image or of a video's frame to its pixels.

    Raises:
      ValueError: messages of another form, or that the chat template refuses; images or videos for
        a text-only model, or such as cannot be shown.
    """
    turns, shown = read_messages(messages)
    clips = sum(isinstance(one, Clip) for one in shown)
    self._check_sight(len(shown) - clips, clips)
    control = {t: f"\ue000{id}\ue001" for t, id in self._added.items() if t not in self._written}
    try:
      rendered = self._apply_template(
        [{**turn, "content": self._content(turn["content"], control)} for turn in turns],
        None,
        header=False,
      )
    except jinja2.TemplateError as error:
      raise ValueError(f"the chat template refuses the messages: {error}") from error
    spelled = {shield: token for token, shield in control.items()}
    runs = tuple(
      _replace(run, spelled) if isinstance(run, str) else run
      for run in _split(rendered, self._added)
    )
    expected = [self.video_id if isinstance(one, Clip) else self.image_id for one in shown]
    found = [run for run in runs if run in (self.image_id, self.video_id)]
    if found != expected:
      raise ValueError(
        f"the chat template shows {found.count(self.image_id)} of {len(shown) - clips} images and"
        f" {found.count(self.video_id)} of {clips} videos, or not in their order"
      )
    pixels = [one.read(load) if isinstance(one, Clip) else load(one) for one in shown]
    return self._segment(runs, None, pixels)

  def target(self, text: str) -> Int32[np.ndarray, " T"]:
    """A turn as the policy samples it: text, in which <tool_call> is one token, and <|im_end|>."""
    ids = self._encoded(_split(text, self._written))
    return np.array([*ids, self._added[END]], np.int32)

  def decode(self, tokens: Int32[np.ndarray, " T"]) -> str:
    """The text of a sampled turn, without the token that ended it."""
    ids = tokens.tolist()
    if ids and ids[-1] in self.stop_ids:
      ids.pop()
    return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

  def shown_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) the model is shown of an image this size, in pixels."""
    self._check_sight(1, 0)
    return self.images.shown_size(height, width)

  def frame(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the frame in which the model gives places in an image this size.

    Qwen2.5-VL's is the size shown, in pixels; Qwen3-VL's is 1000 x 1000, whatever the size.
    """
    return self.family.frame(self.images, height, width)

  def patches(self, shown: Pixels | Video) -> Patches:
    """An image or a video as this chat's segments hold it. Only of a model that sees."""
    return (self.videos if isinstance(shown, Video) else self.images).process(shown)

  def _check_sight(self, images: int, videos: int) -> None:
    if self.images is None and (images or videos):
      raise ValueError(
        f"the model of {self.tokenizer.name_or_path} is text-only: it cannot be shown {images}"
        f" images and {videos} videos"
      )

  def _render(self, images: int, videos: int) -> str:
    """The prompt with `_SLOT` as question; the system turn is ours if the template has no tools."""
    shown = [*[{"type": "image"}] * images, *[{"type": "video"}] * videos]
    turns = [{"role": "user", "content": [*shown, {"type": "text", "text": _SLOT}]}]
    if not shown:
      turns[0]["content"] = _SLOT
    text = self._apply_template(turns, self.tools or None)
    if not all(tool["function"]["name"] in text for tool in self.tools):
      turns = [{"role": "system", "content": tools_system(self.tools)}, *turns]
      text = self._apply_template(turns, None)
    counts = text.count(_SLOT), text.count(IMAGE), text.count(VIDEO)
    if counts != (1, images, videos):
      raise ValueError(
        f"the chat template of {self.tokenizer.name_or_path} shows the question {counts[0]} times"
        f" and {counts[1]} of {images} images and {counts[2]} of {videos} videos"
      )
    return text

  def _content(self, content: str | list[dict], table: Mapping[str, str]) -> str | list[dict]:
    """The content with every key of `table` in its texts replaced.

    Templates of text-only models drop parts without a word: there a list becomes one text.
    """
    if isinstance(content, list) and self.images is None:
      content = "".join(part["text"] for part in content)
    if isinstance(content, str):
      return _replace(content, table)
    return [
      {**part, "text": _replace(part["text"], table)} if "text" in part else part
      for part in content
    ]

  def _apply_template(
    self, turns: list[dict], tools: list[dict] | None, *, header: bool = True
  ) -> str:
    """The turns as text, and with `header` the assistant's after them."""
    return self.tokenizer.apply_chat_template(
      turns, tools=tools, tokenize=False, add_generation_prompt=header
    )

  def _segment(self, runs: Runs, text: str | None, shown: Sequence[Pixels | Video]) -> Segment:
    """The runs with `text` for `_SLOT`, and for each placeholder the next of what is shown."""
    looks = [self._look(one) for one in shown]
    ids = self._encoded(self._filled(runs, text, iter(looks)))
    return Segment(tokens=np.array(ids, np.int32), images=tuple(patches for patches, _ in looks))

  def _look(self, shown: Pixels | Video) -> tuple[Patches, Runs]:
    """Patches, and what replaces their placeholder: one token a merged patch, times where told."""
    patches = self.patches(shown)
    if not isinstance(shown, Video):
      return patches, (self.image_id,) * (len(patches.patches) // self.images.merge**2)
    count = len(patches.patches) // self.videos.merge**2
    if not self.family.timed:
      return patches, (self.video_id,) * count
    runs: list[int | str] = []
    for time in self.videos.seconds(shown):
      step = [self.video_id] * (count // patches.grid[0])
      opening, closing = self._added[_VISION_START], self._added[_VISION_END]
      runs += [f"<{time:.1f} seconds>", opening, *step, closing]
    return patches, tuple(runs)

  def _filled(
    self, runs: Runs, text: str | None, looks: Iterator[tuple[Patches, Runs]]
  ) -> Iterator[int | str]:
    for run in runs:
      if isinstance(run, str):
        yield run if text is None else run.replace(_SLOT, text)
      elif run in (self.image_id, self.video_id):
        yield from next(looks)[1]
      else:
        yield run

  def _encoded(self, runs: Iterable[int | str]) -> list[int]:
    """Texts beside each other are joined before they are encoded: their words may merge."""
    ids: list[int] = []
    for plain, group in groupby(runs, key=lambda run: isinstance(run, str)):
      found = list(group)
      ids += self._encode("".join(found)) if plain else found
    return ids

  def _encode_plain(self, text: str) -> list[int]:
    return self._plain.encode(text, add_special_tokens=False).ids


def tools_system(tools: Sequence[Mapping]) -> str:
  """The Nous system turn Qwen2.5 policies were trained with, as qwen_agent writes it."""
  listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
  return (
    "You are a helpful assistant.\n\n# Tools\n\n"
    "You may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    f"<tools>\n{listed}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within"
    " <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
  )


def _replace(text: str, table: Mapping[str, str]) -> str:
  return "".join(_split(text, table))


def _split(text: str, added: Mapping[str, int | str]) -> Runs:
  """What `added` has for the tokens, and the plain text between them; the longest token wins."""
  if not added:
    return (text,) if text else ()
  longest_first = sorted(added, key=len, reverse=True)
  pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
  return tuple(added.get(piece, piece) for piece in pieces if piece)


def _check_tokenizer(file: Path) -> None:
  """transformers' own errors for a damaged file name neither the file nor what is wrong."""
  if not file.is_file():
    raise FileNotFoundError(f"{file.parent} has no tokenizer.json")
  try:
    definition = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  if not isinstance(definition, dict) or not {"added_tokens", "model"} <= definition.keys():
    raise ValueError(f'{file} must be an object with "added_tokens" and "model"')


def _without_added_tokens(
  tokenizer: PreTrainedTokenizerBase, added: Collection[str]
) -> tokenizers.Tokenizer:
  """The same tokenizer for text alone: what it encodes never holds an added token's id."""
  definition = json.loads(tokenizer.backend_tokenizer.to_str())
  definition["added_tokens"] = []
  plain = tokenizers.Tokenizer.from_str(json.dumps(definition))
  ids = {tokenizer.convert_tokens_to_ids(token) for token in added}
  for token in added:
    if not ids.isdisjoint(plain.encode(token, add_special_tokens=False).ids):
      raise ValueError(
        f"{tokenizer.name_or_path}: text that spells {token} cannot be kept apart from it"
      )
  return plain
