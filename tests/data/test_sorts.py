import dataclasses

import numpy as np
import pytest

from pixelis_jax.algo.answers import equal
from pixelis_jax.chat.parse import parse_answer, parse_call
from pixelis_jax.data import sorts
from pixelis_jax.data.kinds import KINDS, PuzzleSource
from pixelis_jax.data.kinds.motion import BEGAN
from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.types import Demo, ToolResult
from tests.data.kinds.scripts import composed

# What tools/ take for these: hundredths of a second, but a second or two for the last ones.
QUICK = ("color", "shape", "larger")


def size(height, width):
  """As the embedded model's processor: about 80 x 80 pixels, of the picture's proportions."""
  return (60, 80) if width > height else (80, 80)


@pytest.fixture(scope="module")
def tools():
  everything = tuple(TOOLS["qwen"])
  frames = lambda video: (np.arange(len(video.frames)), (60, 80))
  return Toolbox(everything, shown_size=size, shown_frames=frames)


class Scripted(Toolbox):
  """READ_TEXT that reads what it is told, wherever it looks, one after the other."""

  def __init__(self, *texts):
    super().__init__(("read_text",), shown_size=size)
    self.texts = list(texts)

  def run(self, call, task, results, view=None):
    return ToolResult(text=f"1 line:\n[1, 2, 3, 4] 0.99 {self.texts.pop(0)}")


def reading(sort, *texts, seed=0):
  puzzle = composed("read", 0)
  texts = [puzzle.task.answer if text == "right" else text for text in texts]
  rng = np.random.default_rng(seed)
  return sorts.demonstrate(puzzle, KINDS["read"], rng, Scripted(*texts), sort), puzzle


def supervised(demo):
  return [turn.supervised for turn in demo.turns]


def said(demo):
  return parse_answer(demo.turns[-1].text)


@pytest.mark.parametrize("kind", [*QUICK, "read", "count", "clock", "hidden"])
def test_solvers_are_right_with_the_real_tools(kind, tools):
  # Fixed puzzles; of all of a kind nine in ten or more are solved (benchmarks/need.py).
  for seed in range(2 if kind in QUICK else 1):
    puzzle = composed(kind, seed)
    demo = sorts.demonstrate(puzzle, KINDS[kind], np.random.default_rng(seed), tools)
    assert isinstance(demo, Demo), f"{kind} {seed}: {demo}"
    *calls, last = demo.turns
    assert {parse_call(turn.text).name for turn in calls} == set(KINDS[kind].tools)
    assert all(turn.result.error is None and turn.supervised for turn in calls)
    assert equal(parse_answer(last.text), puzzle.task.answer)
    assert last.result is None and last.supervised and demo.task is puzzle.task


def test_a_wrong_tool_gives_no_demonstration():
  assert reading("golden", "right")[0].turns[-1].supervised
  assert reading("golden", "ABCD")[0] == sorts.TOOLS_WRONG
  # The wrong sign first, then the right one, which is misread.
  assert reading("corrected", "ABCD", "EFGH")[0] == sorts.TOOLS_WRONG
  # The other sign says the same: it is no mistake.
  assert reading("corrected", "right", "right")[0] == sorts.NOT_WRONG


def test_traps_are_perceptual_or_logical_and_teach_nothing_wrong():
  found = set()
  for seed in range(12):
    puzzle = composed("read", 0)
    perceptual = np.random.default_rng(seed).integers(2) == 0
    demo, puzzle = reading("trap", "ABCD" if perceptual else "right", seed=seed)
    look, last = demo.turns
    assert not equal(said(demo), puzzle.task.answer) and not last.supervised
    if perceptual:
      assert said(demo) == "ABCD" and not look.supervised
    else:  # It looked at the right sign, saw the right thing and said another.
      assert said(demo) in puzzle.slips and look.supervised
    found.add(perceptual)
  assert found == {True, False}
  # Nothing was read at the other sign: there is no wrong answer to give.
  assert [reading("trap", "", seed=s)[0] for s in range(3)].count(sorts.NOT_WRONG) > 0


@pytest.mark.parametrize("kind", QUICK)
def test_wrong_steps_are_really_wrong_and_never_supervised(kind, tools):
  for seed in range(2):
    puzzle = composed(kind, seed)
    rng = np.random.default_rng(seed)
    demo = sorts.demonstrate(puzzle, KINDS[kind], rng, tools, "corrected")
    assert isinstance(demo, Demo), f"{kind} {seed}: {demo}"
    wrong = [turn for turn in demo.turns if not turn.supervised]
    taught = [turn for turn in demo.turns if turn.supervised]
    assert wrong and demo.turns[-1].supervised and equal(said(demo), puzzle.task.answer)
    # What is taught is a whole solution, in the context of the wrong steps' pictures and masks.
    names = [parse_call(turn.text).name for turn in taught[:-1]]
    golden = sorts.demonstrate(puzzle, KINDS[kind], np.random.default_rng(seed), tools)
    assert names == [parse_call(turn.text).name for turn in golden.turns[:-1]]
    # One step is wrong, and a solver that knows better makes no such call.
    (step,) = wrong
    assert step.text not in {turn.text for turn in golden.turns}


def test_a_correction_points_at_the_pictures_that_came_after_the_mistake(tools):
  for seed in range(3):
    puzzle = composed("shape", seed)
    demo = sorts.demonstrate(
      puzzle, KINDS["shape"], np.random.default_rng(seed), tools, "corrected"
    )
    calls = [parse_call(turn.text) for turn in demo.turns[:-1]]
    assert [call.name for call in calls] == ["zoom_in", *KINDS["shape"].tools]
    # Image 2 is the zoom at the wrong frame, 3 the one at the right frame.
    assert calls[2].arguments["image"] == 3 and calls[3].arguments["mask"] == 1


