"""A textured square over a textured ground: where it is follows from how it was moved."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

from pixelis_jax.tools import schema, track, zoom
from pixelis_jax.tools.frames import select_frames
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.track import TRACK_OBJECT, TRACKERS, follow, track_object
from pixelis_jax.tools.views import IDENTITY, VIEWS, View
from pixelis_jax.types import Box, Mask, Task, ToolResult, Video

HEIGHT, WIDTH, SIDE = 90, 120, 24


def texture(height, width, seed, low, high):
  """Blobs of about 4 pixels in levels `low` to `high`."""
  coarse = np.random.default_rng(seed).integers(low, high, (height // 4, width // 4, 3), np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


GROUND, SQUARE = texture(HEIGHT, WIDTH, 0, 10, 160), texture(SIDE, SIDE, 1, 90, 250)


def clip(places, hidden=(), sides=None):
  """Frames with the square's upper left corner at each place, behind a gray post where hidden."""
  frames = np.stack([GROUND] * len(places))
  for i, (frame, (x, y)) in enumerate(zip(frames, places, strict=True)):
    side = sides[i] if sides else SIDE
    square = cv2.resize(SQUARE, (side, side), interpolation=cv2.INTER_AREA)
    part = frame[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
    part[:] = square[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]]
    if i in hidden:
      frame[max(y - 3, 0) : y + side + 3, max(x - 3, 0) : x + side + 3] = 128
  return frames


def boxes_of(places, sides=None):
  sides = sides or [SIDE] * len(places)
  return np.array(
    [(x, y, x + s, y + s) for (x, y), s in zip(places, sides, strict=True)], np.float32
  )


def ious(a, b):
  pairs = zip(a.tolist(), b.tolist(), strict=True)
  return np.array([Box(*p).iou(Box(*q)) for p, q in pairs])


STRAIGHT = [(10 + 3 * i, 20 + i) for i in range(20)]  # 3 right and 1 down a frame.


@pytest.mark.parametrize("tracker", TRACKERS)
def test_each_tracker_follows_a_square(tracker):
  """One pixel off in x and in y gives an IoU of 23 * 23 / (2 * 24 * 24 - 23 * 23) = 0.85."""
  boxes, seen = follow(clip(STRAIGHT), boxes_of(STRAIGHT)[0], tracker)
  assert boxes.shape == (20, 4) and boxes.dtype == np.float32 and seen.all()
  assert ious(boxes, boxes_of(STRAIGHT)).min() > 0.84


@pytest.mark.parametrize("tracker", TRACKERS)
def test_what_was_hidden_is_lost_and_found_again(tracker):
  """While hidden it goes on by 15 pixels; a tracker that stays with the post has no overlap left.

  A tracker that is told of no loss would say `seen` throughout.
  """
  hidden = range(8, 13)
  boxes, seen = follow(clip(STRAIGHT, hidden), boxes_of(STRAIGHT)[0], tracker)
  assert seen.tolist() == [i not in hidden for i in range(20)]
  assert ious(boxes, boxes_of(STRAIGHT))[seen].min() > 0.7
  np.testing.assert_array_equal(boxes[8:13], np.stack([boxes[7]] * 5))  # The last known.


def test_a_large_frame_is_searched_at_lower_resolution(monkeypatch):
  """At 500 pixels a search, even the window about the square, 48 x 48, is too large for one."""
  monkeypatch.setattr(track, "_SOUGHT", 500)
  boxes, seen = follow(clip(STRAIGHT, range(8, 13)), boxes_of(STRAIGHT)[0], "template")
  assert seen.tolist() == [i not in range(8, 13) for i in range(20)]
  assert ious(boxes, boxes_of(STRAIGHT))[seen].min() > 0.6


@pytest.mark.parametrize("tracker", TRACKERS)
def test_what_leaves_the_frame_is_lost(tracker):
  """8 pixels a frame: at 96, in frame 8, it is whole, at 120, in frame 11, it is gone for good."""
  places = [(32 + 8 * i, 30) for i in range(16)]
  boxes, seen = follow(clip(places), boxes_of(places)[0], tracker)
  assert seen[:9].all() and not seen[11:].any()
  assert ious(boxes, boxes_of(places))[:9].min() > 0.7


