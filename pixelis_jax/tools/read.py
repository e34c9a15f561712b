"""READ_TEXT: what is written in an image, by RapidOCR's shipped models or by Tesseract.

cv2, rapidocr and tesserocr take seconds to import and are needed here alone, so the functions that
use them import them.
"""

import copy
import dataclasses
import functools
import importlib.util
import math
import os
import string
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Float32, Int
from PIL import Image

from pixelis_jax.tools import places, views
from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.types import Box, Picture, Pixels, ToolResult

# Language -> its letters beyond a to z, and the name of Tesseract's data. The shipped recogniser
# gets at most 6 of 100 characters of these wrong (benchmarks/read_text.py). It knows no Cyrillic,
# Korean or Arabic letter, and few of Vietnamese and of accented Greek.
LANGUAGES: dict[str, tuple[str, str]] = {
  "en": ("", "eng"),
  "de": ("äöüß", "deu"),
  "fr": ("àâæçéèêëîïôœùûüÿ", "fra"),
  "es": ("áéíñóúü", "spa"),
  "pt": ("àáâãçéêíóôõúü", "por"),
  "it": ("àèéìíîòóùú", "ita"),
  "nl": ("áäéèëïíóöúü", "nld"),
  "da": ("æøåéá", "dan"),
  "no": ("æøåéóòô", "nor"),
  "sv": ("åäöé", "swe"),
  "fi": ("åäöšž", "fin"),
  "pl": ("ąćęłńóśźż", "pol"),
  "cs": ("áčďéěíňóřšťúůýž", "ces"),
  "hu": ("áéíóöőúüű", "hun"),
  "ro": ("ăâîșțşţ", "ron"),
  "hr": ("čćđšž", "hrv"),
  "tr": ("çğıİöşüâîû", "tur"),
  "zh": ("", "chi_sim"),
  "ja": ("", "jpn"),
}
# Where these languages' other letters are: beginnings of names in Unicode.
_SCRIPTS = {
  "zh": ("CJK", "IDEOGRAPHIC"),
  "ja": ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
}
READERS = ("rapidocr", "tesseract")
ANY = "all known letters"

READ_TEXT = {
  "type": "function",
  "function": {
    "name": "read_text",
    "description": "Read what is written in an image or in a region of it.",
    "parameters": {
      "type": "object",
      "properties": {
        "bbox_2d": {
          **places.BOX,
          "description": "The region [x1, y1, x2, y2] in pixels of the image as shown. Default: all"
          " of it.",
        },
        "image": places.IMAGE,
        "language": {
          "type": "string",
          "enum": list(LANGUAGES),
          "description": f"Read only letters of this language. Default: {ANY}.",
        },
      },
      "required": [],
    },
  },
}

# Text; confidence in [0, 1]; corners x0, y0 to x3, y3 in pixels, clockwise from the upper left.
Line: TypeAlias = tuple[str, float, tuple[float, ...]]
# Corners x, y in pixels, in the order of a line's.
Quads: TypeAlias = Float32[np.ndarray, "_ 4 2"]

MAX_LINES = 40
MAX_CHARACTERS = 2000  # Of all lines.
MAX_LINE = 300  # Of one.
_MIN_CONFIDENCE = 0.5
_SURE = 0.8  # A line read with less is tried upside down and at other scales.
_CERTAIN = 0.9  # As `_SURE`, of all lines together.
_ZOOM = 2.0  # How far what is hard to read is enlarged, up to this side, and what is tiny anyway.
_SMALL, _TINY = 640, 128
# The detector finds letters of about 8 to 400 pixels. It sees at most this many pixels, in tiles of
# this side: of one it takes a core a second or two, and 0.7 GB. A larger image is shrunk for it.
_PIXELS = 4_000_000
_TILE, _OVERLAP = 1344, 128
_STRIDE = 32  # Sides that are no multiple of this it would stretch.
_LOWEST = 8  # Pixels below which letters are not legible.
_MARGIN = 32  # Plain pixels around the image: without, letters that touch its edge are not found.
_PROSE = 7.0  # Lines so many times as long as high are prose, whose columns are read one by one.

_building = threading.Lock()
_reading = threading.Lock()