def test_a_puzzle_whose_places_cannot_be_told_apart_has_no_correction(tools):
  puzzle = composed("color", 0)
  # An answer that the same spot does not give: the tools are wrong, whoever looks.
  other = dataclasses.replace(puzzle.task, answer="black")
  same = dataclasses.replace(puzzle, task=other, mistakes=(puzzle.looks,))
  made = sorts.demonstrate(same, KINDS["color"], np.random.default_rng(0), tools, "corrected")
  assert made == sorts.TOOLS_WRONG


def test_a_source_is_a_function_of_index_and_sort(tools):
  puzzles = PuzzleSource(split="dev", seed=1, kinds=("color",))
  one, two = (sorts.source(puzzles, tools) for _ in range(2))
  for sort in sorts.SORTS:
    first, again = one(2, sort), two(2, sort)
    assert [turn.text for turn in first.turns] == [turn.text for turn in again.turns]
    assert first.task.id == puzzles[2].id
  with pytest.raises(ValueError, match="sort 'gold' must be one of"):
    one(0, "gold")


def test_a_wrong_slip_is_our_bug(tools):
  puzzle = composed("color", 0)
  wrong = dataclasses.replace(puzzle, slips=(puzzle.task.answer,))
  with pytest.raises(AssertionError, match="is right"):
    for seed in range(8):  # Until a trap is a logical one.
      sorts.demonstrate(wrong, KINDS["color"], np.random.default_rng(seed), tools, "trap")


@pytest.mark.parametrize("kind", ["read", "count"])
def test_a_tour_points_at_all_that_a_question_of_the_kind_can_name(kind, tools):
  puzzle = composed(kind, 3)
  demo = sorts.tour(puzzle, KINDS[kind], np.random.default_rng(0), tools)
  boxes = {looks[0].name: looks[0].box for looks in (puzzle.looks, *puzzle.mistakes)}
  asked = [demo.task.question, *(turn.result.text for turn in demo.turns[:-1])]
  assert len(asked) == len(boxes) == 3
  for question, turn in zip(asked, demo.turns, strict=True):
    (name,) = [name for name in boxes if f"{name} sign" in question]
    call = parse_call(turn.text)
    assert call.name == "read_text"
    # 640 x 480 is shown as 80 x 60, and a solver shows up to 6 pixels more on each side.
    box = boxes.pop(name)
    told = np.array(call.arguments["bbox_2d"]) * 8
    assert np.abs(told - [box.x0, box.y0, box.x1, box.y1]).max() <= 6 + 8
  assert len(demo.sights[0]) == 3


@pytest.mark.parametrize(
  ("kind", "tool"), [("color", "get_properties"), ("shape", "segment_object_at")]
)
def test_a_tour_points_into_the_pictures_that_it_was_shown(kind, tool, tools):
  """Frame after frame: the frame is zoomed into, and then what stands in it is pointed at."""
  puzzle = composed(kind, 3)
  places = (puzzle.looks, *puzzle.mistakes)
  demo = sorts.tour(puzzle, KINDS[kind], np.random.default_rng(0), tools)
  calls = [parse_call(turn.text) for turn in demo.turns]
  assert [call.name for call in calls] == ["zoom_in", tool] * 3
  asked = [demo.task.question, *(turn.result.text for turn in demo.turns[1:-1:2])]
  for i, question in enumerate(asked):
    ((frame, spot),) = [
      looks
      for looks in places
      if f"{looks[0].name} frame" in question and (kind == "shape" or looks[1].name in question)
    ]
    zoomed, into = calls[2 * i : 2 * i + 2]
    assert into.arguments["image"] == i + 2
    # The crop is shown in 80 x 80 at most, whose pixels are smaller than the picture's own.
    (picture,) = demo.turns[2 * i].result.images
    told = np.array(into.arguments["bbox_2d"]).reshape(2, 2)
    height, width = tools.shown_size(*picture.pixels.shape[:2])
    scale = (picture.box.width / width, picture.box.height / height)
    found = told * scale + (picture.box.x0, picture.box.y0)
    wanted = np.reshape([spot.box.x0, spot.box.y0, spot.box.x1, spot.box.y1], (2, 2))
    assert np.abs(found - wanted).max() <= 2 * max(scale)
    assert picture.box.x0 <= frame.box.x0 and picture.box.y1 >= frame.box.y1


def test_a_tour_of_a_film_follows_each_thing_from_its_beginning(tools):
  puzzle = composed("hidden", 3)
  demo = sorts.tour(puzzle, KINDS["hidden"], np.random.default_rng(0), tools)
  calls = [parse_call(turn.text) for turn in demo.turns]
  assert [call.name for call in calls] == ["select_frames", "track_object"] * 3
  asked = [demo.task.question, *(turn.result.text for turn in demo.turns[1:-1:2])]
  thirds = [next(name for name in BEGAN if BEGAN[name] in question) for question in asked]
  assert sorted(thirds) == ["left", "middle", "right"]
  boxes = {looks[0].name: looks[0].box for looks in (puzzle.looks, *puzzle.mistakes)}
  for third, call in zip(thirds, calls[1::2], strict=True):
    x0, y0, x1, y1 = np.array(call.arguments["bbox_2d"]) * 4  # 320 x 240, shown as 80 x 60.
    assert boxes[third].center == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=1 + 4)


def test_questions_about_several_things_have_no_tour(tools):
  with pytest.raises(ValueError, match="kind 'larger' asks about several things at once"):
    sorts.tour(composed("larger", 0), KINDS["larger"], np.random.default_rng(0), tools)
