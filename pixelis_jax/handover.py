"""What the two paths of test-time RL share: weights that are served, experiences to learn from.

Answering reads the one and fills the other, and waits for neither; learning (ttrl.py) the reverse.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from pixelis_jax.model import lora
from pixelis_jax.types import Experience

Params: TypeAlias = dict  # As in model/policy.py.


class Published:
  """The parameters answers are given with. Swapped whole; a reader keeps what it took."""

  def __init__(
    self,
    version: int,
    params: Params,
    serve: Callable[[Params], Params] = lambda params: params,
  ):
    """Args:
    version: of the parameters.
    params: all of them, as answers are given with them.
    serve: what has been learned, all or some of them, -> the same as these are.
    """
    self._latest = (version, params)  # One reference: reading and replacing it are atomic.
    self._serve = serve

  def latest(self) -> tuple[int, Params]:
    return self._latest

  def publish(self, version: int, learned: Params) -> None:
    """Parameters that are not among the learned ones stay: the same arrays, not copies."""
    self._latest = (version, lora.replaced(self._latest[1], self._serve(learned)))


class Inbox:
  """What learning has yet to read, oldest first. Answering puts and never waits; learning takes."""

  def __init__(self):
    self._waiting: deque[Experience] = deque()
    self._changed = threading.Condition()
    self._closed = False

  def __len__(self) -> int:
    return len(self._waiting)

  def put(self, *experiences: Experience) -> None:
    with self._changed:
      self._waiting.extend(experiences)
      self._changed.notify_all()

  def close(self) -> None:
    """No more will come: `take` hands out what is left, then None."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()

  def take(self, n: int) -> list[Experience] | None:
    """The next n, fewer only after `close`; None when nothing is left."""
    with self._changed:
      self._changed.wait_for(lambda: len(self._waiting) >= n or self._closed)
      taken = [self._waiting.popleft() for _ in range(min(n, len(self._waiting)))]
      return taken or None
