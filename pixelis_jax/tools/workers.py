"""Costly functions in processes of their own: limits on time and memory, results remembered.

A worker is a new interpreter, never a fork of one whose JAX has threads, and it imports only what
the functions it is sent need. It may crash, loop or swell: it is killed, the policy is told, and
the next call gets another. For POSIX systems; memory is limited on Linux only.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import io
import logging
import math
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any

import numpy as np

from pixelis_jax.tools.sight import Mistake
from pixelis_jax.types import content_key

_START = 60.0  # Seconds in which a new interpreter must be ready; it takes about half of one.
_ENTRY = 1000  # Bytes of a remembered result beside its content, about.
_SERVE = "import sys; from pixelis_jax.tools import workers; workers.serve(*map(int, sys.argv[1:]))"
# There are as many workers as CPUs, so each computes with one thread.
_ONE_THREAD = {
  name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
}
# What onnxruntime and OpenCV say in place of a MemoryError.
_OUT_OF_MEMORY = ("std::bad_alloc", "Insufficient memory")


class Stopped(Mistake):
  """The call's worker ran out of memory or crashed. The tool's name goes before the message."""


class TooLong(Stopped):
  """The call reached the limit on its time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
  """Limits of a call: wall seconds in a worker; gigabytes (1e9 bytes) above what a new one holds.

  At most `processes` workers, 0 for one a CPU; results of at most `cached` gigabytes are kept.
  """

  seconds: float = 30.0
  gigabytes: float = 2.0
  processes: int = 0
  cached: float = 0.25

  def __post_init__(self):
    for name in ("seconds", "gigabytes"):
      if not 0 < (value := getattr(self, name)) < math.inf:
        raise ValueError(f"{name} {value} of a call must be above 0 and finite")
    for name in ("processes", "cached"):
      if not 0 <= (value := getattr(self, name)) < math.inf:
        raise ValueError(f"{name} {value} of the workers must be 0 or more and finite")


class Workers:
  """A pool of worker processes and the results they gave. Any thread may call.

  Nothing starts before the first call. Workers end with `close`, and with this process however it
  ends.
  """

  def __init__(self, settings: Settings):
    self.settings = settings
    self.cache = Cache(int(settings.cached * 1e9))
    self._slots = threading.BoundedSemaphore(settings.processes or os.cpu_count() or 1)
    self._lock = threading.Lock()
    self._idle: list[_Worker] = []
    self._busy: set[_Worker] = set()
    self._closed = False

  def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, computed in a worker or remembered; its arrays are read-only.

    Args:
      function: pure, of the top level of a module that does without JAX.
      arguments: arrays and plain values, to be pickled.

    Raises:
      Stopped: the call took too long, needed too much memory or crashed. Not remembered.
      Mistake: the function raised it, and does so for whoever asks the same.
      RuntimeError: the function raised something else, a bug of ours; with its traceback.
    """
    key = content_key(*_parts((function, arguments)))
    error, content = self.cache.get(key, lambda: self._run(function, arguments)).value()
    if error is not None:
      raise error(content)
    return content

  def close(self) -> None:
    """Ends every worker, those of running calls too."""
    with self._lock:
      self._closed = True
      idle, self._idle = self._idle, []
      for worker in self._busy:  # The threads that wait for them notice, and end them.
        worker.kill()
    for worker in idle:
      worker.end()

  def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> "_Message":
    asked = _Message.of((function, arguments))
    with self._slots:
      worker = self._take()
      used = worker.calls > 0
      answer = self._ask(worker, asked)
      if used and answer.error is Stopped:  # Earlier calls may be why, or whoever kills idle ones.
        answer = self._ask(self._take(new=True), asked)
    if answer.error in (Stopped, TooLong):
      name = f"{function.__module__}.{function.__qualname__}"
      logging.getLogger(__name__).warning("%s %s", name, answer.value()[1])
    return answer

  def _take(self, *, new: bool = False) -> "_Worker":
    with self._lock:
      if self._closed:
        raise ValueError("these workers are closed")
      if self._idle and not new:
        worker = self._idle.pop()
        self._busy.add(worker)
        return worker
    worker = _Worker(self.settings)
    with self._lock:
      self._busy.add(worker)
    return worker

  def _ask(self, worker: "_Worker", asked: "_Message") -> "_Message":
    try:
      return worker.call(asked)
    finally:
      self._give_back(worker)

  def _give_back(self, worker: "_Worker") -> None:
    with self._lock:
      self._busy.remove(worker)
      keep = worker.well and not self._closed
      if keep:
        self._idle.append(worker)  # The last used is the next: its models are loaded.
    if not keep:
      worker.end()


@functools.cache
def shared(settings: Settings) -> Workers:
  """This process's pool with these settings, one for all policies."""
  workers = Workers(settings)
  atexit.register(workers.close)
  return workers


