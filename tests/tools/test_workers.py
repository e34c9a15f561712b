"""Real crashes, loops and allocations: each is told to the policy, and the next call works."""

import contextlib
import copy
import ctypes
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pixelis_jax.tools import TOOLS, Tool, Toolbox, places, workers
from pixelis_jax.tools.sight import Mistake
from pixelis_jax.tools.workers import Cache, Settings, Stopped, TooLong, Workers
from pixelis_jax.types import Task, ToolCall, ToolResult

ROOT = Path(__file__).parents[2]
# Enough for a call on a busy machine, and for the memory of a new worker's first imports.
PATIENT = Settings(seconds=30.0, gigabytes=0.5, processes=2)
HASTY = Settings(seconds=1.0, gigabytes=0.5, processes=2)
LOADED = "sorted({'jax', 'jaxlib', 'flax', 'transformers'} & set(__import__('sys').modules))"


@pytest.fixture(scope="module")
def patient():
  with contextlib.closing(Workers(PATIENT)) as pool:
    yield pool


@pytest.fixture(scope="module")
def hasty():
  with contextlib.closing(Workers(HASTY)) as pool:
    yield pool


@pytest.fixture
def forgetful():
  """One worker, which is asked every time."""
  settings = Settings(seconds=30.0, gigabytes=0.5, processes=1, cached=0.0)
  with contextlib.closing(Workers(settings)) as pool:
    yield pool


def at_once(*calls: Callable[[], object]) -> list[object]:
  """Results, or what was raised, of calls that begin together in threads of their own."""
  start = threading.Barrier(len(calls))

  def run(call: Callable[[], object]) -> object:
    start.wait()
    try:
      return call()
    except (Mistake, ValueError) as e:
      return e

  with ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(run, calls))


def script(code: str, **options: object) -> subprocess.Popen:
  """A process of its own that may be killed; `code` has a pool."""
  begin = (
    "import os, threading, time\n"
    "from pixelis_jax.tools.workers import Settings, shared\n"
    "pool = shared(Settings(seconds=60.0))\n"
  )
  command = [sys.executable, "-c", begin + code]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def test_a_worker_is_another_process_without_jax_and_serves_again(forgetful):
  first = forgetful.compute(os.getpid)
  # A function of ours, whose module is imported: with the package, as all tools are.
  assert forgetful.compute(places.clipped, [1, 2, 30, 4], 10, 20) == (1.0, 2.0, 20.0, 4.0)
  assert forgetful.compute(eval, LOADED) == [] and "jax" in sys.modules
  assert forgetful.compute(os.getpid) == first != os.getpid()


def test_nothing_starts_before_the_first_call(monkeypatch):
  monkeypatch.setattr(subprocess, "Popen", None)
  Workers(PATIENT).close()


@pytest.mark.parametrize(
  "function, arguments",
  [
    (time.sleep, (3600.0,)),
    (pow, (3, 10**9)),  # One loop in C that holds the interpreter: no signal's handler would run.
  ],
)
def test_a_runaway_is_killed_and_the_next_call_works(hasty, function, arguments):
  with pytest.raises(TooLong, match="^took longer than 1 s$"):
    hasty.compute(function, *arguments)
  assert hasty.compute(operator.neg, 1) == -1


