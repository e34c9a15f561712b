"""Kinds of questions that need READ_TEXT: small print on boards that an overview shows as blank.

  read    "What does the red sign say?"                  -> "K7RD"
  count   "How many lines of text are on the blue sign?" -> "4"
  clock   "What does the screen show at 0:07?"           -> "F3A"  (SELECT_FRAMES first)

Letters are 8 to 13 pixels high: 1 to 3 where the picture is shown in 80 x 60. Codes cannot be
guessed. On a notice rows are one and a half shown pixels apart, and lines of different lengths
stand in random ones of them: neither the height of the print nor its darkness tells their number.
"""

import numpy as np
from PIL import Image, ImageDraw

from pixelis_jax.data import composites, words
from pixelis_jax.data.demos import ANSWER, call_text
from pixelis_jax.data.kinds.puzzle import (
  Kind,
  Look,
  Materials,
  Puzzle,
  Solving,
  around,
  one,
  said,
  some,
)
from pixelis_jax.data.scenes import COLORS
from pixelis_jax.data.words import Line
from pixelis_jax.tools import read
from pixelis_jax.tools.places import pointed
from pixelis_jax.tools.sight import Sight
from pixelis_jax.types import (
  Box,
  Demo,
  DemoTurn,
  Pixels,
  Task,
  ToolCall,
  ToolResult,
  Video,
  value,
)

CANVAS = (480, 640)  # Height and width, as of all sizes here; in pixels.
SCREEN = (240, 320)  # Of a film.
BOARDS = 3
SIGN = (64, 104)  # A board with one line.
NOTICE, ROWS = (108, 112), 8  # A board with rows for lines.
SHOWN = (56, 88)  # The board that is a screen.
EM = (14.0, 18.0)  # Of letters on a sign; capitals are about 0.7 of it.
SMALL = (12.0, 14.0)  # On a screen,
TINY = (10.5, 12.0)  # and on a notice.
LETTERS = 4
LINES = (2, 6)  # Lines on a notice, fewest and most.
SECONDS = 10  # Of a film; its screen changes every second.
SLACK = 4.0  # Pixels that a solver's box is wider than a board, at most, on each side.
_WOBBLE = 12  # Levels by which a board's colour differs from its name's.
_PLAIN = tuple(name for name in words.FONTS if "Italic" not in name)

QUESTIONS = {
  "read": (
    "What does the {} sign say?",
    "Which code is on the {} sign?",
    "Read the {} sign.",
  ),
  "count": (
    "How many lines of text are on the {} sign?",
    "How many lines does the {} sign have?",
    "Count the lines of text on the {} sign.",
  ),
  "clock": (
    "What does the screen show at {}?",
    "Which code is on the screen at {}?",
    "Read the screen at {}.",
  ),
}
MOMENTS = ("0:{:02d}", "{} s", "second {}")


@value
class Board:
  """A plate of one named colour, and its lines in its own pixels."""

  name: str
  pixels: Pixels
  lines: tuple[Line, ...]


def board(
  rng: np.random.Generator,
  name: str,
  texts: list[str],
  *,
  size: tuple[int, int],
  ems: tuple[float, float],
  rows: int = 1,
) -> Board:
  """With each text in another one of equal rows, in black or white, whichever is clearer."""
  height, width = size
  ground = tuple(np.clip(np.add(COLORS[name], rng.integers(-_WOBBLE, _WOBBLE + 1, 3)), 0, 255))
  ground = tuple(int(c) for c in ground)
  color = max(((0, 0, 0), (255, 255, 255)), key=lambda c: words.contrast(c, ground))
  font, em = str(one(rng, _PLAIN)), float(rng.uniform(*ems))
  face, pitch = words.font(font, em), (height - 8) / rows
  image = Image.new("RGB", (width, height), ground)
  lines = []
  for text, row in zip(texts, sorted(some(rng, tuple(range(rows)), len(texts))), strict=True):
    left, top, right, bottom = face.getbbox(text)
    room = width - 12 - (right - left)
    if room < 0:
      raise ValueError(f"text {text!r} of {em:.0f} pixels an em does not fit a board of {size}")
    x = 6 + float(rng.uniform(0, room)) - left
    y = 4 + (row + 0.5) * pitch - (top + bottom) / 2
    ink = Image.new("L", (width, height))
    ImageDraw.Draw(ink).text((x, y), text, fill=255, font=face)
    image.paste(color, (0, 0), ink)
    x0, y0, x1, y1 = ink.getbbox()
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32)
    lines.append(Line(text=text, font=font, size=em, corners=corners, color=color, ground=ground))
  return Board(name=name, pixels=np.array(image), lines=tuple(lines))


