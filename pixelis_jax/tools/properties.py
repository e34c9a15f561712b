"""GET_PROPERTIES: what can be measured of an object or a region, in words and numbers.

Heavy packages are imported in the functions that need them: `import pixelis_jax.tools` stays fast.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from pixelis_jax.tools import places
from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.types import Box, Mask, ToolResult

GET_PROPERTIES = {
  "type": "function",
  "function": {
    "name": "get_properties",
    "description": "Measure an object or a region: colours, texture, size, position, and of a mask"
    " also its shape. Give either mask or bbox_2d.",
    "parameters": {
      "type": "object",
      "properties": {
        "mask": places.MASK,
        "bbox_2d": {
          **places.BOX,
          "description": "The region [x1, y1, x2, y2] in pixels of the image as shown.",
        },
        "image": places.IMAGE,
      },
      "required": [],
    },
  },
}

# sRGB prototypes of the 11 basic colour terms of Berlin & Kay (Basic Color Terms, 1969), and of
# cyan, which is between two of them. Chromatic ones are the plain, light, dark, bright, pale and
# dull shade and the commonest other names of each term in Munroe's survey (xkcd.com/color/rgb,
# CC0), and corners of sRGB; the greys are steps.
PROTOTYPES = {
  "black": "000000 1c1c1c",
  "white": "ececec ffffff",
  "red": "e50000 ff474c 840000 ff000d d9544d bb3f3f 650021 ff0000",
  "green": "15b01a 96f97b 033500 01ff07 c7fdb5 74a662 6e750e aaff32 06470c b0dd16 8eab12 00ff00",
  "yellow": "ffff14 fffe7a d5b60a eedc5b ceb301",
  "blue": "0343df 95d0fc 00035b 0165fc d0fefe 49759c 75bbfd 001146 0504aa 0000ff",
  "cyan": "00ffff 13eac9 06c2ac 02ccfe",
  "brown": "653700 ad8150 341c02 b1916e 876e4b d1b26f",
  "purple": "7e1e9c bf77f6 35063e be03fd b790d4 84597e 9a0eea c79fef",
  "pink": "ff81c0 ffd1df cb416b fe01b1 ffcfdc d5869d ff796c c20078 ff028d ff00ff",
  "orange": "f97306 fdaa48 c65102 ff5b00 ffa756 d8863b ffb07c",
  "grey": "404040 606060 808080 a0a0a0 c4c4c4",
}
NAMES = tuple(PROTOTYPES)

_SAMPLES = 1 << 18  # Pixels that colours are taken from, at most about.
_SIDE = 512  # Longest side at which the outline is measured.
_GRAIN = 256  # Longest side at which the texture is measured: coarse, not the noise of pixels.
_LEVELS = 32  # Of grey, in the co-occurrence matrix.

# Polar samples of a mask that is mapped so that its second moments are the unit circle's: angles,
# and radii up to _REACH.
_ANGLES, _RADII, _REACH = 120, 48, 3.0
_TURN = 2 * math.pi / _ANGLES
_IDEAL = 200  # Side of the ideal shapes in pixels.
# How like an ideal shape a mask must be: intersection over union.
LIKENESS = {
  "ellipse": 0.88,
  "parallelogram": 0.88,
  "triangle": 0.84,
  "pentagon": 0.88,
  "hexagon": 0.88,
  "star": 0.80,
  "heart": 0.86,
  "semicircle": 0.88,
  "cross": 0.86,
  "ring": 0.80,
  "crescent": 0.80,
  "arrow": 0.80,
}
_ROUND = 0.88  # Ratio of the axes from which an ellipse is a circle, of sides from which a square.
_LEANING = 0.25  # Cosine of a corner above which four sides are no rectangle.


class Shape(NamedTuple):
  """The outline, holes filled, in source pixels. `circularity` is 4 pi area / perimeter^2.

  `angle` is the long axis', in degrees counter-clockwise from the x axis, in (-90, 90]; `aspect` is
  the ratio of the axes, at least 1.
  """

  word: str
  area: int
  perimeter: float
  circularity: float
  solidity: float
  eccentricity: float
  angle: float
  extent: float
  aspect: float


class Properties(NamedTuple):
  """`colours` are names with their shares, most first; `contrast` and `homogeneity` Haralick's.

  `mean` and `std` are of R, G and B, 0 to 255; `centre` is (x, y) in pixels of what was measured.
  """

  colours: tuple[tuple[str, float], ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  contrast: float
  homogeneity: float
  centre: tuple[float, float]
  shape: Shape | None


def get_properties(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """A line a group, nothing to look at. Measured on the source: a view moves a box, no colour.

  The place is in the frame of `image` as shown; by default that is image 1 for a box, and for a
  mask the first image that shows where the mask lies.
  """
  if ("mask" in arguments) == ("bbox_2d" in arguments):
    raise Mistake("give either mask or bbox_2d")
  if "mask" in arguments:
    mask = places.mask(sight, arguments["mask"])
    shown, box, inside = _showing(arguments, sight, mask), mask.box, mask.inside
    rows, columns = slice(int(box.y0), int(box.y1)), slice(int(box.x0), int(box.x1))
    pixels = sight.pixels(mask.source, mask.frame)[rows, columns]
    title, count = f"Mask {arguments['mask']:g}", int(inside.sum())
  else:
    shown, inside = places.pick(sight, arguments.get("image", 1), "image"), None
    moved = dataclasses.replace(sight.view, rotate=0.0, contrast="none", invert=False)
    still = dataclasses.replace(sight, view=moved)
    region = still.crop(shown.source, places.box(arguments, shown), shown.frame)
    pixels, box = region.pixels, region.box
    title, count = f"Region {places.told(shown, box)}", pixels.shape[0] * pixels.shape[1]
  found = sight.compute(measure, pixels, inside)
  lines = [
    f"{title}:",
    _colour_line(found),
    f"Texture: {_texture(found.contrast)} (contrast {found.contrast:.2f}, homogeneity"
    f" {found.homogeneity:.2f}).",
    *([] if found.shape is None else [_shape_line(found.shape, shown.rotate)]),
    *_place_lines(shown, box, count, found.centre),
  ]
  return ToolResult(text="\n".join(lines))


def measure(
  pixels: UInt8[np.ndarray, "height width 3"], inside: Bool[np.ndarray, "height width"] | None
) -> Properties:
  """Of the pixels inside; of all of them, and without a shape, where that is None."""
  height, width = pixels.shape[:2]
  if inside is None:
    everything = np.ones((height, width), bool)
    centre, shape = (width / 2, height / 2), None
  else:
    everything = inside
    rows, columns = inside.sum(1), inside.sum(0)
    centre = (_middle(columns), _middle(rows))
    shape = outline(inside)
  step = max(1, math.ceil(math.sqrt(everything.sum() / _SAMPLES)))
  sample = pixels[::step, ::step][everything[::step, ::step]]
  if len(sample) == 0:  # A mask thinner than a step.
    sample = pixels[everything]
  shares = np.bincount(names(sample), minlength=len(NAMES)) / len(sample)
  ranked = sorted(((NAMES[i], float(share)) for i, share in enumerate(shares)), key=lambda x: -x[1])
  contrast, homogeneity = texture(pixels, everything)
  return Properties(
    colours=tuple((name, share) for name, share in ranked if share > 0),
    mean=tuple(float(x) for x in sample.mean(0)),
    std=tuple(float(x) for x in sample.std(0)),
    contrast=contrast,
    homogeneity=homogeneity,
    centre=centre,
    shape=shape,
  )


def names(colours: UInt8[np.ndarray, "N 3"]) -> UInt8[np.ndarray, " N"]:
  """Index in `NAMES` of each sRGB colour: the nearest prototype in CIELAB, at 5 bits a channel."""
  r, g, b = (colours >> 3).astype(np.uint16).T
  return _table()[(r << 10) | (g << 5) | b]


@functools.lru_cache(maxsize=1)
def _table() -> UInt8[np.ndarray, " N"]:
  from skimage.color import rgb2lab

  steps = np.arange(32) * 255 / 31  # So that both black and white are met exactly.
  grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
  terms = [(i, bytes.fromhex(h)) for i, n in enumerate(NAMES) for h in PROTOTYPES[n].split()]
  prototypes = rgb2lab(np.array([list(rgb) for _, rgb in terms]) / 255)
  lab = rgb2lab(grid / 255)
  squares = (lab**2).sum(1)[:, None] - 2 * lab @ prototypes.T + (prototypes**2).sum(1)[None]
  return np.array([i for i, _ in terms], np.uint8)[squares.argmin(1)]


def texture(
  pixels: UInt8[np.ndarray, "height width 3"], inside: Bool[np.ndarray, "height width"]
) -> tuple[float, float]:
  """Contrast and homogeneity of the grey-level co-occurrence matrix: Haralick, IEEE SMC 3 (1973).

  32 levels, neighbours at distance 1 in 4 directions that are both inside, shrunk to 256 pixels.
  (0, 1) where no two neighbours are inside, as in a plain area.
  """
  from skimage.color import rgb2gray
  from skimage.feature import graycomatrix, graycoprops

  pixels, inside = shrunk(pixels, _GRAIN), shrunk(inside, _GRAIN)
  levels = np.minimum((rgb2gray(pixels) * _LEVELS).astype(np.uint8), _LEVELS - 1) + 1
  levels[~inside] = 0  # A level of its own, left out below.
  angles = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4]
  counts = graycomatrix(levels, [1], angles, levels=_LEVELS + 1, symmetric=True)[1:, 1:]
  counts = counts.sum(3, keepdims=True)
  if counts.sum() == 0:
    return 0.0, 1.0
  found = [graycoprops(counts, which).item() for which in ("contrast", "homogeneity")]
  return found[0], found[1]


def outline(inside: Bool[np.ndarray, "height width"]) -> Shape:
  """scikit-image's `regionprops` of the filled mask, shrunk to 512 pixels, in source pixels again.

  The perimeter is Crofton's in 4 directions: exact on average for round shapes, so that a disc has
  circularity 1.00; straight sides along the axes or diagonals count up to 6% less, so that an
  upright square has 0.88 instead of pi / 4.
  """
  from scipy.ndimage import binary_fill_holes
  from skimage.measure import regionprops

  small = np.pad(shrunk(inside, _SIDE), 1)
  filled = binary_fill_holes(small)
  scale = max(1.0, max(inside.shape) / _SIDE)
  (region,) = regionprops(filled.astype(np.uint8))
  perimeter = max(region.perimeter_crofton, 1.0)  # 0 for a single pixel.
  _, (short, long), _ = _mapped(filled)
  angle = math.degrees(region.orientation) + 90.0  # From the row axis, which points down.
  return Shape(
    word=word(small),
    area=int(inside.sum()),
    perimeter=perimeter * scale,
    circularity=4 * math.pi * region.area / perimeter**2,
    solidity=float(region.solidity),
    eccentricity=float(region.eccentricity),
    angle=angle if angle <= 90.0 else angle - 180.0,
    extent=float(region.extent),
    aspect=float(long / short),
  )


def word(inside: Bool[np.ndarray, "height width"]) -> str:
  """circle, ellipse, square, rectangle, diamond, triangle, ... or else irregular.

  The mask is mapped so that its second moments are the unit circle's: all ellipses become one
  shape, and so do all parallelograms and all triangles. Then it is compared with each of the ideals
  at every angle.
  """
  seen, (short, long), to_pixels = _mapped(inside)
  found = {name: _likeness(seen, ideal) for name, ideal in _ideals().items()}
  best, (likeness, turn) = max(found.items(), key=lambda item: item[1][0])
  # A boundary pixel is half wrong, and their share of the area grows as the area shrinks.
  if likeness < LIKENESS[best] - 0.5 / math.sqrt(inside.sum()):
    return "irregular"
  if best == "ellipse":
    return "circle" if short >= _ROUND * long else "ellipse"
  return _four_sided(to_pixels, turn) if best == "parallelogram" else best


def _four_sided(to_pixels: Float[np.ndarray, "2 2"], turn: float) -> str:
  """By the sides: those of the ideal square's that is turned so, mapped back to pixels."""
  across, down = (to_pixels @ [math.cos(a), math.sin(a)] for a in (turn, turn + math.pi / 2))
  lengths = sorted((math.hypot(*across), math.hypot(*down)))
  leaning = abs(float(across @ down)) / (lengths[0] * lengths[1])  # Cosine of the corner.
  if leaning > _LEANING:
    return "diamond" if lengths[0] >= _ROUND * lengths[1] else "parallelogram"
  return "square" if lengths[0] >= _ROUND * lengths[1] else "rectangle"