def test_crashes_and_too_much_memory_are_told_and_the_next_call_works(forgetful):
  """10 GB and 8 GB are asked for; OpenCV and onnxruntime have other names for a MemoryError."""
  opencv = "import cv2, numpy; cv2.resize(numpy.zeros((9, 9), 'u1'), (90_000, 90_000))"
  onnxruntime = "raise RuntimeError('while running Gelu node: std::bad_alloc')"
  for told, function, argument in (
    ("crashed", ctypes.string_at, 0),  # A segmentation fault.
    ("needed more than 0.5 GB", np.ones, 10**10 // 8),
    ("crashed", sys.exit, 0),
    ("needed more than 0.5 GB", exec, opencv),
    ("needed more than 0.5 GB", exec, onnxruntime),
  ):
    with pytest.raises(Stopped, match=f"^{told}$"):
      forgetful.compute(function, argument)
  assert forgetful.compute(operator.neg, 1) == -1


def test_a_call_may_use_its_memory_whatever_earlier_ones_kept(forgetful):
  """300 MB stay in the worker; 300 MB more than 0.5 GB: the call is tried in a new one."""
  forgetful.compute(exec, "import builtins; builtins.kept = bytearray(300_000_000)")
  assert forgetful.compute(exec, "assert len(bytearray(300_000_000))") is None


def test_a_worker_that_was_killed_while_idle_is_no_crash(forgetful):
  os.kill(forgetful.compute(os.getpid), signal.SIGKILL)
  assert forgetful.compute(operator.neg, 1) == -1


def test_our_own_bugs_raise_with_the_workers_traceback(patient):
  with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in _serve_one.*ZeroDivisionError: div"):
    patient.compute(operator.truediv, 1, 0)
  with pytest.raises(RuntimeError, match="cannot pickle '_thread.lock' object"):
    patient.compute(threading.Lock)
  assert patient.compute(operator.neg, 1) == -1


def test_a_mistake_in_a_worker_is_a_mistake_and_remembered(patient):
  seen = []
  for _ in range(2):
    with pytest.raises(Mistake, match=r"bbox_2d \[5, 5, 1, 1\] must satisfy") as caught:
      patient.compute(places.clipped, [5, 5, 1, 1], 10, 10)
    assert caught.type is Mistake
    seen.append((patient.cache.hits, patient.cache.misses))
  assert seen[1] == (seen[0][0] + 1, seen[0][1])


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.mark.parametrize(
  "array",
  [
    IMAGE,
    IMAGE[::2, 5:-5],  # With gaps.
    IMAGE[::-1],
    np.asfortranarray(IMAGE),
    IMAGE > 128,
    IMAGE[:0],
    np.float32(IMAGE) / 7,
    np.array(3.5),
    np.zeros(2, [("x", "i4"), ("y", "f8")]),
  ],
)
def test_arrays_travel_whole_and_results_are_read_only(patient, array):
  sent = (array, "text", [None, {"key": array}])
  got, text, (nothing, table) = patient.compute(copy.copy, sent)
  assert (text, nothing) == ("text", None)
  for back in (got, table["key"]):
    np.testing.assert_array_equal(back, array, strict=True)
    with pytest.raises(ValueError, match="read-only"):
      back[...] = 0
    with pytest.raises(ValueError):
      back.flags.writeable = True


def test_a_result_with_gaps_is_read_only_too(patient):
  rows = patient.compute(operator.getitem, IMAGE, slice(None, None, 2))
  np.testing.assert_array_equal(rows, IMAGE[::2])
  assert not rows.flags.writeable


def test_a_large_image_travels(patient):
  image = np.random.default_rng(1).integers(0, 256, (2160, 3840, 3), np.uint8)
  np.testing.assert_array_equal(patient.compute(np.flipud, image), image[::-1])


def test_a_function_may_write_on_its_arguments(patient):
  """As it may here on copies of its own: some libraries refuse arrays that are read-only."""
  image = IMAGE.copy()
  assert patient.compute(np.copyto, image, 0) is None
  np.testing.assert_array_equal(image, IMAGE)


def meet(path: Path) -> tuple[tuple, tuple]:
  """A reader and a writer of a pipe: each waits until the other is there."""
  os.mkfifo(path)
  return (Path.read_bytes, path), (Path.write_bytes, path, b"met")


def test_threads_have_workers_of_their_own(patient, tmp_path):
  reader, writer = meet(tmp_path / "pipe")
  told = at_once(lambda: patient.compute(*reader), lambda: patient.compute(*writer))
  assert told == [b"met", 3]


def test_there_are_no_more_workers_than_asked_for(tmp_path):
  reader, writer = meet(tmp_path / "pipe")
  with contextlib.closing(Workers(Settings(seconds=0.5, processes=1))) as pool:
    told = at_once(lambda: pool.compute(*reader), lambda: pool.compute(*writer))
  assert [type(t) for t in told] == [TooLong, TooLong]


def test_who_asks_the_same_at_once_computes_once(patient):
  before = patient.cache.hits, patient.cache.misses
  assert at_once(*[lambda: patient.compute(time.sleep, 0.3)] * 4) == [None] * 4
  assert (patient.cache.hits, patient.cache.misses) == (before[0] + 3, before[1] + 1)


def test_limits_are_told_to_all_who_wait_and_not_remembered(hasty):
  before = hasty.cache.misses
  told = at_once(*[lambda: hasty.compute(time.sleep, 7200.0)] * 3)
  assert [type(t) for t in told] == [TooLong] * 3 and hasty.cache.misses == before + 1
  with pytest.raises(TooLong):
    hasty.compute(time.sleep, 7200.0)
  assert hasty.cache.misses == before + 2


def test_equal_contents_are_one_result_and_others_are_not(patient):
  """Shapes, dtypes, kinds and nesting differ where the bytes or the numbers are the same."""
  even = np.arange(6, dtype=np.int32)
  same = [even, np.arange(12, dtype=np.int32)[::2] // 2, even.copy()[::-1][::-1]]
  others = [even.reshape(2, 3), even.view(np.float32), even.tolist(), tuple(even.tolist())]
  others += [[even], [[even]], [even, even], 1, 1.0, True, "1", b"1"]
  before = patient.cache.misses
  for value in same:
    patient.compute(copy.copy, value)
  assert patient.cache.misses == before + 1
  for value in others:
    patient.compute(copy.copy, value)
  assert patient.cache.misses == before + 1 + len(others)
  patient.compute(operator.pos, even)  # Another function.
  assert patient.cache.misses == before + 2 + len(others)


def test_a_remembered_result_is_not_changed_by_who_gets_it(patient):
  patient.compute(copy.copy, [1, 2]).append(3)
  assert patient.compute(copy.copy, [1, 2]) == [1, 2]


def test_the_least_recently_used_is_forgotten_first():
  """Room for two results of 100 kB and a little, not for three."""
  with contextlib.closing(Workers(Settings(processes=1, cached=250e-6))) as pool:

    def hit(size: int) -> bool:
      before = pool.cache.hits
      pool.compute(np.zeros, size, "u1")
      return pool.cache.hits > before

    first, second, third = 100_000, 100_001, 100_002
    assert [hit(first), hit(second), hit(first), hit(third)] == [False, False, True, False]
    assert [hit(first), hit(third), hit(second)] == [True, True, False]
    assert 200_000 < pool.cache.size <= pool.cache.limit == 250_000
    kept = pool.cache.size
    assert [hit(300_000), hit(300_000), hit(second)] == [False, False, True]  # Too large to keep.
    assert pool.cache.size == kept


def test_an_interrupted_computation_is_left_to_who_waits_for_it():
  cache, answer, told = Cache(10**6), workers._Message.of((None, 7)), []
  wait = lambda: told.append(cache.get("key", lambda: answer))
  waits = threading.Thread(target=wait, daemon=True)

  def interrupted():
    waits.start()
    time.sleep(0.2)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.get("key", interrupted)
  waits.join(10)
  assert told == [answer] and cache.get("key", interrupted) is answer


def test_workers_end_with_a_process_that_is_killed():
  """Each holds the script's stderr: it ends when they have, the one that computes too."""
  killed = script(
    "threading.Thread(target=pool.compute, args=(pow, 3, 10**9), daemon=True).start()\n"
    "pool.compute(abs, 1)\n"  # Another worker: the first is busy.
    "time.sleep(0.5)\n"
    "os.kill(os.getpid(), 9)\n"
  )
  killed.communicate(timeout=20)
  assert killed.returncode == -signal.SIGKILL


def test_ctrl_c_is_the_programs_alone():
  stopped = script(
    # Where the suite runs in a shell's background, Ctrl-C is ignored, and by what it starts too.
    "import signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "try:\n"
    "  print(pool.compute(abs, -1), flush=True)\n"
    "  pool.compute(time.sleep, 50.0)\n"
    "except KeyboardInterrupt: print('stopped')\n"
    "print(pool.compute(abs, -2))\n",
    process_group=0,
  )
  assert stopped.stdout.readline() == "1\n"
  time.sleep(0.2)
  os.killpg(stopped.pid, signal.SIGINT)  # As a terminal does.
  assert stopped.communicate(timeout=20) == ("stopped\n2\n", "")


def test_closed_workers_are_gone():
  pool = Workers(PATIENT)
  number = pool.compute(os.getpid)
  running = threading.Thread(target=lambda: at_once(lambda: pool.compute(time.sleep, 3600.0)))
  running.start()
  time.sleep(0.2)
  pool.close()
  running.join(10)
  assert not running.is_alive()
  with pytest.raises(ProcessLookupError):
    os.kill(number, 0)
  with pytest.raises(ValueError, match="these workers are closed"):
    pool.compute(operator.neg, 1)


def test_a_worker_that_cannot_start_is_our_mistake(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/bin/false")
  with pytest.raises(RuntimeError, match="ended with 1 instead of starting"):
    Workers(PATIENT).compute(operator.neg, 1)


def test_a_process_has_one_pool():
  assert workers.shared(PATIENT) is workers.shared(copy.copy(PATIENT))
  assert workers.shared(PATIENT) is not workers.shared(HASTY)


@pytest.mark.parametrize("name", ["seconds", "gigabytes", "processes", "cached"])
def test_settings_are_checked(name):
  """A limit of 0 would stop everything, one that is no number nothing."""
  kind = int if name == "processes" else float
  with pytest.raises(ValueError, match=f"{name} -1"):
    Settings(**{name: kind(-1)})
  for wrong in (float("inf"), float("nan")):
    if kind is float:
      with pytest.raises(ValueError, match=f"{name} {wrong}"):
        Settings(**{name: wrong})


def test_a_toolbox_tells_the_policy_which_tool_was_stopped(hasty, monkeypatch):
  sleep = lambda arguments, sight: ToolResult(text=str(sight.compute(time.sleep, arguments["s"])))
  parameters = {"type": "object", "properties": {"s": {"type": "number"}}, "required": ["s"]}
  schema = {"type": "function", "function": {"name": "zoom_in", "parameters": parameters}}
  monkeypatch.setitem(TOOLS["qwen"], "zoom_in", Tool(schema=schema, function=sleep))
  task = Task(id="a", images=(IMAGE,), question="?", answer=None)
  toolbox = Toolbox(["zoom_in"], shown_size=lambda h, w: (h, w), compute=hasty.compute)
  run = lambda s: toolbox.run(ToolCall(name="zoom_in", arguments={"s": s}), task, [])
  stopped = run(3600.0)
  assert stopped.error == "zoom_in took longer than 1 s"
  assert stopped.text == f"Error: {stopped.error}"
  assert run(0.0).text == "None"
