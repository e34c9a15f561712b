import json

import numpy as np
import pytest

from pixelis_jax.data import demos, scenes
from pixelis_jax.data.tasks import DemoSource, TaskSource
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Box, Picture, Sight, ToolCall, ToolResult

TASKS = TaskSource(split="stream", size=50)


def rng(seed=0):
  return np.random.default_rng(seed)


def called_box(turn):
  body = json.loads(turn.text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
  assert body["name"] == "zoom_in"
  return body["arguments"]["bbox_2d"]


def test_call_is_written_as_the_policy_writes_it():
  call = ToolCall(name="zoom_in", arguments={"bbox_2d": [34, 56, 44, 66]})
  assert demos.call_text(call) == (
    '<tool_call>\n{"name": "zoom_in", "arguments": {"bbox_2d": [34, 56, 44, 66]}}\n</tool_call>'
  )


def test_demo_looks_at_the_evidence_then_answers(toolbox):
  for i in range(50):
    task = TASKS[i]
    look, answer = demos.demo(task, rng(i), toolbox).turns
    x0, y0, x1, y1 = called_box(look)
    box = task.boxes[0]
    # 400 / 80: a shown pixel is 5 source pixels. A plate is 12.8 of them, its inside 8.
    assert x1 - x0 == y1 - y0 == 8
    half = scenes.DIGIT / 2
    x, y = box.center
    assert 5 * x0 <= x - half and x + half <= 5 * x1 and 5 * y0 <= y - half and y + half <= 5 * y1
    # Nothing of another plate, which is at least 12 source pixels away, is shown.
    seen = Box(5.0 * x0, 5.0 * y0, 5.0 * x1, 5.0 * y1)
    others = [p.box for p in TASKS.scene(i).plates if p.box != box]
    assert max(seen.iou(other) for other in others) <= 0.0
    (picture,) = look.result.images
    assert picture.box == seen
    np.testing.assert_array_equal(picture.pixels, task.images[0][5 * y0 : 5 * y1, 5 * x0 : 5 * x1])
    assert answer.text == f"\\boxed{{{task.answer}}}" and answer.result is None
    assert look.supervised and answer.supervised


def test_boxes_vary_with_the_generator_alone(toolbox):
  boxes = [called_box(demos.demo(TASKS[0], rng(seed), toolbox).turns[0]) for seed in range(20)]
  again = [called_box(demos.demo(TASKS[0], rng(seed), toolbox).turns[0]) for seed in range(20)]
  assert boxes == again and len({tuple(box) for box in boxes}) > 1


def test_box_at_the_corner_of_the_image_stays_inside(toolbox):
  corner = Box(360.0, 360.0, 400.0, 400.0)
  for seed in range(20):
    x0, y0, x1, y1 = demos.shown_box(TASKS[0], corner, rng(seed), toolbox.shown_size)
    # The box's middle is at 76 of 80, 4 from the edge.
    assert x0 < 76 < x1 <= 80 and y0 < 76 < y1 <= 80
  edge = Box(0.0, 0.0, 8.0, 400.0)
  x0, y0, x1, y1 = demos.shown_box(TASKS[0], edge, rng(), toolbox.shown_size)
  assert x0 == 0 and 0 <= y0 < y1 <= 80


def test_mistakes_are_shown_but_not_supervised(toolbox):
  source = DemoSource(tasks=TASKS, toolbox=toolbox, mistakes=1.0)
  for i in range(20):
    demo = source[i]
    wrong, look, answer = demo.turns
    assert (wrong.supervised, look.supervised, answer.supervised) == (False, True, True)
    (seen,) = wrong.result.images
    (box,) = demo.task.boxes
    assert seen.box.iou(box) < 0.2
    # It is another plate, not background.
    plates = [p.box for p in TASKS.scene(i).plates if p.box != box]
    # A shown pixel is 5 of the source's: up to OFF of it beside the middle, and half for rounding.
    x, y = seen.box.center
    beside = [max(abs(x - p.center[0]), abs(y - p.center[1])) for p in plates]
    assert min(beside) <= 5 * (demos.OFF + 0.5)


def test_sights_say_which_frames_and_digits_an_image_shows(toolbox):
  source = DemoSource(tasks=TASKS, toolbox=toolbox)
  names = [*scenes.COLORS, "gray"]
  for i in range(20):
    demo, scene = source[i], TASKS.scene(i)
    (overview,) = demo.sights
    # A frame's number is its colour's place among the colours, gray last; its box is the plate.
    assert [names[sight.label] for sight in overview] == [
      p.target if p.target in scenes.COLORS else "gray" for p in scene.plates
    ]
    corner = np.array([overview[0].box.x0, overview[0].box.y0]) * scenes.CANVAS
    np.testing.assert_allclose(corner, [scene.plates[0].x, scene.plates[0].y])
    look, answer = demo.turns
    ((digit,),) = look.sights  # One picture, one digit in it.
    label = digit.label - len(names)
    wanted = str(label) if demo.task.kind != "parity" else ("even", "odd")[label % 2]
    assert wanted == demo.task.answer
    # The digit lies about the middle but for OFF and rounding: a shown pixel is 5 of the crop's 40.
    assert all(abs(c - 0.5) <= 5 * (demos.OFF + 0.5) / 40 for c in digit.box.center)
    picture = look.result.images[0]
    assert digit.box.width == pytest.approx(scenes.DIGIT / picture.box.width)
    assert answer.sights == ()
    read = demos.reading(demo)
    assert read.sights == look.sights and read.task.images[0] is picture.pixels


def test_a_digit_beyond_the_edge_of_a_look_is_not_seen(toolbox):
  demo, scene = DemoSource(tasks=TASKS, toolbox=toolbox)[0], TASKS.scene(0)
  (box,) = demo.task.boxes
  x, y = box.center
  look = demo.turns[0]

  def sights(x0):
    cut = Box(x0, y - 20, x0 + 40, y + 20)
    picture = Picture(pixels=np.zeros((40, 40, 3), np.uint8), source=0, box=cut)
    turn = type(look)(text=look.text, result=ToolResult(text="", images=(picture,)))
    told = type(demo)(task=demo.task, turns=(turn, demo.turns[1]))
    labels = [3] * len(scene.plates)
    return demos.described(told, scene.plates, labels).turns[0].sights[0]

  edge = x - scenes.DIGIT / 2
  assert sights(edge) == (Sight(7 + 3, Box(0.0, 14 / 40, 12 / 40, 26 / 40)),)
  assert sights(edge + 1) == ()


def test_share_of_mistakes(toolbox):
  source = DemoSource(tasks=TaskSource(split="stream", size=200), toolbox=toolbox, mistakes=0.3)
  corrected = sum(len(source[i].turns) == 3 for i in range(200))
  # Binomial(200, 0.3): 60, deviation 6.5.
  assert 34 < corrected < 86


def test_a_picture_without_the_digit_is_refused(monkeypatch, toolbox):
  task = TASKS[0]
  away = Box(0.0, 0.0, 8.0, 8.0)
  elsewhere = ToolResult(
    text="", images=(Picture(pixels=np.zeros((8, 8, 3), np.uint8), source=0, box=away),)
  )
  monkeypatch.setattr(Toolbox, "run", lambda *args: elsewhere)
  with pytest.raises(ValueError, match="does not show its evidence"):
    demos.demo(task, rng(), toolbox)


def test_failed_call_is_refused():
  box = Toolbox([], shown_size=lambda height, width: (80, 80))
  with pytest.raises(ValueError, match="failed: unknown tool"):
    demos.demo(TASKS[0], rng(), box)


def test_unlabelled_task_and_nowhere_to_err(toolbox):
  source = TASKS[0]
  bare = type(source)(id="a", images=source.images, question="?", answer=None)
  with pytest.raises(ValueError, match="needs an answer and an evidence box"):
    demos.demo(bare, rng(), toolbox)
  with pytest.raises(ValueError, match="need boxes elsewhere"):
    demos.demo(source, rng(), toolbox, mistakes=0.5)


def test_digit_lies_in_the_middle_of_its_box():
  # _verify takes the digit to be DIGIT wide around the box's centre.
  assert (scenes.PLATE - scenes.DIGIT) % 2 == 0
