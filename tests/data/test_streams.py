import collections
import json
from types import SimpleNamespace

import numpy as np
import pytest

from pixelis_jax.data.streams import training_tasks, weighted
from pixelis_jax.data.tasks import TaskSource
from tests.memory.experiences import plain


def test_training_asks_scenes_for_ever():
  c = SimpleNamespace(file="", n=3, kinds=("beside",))
  tasks = training_tasks(c, seed=2, sees=True)
  source = TaskSource(split="train", seed=2, kinds=("beside",))
  assert all(plain(tasks[i]) == plain(source[i % 3]) for i in range(5))
  with pytest.raises(ValueError, match="data.file must name a file of questions, not be empty"):
    training_tasks(c, seed=2, sees=False)


def test_training_asks_a_file_in_another_order_each_epoch(tmp_path):
  path = tmp_path / "q.jsonl"
  asked = [{"request_id": i, "question": "?", "answer": i} for i in range(20)]
  path.write_text("\n".join(map(json.dumps, asked)))
  c = SimpleNamespace(file=str(path))
  answers = lambda seed: [
    int(training_tasks(c, seed=seed, sees=False)[i].answer) for i in range(40)
  ]
  first, second = answers(0)[:20], answers(0)[20:]
  assert sorted(first) == sorted(second) == list(range(20))
  # grain's shuffle(seed) has seed 1 begin with the order of seed 0's second epoch.
  assert len({tuple(first), tuple(second), tuple(answers(1)[:20]), tuple(range(20))}) == 4
  assert answers(0) == first + second


def test_heavier_records_come_more_often_each_epoch_in_another_order():
  weights = np.array([1.0, 1.5, 1.0, 1.5, 1.0, 1.0, 0.0])
  order = weighted(weights, seed=0)
  read = [int(order[i]) for i in range(28)]
  # 4 of weight 1 and 2 of 1.5: two epochs of the former, 8 of 14, stand beside three of the latter.
  # Were hard ones read once an epoch like the others, all would be there twice in 12.
  assert collections.Counter(read[:14]) == {0: 2, 2: 2, 4: 2, 5: 2, 1: 3, 3: 3}
  usual = [i for i in read if weights[i] == 1]
  epochs = [tuple(usual[i : i + 4]) for i in range(0, 16, 4)]
  assert all(sorted(epoch) == [0, 2, 4, 5] for epoch in epochs) and len(set(epochs)) > 1
  other = weighted(weights, seed=1)
  assert read[:14] != [int(other[i]) for i in range(14)]


def test_one_weight_is_a_plain_shuffle():
  order = weighted(np.full(5, 2.0), seed=3)
  assert sorted(int(order[i]) for i in range(5)) == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match="none of the 2 weights is above 0"):
    weighted(np.zeros(2), seed=0)
