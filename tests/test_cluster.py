"""Two processes train what one trains: real programs on loopback, each with a device of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pixelis_jax import cluster
from tests.conftest import CACHE

ROOT = Path(__file__).parents[1]
SPLIT = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]  # Weights lie in both processes.
SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"  # tests/conftest.py


def start(program: str, workdir: Path, *arguments: str, process: str = "") -> subprocess.Popen:
  """A program in a process with one device; `process` says which of how many, and where."""
  command = [sys.executable, "-m", f"pixelis_jax.{program}", f"--workdir={workdir}", *arguments]
  if process:
    index, count, port = process.split()
    at = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
    command += at
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
  # What keeps devices of one process from waiting for each other lets processes cross messages.
  env["XLA_FLAGS"] = env["XLA_FLAGS"].replace(SCHEDULER, "")
  with (workdir.parent / f"{workdir.name}-{process.split(' ')[0]}.log").open("w") as log:
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)


def port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def together(program: str, workdir: Path, count: int, *arguments: str) -> list[subprocess.Popen]:
  at = port()
  return [start(program, workdir, *arguments, process=f"{i} {count} {at}") for i in range(count)]


def ended(started: list[subprocess.Popen], workdir: Path) -> None:
  """Waits for all; their output is what a failure shows."""
  try:
    codes = [process.wait(timeout=280) for process in started]
  finally:
    for process in started:
      process.kill()
  logs = [log.read_text()[-3000:] for log in sorted(workdir.parent.glob(f"{workdir.name}-*.log"))]
  assert codes == [0] * len(codes), "\n".join(logs)


def losses(workdir: Path) -> list[float]:
  """Of the steps so far."""
  return logged(workdir, "loss")


def logged(workdir: Path, name: str) -> list[float]:
  """A metric by step; a line that is being written counts when it is whole."""
  path = workdir / "metrics.jsonl"
  whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
  return [line[name] for line in map(json.loads, whole) if name in line]


def weights(workdir: Path) -> dict[str, np.ndarray]:
  return load_file(workdir / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(the directory of one process's run, that of two) of GRPO, debug size."""
  folder = tmp_path_factory.mktemp("rft")
  arguments = ["--config=configs/tiny_rft.py:debug", "--config.eval.n=3"]
  arguments += ["--config.optimizer.steps=2", "--config.limits.turns=2"]
  # The embedded model is right too often: groups would not differ.
  arguments += ["--config.grpo.temperature=1.5", "--config.grpo.questions=4"]
  arguments += ["--config.model.rows_multiple=16", "--config.rows_multiple=32"]  # Few programs.
  # A forward model beside the policy learns from what both processes' calls showed.
  arguments += ["--config.reward.weights.dynamics=0.05", "--config.reward.dynamics.warmup=1"]
  ended([start("rft", folder / "one", *arguments)], folder / "one")
  ended(together("rft", folder / "two", 2, *arguments, *SPLIT), folder / "two")
  return folder / "one", folder / "two"


def test_two_processes_train_what_one_trains(runs):
  """Weights split over both; each plays and packs its share of each step.

  Losses agree to float32 sums in another order. Adam divides a gradient by its own size, so that
  where one is nearly 0 its rounding moves a weight by up to the rate: 2 steps of at most 2e-5,
  in either direction.
  """
  one, two = runs
  assert len(losses(one)) == 2
  agree(losses(two), losses(one))
  for name in ("dynamics", "dynamics_error", "dynamics_scale"):
    agree(logged(two, name), logged(one, name))
  mine, theirs = weights(one), weights(two)
  assert mine.keys() == theirs.keys()
  gaps = np.concatenate([np.abs(mine[name] - theirs[name]).ravel() for name in mine])
  assert gaps.max() < 8e-5 and np.median(gaps) < 1e-6


def test_only_the_first_process_writes(runs):
  """As many lines as one process writes, and one evaluation over all questions."""
  one, two = runs
  read = lambda d: [json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in read(two)] == [line["step"] for line in read(one)]
  scores = lambda d: [line["accuracy"] for line in read(d) if "accuracy" in line]
  assert scores(two) == scores(one)


def test_when_one_is_killed_the_other_stops_and_both_resume(tmp_path):
  """Within a minute and with its name; the same command then goes on from the checkpoint, and what
  the two learn of SFT, before and after, is what one process learns.
  """
  arguments = ["--config=configs/tiny_sft.py:debug", "--config.optimizer.steps=400"]
  arguments += ["--config.eval.every=400", "--config.save_every=1", "--config.see_steps=0"]
  workdir = tmp_path / "run"
  started = together("sft", workdir, 2, *arguments, *SPLIT)
  try:
    wait_for(lambda: len(losses(workdir)) > 2, 240)
    started[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert started[0].wait(timeout=60) != 0
    assert time.monotonic() - began < 60
  finally:
    for process in started:
      process.kill()
  log = (tmp_path / "run-0.log").read_text()
  # Who is lost; the words depend on whether an exchange or the silence was noticed first.
  assert re.search(r"Task 1 heartbeat timeout|stopped sending heartbeats\):\s+1\b", log), log[
    -3000:
  ]
  before = len(losses(workdir))
  until_told(workdir, before + 2, together("sft", workdir, 2, *arguments, *SPLIT))
  assert "stopped by SIGTERM at step" in (tmp_path / "run-0.log").read_text()
  steps = [json.loads(x)["step"] for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert steps == sorted(set(steps))
  alone = tmp_path / "alone"
  until_told(alone, before + 2, [start("sft", alone, *arguments)])
  agree(losses(workdir)[: before + 2], losses(alone)[: before + 2])


def agree(found: list[float], wanted: list[float]) -> None:
  """float32 sums in another order; nearly 0 where GRPO's advantages cancel."""
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def until_told(workdir: Path, steps: int, started: list[subprocess.Popen]) -> None:
  """SIGTERM after so many steps, told to one and done by all: saved, and no failure."""
  try:
    wait_for(lambda: len(losses(workdir)) >= steps, 240)
    started[0].send_signal(signal.SIGTERM)
  finally:
    ended(started, workdir)


def wait_for(condition, seconds: float) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f"not after {seconds} s"
    time.sleep(0.2)


def test_alone_a_process_asks_nobody():
  assert cluster.agree(3, 5) == (3, 5) and cluster.first()
  assert cluster.averaged({"a": 1.5}) == {"a": 1.5}
  assert cluster.share(6, "questions") == range(6)


def test_a_share_must_be_equal(monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 4)
  monkeypatch.setattr("jax.process_index", lambda: 2)
  assert cluster.share(8, "batch") == range(4, 6)
  with pytest.raises(ValueError, match="batch 6 must be a multiple of the 4 processes"):
    cluster.share(6, "batch")
