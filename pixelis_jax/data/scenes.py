"""Digit scenes: pictures in which a question can be answered only by looking closer.

A 400x400 canvas holds 2 to 3 digits in frames of distinct colours and a shape with 2 to 3 digits in
gray frames around it. Shown at 80x80, frames and shapes can be told apart but a digit, little more
than 2 pixels big, cannot be read (benchmarks/readability.py measures both). Size alone does not
ensure that: what an overview could show of the ink is removed (a spectral high pass) and the plate
is smudged; the fine strokes show only from near.

The three kinds:

  framed   "What is the digit in the red frame?"                 -> "7"
  beside   "What is the digit left of the star?"                 -> "3"
  parity   "Is the digit in the red frame even or odd?"          -> "odd"
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage, special

from pixelis_jax.data.digits import INK_MAX, Digits
from pixelis_jax.data.shifts import SHIFTS
from pixelis_jax.types import Box, Pixels, Task, value

CANVAS = 400  # Source pixels, as are all sizes below.
DIGIT = 12
PLATE = 64  # Outer side of a framed digit.
FRAME = 12
SHAPE = 64  # Not smaller than a plate: a group reaches no further than its parts.
DISTANCE = 76  # Between the centres of a shape and its neighbours.
MARGIN = 16  # To the border.
GAP = 12  # Between objects.
SKEW_SHARE = 0.6  # Of the favoured digit where answers are skewed.

KINDS = ("framed", "beside", "parity")
QUESTIONS = {
  "framed": (
    "What is the digit in the {target} frame?",
    "Which digit is in the {target} frame?",
  ),
  "beside": (
    "What is the digit {target}?",
    "Which digit is {target}?",
  ),
  "parity": (
    "Is the digit in the {target} frame even or odd?",
    "Is the {target} frame's digit even or odd?",
  ),
}
COLORS = {
  "red": (220, 40, 40),
  "green": (40, 190, 60),
  "blue": (50, 80, 240),
  "yellow": (235, 215, 50),
  "purple": (165, 60, 205),
  "cyan": (50, 205, 220),
}
GRAY = (165, 165, 165)
SHAPES = ("star", "circle", "triangle")
SIDES = {  # Phrase -> direction (x, y) from the shape.
  "left of": (-1, 0),
  "right of": (1, 0),
  "above": (0, -1),
  "below": (0, 1),
}
_INTERIOR = PLATE - 2 * FRAME
_FACE = 120.0  # Grey level of an unwritten plate.
_INK = 260.0  # Grey levels from there to full ink, before the high pass.
_STRENGTH = (0.8, 1.0)  # Of the ink, drawn per plate.
_STROKE = 8.0  # Steepness of the ink's edge: handwriting magnified by itself is a blur.
_ETCH = 0.14  # Cycles a source pixel: what is coarser is removed from the ink. An overview's finest
_ETCH_EDGE = 0.01  # is 0.1, but its resampling lets some of what lies beyond through.
_SMUDGE_SIGMA = 2.0  # Source pixels, and root mean square in grey levels.
_SMUDGE = 6.0
_TRIES = 64
_WALL = 25.0  # Grey level of the wall.
_WARM = (90, 20, 0)  # Levels that the light adds from left to right,
_COOL = (0, 20, 90)  # and from top to bottom.


@value
class Plate:
  """A framed digit: upper left corner in source pixels, and what a question can call it."""

  x: int
  y: int
  color: tuple[int, int, int]
  target: str
  digit: int  # Row of the split's Digits.

  @property
  def box(self) -> Box:
    return Box(float(self.x), float(self.y), float(self.x + PLATE), float(self.y + PLATE))


@value
class Scene:
  """A task and every framed digit of its picture, the evidence among them."""

  task: Task
  plates: tuple[Plate, ...]


def compose(
  rng: np.random.Generator,
  digits: Digits,
  *,
  id: str,
  kind: str | None = None,
  shift: str = "none",
  skew: int | None = None,
) -> Scene:
  """One scene, a function of the generator's state; the shift changes neither layout nor question.

  Args:
    rng: Advanced by a number of draws that depends on what is drawn.
    digits: The split all digits of the scene come from.
    id: Of the task.
    kind: One of `KINDS`; None draws one.
    shift: A name in `SHIFTS`.
    skew: The digit `SKEW_SHARE` of the questions ask about; None asks about all equally often.
      Digits not asked about are drawn from the whole split either way.

  The evidence box is the asked plate, frame included, in source pixels.
  """
  check(kind=kind, shift=shift, skew=skew)
  shift_rng = np.random.default_rng(int(rng.integers(2**63)))
  kind = kind or KINDS[rng.integers(len(KINDS))]
  label = _asked_label(rng, skew)
  plates, shape = _layout(rng, digits)
  candidates = [i for i, plate in enumerate(plates) if kind in kinds_of(plate)]
  asked = candidates[rng.integers(len(candidates))]
  row = int(rng.choice(np.flatnonzero(digits.labels == label)))
  plates[asked] = dataclasses.replace(plates[asked], digit=row)
  question = worded(rng, kind, plates[asked])
  answer = ("even", "odd")[label % 2] if kind == "parity" else str(label)
  task = Task(
    id=id,
    images=(_paint(rng, digits, plates, shape, shift, shift_rng),),
    question=question,
    answer=answer,
    kind=kind,
    boxes=(plates[asked].box,),
  )
  return Scene(task=task, plates=tuple(plates))


def kinds_of(plate: Plate) -> tuple[str, ...]:
  """The kinds of questions that can be about a plate."""
  return tuple(kind for kind in KINDS if (plate.color == GRAY) == (kind == "beside"))


def worded(rng: np.random.Generator, kind: str, plate: Plate) -> str:
  """A question of this kind about a plate."""
  return QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))].format(target=plate.target)


def check(*, kind: str | None, shift: str, skew: int | None) -> None:
  """Raises ValueError for what `compose` does not know."""
  if kind is not None and kind not in KINDS:
    raise ValueError(f"kind {kind!r} must be one of {KINDS}")
  if shift not in SHIFTS:
    raise ValueError(f"shift {shift!r} must be one of {tuple(SHIFTS)}")
  if skew is not None and not 0 <= skew <= 9:
    raise ValueError(f"skew {skew} must be a digit 0 to 9, or None")


def _asked_label(rng: np.random.Generator, skew: int | None) -> int:
  if skew is None:
    return int(rng.integers(10))
  if rng.random() < SKEW_SHARE:
    return skew
  return int((skew + 1 + rng.integers(9)) % 10)


def _layout(rng: np.random.Generator, digits: Digits) -> tuple[list[Plate], tuple[str, int, int]]:
  """Plates, and the shape with its upper left corner."""
  (name,) = _some(rng, SHAPES, 1, 1)
  sides = _some(rng, tuple(SIDES), 2, 3)
  colors = _some(rng, tuple(COLORS), 2, 3)
  left, up, right, down = _extent(sides)
  group, *corners = _place(rng, [(left + right, up + down)] + [(PLATE, PLATE)] * len(colors))
  x, y = group[0] + left, group[1] + up  # The shape's centre.
  framed = []  # Upper left corner, colour, target.
  for side in sides:
    dx, dy = SIDES[side]
    place = x + dx * DISTANCE - PLATE // 2, y + dy * DISTANCE - PLATE // 2
    framed.append((place, GRAY, f"{side} the {name}"))
  for color, corner in zip(colors, corners, strict=True):
    framed.append((corner, COLORS[color], color))
  rows = rng.integers(len(digits.labels), size=len(framed)).tolist()
  plates = [
    Plate(x=x, y=y, color=color, target=target, digit=row)
    for ((x, y), color, target), row in zip(framed, rows, strict=True)
  ]
  return plates, (name, x - SHAPE // 2, y - SHAPE // 2)


def _some(rng: np.random.Generator, names: tuple[str, ...], low: int, high: int) -> list[str]:
  """Between `low` and `high` different names."""
  return [names[i] for i in rng.permutation(len(names))[: rng.integers(low, high + 1)]]


def _extent(sides: list[str]) -> tuple[int, int, int, int]:
  """How far a group reaches from its shape's centre: left, up, right, down."""
  reach = {SIDES[side]: DISTANCE + PLATE // 2 for side in sides}
  left, up, right, down = (
    reach.get(direction, SHAPE // 2) for direction in ((-1, 0), (0, -1), (1, 0), (0, 1))
  )
  return left, up, right, down


def _place(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
  """Upper left corners of rectangles (width, height), `GAP` apart and `MARGIN` from the border."""
  while True:
    placed = np.zeros((0, 4), np.int64)
    for width, height in sizes:
      x = rng.integers(MARGIN, CANVAS - MARGIN - width + 1, size=(_TRIES, 1))
      y = rng.integers(MARGIN, CANVAS - MARGIN - height + 1, size=(_TRIES, 1))
      x0, y0, x1, y1 = (placed[None, :, i] for i in range(4))
      apart = (
        (x >= x1 + GAP) | (x + width + GAP <= x0) | (y >= y1 + GAP) | (y + height + GAP <= y0)
      ).all(1)
      if not apart.any():
        break
      first = int(apart.argmax())
      left, top = x[first, 0], y[first, 0]
      placed = np.concatenate([placed, [[left, top, left + width, top + height]]])
    else:
      return [(int(row[0]), int(row[1])) for row in placed]


def _paint(
  rng: np.random.Generator,
  digits: Digits,
  plates: list[Plate],
  shape: tuple[str, int, int],
  shift: str,
  shift_rng: np.random.Generator,
) -> Pixels:
  canvas = _background(rng)
  name, x, y = shape
  mask = shape_mask(name)[:, :, None]
  area = canvas[y : y + SHAPE, x : x + SHAPE]
  light = np.float32(rng.integers(200, 245))
  area[:] = (area * (1 - mask) + light * mask).astype(np.uint8)
  wobble = rng.integers(-12, 13, size=(len(plates), 3))
  for plate, offset in zip(plates, wobble, strict=True):
    area = canvas[plate.y : plate.y + PLATE, plate.x : plate.x + PLATE]
    area[:] = np.clip(np.asarray(plate.color) + offset, 0, 255).astype(np.uint8)
    inside = _interior(digits.images[plate.digit], shift, rng, shift_rng)
    area[FRAME:-FRAME, FRAME:-FRAME] = inside
  change = SHIFTS[shift].image
  return canvas if change is None else change(canvas, shift_rng)


def _interior(
  image: UInt8[np.ndarray, "8 8"],
  shift: str,
  rng: np.random.Generator,
  shift_rng: np.random.Generator,
) -> UInt8[np.ndarray, "side side 3"]:
  strength = np.float32(_INK * rng.uniform(*_STRENGTH))
  row, column = rng.integers(CANVAS - _INTERIOR, size=2)
  smudge = _smudges()[row : row + _INTERIOR, column : column + _INTERIOR]
  gray = np.float32(_FACE) + strength * _etching(image.tobytes(), shift) + smudge
  pixels = np.repeat(gray[:, :, None], 3, axis=2)
  change = SHIFTS[shift].plate
  if change is not None:
    pixels = change(np.clip(pixels, 0.0, 255.0), shift_rng)
  return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=8192)
def _etching(image: bytes, shift: str) -> Float32[np.ndarray, "side side"]:
  """The fine part of a plate's ink: the digit, `DIGIT` pixels big, in the middle."""
  glyph = np.frombuffer(image, np.uint8).reshape(8, 8).astype(np.float32) / np.float32(INK_MAX)
  big = Image.fromarray(glyph).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
  stroke = special.expit(np.float32(_STROKE) * (np.asarray(big) - np.float32(0.5)))
  start = (_INTERIOR - DIGIT) // 2
  ink = np.zeros((_INTERIOR, _INTERIOR), np.float32)
  ink[start : start + DIGIT, start : start + DIGIT] = stroke
  change = SHIFTS[shift].ink
  return _high_pass(ink if change is None else change(ink))


def _high_pass(ink: Float32[np.ndarray, "side side"]) -> Float32[np.ndarray, "side side"]:
  """What of the ink varies faster than `_ETCH` along either axis; periodic beyond a margin."""
  padded = np.pad(ink, _INTERIOR // 2)
  frequency = np.abs(np.fft.fftfreq(len(padded)))
  kept = special.expit((np.maximum(frequency[:, None], frequency[None, :]) - _ETCH) / _ETCH_EDGE)
  fine = np.fft.ifft2(np.fft.fft2(padded) * kept).real.astype(np.float32)
  return fine[_INTERIOR // 2 : -_INTERIOR // 2, _INTERIOR // 2 : -_INTERIOR // 2]


@functools.cache
def _smudges() -> Float32[np.ndarray, "height width"]:
  """Gaussian noise smoothed to `_SMUDGE_SIGMA`; plates are windows of it."""
  white = np.random.default_rng(1).standard_normal((CANVAS, CANVAS), dtype=np.float32)
  smooth = ndimage.gaussian_filter(white, _SMUDGE_SIGMA, mode="wrap")
  return smooth * (np.float32(_SMUDGE) / smooth.std())


@functools.cache
def shape_mask(name: str) -> Float32[np.ndarray, "side side"]:
  """Coverage 0 to 1 of a shape, anti-aliased."""
  scale = 8
  image = Image.new("L", (SHAPE * scale, SHAPE * scale))
  draw, size = ImageDraw.Draw(image), SHAPE * scale
  if name == "circle":
    draw.ellipse((0, 0, size - 1, size - 1), fill=255)
  else:
    points, inner = {"star": (5, 0.42), "triangle": (3, 0.5)}[name]
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner) * (size / 2)
    corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1) + size / 2
    draw.polygon([(float(x), float(y)) for x, y in corners], fill=255)
  small = image.resize((SHAPE, SHAPE), Image.Resampling.BOX)
  return np.asarray(small, np.float32) / np.float32(255)


def _background(rng: np.random.Generator) -> Pixels:
  """A dark wall, warm light from the right and cool light from below, grain of at most 8 levels.

  The light is the same in each scene: like a photograph, a picture tells where in it a thing is.
  """
  y, x = (int(i) for i in rng.integers(CANVAS, size=2))
  # At most 25 + 90 + 20 + 8: uint8 does not wrap.
  flat = _grain()[y : y + CANVAS, 3 * x : 3 * (x + CANVAS)] + _light()
  return flat.reshape(CANVAS, CANVAS, 3)


@functools.cache
def _light() -> UInt8[np.ndarray, "height columns"]:
  """The lit wall, channels interleaved in a row."""
  ramp = np.linspace(0.0, 1.0, CANVAS)[:, None]
  columns = (_WALL + ramp * np.array(_WARM)[None, :]).astype(np.uint8)
  rows = (ramp * np.array(_COOL)[None, :]).astype(np.uint8)
  return (columns[None, :, :] + rows[:, None, :]).reshape(CANVAS, -1)


@functools.cache
def _grain() -> UInt8[np.ndarray, "height columns"]:
  """Gray grain, 0 to 8, of twice the canvas's size and periodic; channels interleaved in a row."""
  coarse = np.random.default_rng(0).integers(0, 256, (CANVAS // 4, CANVAS // 4), dtype=np.uint8)
  image = Image.fromarray(coarse).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
  grain = (np.asarray(image).astype(np.int32) * 8 // 255).astype(np.uint8)
  return np.repeat(np.tile(grain, (2, 2)), 3, axis=1)
