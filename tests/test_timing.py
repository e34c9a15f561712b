"""timing.py: seconds go to the innermost part, rates to devices, and each line starts anew."""

from types import SimpleNamespace

import jax
import pytest

from pixelis_jax import sharding, timing
from pixelis_jax.metrics import METRICS


@pytest.fixture
def now():
  return [100.0]


@pytest.fixture
def watch(now, tmp_path):
  mesh = sharding.make_mesh(1, 1, 2)
  return timing.Stopwatch(mesh, tmp_path, profile=False, clock=lambda: now[0])


def test_each_second_belongs_to_the_innermost_part(now, watch):
  def tool():
    now[0] += 3.0

  for i in watch.steps(range(4, 6)):
    now[0] += 0.5  # In no part.
    with watch.part("gen"):
      now[0] += 2.0
      watch.timed("tools", tool)()
      now[0] += 1.0
    watch.did(sampled=60)
    with watch.part("update_actor"):
      now[0] += 4.0
    watch.did(tokens=80, flops=1)
    line = watch.read()
    assert line == {
      "timing_s/step": 10.5,
      "timing_s/gen": 3.0,
      "timing_s/tools": 3.0,
      "timing_s/update_actor": 4.0,
      "perf/time_per_step": 10.5,
      "perf/total_num_tokens": 80,
      "perf/throughput": 80 / (10.5 * 2),  # Two devices.
      "perf/throughput_gen": 60 / (3.0 * 2),
    }, i
  assert set(line) <= set(METRICS)


def test_calls_at_the_same_time_count_until_the_last_has_ended(now, watch):
  """As threads make them: the first to begin ends 2 seconds before the other."""
  next(watch.steps(range(1)))
  with watch.part("gen"):
    now[0] += 1.0
    first, second = watch.part("tools"), watch.part("tools")
    for call in (first, second):
      call.__enter__()
    for call in (first, second):
      now[0] += 2.0
      call.__exit__(None, None, None)
    now[0] += 1.0
  line = watch.read()
  assert (line["timing_s/gen"], line["timing_s/tools"]) == (2.0, 4.0)


def test_a_line_is_the_mean_of_its_steps_and_what_follows_it_is_the_next_ones(now, watch):
  lines = []
  for i in watch.steps(range(4)):
    with watch.part("update_actor"):
      now[0] += i
    if i % 2:
      lines.append(watch.read())
      with watch.part("save_checkpoint"):
        now[0] += 5.0
  assert [line["timing_s/step"] for line in lines] == [0.5, (5.0 + 2 + 3) / 2]
  assert [line["timing_s/update_actor"] for line in lines] == [0.5, 2.5]
  assert [line.get("timing_s/save_checkpoint") for line in lines] == [None, 2.5]


def test_utilisation_is_of_the_peak_of_all_devices_while_they_update(now, tmp_path, monkeypatch):
  monkeypatch.setattr(timing, "peak", lambda kind: 1000.0)
  mesh = sharding.make_mesh(1, 1, 2)
  watch = timing.Stopwatch(mesh, tmp_path, profile=False, clock=lambda: now[0])
  for _ in watch.steps(range(1)):
    with watch.part("data"):
      now[0] += 7.0
    with watch.part("update_actor"):
      now[0] += 2.0
    watch.did(flops=1000)
  assert watch.read()["perf/mfu/actor"] == 1000 / (2.0 * 2 * 1000.0)


def test_memory_is_that_of_the_fullest_device(now, tmp_path, monkeypatch):
  told = iter([{"peak_bytes_in_use": 3 << 30}, {"peak_bytes_in_use": 5 << 30}])
  watch = timing.Stopwatch(sharding.make_mesh(1, 1, 1), tmp_path, profile=False)
  full = lambda: SimpleNamespace(memory_stats=lambda: next(told))
  watch._devices = [full(), full()]
  next(watch.steps(range(1)))
  assert watch.read()["perf/max_memory_allocated_gb"] == 5.0


def test_an_error_ends_its_part(now, watch):
  with pytest.raises(KeyError), watch.part("data"):
    now[0] += 1.0
    raise KeyError
  now[0] += 1.0
  for _ in watch.steps(range(1)):
    assert watch.read()["timing_s/data"] == 1.0


@pytest.mark.parametrize("steps", [9, 3])  # More than are traced, and stopped in the middle.
def test_a_profile_is_written_and_ended(tmp_path, steps):
  mesh = sharding.make_mesh(1, 1, 1)
  watch = timing.Stopwatch(mesh, tmp_path, profile=True)
  for _ in watch.steps(range(steps)):
    jax.block_until_ready(jax.numpy.ones(3) + 1)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  jax.profiler.start_trace(tmp_path / "another")  # Raises while one is going on.
  jax.profiler.stop_trace()
