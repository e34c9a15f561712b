import math

import numpy as np
import pytest

from pixelis_jax.tools import places
from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import Box, Mask, Picture, Task, ToolResult

# A picture of the 40 x 20 source pixels from (100, 50) on, shown at 80 x 60.
CROP = Shown(source=0, box=Box(100.0, 50.0, 140.0, 70.0), size=(60, 80), rotate=0.0)


def sight(*results: ToolResult) -> Sight:
  task = Task(id="a", images=(np.zeros((90, 200, 3), np.uint8),), question="?", answer=None)
  return Sight(task=task, results=results, shown_size=lambda h, w: (h, w), view=IDENTITY)


def a_mask(left: float) -> Mask:
  return Mask(inside=np.ones((2, 3), bool), source=0, box=Box(left, 0.0, left + 3, 2.0))


def corners(box: Box) -> tuple[float, ...]:
  return box.x0, box.y0, box.x1, box.y1


def test_a_box_in_a_crop_lies_in_the_source():
  """Half a source pixel an x unit, a third a y unit; what is outside the picture is cut off."""
  box = places.box({"bbox_2d": [20, 30, 90, 60]}, CROP)
  np.testing.assert_allclose(corners(box), (110, 60, 140, 70), rtol=1e-12)


def test_a_point_in_a_crop_lies_in_the_source():
  np.testing.assert_allclose(places.point({"point_2d": [20, 30]}, CROP), (110, 60), rtol=1e-12)


@pytest.mark.parametrize("point", [[-1, 0], [0, -1], [80, 0], [0, 60]])
def test_a_point_outside_is_a_mistake(point):
  with pytest.raises(Mistake, match=r"must satisfy 0 <= x < 80 and 0 <= y < 60"):
    places.point({"point_2d": point}, CROP)


@pytest.mark.parametrize("rotate", [0.0, 30.0, -20.0])
def test_what_is_told_is_where_the_policy_would_point(rotate):
  """`told` inverts `box`, in a turned picture too: to half a unit, as it is rounded."""
  shown = Shown(source=0, box=Box(20.0, 10.0, 180.0, 80.0), size=(700, 1600), rotate=rotate)
  given = [700, 300, 900, 400]
  assert places.told(shown, places.box({"bbox_2d": given}, shown)) == given


def test_a_turned_picture_tells_turned_places():
  """A source place right of the middle is seen up right when turned counter-clockwise."""
  shown = Shown(source=0, box=Box(0.0, 0.0, 100.0, 100.0), size=(100, 100), rotate=30.0)
  x0, y0, x1, y1 = places.told(shown, Box(68.0, 48.0, 72.0, 52.0))  # 20 right of (50, 50).
  assert (x0 + x1) / 2 == round(50 + 20 * math.cos(math.pi / 6))
  assert (y0 + y1) / 2 == 50 - 20 * math.sin(math.pi / 6)


def test_masks_are_numbered_over_the_episode():
  first, second, third = (a_mask(x) for x in (0.0, 10.0, 20.0))
  see = sight(ToolResult(text="", masks=(first, second)), ToolResult(text="", masks=(third,)))
  assert [places.mask(see, n) for n in (1, 2, 3)] == [first, second, third]
  with pytest.raises(Mistake, match="mask 4 must be one of 1 to 3"):
    places.mask(see, 4)
  with pytest.raises(Mistake, match="there is no mask 1: no call has returned one"):
    places.mask(sight(), 1)


def test_a_mask_has_the_size_of_its_box():
  with pytest.raises(ValueError, match="must have the size of its box"):
    Mask(inside=np.ones((3, 2), bool), source=0, box=Box(0.0, 0.0, 3.0, 2.0))


def seen(*pictures: Picture) -> Sight:
  """Of a picture of 400 x 600 that is shown in 40 x 60; crops in 80 x 80."""
  size = lambda height, width: (40, 60) if (height, width) == (400, 600) else (80, 80)
  task = Task(id="", images=(np.zeros((400, 600, 3), np.uint8),), question="", answer=None)
  results = [ToolResult(text="", images=pictures)]
  return Sight(task=task, results=results, shown_size=size, view=IDENTITY)


def test_boxes_are_told_in_units_of_the_picture_as_shown():
  # 10 source pixels a unit: 104 is nearer to 10 units, 116 to 12.
  assert places.pointed(seen(), Box(104.0, 210.0, 296.0, 396.0)) == {"bbox_2d": [10, 21, 30, 40]}
  crop = Picture(
    pixels=np.zeros((100, 100, 3), np.uint8), source=0, box=Box(200.0, 100.0, 300.0, 200.0)
  )
  # (210 - 200) / 100 of 80 is 8; image 1 is the whole picture.
  told = places.pointed(seen(crop), Box(210.0, 150.0, 225.0, 175.0), 2)
  assert told == {"bbox_2d": [8, 40, 20, 60], "image": 2}


def test_boxes_stay_inside_and_are_never_too_small_for_a_tool():
  assert places.pointed(seen(), Box(-8.0, 390.0, 4.0, 420.0)) == {"bbox_2d": [0, 38, 2, 40]}
  assert places.pointed(seen(), Box(597.0, 1.0, 599.0, 3.0)) == {"bbox_2d": [58, 0, 60, 2]}


def test_coordinates_are_in_the_image_that_a_call_names():
  crop = Picture(
    pixels=np.zeros((100, 100, 3), np.uint8), source=0, box=Box(200.0, 100.0, 300.0, 200.0)
  )
  assert places.frame({}, seen(crop)) == (40, 60)
  assert places.frame({"image": 2}, seen(crop)) == (80, 80)
  with pytest.raises(Mistake, match="`image` 3: choose one of the images 1 to 2"):
    places.frame({"image": 3}, seen(crop))
