"""Demonstrations of looking before answering: written by rule, executed and checked before use."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixelis_jax.data.scenes import CANVAS, COLORS, DIGIT, GRAY, Plate
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Box, Demo, DemoTurn, Picture, Sight, Task, ToolCall, ToolResult

TIGHT = 0.625  # Of the evidence: the side of the square that is shown.
OFF = 0.5  # Shown pixels, at most, between the middles of the two.
ANSWER = r"\boxed{{{}}}"
_FRAMES = {color: label for label, color in enumerate([*COLORS.values(), GRAY])}
LABELS = len(_FRAMES) + 10  # Of `Sight`s: frames by colour, then digits.


def call_text(call: ToolCall) -> str:
  """The call as the policy writes it: Hermes tags around one line of JSON."""
  body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
  return f"<tool_call>\n{body}\n</tool_call>"


def demo(
  task: Task,
  rng: np.random.Generator,
  toolbox: Toolbox,
  *,
  mistakes: float = 0.0,
  elsewhere: Sequence[Box] = (),
) -> Demo:
  """Zoom into the evidence, then answer; every call is really run and its picture checked.

  Args:
    task: With its answer and its evidence box.
    toolbox: Holds `zoom_in`; its `shown_size` gives the frame of the call's coordinates.
    mistakes: Share of demonstrations that first look at one of `elsewhere`, then correct
      themselves. The wrong look is shown but not supervised.
    elsewhere: Boxes in source pixels that are not the evidence.

  Raises:
    ValueError: the task has no answer or no evidence, there is nowhere else to look, or the call
      does not show the evidence.
  """
  if task.answer is None or not task.boxes:
    raise ValueError(f"task {task.id} needs an answer and an evidence box to be demonstrated")
  if mistakes and not elsewhere:
    raise ValueError(f"task {task.id}: mistakes {mistakes} need boxes elsewhere to look at")
  turns = []
  if mistakes and rng.random() < mistakes:
    wrong = elsewhere[int(rng.integers(len(elsewhere)))]
    look = looked(task, zoom(task, wrong, rng, toolbox.shown_size), toolbox, ())
    turns.append(dataclasses.replace(look, supervised=False))
  earlier = [turn.result for turn in turns]
  look = looked(task, zoom(task, task.boxes[0], rng, toolbox.shown_size), toolbox, earlier)
  _verify(task, look.result)
  final = DemoTurn(text=ANSWER.format(task.answer), result=None)
  return Demo(task=task, turns=(*turns, look, final))


def direct(task: Task) -> Demo:
  """The answer at once, from what the task's own images show."""
  return Demo(task=task, turns=(DemoTurn(text=ANSWER.format(task.answer), result=None),))


def tour(task: Task, calls: Sequence[ToolCall], questions: Sequence[str]) -> Demo:
  """Calls that look at one place after the other; in the place of results stand further questions.

  Args:
    task: with the first question.
    calls: one a question.
    questions: those behind the first.
  """
  asked = [*(ToolResult(text=question) for question in questions), None]
  turns = [
    DemoTurn(text=call_text(call), result=later) for call, later in zip(calls, asked, strict=True)
  ]
  return Demo(task=task, turns=tuple(turns))


def reading(demo: Demo) -> Demo:
  """The last picture of a demonstration, asked about by itself and answered at once."""
  look = demo.turns[-2]
  task = dataclasses.replace(demo.task, images=(look.result.images[0].pixels,), boxes=())
  return dataclasses.replace(direct(task), sights=look.sights[:1])


def retold(demo: Demo) -> Demo:
  """The demonstration without pictures: only to answer from what the tools said is supervised."""
  silent = lambda result: dataclasses.replace(result, images=())
  turns = [
    dataclasses.replace(turn, result=silent(turn.result), supervised=False, sights=())
    for turn in demo.turns[:-1]
  ]
  task = dataclasses.replace(demo.task, images=(), videos=(), boxes=())
  return Demo(task=task, turns=(*turns, demo.turns[-1]))