def _mapped(
  inside: Bool[np.ndarray, "height width"],
) -> tuple[Float[np.ndarray, "A R"], tuple[float, float], Float[np.ndarray, "2 2"]]:
  """Polar samples of the mapped mask, the axes (short, long), and the map back to pixels."""
  from scipy.ndimage import map_coordinates

  at = np.argwhere(inside).astype(np.float64)
  middle = at.mean(0)
  covariance = (at - middle).T @ (at - middle) / len(at) + np.eye(2) / 12  # Of a pixel's own area.
  squares, axes = np.linalg.eigh(covariance)
  to_pixels = (axes * np.sqrt(squares)) @ axes.T  # Of the roots the one that turns nothing.
  angles = (np.arange(_ANGLES) + 0.5) * _TURN
  radii = (np.arange(_RADII) + 0.5) * (_REACH / _RADII)
  circle = np.stack([np.outer(np.cos(angles), radii), np.outer(np.sin(angles), radii)])
  seen = map_coordinates(
    inside.astype(np.float64), middle[:, None, None] + np.tensordot(to_pixels, circle, 1), order=1
  )
  return seen, (math.sqrt(squares[0]), math.sqrt(squares[1])), to_pixels


@functools.lru_cache(maxsize=1)
def _ideals() -> dict[str, Float[np.ndarray, "A R"]]:
  """The shapes, mapped as a mask is. Each is its own mirror image."""
  from skimage.draw import polygon2mask

  y, x = (np.mgrid[:_IDEAL, :_IDEAL] + 0.5) * (2.4 / _IDEAL) - 1.2  # -1.2 to 1.2.
  disc = lambda cx, r: np.hypot(x - cx, y) < r
  bar = lambda wide, high: (abs(x) < wide) & (abs(y) < high)
  tip = (x > 0) & (abs(y) < 0.76 * (1 - x))
  lobes = (x**2 + (1.15 * y + np.sqrt(abs(x)) * 0.75) ** 2) < 0.75
  drawn = {
    "ellipse": disc(0.0, 1.0),
    "parallelogram": bar(1.0, 1.0),
    "ring": disc(0.0, 1.0) & ~disc(0.0, 0.55),
    "cross": bar(1.0, 1 / 3) | bar(1 / 3, 1.0),
    "crescent": disc(0.0, 1.0) & ~disc(0.44, 0.84),
    "arrow": ((x > -1) & (x <= 0) & (abs(y) < 0.28)) | tip,
    "heart": lobes,
    "semicircle": disc(0.0, 1.0) & (y < 0),
  }
  corners = {
    "triangle": _regular(3),
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "star": _regular(5, inner=0.4),  # The pentagram's is 0.382.
  }
  for name, at in corners.items():
    drawn[name] = polygon2mask((_IDEAL, _IDEAL), (at + 1.2) * (_IDEAL / 2.4))
  return {name: _mapped(inside)[0] for name, inside in drawn.items()}