def read_text(
  arguments: Mapping[str, object], sight: Sight, *, reader: str = "rapidocr", language: str = ""
) -> ToolResult:
  """Lines in reading order, each with its box in the image as shown and the reader's confidence.

  Always of the source's resolution. Under a turned view the region is turned as a whole: no end of
  a long line is lost.

  Args:
    reader: one of `READERS`.
    language: a key of `LANGUAGES`, for calls that name none; "" for all known letters.
  """
  asked = arguments.get("language") or language
  check_reader(reader, asked)
  shown = places.pick(sight, arguments.get("image", 1), "image")
  box = places.box(arguments, shown) if "bbox_2d" in arguments else shown.box
  upright = dataclasses.replace(sight, view=dataclasses.replace(sight.view, rotate=0.0))
  picture = upright.crop(shown.source, box, shown.frame)
  pixels = _turned(picture.pixels, sight.view.rotate)
  found, more, scale = sight.compute(lines, pixels, reader, asked or None)
  tell = functools.partial(_told, shown, picture, pixels.shape[:2], sight.view.rotate)
  return ToolResult(text=listing([(t, c, tell(corners)) for t, c, corners in found], more, scale))


def lines(pixels: Pixels, reader: str, language: str | None) -> tuple[tuple[Line, ...], int, float]:
  """The first `MAX_LINES` in reading order; how many more there are; the scale they were found at.

  Below 1 the image was too large to be searched as it is. Texts are clean: no control characters,
  no line breaks, at most `MAX_LINE` characters.
  """
  read = {"rapidocr": _rapidocr_lines, "tesseract": _tesseract_lines}[reader]
  found, more, scale = read(pixels, language)
  texts = ((_clean(text), confidence, corners) for text, confidence, corners in found)
  kept = [line for line in texts if line[0] and line[1] >= _MIN_CONFIDENCE]
  return tuple(kept), more, scale


def reading_order(quads: Quads) -> list[int]:
  """Top to bottom, left to right; columns of prose one after the other, rows of a table across.

  Lines may be turned by up to 45 degrees, all by about the same angle.
  """
  if not len(quads):
    return []
  angle = _angle(quads)
  points = _rotated(quads, -angle)
  boxes = np.concatenate([points.min(1), points.max(1)], 1)
  # The detector's boxes reach into each other: without this, close rows would be one.
  slack = 0.2 * (boxes[:, 3] - boxes[:, 1])
  boxes[:, 1] += slack
  boxes[:, 3] -= slack
  return _ordered(boxes, list(range(len(boxes))))


def _ordered(boxes: Float[np.ndarray, "N 4"], some: list[int]) -> list[int]:
  order: list[int] = []
  bands = _bands(boxes, some, 1)
  while bands:
    count = _with_gutter(boxes, bands)
    run, bands = bands[: max(count, 1)], bands[max(count, 1) :]
    columns = _bands(boxes, [i for band in run for i in band], 0)
    prose = count > 0 and all(_is_prose(boxes, column) for column in columns)
    for part in columns if prose else run:
      order += _ordered(boxes, part) if prose else _rows(boxes, part)
  return order


def _bands(boxes: Float[np.ndarray, "N 4"], some: list[int], axis: int) -> list[list[int]]:
  """Groups that a straight gap parts: horizontal ones for axis 1, vertical ones for 0."""
  bands: list[list[int]] = []
  end = -math.inf
  for i in sorted(some, key=lambda i: (boxes[i, axis], i)):
    if boxes[i, axis] >= end:
      bands.append([])
    bands[-1].append(i)
    end = max(end, boxes[i, axis + 2])
  return bands


def _with_gutter(boxes: Float[np.ndarray, "N 4"], bands: list[list[int]]) -> int:
  """How many of the first bands one vertical gap parts: 0 if not even the first."""
  some: list[int] = []
  for count, band in enumerate(bands):
    some += band
    if len(_bands(boxes, some, 0)) < 2:
      return count
  return len(bands)


def _is_prose(boxes: Float[np.ndarray, "N 4"], some: list[int]) -> bool:
  x0, y0, x1, y1 = boxes[some].T
  return bool(np.median((x1 - x0) / (y1 - y0)) >= _PROSE)


def _rows(boxes: Float[np.ndarray, "N 4"], band: list[int]) -> list[int]:
  """Left to right in each row; a row is what begins above the middle of its first box."""
  middle = (boxes[:, 1] + boxes[:, 3]) / 2
  rest, order = sorted(band, key=lambda i: (middle[i], i)), []
  while rest:
    end = boxes[rest[0], 3]
    row = [i for i in rest if middle[i] <= end]
    order += sorted(row, key=lambda i: (boxes[i, 0], i))
    rest = [i for i in rest if middle[i] > end]
  return order


