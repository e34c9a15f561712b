"""What a run's steps learn from: played when it is due, or ahead of that on devices of its own."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh


class Rollouts:
  """The rollouts of a run's steps in order, each played by a policy of a known age.

  Step i is played with the parameters after max(i - staleness, last save) updates, whatever takes
  how long: a run is a function of its seed and config. What follows a save is played with what was
  saved, so that a resumed run is the same run.

  Without staleness all is played in the caller's thread, when it is due. With it another thread
  plays ahead: on devices of its own, for where two threads begin programs of several devices, these
  could come in another order on each device, and wait for one another for ever.
  """

  def __init__(
    self,
    play: Callable[[int, int, Any], Any],
    steps: range,
    *,
    staleness: int,
    save_every: int,
    mesh: Mesh,
  ):
    """Args:
    play: (step, updates that its policy has seen, parameters) -> what `take` gives.
    steps: Of this run: the first is where it begins or goes on.
    mesh: Where it is played; small things that name no device are put on its first.
    """
    self._play, self._steps = play, steps
    self._staleness, self._save_every = staleness, save_every
    self._device = mesh.devices.flat[0]
    self._asked: deque[Future] = deque()
    self._thread = ThreadPoolExecutor(1) if staleness else None

  def __enter__(self) -> "Rollouts":
    return self

  def __exit__(self, *exc) -> None:
    """Waits for what is being played; what was only asked for is forgotten."""
    if self._thread is not None:
      self._thread.shutdown(cancel_futures=True)

  def updates(self, step: int) -> int:
    """How many updates the policy that plays a step has seen."""
    saved = max(self._steps.start, step // self._save_every * self._save_every)
    return max(step - self._staleness, saved)

  def publish(self, updates: int, params: Any) -> None:
    """Asks for all steps that are to be played with the parameters after so many updates."""
    for step in range(updates, min(updates + self._staleness + 1, self._steps.stop)):
      if self.updates(step) == updates:
        self._asked.append(self._start(self._play, step, updates, params))

  def take(self) -> Any:
    """The next step's; waits for it, and raises what playing it raised."""
    return self._asked.popleft().result()

  def call(self, function: Callable[..., Any], *args: Any) -> Any:
    """The function's result: called where rollouts are played, after those asked for until now."""
    return self._start(function, *args).result()

  def _start(self, function: Callable[..., Any], *args: Any) -> Future:
    if self._thread is not None:
      return self._thread.submit(self._there, function, *args)
    done: Future = Future()
    done.set_result(function(*args))
    return done

  def _there(self, function: Callable[..., Any], *args: Any) -> Any:
    with jax.default_device(self._device):
      return function(*args)
