"""memory/values.py: what a writer wrote a reader gives back, and what is shared is kept once."""

import json

import numpy as np

from pixelis_jax.memory.values import Reader, Writer, pixels_key
from tests.memory.experiences import experience, plain


def test_tasks_and_results_come_back():
  first = experience().trajectories[0]
  writer = Writer()
  header = {
    "task": writer.task(first.task),
    "results": [writer.result(step.result) for step in first.steps[:2]],
    "tasks": writer.tasks,
    "videos": writer.videos,
  }
  header = json.loads(json.dumps(header))
  reader = Reader(header, writer.blobs)
  assert plain(reader.tasks[header["task"]]) == plain(first.task)
  results = [step.result for step in first.steps[:2]]
  assert plain([reader.result(entry) for entry in header["results"]]) == plain(results)


def test_images_are_told_from_arrays_and_kept_once():
  task = experience().trajectories[0].task
  writer = Writer()
  assert writer.task(task) == writer.task(task) == 0
  # Two images, three different frames of four, and the times of the video.
  assert len(writer.blobs) == 6
  assert [*writer.images] == [
    pixels_key(pixels) for pixels in (*task.images, *task.videos[0].frames[[0, 1, 3]])
  ]
  for at, blob in enumerate(writer.blobs):
    assert blob.startswith(b"\x89PNG") == (at in writer.images.values())


def test_a_key_knows_the_size():
  flat = np.zeros((2, 6, 3), np.uint8)
  assert pixels_key(flat) != pixels_key(flat.reshape(3, 4, 3))
  assert pixels_key(flat) == pixels_key(np.zeros((4, 6, 3), np.uint8)[::2])
