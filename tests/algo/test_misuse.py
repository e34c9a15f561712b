import numpy as np
import pytest

from pixelis_jax.algo.misuse import misuse
from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.types import (
  Box,
  Mask,
  Picture,
  Status,
  Step,
  Task,
  ToolCall,
  ToolResult,
  Trajectory,
  Video,
)
from tests import fakes

VIDEO = Video(frames=fakes.image()[None], times=np.zeros(1, np.float32))
MASK = Mask(inside=np.ones((2, 2), bool), source=0, box=Box(0.0, 0.0, 2.0, 2.0))
CROP = Picture(pixels=fakes.image(4, 4), source=0, box=Box(0.0, 0.0, 4.0, 4.0))


def box(preset: str = "qwen") -> Toolbox:
  """All tools of a policy that counts twice the pixels: not the source's, not 0 to 1000."""
  double = lambda height, width: (2 * height, 2 * width)
  return Toolbox(tuple(TOOLS[preset]), shown_size=double, preset=preset)


def faults(*calls, videos=(), masks=(), images=(), preset="qwen") -> float:
  """Of an episode about an image of height 8 and width 12; each call returned these."""
  result = ToolResult(text="", masks=masks, images=images)
  steps = [
    Step(completion=fakes.completion("x"), call=ToolCall(name=n, arguments=a), result=result)
    for n, a in calls
  ]
  task = Task(id="a", images=(fakes.image(),), question="?", answer="7", videos=videos)
  end = Step(completion=fakes.completion("y"))
  played = Trajectory(task=task, steps=(*steps, end), status=Status.ANSWERED, answer="7")
  return misuse(played, box(preset).frame)


LOOK = ("zoom_in", {"bbox_2d": [0, 0, 24, 16]})  # All of it.


@pytest.mark.parametrize(
  ("calls", "expected"),
  [
    ([LOOK] * 3, 0.0),
    # The fourth and the fifth; counting all of them from the first too many would be 5.
    ([LOOK] * 5, 2.0),
    # Each operation has its own limit, under whatever name; others have none.
    ([LOOK] * 2 + [("crop_image_normalized", {})] * 2, 1.0),
    ([LOOK] * 3 + [("read_text", {})] * 15, 0.0),
    ([("invented", {})] * 40, 0.0),
    # No mask has been returned; measuring a box needs none.
    ([("get_properties", {"mask": 1})], 1.0),
    ([("get_properties", {"bbox_2d": [0, 0, 5, 5]})], 0.0),
    ([("track_object", {"bbox_2d": [0, 0, 5, 5]})], 2.0),
    # 24 wide and 16 high as the policy counts; 12 and 8 in the source's pixels.
    ([("zoom_in", {"bbox_2d": [0, 0, 25, 16]})], 0.5),
    ([("zoom_in", {"bbox_2d": [-1, 0, 5, 5]})], 0.5),
    ([("segment_object_at", {"point_2d": [20, 15]})], 0.0),
    ([("segment_object_at", {"point_2d": [15, 20]})], 0.5),  # x and y in this order.
    # What is malformed is the tool's to say.
    ([("zoom_in", {"bbox_2d": "all"}), ("zoom_in", {"image": 9, "bbox_2d": [-5, 0, 1, 1]})], 0.0),
    ([("segment_object_at", {"point_2d": ["a", None]})], 0.0),
  ],
)
def test_faults(calls, expected):
  assert faults(*calls) == expected


def test_masks_and_pictures_count_from_the_call_after():
  measure = ("get_properties", {"mask": 1})
  assert faults(measure, masks=(MASK,)) == 1.0
  assert faults(("segment_object_at", {}), measure, masks=(MASK,)) == 0.0
  # Image 2 is the crop, 8 by 8 as the policy counts: [0, 0, 9, 8] is outside of it, not of image 1.
  look = ("zoom_in", {"image": 2, "bbox_2d": [0, 0, 9, 8]})
  assert faults(look, images=(CROP,)) == 0.0  # There is no image 2 yet.
  assert faults(LOOK, look, images=(CROP,)) == 0.5


@pytest.mark.parametrize(
  ("preset", "name", "arguments", "expected"),
  [
    # The source's own 12 x 8, whatever the policy was shown.
    ("deepeyes", "image_zoom_in_tool", {"bbox_2d": [0, 0, 12, 8]}, 0.0),
    ("deepeyes", "image_zoom_in_tool", {"bbox_2d": [0, 0, 13, 8]}, 0.5),
    # Fractions, or the source's pixels where one is 1 or more.
    ("pixel_reasoner", "crop_image_normalized", {"bbox_2d": [0.1, 0, 0.9, 0.9]}, 0.0),
    ("pixel_reasoner", "crop_image_normalized", {"bbox_2d": [-0.1, 0, 0.9, 0.9]}, 0.5),
    ("pixel_reasoner", "crop_image_normalized", {"bbox_2d": [0, 0, 12, 8]}, 0.0),
    ("pixel_reasoner", "crop_image_normalized", {"bbox_2d": [0, 0, 12, 9]}, 0.5),
  ],
)
def test_places_are_in_the_frame_of_their_format(preset, name, arguments, expected):
  more = {"target_image": 1} if preset == "pixel_reasoner" else {}
  assert faults((name, {**arguments, **more}), preset=preset) == expected


def test_a_video_may_be_followed():
  assert faults(("track_object", {}), ("select_frames", {}), videos=(VIDEO,)) == 0.0
