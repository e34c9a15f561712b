"""Cut-outs of which every pixel of a picture can be told, and a photo that adds nothing to them."""

import numpy as np

from pixelis_jax.data.pictures import Cutout, Photo

BLACK = Photo(name="night", pixels=np.zeros((400, 600, 3), np.uint8), source="night")


def thing(height, width, channel=0, alpha=None):
  """Full in one channel: over black its share of a pixel can be read from the pixel."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[:, :, channel] = 255
  alpha = np.full((height, width), 255, np.uint8) if alpha is None else alpha
  return Cutout(name=f"thing {channel}", color=None, pixels=pixels, alpha=alpha, source="made")


def disc(side, channel=0):
  y, x = np.mgrid[:side, :side] + 0.5 - side / 2
  return thing(side, side, channel, (255 * (np.hypot(x, y) <= side / 2)).astype(np.uint8))


def corner(side, channel=0):
  """The upper left half of a square: no mirror image or rotation equals it."""
  y, x = np.mgrid[:side, :side]
  return thing(side, side, channel, np.where(x + y < side, 255, 0).astype(np.uint8))
