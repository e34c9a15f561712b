"""Labelled questions from a file: what SFT and RFT learn from and evaluation asks, beside scenes.

A question is a record (`records.py`) with
  answer      text or a number: what is right
  solution    optional: the turn that SFT teaches, with the answer in its last \\boxed{}
  boxes       optional: where the evidence is, [x0, y0, x1, y1] each, in pixels of the first image.
              Without a solution SFT teaches to zoom into them, one by one, and then to answer
So the same file is a request stream, where nobody reads these fields.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixelis_jax.algo.answers import canonical, equal
from pixelis_jax.chat.parse import parse_answer
from pixelis_jax.data import records
from pixelis_jax.data.demos import direct, looked
from pixelis_jax.data.mixture import look_at_boxes
from pixelis_jax.tools import Tool, Toolbox
from pixelis_jax.types import Box, Demo, DemoTurn, Task, value

SHOWN = 5  # Of the records that are wrong, in the message that refuses a file.


@value
class Question:
  """A checked record: `where` it stands in the file, and what it says beside the common fields."""

  where: str
  record: records.Record
  answer: str
  solution: str | None
  boxes: tuple[Box, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class QuestionFile:
  """Random access in the order of the file; pixels are read at each access and not kept."""

  path: Path
  questions: tuple[Question, ...]

  @classmethod
  def open(cls, path: str | Path, *, sees: bool) -> "QuestionFile":
    """Reads and checks all but the pixels.

    Args:
      sees: As for `records.read`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no question, or some that are malformed or repeat a request_id: unlike a
        stream, what is learned from or measured on has to be whole. The message says where.
    """
    path = Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"question file {path} is not a file")
    found: dict[str, Question] = {}
    wrong = []
    for where, item in records.items(path):
      try:
        question = _question(where, records.read(item, sees=sees), path.parent)
        if (first := found.setdefault(question.record.id, question)) is not question:
          raise records.Malformed(f"request_id {first.record.id!r} was given on {first.where}")
      except records.Malformed as e:
        wrong.append(f"{where}: {e}")
    if wrong or not found:
      shown = "\n".join(wrong[:SHOWN] or ["it is empty"])
      raise ValueError(f"{path} has {len(wrong)} wrong and {len(found)} good questions:\n{shown}")
    return cls(path, tuple(found.values()))

  def __len__(self) -> int:
    return len(self.questions)

  def __getitem__(self, index: int) -> Task:
    """Raises ValueError, naming the place in the file, where an image cannot be read, or a box is
    beside it.
    """
    question = self.questions[index]
    try:
      task = question.record.task(self.path.parent, question.answer)
    except records.Malformed as e:
      raise ValueError(f"{self.path}, {question.where}: {e}") from e
    for box in question.boxes:
      height, width = task.images[0].shape[:2]
      if not (box.x0 < width and box.y0 < height and box.x1 > 0 and box.y1 > 0):
        beside = f"box {list(dataclasses.astuple(box))} is beside the first image, {width}x{height}"
        raise ValueError(f"{self.path}, {question.where}: {beside}")
    return dataclasses.replace(task, boxes=question.boxes)

  def demo(self, index: int, toolbox: Toolbox) -> Demo:
    """The solution as one turn; without one a look at each box and the answer.

    Where there are no boxes, or no tool that shows one, it is the answer alone. Raises ValueError,
    naming the place in the file, where a box cannot be looked at.
    """
    task, question = self[index], self.questions[index]
    if question.solution is not None:
      return Demo(task=task, turns=(DemoTurn(text=question.solution, result=None),))
    if toolbox.zoom is None:
      return direct(task)
    try:
      looks = _looks(task, toolbox.zoom, toolbox)
    except ValueError as e:
      raise ValueError(f"{self.path}, {question.where}: {e}") from e
    return Demo(task=task, turns=(*looks, *direct(task).turns))


def write_questions(path: str | Path, tasks: Sequence[Task]) -> None:
  """`records.write` of labelled tasks: a file that `QuestionFile` opens.

  Raises ValueError, naming it, for a task without an answer.
  """
  if unlabelled := [task.id for task in tasks if task.answer is None]:
    raise ValueError(f"questions must have answers; without: {unlabelled[:5]}")
  boxes = lambda task: {"boxes": [dataclasses.astuple(b) for b in task.boxes]} if task.boxes else {}
  records.write(path, tasks, lambda task: {"answer": task.answer, **boxes(task)})


def _looks(task: Task, zoom: Tool, toolbox: Toolbox) -> list[DemoTurn]:
  turns: list[DemoTurn] = []
  for call in look_at_boxes(task, zoom, toolbox.sight(task, ())):
    turns.append(looked(task, call, toolbox, [turn.result for turn in turns]))
  return turns


def _question(where: str, record: records.Record, folder: Path) -> Question:
  answer = _answer(record.fields)
  for name in record.images:
    if not name.startswith("data:") and not (folder / name).is_file():
      raise records.Malformed(f"there is no image {folder / name}")
  for clip in record.videos:
    if not (folder / clip.path).exists():
      raise records.Malformed(f"there is no video {folder / clip.path}")
  boxes = _boxes(record.fields)
  if boxes and not record.images:
    raise records.Malformed("boxes are places in the first image, and there is none")
  solution = _solution(record.fields, answer)
  return Question(where=where, record=record, answer=answer, solution=solution, boxes=boxes)


def _answer(fields: Mapping) -> str:
  answer = fields.get("answer")
  number = isinstance(answer, int | float) and not isinstance(answer, bool)
  if not (isinstance(answer, str) or number) or not canonical(str(answer)):
    raise records.Malformed(f"answer must be a text or a number, not {answer!r}")
  return str(answer)


def _solution(fields: Mapping, answer: str) -> str | None:
  solution = fields.get("solution")
  if solution is None:
    return None
  if not isinstance(solution, str):
    raise records.Malformed(f"solution must be a text, not {solution!r}")
  if not equal(said := parse_answer(solution), answer):
    raise records.Malformed(
      rf"solution must end with \boxed{{{answer}}}: the answer in its last box is {said!r}"
    )
  return solution


def _boxes(fields: Mapping) -> tuple[Box, ...]:
  given = fields.get("boxes", [])
  numbers = lambda box: (
    isinstance(box, list)
    and len(box) == 4
    and all(isinstance(x, int | float) and not isinstance(x, bool) for x in box)
  )
  if not isinstance(given, list) or not all(map(numbers, given)):
    raise records.Malformed(f"boxes must be a list of [x0, y0, x1, y1], not {given!r}")
  try:
    return tuple(Box(*map(float, box)) for box in given)
  except ValueError as e:
    raise records.Malformed(str(e)) from e
