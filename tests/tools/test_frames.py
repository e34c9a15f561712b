import numpy as np
import pytest

from pixelis_jax.tools import schema, zoom
from pixelis_jax.tools.frames import (
  SELECT_FRAMES,
  SELECT_TARGET_FRAMES,
  seconds,
  select_frames,
  select_target_frames,
)
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.views import IDENTITY, VIEWS
from pixelis_jax.types import Task, ToolResult, Video


def clip(count, seed, fps=4.0, shape=(24, 40)):
  frames = np.random.default_rng(seed).integers(0, 256, (count, *shape, 3), np.uint8)
  return Video(frames=frames, times=(np.arange(count) / fps).astype(np.float32))


FIRST, SECOND = clip(12, 0), clip(30, 1, fps=10.0)
IMAGE = np.zeros((8, 8, 3), np.uint8)


def every_third(video):
  """Of 12 frames at 4 a second: 1, 4, 7, 10, at 0.25, 1, 1.75 and 2.5 s."""
  return np.arange(1, len(video.times), 3), (24, 40)


def sight(*results, images=(IMAGE,), videos=(FIRST, SECOND), view=IDENTITY, shown=every_third):
  task = Task(id="a", images=images, question="?", answer=None, videos=videos)
  return Sight(
    task=task, results=results, shown_size=lambda h, w: (2 * h, w), shown_frames=shown, view=view
  )


def run(arguments, see=None):
  schema.check(arguments, SELECT_FRAMES["function"]["parameters"])
  return select_frames(arguments, see or sight())


def places(result):
  return [(p.source, p.frame) for p in result.images]


def test_frames_are_numbered_as_shown():
  """Frame 3 of those shown is 7 of the video; order is kept and what is named twice comes once."""
  result = run({"frames": [3, 1, 3]})
  assert places(result) == [(0, 7), (0, 1)]
  np.testing.assert_array_equal(result.images[0].pixels, FIRST.frames[7])
  # Image 1 is the task's own.
  assert result.text == "Image 2: frame 3 at 1.75 s\nImage 3: frame 1 at 0.25 s"


def test_times_reach_frames_that_were_not_shown():
  result = run({"times": [1.8, 1.1, 0.0, 2.75]})
  assert places(result) == [(0, 7), (0, 4), (0, 0), (0, 11)]
  assert result.text.splitlines() == [
    "Image 2: frame 3 at 1.75 s",
    "Image 3: frame 2 at 1 s",
    "Image 4: before frame 1, at 0 s",
    "Image 5: after frame 4, at 2.75 s",
  ]
  assert run({"times": [2.2]}).text == "Image 2: between frames 3 and 4, at 2.25 s"


def test_times_of_one_frame_show_it_once():
  assert places(run({"times": [0.99, 1.0, 1.01]})) == [(0, 4)]


def test_video_says_which():
  result = run({"frames": [2], "video": 2})
  assert places(result) == [(1, 4)]
  np.testing.assert_array_equal(result.images[0].pixels, SECOND.frames[4])
  assert result.text == "Image 2: frame 2 at 0.4 s"


def test_later_calls_point_at_the_frame():
  """A zoom into image 3, shown at twice its height, is of the frame itself."""
  see = sight()
  zoomed = zoom.zoom_in(
    {"bbox_2d": [10, 8, 30, 28], "image": 3}, sight(run({"frames": [1, 4]}, see))
  )
  (picture,) = zoomed.images
  assert (picture.source, picture.frame) == (0, 10)
  np.testing.assert_array_equal(picture.pixels, FIRST.frames[10, 4:14, 10:30])


def test_numbers_count_earlier_pictures():
  before = run({"frames": [1, 2]})
  assert run({"frames": [4]}, sight(before)).text.startswith("Image 4: ")
  assert run({"frames": [4]}, sight(before, images=())).text.startswith("Image 3: ")
  failed = ToolResult(text="Error: x", error="x")  # Shows nothing, so it takes no number.
  assert run({"frames": [4]}, sight(failed, before)).text.startswith("Image 4: ")


def test_views_reach_the_frames():
  invert = next(view for view in VIEWS if view.name == "invert")
  (picture,) = run({"frames": [1]}, sight(view=invert)).images
  np.testing.assert_array_equal(picture.pixels, 255 - FIRST.frames[1])


