"""Misuse of tools: calls too many, before what they need, or outside the image.

Faults and sizes are the torch project's (Pixelis, reward_shaping_enhanced.py), in units of its
base penalty 0.1; there a place counted as outside unless it lay in [0, 1], whatever the frame.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pixelis_jax.algo.coherence import operation
from pixelis_jax.types import ToolCall, Trajectory

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

Size = tuple[int, int]  # (height, width)


def misuse(trajectory: Trajectory, frame: Callable[[int, int], Size]) -> float:
  """The sum of an episode's faults; a cost, so its weight is negative.

  1 for each call beyond its operation's limit, 1 for a mask that no call before has returned, 2 for
  following an object or choosing frames without a video, 1/2 for a place with a part outside its
  image.

  Args:
    trajectory: the episode.
    frame: (height, width) of an image to the frame the policy's coordinates are in, as a `Toolbox`
      has it: `shown_size`.
  """
  task, used, total = trajectory.task, Counter(), 0.0
  masks, sizes = 0, [frame(*image.shape[:2]) for image in task.images]
  for step in trajectory.steps:
    if step.call is not None:
      used[operation(step.call)] += 1
      total += _faults(step.call, used, masks, sizes, bool(task.videos))
    if step.result is not None:
      masks += len(step.result.masks)
      sizes += [frame(*picture.pixels.shape[:2]) for picture in step.result.images]
  return total


def _faults(
  call: ToolCall, used: Mapping[str, int], masks: int, sizes: Sequence[Size], videos: bool
) -> float:
  name, arguments = operation(call), call.arguments
  mask = arguments.get("mask")
  early = isinstance(mask, int) and mask > masks
  return (
    TOO_MANY * (used[name] > LIMITS.get(name, used[name]))
    + TOO_EARLY * early
    + NO_VIDEO * (name in OF_VIDEOS and not videos)
    + OUTSIDE * _outside(arguments, sizes)
  )


def _outside(arguments: Mapping[str, object], sizes: Sequence[Size]) -> bool:
  """Whether a point or box has a part outside the image it is in; False where there is no such.

  What is malformed is no place: the tool says so.
  """
  number = arguments.get("image", 1)
  place = arguments.get("bbox_2d", arguments.get("point_2d"))
  known = isinstance(number, int) and 1 <= number <= len(sizes)
  if not known or not isinstance(place, list | tuple):
    return False
  if not all(isinstance(c, int | float) for c in place):
    return False
  height, width = sizes[number - 1]
  x, y = place[::2], place[1::2]
  return any(not 0 <= c <= width for c in x) or any(not 0 <= c <= height for c in y)
