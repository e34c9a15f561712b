"""Signs with printed text: exact transcripts and boxes, contrast within given bounds.

Fonts are those inside Pillow (Aileron) and matplotlib (DejaVu, STIX, Computer Modern); words are
our own short list. Each line stands on a plate of one colour, so that its contrast is known on any
photo. Nothing here depends on a split: who writes with held-out words passes them in.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageDraw, ImageFont

from pixelis_jax.data.composites import apart
from pixelis_jax.data.pictures import wheel
from pixelis_jax.types import Box, Pixels, value

# Name -> file in matplotlib; None: the one inside Pillow.
FONTS: dict[str, str | None] = {
  "Aileron": None,
  "DejaVu Sans": "DejaVuSans.ttf",
  "DejaVu Sans Bold": "DejaVuSans-Bold.ttf",
  "DejaVu Sans Mono": "DejaVuSansMono.ttf",
  "DejaVu Serif": "DejaVuSerif.ttf",
  "DejaVu Serif Bold": "DejaVuSerif-Bold.ttf",
  "STIX": "STIXGeneral.ttf",
  "STIX Bold": "STIXGeneralBol.ttf",
  "STIX Italic": "STIXGeneralItalic.ttf",
  "Computer Modern": "cmr10.ttf",
  "Computer Modern Sans": "cmss10.ttf",
  "Computer Modern Mono": "cmtt10.ttf",
}
WORDS = tuple(
  (
    "alarm anchor apple arrow autumn bakery balance bamboo banner barley basket beacon bicycle "
    "blanket blossom border bottle branch bridge bronze bucket butter button cabin camera candle "
    "canyon captain carbon carpet castle cedar cement center cherry circle citrus clinic cobalt "
    "coffee copper corner cotton cousin cradle crystal curtain daily desert diamond dinner doctor "
    "dragon eagle early echo elbow empire engine evening factory falcon family farmer feather "
    "ferry fiction figure filter finger flame forest fossil fountain frozen galaxy garden garlic "
    "gentle ginger glacier globe golden grammar granite gravel guitar hammer harbor harvest hazel "
    "helmet hidden hollow honest hotel humble hunter icicle indigo island ivory jacket jasmine "
    "jungle kettle kitchen ladder lagoon lantern laundry leather lemon letter library linen lizard "
    "lobby luggage magnet maple marble market meadow melody mirror monkey morning museum napkin "
    "nickel northern notice ocean office olive orange orchard oxygen packet palace parcel parrot "
    "pattern pepper piano pillow planet pocket powder prairie purple quarry quiet rabbit raven "
    "ribbon river robin rocket saddle salmon school season shadow silver simple sister spider "
    "station summer sunset table tailor temple thunder ticket timber tomato tunnel turtle valley "
    "velvet violet walnut weather willow window winter wizard yellow zebra"
  ).split()
)
PAD = 0.35  # Of the size: from the text to its plate's edge.
_TRIES = 1000


@value
class Line:
  """A line of text in a picture, in its pixels.

  `corners` (x, y) go around the ink as it reads: upper left, upper right, lower right, lower left.
  `contrast` is between `color` and the plate's `ground`, 1 to 21.
  """

  text: str
  font: str
  size: float
  corners: Float32[np.ndarray, "4 2"]
  color: tuple[int, int, int]
  ground: tuple[int, int, int]

  @property
  def box(self) -> Box:
    """Around the corners."""
    (x0, y0), (x1, y1) = self.corners.min(0).tolist(), self.corners.max(0).tolist()
    return Box(x0, y0, x1, y1)

  @property
  def contrast(self) -> float:
    return contrast(self.color, self.ground)


@value
class Written:
  """A picture and its lines, in the order in which they were given."""

  pixels: Pixels
  lines: tuple[Line, ...]


def phrase(rng: np.random.Generator, count: int = 2, words: Sequence[str] = WORDS) -> str:
  """Different words, all in lower case, in capitals, or each with one capital."""
  chosen = " ".join(words[i] for i in rng.choice(len(words), count, replace=False))
  return (str.lower, str.title, str.upper)[int(rng.integers(3))](chosen)


def code(rng: np.random.Generator, length: int = 6) -> str:
  """Capitals and digits that no word list helps to guess; without those that look alike."""
  letters = "ACDEFGHJKLMNPQRTUVWXY34679"
  return "".join(letters[i] for i in rng.integers(len(letters), size=length))


def write(
  rng: np.random.Generator,
  pixels: Pixels,
  texts: Sequence[str],
  *,
  sizes: Sequence[float],
  fonts: Sequence[str] = tuple(FONTS),
  bounds: tuple[float, float] = (4.5, 21.0),
  turn: float = 0.0,
) -> Written:
  """The picture with a sign for each text, apart from each other; a function of rng's state.

  Args:
    sizes: Pixels an em, one a text: capitals are about 0.7 of it.
    fonts: Names in `FONTS` to draw from.
    bounds: Of the contrast. 4.5 is what WCAG 2.2 asks of text that all should be able to read.
    turn: Degrees, at most, that a sign is rotated either way.

  Raises:
    ValueError: a name or a number is not one of these, or the signs do not fit.
  """
  if len(sizes) != len(texts) or not all(texts) or not all(size >= 4 for size in sizes):
    raise ValueError(f"{len(texts)} texts, none empty, need as many sizes >= 4, not {list(sizes)}")
  signs = []
  for text, size in zip(texts, sizes, strict=True):
    name, (color, ground) = fonts[int(rng.integers(len(fonts)))], colors(rng, bounds)
    degrees = float(rng.uniform(-1.0, 1.0)) * turn
    image, corners = _sign(text, name, float(size), color, ground, degrees)
    signs.append((image, corners, color, ground, name))
  places = apart(rng, [(image.height, image.width) for image, *_ in signs], pixels.shape[:2])
  canvas = Image.fromarray(pixels)
  lines = []
  for (image, corners, color, ground, name), (x, y), text, size in zip(
    signs, places, texts, sizes, strict=True
  ):
    canvas.paste(image, (x, y), image)
    moved = corners + np.array([x, y], np.float32)
    lines.append(
      Line(text=text, font=name, size=float(size), corners=moved, color=color, ground=ground)
    )
  return Written(pixels=np.array(canvas), lines=tuple(lines))


def _sign(
  text: str,
  name: str,
  size: float,
  color: tuple[int, int, int],
  ground: tuple[int, int, int],
  degrees: float,
) -> tuple[Image.Image, Float32[np.ndarray, "4 2"]]:
  """RGBA of the plate, and the corners of the ink in it."""
  face = font(name, size)
  left, top, right, bottom = face.getbbox(text)
  pad = math.ceil(PAD * size)
  ink = Image.new("L", (math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad))
  ImageDraw.Draw(ink).text((pad - left, pad - top), text, fill=255, font=face)
  edges = ink.getbbox()
  if edges is None:
    raise ValueError(f"text {text!r} has no ink in {name}")
  plate = Image.new("RGBA", ink.size, (*ground, 255))
  plate.paste(Image.new("RGBA", ink.size, (*color, 255)), (0, 0), ink)
  x0, y0, x1, y1 = edges
  corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)
  if not degrees:
    return plate, corners.astype(np.float32)
  turned = plate.rotate(degrees, resample=Image.Resampling.BICUBIC, expand=True)
  # Pillow keeps the middle in the middle; y points down.
  c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  around = (corners - np.array(plate.size) / 2) @ np.array([[c, -s], [s, c]])
  return turned, (around + np.array(turned.size) / 2).astype(np.float32)


@functools.lru_cache(maxsize=256)
def font(name: str, size: float) -> ImageFont.FreeTypeFont:
  """A face of `FONTS` at a size in pixels an em."""
  if name not in FONTS:
    raise ValueError(f"font {name!r} must be one of {tuple(FONTS)}")
  file = FONTS[name]
  if file is None:
    return ImageFont.load_default(size)
  return ImageFont.truetype(wheel("matplotlib") / "mpl-data" / "fonts" / "ttf" / file, size)


def colors(
  rng: np.random.Generator, bounds: tuple[float, float]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
  """Of text and ground, with a contrast within the bounds."""
  low, high = bounds
  for pair in rng.integers(256, size=(_TRIES, 2, 3)).tolist():
    text, ground = (tuple(channels) for channels in pair)
    if low <= contrast(text, ground) <= high:
      return text, ground
  raise ValueError(f"no two colours have a contrast of {low} to {high}: from 1 to 21 is possible")


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
  """WCAG 2.2's contrast ratio of two sRGB colours: 1 of equal ones to 21 of black and white."""
  dark, light = sorted(map(_luminance, (a, b)))
  return (light + 0.05) / (dark + 0.05)


def _luminance(rgb: tuple[int, int, int]) -> float:
  """Relative, 0 to 1: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
