"""What the two paths of test-time RL share: weights that are served, experiences to learn from.

Answering reads the one and fills the other, and waits for neither; learning (ttrl.py) the reverse.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

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
    """`serve`: what has been learned -> such as answers are given with, where they are given."""
    self._latest = (version, params)  # One reference: reading and replacing it are atomic.
    self._serve = serve

  def latest(self) -> tuple[int, Params]:
    return self._latest

  def publish(self, version: int, params: Params) -> None:
    self._latest = (version, self._serve(params))


class Inbox:
  """What learning has yet to read, oldest first. Answering puts and never waits; learning takes."""

  def __init__(self):
    self._waiting: deque[Experience] = deque()
    self._changed = threading.Condition()
    self._closed = False

  def __len__(self) -> int:
    return len(self._waiting)

  def put(self, experience: Experience) -> None:
    with self._changed:
      self._waiting.append(experience)
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
