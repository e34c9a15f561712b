"""Where a run's wall-clock time goes, and how much of its devices' arithmetic the updates use."""

import collections
import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pixelis_jax.model.cost import peak

TRACED = 2, 5  # Of a run's steps: the first ones compile.
PEAK = "peak_bytes_in_use"  # In what a device tells of its memory; CPUs tell nothing.


class Stopwatch:
  """Seconds of the parts of a run's steps, as means a step, from one line of the log to the next.

  A part within a part counts for itself alone, also where several threads are in it at once: until
  the last of them leaves it. Devices compute behind the host: what they take is
  found in the part that waits for them.
  """

  def __init__(
    self,
    mesh: Mesh,
    workdir: Path,
    *,
    profile: bool,
    playing: Mesh | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Args:
    mesh: Rates are for one of its devices that this process has; MFU where their peak is known,
      memory where they tell it.
    playing: The devices that rollouts have, if others: their rate is for one of these.
    profile: Whether three steps are traced, into `profile` in the workdir, which TensorBoard and
      Perfetto read.
    """
    devices = mesh.local_devices
    self._devices, self._peak = devices, peak(devices[0].device_kind)
    self._players = len((mesh if playing is None else playing).local_devices)
    self._trace, self._clock = workdir / "profile" if profile else None, clock
    self._inside: list[str] = []
    self._lock = threading.Lock()
    self._begin(clock())

  def steps(self, span: range) -> Iterator[int]:
    """The steps of a run, counted; those of `TRACED` are under the profiler where that is asked."""
    tracing = False
    try:
      for at, i in enumerate(span):
        if self._trace is not None and at in TRACED:
          if not tracing:
            jax.profiler.start_trace(self._trace)
          else:
            jax.profiler.stop_trace()
          tracing = not tracing
        self._steps += 1
        with jax.profiler.StepTraceAnnotation("step", step_num=i):
          yield i
    finally:
      if tracing:
        jax.profiler.stop_trace()

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """What happens inside is the part `name` of the step, a metric `timing_s/<name>`."""
    with self._lock:
      self._mark()
      self._inside.append(name)
    try:
      with jax.profiler.TraceAnnotation(name):
        yield
    finally:
      with self._lock:
        self._mark()
        self._inside.pop()

  def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as a part of the step wherever it is called."""

    def run(*args: Any, **kwargs: Any) -> Any:
      with self.part(name):
        return function(*args, **kwargs)

    return run

  @contextlib.contextmanager
  def beside(self) -> Iterator["Stopwatch"]:
    """A watch for what another thread does: its parts, once it is left, are parts of the step too.

    They went on beside this thread's: together they may be longer than the step.
    """
    other = copy.copy(self)
    other._inside, other._lock = [], threading.Lock()
    other._begin(self._clock())
    yield other
    with self._lock:
      for name, seconds in other._spent.items():
        self._spent[name] += seconds
      self._sampled += other._sampled

  def did(self, *, tokens: int = 0, flops: int = 0, sampled: int = 0) -> None:
    """Work of this step: tokens and operations of its update, tokens of its rollouts."""
    with self._lock:
      self._tokens, self._flops = self._tokens + tokens, self._flops + flops
      self._sampled += sampled

  def read(self, updated: Any = None) -> dict[str, float]:
    """Metrics of the time since the last call; the step it is called in counts as one of it.

    Starts again from here: what follows in this step is the next line's. Waits for the arrays
    `updated`, as a part of the update.
    """
    if updated is not None:
      with self.part("update_actor"):
        jax.block_until_ready(updated)
    with self._lock:
      return self._line()

  def _line(self) -> dict[str, float]:
    now = self._mark()
    spent, seconds = self._spent, now - self._since
    step, devices = seconds / self._steps, len(self._devices)
    line = {"timing_s/step": step, "perf/time_per_step": step}
    line |= {f"timing_s/{name}": spent[name] / self._steps for name in sorted(spent)}
    line["perf/total_num_tokens"] = self._tokens / self._steps
    line["perf/throughput"] = self._tokens / (seconds * devices)
    if rollout := spent.get("gen"):
      line["perf/throughput_gen"] = self._sampled / (rollout * self._players)
    if self._peak is not None and (update := spent.get("update_actor")):
      line["perf/mfu/actor"] = self._flops / (update * devices * self._peak)
    told = [device.memory_stats() or {} for device in self._devices]
    if peaks := [stats[PEAK] for stats in told if PEAK in stats]:
      line["perf/max_memory_allocated_gb"] = max(peaks) / 2**30
    self._begin(now)
    return line

  def _begin(self, now: float) -> None:
    self._since = self._marked = now
    self._spent: dict[str, float] = collections.defaultdict(float)
    self._steps = self._tokens = self._flops = self._sampled = 0

  def _mark(self) -> float:
    """Gives the time since the last mark to the part that is going on."""
    now = self._clock()
    if self._inside:
      self._spent[self._inside[-1]] += now - self._marked
    self._marked = now
    return now