def described(demo: Demo, plates: Sequence[Plate], labels: Sequence[int]) -> Demo:
  """The demonstration with its sights: frames in the scene, and the digits that its looks show.

  Args:
    plates: All of the scene.
    labels: The digit on each plate.
  """
  frames = _frames(demo.task, [(plate.color, plate.box) for plate in plates])

  def digits(picture: Picture) -> tuple[Sight, ...]:
    inks = zip(map(_ink, (plate.box for plate in plates)), labels, strict=True)
    return tuple(
      Sight(len(_FRAMES) + label, _within(ink, picture.box))
      for ink, label in inks
      if picture.box.holds(ink)
    )

  looked = lambda turn: tuple(map(digits, turn.result.images)) if turn.result else ()
  turns = tuple(dataclasses.replace(turn, sights=looked(turn)) for turn in demo.turns)
  return dataclasses.replace(demo, turns=turns, sights=frames)


def framed(boards: Mapping[str, Box], task: Task) -> tuple[tuple[Sight, ...], ...]:
  """The sights of a task whose one image holds boards of these colours; none if there are none."""
  return _frames(task, [(COLORS[name], box) for name, box in boards.items()]) if boards else ()


def _frames(
  task: Task, placed: Sequence[tuple[tuple[int, int, int], Box]]
) -> tuple[tuple[Sight, ...], ...]:
  height, width = task.images[0].shape[:2]
  canvas = Box(0.0, 0.0, float(width), float(height))
  return (tuple(Sight(_FRAMES[color], _within(box, canvas)) for color, box in placed),)


def _ink(plate: Box) -> Box:
  """The digit in the middle of its plate."""
  x, y = plate.center
  return Box(x - DIGIT / 2, y - DIGIT / 2, x + DIGIT / 2, y + DIGIT / 2)


def _within(box: Box, frame: Box) -> Box:
  """The box in parts of the frame's sides."""
  return Box(
    (box.x0 - frame.x0) / frame.width,
    (box.y0 - frame.y0) / frame.height,
    (box.x1 - frame.x0) / frame.width,
    (box.y1 - frame.y0) / frame.height,
  )


def shown_box(
  task: Task,
  box: Box,
  rng: np.random.Generator,
  shown_size: Callable[[int, int], tuple[int, int]],
) -> tuple[int, int, int, int]:
  """A square of whole shown pixels about the middle of a source box, up to `OFF` pixels beside it.

  Square, because Qwen's resizing keeps the aspect: a square crop is shown at one size always. Its
  side is `TIGHT` of the box's: what is framed matters, not the frame.
  """
  height, width = task.images[0].shape[:2]
  shown_height, shown_width = shown_size(height, width)
  across, along = shown_width / width, shown_height / height
  side = round(TIGHT * max(box.width * across, box.height * along))
  x, y = box.center
  x0 = _start(rng, x * across, side, shown_width)
  y0 = _start(rng, y * along, side, shown_height)
  return x0, y0, x0 + side, y0 + side


def zoom(
  task: Task,
  box: Box,
  rng: np.random.Generator,
  shown_size: Callable[[int, int], tuple[int, int]],
) -> ToolCall:
  """The call that shows a source box, by `shown_box`."""
  return ToolCall(name="zoom_in", arguments={"bbox_2d": [*shown_box(task, box, rng, shown_size)]})


def _start(rng: np.random.Generator, center: float, side: int, limit: int) -> int:
  """A whole start of `side` pixels around `center`, within [0, limit)."""
  start = round(center - side / 2 + rng.uniform(-OFF, OFF))
  return min(max(start, 0), limit - side)


def looked(task: Task, call: ToolCall, toolbox: Toolbox, earlier: Sequence[ToolResult]) -> DemoTurn:
  """A call and what it really returns after these results. Raises ValueError where it fails."""
  result = toolbox.run(call, task, earlier)
  if result.error is not None:
    raise ValueError(f"task {task.id}: demonstrated call {call.arguments} failed: {result.error}")
  return DemoTurn(text=call_text(call), result=result)


def _verify(task: Task, result: ToolResult) -> None:
  """The picture holds the digit, which lies in the middle of the evidence box."""
  ink = _ink(task.boxes[0])
  for picture in result.images:
    if picture.box.holds(ink) and picture.source == 0 and picture.box.width < CANVAS / 4:
      return
  raise ValueError(f"task {task.id}: the call does not show its evidence {task.boxes[0]}")
