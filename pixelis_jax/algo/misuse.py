"""Misuse of tools: calls too many, before what they need, or outside the image.

Faults and sizes are the torch project's (Pixelis, reward_shaping_enhanced.py), in units of its
base penalty 0.1; there a place counted as outside unless it lay in [0, 1], whatever the frame.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from pixelis_jax.algo.coherence import operation
from pixelis_jax.types import Task, ToolCall, ToolResult, Trajectory

# Calls of an operation in an episode that cost nothing.
LIMITS = {
  "zoom_in": 3,
  "track_object": 5,
  "segment_object_at": 10,
  "get_properties": 10,
  "read_text": 15,
}
TOO_MANY, TOO_EARLY, NO_VIDEO, OUTSIDE = 1.0, 1.0, 2.0, 0.5
OF_VIDEOS = ("track_object", "select_frames")

Size: TypeAlias = tuple[int, int]  # (height, width)
Frame: TypeAlias = Callable[[ToolCall, Task, Sequence[ToolResult]], Size | None]


def misuse(trajectory: Trajectory, frame: Frame) -> float:
  """The sum of an episode's faults; a cost, so its weight is negative.

  1 for each call beyond its operation's limit, 1 for a mask that no call before has returned, 2 for
  following an object or choosing frames without a video, 1/2 for a place with a part outside its
  image.

  Args:
    trajectory: the episode.
    frame: what a call's coordinates are in after these results, None where it has none:
      `Toolbox.frame`.
  """
  task, used, masks, total = trajectory.task, Counter(), 0, 0.0
  results: list[ToolResult] = []
  for step in trajectory.steps:
    if step.call is not None:
      used[operation(step.call)] += 1
      size = frame(step.call, task, results)
      total += _faults(step.call, used, masks, size, bool(task.videos))
    if step.result is not None:
      masks += len(step.result.masks)
      results.append(step.result)
  return total


def _faults(
  call: ToolCall, used: Mapping[str, int], masks: int, size: Size | None, videos: bool
) -> float:
  name, arguments = operation(call), call.arguments
  mask = arguments.get("mask")
  early = isinstance(mask, int) and mask > masks
  return (
    TOO_MANY * (used[name] > LIMITS.get(name, used[name]))
    + TOO_EARLY * early
    + NO_VIDEO * (name in OF_VIDEOS and not videos)
    + OUTSIDE * (size is not None and _outside(arguments, *size))
  )


def _outside(arguments: Mapping[str, object], height: int, width: int) -> bool:
  """Whether a point or box of a well-formed call has a part outside of this."""
  place = arguments.get("bbox_2d", arguments.get("point_2d"))
  if not isinstance(place, list | tuple):
    return False
  x, y = place[::2], place[1::2]
  return any(not 0 <= c <= width for c in x) or any(not 0 <= c <= height for c in y)
