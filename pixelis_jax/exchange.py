"""What the processes of one program played: each its share, and all of them the whole of it."""

from collections.abc import Callable, Sequence

import jax

from pixelis_jax import cluster
from pixelis_jax.memory import codec
from pixelis_jax.types import Experience, Trajectory


def trajectories(mine: Sequence[Trajectory], process: codec.Process) -> list[Trajectory]:
  """All that the processes played, by process; those of others as `codec.restore` makes them."""
  if jax.process_count() == 1:
    return list(mine)
  parts = cluster.everyone(codec.encode_trajectories(mine))
  found = [codec.restore_trajectories(part, process) for part in _others(parts)]
  found.insert(jax.process_index(), list(mine))
  return [trajectory for part in found for trajectory in part]


def experiences(
  make: Callable[[], Sequence[Experience]], process: codec.Process
) -> list[Experience]:
  """What `make` gives where it is called, on the first process: on all of them."""
  if jax.process_count() == 1:
    return list(make())
  records = cluster.told(lambda: [codec.encode(experience) for experience in make()])
  return [codec.restore(record, process) for record in records]


def _others(parts: Sequence[bytes]) -> list[bytes]:
  return [part for i, part in enumerate(parts) if i != jax.process_index()]