def _hung(
  rng: np.random.Generator, materials: Materials, boards: list[Board]
) -> tuple[Pixels, list[Look], tuple[Line, ...], str]:
  """A photo with the boards, where each is, all lines in the photo's pixels, and its source."""
  photo = one(rng, materials.photos)
  canvas = composites.levels(composites.backdrop(rng, photo, CANVAS))
  corners = composites.apart(rng, [b.pixels.shape[:2] for b in boards], CANVAS)
  looks, lines = [], []
  for hung, (x, y) in zip(boards, corners, strict=True):
    height, width = hung.pixels.shape[:2]
    canvas[y : y + height, x : x + width] = hung.pixels
    looks.append(Look(name=hung.name, box=Box(*map(float, (x, y, x + width, y + height)))))
    lines += [_moved(line, x, y) for line in hung.lines]
  return canvas, looks, tuple(lines), photo.source


def _moved(line: Line, x: int, y: int) -> Line:
  corners = line.corners + np.array([x, y], np.float32)
  return Line(
    text=line.text,
    font=line.font,
    size=line.size,
    corners=corners,
    color=line.color,
    ground=line.ground,
  )


def _asked(rng: np.random.Generator, kind: str, target: str) -> str:
  return str(one(rng, QUESTIONS[kind])).format(target)


def misread(rng: np.random.Generator, text: str) -> tuple[str, ...]:
  """The text without one of its letters, and with two of them exchanged."""
  i = int(rng.integers(len(text)))
  swapped = [*text]
  different = [k for k in range(len(text) - 1) if text[k] != text[k + 1]]
  slips = [text[:i] + text[i + 1 :]]
  if different:
    k = different[int(rng.integers(len(different)))]
    swapped[k], swapped[k + 1] = swapped[k + 1], swapped[k]
    slips.append("".join(swapped))
  return tuple(slips)


