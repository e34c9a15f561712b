import numpy as np
import pytest

from pixelis_jax.data import digits, scenes, shifts
from tests import fakes


def rng():
  return np.random.default_rng(0)


def bar():
  """A horizontal stroke right of the middle: column 20, row 14 of 28."""
  ink = np.zeros((28, 28), np.float32)
  ink[14, 20] = 1.0
  return ink


def test_rotate_turns_counter_clockwise_about_the_middle():
  # A point right of the centre moves up under a counter-clockwise quarter turn, and stays 6 away.
  row, column = np.unravel_index(shifts.rotate(bar(), degrees=90.0).argmax(), (28, 28))
  assert (row, column) == (28 - 1 - 20, 14)


def test_dim_keeps_the_mean_and_scales_the_differences():
  plate = np.full((28, 28, 3), 100.0, np.float32)
  plate[:14] = 60.0
  dimmed = shifts.dim(plate, rng(), contrast=0.25)
  # Mean 80; 20 above and below become 5.
  np.testing.assert_allclose(dimmed[0, 0], 75.0, rtol=1e-6)
  np.testing.assert_allclose(dimmed[27, 0], 85.0, rtol=1e-6)


def test_invert_is_its_own_inverse():
  plate = rng().uniform(0, 255, (28, 28, 3)).astype(np.float32)
  once = shifts.invert(plate, rng())
  np.testing.assert_allclose(once + plate, 255.0, rtol=1e-6)


def test_noise_has_the_strength_it_says():
  flat = np.full((100, 100, 3), 128.0, np.float32)
  noisy = shifts.noise(flat, rng(), sigma=60.0)
  # The standard error of a standard deviation from 30,000 draws is 60 / sqrt(60,000) = 0.25.
  assert abs(noisy.std() - 60.0) < 1.5
  assert abs(np.corrcoef(noisy[:, :, 0].ravel(), noisy[:, :, 1].ravel())[0, 1]) < 0.05


def test_blur_spreads_light_in_the_plane_but_not_between_channels():
  plate = np.zeros((28, 28, 3), np.float32)
  plate[14, 14, 1] = 100.0
  blurred = shifts.blur(plate, rng(), sigma=1.0)
  assert blurred[:, :, [0, 2]].max() == 0.0
  # A Gaussian of standard deviation 1 in two axes peaks at 1 / (2 pi).
  np.testing.assert_allclose(blurred[14, 14, 1], 100 / (2 * np.pi), rtol=1e-2)
  np.testing.assert_allclose(blurred.sum(), 100.0, rtol=1e-3)


def test_static_owes_nothing_to_the_picture():
  black = np.zeros((64, 64, 3), np.uint8)
  white = np.full((64, 64, 3), 255, np.uint8)
  np.testing.assert_array_equal(shifts.static(black, rng()), shifts.static(white, rng()))
  assert abs(shifts.static(black, rng()).mean() - 127.5) < 3


# "writers" is another hand, which scenes are given: tests/data/test_digits.py.
INSIDE = [name for name in shifts.SHIFTS if name not in ("none", "static", "writers")]


@pytest.mark.parametrize("name", INSIDE)
def test_a_shift_changes_plate_interiors_and_nothing_else(name):
  def picture(shift):
    source = digits.load("stream")
    return scenes.compose(np.random.default_rng(3), source, id="a", shift=shift)

  usual, shifted = picture("none"), picture(name)
  inside = np.zeros((scenes.CANVAS, scenes.CANVAS), bool)
  for plate in usual.plates:
    low, high = scenes.FRAME, scenes.PLATE - scenes.FRAME
    inside[plate.y + low : plate.y + high, plate.x + low : plate.x + high] = True
  changed = (usual.task.images[0] != shifted.task.images[0]).any(axis=2)
  assert not changed[~inside].any()
  # Every plate, not the asked one alone: a shift must not give the answer's place away.
  for plate in usual.plates:
    assert changed[plate.y : plate.y + scenes.PLATE, plate.x : plate.x + scenes.PLATE].any()
  assert shifted.task.question == usual.task.question
  assert shifted.task.answer == usual.task.answer
  assert shifted.task.boxes == usual.task.boxes


def test_a_picture_without_digits_changes_as_a_whole():
  image = fakes.image(8, 8, seed=1)
  # Levels become 255 minus themselves; dim keeps 0.4 of the distance to the mean.
  np.testing.assert_array_equal(shifts.whole("invert", image, rng()), 255 - image)
  dim = shifts.whole("dim", image, rng())
  np.testing.assert_allclose(dim, image.mean() + 0.4 * (image - image.mean()), atol=0.51)
  assert (shifts.whole("static", image, rng()) != image).mean() > 0.9
  np.testing.assert_array_equal(shifts.whole("none", image, rng()), image)
  shifts.check_whole("blur")
  for name in ("rotate", "writers"):
    with pytest.raises(ValueError, match=f"shift '{name}' of pictures without digits must be one"):
      shifts.check_whole(name)
