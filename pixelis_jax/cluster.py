"""Several processes that are one program, each with devices and host work of its own.

What is asked of the others is asked by all processes at the same points, in the same order; a
process alone is asked nothing. `jax.distributed` finds the others and ends all of them when one is
lost.
"""

import logging
import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float32, Shaped

T = TypeVar("T")
HEARTBEAT = 20  # Seconds without a sign of life before a process counts as lost.
PIECE = 1 << 18  # Bytes of each process that are exchanged at once: one shape, and little memory.


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
  """Becomes one of several processes; before any other use of JAX.

  Without arguments TPU pods, Slurm and Kubernetes say who the others are.
  """
  # On CPUs two programs that run at once would take each other's messages; devices have queues.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
  mine, all_of_them = jax.process_index(), jax.process_count()
  devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
  logging.getLogger(__name__).info("process %d of %d, with %s", mine, all_of_them, devices)


def first() -> bool:
  """Whether this process writes what is written once: logs, metrics, the model's directory."""
  return jax.process_index() == 0


def agree(*sizes: int) -> tuple[int, ...]:
  """The largest of each over all processes: programs need the same shapes everywhere."""
  if jax.process_count() == 1:
    return sizes
  return tuple(_gathered(np.array(sizes, np.int32)).max(axis=0).tolist())


def summed(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
  """The sum over all processes."""
  return x if jax.process_count() == 1 else _gathered(x).sum(axis=0)


def averaged(values: dict[str, float]) -> dict[str, float]:
  """The mean of each over all processes, which have as much to say each."""
  if jax.process_count() == 1:
    return values
  total = summed(np.array(list(values.values()), np.float32))
  return dict(zip(values, (total / jax.process_count()).tolist(), strict=True))


def share(n: int, what: str) -> range:
  """Which of n things are this process's; ValueError where all cannot have as many."""
  count = jax.process_count()
  if n % count:
    raise ValueError(f"{what} {n} must be a multiple of the {count} processes")
  size = n // count
  return range(jax.process_index() * size, (jax.process_index() + 1) * size)


def split(n: int) -> range:
  """Which of n things are this process's: as evenly as can be, in the order of the processes."""
  mine, count = jax.process_index(), jax.process_count()
  return range(n * mine // count, n * (mine + 1) // count)


def everyone(mine: T) -> list[T]:
  """What each process has, by process. Host values, pickled: processes of a program trust it."""
  if jax.process_count() == 1:
    return [mine]
  data = np.frombuffer(pickle.dumps(mine), np.uint8)
  sizes = _gathered(np.array(len(data), np.int32)).tolist()
  padded = np.pad(data, (0, -max(sizes) % PIECE + max(sizes) - len(data)))
  pieces = [_gathered(piece) for piece in padded.reshape(-1, PIECE)]
  whole = np.concatenate(pieces, axis=1)
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(whole, sizes, strict=True)]


def told(make: Callable[[], T]) -> T:
  """What `make` gives where it is called, on the first process: told to all."""
  return everyone(make() if first() else None)[0]


def fetched(x: Array) -> Shaped[np.ndarray, "..."]:
  """A whole array on every host, wherever its parts lie."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _gathered(x: np.ndarray) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x))
