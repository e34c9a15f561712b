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
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Int32
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pixelis_jax.chat.images import ImageProcessor
from pixelis_jax.types import Patches, Pixels, Segment, Task, ToolResult

START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<|image_pad|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_STOPS = (END, "<|endoftext|>")
# What a policy never writes: turns it does not own, and images that are not there.
_BANNED = (START, IMAGE, "<|video_pad|>", _VISION_START, _VISION_END, "<|vision_pad|>")
# Where the message's text goes in a rendered turn: private-use characters, which no template holds.
_SLOT = "\ue000text\ue001"
ROLES = ("system", "user", "assistant", "tool")

Runs: TypeAlias = tuple[int | str, ...]


class Chat:
  """One checkpoint's conversation format with one set of tools; made by `from_directory`.

  `stop_ids` end a turn. `banned_ids` must not be sampled. `vocab_size` counts the tokenizer's ids;
  the model's embedding may have more rows, which stand for nothing.
  """

  def __init__(
    self,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageProcessor,
    *,
    tools: Sequence[Mapping],
    guidelines: str = "",
  ):
    self.tokenizer, self.images, self.guidelines = tokenizer, images, guidelines
    self.tools = [dict(tool) for tool in tools]
    added = tokenizer.added_tokens_decoder
    self._added = {token.content: id for id, token in added.items()}
    # Added tokens that a policy may write itself, such as <tool_call>; the others are control
    # tokens.
    self._written = {token.content: id for id, token in added.items() if not token.special}
    needed = (START, END, IMAGE, _VISION_START, _VISION_END)
    if missing := [token for token in needed if token not in self._added]:
      raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no tokens {missing}")
    self._plain = _without_added_tokens(tokenizer, self._added)
    self._encode = lru_cache(maxsize=4096)(self._encode_plain)
    self._prompts: dict[int, Runs] = {}  # By number of images.
    self._results: dict[int, Runs] = {}
    self.stop_ids = tuple(self._added[t] for t in _STOPS if t in self._added)
    self.banned_ids = tuple(self._added[t] for t in _BANNED if t in self._added)
    self.vocab_size = len(tokenizer)
    self.image_id = self._added[IMAGE]

  @classmethod
  def from_directory(
    cls, path: str | Path, *, tools: Sequence[Mapping], guidelines: str = ""
  ) -> "Chat":
    """Opens a Hugging Face directory: tokenizer, chat template, image processor; without network.

    Args:
      tools: schemas in OpenAI's function format, as `Toolbox.schemas` gives them.
      guidelines: added to every question after a blank line (Pixel-Reasoner puts its instructions
        there).

    Raises:
      FileNotFoundError: there is no tokenizer.json or no image processor's settings.
      ValueError: tokenizer.json is damaged, there is no chat template, or the tokenizer lacks
        Qwen's control tokens.
    """
    path = Path(path)
    _check_tokenizer(path / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.chat_template:
      raise ValueError(f"{path} has no chat template (chat_template.jinja)")
    images = ImageProcessor.from_directory(path)
    return cls(tokenizer, images, tools=tools, guidelines=guidelines)

  def prompt(self, task: Task) -> Segment:
    """System turn with the tools, user turn with images and question, the assistant's header."""
    count = len(task.images)
    if count not in self._prompts:
      self._prompts[count] = _split(self._render(count), self._added)
    question = f"{task.question}\n\n{self.guidelines}" if self.guidelines else task.question
    return self._segment(self._prompts[count], question, task.images)

  def result(self, result: ToolResult) -> Segment:
    """What follows the policy's <|im_end|> up to its next turn: a user turn, text then pictures.

    A text is shown as it is; an error that brings none is shown as "Error: " and its message.
    """
    if result.error is not None and result.images:
      raise ValueError(f"a failed call returned {len(result.images)} images: {result.error!r}")
    count = len(result.images)
    if count not in self._results:
      closing = self._render(0).partition(_SLOT)[2]
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
      messages: a list of {"role": ..., "content": text or parts}; a part is
        {"type": "text", "text": text} or {"type": "image", "image": name}. As read from a file: all
        of it is checked.
      load: a part's image name to its pixels.

    Raises:
      ValueError: messages of another form, or that the chat template refuses.
    """
    turns, names = _turns(messages)
    control = {t: f"\ue000{id}\ue001" for t, id in self._added.items() if t not in self._written}
    try:
      rendered = self._apply_template(
        [{**turn, "content": _each_text(turn["content"], control)} for turn in turns],
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
    if (shown := runs.count(self._added[IMAGE])) != len(names):
      raise ValueError(f"the chat template shows {shown} of {len(names)} images")
    images = tuple(self.images.process(load(name)) for name in names)
    return Segment(tokens=np.array(self._ids(runs, None, images), np.int32), images=images)

  def target(self, text: str) -> Int32[np.ndarray, " T"]:
    """A turn as the policy samples it: text, in which <tool_call> is one token, and <|im_end|>."""
    ids = self._ids(_split(text, self._written))
    return np.array([*ids, self._added[END]], np.int32)

  def decode(self, tokens: Int32[np.ndarray, " T"]) -> str:
    """The text of a sampled turn, without the token that ended it."""
    ids = tokens.tolist()
    if ids and ids[-1] in self.stop_ids:
      ids.pop()
    return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)

  def shown_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) the model is shown of an image this size: the frame of its coordinates."""
    return self.images.shown_size(height, width)

  def _render(self, images: int) -> str:
    """The prompt with `_SLOT` as question; the system turn is ours if the template has no tools."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": _SLOT}]
    turns = [{"role": "user", "content": content if images else _SLOT}]
    text = self._apply_template(turns, self.tools or None)
    if not all(tool["function"]["name"] in text for tool in self.tools):
      turns = [{"role": "system", "content": tools_system(self.tools)}, *turns]
      text = self._apply_template(turns, None)
    if text.count(_SLOT) != 1 or text.count(IMAGE) != images:
      raise ValueError(
        f"the chat template of {self.tokenizer.name_or_path} shows the question"
        f" {text.count(_SLOT)} times and {text.count(IMAGE)} of {images} images"
      )
    return text

  def _apply_template(
    self, turns: list[dict], tools: list[dict] | None, *, header: bool = True
  ) -> str:
    """The turns as text, and with `header` the assistant's after them."""
    return self.tokenizer.apply_chat_template(
      turns, tools=tools, tokenize=False, add_generation_prompt=header
    )

  def _segment(self, runs: Runs, text: str, pixels: Sequence[np.ndarray]) -> Segment:
    """The runs with text and images put in; a placeholder becomes one token a merged patch."""
    images = tuple(self.images.process(image) for image in pixels)
    return Segment(tokens=np.array(self._ids(runs, text, images), np.int32), images=images)

  def _ids(self, runs: Runs, text: str | None = None, images: Sequence[Patches] = ()) -> list[int]:
    waiting = iter(images)
    ids: list[int] = []
    for run in runs:
      if isinstance(run, str):
        # Joined before it is encoded: the text may merge with the template's words beside it.
        ids += self._encode(run if text is None else run.replace(_SLOT, text))
      elif run == self._added[IMAGE]:
        ids += [run] * (len(next(waiting).patches) // self.images.merge**2)
      else:
        ids.append(run)
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


def _turns(messages: object) -> tuple[list[dict], list[str]]:
  """The messages as a template takes them, and the names of their images in order."""
  if not isinstance(messages, list) or not messages:
    raise ValueError("messages must be a list of at least one message")
  turns, names = [], []
  for number, message in enumerate(messages, start=1):
    where = f"message {number}"
    _check_keys(message, ("role", "content"), where)
    role, content = message["role"], message["content"]
    if role not in ROLES:
      raise ValueError(f"{where}: role {role!r} must be one of {ROLES}")
    if isinstance(content, list):
      content = [_part(part, f"{where}, part {i}", names) for i, part in enumerate(content, 1)]
    elif not isinstance(content, str):
      raise ValueError(f"{where}: content must be a text or a list of parts, not {content!r}")
    turns.append({"role": role, "content": content})
  return turns, names


def _part(part: object, where: str, names: list[str]) -> dict:
  """One checked part of a message; an image's name goes to `names`."""
  kind = part.get("type") if isinstance(part, dict) else None
  if kind not in ("text", "image"):
    raise ValueError(f'{where} must be an object whose type is "text" or "image", not {part!r}')
  _check_keys(part, ("type", kind), where)
  if not isinstance(part[kind], str):
    raise ValueError(f"{where}: {kind} must be a string, not {part[kind]!r}")
  if kind == "text":
    return dict(part)
  names.append(part["image"])
  return {"type": "image"}


def _check_keys(given: object, wanted: Collection[str], where: str) -> None:
  if not isinstance(given, dict):
    raise ValueError(f"{where} must be an object with the keys {wanted}, not {given!r}")
  if unknown := sorted(given.keys() - set(wanted)):
    raise ValueError(f"{where} has unknown keys {unknown}; known: {wanted}")
  if missing := sorted(set(wanted) - given.keys()):
    raise ValueError(f"{where} lacks {missing}")


def _each_text(content: str | list[dict], table: Mapping[str, str]) -> str | list[dict]:
  """The content with every key of `table` in its texts replaced."""
  if isinstance(content, str):
    return _replace(content, table)
  return [
    {**part, "text": _replace(part["text"], table)} if "text" in part else part for part in content
  ]


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
