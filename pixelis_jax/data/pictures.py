"""Real pictures from installed packages and from a fetched folder: photos, and cut-outs with masks.

Photos ship in the wheels of scikit-image, scikit-learn and matplotlib. `scripts/fetch_pictures.py`
adds a folder with more photos (OpenCV's samples) and with real things, cut out by hand (Tux Paint's
stamps). Without it cut-outs are made: shapes and handwritten digits in named colours, with the
grain of the photos. docs/DATA.md says what is under which licence.

No picture is in two splits, and neither are two pictures of one subject:
  photos            the tables below say which split each is in
  stamps            by the hash of their last word: all lions, sea lions too, are in one split
  made cut-outs     photos and handwriting are those of the split
"""

import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage, special

from pixelis_jax.data import digits
from pixelis_jax.data.scenes import COLORS
from pixelis_jax.types import Pixels, content_key, value

SPLITS = ("train", "dev", "test")
_HANDWRITING = dict(zip(SPLITS, digits.SPLITS, strict=True))
# Package -> folder of its wheel, then the files of each split. Two views of one subject: one split.
WHEELS = {
  "skimage": {
    "train": (
      "data/astronaut.png",
      "data/brick.png",
      "data/camera.png",
      "data/coffee.png",
      "data/gravel.png",
      "data/hubble_deep_field.jpg",
      "data/motorcycle_left.png",
    ),
    "dev": ("data/grass.png", "data/moon.png"),
    "test": ("data/chelsea.png", "data/coins.png", "data/rocket.jpg"),
  },
  "sklearn": {
    "train": ("datasets/images/china.jpg",),
    "dev": ("datasets/images/flower.jpg",),
    "test": (),
  },
  "matplotlib": {
    "train": (),
    "dev": ("mpl-data/sample_data/grace_hopper.jpg",),
    "test": (),
  },
}
OPENCV = "opencv-doc"
FETCHED = {
  "train": (
    "data/aero1.jpg",
    "data/aloeL.jpg",
    "data/baboon.jpg",
    "data/board.jpg",
    "data/building.jpg",
    "data/fruits.jpg",
    "data/graf1.png",
    "data/leuvenA.jpg",
    "data/messi5.jpg",
    "data/starry_night.jpg",
  ),
  "dev": ("data/home.jpg", "data/rubberwhale1.png", "data/squirrel_cls.jpg"),
  "test": (
    "data/apple.jpg",  # In the same light as the orange.
    "data/butterfly.jpg",
    "data/chicky_512.png",
    "data/orange.jpg",
    "text/scenetext05.jpg",
  ),
}
STAMPS = "tuxpaint-stamps-default"
# What a stamp says of its size is not true of what it is pasted on.
_LABEL = re.compile(
  r"An? (?:very )?(?:small |little |large |poisonous )?([A-Za-z]+(?:[ -][A-Za-z]+){0,2})[.!]?"
)
_DRAWN = {"cartoon", "symbols"}  # Folders of drawings. Some are elsewhere.
_SMALLEST = 40  # Pixels a side: stamps below it cannot be enlarged.
_LARGEST = 320  # Stamps above it are reduced.
_PARTS = {"train": (0, 1, 2), "dev": (3,), "test": (4,)}  # Of five, by the hash.
SIDE = 160  # Pixels of a made cut-out's longer side.
# In shares of the square around a shape. Discs: x, y, radius, filled or a hole; then corners.
_DISCS = {
  "circle": ((0.5, 0.5, 0.5, 255),),
  "ring": ((0.5, 0.5, 0.5, 255), (0.5, 0.5, 0.28, 0)),
  "crescent": ((0.5, 0.5, 0.5, 255), (0.72, 0.5, 0.42, 0)),
  "heart": ((0.27, 0.29, 0.27, 255), (0.73, 0.29, 0.27, 255)),
}
_THIRDS = ((1 / 3, 0), (2 / 3, 0), (2 / 3, 1 / 3), (1, 1 / 3), (1, 2 / 3), (2 / 3, 2 / 3))
_TURNS = 2 * np.pi * (np.arange(5) / 5 - 0.25)  # Of a star's points; the notches are between them.
_CORNERS = {
  "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
  "triangle": ((0.5, 0), (1, 0.866), (0, 0.866)),
  "diamond": ((0.5, 0), (0.85, 0.5), (0.5, 1), (0.15, 0.5)),
  "cross": (*_THIRDS, *((1 - x, 1 - y) for x, y in _THIRDS)),
  "arrow": ((0, 0.36), (0.5, 0.36), (0.5, 0.12), (1, 0.5), (0.5, 0.88), (0.5, 0.64), (0, 0.64)),
  "heart": ((0.055, 0.45), (0.5, 0.25), (0.945, 0.45), (0.5, 1)),
  "star": tuple(
    (float(0.5 + radius * np.cos(angle)), float(0.5 + radius * np.sin(angle)))
    for turn in _TURNS
    for radius, angle in ((0.5, turn), (0.2, turn + np.pi / 5))
  ),
}
SHAPES = tuple(sorted(_DISCS.keys() | _CORNERS.keys()))


