"""Cut-outs pasted on photos: pictures in which every object's pixels are known exactly.

A pixel belongs to an object where the object covers at least half of it. Lengths are shares of the
canvas: heights of its height, places of both sides. Objects are drawn in their order: a later one
hides an earlier one. films.py makes such pictures move.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from scipy import ndimage

from pixelis_jax.data.pictures import Cutout, Photo
from pixelis_jax.types import Box, Pixels, value

Canvas = Float32[np.ndarray, "_ _ 3"]  # 0 to 255.
Inside = Bool[np.ndarray, "_ _"]
Channels = Float32[np.ndarray, " 3"]

SIZE = (240, 320)  # Height and width in pixels.
MARGIN = 4  # Pixels from a still object to the border, and between objects that are apart.
_WIDEST = 0.9  # Share of the canvas's width that no object is wider than.
_CROP = 0.6  # Smallest part of a photo's side that a background shows.
_TRIES = 64
_ROUNDS = 40
_GROUND = 96  # Gray level beside a picture that is seen from an angle.


@value
class Placed:
  """An object in a picture. `whole` counts what others hide; neither mask leaves the canvas."""

  name: str
  color: str | None
  source: str
  whole: Inside
  visible: Inside

  @property
  def box(self) -> Box:
    """Tight around the whole object, hidden parts included."""
    return tight(self.whole)

  @property
  def seen(self) -> Box | None:
    """Tight around what can be seen; None if all of it is hidden."""
    return tight(self.visible) if self.visible.any() else None

  @property
  def share(self) -> float:
    """Of the whole, what can be seen: 0 to 1."""
    return float(self.visible.sum() / self.whole.sum())


@value
class Composite:
  """A picture and all that was pasted into it, in the order drawn; `background` is its source."""

  pixels: Pixels
  objects: tuple[Placed, ...]
  background: str


@dataclasses.dataclass(frozen=True, slots=True)
class Occlusion:
  """A post that hides `share` of an object's pixels in the frames [start, stop)."""

  number: int  # Of the object, from 0.
  start: int
  stop: int
  share: float

  def __post_init__(self):
    if not (0 <= self.number and 0 <= self.start < self.stop and 0 < self.share <= 1):
      raise ValueError(f"{self} must have number >= 0, 0 <= start < stop and 0 < share <= 1")


@value
class Sprite:
  """A cut-out in the size and light in which it is pasted."""

  pixels: Pixels
  alpha: UInt8[np.ndarray, "height width"]

  @property
  def solid(self) -> Inside:
    """What is at least half opaque."""
    return self.alpha >= 128


@value
class Post:
  """How a post looks, and the side it comes from."""

  occlusion: Occlusion
  left: bool
  color: Channels


def compose(
  rng: np.random.Generator,
  background: Photo,
  cutouts: Sequence[Cutout],
  *,
  heights: Sequence[float],
  size: tuple[int, int] = SIZE,
  overlap: tuple[float, float] | None = None,
  turn: float = 0.0,
  flip: bool = True,
  jitter: float = 0.1,
  shadow: float = 0.0,
) -> Composite:
  """One picture with exact masks, a function of the generator's state.

  Args:
    heights: Of each object as pasted; one that would be too wide is made smaller.
    overlap: None keeps all objects apart. Else the second object hides a share within these bounds
      of the first, the fourth of the third, and so on; pairs are apart.
    turn: Degrees, at most, that an object is rotated either way.
    flip: Whether half of the objects are mirrored. Not for what can be read.
    jitter: Of brightness and, half as much, of each colour: up to this share more or less.
    shadow: Darkness of the objects' shadows on what is below them, 0 to 1. They are in no mask.

  Raises:
    ValueError: the objects find no place that satisfies this.
  """
  if len(heights) != len(cutouts) or not all(0 < h < 1 for h in heights):
    raise ValueError(f"heights {list(heights)} must be {len(cutouts)} shares between 0 and 1")
  canvas = backdrop(rng, background, size)
  sprites = [
    sized(turned(rng, cutout, turn, flip), height, size, random_gains(rng, jitter))
    for cutout, height in zip(cutouts, heights, strict=True)
  ]
  corners = _layout(rng, [sprite.solid for sprite in sprites], size, overlap)
  wholes = []
  for sprite, (x, y) in zip(sprites, corners, strict=True):
    if shadow:
      shade(canvas, sprite, x, y, shadow)
    wholes.append(paste(canvas, sprite, x, y))
  return Composite(
    pixels=levels(canvas),
    objects=tuple(
      Placed(name=c.name, color=c.color, source=c.source, whole=whole, visible=visible)
      for c, whole, visible in zip(cutouts, wholes, unhidden(wholes), strict=True)
    ),
    background=background.source,
  )


