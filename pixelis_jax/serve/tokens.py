"""A picture of one sequence of a dataset, token by token: what SFT teaches of it is marked."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pixelis_jax.batch import Row, demo_row
from pixelis_jax.chat.family import family_of, frame_of
from pixelis_jax.chat.parse import parse_call
from pixelis_jax.chat.template import START, Chat
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.data import built, words
from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.types import Box, Pixels, value

SUPERVISED, CONTEXT, SHOWN = (176, 226, 184), (234, 234, 234), (206, 222, 244)
WIDTH = 1200  # Pixels of the picture, at most.
_INK, _PAPER, _FONT, _SIZE = (20, 20, 20), (255, 255, 255), "DejaVu Sans Mono", 15.0
# Pixels: line height, page margin, in and between tokens.
_LINE, _MARGIN, _PAD, _GAP = 26, 16, 3, 2


@value
class Cell:
  """A token where it is drawn. Placeholders of one image are one cell, of `count` tokens."""

  text: str
  box: Box
  color: tuple[int, int, int]
  count: int = 1


def masks(
  folder: Path,
  record: int,
  *,
  model: str | Path | None = None,
  tools: tuple[str, ...] | None = None,
) -> tuple[Row, Chat, str]:
  """A record of a dataset as SFT reads it, the chat that reads it, and a line about it.

  Args:
    model: directory of the policy that is taught; None: the one in whose coordinates it was built.
    tools: that its prompt offers; None: those that the dataset calls.

  Raises:
    ValueError: the dataset names no one model, there is no such record, or as `Dataset.demo` says.
    FileNotFoundError: there is no dataset.
  """
  dataset = built.Dataset.open(folder)
  if not 0 <= record < len(dataset):
    raise ValueError(f"record {record} must be 0 to {len(dataset) - 1}: {folder} has no other")
  model = dataset.about["manifest"].get("model") if model is None else model
  if model is None:
    raise ValueError(f"{folder} is made of parts: name the model")
  toolbox = Toolbox(
    _called(folder) if tools is None else tools,
    shown_size=frame_of(model),
    shown_frames=clips_of(model),
    unit=family_of(model).unit,
  )
  chat = Chat.from_directory(model, tools=toolbox.schemas)
  row = demo_row(dataset.demo(record, toolbox), chat)
  sort, weight = dataset[record].sort, dataset.weights[record]
  taught = f"{int(row.loss_mask.sum())} of {len(row.tokens)} tokens are in the loss"
  return row, chat, f"record {record}, {sort}, weight {weight:g}: {taught}"


def _called(folder: Path) -> tuple[str, ...]:
  """The tools that a dataset calls, in the order of their table."""
  texts = [turn["text"] for line in built.lines(folder) for turn in line["turns"][:-1]]
  names = {call.name for text in texts if (call := parse_call(text)) is not None}
  return tuple(operation for operation, tool in TOOLS["qwen"].items() if tool.name in names)


def layout(row: Row, chat: Chat, *, width: int = WIDTH) -> list[Cell]:
  """The tokens in lines: the text's own, and others where one is full. A space is between turns.

  A line's end is drawn as ⏎, a tab as ⇥.
  """
  font, cells = words.font(_FONT, _SIZE), []
  x, y = _MARGIN, _MARGIN + 2 * _LINE
  for text, taught, count in _runs(row, chat):
    shown = f"{text} × {count}" if count > 1 else text.replace("\n", "⏎").replace("\t", "⇥")
    across = round(font.getlength(shown)) + 2 * _PAD
    if text == START and cells:
      x, y = _MARGIN, y + _LINE * (1 if x == _MARGIN else 2)
    elif x + across > width - _MARGIN and x > _MARGIN:
      x, y = _MARGIN, y + _LINE
    color = SUPERVISED if taught else SHOWN if count > 1 else CONTEXT
    box = Box(float(x), float(y), float(x + across), float(y + _LINE - 2 * _GAP))
    cells.append(Cell(text=shown, box=box, color=color, count=count))
    x += across + _GAP
    if "\n" in text:
      x, y = _MARGIN, y + _LINE
  return cells


def _runs(row: Row, chat: Chat) -> list[tuple[str, bool, int]]:
  """(text, whether it is in the loss, how many tokens) of tokens, or of an image's placeholders."""
  decode = chat.tokenizer.backend_tokenizer.decode
  name = lambda id: decode([id], skip_special_tokens=False)
  pads, found = {chat.image_id, chat.video_id}, []
  tokens = zip(row.tokens.tolist(), row.loss_mask.tolist(), strict=True)
  for (id, taught), run in itertools.groupby(tokens):
    count = sum(1 for _ in run)
    whole = [(name(id), taught, count)]
    found += whole if id in pads else [(name(id), taught, 1)] * count
  return found


def draw(cells: list[Cell], about: str, *, width: int = WIDTH) -> Pixels:
  """The cells on a page, and above them a line about it and what the colours mean."""
  bottom = max(cell.box.y1 for cell in cells)
  page = Image.new("RGB", (width, round(bottom) + _MARGIN), _PAPER)
  pen, font = ImageDraw.Draw(page), words.font(_FONT, _SIZE)
  pen.text((_MARGIN, _MARGIN), about, _INK, font)
  legend = [("in the loss", SUPERVISED), ("context", CONTEXT), ("image", SHOWN)]
  x = width - _MARGIN
  for name, color in reversed(legend):
    across = round(font.getlength(name)) + 2 * _PAD
    x -= across + 4 * _GAP
    pen.rectangle((x, _MARGIN, x + across, _MARGIN + _LINE - 2 * _GAP), color)
    pen.text((x + _PAD, _MARGIN), name, _INK, font)
  for cell in cells:
    pen.rectangle((cell.box.x0, cell.box.y0, cell.box.x1 - 1, cell.box.y1 - 1), cell.color)
    pen.text((cell.box.x0 + _PAD, cell.box.y0), cell.text, _INK, font)
  return np.asarray(page)