def _angle(quads: Quads) -> float:
  """Radians, clockwise as seen: the median over the upper sides of long boxes, by their length."""
  along = quads[:, 1] - quads[:, 0]
  length = np.hypot(*along.T)
  height = np.hypot(*(quads[:, 3] - quads[:, 0]).T)
  angles = np.arctan2(along[:, 1], along[:, 0])
  long = np.flatnonzero(length > 2 * height)
  if not len(long):
    return 0.0
  by_angle = long[np.argsort(angles[long], kind="stable")]
  total = np.cumsum(length[by_angle])
  return float(angles[by_angle[np.searchsorted(total, total[-1] / 2)]])


def _rotated(points: Float[np.ndarray, "*N 2"], angle: float) -> Float[np.ndarray, "*N 2"]:
  """About the origin, clockwise as seen, by radians."""
  cos, sin = math.cos(angle), math.sin(angle)
  return points @ np.array([[cos, sin], [-sin, cos]])


def _rapidocr_lines(pixels: Pixels, language: str | None) -> tuple[list[Line], int, float]:
  """What is hard to read is read again: enlarged for small letters, shrunk for blur and noise."""
  pixels = np.ascontiguousarray(pixels[..., ::-1])  # The models want blue first.
  scale, longest = _scale(*pixels.shape[:2]), max(pixels.shape)
  tries = [_read_at(pixels, scale, language)]
  unsure = _certainty(tries[0][0]) < _CERTAIN
  if longest <= _TINY or (unsure and longest <= _SMALL):
    tries.append(_read_at(pixels, _ZOOM, language))
  if unsure and longest <= _TILE:
    tries.append(_read_at(pixels, 1 / _ZOOM, language))
  found, more = max(tries, key=lambda read: _letters(read[0]))
  if not _letters(found) and (whole := _whole(pixels, language)):
    return whole, 0, scale
  return found, more, scale


def _read_at(pixels: Pixels, scale: float, language: str | None) -> tuple[list[Line], int]:
  """The first lines, and how many more were found."""
  seen = _framed(_scaled(pixels, scale))
  quads = _search(seen)
  quads = quads[reading_order(quads)]
  corners = (quads - _MARGIN) / np.float32(scale)
  # What is enlarged is read better too; what is shrunk is not.
  sharp, where = (seen, quads) if scale >= 1 else (pixels, corners)
  texts: list[tuple[str, float]] = []
  for text in _recognise(sharp, where[:MAX_LINES], language):
    texts.append(text)
    if sum(len(text) for text, _ in texts) > MAX_CHARACTERS:  # Long lines take seconds.
      break
  return _lined(texts, corners[: len(texts)]), len(quads) - len(texts)


def _certainty(found: Sequence[Line]) -> float:
  """Mean confidence of the characters; 0 where there are none."""
  letters = sum(len(text) for text, _, _ in found)
  return sum(len(text) * sure for text, sure, _ in found) / max(letters, 1)


def _letters(found: Sequence[Line]) -> float:
  """How many characters are read well."""
  return sum((len(text) * sure for text, sure, _ in found if sure >= _SURE), 0.0)


def _whole(pixels: Pixels, language: str | None) -> list[Line]:
  """A small image as one line: so letters are read that are too blurred for the detector."""
  height, width = pixels.shape[:2]
  if min(height, width) < _LOWEST or max(height, width) > _SMALL:
    return []
  corners = np.array([[[0, 0], [width, 0], [width, height], [0, height]]], np.float32)
  found = _lined(_recognise(pixels, corners, language), corners)
  return [line for line in found if line[1] >= _CERTAIN]


def _lined(texts: Iterable[tuple[str, float]], corners: Quads) -> list[Line]:
  places = (tuple(place) for place in corners.reshape(-1, 8).tolist())
  return [(*text, place) for text, place in zip(texts, places, strict=True)]


def _scale(height: int, width: int) -> float:
  """At which an image is searched for text: below 1 if it is too large."""
  return min(1.0, math.sqrt(_PIXELS / (height * width)))


def _scaled(pixels: Pixels, scale: float) -> Pixels:
  import cv2

  if scale == 1:
    return pixels
  size = tuple(max(1, round(side * scale)) for side in pixels.shape[1::-1])
  return cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)