@pytest.mark.parametrize(
  "arguments, wrong",
  [
    ({}, "give either frames or times"),
    ({"frames": [1], "times": [1.0]}, "give either frames or times"),
    ({"frames": []}, "frames must have 1 to 8 items, not 0"),
    ({"frames": [1] * 9}, "frames must have 1 to 8 items, not 9"),
    ({"frames": [0]}, "frame 0 must be one of the frames 1 to 4"),
    ({"frames": [5]}, "frame 5 must be one of the frames 1 to 4"),
    ({"frames": [10**9]}, "frame 1e[+]09 must be one of the frames 1 to 4"),
    ({"frames": [1.5]}, "must be of type integer"),
    ({"times": [-0.1]}, "time -0.1 must be between 0 and 2.75 s"),
    ({"times": [2.8]}, "time 2.8 must be between 0 and 2.75 s"),
    ({"times": [float("nan")]}, "must be of type number"),
    ({"frames": [1], "video": 3}, "video 3 must be one of 1 to 2"),
    ({"frames": [1], "video": 0}, "video must be in"),
  ],
)
def test_mistakes_name_what_would_be_right(arguments, wrong):
  with pytest.raises(Mistake, match=wrong):
    run(arguments)


def test_without_a_video_there_is_nothing_to_select():
  for see in (sight(videos=()), sight(shown=None)):
    with pytest.raises(Mistake, match="there is no video here, only images"):
      run({"frames": [1]}, see)


def test_the_end_can_be_named_as_it_was_told():
  """30 frames a second end at 2 / 30 s, told as 0.07; that is later than the end."""
  see = sight(videos=(clip(3, 0, fps=30.0),))
  told = run({"times": [0.066]}, see).text
  assert told.endswith("at 0.07 s")
  assert places(run({"times": [0.07]}, see)) == [(0, 2)]


def test_seconds_are_short():
  times = (0.0, 2.5, 10.0, 7200.04, np.float32(0.1))
  assert [seconds(t) for t in times] == ["0", "2.5", "10", "7200.04", "0.1"]


class TestPixelReasoner:
  """Texts are those of execute_tool in experience_maker.py."""

  def run(self, wanted, see=None):
    arguments = {"target_frames": wanted}
    schema.check(arguments, SELECT_TARGET_FRAMES["function"]["parameters"])
    return select_target_frames(arguments, see or sight(images=()))

  def test_frames_of_the_clip_as_shown(self):
    result = self.run([2, 4, 2])
    assert places(result) == [(0, 4), (0, 10), (0, 4)]
    # Shown at twice the height: 40 wide, 48 high.
    assert result.text == "\nHere are the selected frames (Frame Size: 40x48, Numbered 1 to 3):"
    again = self.run([1], sight(result, images=()))
    assert "Numbered 4 to 4" in again.text

  @pytest.mark.parametrize(
    "wanted, wrong",
    [
      (
        [1, 5],
        "Execution Error: There are 4 frames numbered in range [1,4]. Your selection"
        " `target_frames=[1, 5]` is out of range.",
      ),
      ([0], "`target_frames=[0]` is out of range."),  # There, the last frame.
      ([], "`target_frames=[]` is out of range."),
      (
        [1] * 9,
        "Execution Error: You have selected 9 frames in total. Think again which frames you need to"
        " check in details (no more than 8 frames)",
      ),
    ],
  )
  def test_mistakes_are_in_their_words(self, wanted, wrong):
    with pytest.raises(Mistake) as told:
      self.run(wanted)
    assert str(told.value).endswith(wrong)

  def test_an_image_is_no_video(self):
    with pytest.raises(Mistake, match=r"attempted to `select_frames` from \*\*image\*\* not"):
      self.run([1], sight(videos=()))

  def test_the_schema_is_the_one_in_their_prompts(self):
    function = SELECT_TARGET_FRAMES["function"]
    assert list(function) == ["name", "description", "parameters"]
    frames = function["parameters"]["properties"]["target_frames"]
    assert list(frames) == ["type", "description", "items"]
    assert function["name"] == "select_frames"
