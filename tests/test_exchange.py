"""What another process played comes back whole, in the order of the processes."""

import jax
import pytest

from pixelis_jax import cluster, exchange
from pixelis_jax.memory import codec
from tests.memory.experiences import experience, plain, process, trajectory


@pytest.fixture
def second(monkeypatch):
  """This process is the second of two; the first has what the test puts into the list."""
  theirs: list = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(cluster, "everyone", lambda mine: [*theirs, mine])
  return theirs


def test_trajectories_of_all_processes_are_in_their_order(second):
  one, two = experience().trajectories[0], trajectory(experience().trajectories[0].task, "b", 5)
  second.append(codec.encode_trajectories([one]))
  found = exchange.trajectories([two], process)
  assert [plain(t) for t in found] == [plain(one), plain(two)]
  assert found[1] is two  # What is here already is not made again.


def test_a_process_may_have_played_nothing(second):
  second.append(codec.encode_trajectories(experience().trajectories))
  found = exchange.trajectories([], process)
  assert [plain(t) for t in found] == [plain(t) for t in experience().trajectories]


def test_experiences_are_the_first_processs(second):
  """Others have no memory to make them from, and are not asked."""
  second.append([codec.encode(experience())])
  found = exchange.experiences(lambda: pytest.fail("asked"), process)
  assert [plain(e) for e in found] == [plain(experience())]


def test_alone_nothing_is_copied():
  played = experience().trajectories
  assert all(a is b for a, b in zip(exchange.trajectories(played, process), played, strict=True))
  one = experience()
  assert exchange.experiences(lambda: [one], process) == [one]