def tight(mask: Inside) -> Box:
  """The smallest box around a mask that is not empty."""
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  if not len(rows):
    raise ValueError("an empty mask has no box")
  return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def backdrop(rng: np.random.Generator, photo: Photo, size: tuple[int, int] = SIZE) -> Canvas:
  """A random part of the photo, of the canvas's aspect, 0 to 255."""
  return camera(rng, photo, size, (0.0, 0.0))(0.0)


def _window(pixels: Pixels, x: float, y: float, zoom: float, size: tuple[int, int]) -> Canvas:
  height, width = size
  box = (x, y, x + zoom * width, y + zoom * height)
  image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box)
  return np.asarray(image).astype(np.float32)


def turned(rng: np.random.Generator, cutout: Cutout, turn: float, flip: bool) -> Image.Image:
  """The cut-out as RGBA, mirrored and rotated by chance; the same draws whatever is asked."""
  mirrored, degrees = rng.random() < 0.5, float(rng.uniform(-1.0, 1.0)) * turn
  image = Image.fromarray(np.dstack([cutout.pixels, cutout.alpha]))
  if flip and mirrored:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if degrees:
    image = image.rotate(degrees, resample=Image.Resampling.BICUBIC, expand=True)
    image = image.crop(_edges(np.asarray(image)[:, :, 3] >= 128))
  return image


def _edges(mask: np.ndarray) -> tuple[int, int, int, int]:
  box = tight(mask)
  return int(box.x0), int(box.y0), int(box.x1), int(box.y1)


def random_gains(rng: np.random.Generator, jitter: float) -> Channels:
  """Of brightness and, half as much, of each colour, as `compose` says of its jitter."""
  brightness = rng.uniform(-jitter, jitter)
  return (1 + brightness + rng.uniform(-jitter / 2, jitter / 2, 3)).astype(np.float32)


def sized(image: Image.Image, height: float, size: tuple[int, int], gains: Channels) -> Sprite:
  """Resampled to `height` of the canvas; Pillow premultiplies, so no colour bleeds in."""
  scale = min(height * size[0] / image.height, _WIDEST * size[1] / image.width)
  side = lambda length: max(round(scale * length), 2)
  small = np.asarray(
    image.resize((side(image.width), side(image.height)), Image.Resampling.BICUBIC)
  )
  lit = levels(small[:, :, :3] * gains)
  sprite = Sprite(pixels=lit, alpha=np.ascontiguousarray(small[:, :, 3]))
  if not sprite.solid.any():
    raise ValueError(f"nothing is left of an object at height {height} on a canvas of {size}")
  return sprite


def paste(canvas: Canvas, sprite: Sprite, x: int, y: int) -> Inside:
  """Blends the sprite in, in place, and says where it is solid; it may reach over the border."""
  whole = np.zeros(canvas.shape[:2], bool)
  here, there = _meeting(canvas.shape[:2], sprite.alpha.shape, x, y)
  alpha = sprite.alpha[there].astype(np.float32)[:, :, None] / np.float32(255)
  canvas[here] += alpha * (sprite.pixels[there] - canvas[here])
  whole[here] = sprite.solid[there]
  return whole