def _regular(count: int, inner: float | None = None) -> Float[np.ndarray, "N 2"]:
  """Corners on the unit circle; with `inner`, as many between them on a circle of that radius."""
  radii = np.ones(count) if inner is None else np.tile([1.0, inner], count)
  angles = np.arange(len(radii)) * (2 * math.pi / len(radii))
  return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _likeness(
  seen: Float[np.ndarray, "A R"], ideal: Float[np.ndarray, "A R"]
) -> tuple[float, float]:
  """The largest intersection over union at any angle, and that angle in radians."""
  radii = np.arange(_RADII) + 0.5  # A cell's area.
  area = float((seen * radii).sum() + (ideal * radii).sum())
  common = [float((np.minimum(seen, np.roll(ideal, t, 0)) @ radii).sum()) for t in range(_ANGLES)]
  best = int(np.argmax(common))
  return common[best] / (area - common[best]), best * _TURN


def shrunk(values: np.ndarray, side: int) -> np.ndarray:
  """Pixels or a mask at most `side` long: averaged, a mask where at least half is inside."""
  import cv2

  scale = side / max(values.shape[:2])
  if scale >= 1:
    return values
  size = (max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale)))
  if values.dtype != bool:
    return cv2.resize(values, size, interpolation=cv2.INTER_AREA)
  small = cv2.resize(values.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA)
  return small >= min(128, small.max())  # Of a mask that is thin everywhere, its thickest part.