class Cache:
  """Messages by key up to `limit` bytes, the least recently used leave first. Any thread may call.

  `hits` and `misses` are counted; who waits for another's computation has a hit.
  """

  def __init__(self, limit: int):
    self.limit, self.size, self.hits, self.misses = limit, 0, 0, 0
    self._lock = threading.Lock()
    self._kept: OrderedDict[str, _Message] = OrderedDict()
    self._awaited: dict[str, Future[_Message]] = {}

  def get(self, key: str, make: Callable[[], "_Message"]) -> "_Message":
    """The message of this key; `make` is called once, however many ask at the same time."""
    with self._lock:
      if (kept := self._kept.get(key)) is not None:
        self._kept.move_to_end(key)
        self.hits += 1
        return kept
      theirs = self._awaited.get(key)
      if theirs is None:
        mine = self._awaited[key] = Future()
        self.misses += 1
      else:
        self.hits += 1
    if theirs is None:
      return self._make(key, make, mine)
    try:
      return theirs.result()
    except CancelledError:  # Whoever computed it was interrupted.
      return self.get(key, make)

  def _make(
    self, key: str, make: Callable[[], "_Message"], future: "Future[_Message]"
  ) -> "_Message":
    try:
      made = make()
      if made.error in (None, Mistake):
        self._keep(key, made)
      future.set_result(made)
      return made
    finally:
      with self._lock:
        del self._awaited[key]
      future.cancel()  # Of no effect on one that has its result.

  def _keep(self, key: str, made: "_Message") -> None:
    if _ENTRY + made.size > self.limit:
      return
    with self._lock:
      self._kept[key] = made
      self.size += _ENTRY + made.size
      while self.size > self.limit:
        _, oldest = self._kept.popitem(last=False)
        self.size -= _ENTRY + oldest.size


class _Worker:
  """One process. `well` until a call ends otherwise than with a result or a Mistake."""

  def __init__(self, settings: Settings):
    self.calls, self.well, self._settings = 0, False, settings
    self._connection, theirs = socket.socketpair()
    with theirs:
      limit = int(settings.gigabytes * 1e9)
      # Its search path is ours. Its standard input, never written to, tells it when this process
      # is gone. In a group of its own no Ctrl-C reaches it, and what it starts is killed with it.
      self._process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(limit)],
        env=os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        process_group=0,
      )
    with contextlib.suppress(TimeoutError):
      self.well = _receive(self._connection, time.monotonic() + _START) is not None
    if not self.well:
      self.end()
      raise RuntimeError(f"a worker ended with {self._process.returncode} instead of starting")

  def call(self, asked: "_Message") -> "_Message":
    """What `serve` answers, or in its place that the call was stopped."""
    deadline = time.monotonic() + self._settings.seconds
    self.calls += 1
    self.well = False
    try:
      with contextlib.suppress(ConnectionError):  # It may have said why before it ended.
        _send(self._connection, asked, deadline)
      answer = _receive(self._connection, deadline)
    except TimeoutError:
      return _Message.of((TooLong, f"took longer than {self._settings.seconds:g} s"))
    if answer is None:
      return _Message.of((Stopped, "crashed"))
    self.well = answer.error in (None, Mistake)
    return answer

  def kill(self) -> None:
    with contextlib.suppress(PermissionError):  # What macOS says of one that has ended.
      os.killpg(self._process.pid, signal.SIGKILL)

  def end(self) -> None:
    """Kills it and releases what it took here."""
    if self._process.returncode is None:  # Nobody has waited for it: the number is still its own.
      self.kill()
    self._process.wait()
    self._process.stdin.close()
    self._connection.close()


def serve(descriptor: int, limit: int) -> None:
  """A worker's life: calls come through the socket and are answered, until it is closed.

  Args:
    limit: bytes it may hold beyond those it holds now.
  """
  # Once our parent is gone the pipe is readable, and SIGIO ends us, in whatever we are. Linux's
  # PR_SET_PDEATHSIG would end us with the thread that started us.
  fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
  fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
  connection = socket.socket(fileno=descriptor)
  sys.excepthook = functools.partial(_last_words, connection, limit)
  _limit_memory(limit)
  _send(connection, _Message.of(None))
  while _serve_one(connection):
    pass