@value
class Photo:
  """A whole picture: `source` names package and file, and is in one split only."""

  name: str
  pixels: Pixels
  source: str


@value
class Cutout:
  """A thing without its surroundings, cropped to its solid part.

  `name` is what a question can call it ("sea lion", "star"); `color` is a name in `scenes.COLORS`,
  None where nobody has said which. `alpha` is opacity, 0 to 255; pixels under 0 mean nothing.
  `source` names the file; of a made one photo and digit, with a space between.
  """

  name: str
  color: str | None
  pixels: UInt8[np.ndarray, "height width 3"]
  alpha: UInt8[np.ndarray, "height width"]
  source: str

  @property
  def solid(self) -> Bool[np.ndarray, "height width"]:
    """The exact mask: what is at least half opaque."""
    return self.alpha >= 128


@functools.cache
def photos(split: str, folder: Path | None = None) -> tuple[Photo, ...]:
  """The split's photos: those in wheels, then those in the folder. Cached; arrays are read-only.

  Raises:
    ModuleNotFoundError: a package that ships some is not installed.
    FileNotFoundError, ValueError: a file is missing or broken; the message names it.
  """
  _check(split)
  files = {
    f"{package}/{name}": wheel(package) / name
    for package, splits in WHEELS.items()
    for name in splits[split]
  }
  if folder is not None:
    files |= {f"{OPENCV}/{name}": _fetched(folder, OPENCV) / name for name in FETCHED[split]}
  return tuple(
    Photo(name=file.stem, pixels=_frozen(read(file)[:, :, :3]), source=source)
    for source, file in files.items()
  )


@functools.cache
def cutouts(split: str, folder: Path | None = None) -> tuple[Cutout, ...]:
  """The split's cut-outs: the folder's stamps; without a folder, made ones. As `photos`."""
  _check(split)
  return _made(split) if folder is None else _stamps(split, _fetched(folder, STAMPS))


def read(file: Path) -> UInt8[np.ndarray, "height width 4"]:
  """RGBA of an image file of any mode. Raises FileNotFoundError or ValueError, with its name."""
  try:
    with Image.open(file) as image:
      return np.array(image.convert("RGBA"))
  except FileNotFoundError as e:
    raise FileNotFoundError(f"there is no picture {file}") from e
  # OSError: not an image, or cut off; SyntaxError: a broken PNG.
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise ValueError(f"picture {file} cannot be read: {e}") from e


def _check(split: str) -> None:
  if split not in SPLITS:
    raise ValueError(f"split {split!r} must be one of {SPLITS}")


def wheel(package: str) -> Path:
  """Where a package is installed; it is not imported."""
  spec = importlib.util.find_spec(package)
  if spec is None:
    raise ModuleNotFoundError(f"{package}, which ships pictures and fonts, is not installed")
  return Path(spec.origin).parent


def _fetched(folder: Path, package: str) -> Path:
  path = Path(folder) / package
  if not path.is_dir():
    raise FileNotFoundError(f"there is no {path}: run python scripts/fetch_pictures.py {folder}")
  return path


def _frozen(array: np.ndarray) -> np.ndarray:
  array = np.ascontiguousarray(array)
  array.setflags(write=False)
  return array


def _stamps(split: str, root: Path) -> tuple[Cutout, ...]:
  found = tuple(cutout for cutout in _every_stamp(root) if _split(cutout.name) == split)
  if not found:
    raise ValueError(f"{root} holds no stamp of the split {split!r}: fetch it again")
  return found


@functools.cache
def _every_stamp(root: Path) -> tuple[Cutout, ...]:
  """Those with a clear outline and a plain English name, by path; of equal ones the first."""
  found: dict[str, Cutout] = {}
  for file in sorted(root.rglob("*.png")):
    if (name := _name(file, root)) is None:
      continue
    cutout = _stamp(file, root, name)
    solid = cutout.solid
    clear = solid.sum() > np.count_nonzero(cutout.alpha) / 2 and not solid.all()
    if clear and min(solid.shape) >= _SMALLEST:
      key = content_key(str(solid.shape), cutout.pixels.tobytes(), cutout.alpha.tobytes())
      found.setdefault(key, cutout)
  return tuple(found.values())