def _middle(counts: np.ndarray) -> float:
  """Mean position of pixels counted by row or column; a pixel's centre is at + 0.5."""
  return float((counts * (np.arange(len(counts)) + 0.5)).sum() / counts.sum())


def _showing(arguments: Mapping[str, object], sight: Sight, mask: Mask) -> Shown:
  """The image in whose frame a mask is told; it must show where the mask lies."""
  if "image" in arguments:
    shown = places.pick(sight, arguments["image"], "image")
    if (shown.source, shown.frame) == (mask.source, mask.frame):
      return shown
    raise Mistake(f"mask {arguments['mask']:g} does not lie in image {arguments['image']:g}")
  for shown in sight.shown():
    if (shown.source, shown.frame) == (mask.source, mask.frame):
      return shown
  raise Mistake(f"mask {arguments['mask']:g} lies in a frame that no image shows")


def _colour_line(found: Properties) -> str:
  listed = [pair for pair in found.colours[:4] if pair[1] >= 0.05] or found.colours[:1]
  told = ", ".join(f"{name} {share:.0%}" for name, share in listed)
  mean, std = (", ".join(f"{x:.0f}" for x in rgb) for rgb in (found.mean, found.std))
  return f"Colour: {told}; mean RGB ({mean}), standard deviation ({std})."


