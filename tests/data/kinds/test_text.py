import numpy as np
import pytest

from pixelis_jax.chat.parse import parse_answer, parse_call
from pixelis_jax.data.kinds import text
from tests.data.kinds.scripts import answered, composed


def rows(box):
  return slice(int(box.y0), int(box.y1)), slice(int(box.x0), int(box.x1))


@pytest.mark.parametrize("count", [1, 5])
def test_all_ink_of_a_board_is_in_its_lines(count):
  for seed in range(5):
    texts = ["AC7", "DEF", "HKM", "WWW", "446"][:count]
    made = text.board(
      np.random.default_rng(seed), "red", texts, size=(136, 112), ems=(12.0, 14.0), rows=8
    )
    ground = np.array(made.lines[0].ground)
    inked = (made.pixels != ground).any(2)
    for line in made.lines:
      assert inked[rows(line.box)].any()
      inked[rows(line.box)] = False
      # Black or white on a colour that is neither: WCAG's contrast of one of them is at least 4.5.
      assert line.contrast > 4.5
    assert not inked.any()
    assert [line.text for line in made.lines] == texts
    tops = [line.box.y0 for line in made.lines]
    assert tops == sorted(tops)
    # The same colour, but for 12 levels.
    assert np.abs(ground - [220, 40, 40]).max() <= 12


def test_a_text_that_does_not_fit_its_board_says_so():
  with pytest.raises(ValueError, match="text 'WWWWWWWW' of 20 pixels an em does not fit"):
    text.board(np.random.default_rng(0), "red", ["WWWWWWWW"], size=(40, 80), ems=(20.0, 20.0))


def test_the_answer_is_on_the_sign_that_is_asked_for():
  for seed in range(10):
    puzzle = composed("read", seed)
    (look,) = puzzle.looks
    assert look.name in puzzle.task.question and puzzle.task.boxes == (look.box,)
    held = [line.text for line in puzzle.lines if look.box.holds(line.box)]
    assert held == [puzzle.task.answer]
    # The others are on the other signs, one on each: who reads there reads something else.
    others = [
      [l.text for l in puzzle.lines if other.box.holds(l.box)] for (other,) in puzzle.mistakes
    ]
    assert sorted(map(len, others)) == [1, 1] and held not in others
    assert puzzle.task.answer not in puzzle.slips
    # Shown in 80 x 60 the letters are 2 pixels high: READ_TEXT needs 8.
    assert max(line.box.height for line in puzzle.lines) * 60 / text.CANVAS[0] < 2.5


def test_the_answer_is_the_number_of_lines_on_the_notice():
  spans = {}
  for seed in range(60):
    puzzle = composed("count", seed)
    boxes = [look.box for (look,) in (puzzle.looks, *puzzle.mistakes)]
    counts = [sum(box.holds(line.box) for line in puzzle.lines) for box in boxes]
    assert puzzle.task.answer == str(counts[0])
    assert len(set(counts)) == 3 and str(counts[0] - 1) in puzzle.slips
    lines = [line.box for line in puzzle.lines if boxes[0].holds(line.box)]
    spans.setdefault(counts[0], []).append(lines[-1].y1 - lines[0].y0)
    # Notices are of one size, whatever they hold.
    assert {(box.height, box.width) for box in boxes} == {text.NOTICE}
  # From the first line to the last it is as far with 3 lines as with 5 in some of them.
  assert max(spans[3]) > min(spans[5])


def test_a_screen_shows_each_code_for_its_second():
  for seed in range(4):
    puzzle = composed("clock", seed)
    (look,), (other,) = puzzle.looks, puzzle.mistakes[0]
    frames, times = puzzle.task.videos[0].frames, puzzle.task.videos[0].times
    at = int(look.time)
    assert puzzle.lines[at].text == puzzle.task.answer and other.time != look.time
    assert any(told in puzzle.task.question for told in (f"0:{at:02d}", f"{at} s", f"second {at}"))
    assert len({line.text for line in puzzle.lines}) == text.SECONDS
    for second, line in enumerate(puzzle.lines):
      ink = np.array(line.color)
      held = [(frame[rows(line.box)] == ink).all(2).any() for frame in frames]
      shown = (times >= second) & (times < second + 1)
      assert all(np.array(held)[shown])
      # Beyond its box, on the screen, there is none of this ink in its frames.
      for frame in frames[shown]:
        board = (frame[rows(look.box)] == ink).all(2)
        assert board.sum() == (frame[rows(line.box)] == ink).all(2).sum()


def test_solvers_read_what_the_tool_says():
  puzzle = composed("read", 0)
  said = "2 lines:\n[1, 2, 3, 4] 0.61 ABCD\n[30, 21, 36, 25] 0.97 Y3 GC"
  calls, answer = answered("read", puzzle, [said])
  assert answer == "Y3 GC" and [name for name, _ in calls] == ["read_text"]
  # 640 x 480 in 80 x 60: 8 pixels a unit, and up to 4 more than the sign.
  box, told = puzzle.looks[0].box, np.array(calls[0][1]["bbox_2d"]) * 8
  assert np.abs(told - [box.x0, box.y0, box.x1, box.y1]).max() <= 4 + 4
  assert answered("read", puzzle, ["No text found."])[1] == ""
  assert answered("count", composed("count", 0), [said])[1] == "2"
  assert answered("count", composed("count", 0), ["No text found."])[1] == "0"


def test_the_clocks_solver_selects_the_time_and_reads_there():
  puzzle = composed("clock", 0)
  calls, answer = answered("clock", puzzle, ["1 line:\n[7, 37, 15, 42] 1.00 QE33"])
  (first, selected), (second, pointed) = calls
  assert (first, selected) == ("select_frames", {"times": [puzzle.looks[0].time]})
  # The frame is the first image there is.
  assert second == "read_text" and "image" not in pointed and answer == "QE33"


def test_misreadings_are_no_readings():
  for seed in range(20):
    slips = text.misread(np.random.default_rng(seed), "AAB3")
    assert "AAB3" not in slips and len(slips) == 2 and sorted(slips[1]) == sorted("AAB3")
  assert text.misread(np.random.default_rng(0), "77") == ("7",)


def test_a_recital_says_each_code_right_behind_its_reading():
  demo = text.recital(np.random.default_rng(1), 5)
  call, *answers = demo.turns
  assert parse_call(call.text).name == "read_text" and not call.supervised
  read = [turn.result.text for turn in demo.turns[:-1]]
  codes = [parse_answer(turn.text) for turn in answers]
  assert len(codes) == len(read) == 5 and answers[-1].result is None
  for code, shown in zip(codes, read, strict=True):
    # What a solver makes of the same text.
    assert answered("read", composed("read", 0), [shown])[1] == code
  assert len(set(codes)) == 5 and all(turn.supervised for turn in answers)
  assert demo.task.images == () and demo.task.answer == codes[-1]
