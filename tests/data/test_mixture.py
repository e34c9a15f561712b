"""One source of all kinds: of digit scenes alone it is theirs, bit for bit."""

import collections

import numpy as np
import pytest

from pixelis_jax.algo.answers import equal
from pixelis_jax.chat.parse import parse_answer, parse_call
from pixelis_jax.data import mixture, sorts
from pixelis_jax.data.mixture import Demonstrations, Mixture
from pixelis_jax.data.tasks import DemoSource, TaskSource
from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.types import Demo
from tests.memory.experiences import plain

MIXED = ("framed", "color", "shape")


def toolbox(*names):
  size = lambda height, width: (60, 80) if width > height else (80, 80)
  return Toolbox(names or tuple(TOOLS["qwen"]), shown_size=size)


def test_of_digit_scenes_alone_it_is_their_source():
  settings = {
    "split": "stream",
    "seed": 7,
    "shift": "dim",
    "skew": 8,
    "kinds": ("beside", "parity"),
  }
  mixed, scenes = Mixture(**settings, size=5), TaskSource(**settings)
  assert [plain(task) for task in mixed] == [plain(scenes[i]) for i in range(5)]
  shown = Demonstrations(tasks=mixed, toolbox=toolbox("zoom_in"), mistakes=0.5)
  expected = DemoSource(tasks=scenes, toolbox=toolbox("zoom_in"), mistakes=0.5)
  for i in range(3):
    assert [t.text for t in shown[i].turns] == [t.text for t in expected[i].turns]
    assert shown[i].sights == expected[i].sights


def test_items_are_a_function_of_settings_and_index():
  mixed = Mixture(split="train", seed=2, kinds=MIXED, size=20)
  third = plain(mixed[3])
  assert plain(mixed[0]) != third == plain(mixed[3])
  assert plain(Mixture(split="train", seed=2, kinds=MIXED)[3]) == third
  assert plain(mixed[-17]) == third
  for other in ({"seed": 3}, {"split": "held_out"}):
    assert plain(Mixture(**({"split": "train", "seed": 2, "kinds": MIXED} | other))[3]) != third
  with pytest.raises(IndexError):
    mixed[20]


def test_kinds_come_equally_often():
  """Of 300 a third each: 100, give or take 8.2. Five of those off happens once in a million."""
  mixed = Mixture(split="train", kinds=("framed", "read", "count"), size=300)
  drawn = collections.Counter(
    "framed" if mixed.is_scene(i) else mixed.puzzles._drawn(i)[1] for i in range(300)
  )
  assert set(drawn) == {"framed", "read", "count"} and min(drawn.values()) > 60


def test_a_shift_changes_pixels_and_the_id_only():
  settings = {"split": "stream", "seed": 1, "kinds": ("color",), "size": 4}
  usual, other = (Mixture(**settings, shift=shift)[1] for shift in ("none", "invert"))
  assert (usual.question, usual.answer, usual.boxes) == (other.question, other.answer, other.boxes)
  np.testing.assert_array_equal(other.images[0], 255 - usual.images[0])
  assert other.id == f"{usual.id}-invert"


@pytest.mark.parametrize(
  "settings, said",
  [
    ({"kinds": ("reading",)}, r"kinds \('reading',\) must be some of \('framed', .*'hidden'\)"),
    ({"kinds": ()}, "must be some of"),
    ({"kinds": MIXED, "skew": 8}, r"skew 8 is a digit: kinds \('color', 'shape'\) have other answ"),
    ({"kinds": MIXED, "shift": "rotate"}, "shift 'rotate' of pictures without digits must be one"),
    ({"shift": "fog"}, "shift 'fog' must be one of"),
    ({"seed": -1}, "seed -1"),
  ],
)
def test_what_cannot_be_is_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    Mixture(split="train", **settings)


def test_puzzles_are_demonstrated_and_their_frames_described():
  tasks = Mixture(split="train", seed=4, kinds=("color",), size=10)
  demo = Demonstrations(tasks=tasks, toolbox=toolbox())[2]
  assert [parse_call(turn.text).name for turn in demo.turns[:-1]] == ["zoom_in", "get_properties"]
  assert equal(parse_answer(demo.turns[-1].text), tasks[2].answer)
  (frames,) = demo.sights
  # Three frames, 80 of 640 x 480 pixels, and one of them holds the spot that is asked for.
  assert len(frames) == 3
  for frame in frames:
    assert frame.box.width == pytest.approx(80 / 640) and frame.box.height == pytest.approx(1 / 6)
  x, y = demo.task.boxes[0].center
  inside = lambda box: box.x0 < x / 640 < box.x1 and box.y0 < y / 480 < box.y1
  assert sum(inside(frame.box) for frame in frames) == 1


def test_where_tools_fail_another_puzzle_of_the_kind_is_shown(monkeypatch):
  tasks = Mixture(split="train", seed=4, kinds=("color", "shape"), size=10)
  first, tried = tasks[2], []

  def demonstrate(puzzle, kind, rng, toolbox, sort):
    tried.append(puzzle.task.kind)
    shown = Demo(task=puzzle.task, turns=())
    return sorts.TOOLS_WRONG if len(tried) < 3 else shown

  monkeypatch.setattr(mixture.sorts, "demonstrate", demonstrate)
  demo = Demonstrations(tasks=tasks, toolbox=toolbox())[2]
  assert demo.task.id != first.id and tried == [first.kind] * 3
  # Not another item of the mixture, which would then be shown twice.
  assert demo.task.id not in {task.id for task in tasks}
  monkeypatch.setattr(mixture.sorts, "demonstrate", lambda *_: sorts.TOOLS_WRONG)
  with pytest.raises(ValueError, match=f"none of 64 puzzles of kind '{first.kind}' is solved"):
    Demonstrations(tasks=tasks, toolbox=toolbox())[2]


def test_corrections_are_the_share_that_is_asked_for():
  tasks = Mixture(split="train", seed=4, kinds=("color",), size=10)
  demo = Demonstrations(tasks=tasks, toolbox=toolbox(), mistakes=1.0)[1]
  assert not demo.turns[0].supervised and demo.turns[-1].supervised


def test_a_digit_is_looked_at_as_it_is_demonstrated():
  tasks = Mixture(split="held_out", seed=5, kinds=("beside",), size=10)
  asked = tasks.asked(3)
  tools = toolbox("zoom_in")
  call = next(asked.solve(tools.sight(asked.task, ())))
  (seen,) = tools.run(call, asked.task, ()).images
  (shown,) = Demonstrations(tasks=tasks, toolbox=tools)[3].turns[0].result.images
  assert seen.pixels.shape == shown.pixels.shape  # The policy has seen no crops of other sizes.
  assert seen.box.iou(shown.box) > 0.5 and asked.tools == ("zoom_in",)