def test_a_box_grows_with_its_object():
  """From 24 to 43 pixels: a box that stays 24 ends with an IoU of 24 * 24 / (43 * 43) = 0.31."""
  sides = [SIDE + i for i in range(20)]
  places = [(40 - i // 2, 30 - i // 2) for i in range(20)]
  boxes, seen = follow(clip(places, sides=sides), boxes_of(places)[0], "template")
  assert seen.all() and ious(boxes, boxes_of(places, sides)).min() > 0.7


def test_an_even_object_on_even_ground_is_followed():
  """No texture at all: correlations of such patches are 0 / 0."""
  frames = np.full((10, HEIGHT, WIDTH, 3), (90, 110, 90), np.uint8)
  places = [(10 + 4 * i, 30) for i in range(10)]
  for frame, (x, y) in zip(frames, places, strict=True):
    frame[y : y + SIDE, x : x + SIDE] = (200, 40, 40)
  boxes, seen = follow(frames, boxes_of(places)[0], "template")
  assert seen.all() and ious(boxes, boxes_of(places)).min() > 0.7


@pytest.mark.parametrize(
  "box", [(0, 0, 4, 4), (0, 10, 80, 14), (116, 86, 120, 90), (0, 0, WIDTH, HEIGHT)]
)
def test_small_thin_and_large_boxes_do_no_harm(box):
  boxes, _ = follow(clip(STRAIGHT[:4]), np.array(box, np.float32), "csrt")
  assert np.isfinite(boxes).all()


def test_a_tracker_that_fails_has_lost_it():
  """On such noise CSRT's box shrinks to nothing, at which it fails an assertion of its own."""
  noise = np.random.default_rng(0).integers(0, 256, (8, 20, 76, 3), np.uint8)
  tracker = cv2.TrackerCSRT_create()
  tracker.init(noise[0], (2, 2, 68, 4))
  with pytest.raises(cv2.error):
    for one in noise[1:]:
      tracker.update(one)
  _, seen = follow(noise, np.array([2, 2, 70, 6], np.float32), "csrt")
  assert seen.tolist() == [True] + [False] * 7


def test_a_mask_tells_the_object_from_the_ground():
  """A frame around a window: the ground seen through it changes, and is no part of the object."""
  frames = clip(STRAIGHT)
  solid = np.ones((SIDE, SIDE), bool)
  solid[4:20, 4:20] = False
  for frame, (x, y) in zip(frames, STRAIGHT, strict=True):
    window = frame[y + 4 : y + 20, x + 4 : x + 20]
    window[:] = GROUND[y + 4 : y + 20, x + 4 : x + 20]
  boxes, seen = follow(frames, boxes_of(STRAIGHT)[0], "template", solid)
  assert seen.all() and ious(boxes, boxes_of(STRAIGHT)).min() > 0.7


def test_what_others_drew_by_chance_changes_nothing():
  """OpenCV has one stream of random numbers a process, from which GrabCut starts."""
  found = []
  for seed in (1, 2):
    cv2.setRNGSeed(seed)
    found.append(follow(clip(STRAIGHT[:5]), boxes_of(STRAIGHT)[0] + np.float32(0.3), "template")[0])
  np.testing.assert_array_equal(*found)


def test_trackers_are_named():
  with pytest.raises(ValueError, match=r"'sort' must be one of \['csrt', 'flow', 'template'\]"):
    follow(clip(STRAIGHT[:2]), boxes_of(STRAIGHT)[0], "sort")


def test_an_opencv_without_csrt_says_how_to_repair_it(monkeypatch):
  monkeypatch.delattr(cv2, "TrackerCSRT_create")
  with pytest.raises(ValueError, match="--force-reinstall opencv-contrib-python-headless"):
    follow(clip(STRAIGHT[:2]), boxes_of(STRAIGHT)[0], "csrt")


# The tool: 20 frames at 4 a second, of which it is shown every other.
VIDEO = Video(frames=clip(STRAIGHT), times=np.arange(20, dtype=np.float32) / np.float32(4))


def here(function, *arguments):
  return function(*arguments)


def sight(*results, video=VIDEO, view=IDENTITY, compute=here, shown=1):
  task = Task(
    id="a", images=(np.zeros((8, 8, 3), np.uint8),), question="?", answer=None, videos=(video,)
  )
  return Sight(
    task=task,
    results=results,
    shown_size=lambda h, w: (shown * h, shown * w),
    shown_frames=lambda video: (np.arange(0, len(video.times), 2), (HEIGHT, WIDTH)),
    view=view,
    compute=compute,
  )


def frame(number=1, **kwargs):
  return select_frames({"frames": [number]}, sight(**kwargs))


def run(arguments, see, **kwargs):
  schema.check(arguments, TRACK_OBJECT["function"]["parameters"])
  return track_object(arguments, see, **kwargs)


class Fake:
  """Stands for `follow`: the start moved by `step` a frame; keeps what it was given."""

  def __init__(self, step=(0, 0, 0, 0), lost=()):
    self.step, self.lost = np.array(step, np.float32), lost

  def __call__(self, function, frames, box, method, solid):
    assert function is follow
    self.frames, self.box, self.method, self.solid = frames, box, method, solid
    seen = np.array([i not in self.lost for i in range(len(frames))])
    return np.stack([box + self.step * np.float32(i) for i in range(len(frames))]), seen


def test_the_policy_is_told_where_it_went():
  """Its frame has twice the pixels, so the square goes 6 right and 2 down a frame, up to 19.

  4 of 19 frames: 4.75 -> 5, 9.5 -> 10 (numpy rounds to even), 14.25 -> 14 and 19.
  """
  see = sight(frame(), shown=2)
  result = run({"bbox_2d": [20, 40, 68, 88], "image": 2, "frames": 4}, see, tracker="template")
  assert result.text.splitlines() == [
    "Followed forward from 0 s, seen up to the end of the video at 4.75 s. Boxes are in the frame"
    " of image 2.",
    "1.25 s: seen at [50, 50, 98, 98]",
    "2.5 s: seen at [80, 60, 128, 108]",
    "3.5 s: seen at [104, 68, 152, 116]",
    "4.75 s: seen at [134, 78, 182, 126]",
    "By 4.75 s it had moved 114 right, 38 down: 120 in a straight line.",  # Root of 114² + 38².
    "Image 3: the frame at 4.75 s, with its box and its path.",
  ]
  (picture,) = result.images
  assert (picture.source, picture.frame) == (0, 19)
  assert picture.box == Box(0.0, 0.0, 120.0, 90.0)


def test_the_start_is_where_it_was_pointed_out():
  """Shown frame 6 is frame 10; in a picture of its part from (30, 20) on, 4 times as large."""
  first = frame(6)
  part = zoom.zoom_in({"bbox_2d": [30, 20, 90, 65], "image": 2}, sight(first))
  fake = Fake()
  see = sight(first, part, compute=fake, shown=4)
  result = run({"bbox_2d": [40, 40, 136, 136], "image": 3}, see)
  # 40 / 4 = 10 right of 30 and below 20.
  np.testing.assert_array_equal(fake.box, [40, 30, 64, 54])
  np.testing.assert_array_equal(fake.frames, VIDEO.frames[10:])
  assert fake.method == "csrt" and fake.solid is None
  assert result.text.startswith("Followed forward from 2.5 s, ")
  assert "of image 3." in result.text and "seen at [40, 40, 136, 136]" in result.text
  assert "it had not moved." in result.text


def test_a_mask_can_be_followed():
  """Its box is told in the first image that shows its frame."""
  inside = np.zeros((20, 30), bool)
  inside[5:, :] = True
  mask = Mask(inside=inside, source=0, box=Box(10.0, 20.0, 40.0, 40.0), frame=4)
  first = frame(3)
  segmented = ToolResult(text="", masks=(mask,))
  fake = Fake((-2, 0, -2, 0))
  # Jitter would no longer fit the mask.
  see = sight(frame(1), first, segmented, compute=fake, view=View(name="jitter", dx=0.1))
  result = run({"mask": 1, "frames": 1}, see)
  np.testing.assert_array_equal(fake.box, [10, 20, 40, 40])
  np.testing.assert_array_equal(fake.solid, inside)
  np.testing.assert_array_equal(fake.frames, VIDEO.frames[4:])
  # 15 frames, 2 left in each.
  assert result.text.splitlines()[1:3] == [
    "4.75 s: seen at [-20, 20, 10, 40]",
    "By 4.75 s it had moved 30 left: 30 in a straight line.",
  ]
  assert "of image 3." in result.text


@pytest.mark.parametrize(
  "lost, course",
  [
    (range(8, 20), "lost after 1.75 s and not found again by the end at 4.75 s."),
    ((8, 9), "lost after 1.75 s, found again at 2.5 s, seen up to the end of the video at 4.75 s."),
    (
      (8, *range(12, 20)),
      "lost after 1.75 s, found again at 2.25 s, lost after 2.75 s and not found again by the end"
      " at 4.75 s.",
    ),
    (
      (2, 4, 6, 8, 10),
      "lost after 0.25 s, found again at 0.75 s, lost after 0.75 s, found again at 1.25 s, lost"
      " after 1.25 s, found again at 1.75 s, and so 2 times more, seen up to the end of the video"
      " at 4.75 s.",
    ),
    (range(1, 20), "lost after 0 s and not found again by the end at 4.75 s."),
  ],
)
def test_losses_are_told(lost, course):
  see = sight(frame(), compute=Fake((1, 0, 1, 0), lost))
  result = run({"bbox_2d": [10, 20, 34, 44], "image": 2, "frames": 16}, see)
  assert result.text.startswith(f"Followed forward from 0 s, {course} Boxes are")
  # The picture is of the last frame in which it was seen, and the way told is up to there.
  last = max(i for i in range(20) if i not in lost)
  assert result.images[0].frame == last
  way = f"moved {last} right: {last} in a straight line" if last else "not moved"
  assert f"By {last / 4:g} s it had {way}." in result.text
  assert result.text.count(" s: lost") + result.text.count(" s: seen at") == 16


def test_every_frame_is_told_where_there_are_few():
  see = sight(frame(10), compute=Fake())  # Frame 18 of 19: one comes after it.
  text = run({"bbox_2d": [10, 20, 34, 44], "image": 2}, see).text
  assert text.count("seen at") == 1 and "\n4.75 s: seen at [10, 20, 34, 44]\n" in text


def test_a_long_video_is_stepped_over_and_reduced(monkeypatch):
  """1,001 frames of 40 x 60: 201 are followed, of at most 120,000 / 201 = 597 pixels."""
  monkeypatch.setattr(track, "_MOST_PIXELS", 120_000)
  frames = np.zeros((1001, 40, 60, 3), np.uint8)
  frames[:] = np.arange(1001)[:, None, None, None] // 4
  video = Video(frames=frames, times=np.arange(1001, dtype=np.float32))
  fake = Fake((0.5, 0, 0.5, 0))
  see = sight(frame(1, video=video), video=video, compute=fake)
  result = run({"bbox_2d": [10, 10, 40, 30], "image": 2, "frames": 1}, see)
  # 597 / 2400 is half of each side, all but 0.3 percent: 20 x 30.
  assert fake.frames.shape == (201, 20, 30, 3)
  np.testing.assert_array_equal(fake.frames[:, 0, 0, 0], np.arange(0, 1001, 5) // 4)
  np.testing.assert_array_equal(fake.box, [5, 5, 20, 15])
  # 200 times half a pixel there is 200 pixels here.
  assert "1000 s: seen at [210, 10, 240, 30]" in result.text


@pytest.mark.parametrize("name", ["up_left", "wide"])
def test_jitter_moves_what_is_followed_and_not_what_is_told(name):
  view = next(view for view in VIEWS if view.name == name)
  fake = Fake((1, 2, 1, 2))
  see = sight(frame(), compute=fake, view=view)
  # The picture of the whole frame is jittered too, so the box there is not that of the source.
  _, shown = see.shown()
  given = shown.to_source(0.25, 0.25, 0.5, 0.5)
  height, width = shown.size
  asked = [width / 4, height / 4, width / 2, height / 2]
  result = run({"bbox_2d": asked, "image": 2, "frames": 1}, see)
  start = Box(*map(float, fake.box))
  assert start.iou(given) < 0.9
  end = shown.from_source(Box(given.x0 + 19, given.y0 + 38, given.x1 + 19, given.y1 + 38))
  told = [round(c * s) for c, s in zip(end, (width, height, width, height), strict=True)]
  assert f"4.75 s: seen at {told}" in result.text


@pytest.mark.parametrize(
  "rotate, start, end",
  [
    (0.0, (40, 45), (70, 45)),
    # About the middle, (60, 45): 10 right goes to 10 cos 30 = 8.7 right and 10 sin 30 = 5 up.
    (30.0, (42.7, 55), (68.7, 40)),
  ],
)
def test_box_and_path_are_drawn_where_the_policy_sees_them(rotate, start, end):
  """From (40, 45) to (70, 45) in the frame; the last box, 20 x 10, alone is drawn."""
  video = Video(
    frames=np.full((11, 90, 120, 3), 100, np.uint8), times=np.arange(11, dtype=np.float32)
  )
  fake = Fake((3, 0, 3, 0))
  mask = Mask(inside=np.ones((10, 20), bool), source=0, box=Box(30.0, 40.0, 50.0, 50.0), frame=0)
  see = sight(
    frame(1, video=video),
    ToolResult(text="", masks=(mask,)),
    video=video,
    compute=fake,
    view=View(name="turned", rotate=rotate),
  )
  (picture,) = run({"mask": 1}, see).images
  rows, columns = (np.abs(picture.pixels.astype(int) - (230, 0, 0)).max(2) < 3).nonzero()
  # The path is a pixel wide and begins with a dot of radius 2; a pixel for the rounding of edges.
  assert columns.min() == pytest.approx(start[0] - 2, abs=1)
  assert columns.max() == pytest.approx(end[0] + 10, abs=1)
  assert rows.min() == pytest.approx(end[1] - 5, abs=1)
  assert rows.max() == pytest.approx(max(start[1] + 2, end[1] + 5), abs=1)
  # Inside the box, beyond the end of the path, nothing is drawn.
  assert (picture.pixels[int(end[1]) - 1, int(end[0]) + 5] == 100).all()


def test_the_last_frame_can_be_pointed_at():
  see = sight(frame(), compute=Fake((3, 1, 3, 1)))
  tracked = run({"bbox_2d": [10, 20, 34, 44], "image": 2}, see)
  (crop,) = zoom.zoom_in({"bbox_2d": [67, 39, 91, 63], "image": 3}, sight(frame(), tracked)).images
  np.testing.assert_array_equal(crop.pixels, SQUARE)  # As it is, without what was drawn.


@pytest.mark.parametrize(
  "arguments, wrong",
  [
    ({}, "give either bbox_2d or mask"),
    ({"bbox_2d": [0, 0, 9, 9], "mask": 1, "image": 2}, "give either bbox_2d or mask"),
    ({"bbox_2d": [0, 0, 9, 9]}, "image 1 is not a frame of a video: get one by select_frames"),
    ({"bbox_2d": [0, 0, 9, 9], "image": 9}, "`image` 9: choose one of the images 1 to 3"),
    ({"bbox_2d": [0, 0, 3, 9], "image": 2}, "too small to be followed: 3.0 x 9.0 pixels"),
    ({"bbox_2d": [0, 0, 120, 5], "image": 2}, "too thin to be followed: 120 x 5 pixels"),
    ({"bbox_2d": [9, 0, 0, 9], "image": 2}, "must satisfy"),
    ({"mask": 1}, "mask 1 is not in a frame of a video: get one by select_frames"),
    ({"mask": 2}, "image 3 shows the last frame of its video: nothing comes after it"),
    ({"mask": 4}, "mask 4 must be one of 1 to 2"),
    ({"bbox_2d": [0, 0, 9, 9], "image": 2, "frames": 17}, r"frames must be in \[1, 16\]"),
    ({"bbox_2d": [0, 0, 9, 9], "image": 2, "video": 1}, "unknown argument 'video'"),
  ],
)
def test_mistakes_name_what_would_be_right(arguments, wrong):
  masks = tuple(
    Mask(inside=np.ones((6, 6), bool), source=0, box=Box(0.0, 0.0, 6.0, 6.0), frame=at)
    for at in (None, 19)
  )
  see = sight(frame(), select_frames({"times": [4.75]}, sight()), ToolResult(text="", masks=masks))
  with pytest.raises(Mistake, match=wrong):
    run(arguments, see)


def test_a_box_beside_a_turned_frame_is_a_mistake():
  """The corner of a picture turned by 30 degrees shows what is replicated, not the frame."""
  view = View(name="turned", rotate=30.0)
  with pytest.raises(Mistake, match="the box lies outside the frame"):
    run({"bbox_2d": [0, 0, 8, 8], "image": 2}, sight(frame(view=view), view=view))


class TestMeasures:
  """Of benchmarks/track.py."""

  @pytest.fixture
  def measures(self, monkeypatch):
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # It imports the file beside it.
    spec = importlib.util.spec_from_file_location("benchmarks_track", folder / "track.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  def test_success_is_the_area_under_the_plot(self, measures):
    """IoU 1 is above 20 of the 21 thresholds, 0.5 above the 10 below it, 0 above none."""
    truth = np.array([[0, 0, 10, 10]] * 3 + [[np.nan] * 4])
    told = np.array([[0, 0, 10, 10], [0, 0, 5, 10], [20, 0, 30, 10], [0, 0, 10, 10]], float)
    assert measures.success(truth, told) == pytest.approx(30 / 63, rel=1e-12)

  def test_mota_and_hota_of_a_switch(self, measures):
    """Four frames of objects A and B: track 1 is on A, A, B, B and track 2 on B, B and nowhere.

    6 hits, 2 misses, no false box, and B changes its track once: MOTA is 1 - 3 / 8. Detection is
    6 / 8. The pairs (A, 1), (B, 2), (B, 1) hit twice each; A, B and track 1 have 4 boxes, track 2
    has 2: their associations are 2 / (4 + 4 - 2), 2 / (4 + 2 - 2), 2 / (4 + 4 - 2), mean 7 / 18.
    """
    a, b, none = [0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0], [np.nan] * 4
    truth = np.array([[a, b]] * 4)
    told = np.array([[a, b], [a, b], [b, none], [b, none]])
    assert measures.mota(truth, told) == pytest.approx(5 / 8, rel=1e-12)
    assert measures.hota(truth, told) == pytest.approx((6 / 8 * 7 / 18) ** 0.5, rel=1e-12)

  def test_an_iou_that_is_the_threshold_is_a_hit(self, measures):
    """Half a box: the thresholds 0.05 to 0.5 are reached, 10 of 19, and MOTA's 0.5."""
    truth, told = np.array([[[0.0, 0, 10, 10]]]), np.array([[[0.0, 0, 5, 10]]])
    assert measures.hota(truth, told) == pytest.approx(10 / 19, rel=1e-12)
    assert measures.mota(truth, told) == 1
    assert measures.mota(truth, told, threshold=0.55) == -1  # A miss and a false box.

  def test_a_box_where_nothing_is_counts_against(self, measures):
    truth = np.array([[[0.0, 0, 10, 10]], [[np.nan] * 4]])
    told = np.array([[[0.0, 0, 10, 10]]] * 2)
    assert measures.mota(truth, told) == 0
    assert measures.hota(truth, told) == pytest.approx(0.5, rel=1e-12)