def _serve_one(connection: socket.socket) -> bool:
  asked = _receive(connection, writable=True)
  if asked is None:
    return False
  function, arguments = asked.value()
  try:
    answer = None, function(*arguments)
  except Mistake as e:
    answer = Mistake, str(e)
  _send(connection, _Message.of(answer))
  return True


def _last_words(
  connection: socket.socket,
  limit: int,
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> None:
  """Answers for a call whose exception ends the worker."""
  _limit_memory(None)
  if issubclass(kind, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
    answer = Stopped, f"needed more than {limit / 1e9:g} GB"
  else:
    told = "".join(traceback.format_exception(kind, error, trace))
    answer = RuntimeError, f"in a worker process:\n{told}"
  _send(connection, _Message.of(answer))


def _limit_memory(more: int | None) -> None:
  """Private writable memory, what malloc and mmap give, in bytes above what there is; or no limit.

  An address space would count files, and what is only reserved for a thread.
  """
  if sys.platform != "linux":
    return
  _, hard = resource.getrlimit(resource.RLIMIT_DATA)
  soft = hard
  if more is not None:
    with open("/proc/self/statm") as f:
      pages = int(f.read().split()[5])
    soft = pages * resource.getpagesize() + more
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
  resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Pickler(pickle.Pickler):
  """Copies arrays with gaps, so that all go beside the pickle rather than into it."""

  def reducer_override(self, value: object) -> Any:
    if type(value) is np.ndarray and not (value.flags.c_contiguous or value.flags.f_contiguous):
      return np.ascontiguousarray(value).__reduce_ex__(5)
    return NotImplemented


@dataclasses.dataclass(frozen=True, slots=True)
class _Message:
  """A pickled value and the bytes of its arrays: what is sent, and what is remembered.

  An answer's value is (error class or None, text or result).
  """

  parts: Sequence[Any]

  @classmethod
  def of(cls, value: object) -> "_Message":
    stream, buffers = io.BytesIO(), []
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return cls([stream.getbuffer(), *(buffer.raw() for buffer in buffers)])

  def value(self) -> Any:
    """A new value each time, whose arrays share the bytes here: read-only where these are."""
    return pickle.loads(self.parts[0], buffers=self.parts[1:])

  @property
  def error(self) -> type[Exception] | None:
    return self.value()[0]

  @property
  def size(self) -> int:
    return sum(len(part) for part in self.parts)


def _parts(value: object) -> Iterator[bytes | str]:
  """Equal for equal contents, of arrays whatever their memory looks like."""
  if isinstance(value, np.ndarray) and not value.dtype.hasobject:
    yield f"{value.dtype!r} {value.shape}"
    yield value.tobytes()
  elif isinstance(value, tuple | list):
    yield f"{type(value).__qualname__} {len(value)}"
    for item in value:
      yield from _parts(item)
  else:
    yield pickle.dumps(value, protocol=5)


def _send(connection: socket.socket, message: _Message, deadline: float | None = None) -> None:
  sizes = [len(part) for part in message.parts]
  for part in (struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes), *message.parts):
    _wait_until(connection, deadline)
    connection.sendall(part)


def _receive(
  connection: socket.socket, deadline: float | None = None, *, writable: bool = False
) -> _Message | None:
  """None where the other side has ended; TimeoutError at the deadline, in `time.monotonic`."""
  count = struct.Struct("<Q")
  try:
    (parts,) = count.unpack(_read(connection, count.size, deadline))
    sizes = struct.unpack(f"<{parts}Q", _read(connection, parts * count.size, deadline))
    received = [_read(connection, size, deadline) for size in sizes]
  except (EOFError, ConnectionError):
    return None
  for part in received:
    part.flags.writeable = writable
  return _Message(received)


def _read(connection: socket.socket, size: int, deadline: float | None) -> np.ndarray:
  read = np.empty(size, np.uint8)
  rest = memoryview(read)
  while rest:
    _wait_until(connection, deadline)
    got = connection.recv_into(rest)
    if not got:
      raise EOFError
    rest = rest[got:]
  return read


def _wait_until(connection: socket.socket, deadline: float | None) -> None:
  """How long the next use of it may block."""
  wait = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
  connection.settimeout(wait)
