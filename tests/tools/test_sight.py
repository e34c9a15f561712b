import dataclasses
import math

import numpy as np
import pytest

from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.tools.views import IDENTITY, VIEWS, View
from pixelis_jax.types import Box, Picture, Task, ToolResult, Video

BY_NAME = {view.name: view for view in VIEWS}


def noise(height=100, width=200, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def sight(view=IDENTITY, results=(), images=1, shape=(100, 200)):
  task = Task(
    id="a", images=tuple(noise(*shape, seed=i) for i in range(images)), question="?", answer=None
  )
  return Sight(task=task, results=results, shown_size=lambda h, w: (2 * h, 3 * w), view=view)


def corners(box):
  return box.x0, box.y0, box.x1, box.y1


def test_images_are_numbered_as_the_policy_saw_them():
  crops = [Picture(pixels=noise(5, 7, 9), source=s, box=Box(1.0, 2.0, 8.0, 7.0)) for s in (1, 0)]
  results = [ToolResult(text="", images=(crops[0],)), ToolResult(text="x", error="x")]
  results += [ToolResult(text="", images=(crops[1],))]
  shown = sight(BY_NAME["rotate+10"], results, images=2).shown()
  assert [s.source for s in shown] == [0, 1, 1, 0]
  assert [s.size for s in shown] == [(200, 600), (200, 600), (10, 21), (10, 21)]
  assert [s.rotate for s in shown] == [0.0, 0.0, 10.0, 10.0]
  assert [corners(s.box) for s in shown[1:3]] == [(0, 0, 200, 100), (1, 2, 8, 7)]


def test_fractions_of_a_crop_are_source_pixels():
  shown = Shown(source=0, box=Box(100.0, 40.0, 140.0, 60.0), size=(9, 9), rotate=0.0)
  box = shown.to_source(0.25, 0.5, 0.75, 1.0)
  np.testing.assert_allclose(corners(box), (110, 50, 130, 60), rtol=1e-12)


def test_what_is_seen_in_a_rotated_crop_is_found_in_the_source():
  """Turned by 30 degrees counter-clockwise, what lies right of the centre came from lower right."""
  shown = Shown(source=0, box=Box(100.0, 100.0, 140.0, 140.0), size=(9, 9), rotate=30.0)
  box = shown.to_source(0.7, 0.4, 0.9, 0.6)  # Centre 0.3 * 40 = 12 right of (120, 120), 8 wide.
  x, y = box.center
  angle = math.radians(30)
  np.testing.assert_allclose((x, y), (120 + 12 * math.cos(angle), 120 + 12 * math.sin(angle)))
  np.testing.assert_allclose((box.width, box.height), (8, 8))


def test_a_point_survives_rotating_and_zooming_again():
  """A white square seen in a rotated crop, boxed there, is in the middle of the next crop."""
  pixels = np.zeros((200, 200, 3), np.uint8)
  pixels[118:123, 128:133] = 255  # Centre (130.5, 120.5).
  task = Task(id="a", images=(pixels,), question="?", answer=None)
  see = Sight(task=task, results=(), shown_size=lambda h, w: (h, w), view=BY_NAME["rotate+30"])
  first = see.crop(0, Box(70.0, 70.0, 151.0, 151.0))
  light = first.pixels[..., 0] > 128
  y, x = (np.flatnonzero(light.any(axis)).mean() + 0.5 for axis in (1, 0))
  result = ToolResult(text="", images=(first,))
  again = Sight(task=task, results=(result,), shown_size=lambda h, w: (h, w), view=see.view)
  _, shown = again.shown()
  box = shown.to_source((x - 10) / 81, (y - 10) / 81, (x + 10) / 81, (y + 10) / 81)
  np.testing.assert_allclose(box.center, (130.5, 120.5), atol=0.7)  # Half a pixel of thresholding.


def test_a_crop_is_widened_to_whole_source_pixels():
  picture = sight().crop(0, Box(10.2, 20.0, 30.0, 40.7))
  assert corners(picture.box) == (10, 20, 30, 41)
  np.testing.assert_array_equal(picture.pixels, noise()[20:41, 10:30])


def test_float_noise_does_not_widen_a_crop():
  assert 61 / 112 * 448 < 244 and 29 / 112 * 448 > 116  # Such noise; a rounded centre adds more.
  box = sight(shape=(300, 300)).crop(0, Box(100.0, 244 - 1e-9, 116 + 1e-9, 260.0)).box
  assert corners(box) == (100, 244, 116, 260)


def test_crops_come_from_the_image_they_name():
  picture = sight(images=2).crop(1, Box(0.0, 0.0, 9.0, 9.0))
  np.testing.assert_array_equal(picture.pixels, noise(seed=1)[:9, :9])
  assert picture.source == 1


def test_jitter_moves_the_crop_and_the_box_says_so():
  picture = sight(BY_NAME["down_right"]).crop(0, Box(10.0, 20.0, 30.0, 60.0))
  assert corners(picture.box) == (12, 24, 32, 64)
  np.testing.assert_array_equal(picture.pixels, noise()[24:64, 12:32])


def test_jitter_stops_at_the_edge():
  picture = sight(BY_NAME["up_left"]).crop(0, Box(0.0, 0.0, 40.0, 40.0))
  assert corners(picture.box) == (0, 0, 36, 36)


def test_views_are_applied_after_the_crop():
  pixels = sight(BY_NAME["invert"]).crop(0, Box(3.0, 4.0, 9.0, 9.0)).pixels
  np.testing.assert_array_equal(pixels, 255 - noise()[4:9, 3:9])


@pytest.mark.parametrize(
  "box, wrong",
  [
    (Box(200.0, 0.0, 210.0, 10.0), "outside the image"),
    (Box(-9.0, 5.0, -1.0, 10.0), "outside the image"),
    (Box(0.0, 0.0, 201.0, 1.0), "too thin: 201 x 1 pixels"),
  ],
)
def test_what_cannot_be_shown_is_the_policys_mistake(box, wrong):
  with pytest.raises(Mistake, match=wrong):
    sight(shape=(100, 200) if box.x1 != 201 else (100, 300)).crop(0, box)


def test_a_custom_view_composes_jitter_rotation_and_contrast():
  view = View(name="all", rotate=90.0, invert=True, dx=0.5)
  pixels = sight(view).crop(0, Box(10.0, 20.0, 30.0, 40.0)).pixels
  want = 255 - np.rot90(noise()[20:40, 20:40]).astype(int)  # Moved right by half of 20.
  assert np.abs(pixels - want).max() <= 1  # One grey level of bicubic rounding.


def test_a_frame_of_a_video_is_cropped_and_referred_to():
  frames = np.stack([noise(40, 60, seed) for seed in range(3)])
  video = Video(frames=frames, times=np.arange(3, dtype=np.float32))
  task = Task(id="a", images=(noise(),), question="?", answer=None, videos=(video,))
  see = Sight(task=task, results=(), shown_size=lambda h, w: (h, w), view=IDENTITY)
  picture = see.crop(0, Box(10.0, 5.0, 30.0, 25.0), 2)
  np.testing.assert_array_equal(picture.pixels, frames[2, 5:25, 10:30])
  later = dataclasses.replace(see, results=(ToolResult(text="", images=(picture,)),))
  _, crop = later.shown()
  assert (crop.source, crop.frame, corners(crop.box)) == (0, 2, (10, 5, 30, 25))