def _meeting(
  canvas: tuple[int, ...], part: tuple[int, ...], x: int, y: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
  """Where a part at (x, y) meets the canvas, in both; empty slices if it does not."""
  top, bottom = (min(max(end, 0), canvas[0]) for end in (y, y + part[0]))
  left, right = (min(max(end, 0), canvas[1]) for end in (x, x + part[1]))
  here = slice(top, bottom), slice(left, right)
  return here, (slice(top - y, bottom - y), slice(left - x, right - x))


def shade(canvas: Canvas, sprite: Sprite, x: int, y: int, shadow: float) -> None:
  """Darkens, in place, where the sprite's shadow falls: softly, to the right and below."""
  height = sprite.alpha.shape[0]
  sigma = 1 + height / 30
  reach = math.ceil(3 * sigma)
  soft = ndimage.gaussian_filter(np.pad(sprite.alpha.astype(np.float32), reach), sigma)
  right, down = round(height / 16), round(height / 12)
  here, there = _meeting(canvas.shape[:2], soft.shape, x - reach + right, y - reach + down)
  canvas[here] *= 1 - np.float32(shadow / 255) * soft[there][:, :, None]


def unhidden(wholes: Sequence[np.ndarray]) -> list[np.ndarray]:
  """What of each mask no later mask covers."""
  covered, visible = np.zeros_like(wholes[0]) if wholes else None, []
  for whole in reversed(wholes):
    visible.append(whole & ~covered)
    covered = covered | whole
  return visible[::-1]


def _layout(
  rng: np.random.Generator,
  solids: Sequence[Inside],
  size: tuple[int, int],
  overlap: tuple[float, float] | None,
) -> list[tuple[int, int]]:
  """Upper left corners (x, y) of the sprites."""
  step = 1 if overlap is None else 2
  groups = [solids[i : i + step] for i in range(0, len(solids), step)]
  spots = [[(0, 0)] + ([_over(rng, *g, overlap)] if len(g) == 2 else []) for g in groups]
  starts = [np.min(spot, axis=0) for spot in spots]
  ends = [
    np.max(
      [(x + s.shape[1], y + s.shape[0]) for (x, y), s in zip(spot, group, strict=True)], axis=0
    )
    for spot, group in zip(spots, groups, strict=True)
  ]
  sides = [(int(h), int(w)) for w, h in np.subtract(ends, starts)]
  return [
    (int(x + dx - left), int(y + dy - top))
    for (x, y), spot, (left, top) in zip(apart(rng, sides, size), spots, starts, strict=True)
    for dx, dy in spot
  ]


def _over(
  rng: np.random.Generator,
  under: Inside,
  over: Inside,
  overlap: tuple[float, float],
) -> tuple[int, int]:
  """A corner of `over`, relative to that of `under`, that hides a share within the bounds."""
  low, high = overlap
  for _ in range(_TRIES * _ROUNDS):
    x = int(rng.integers(1 - over.shape[1], under.shape[1]))
    y = int(rng.integers(1 - over.shape[0], under.shape[0]))
    here, there = _meeting(under.shape, over.shape, x, y)
    if low <= (under[here] & over[there]).sum() / under.sum() <= high:
      return x, y
  raise ValueError(f"an object of {over.shape} pixels cannot hide {low} to {high} of {under.shape}")


def apart(
  rng: np.random.Generator, sides: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> list[tuple[int, int]]:
  """Corners (x, y) of rectangles (height, width) that are `MARGIN` apart and from the border."""
  h, w = np.array(sides, np.int64).reshape(-1, 2).T
  down, right = canvas[0] - 2 * MARGIN - h, canvas[1] - 2 * MARGIN - w
  for _ in range(_ROUNDS if min([*down, *right], default=0) >= 0 else 0):
    x, y = np.zeros_like(w), np.zeros_like(h)
    placed = np.zeros(len(h), bool)
    for i in np.argsort(-h * w, kind="stable"):  # The largest first.
      xs = MARGIN + rng.integers(right[i] + 1, size=(_TRIES, 1))
      ys = MARGIN + rng.integers(down[i] + 1, size=(_TRIES, 1))
      beside = (xs >= x + w + MARGIN) | (x >= xs + w[i] + MARGIN)
      free = (beside | (ys >= y + h + MARGIN) | (y >= ys + h[i] + MARGIN) | ~placed).all(1)
      if not free.any():
        break
      x[i], y[i], placed[i] = xs[free.argmax(), 0], ys[free.argmax(), 0], True
    if placed.all():
      return list(zip(x.tolist(), y.tolist(), strict=True))
  raise ValueError(f"objects of {list(sides)} pixels find no place on a canvas of {canvas}")


def levels(canvas: Canvas) -> Pixels:
  """The nearest that 8 bits hold."""
  return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def darkened(pixels: Pixels, rng: np.random.Generator, *, light: float) -> Pixels:
  """As seen in `light` of the light, 0 to 1, with the photon noise of a camera that has only that.

  A white pixel collects 1,000 photons in full light, so noise grows as the root of what is lost.
  """
  photons = rng.poisson(pixels * (light * 1000 / 255))
  return levels((photons * (255 / 1000)).astype(np.float32))


def blurred(pixels: Pixels, *, sigma: float) -> Pixels:
  """Out of focus: a Gaussian, sigma in pixels."""
  smooth = ndimage.gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0.0), mode="nearest")
  return levels(smooth)


def noisy(pixels: Pixels, rng: np.random.Generator, *, sigma: float) -> Pixels:
  """Independent Gaussian noise on each pixel and channel; sigma in levels of 255."""
  changed = pixels + np.float32(sigma) * rng.standard_normal(pixels.shape, dtype=np.float32)
  return levels(changed)


def occluded(scene: Composite, rng: np.random.Generator, number: int, *, share: float) -> Composite:
  """With a post before object `number` that hides `share` of its whole, to the nearest column."""
  canvas = scene.pixels.astype(np.float32)
  posts = [random_post(rng, Occlusion(number=number, start=0, stop=1, share=share))]
  hidden = set_posts(canvas, [o.whole for o in scene.objects], posts)
  objects = (dataclasses.replace(o, visible=o.visible & ~hidden) for o in scene.objects)
  return dataclasses.replace(scene, pixels=levels(canvas), objects=tuple(objects))


