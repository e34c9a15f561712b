import itertools

import numpy as np
import pytest

from pixelis_jax.data import pictures
from pixelis_jax.data.kinds import KINDS, PuzzleSource
from pixelis_jax.data.kinds.puzzle import materials
from pixelis_jax.tools import TOOLS

STILL = ("read", "count", "larger", "color", "shape")  # Films take longer.


def same(a, b):
  return a.question == b.question and all(
    np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True)
  )


def test_items_are_functions_of_settings_and_index_alone():
  one, two = (PuzzleSource(split="dev", seed=3, kinds=STILL, size=n) for n in (9, 1000))
  assert len(one) == 9 and same(one[4], two[4]) and same(one[-1], two[8])
  with pytest.raises(IndexError):
    one[9]
  assert one.puzzle(2).task.id == one[2].id
  # Other kinds beside it do not change a puzzle.
  index, kind = next((i, one[i].kind) for i in range(9))
  assert same(PuzzleSource(split="dev", seed=3, kinds=(kind,))[index], one[index])


def test_ids_tell_all_puzzles_apart():
  sources = [
    PuzzleSource(split=split, seed=seed, kinds=kinds, size=3)
    for split in ("dev", "test")
    for seed in (0, 1)
    for kinds in (("color",), ("shape",))
  ]
  tasks = [source[i] for source in sources for i in range(3)]
  assert len({task.id for task in tasks}) == len(tasks) == 24
  assert not any(same(a, b) for a, b in itertools.combinations(tasks, 2))


def test_kinds_are_equally_often():
  source = PuzzleSource(split="dev", kinds=("color", "shape"), size=100)
  count = sum(source[i].kind == "color" for i in range(30))
  # Binomial(30, 1/2): 15, deviation 2.7.
  assert 4 < count < 26


def test_no_source_picture_is_in_puzzles_of_two_splits():
  sources = []
  for split in pictures.SPLITS:
    puzzles = PuzzleSource(split=split, kinds=("larger", "color"))
    sources.append({s for i in range(6) for s in puzzles.puzzle(i).sources})
  assert all(sources) and all(a.isdisjoint(b) for i, a in enumerate(sources) for b in sources[:i])


def test_every_puzzle_can_be_mistaken_and_names_tools_that_there_are():
  for i, (name, kind) in enumerate(KINDS.items()):
    puzzle = kind.compose(np.random.default_rng(i), materials("dev"), name)
    assert puzzle.task.id == name and puzzle.task.kind == name
    assert puzzle.mistakes and puzzle.slips and puzzle.looks not in puzzle.mistakes
    assert puzzle.objects or puzzle.lines or puzzle.tracks
    assert kind.tools and set(kind.tools) <= set(TOOLS["qwen"])


def test_settings_that_are_none():
  with pytest.raises(ValueError, match=r"kinds \('redd',\) must be some of \('read', 'count'"):
    PuzzleSource(split="dev", kinds=("redd",))
  with pytest.raises(ValueError, match="seed -1 must be >= 0 and size 1000000 >= 1"):
    PuzzleSource(split="dev", seed=-1)
  with pytest.raises(ValueError, match="split 'held_out' must be one of"):
    PuzzleSource(split="held_out")
