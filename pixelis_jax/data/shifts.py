"""Distribution shifts of the digit scenes: how digits come to look different from training.

Frames, shapes, layout, question and answer stay; only the digits change (`static` replaces the
whole picture, so nothing can be read and only chance remains). A shift acts at one of three stages:
`ink` on a glyph's coverage, `plate` on a plate's interior, `image` on the canvas. Or handwriting is
of other people: another of `digits.HANDS`.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy import ndimage

from pixelis_jax.data import digits
from pixelis_jax.types import value

Ink = Float32[np.ndarray, "side side"]
Plate = Float32[np.ndarray, "height width 3"]


@value
class Shift:
  """What happens at each stage; None leaves the stage as it is."""

  ink: Callable[[Ink], Ink] | None = None
  plate: Callable[[Plate, np.random.Generator], Plate] | None = None
  image: Callable[[UInt8[np.ndarray, "height width 3"], np.random.Generator], np.ndarray] | None = (
    None
  )
  hand: str = digits.HANDS[0]


def rotate(ink: Ink, *, degrees: float) -> Ink:
  """Handwriting turned counter-clockwise inside its upright plate."""
  turned = Image.fromarray(ink).rotate(degrees, resample=Image.Resampling.BICUBIC)
  return np.clip(np.asarray(turned), 0.0, 1.0)


def dim(plate: Plate, rng: np.random.Generator, *, contrast: float) -> Plate:
  """A faded plate: `contrast` of the usual differences from its mean."""
  del rng
  mean = plate.mean(dtype=np.float32)
  return mean + np.float32(contrast) * (plate - mean)


def blur(plate: Plate, rng: np.random.Generator, *, sigma: float) -> Plate:
  """Gaussian blur, sigma in source pixels; the frame does not bleed in."""
  del rng
  return ndimage.gaussian_filter(plate, (sigma, sigma, 0.0), mode="nearest")


def invert(plate: Plate, rng: np.random.Generator) -> Plate:
  """Dark ink on a light plate."""
  del rng
  return np.float32(255) - plate


def noise(plate: Plate, rng: np.random.Generator, *, sigma: float) -> Plate:
  """Independent Gaussian noise on each pixel and channel; sigma in grey levels of 255."""
  return plate + np.float32(sigma) * rng.standard_normal(plate.shape, dtype=np.float32)


def static(
  image: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
  """Uniform random noise instead of the picture: the answer cannot be seen."""
  return rng.integers(0, 256, image.shape, dtype=np.uint8)


def whole(
  name: str, image: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
  """A shift of a picture that has no plates: all of it changes. See `check_whole`."""
  shift = SHIFTS[name]
  if shift.image is not None:
    return shift.image(image, rng)
  if shift.plate is None:
    return image
  changed = shift.plate(image.astype(np.float32), rng)
  return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def check_whole(name: str) -> None:
  """Raises ValueError for a shift that changes handwriting alone, or that there is not."""
  of_hands = lambda shift: shift.ink is not None or shift.hand != digits.HANDS[0]
  known = [name for name, shift in SHIFTS.items() if not of_hands(shift)]
  if name not in known:
    raise ValueError(f"shift {name!r} of pictures without digits must be one of {known}")


# Name -> shift, strengths included.
SHIFTS: dict[str, Shift] = {
  "none": Shift(),
  "rotate": Shift(ink=functools.partial(rotate, degrees=30.0)),
  "dim": Shift(plate=functools.partial(dim, contrast=0.4)),
  "invert": Shift(plate=invert),
  "noise": Shift(plate=functools.partial(noise, sigma=18.0)),
  "blur": Shift(plate=functools.partial(blur, sigma=0.92)),
  "writers": Shift(hand="opencv"),
  "static": Shift(image=static),
}
