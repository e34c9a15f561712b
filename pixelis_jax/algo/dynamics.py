"""Forward dynamics: calls as numbers, and what is paid where they showed what was not expected.

Curiosity as the error of a forward model, Pathak et al. 2017 (https://arxiv.org/abs/1705.05363,
equation 6); `surprise.py` has the model, which learns as a run goes on.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from pixelis_jax.algo.misuse import Frame
from pixelis_jax.types import Task, ToolCall, ToolResult, Trajectory

WHERE = 7  # Numbers of an action beside its tool's: an image, four edges, two frames.
WHOLE = (0.0, 0.0, 1.0, 1.0)


def transitions(trajectory: Trajectory) -> list[int]:
  """Numbers of the steps whose call showed something that the policy then read.

  A failed call is none: errors are new as well, and ways to fail have no end.
  """
  shows = lambda s: s.call is not None and s.result is not None and s.result.error is None
  return [i for i, step in enumerate(trajectory.steps[:-1]) if shows(step)]


def action(
  trajectory: Trajectory, step: int, tools: Sequence[str], frame: Frame
) -> Float32[np.ndarray, " A"]:
  """The call of a step of `transitions` as A = len(tools) + WHERE numbers in [0, 1].

  Which of `tools` it is, one-hot; 1 / the number of the image it points into; the edges x0, y0, x1,
  y1 of the box there in parts of the image's sides, twice the same point for a point, a mask's box
  for a mask, and all of the image for none; the first and the last frame that it chose, in parts of
  the video, 0 for none. The same call has the same numbers in any process.

  Args:
    tools: the policy's, in the order of its config; ValueError for a call of another.
    frame: as for `misuse`.
  """
  taken = trajectory.steps[step]
  call, shown = taken.call, taken.result
  assert call is not None and shown is not None, f"step {step} is no transition"
  if call.name not in tools:
    raise ValueError(f"call of {call.name!r} must be of one of {list(tools)}")
  before = [s.result for s in trajectory.steps[:step] if s.result is not None]
  which = [float(call.name == name) for name in tools]
  number, edges = _place(call, trajectory.task, before, frame)
  numbers = [*which, 1 / number, *edges, *_frames(call, shown, trajectory.task)]
  return np.clip(np.array(numbers, np.float32), 0, 1)


def _place(
  call: ToolCall, task: Task, before: Sequence[ToolResult], frame: Frame
) -> tuple[int, tuple[float, ...]]:
  """(number of the image that a call points into, edges in parts of its sides)."""
  arguments = call.arguments
  if "mask" in arguments:
    masks = [mask for result in before for mask in result.masks]
    mask = masks[_whole(arguments["mask"]) - 1]
    video = mask.frame is not None
    sides = task.videos[mask.source].frames.shape[1:3] if video else task.images[mask.source].shape
    return 1, _parts(dataclasses.astuple(mask.box), sides[0], sides[1])
  number = _whole(arguments.get("image", arguments.get("target_image", 1)))
  edges = arguments.get("bbox_2d", arguments.get("point_2d"))
  if not isinstance(edges, list | tuple):
    return number, WHOLE
  size = frame(call, task, before)
  assert size is not None, f"{call} has passed a tool, which knows what its coordinates are in"
  return number, _parts((*edges, *edges)[:4], *size)


def _whole(number: object) -> int:
  assert isinstance(number, int | float), f"{number!r} has passed a tool as a number"
  return int(number)


def _parts(edges: Sequence[float | int], height: int, width: int) -> tuple[float, ...]:
  return tuple(edge / (width, height)[i % 2] for i, edge in enumerate(edges))


def _frames(call: ToolCall, shown: ToolResult, task: Task) -> tuple[float, float]:
  """What was chosen, by number or by time, is what came back."""
  if call.name != "select_frames":
    return 0.0, 0.0
  chosen = [p.frame for p in shown.images if p.frame is not None]
  count = len(task.videos[shown.images[0].source].frames)
  return (min(chosen) + 1) / count, (max(chosen) + 1) / count


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
  """How large errors are: the root of their mean square, over all of a run.

  Nothing is subtracted, and the deviation is that from 0: where all errors are alike, that from
  their mean is next to nothing, and would make any of them huge. It is over the whole run, as in
  RND (https://arxiv.org/abs/1810.12894, section 2.4): a unit that followed the errors down would
  pay for what is known already as it did for what was new.

  Attributes:
    count: of errors.
    square: the sum of their squares.
  """

  count: float = 0.0
  square: float = 0.0

  def after(self, *, count: float, square: float) -> "Scale":
    """With so many errors more, and their squares' sum."""
    return Scale(count=self.count + count, square=self.square + square)

  @property
  def unit(self) -> float:
    return float(np.sqrt(self.square / self.count)) if self.count else 0.0


def reward(errors: Float[np.ndarray, " N"], unit: float, *, clip: float) -> float:
  """The mean over an episode's calls of error / unit, each at most `clip`.

  The mean: a sum would pay for calls by their number. 0 without a call, and for a unit of 0, which
  says that none is known.
  """
  if not len(errors) or not unit:
    return 0.0
  return float(np.minimum(errors / unit, clip).mean())