def compose_read(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """Signs of different colours, a code on each; `lines` are in the order of the boards."""
  boards = [
    board(rng, name, [words.code(rng, LETTERS)], size=SIGN, ems=EM)
    for name in some(rng, tuple(COLORS), BOARDS)
  ]
  pixels, looks, lines, source = _hung(rng, materials, boards)
  asked, *others = looks
  answer = lines[0].text
  task = Task(
    id=id,
    images=(pixels,),
    question=_asked(rng, "read", asked.name),
    answer=answer,
    kind="read",
    boxes=(asked.box,),
  )
  return Puzzle(
    task=task,
    looks=(asked,),
    mistakes=tuple((other,) for other in others),
    slips=misread(rng, answer),
    lines=lines,
    sources=(source,),
  )


def solve_read(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  (look,) = puzzle.looks
  result = yield ToolCall(name="read_text", arguments=pointed(sight, around(rng, look.box, SLACK)))
  return _text(result)


def _text(result: ToolResult) -> str:
  """The line that was read with the most confidence; "" if there is none."""
  rows = [row.split(" ", 5)[4:] for row in result.text.splitlines() if row.startswith("[")]
  return max(rows, key=lambda row: float(row[0]))[1] if rows else ""


def compose_count(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """Notices of different colours, each with another number of lines, all in `lines`."""
  low, high = LINES
  counts = some(rng, tuple(range(low, high + 1)), BOARDS)
  boards = []
  for name, count in zip(some(rng, tuple(COLORS), BOARDS), counts, strict=True):
    texts = [words.code(rng, int(rng.integers(3, 8))) for _ in range(count)]
    boards.append(board(rng, name, texts, size=NOTICE, ems=TINY, rows=ROWS))
  pixels, looks, lines, source = _hung(rng, materials, boards)
  asked, *others = looks
  task = Task(
    id=id,
    images=(pixels,),
    question=_asked(rng, "count", asked.name),
    answer=str(counts[0]),
    kind="count",
    boxes=(asked.box,),
  )
  return Puzzle(
    task=task,
    looks=(asked,),
    mistakes=tuple((other,) for other in others),
    slips=(str(counts[0] - 1), str(counts[0] + 1)),
    lines=lines,
    sources=(source,),
  )


def solve_count(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  (look,) = puzzle.looks
  result = yield ToolCall(name="read_text", arguments=pointed(sight, around(rng, look.box, SLACK)))
  return said(r"^(\d+) lines?:", result) or "0"


def compose_clock(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """A screen before a photo; `lines[i]` is what it shows from second i on. Two frames a second."""
  photo = one(rng, materials.photos)
  canvas = composites.levels(composites.backdrop(rng, photo, SCREEN))
  name = str(one(rng, tuple(COLORS)))
  ((x, y),) = composites.apart(rng, [SHOWN], SCREEN)
  height, width = SHOWN
  frames, lines = [], []
  for _ in range(SECONDS):
    shown = board(rng, name, [words.code(rng, LETTERS)], size=SHOWN, ems=SMALL)
    canvas[y : y + height, x : x + width] = shown.pixels
    frames += [canvas.copy(), canvas.copy()]
    lines += [_moved(line, x, y) for line in shown.lines]
  second, other = (int(s) for s in rng.choice(SECONDS, 2, replace=False))
  time = str(one(rng, MOMENTS)).format(second)
  box = Box(*map(float, (x, y, x + width, y + height)))
  look = lambda s: Look(name="screen", box=box, time=float(s))
  video = Video(
    frames=np.stack(frames), times=np.arange(len(frames), dtype=np.float32) / np.float32(2)
  )
  answer = lines[second].text
  task = Task(
    id=id,
    images=(),
    question=_asked(rng, "clock", time),
    answer=answer,
    kind="clock",
    videos=(video,),
  )
  return Puzzle(
    task=task,
    looks=(look(second),),
    mistakes=((look(other),),),
    slips=misread(rng, answer),
    lines=tuple(lines),
    sources=(photo.source,),
  )


def solve_clock(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  (look,) = puzzle.looks
  yield ToolCall(name="select_frames", arguments={"times": [look.time]})
  image = len(sight.shown())
  result = yield ToolCall(
    name="read_text", arguments=pointed(sight, around(rng, look.box, SLACK), image)
  )
  return _text(result)


def recital(rng: np.random.Generator, count: int) -> Demo:
  """A lesson in saying what was read: after one call, code after code in READ_TEXT's words.

  It shows no pictures, and the call, whose place nobody can know, is not supervised.
  """
  codes = [words.code(rng, LETTERS) for _ in range(count)]
  x, y, width, height = (
    int(rng.integers(low, high)) for low, high in ((0, 50), (0, 40), (9, 24), (5, 16))
  )
  call = ToolCall(name="read_text", arguments={"bbox_2d": [x, y, x + width, y + height]})
  told = []
  for code in codes:
    x0, y0 = int(rng.integers(0, 70)), int(rng.integers(0, 54))
    box = [x0, y0, x0 + int(rng.integers(3, 10)), y0 + int(rng.integers(2, 5))]
    told.append(ToolResult(text=read.listing([(code, rng.uniform(0.9, 1.0), box)], 0, 1.0)))
  task = Task(
    id="recital",
    images=(),
    question=_asked(rng, "read", str(one(rng, tuple(COLORS)))),
    answer=codes[-1],
    kind="read",
  )
  answers = [ANSWER.format(code) for code in codes]
  said_all = zip(answers, [*told[1:], None], strict=True)
  turns = [DemoTurn(text=call_text(call), result=told[0], supervised=False)]
  turns += [DemoTurn(text=answer, result=shown) for answer, shown in said_all]
  return Demo(task=task, turns=tuple(turns))


KINDS = {
  "read": Kind(
    tools=("read_text",),
    compose=compose_read,
    solve=solve_read,
    about=lambda rng, puzzle, looks: _asked(rng, "read", looks[0].name),
  ),
  "count": Kind(
    tools=("read_text",),
    compose=compose_count,
    solve=solve_count,
    about=lambda rng, puzzle, looks: _asked(rng, "count", looks[0].name),
  ),
  "clock": Kind(tools=("select_frames", "read_text"), compose=compose_clock, solve=solve_clock),
}