def _framed(pixels: Pixels) -> Pixels:
  """With `_MARGIN` plain pixels around, at the right and below some more: up to whole strides."""
  height, width = (side + 2 * _MARGIN for side in pixels.shape[:2])
  return _on_plain(pixels, height + -height % _STRIDE, width + -width % _STRIDE, _MARGIN, _MARGIN)


def _on_plain(pixels: Pixels, height: int, width: int, top: int, left: int) -> Pixels:
  """A larger picture with this one in it; the rest has the median colour of this one's edge."""
  edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
  picture = np.empty((height, width, 3), np.uint8)
  picture[:] = np.median(edge, axis=0)
  picture[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
  return picture


def _search(seen: Pixels) -> Quads:
  """Where text is; what is cut by borders of tiles comes whole."""
  height, width = seen.shape[:2]
  found = [
    _detect(seen[y0:y1, x0:x1]) + np.float32([x0, y0])
    for y0, y1 in _tiles(height)
    for x0, x1 in _tiles(width)
  ]
  tiles = np.repeat(np.arange(len(found)), [len(quads) for quads in found])
  quads = _joined(np.concatenate(found), tiles)
  if len(found) == 1:
    return quads
  scale = _TILE / max(height, width)
  overview = _scaled(seen, scale)
  sides = (side + -side % _STRIDE for side in overview.shape[:2])
  return _with_large(quads, _detect(_on_plain(overview, *sides, 0, 0)) / np.float32(scale))


def _tiles(side: int) -> list[tuple[int, int]]:
  """Where the fewest tiles lie along a side of whole strides: equal ones, which overlap."""
  count = max(1, math.ceil((side - _OVERLAP) / (_TILE - _OVERLAP)))
  size = math.ceil((side + (count - 1) * _OVERLAP) / count / _STRIDE) * _STRIDE
  starts = [min(i * (size - _OVERLAP), side - size) for i in range(count)]
  return [(start, start + size) for start in starts]


def _joined(quads: Quads, tiles: Int[np.ndarray, " _"]) -> Quads:
  """Pieces of a line that different tiles show become one."""
  low, high = quads.min(1), quads.max(1)
  touch = np.all((low[:, None] < high) & (low < high[:, None]), axis=-1)
  group = np.arange(len(quads))
  for i, j in np.argwhere(np.triu(touch & (tiles[:, None] != tiles))):
    if _in_line(quads[i], quads[j]):
      group[group == group[j]] = group[i]
  return np.stack([_around(quads[group == g]) for g in np.unique(group)]) if len(quads) else quads


def _in_line(a: Float32[np.ndarray, "4 2"], b: Float32[np.ndarray, "4 2"]) -> bool:
  """Whether two boxes that touch share half the height of the lower one."""
  angle = _angle(np.stack([a, b]))
  (a0, a1), (b0, b1) = ((y.min(), y.max()) for y in (_rotated(q, -angle)[:, 1] for q in (a, b)))
  return bool(min(a1, b1) - max(a0, b0) >= 0.5 * min(a1 - a0, b1 - b0))


def _around(quads: Quads) -> Float32[np.ndarray, "4 2"]:
  """The rectangle around all of them, turned as they are."""
  if len(quads) == 1:
    return quads[0]
  angle = _angle(quads)
  points = _rotated(quads.reshape(-1, 2), -angle)
  (x0, y0), (x1, y1) = points.min(0), points.max(0)
  corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
  return _rotated(corners, angle).astype(np.float32)


def _with_large(quads: Quads, overview: Quads) -> Quads:
  """Letters that no tile may show whole are taken from the overview, in place of their pieces.

  Unless what it shows as one line is several.
  """
  import cv2

  for large in overview:
    height = _height(large)
    if height < _OVERLAP / 2:
      continue
    shared = np.array([cv2.intersectConvexConvex(large, quad)[0] for quad in quads])
    low = np.array([_height(quad) < height / 2 for quad in quads], bool)
    if shared[low].sum() < 0.5 * cv2.contourArea(large):
      apart = shared < [0.5 * cv2.contourArea(quad) for quad in quads]
      quads = np.concatenate([quads[apart], large[None]])
  return quads


def _height(quad: Float32[np.ndarray, "4 2"]) -> float:
  return float(np.hypot(*(quad[3] - quad[0])))


@functools.cache
def _rapidocr() -> Any:
  """The detector, and the recogniser of all letters. Flags passed in a call would stay set."""
  from rapidocr import RapidOCR

  return RapidOCR(
    params={
      "Global.use_rec": False,
      "Global.use_cls": False,
      "Global.use_preprocess_img": False,
      "Global.use_vertical_padding": False,
      "Global.log_level": "critical",
      "Det.limit_type": "max",
      "Det.limit_side_len": 2 * _TILE,
      "Rec.rec_batch_num": 1,
      "EngineConfig.onnxruntime.intra_op_num_threads": 1,
      "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
  )


def _detect(seen: Pixels) -> Quads:
  engine = _once(_rapidocr)
  boxes = engine(np.ascontiguousarray(seen)).boxes
  return np.zeros((0, 4, 2), np.float32) if boxes is None else boxes.astype(np.float32)


def _recognise(pixels: Pixels, quads: Quads, language: str | None) -> Iterator[tuple[str, float]]:
  """Text and confidence of each line.

  A line that is hard to read may be upside down. A single character is not tried so: 6 and 9.
  """
  from rapidocr.ch_ppocr_rec import TextRecInput

  read = _once(_recogniser, language)
  for crop in _once(_rapidocr).crop_text_regions(pixels, quads):
    result = read(TextRecInput(img=crop))
    if result.scores[0] < _SURE and crop.shape[1] >= 2 * crop.shape[0]:
      turned = read(TextRecInput(img=np.ascontiguousarray(crop[::-1, ::-1])))
      result = turned if turned.scores[0] >= _SURE else result
    yield result.txts[0], float(result.scores[0])


@functools.cache
def _recogniser(language: str | None) -> Any:
  """Reads one line. With a language, letters of others count as unlikely as can be."""
  engine = _rapidocr()
  if engine.text_rec is None:
    engine.recognize_txt([np.zeros((48, 48, 3), np.uint8)])  # Loads the model.
  if language is None:
    return engine.text_rec
  recogniser = copy.copy(engine.text_rec)  # Has the same model.
  decode = recogniser.postprocess_op
  known = _known(decode.character, language)
  recogniser.postprocess_op = lambda likely, *a, **k: decode(likely * known, *a, **k)
  return recogniser


def _known(characters: Sequence[str], language: str) -> Float32[np.ndarray, " _"]:
  """1 for what a text of the language may hold, else 0.

  That is letters of its own and of English, and all signs; full-width ones only where they are
  used. The blank between letters, whose name is longer, always.
  """
  scripts, letters = _SCRIPTS.get(language, ()), LANGUAGES[language][0]
  letters += letters.upper() + string.ascii_letters
  last = chr(sys.maxunicode) if scripts else "\u2e80"
  known = [
    len(c) > 1
    or c in letters
    or unicodedata.name(c, "").startswith(scripts)
    or (c < last and unicodedata.category(c)[0] != "L")
    for c in characters
  ]
  return np.array(known, np.float32)


def _once(make: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a cached maker; threads that ask at the same time get the same object."""
  with _building:
    return make(*arguments)


def check_reader(reader: str, language: str) -> None:
  """Raises ValueError where there is no such reader or language, or it is not installed.

  A language that Tesseract has no data of is a Mistake: a policy may have asked for it.
  """
  if reader not in READERS:
    raise ValueError(f"reader {reader!r} must be one of {list(READERS)}")
  if language and language not in LANGUAGES:
    raise ValueError(f"language {language!r} must be empty or one of {list(LANGUAGES)}")
  if reader == "rapidocr":
    return
  if importlib.util.find_spec("tesserocr") is None:
    raise ValueError("reader 'tesseract' needs the package tesserocr: pip install tesserocr")
  for name in dict.fromkeys(["en", language or "en"]):
    data = LANGUAGES[name][1]
    if not (_tessdata() / f"{data}.traineddata").is_file():
      if name != "en":
        raise Mistake(f"language {name!r} is not installed here; leave it out or choose another")
      raise ValueError(
        f"reader 'tesseract' has no {data}.traineddata in {_tessdata()}: install Debian's"
        f" tesseract-ocr-{data} or set TESSDATA_PREFIX to the folder that holds it"
      )


def _tessdata() -> Path:
  return Path(os.environ.get("TESSDATA_PREFIX", "/usr/share/tesseract-ocr/5/tessdata"))


def _tesseract_lines(pixels: Pixels, language: str | None) -> tuple[list[Line], int, float]:
  scale = _scale(*pixels.shape[:2]) * (_ZOOM if max(pixels.shape) <= _SMALL else 1)
  seen = Image.fromarray(_framed(_scaled(pixels, scale)))
  reader = _once(_tesseract, LANGUAGES[language or "en"][1], str(_tessdata()))
  with _reading:
    # The first finds separate columns; the second, lines that fill the image.
    modes = (_by_tesseract(reader, seen, mode) for mode in ("SPARSE_TEXT", "SINGLE_BLOCK"))
    found = next(filter(None, modes), [])
  quads = np.array([box for _, _, box in found], np.float32).reshape(-1, 4, 2)
  order = reading_order(quads)
  corners = (quads[order] - _MARGIN) / np.float32(scale)
  texts = [found[i][:2] for i in order[:MAX_LINES]]
  return _lined(texts, corners[:MAX_LINES]), len(order) - len(texts), scale


def _by_tesseract(reader: Any, seen: Image.Image, mode: str) -> list[Line]:
  import tesserocr

  level, found = tesserocr.RIL.TEXTLINE, []
  reader.SetPageSegMode(getattr(tesserocr.PSM, mode))
  reader.SetImage(seen)
  reader.Recognize()
  for line in tesserocr.iterate_level(reader.GetIterator(), level):
    if not line.Empty(level):
      x0, y0, x1, y1 = map(float, line.BoundingBox(level))
      text, confidence = line.GetUTF8Text(level), line.Confidence(level) / 100
      found.append((text, confidence, (x0, y0, x1, y0, x1, y1, x0, y1)))
  return found


@functools.cache
def _tesseract(data: str, folder: str) -> Any:
  import tesserocr

  return tesserocr.PyTessBaseAPI(path=folder, lang=data)


def _clean(text: str) -> str:
  """One line without control, format and private-use characters."""
  plain = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text)
  line = " ".join(plain.split())
  return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 3]}..."


def _turned(pixels: Pixels, degrees: float) -> Pixels:
  """Counter-clockwise, on plain ground that is large enough for all of it."""
  if not degrees:
    return pixels
  height, width = pixels.shape[:2]
  cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
  above = max(0, math.ceil((width * sin + height * cos - height) / 2))
  before = max(0, math.ceil((width * cos + height * sin - width) / 2))
  ground = _on_plain(pixels, height + 2 * above, width + 2 * before, above, before)
  box = Box(0.0, 0.0, float(ground.shape[1]), float(ground.shape[0]))
  return views.look(views.View(name="turned", rotate=degrees), ground, box)


def _told(
  shown: Shown, picture: Picture, size: tuple[int, ...], degrees: float, corners: tuple[float, ...]
) -> list[int]:
  """The box around a line as the image is shown, turned or not, of its corners in what was read.

  That is the picture turned by `degrees` about its centre, on ground of this (height, width).
  """
  points = np.array(corners).reshape(4, 2) - (size[1] / 2, size[0] / 2)
  source = _rotated(points, math.radians(degrees)) + picture.box.center
  turn = math.radians(shown.rotate)
  seen = _rotated(source, -turn)
  (x, y), (width, height) = _rotated((seen.min(0) + seen.max(0)) / 2, turn), np.ptp(seen, axis=0)
  box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
  limits = (*shown.size[::-1], *shown.size[::-1])
  return [min(max(c, 0), limit) for c, limit in zip(places.told(shown, box), limits, strict=True)]


def listing(found: Sequence[tuple[str, float, list[int]]], more: int, scale: float) -> str:
  """What the policy is told. Text that was read never starts a line of it."""
  rows = [f"{box} {confidence:.2f} {text}" for text, confidence, box in found]
  ends = np.cumsum([len(row) for row in rows])
  rows = rows[: int(np.sum(ends <= MAX_CHARACTERS))]
  more += len(found) - len(rows)
  count = len(rows) + more
  told = [f"{count} line{'s' if count > 1 else ''}:", *rows] if count else ["No text found."]
  if more:
    told.append(f"... {more} more line{'s' if more > 1 else ''}; read a smaller region")
  if scale < 1:
    told.append(f"Searched at {scale:.2f} of its size: for small text read a smaller region.")
  return "\n".join(told)
