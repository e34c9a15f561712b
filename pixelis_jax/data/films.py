"""Films of cut-outs that move over photos: every object's pixels are known exactly in every frame.

Masks and lengths are those of composites.py.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from pixelis_jax.data import composites
from pixelis_jax.data.composites import SIZE, Inside, Occlusion
from pixelis_jax.data.pictures import Cutout, Photo
from pixelis_jax.types import Mask, Video, value

_TRIES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Course:
  """How an object moves: a quadratic Bezier curve of its centre, and its height at both ends."""

  start: tuple[float, float]  # x, y.
  bend: tuple[float, float]
  end: tuple[float, float]
  heights: tuple[float, float]

  def at(self, t: float) -> tuple[float, float, float]:
    """x, y and height at a time of 0 to 1."""
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    x, y = (a * p + b * q + c * r for p, q, r in zip(self.start, self.bend, self.end, strict=True))
    return x, y, (1 - t) * self.heights[0] + t * self.heights[1]


@value
class Track:
  """An object through a film. `masks` are whole, as `Placed.whole`; None while it is off screen.

  `shares` are the seen parts of all its pixels, those off screen included.
  """

  name: str
  color: str | None
  source: str
  masks: tuple[Mask | None, ...]
  shares: Float32[np.ndarray, " F"]


@value
class Film:
  """A video and its objects in the order drawn; `background` is the source of its photo."""

  video: Video
  tracks: tuple[Track, ...]
  background: str


def wander(
  rng: np.random.Generator,
  *,
  travel: float,
  heights: tuple[float, float],
  curved: bool = False,
  room: float = 0.2,
  size: tuple[int, int] = SIZE,
) -> Course:
  """A random course whose ends are `travel` of the canvas's width apart.

  Args:
    heights: Of the object at the start and at the end.
    curved: Whether it bends by a quarter to a half of its travel to one side.
    room: From both ends to the border, in shares of the sides.

  Raises:
    ValueError: the canvas is too small for that.
  """
  aspect = size[1] / size[0]
  for _ in range(_TRIES):
    angle = rng.uniform(0, 2 * math.pi)
    dx, dy = travel * math.cos(angle), travel * math.sin(angle) * aspect
    free = 1 - 2 * room - abs(dx), 1 - 2 * room - abs(dy)
    if min(free) >= 0:
      break
  else:
    raise ValueError(f"travel {travel} is too far for a canvas of {size} with room {room}")
  x = room + max(-dx, 0) + rng.uniform(0, free[0])
  y = room + max(-dy, 0) + rng.uniform(0, free[1])
  # A curve reaches half as far as its bend.
  aside = rng.choice((-1, 1)) * rng.uniform(0.5, 1.0) * curved
  bend = x + dx / 2 - aside * dy / aspect, y + dy / 2 + aside * dx * aspect
  clipped = tuple(min(max(float(c), 0.0), 1.0) for c in bend)
  return Course(start=(x, y), bend=clipped, end=(x + dx, y + dy), heights=heights)


def film(
  rng: np.random.Generator,
  background: Photo,
  cutouts: Sequence[Cutout],
  courses: Sequence[Course],
  *,
  frames: int = 48,
  rate: float = 12.0,
  size: tuple[int, int] = SIZE,
  occlusions: Sequence[Occlusion] = (),
  pan: tuple[float, float] = (0.0, 0.0),
  flip: bool = True,
  jitter: float = 0.1,
  shadow: float = 0.0,
) -> Film:
  """Objects that move along their courses, with their exact masks in every frame.

  Args:
    courses: One an object, as seen on the screen, from the first frame to the last.
    rate: Frames a second.
    occlusions: Posts before objects; they move with them.
    pan: How far the camera moves over the photo in the whole film, right and down.
    flip, jitter, shadow: As for `composites.compose`.

  Raises:
    ValueError: the numbers do not fit each other.
  """
  if frames < 2 or len(courses) != len(cutouts):
    raise ValueError(f"frames {frames} must be >= 2 and {len(courses)} courses {len(cutouts)}")
  for o in occlusions:
    if o.number >= len(cutouts) or o.stop > frames:
      raise ValueError(f"{o} must be of {len(cutouts)} objects and {frames} frames")
  camera = composites.camera(rng, background, size, pan)
  images = [composites.turned(rng, cutout, 0.0, flip) for cutout in cutouts]
  gains = [composites.random_gains(rng, jitter) for _ in cutouts]
  posts = [composites.random_post(rng, occlusion) for occlusion in occlusions]
  shown, masks, shares = [], [], []
  for f in range(frames):
    t = f / (frames - 1)
    canvas = camera(t)
    wholes, areas = [], []
    for image, gain, course in zip(images, gains, courses, strict=True):
      x, y, height = course.at(t)
      sprite = composites.sized(image, height, size, gain)
      h, w = sprite.alpha.shape
      corner = round(x * size[1] - w / 2), round(y * size[0] - h / 2)
      if shadow:
        composites.shade(canvas, sprite, *corner, shadow)
      wholes.append(composites.paste(canvas, sprite, *corner))
      areas.append(sprite.solid.sum())
    standing = [p for p in posts if p.occlusion.start <= f < p.occlusion.stop]
    hidden = composites.set_posts(canvas, wholes, standing)
    shown.append(composites.levels(canvas))
    masks.append([_mask(whole, f) for whole in wholes])
    seen = [(visible & ~hidden).sum() for visible in composites.unhidden(wholes)]
    shares.append(np.array(seen, np.float32) / np.array(areas, np.float32))
  times = np.arange(frames, dtype=np.float32) / np.float32(rate)
  return Film(
    video=Video(frames=np.stack(shown), times=times),
    tracks=tuple(
      Track(
        name=cutout.name,
        color=cutout.color,
        source=cutout.source,
        masks=tuple(row[i] for row in masks),
        shares=np.array([row[i] for row in shares], np.float32),
      )
      for i, cutout in enumerate(cutouts)
    ),
    background=background.source,
  )


def _mask(whole: Inside, frame: int) -> Mask | None:
  if not whole.any():
    return None
  box = composites.tight(whole)
  rows, columns = slice(int(box.y0), int(box.y1)), slice(int(box.x0), int(box.x1))
  return Mask(inside=np.ascontiguousarray(whole[rows, columns]), source=0, box=box, frame=frame)