def seen_aslant(scene: Composite, rng: np.random.Generator, *, strength: float) -> Composite:
  """As a print seen from the side: each corner moves inward by up to `strength` of half a side.

  Masks are sampled at the centres of the new pixels.
  """
  if not 0 <= strength < 1:
    raise ValueError(f"strength {strength} must satisfy 0 <= strength < 1")
  height, width = scene.pixels.shape[:2]
  corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
  inward = np.sign(np.array([width, height]) / 2 - corners)
  moved = corners + inward * rng.uniform(0, strength / 2, (4, 2)) * (width, height)
  back = _homography(moved, corners)

  def seen(image: Image.Image, resample: Image.Resampling, ground: object) -> np.ndarray:
    warped = image.transform(
      (width, height), Image.Transform.PERSPECTIVE, back, resample, fillcolor=ground
    )
    return np.array(warped)

  def mask(inside: np.ndarray) -> np.ndarray:
    return seen(Image.fromarray(inside.astype(np.uint8)), Image.Resampling.NEAREST, 0) > 0

  return dataclasses.replace(
    scene,
    pixels=seen(Image.fromarray(scene.pixels), Image.Resampling.BICUBIC, (_GROUND,) * 3),
    objects=tuple(
      dataclasses.replace(o, whole=mask(o.whole), visible=mask(o.visible)) for o in scene.objects
    ),
  )


def _homography(from_: np.ndarray, to: np.ndarray) -> list[float]:
  """Pillow's eight numbers: (x, y) -> (ax + by + c, dx + ey + f) / (gx + hy + 1)."""
  rows, right = [], []
  for (x, y), (u, v) in zip(from_, to, strict=True):
    rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    right += [u, v]
  return np.linalg.solve(np.array(rows), np.array(right)).tolist()


def camera(
  rng: np.random.Generator, photo: Photo, size: tuple[int, int], pan: tuple[float, float]
) -> Callable[[float], Canvas]:
  """What it shows of the photo at a time of 0 to 1."""
  rows, columns = photo.pixels.shape[:2]
  height, width = size
  far = height * (1 + abs(pan[1])), width * (1 + abs(pan[0]))
  zoom = rng.uniform(_CROP, 1.0) * min(rows / far[0], columns / far[1])
  x = rng.uniform(0, columns - zoom * far[1]) + zoom * width * max(-pan[0], 0)
  y = rng.uniform(0, rows - zoom * far[0]) + zoom * height * max(-pan[1], 0)
  step = zoom * width * pan[0], zoom * height * pan[1]
  return lambda t: _window(photo.pixels, x + t * step[0], y + t * step[1], zoom, size)


def random_post(rng: np.random.Generator, occlusion: Occlusion) -> Post:
  """From either side, between dark and light, slightly brown."""
  left, gray = bool(rng.random() < 0.5), np.float32(rng.uniform(60, 190))
  return Post(occlusion=occlusion, left=left, color=gray * np.array([1.05, 1.0, 0.9], np.float32))


def set_posts(canvas: Canvas, wholes: Sequence[Inside], posts: Sequence[Post]) -> Inside:
  """Draws, in place, round posts lit from the left before those objects that are on screen."""
  hidden = np.zeros(canvas.shape[:2], bool)
  for post in posts:
    if wholes[post.occlusion.number].any():
      rows, columns = _before(wholes[post.occlusion.number], post)
      light = np.cos(np.linspace(-0.6, 1.3, columns.stop - columns.start, dtype=np.float32))
      canvas[rows, columns] = light[None, :, None] * post.color
      hidden[rows, columns] = True
  return hidden


def _before(whole: Inside, post: Post) -> tuple[slice, slice]:
  """Rows and columns: over the mask's columns from one side, and somewhat over its edges."""
  box = tight(whole)
  columns = whole[:, int(box.x0) : int(box.x1)].sum(0)
  covered = np.cumsum(columns if post.left else columns[::-1]) / whole.sum()
  width = int(np.abs(covered - post.occlusion.share).argmin()) + 1
  over = max(round(box.height / 8), 2)
  x0, x1 = (box.x0 - over, box.x0 + width) if post.left else (box.x1 - width, box.x1 + over)
  part = lambda start, stop, limit: slice(max(int(start), 0), min(int(stop), limit))
  return part(box.y0 - over, box.y1 + over, whole.shape[0]), part(x0, x1, whole.shape[1])