def _name(file: Path, root: Path) -> str | None:
  """ "sea lion" of a stamp whose text begins "A sea lion."; None for drawings and other texts."""
  if _DRAWN & set(file.relative_to(root).parts):
    return None
  text = file.with_suffix(".txt")
  try:
    lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
  except UnicodeDecodeError as e:
    raise ValueError(f"the stamp's text {text} is not UTF-8: {e}") from e
  match = _LABEL.fullmatch(lines[0].strip()) if lines else None
  return match[1].lower() if match else None


def _split(name: str) -> str:
  """By the last word alone, so that other files do not change it."""
  part = int(content_key(name.split()[-1]), 16) % 5
  return next(split for split, parts in _PARTS.items() if part in parts)


def _stamp(file: Path, root: Path, name: str) -> Cutout:
  image = Image.fromarray(read(file))
  image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BICUBIC)
  pixels = np.array(image)
  solid = pixels[:, :, 3] >= 128
  if not solid.any():
    raise ValueError(f"stamp {file} is transparent everywhere")
  rows, columns = (np.flatnonzero(solid.any(axis)) for axis in (1, 0))
  pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  return Cutout(
    name=name,
    color=None,
    pixels=_frozen(pixels[:, :, :3]),
    alpha=_frozen(pixels[:, :, 3]),
    source=f"{STAMPS}/{file.relative_to(root).as_posix()}",
  )


def _made(split: str) -> tuple[Cutout, ...]:
  """Every shape and digit in every colour, each with grain from a photo and light from above."""
  rng = np.random.default_rng(SPLITS.index(split))
  grains = photos(split)
  hand = digits.load(_HANDWRITING[split])
  made = []
  for color, rgb in COLORS.items():
    for name in (*SHAPES, *(f"digit {label}" for label in range(10))):
      if name in SHAPES:
        coverage, source = shape(name), ""
      else:
        row = int(rng.choice(np.flatnonzero(hand.labels == int(name[-1]))))
        coverage, source = _handwritten(hand.images[row]), f" digits/{hand.indices[row]}"
      photo = grains[int(rng.integers(len(grains)))]
      made.append(
        Cutout(
          name=name,
          color=color,
          pixels=_frozen(_colored(rng, photo.pixels, rgb, coverage.shape)),
          alpha=_frozen(np.rint(255 * coverage).astype(np.uint8)),
          source=photo.source + source,
        )
      )
  return tuple(made)


def _colored(
  rng: np.random.Generator, photo: Pixels, rgb: tuple[int, int, int], size: tuple[int, ...]
) -> Pixels:
  """The colour with a photo's grain, 12% of its brightness, and light from above."""
  (height, width), (rows, columns) = size, photo.shape[:2]
  y, x = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
  part = Image.fromarray(photo[y : y + height, x : x + width]).convert("L")
  gray = np.asarray(part, np.float32)
  fine = (gray - ndimage.gaussian_filter(gray, 12.0)) / np.float32(gray.std() + 8.0)
  light = np.linspace(1.12, 0.82, height, dtype=np.float32)[:, None] + np.float32(0.12) * fine
  return np.clip(np.asarray(rgb, np.float32) * light[:, :, None], 0, 255).astype(np.uint8)


def _handwritten(image: UInt8[np.ndarray, "8 8"]) -> Float32[np.ndarray, "height width"]:
  """Coverage of a digit's strokes, `SIDE` pixels high before it is cropped."""
  ink = np.pad(image.astype(np.float32) / digits.INK_MAX, 1)
  big = Image.fromarray(ink).resize((SIDE * 5 // 4, SIDE * 5 // 4), Image.Resampling.BICUBIC)
  return _cropped(special.expit(np.float32(60) * (np.asarray(big) - np.float32(0.4))))


@functools.cache
def shape(name: str) -> Float32[np.ndarray, "height width"]:
  """Coverage 0 to 1 of one of `SHAPES`, anti-aliased, its longer side about `SIDE` pixels."""
  if name not in SHAPES:
    raise ValueError(f"shape {name!r} must be one of {SHAPES}")
  side = 4 * SIDE
  image = Image.new("L", (side, side))
  draw = ImageDraw.Draw(image)
  for x, y, radius, fill in _DISCS.get(name, ()):
    draw.circle((x * side, y * side), radius * side, fill=fill)
  if name in _CORNERS:
    draw.polygon([(x * side, y * side) for x, y in _CORNERS[name]], fill=255)
  small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
  return _cropped(np.asarray(small, np.float32) / np.float32(255))


def _cropped(coverage: Float32[np.ndarray, "_ _"]) -> Float32[np.ndarray, "height width"]:
  """To the part that is at least half covered."""
  solid = coverage >= 0.5
  rows, columns = (np.flatnonzero(solid.any(axis)) for axis in (1, 0))
  return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
