import dataclasses

import numpy as np
import pytest

from pixelis_jax.data.kinds import KINDS, objects
from pixelis_jax.data.kinds.puzzle import materials
from pixelis_jax.data.scenes import COLORS
from tests.data.kinds.scripts import answered, composed


def nearest(pixels):
  """The named colour that most of these pixels are nearest to."""
  apart = np.abs(pixels[:, None].astype(int) - np.array(list(COLORS.values()))[None]).sum(2)
  return list(COLORS)[np.bincount(apart.argmin(1)).argmax()]


def test_the_larger_one_has_the_pixels():
  ratios, answers = [], []
  for seed in range(20):
    puzzle = composed("larger", seed)
    group, *pair = puzzle.looks
    pixels = puzzle.task.images[0]
    areas = {o.color: int(o.whole.sum()) for o in puzzle.objects[:2]}
    larger, smaller = sorted(areas, key=areas.get, reverse=True)
    ratios.append(areas[larger] / areas[smaller])
    answers.append(larger == puzzle.objects[0].color)
    assert puzzle.task.answer == larger and puzzle.slips == (smaller,)
    assert puzzle.task.boxes == tuple(look.box for look in puzzle.looks)
    assert [look.name for look in pair] == [o.color for o in puzzle.objects[:2]]
    assert len({o.name for o in puzzle.objects}) == len({o.color for o in puzzle.objects}) == 3
    for look, placed in zip(pair, puzzle.objects, strict=False):
      assert look.box == placed.box and group.box.holds(placed.box)
      assert f"the {look.name} shape" in puzzle.task.question
      assert nearest(pixels[placed.whole]) == placed.color
    # In the mistake the smaller third is taken for the larger: then the smaller one wins.
    ((_, *wrong),) = puzzle.mistakes
    sizes = [next(o.whole.sum() for o in puzzle.objects if o.box == look.box) for look in wrong]
    assert wrong[int(np.argmax(sizes))].name == smaller
  low, high = objects.APART
  assert low <= min(ratios) and max(ratios) <= high and 4 < sum(answers) < 16


def test_fetched_things_are_called_by_the_last_word_of_their_names():
  plain = materials("dev")
  things = tuple(
    dataclasses.replace(cutout, color=None, name=f"small {cutout.name}") for cutout in plain.shapes
  )
  both = dataclasses.replace(plain, things=things)
  compose = KINDS["larger"].compose
  puzzles = [compose(np.random.default_rng(seed), both, "a") for seed in range(8)]
  named = [p for p in puzzles if p.objects[0].color is None]
  assert 0 < len(named) < 8  # Half of them.
  for puzzle in named:
    words = {placed.name.removeprefix("small ") for placed in puzzle.objects[:2]}
    assert {puzzle.task.answer, *puzzle.slips} == words
    assert all(f"the {word}" in puzzle.task.question for word in words)


def test_the_spot_that_is_asked_for_has_the_color():
  for seed in range(10):
    puzzle = composed("color", seed)
    frame, spot = puzzle.looks
    held = [o for o in puzzle.objects if frame.box.holds(o.box)]
    lefts = [o.box.x0 for o in held]
    assert len(held) == 3 and lefts == sorted(lefts)
    asked = held[objects.SPOTS.index(spot.name)]
    assert asked.box == spot.box and puzzle.task.answer == asked.color
    assert nearest(puzzle.task.images[0][asked.whole]) == asked.color
    assert spot.name in puzzle.task.question and f"{frame.name} frame" in puzzle.task.question
    assert len({o.color for o in held}) == 3 and puzzle.task.answer not in puzzle.slips
    # Two mistakes in the frame, one in each other frame.
    assert [other == frame for other, _ in puzzle.mistakes] == [True, True, False, False]
    # The three together are hardly 3 pixels wide where the picture is shown 60 high.
    assert (held[2].box.x1 - held[0].box.x0) * 60 / objects.CANVAS[0] < 3


def test_the_shape_is_in_the_frame_that_is_asked_for():
  for seed in range(10):
    puzzle = composed("shape", seed)
    (frame, shape), others = puzzle.looks, puzzle.mistakes
    (held,) = [o for o in puzzle.objects if frame.box.holds(o.box)]
    assert (held.name, held.box) == (puzzle.task.answer, shape.box)
    assert held.name in objects.NAMED and puzzle.task.answer not in puzzle.slips
    names = {next(o.name for o in puzzle.objects if o.box == s.box) for _, s in others}
    assert len(names) == 2 and held.name not in names
    corner = puzzle.task.images[0][int(frame.box.y0), int(frame.box.x0)]
    assert tuple(corner) == COLORS[frame.name]


def test_what_the_pictures_are_of_differs():
  questions = {composed("shape", seed).task.question.split(" ")[0] for seed in range(12)}
  assert questions == {"What", "Which", "Name"}


@pytest.mark.parametrize(
  "areas, answer",
  [(("1,204", "980"), 0), (("99", "1,021"), 1)],  # As text "99" would be the larger.
)
def test_the_solver_compares_numbers(areas, answer):
  puzzle = composed("larger", 0)
  texts = [f"Mask {i}: {area} pixels, box [1, 2, 3, 4]." for i, area in enumerate(areas, start=1)]
  calls, said = answered("larger", puzzle, texts)
  assert said == puzzle.looks[1 + answer].name
  assert [name for name, _ in calls] == ["zoom_in", "segment_object_at", "segment_object_at"]
  assert [arguments["image"] for _, arguments in calls[1:]] == [2, 2]
  # What is not found is not larger.
  assert answered("larger", puzzle, ["nothing is there", texts[1]])[1] == puzzle.looks[2].name


def test_the_solver_takes_the_commonest_color_that_is_not_the_ground():
  puzzle = composed("color", 0)
  said = "Region [1, 2, 3, 4]:\nColour: grey 52%, red 30%, purple 18%; mean RGB (1, 2, 3)."
  calls, answer = answered("color", puzzle, [said])
  assert answer == "red" and [name for name, _ in calls] == ["zoom_in", "get_properties"]
  assert answered("color", puzzle, ["Region:\nColour: grey 100%; mean RGB (1, 2, 3)."])[1] == ""


def test_the_solver_asks_for_the_mask_that_it_was_given():
  puzzle = composed("shape", 0)
  texts = ["Mask 3: 192 pixels, box [1, 2, 3, 4].", "Mask 3:\nShape: heart; perimeter 53 pixels."]
  calls, answer = answered("shape", puzzle, texts)
  assert answer == "heart" and calls[-1] == ("get_properties", {"mask": 3})
  assert answered("shape", puzzle, ["there is no object"])[1] == ""
