"""Calls as numbers, the unit of errors, and what an episode is paid."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pixelis_jax.algo import dynamics
from pixelis_jax.tools import Toolbox
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

TOOLS = ("zoom_in", "segment_object_at", "select_frames", "get_properties")
VIDEO = Video(frames=np.stack([fakes.image()] * 5), times=np.arange(5, dtype=np.float32))
# The right half of the 8 x 12 image, and in it a mask.
CROP = Picture(pixels=fakes.image(8, 6), source=0, box=Box(6.0, 0.0, 12.0, 8.0))
MASK = Mask(inside=np.ones((2, 3), bool), source=0, box=Box(6.0, 4.0, 9.0, 6.0))


def box(*names: str, preset: str = "qwen") -> Toolbox:
  """Tools of a policy that counts twice the pixels: not the source's, not 0 to 1000."""
  return Toolbox(names, shown_size=lambda h, w: (2 * h, 2 * w), preset=preset)


def step(name="", result=None, **arguments) -> Step:
  call = ToolCall(name=name, arguments=arguments) if name else None
  return Step(completion=fakes.completion("x"), call=call, result=result)


def episode(*steps: Step) -> Trajectory:
  task = Task(id="a", images=(fakes.image(),), question="?", answer="7", videos=(VIDEO,))
  return Trajectory(task=task, steps=steps, status=Status.NO_ANSWER, answer=None)


def test_a_transition_is_a_call_that_showed_something_which_was_read():
  seen, error = ToolResult(text="seen"), ToolResult(text="", error="outside")
  malformed = step(result=error)
  look, failed = step("zoom_in", seen), step("zoom_in", error)
  assert dynamics.transitions(episode(malformed, look, failed, look, step())) == [1, 3]
  # Asked when it was too late, and shown when nobody read on.
  assert dynamics.transitions(episode(look, step("zoom_in"))) == [0]
  assert dynamics.transitions(episode(look, look)) == [0]
  assert dynamics.transitions(episode(step())) == []


@pytest.mark.parametrize(
  "name, arguments, expected",
  [
    # The policy counts 24 x 16; in pixels of the source it would be twice as much.
    ("zoom_in", {"bbox_2d": [6, 4, 18, 12]}, [1, 0, 0, 0, 1, 0.25, 0.25, 0.75, 0.75, 0, 0]),
    # The second image is the crop, 12 x 16 as it counts.
    (
      "zoom_in",
      {"bbox_2d": [6, 4, 12, 12], "image": 2},
      [1, 0, 0, 0, 0.5, 0.5, 0.25, 1, 0.75, 0, 0],
    ),
    # Numbers of JSON: 2.0 is an integer. Beyond the image is its edge.
    (
      "zoom_in",
      {"bbox_2d": [-6, 4, 99, 12], "image": 2.0},
      [1, 0, 0, 0, 0.5, 0, 0.25, 1, 0.75, 0, 0],
    ),
    ("segment_object_at", {"point_2d": [6, 4]}, [0, 1, 0, 0, 1, 0.25, 0.25, 0.25, 0.25, 0, 0]),
    # 6 to 9 of 12, 4 to 6 of 8.
    ("get_properties", {"mask": 1}, [0, 0, 0, 1, 1, 0.5, 0.5, 0.75, 0.75, 0, 0]),
    ("get_properties", {}, [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]),
  ],
)
def test_an_action_is_the_tool_and_where_it_points(name, arguments, expected):
  first = step("zoom_in", ToolResult(text="", images=(CROP,), masks=(MASK,)))
  played = episode(first, step(name, ToolResult(text=""), **arguments), step())
  found = dynamics.action(played, 1, TOOLS, box(*TOOLS).frame)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "preset, arguments, expected",
  [
    # Parts of the sides, as Pixel-Reasoner's policies give them; or of the source's 12 x 8 pixels.
    ("pixel_reasoner", {"bbox_2d": [0.1, 0.2, 0.3, 0.4], "target_image": 1}, [0.1, 0.2, 0.3, 0.4]),
    ("pixel_reasoner", {"bbox_2d": [0, 2, 3, 4], "target_image": 1}, [0, 0.25, 0.25, 0.5]),
    ("deepeyes", {"bbox_2d": [3, 2, 6, 4]}, [0.25, 0.25, 0.5, 0.5]),
  ],
)
def test_an_action_points_as_its_format_does(preset, arguments, expected):
  tools = box("zoom_in", preset=preset)
  name = tools.zoom.name
  played = episode(step(name, ToolResult(text=""), **arguments), step())
  found = dynamics.action(played, 0, (name,), tools.frame)
  np.testing.assert_allclose(found, [1, 1, *expected, 0, 0], rtol=1e-6)


def test_chosen_frames_are_parts_of_the_video():
  whole = Box(0.0, 0.0, 12.0, 8.0)
  frames = [Picture(pixels=fakes.image(), source=0, box=whole, frame=n) for n in (3, 1)]
  chosen = step("select_frames", ToolResult(text="", images=tuple(frames)), times=[3.1, 1.0])
  found = dynamics.action(episode(chosen, step()), 0, TOOLS, box(*TOOLS).frame)
  # The second and the fourth of five, whatever they were chosen by.
  np.testing.assert_allclose(found, [0, 0, 1, 0, 1, 0, 0, 1, 1, 0.4, 0.8], rtol=1e-6)


def test_a_call_of_an_unknown_tool_has_no_numbers():
  played = episode(step("invented", ToolResult(text="")), step())
  with pytest.raises(ValueError, match="call of 'invented' must be of one of"):
    dynamics.action(played, 0, TOOLS, box(*TOOLS).frame)


SCRIPT = """
from tests.algo import test_dynamics as t
played = t.episode(t.step("zoom_in", t.ToolResult(text=""), bbox_2d=[1, 2, 9, 7]), t.step())
print(t.dynamics.action(played, 0, t.TOOLS, t.box(*t.TOOLS).frame).tobytes().hex())
"""


def test_the_same_call_has_the_same_numbers_in_any_process():
  """Python's own hashes of names differ between processes: what came of them would as well."""
  run = [sys.executable, "-c", SCRIPT]
  told = [
    subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": s}, capture_output=True, check=True)
    for s in ("1", "2")
  ]
  assert told[0].stdout == told[1].stdout and len(told[0].stdout) == 2 * 4 * 11 + 1


def test_the_unit_is_the_root_mean_square_of_all_errors():
  scale = dynamics.Scale()
  assert scale.unit == 0.0
  # Errors 1, 7 and then 5, 5: sqrt((1 + 49 + 25 + 25) / 4). About the mean 4.5 it would be 2.18.
  scale = scale.after(count=2.0, square=50.0).after(count=2.0, square=50.0)
  assert scale.unit == 5.0
  # Errors that are all alike are one unit each, not infinitely many.
  assert dynamics.Scale().after(count=3.0, square=3 * 0.5**2).unit == 0.5


def test_an_episode_earns_the_mean_of_its_errors_in_units():
  paid = lambda *errors, unit=2.0: dynamics.reward(np.float32(errors), unit, clip=3.0)
  assert paid(1.0, 2.0) == 0.75
  # 9 / 2 counts as 3: clipped after the mean it would be 2.5.
  assert paid(1.0, 9.0) == 1.75
  # A sum would pay twice for the same.
  assert paid(1.0, 1.0) == paid(1.0) == 0.5
  # Never less than nothing: no mean is subtracted.
  assert paid(0.0) == 0.0
  assert paid() == paid(1.0, unit=0.0) == 0.0
