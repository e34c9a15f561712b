import dataclasses

import grain
import numpy as np
import pytest

from pixelis_jax.chat.parse import parse_call
from pixelis_jax.data import scenes
from pixelis_jax.data.tasks import DemoSource, TaskSource, drop_labels
from pixelis_jax.types import Task


def same(a: Task, b: Task) -> bool:
  return (
    (a.id, a.question, a.answer, a.kind, a.boxes) == (b.id, b.question, b.answer, b.kind, b.boxes)
  ) and all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_items_depend_on_settings_and_index_alone():
  source = TaskSource(split="train", seed=4)
  third = source[3]
  source[0]
  assert same(third, source[3])
  assert same(third, TaskSource(split="train", seed=4, size=10)[3])
  assert same(source[-1], source[source.size - 1])
  with pytest.raises(IndexError):
    TaskSource(split="train", size=10)[10]


def test_ids_differ_wherever_scenes_do():
  sources = [
    TaskSource(split=split, seed=seed, shift=shift, skew=skew, kinds=kinds)
    for split in ("train", "stream")
    for seed in (0, 1)
    for shift in ("none", "dim")
    for skew in (None, 2, 3)
    for kinds in (scenes.KINDS, ("framed",))
  ]
  ids = [source[i].id for source in sources for i in (0, 1)]
  assert len(set(ids)) == len(ids)
  assert TaskSource(split="stream", seed=7)[5].id == "stream-7-5"


def test_a_shift_changes_pixels_only():
  usual, dim = (TaskSource(split="stream", shift=shift)[2] for shift in ("none", "dim"))
  assert (usual.question, usual.answer, usual.boxes) == (dim.question, dim.answer, dim.boxes)
  assert (usual.images[0] != dim.images[0]).any()


def test_kinds_are_those_asked_for():
  source = TaskSource(split="train", kinds=("beside", "parity"))
  assert {source[i].kind for i in range(20)} == {"beside", "parity"}


def test_no_label_survives_dropping():
  task = TaskSource(split="stream", skew=8, shift="rotate")[11]
  assert task.answer is not None and task.boxes
  bare = drop_labels(task)
  assert bare.answer is None and bare.boxes == ()
  # Whatever fields Task has or gets: only these may be what they were.
  kept = {
    f.name for f in dataclasses.fields(Task) if getattr(bare, f.name) == getattr(task, f.name)
  }
  assert kept == {"id", "images", "videos", "question", "kind"}
  # The id is the same whatever the answer is; a skew towards 8 must not be legible in it.
  assert bare.id.rsplit("-", 1)[0] == "stream-0-11-rotate"


def test_grain_shuffles_batches_and_resumes():
  def batches():
    source = TaskSource(split="train", size=16)
    data = grain.MapDataset.source(source).shuffle(seed=1).map(lambda task: task.id)
    return iter(data.to_iter_dataset().batch(4, batch_fn=list))

  straight = list(batches())
  assert sorted(sum(straight, [])) == sorted(f"train-0-{i}" for i in range(16))
  assert sum(straight, []) != [f"train-0-{i}" for i in range(16)]
  first = batches()
  next(first)
  resumed = batches()
  resumed.set_state(first.get_state())
  assert list(resumed) == straight[1:]


def test_demo_items_belong_to_task_items(toolbox):
  tasks = TaskSource(split="train", size=5)
  demos = DemoSource(tasks=tasks, toolbox=toolbox)
  assert len(demos) == 5
  assert same(demos[2].task, tasks[2])
  assert demos[2].turns[0].text == demos[2].turns[0].text
  assert demos[-1].task.id == "train-0-4"


def test_a_tour_asks_about_each_plate_once_and_looks_at_it(toolbox):
  source = DemoSource(tasks=TaskSource(split="train", size=9), toolbox=toolbox)
  orders = set()
  for index in range(9):
    scene, tour = source.tasks.scene(index), source.tour(index)
    asked = [tour.task.question, *(turn.result.text for turn in tour.turns[:-1])]
    assert tour.turns[-1].result is None and all(turn.supervised for turn in tour.turns)
    found = []
    for question, turn in zip(asked, tour.turns, strict=True):
      # "left of the star" is the only plate that a question names so.
      (plate,) = [p for p in scene.plates if p.target in question]
      x0, y0, x1, y1 = parse_call(turn.text).arguments["bbox_2d"]
      # 400 pixels are shown as 80: the middle of the call is within a shown pixel of the plate's.
      middle = np.array([x0 + x1, y0 + y1]) / 2 * 5
      assert np.abs(middle - plate.box.center).max() <= 5
      assert ("frame" in question) == (plate.color != scenes.GRAY)
      found.append(scene.plates.index(plate))
    assert sorted(found) == list(range(len(scene.plates)))
    orders.add(tuple(found) == tuple(sorted(found)))
    assert len(tour.sights[0]) == len(scene.plates)
  assert False in orders  # Where the order told the place, nobody would look.


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"kinds": ()}, r"kinds \(\) must be some of"),
    ({"kinds": ("count",)}, "must be some of .*framed"),
    ({"shift": "fog"}, "shift 'fog' must be one of"),
    ({"split": "test"}, "split 'test' must be one of"),
    ({"seed": -1}, "seed -1 must be >= 0"),
    ({"size": 0}, "size 0 >= 1"),
  ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
  with pytest.raises(ValueError, match=message):
    TaskSource(**{"split": "train", **settings})
