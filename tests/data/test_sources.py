import pytest

from pixelis_jax.chat.parse import parse_call
from pixelis_jax.data import scenes, sources
from pixelis_jax.data.tasks import TaskSource
from tests.data.datasets import MODEL
from tests.memory.experiences import plain


def source(kind, **changes):
  settings = {"split": "dev", "seed": 3, "size": 10, "folder": None} | changes
  return sources.KINDS[kind].open(*settings.values(), sources.toolbox_of(MODEL))


def test_every_kind_has_sorts_that_are_known():
  assert set(sources.KINDS) >= set(scenes.KINDS)
  for kind in sources.KINDS.values():
    assert kind.sorts and set(kind.sorts) <= set(sources.SORTS)


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


def test_the_toolbox_has_every_tool_in_the_policys_coordinates():
  toolbox = sources.toolbox_of(MODEL)
  assert toolbox.shown_size(400, 400) == (80, 80)
  assert {"zoom_in", "read_text", "track_object"} <= {*toolbox.tools}
  call = parse_call(source("framed")(0, "golden").turns[0].text)
  assert max(call.arguments["bbox_2d"]) <= 80
