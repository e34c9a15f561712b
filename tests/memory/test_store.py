"""memory/store.py: durable, idempotent, in step with its index, and clear about wrong files."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import numpy as np
import pytest

from pixelis_jax.memory.store import Memory
from tests.memory.experiences import experience, plain, process, unit

DIM = 8
BACKENDS = ["exact", "auto"]


@pytest.fixture(params=BACKENDS)
def backend(request):
  return request.param


def opened(path, *, capacity=100, backend="exact", dim=DIM):
  return Memory(path / "memory.db", dim=dim, backend=backend, capacity=capacity)


def test_add_search_get(tmp_path, backend):
  with opened(tmp_path, backend=backend) as memory:
    assert memory.search(unit(DIM, 0), 3) == []
    for i in range(5):
      assert memory.add(experience(f"r{i}", seed=i, answer=str(i), confidence=i / 10))
    assert len(memory) == 5 and "r3" in memory and "r9" not in memory
    nearest, second = memory.search(unit(DIM, 3), 2)
    assert (nearest.id, nearest.answer, nearest.policy_version) == ("r3", "3", 4)
    assert (nearest.confidence, nearest.kind) == (0.3, "read")
    assert nearest.similarity == pytest.approx(1.0, abs=1e-6)
    expected = max((float(unit(DIM, i) @ unit(DIM, 3)), f"r{i}") for i in (0, 1, 2, 4))
    assert second.id == expected[1]
    assert second.similarity == pytest.approx(expected[0], abs=1e-6)
    # Its own entry must not vote for a request that is asked again.
    assert memory.search(unit(DIM, 3), 1, exclude={"r3"})[0].id == second.id
    third, first = memory.recall(["r3", "r9", "r1"], process)  # There is no r9.
    assert plain(third) == plain(experience("r3", seed=3, answer="3", confidence=0.3))
    assert plain(first) == plain(experience("r1", seed=1, answer="1", confidence=0.1))


def test_reopening_restores_records_vectors_and_state(tmp_path, backend):
  added = [experience(f"r{i}", seed=i) for i in range(20)]
  with opened(tmp_path, backend=backend) as memory:
    assert memory.get_state("stream") is None
    memory.add_all(added, state={"stream": {"position": 20}})
    before = [(n.id, n.similarity) for n in memory.search(unit(DIM, 77), 20)]
  with opened(tmp_path, backend=backend) as memory:
    assert [(n.id, n.similarity) for n in memory.search(unit(DIM, 77), 20)] == before
    assert memory.ids() == [e.id for e in added]
    assert memory.in_order([added[1].id, "never", added[0].id]) == [added[0].id, added[1].id]
    assert memory.get_state("stream") == {"position": 20}
    assert [plain(e) for e in memory.recall(["r7"], process)] == [plain(added[7])]
    memory.set_state("stream", {"position": 21})
  with opened(tmp_path, backend=backend) as memory:
    assert memory.get_state("stream") == {"position": 21}


def test_the_same_id_twice_is_stored_once(tmp_path, backend):
  with opened(tmp_path, backend=backend) as memory:
    assert memory.add(experience("r1", seed=1, answer="1"))
    assert not memory.add(experience("r1", seed=2, answer="2"))
    two = [experience("r1", seed=3), experience("r2", seed=4), experience("r2", seed=5)]
    assert memory.add_all(two) == 1
    assert memory.ids() == ["r1", "r2"]
    assert [n.id for n in memory.search(unit(DIM, 1), 9)] in (["r1", "r2"],)
    assert memory.search(unit(DIM, 1), 1)[0].answer == "1"  # The first record stands.


def test_what_is_stored_anew_replaces_what_was_and_comes_last(tmp_path, backend):
  with opened(tmp_path, capacity=4, backend=backend) as memory:
    memory.add_all([experience(f"r{i}", seed=i, answer="1") for i in range(3)])
    found = [experience("r3", seed=3), experience("r1", seed=9, answer="2")]
    assert memory.add_all(found, anew=["r1", "never"]) == 2
    with pytest.raises(ValueError, match="norm"):  # Nothing is lost where nothing is stored.
      bad = dataclasses.replace(experience("r0"), key=np.zeros(DIM, np.float32))
      memory.add_all([bad], anew=["r0"])
    kept = ["r0", "r2", "r3", "r1"]
    assert memory.ids() == memory.in_order(kept) == kept
    assert memory.search(unit(DIM, 9), 1)[0].answer == "2"
    assert sorted(n.id for n in memory.search(unit(DIM, 1), 10)) == sorted(kept)  # Once.
    memory.add(experience("r4", seed=4))
    memory.add(experience("r5", seed=5))
    assert memory.ids() == ["r3", "r1", "r4", "r5"]  # It is evicted as what came when it did.
  with opened(tmp_path, capacity=4, backend=backend) as memory:
    assert memory.ids() == ["r3", "r1", "r4", "r5"]
    assert [plain(e) for e in memory.recall(["r1"], process)] == [plain(found[1])]


def test_eviction_takes_the_oldest_of_lowest_priority(tmp_path, backend):
  with opened(tmp_path, capacity=3, backend=backend) as memory:
    for i, priority in enumerate([1.0, 0.5, 2.0]):
      memory.add(experience(f"r{i}", seed=i), priority=priority)
    memory.add(experience("r3", seed=3))
    assert memory.ids() == ["r0", "r2", "r3"]  # r1 was least important
    memory.add(experience("r4", seed=4))
    assert memory.ids() == ["r2", "r3", "r4"]  # r0 as important as r3, and older
    memory.set_priorities({"r3": 5.0})
    memory.add_all([experience("r5", seed=5), experience("r6", seed=6)])
    assert memory.ids() == ["r2", "r3", "r6"]
    assert memory.add(experience("r7", seed=7), priority=0.1)  # Itself the least important.
    kept = ["r2", "r3", "r6"]
    assert memory.ids() == kept
    # The index is in step: everything that was evicted is gone from it.
    assert sorted(n.id for n in memory.search(unit(DIM, 0), 10)) == kept
    assert memory.recall(["r0"], process) == []
  with opened(tmp_path, capacity=3, backend=backend) as memory:
    assert memory.ids() == kept
    assert sorted(n.id for n in memory.search(unit(DIM, 0), 10)) == kept


def test_an_evicted_ids_neighbour_is_never_mistaken_for_a_new_one(tmp_path, backend):
  # The newest entry is the evicted one: a row number reused after reopening would give its
  # successor the same index id.
  with opened(tmp_path, capacity=2, backend=backend) as memory:
    memory.add_all([experience(f"r{i}", seed=i) for i in range(2)])
    memory.add(experience("r2", seed=2), priority=0.1)
    assert memory.ids() == ["r0", "r1"]
    (before,) = memory._db.execute("SELECT seq FROM sqlite_sequence").fetchone()
  with opened(tmp_path, capacity=2, backend=backend) as memory:
    memory.add(experience("r3", seed=3), priority=2.0)
    assert memory._seq_of["r3"] == before + 1 == 4
    assert memory.search(unit(DIM, 3), 1)[0].id == "r3"


def test_a_smaller_capacity_on_reopening_applies_from_the_next_add(tmp_path):
  with opened(tmp_path) as memory:
    memory.add_all([experience(f"r{i}", seed=i) for i in range(6)])
  with opened(tmp_path, capacity=2) as memory:
    memory.add(experience("r6", seed=6))
    assert memory.ids() == ["r5", "r6"]
    assert len(memory.search(unit(DIM, 0), 10)) == 2


def test_sample_is_weighted_without_repeats_and_repeatable(tmp_path):
  with opened(tmp_path) as memory:
    assert memory.sample(3, np.random.default_rng(0), process=process) == []
    weights = {"r0": 1.0, "r1": 3.0, "r2": 4.0}
    for i, (id, weight) in enumerate(weights.items()):
      memory.add(experience(id, seed=i, confidence=i / 2), priority=weight)
    rng = np.random.default_rng(0)
    drawn = Counter(memory.sample(1, rng, process=process)[0].id for _ in range(400))
    # Expected 50, 150, 200; four binomial standard deviations at p = 3/8 are 39. Uniform gives 133.
    assert abs(drawn["r0"] - 50) < 39 and abs(drawn["r1"] - 150) < 39
    all_three = memory.sample(9, np.random.default_rng(1), process=process)
    assert sorted(e.id for e in all_three) == ["r0", "r1", "r2"]
    again = memory.sample(9, np.random.default_rng(1), process=process)
    assert [e.id for e in again] == [e.id for e in all_three]
    sure = memory.sample(9, rng, process=process, min_confidence=0.5, exclude={"r2"})
    assert [e.id for e in sure] == ["r1"]
    assert plain(sure[0]) == plain(experience("r1", seed=1, confidence=0.5))


def test_a_refused_experience_leaves_nothing_behind(tmp_path, backend):
  with opened(tmp_path, backend=backend) as memory:
    good = experience("good", seed=1)
    with pytest.raises(ValueError, match="'wide' has 9 dimensions, this memory has 8"):
      memory.add_all([good, experience("wide", dim=9)], state={"stream": 1})
    with pytest.raises(ValueError, match="priority 0.0 of experience 'good' must be positive"):
      memory.add(good, priority=0.0)
    with pytest.raises(ValueError, match="1 priorities for 2 experiences"):
      memory.add_all([good, experience("more")], priorities=[1.0])
    with pytest.raises(TypeError, match="not JSON serializable"):
      memory.add(good, state={"stream": object()})  # Fails inside the transaction.
    assert len(memory) == 0 and memory.get_state("stream") is None
    with pytest.raises(KeyError):
      memory.set_priorities({"unknown": 1.0})
    assert memory.add(good)  # The rolled back insert did not keep its id.


def test_unit_norm_is_required(tmp_path):
  with opened(tmp_path) as memory:
    stretched = experience("r1")
    stretched.key[:] *= np.float32(2)
    with pytest.raises(ValueError, match="key of experience 'r1' has norm 2"):
      memory.add(stretched)


def test_wrong_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="directory .*nowhere does not exist"):
    opened(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="capacity 0 must be at least 1"):
    opened(tmp_path, capacity=0)
  with opened(tmp_path) as memory:
    memory.add(experience("r1"))
    with pytest.raises(ValueError, match=r"memory\.db is open elsewhere"):
      opened(tmp_path)
  with pytest.raises(ValueError, match="holds keys of 8 dimensions, 16 were asked for"):
    opened(tmp_path, dim=16)
  with opened(tmp_path) as memory:  # The refusals released the file and changed nothing.
    assert memory.ids() == ["r1"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
  (tmp_path / "memory.db").write_bytes(b"this is not a database at all" * 100)
  with pytest.raises(ValueError, match=r"memory\.db is damaged or not a memory database"):
    opened(tmp_path)
  (tmp_path / "memory.db").unlink()
  with sqlite3.connect(tmp_path / "memory.db") as other:
    other.execute("CREATE TABLE experiences (id TEXT)")
  other.close()
  with pytest.raises(ValueError, match="SQLite file of another application"):
    opened(tmp_path)
  (tmp_path / "memory.db").unlink()
  with opened(tmp_path) as memory:
    memory.add_all([experience(f"r{i}", seed=i) for i in range(30)])
  whole = (tmp_path / "memory.db").read_bytes()
  (tmp_path / "memory.db").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="is damaged"):
    opened(tmp_path)
  (tmp_path / "memory.db").write_bytes(whole)
  newer = sqlite3.connect(tmp_path / "memory.db")
  newer.execute("PRAGMA user_version = 2")
  newer.close()
  with pytest.raises(ValueError, match="has schema 2, this code reads 1"):
    opened(tmp_path)


def test_threads_may_add_and_search(tmp_path, backend):
  failures = []
  with opened(tmp_path, backend=backend, capacity=40) as memory:

    def work(offset):
      try:
        for i in range(offset, offset + 20):
          memory.add(experience(f"r{i}", seed=i))
          memory.search(unit(DIM, i), 4)
          memory.sample(2, np.random.default_rng(i), process=process)
      except (ValueError, KeyError, sqlite3.Error) as e:
        failures.append(e)

    threads = [threading.Thread(target=work, args=(20 * t,)) for t in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not failures
    assert len(memory) == 40
    assert sorted(n.id for n in memory.search(unit(DIM, 0), 100)) == sorted(memory.ids())


# Adds pairs with the stream position, printing each after it returned, until it is killed.
ADDS = textwrap.dedent("""
  import sys
  from pathlib import Path
  from pixelis_jax.memory.store import Memory
  from tests.memory.experiences import experience
  memory = Memory(Path(sys.argv[1]) / "memory.db", dim=8, backend="exact", capacity=1000)
  for i in range(0, 100_000, 2):
    pair = [experience(f"r{i}", seed=i), experience(f"r{i + 1}", seed=i + 1)]
    memory.add_all(pair, state={"position": i + 2})
    print(i + 2, flush=True)
""")


def test_kill_9_keeps_exactly_what_was_committed(tmp_path):
  process_ = subprocess.Popen(
    [sys.executable, "-c", ADDS, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
  )
  with process_.stdout as lines:
    seen = [int(lines.readline()) for _ in range(12)][-1]
    process_.send_signal(signal.SIGKILL)
    rest = [int(line) for line in lines.read().split("\n") if line]
  assert process_.wait() == -signal.SIGKILL
  reported = rest[-1] if rest else seen
  with opened(tmp_path, capacity=1000) as memory:
    position = memory.get_state("position")
    # Everything reported is there; at most one more pair was committed but not yet reported.
    assert position in (reported, reported + 2)
    assert memory.ids() == [f"r{i}" for i in range(position)]
    assert memory.search(unit(DIM, position - 1), 1)[0].id == f"r{position - 1}"
    # A replay from an older position adds nothing twice.
    replay = [experience(f"r{i}", seed=i) for i in range(position - 2, position + 2)]
    assert memory.add_all(replay, state={"position": position + 2}) == 2
    assert len(memory) == position + 2
