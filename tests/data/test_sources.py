import pytest

from pixelis_jax.chat.parse import parse_answer, parse_call
from pixelis_jax.data import kinds, scenes, sorts, sources
from pixelis_jax.data.demos import LABELS
from pixelis_jax.data.tasks import TaskSource
from pixelis_jax.tools import USUAL, Options
from pixelis_jax.types import Demo
from tests.data.datasets import MODEL
from tests.memory.experiences import plain


def source(kind, **changes):
  settings = {"split": "dev", "seed": 3, "size": 10, "folder": None} | changes
  return sources.KINDS[kind](*settings.values(), sources.toolbox_of(MODEL))


def test_no_kind_is_named_twice():
  assert set(sources.KINDS) == {*scenes.KINDS, *kinds.KINDS}
  assert len(sources.KINDS) == len(scenes.KINDS) + len(kinds.KINDS)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_items_are_a_function_of_settings_and_index(kind):
  one = source(kind)(4, "golden")
  source(kind)(0, "corrected")
  # Of the splits of pictures, dev has the handwriting of `stream`.
  task = TaskSource(split="stream", seed=3, kinds=(kind,), size=20)[4]
  assert plain(one.task) == plain(task) and one.task.kind == kind
  assert plain(source(kind, size=20)(4, "golden").task) == plain(task)
  assert plain(source(kind, seed=4)(4, "golden").task) != plain(task)


def test_a_correction_looks_elsewhere_first():
  golden, corrected = (source("framed")(2, sort) for sort in ("golden", "corrected"))
  assert [turn.supervised for turn in golden.turns] == [True, True]
  assert [turn.supervised for turn in corrected.turns] == [False, True, True]
  wrong, right = (turn.result.images[0].box for turn in corrected.turns[:2])
  (evidence,) = corrected.task.boxes
  assert wrong.iou(evidence) == 0.0 < right.iou(evidence)


@pytest.mark.parametrize("kind", ["framed", "parity"])
def test_a_trap_answers_what_is_elsewhere(kind):
  made = [source(kind)(i, "trap") for i in range(8)]
  traps = [demo for demo in made if isinstance(demo, Demo)]
  corrected = [source(kind)(i, "corrected") for i in range(8)]
  assert {demo for demo in made if demo not in traps} <= {sorts.NOT_WRONG}
  # Of two digits about half are both even or odd; a tenth are the same.
  assert 2 <= len(traps) < 8 if kind == "parity" else len(traps) > 5
  for demo, right in zip(made, corrected, strict=True):
    digit = right.turns[0].sights[0][0].label - LABELS + 10
    wrong = ("even", "odd")[digit % 2] if kind == "parity" else str(digit)
    assert (wrong != right.task.answer) == isinstance(demo, Demo)
    if isinstance(demo, Demo):
      assert parse_answer(demo.turns[-1].text) == wrong
      assert [turn.supervised for turn in demo.turns] == [False, False]


def test_puzzles_are_demonstrated_with_real_tools():
  golden = source("shape")(1, "golden")
  assert golden.task.id == "shape-dev-3-1" and golden.task.kind == "shape"
  assert plain(golden.task) == plain(kinds.PuzzleSource(split="dev", seed=3, kinds=("shape",))[1])
  assert parse_answer(golden.turns[-1].text) == golden.task.answer
  trap = source("shape")(1, "trap")
  assert not trap.turns[-1].supervised


def test_the_toolbox_has_every_tool_in_the_policys_coordinates():
  toolbox = sources.toolbox_of(MODEL, Options(tracker="flow"))
  assert toolbox.options.tracker == "flow" and sources.toolbox_of(MODEL).options == USUAL
  assert toolbox.shown_size(400, 400) == (80, 80)
  assert {"zoom_in", "read_text", "track_object"} <= {*toolbox.tools}
  call = parse_call(source("framed")(0, "golden").turns[0].text)
  assert max(call.arguments["bbox_2d"]) <= 80
