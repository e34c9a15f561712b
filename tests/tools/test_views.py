import dataclasses

import numpy as np
import pytest

from pixelis_jax.tools import views
from pixelis_jax.tools.views import BY_NAME, IDENTITY, VIEWS, View, jitter, look, undone, views_for
from pixelis_jax.types import Box


def noise(height=40, width=60, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def dot(x, y, height=60, width=60):
  """Black with one white 3 x 3 square centred on pixel (x, y)."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
  return pixels


def centroid(pixels):
  """(x, y) of the light, in pixels from the left and upper edge."""
  light = pixels[..., 0].astype(np.float64)
  y, x = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
  return (x * light).sum() / light.sum(), (y * light).sum() / light.sum()


def test_the_family_is_15_distinct_views_and_begins_with_identity():
  assert len(VIEWS) == len(BY_NAME) == 15
  assert VIEWS[0] is IDENTITY
  changes = {(v.rotate, v.contrast, v.filter, v.invert, v.dx, v.dy, v.scale) for v in VIEWS}
  assert len(changes) == 15
  assert sorted(v.rotate for v in VIEWS if v.rotate) == [-30, -20, -10, 10, 20, 30]


def test_views_that_change_an_answer_are_kept_from_its_kind():
  assert views_for("framed") == VIEWS
  assert {v.name for v in VIEWS} - {v.name for v in views_for("color")} == {
    "invert",
    "stretch_invert",
  }


def test_identity_is_the_crop_and_not_a_window_on_the_source():
  pixels = noise()
  crop = look(IDENTITY, pixels, Box(10.0, 5.0, 30.0, 25.0))
  np.testing.assert_array_equal(crop, pixels[5:25, 10:30])
  crop[:] = 0
  assert pixels[5:25, 10:30].any()


@pytest.mark.parametrize("size", [(21, 31), (20, 30)])
def test_a_full_turn_is_the_crop(size):
  """360 degrees samples at the pixel centres: an offset of half a pixel would blur the noise."""
  pixels, box = noise(), Box(10.0, 5.0, 10.0 + size[1], 5.0 + size[0])
  turned = look(View(name="full", rotate=360.0), pixels, box)
  # cos and sin of 2 pi are exact to 3e-16; one grey level of bicubic rounding.
  assert np.abs(turned.astype(int) - pixels[5 : 5 + size[0], 10 : 10 + size[1]]).max() <= 1


def test_a_quarter_turn_is_counter_clockwise():
  pixels = noise(40, 40)
  turned = look(View(name="quarter", rotate=90.0), pixels, Box(10.0, 10.0, 30.0, 30.0))
  want = np.rot90(pixels[10:30, 10:30])  # numpy turns counter-clockwise too, as displayed.
  assert np.abs(turned.astype(int) - want).max() <= 1


@pytest.mark.parametrize("degrees", [-30, -10, 20, 30])
def test_a_point_moves_along_the_circle(degrees):
  """10 right of the centre goes to (10 cos, -10 sin): up for positive angles, as y points down."""
  box = Box(10.0, 10.0, 51.0, 51.0)  # Centre (30.5, 30.5), the middle of pixel 30.
  x, y = centroid(look(View(name="r", rotate=float(degrees)), dot(40, 30), box))
  want = 20.5 + 10 * np.cos(np.radians(degrees)), 20.5 - 10 * np.sin(np.radians(degrees))
  np.testing.assert_allclose((x, y), want, atol=0.1)  # The 3 x 3 square is resampled.


def test_corners_of_a_rotated_crop_come_from_the_source_around_it():
  pixels = np.full((100, 100, 3), 50, np.uint8)
  pixels[40:60, 40:60] = 200
  crop = look(BY_NAME["rotate+30"], pixels, Box(40.0, 40.0, 60.0, 60.0))
  assert crop.shape == (20, 20, 3)
  corners = crop[[0, 0, -1, -1], [0, -1, 0, -1]]
  np.testing.assert_array_equal(corners, 50)  # A fill with black would give 0.
  assert (crop[10, 10] == 200).all()


def test_beyond_the_image_the_edge_is_repeated():
  pixels = np.full((30, 30, 3), 77, np.uint8)
  crop = look(BY_NAME["rotate-30"], pixels, Box(0.0, 0.0, 30.0, 30.0))
  np.testing.assert_array_equal(crop, 77)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.name)
def test_every_view_takes_every_shape(view, shape):
  pixels = noise(*shape)
  crop = look(view, pixels, Box(0.0, 0.0, float(shape[1]), float(shape[0])))
  assert crop.shape == pixels.shape and crop.dtype == np.uint8


def test_invert_is_255_minus():
  pixels = noise(4, 4)
  np.testing.assert_array_equal(
    look(BY_NAME["invert"], pixels, Box(0.0, 0.0, 4.0, 4.0)), 255 - pixels.astype(int)
  )


def test_stretch_maps_the_percentiles_and_keeps_hue():
  """Greys 100 and 150, half each, are the percentiles: v becomes (v - 100) * 255 / 50."""
  pixels = np.full((10, 10, 3), 100, np.uint8)
  pixels[:5] = 150
  out = look(BY_NAME["stretch"], pixels, Box(0.0, 0.0, 10.0, 10.0))
  assert set(out.ravel().tolist()) == {0, 255}
  # One orange pixel of 100: 1 % of the area, luminance .299 * 140 + .587 * 120 + .114 * 110 =
  # 124.8, inside.
  pixels[0, 0] = (140, 120, 110)
  out = look(BY_NAME["stretch"], pixels, Box(0.0, 0.0, 10.0, 10.0))
  # 40 * 5.1 = 204, 20 * 5.1 = 102, 10 * 5.1 = 51: per-channel stretching would give 0 or 255.
  np.testing.assert_array_equal(out[0, 0], (204, 102, 51))


def test_stretch_reads_its_levels_off_the_middle():
  """A white frame around greys 100 and 110: over the whole crop they would stay near."""
  pixels = np.full((12, 12, 3), 255, np.uint8)
  pixels[2:-2, 2:-2] = 100
  pixels[2:6, 2:-2] = 110
  out = look(BY_NAME["stretch"], pixels, Box(0.0, 0.0, 12.0, 12.0))
  assert set(out[2:-2, 2:-2].ravel().tolist()) == {0, 255}


def test_stretch_leaves_one_grey_alone():
  pixels = np.full((5, 5, 3), 93, np.uint8)
  np.testing.assert_array_equal(look(BY_NAME["stretch"], pixels, Box(0.0, 0.0, 5.0, 5.0)), pixels)


def test_stretch_comes_before_inversion():
  pixels = np.full((10, 10, 3), 100, np.uint8)
  pixels[:5] = 150
  out = look(BY_NAME["stretch_invert"], pixels, Box(0.0, 0.0, 10.0, 10.0))
  assert (out[:5] == 0).all() and (out[5:] == 255).all()


def step(left, right, size=21):
  """Columns of one grey up to the middle, of another from there."""
  pixels = np.full((size, size, 3), left, np.uint8)
  pixels[:, size // 2 :] = right
  return pixels


def test_denoise_averages_noise_and_keeps_an_edge():
  """Sigma 10 in each of 3 channels is far less than 80, all 13 pixels of the disc count near alike.

  Their mean has a standard deviation of 10 / sqrt(13) = 2.8 at least; weights by distance and by
  likeness make it 3 to 4. Across the edge lie 3 * 150 grey levels, which weigh exp(-15.8).
  """
  rng = np.random.default_rng(0)
  clean = step(50, 200)
  noisy = np.clip(np.rint(clean + rng.normal(0.0, 10.0, clean.shape)), 0, 255).astype(np.uint8)
  out = look(BY_NAME["denoise"], noisy, Box(0.0, 0.0, 21.0, 21.0)).astype(float)
  assert 2.5 < (out - clean).std() < 5.0
  assert abs(out[:, 9].mean() - 50) < 3 and abs(out[:, 10].mean() - 200) < 3


def test_sharpen_oversteps_an_edge_by_twice_what_blur_takes():
  """A blur of sigma 1.5 leaves, half a pixel from a step of 100, Phi(0.5 / 1.5) = 0.63 of it.

  OpenCV's kernel is sampled at whole pixels: half of its weight beside the middle one, which has
  1 / (1.5 sqrt(2 pi)) = 0.266, lies on either side, so 0.633. It takes 36.7 off: 2 * 36.7 come on.
  """
  out = look(BY_NAME["sharpen"], step(80, 180), Box(0.0, 0.0, 21.0, 21.0)).astype(int)
  assert np.abs(out[:, 10] - (180 + 73)).max() <= 1 and np.abs(out[:, 9] - (80 - 73)).max() <= 1
  np.testing.assert_array_equal(out[:, [0, 20]], np.broadcast_to([[[80], [180]]], (21, 2, 3)))


def test_filters_come_after_the_stretch():
  """A step of 10 becomes one of 255, which a filter has to keep: before, it would average it."""
  view = View(name="both", contrast="stretch", filter="denoise")
  out = look(view, step(100, 110), Box(0.0, 0.0, 21.0, 21.0))
  assert set(out.ravel().tolist()) == {0, 255}


@pytest.mark.parametrize(
  "name, want",
  [
    ("identity", (10.0, 20.0, 30.0, 60.0)),
    ("down_right", (12.0, 24.0, 32.0, 64.0)),  # A tenth of 20 and of 40.
    ("up_left", (8.0, 16.0, 28.0, 56.0)),
    ("wide", (8.5, 17.0, 31.5, 63.0)),  # 23 x 46 about (20, 40).
  ],
)
def test_jitter_is_relative_to_the_box(name, want):
  box = jitter(BY_NAME[name], Box(10.0, 20.0, 30.0, 60.0))
  np.testing.assert_allclose((box.x0, box.y0, box.x1, box.y1), want, rtol=1e-12)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_shows_plainly_what_was_seen_undone(view):
  """A picture that is `undone(view)` of another comes out as that other in `view`."""
  back = undone(view)
  if view.contrast != "none" or view.filter != "none":
    assert back is None
    return
  y, x = np.mgrid[:120, :120]
  waves = 128 + 60 * np.sin(x / 9) + 50 * np.cos(y / 7)
  pixels = np.repeat(waves[..., None], 3, axis=2).astype(np.uint8)
  shown = look(back, pixels, Box(0.0, 0.0, 120.0, 120.0))
  again = look(view, shown, Box(40.0, 40.0, 80.0, 80.0)).astype(int)
  # Waves of 44 pixels and more, sampled twice: bicubic interpolation is off by less than a level a
  # time, and rounding by a half. Turned the other way it would be off by up to 110.
  assert np.abs(again - pixels[40:80, 40:80]).max() <= 3
  box = Box(10.0, 20.0, 30.0, 60.0)
  moved = jitter(view, jitter(back, box))
  np.testing.assert_allclose(dataclasses.astuple(moved), dataclasses.astuple(box), rtol=1e-12)
  assert back.excluded_kinds == view.excluded_kinds


def test_the_module_says_why_rotation_is_safe():
  assert "left of" in views.__doc__ and "6 reads as a 9" in views.__doc__