def _texture(contrast: float) -> str:
  """Words for the root mean square step between neighbours: below 7 of 255, below 16, above."""
  if contrast < 0.75:
    return "smooth"
  return "textured" if contrast < 4.0 else "rough"


def _shape_line(shape: Shape, rotate: float) -> str:
  axis = "no long axis"
  if shape.aspect >= 1.1:
    angle = (shape.angle + rotate + 90.0) % 180.0 - 90.0
    axis = f"long axis at {angle:.0f} degrees"
  return (
    f"Shape: {shape.word}; perimeter {shape.perimeter:.0f} pixels, circularity"
    f" {shape.circularity:.2f}, solidity {shape.solidity:.2f}, eccentricity"
    f" {shape.eccentricity:.2f}, extent {shape.extent:.2f}, aspect {shape.aspect:.2f}, {axis}."
  )


def _place_lines(shown: Shown, box: Box, count: int, centre: Sequence[float]) -> tuple[str, str]:
  x0, y0, x1, y1 = places.told(shown, box)
  share = count / (shown.box.width * shown.box.height)
  x, y = box.x0 + centre[0], box.y0 + centre[1]
  u0, v0, u1, v1 = shown.from_source(Box(x - 0.5, y - 0.5, x + 0.5, y + 0.5))
  u, v = (u0 + u1) / 2, (v0 + v1) / 2
  height, width = shown.size
  return (
    f"Size: {count:,} pixels, {share:.2%} of the image; {x1 - x0} x {y1 - y0} as shown.",
    f"Position: centre [{u * width:.0f}, {v * height:.0f}], {_words(u, v)}.",
  )


def _words(u: float, v: float) -> str:
  """Thirds of the image: "upper left" to "lower right"."""
  across = ("left", "middle", "right")[min(2, max(0, int(3 * u)))]
  down = ("upper", "middle", "lower")[min(2, max(0, int(3 * v)))]
  return "centre" if across == down == "middle" else f"{down} {across}"
