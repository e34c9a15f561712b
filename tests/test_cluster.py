"""Two processes train what one trains: real programs on loopback, each with a device of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import demo, tiny_rft, tiny_sft
from pixelis_jax import cluster, evaluate, online, rft, sft
from pixelis_jax.chat.template import Chat
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.memory.store import Memory
from pixelis_jax.model.load import load_config
from pixelis_jax.runs import save_checkpoint
from pixelis_jax.types import Experience
from tests.conftest import CACHE

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "tiny-vl"
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


def logged(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
  """The lines so far; one that is being written counts when it is whole."""
  path = workdir / name
  whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
  return [json.loads(line) for line in whole]


def losses(workdir: Path) -> list[float]:
  return values(workdir, "actor/loss") or values(workdir, "train/loss")


def values(workdir: Path, name: str) -> list[float]:
  """A metric of the lines that have it."""
  return [line[name] for line in logged(workdir) if name in line]


def weights(workdir: Path) -> dict[str, np.ndarray]:
  return load_file(workdir / "model" / "model.safetensors")


def alone(program: ModuleType, config: ModuleType, workdir: Path, changes: dict) -> object:
  """What the program does of this debug config in one process: this one, on one of its devices."""
  c = config.get_config("debug").copy_and_resolve_references().unlock()
  c.update_from_flattened_dict({"mesh.data": 1, **changes})
  return program.main(c.lock(), workdir)


def flags(config: str, changes: dict) -> list[str]:
  return [f"--config=configs/{config}.py:debug", *(f"--config.{k}={v}" for k, v in changes.items())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(the directory of one process's run, that of two) of GRPO."""
  folder = tmp_path_factory.mktemp("rft")
  changes = {"eval.n": 3, "optimizer.steps": 2, "limits.turns": 2}
  # The embedded model is right too often: groups would not differ.
  changes |= {"grpo.temperature": 1.5, "grpo.questions": 4}
  changes |= {"model.rows_multiple": 16, "rows_multiple": 32}  # Few programs.
  # A forward model beside the policy learns from what both processes' calls showed.
  changes |= {"reward.weights.dynamics": 0.05, "reward.dynamics.warmup": 1}
  alone(rft, tiny_rft, folder / "one", changes)
  # Weights that play are whole in both: the processes then exchange nothing at each token.
  split = [*SPLIT, "--config.rollout_mesh.data=2"]
  ended(together("rft", folder / "two", 2, *flags("tiny_rft", changes), *split), folder / "two")
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
    agree(values(two, name), values(one, name))
  for name in ("prompt_length", "response_length", "num_turns", "tool_call_counts"):
    for part in ("mean", "max", "min"):  # Of all episodes, whoever played them.
      agree(values(two, f"{name}/{part}"), values(one, f"{name}/{part}"))
  mine, theirs = weights(one), weights(two)
  assert mine.keys() == theirs.keys()
  gaps = np.concatenate([np.abs(mine[name] - theirs[name]).ravel() for name in mine])
  assert gaps.max() < 8e-5 and np.median(gaps) < 1e-6


def test_only_the_first_process_writes(runs):
  """As many lines as one process writes, and one evaluation over all questions."""
  one, two = runs
  assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
  assert values(two, evaluate.ACCURACY) == values(one, evaluate.ACCURACY) != []


def test_sft_in_two_processes_is_stopped_by_telling_one(tmp_path):
  """With a checkpoint and no failure; until then they learned what one process learns."""
  # The rate is that of the peak, however many steps there are to be.
  changes = {"see_steps": 0, "optimizer.final_fraction": 1.0, "limits.turns": 1}
  many = {"optimizer.steps": 1000, "eval.every": 1000, "save_every": 1000}
  two = tmp_path / "two"
  started = together("sft", two, 2, *flags("tiny_sft", changes | many), *SPLIT)
  try:
    wait_for(lambda: len(losses(two)) >= 3, 240)
    started[0].send_signal(signal.SIGTERM)
  finally:
    ended(started, two)
  steps = len(losses(two))
  assert f"stopped by SIGTERM at step {steps}" in (tmp_path / "two-0.log").read_text()
  checkpoints = Checkpoints(two / FOLDER, keep=1)
  assert checkpoints.latest_step() == steps
  checkpoints.close()
  alone(sft, tiny_sft, tmp_path / "one", changes | {"optimizer.steps": steps})
  agree(losses(two), losses(tmp_path / "one"))


def test_online_in_two_processes_killed_and_resumed_is_online_in_one(tmp_path):
  """Five requests, two at a time: the last is one process's alone. One of the two is killed after
  the first answers; the same command goes on, and answers, votes and teaches as one process does.

  Logits differ by float32 sums in another order, which moves no sampled token here. Adam divides a
  gradient by its own size, so where one is nearly 0 its rounding moves a weight by up to the rate,
  either way: three updates at 1, 2 and 3 eighths of 1e-4, of which the published average has 0.2,
  then 0.8 of that and 0.2, come to 2.26e-5. Few gradients are nearly 0, so all gaps together are
  far below what was learned; an update from one process's rows would learn something else.
  """
  changes = {"pace": "lockstep", "stream.n": 5, "arrivals": 2, "limits.turns": 2}
  changes |= {"baseline": False, "memory.backend": "exact"}
  changes |= {"gate.confidence": 0.0, "gate.margin": 0.0, "learn.rows_multiple": 8}  # All teach.
  changes |= {"temperature": 1.5, "samples": 4}  # Groups differ, as in `runs`.
  changes |= {"vote.voters": ("samples", "memory")}  # Fewer programs than those of 13 views.
  one, two = tmp_path / "one", tmp_path / "two"
  result = alone(online, demo, one, changes)
  arguments = flags("demo", {**changes, "mesh.data": 2})
  kill_the_second(together("online", two, 2, *arguments), two, steps=1)
  ended(together("online", two, 2, *arguments), two)

  read = lambda d: {e.id: e for e in remembered(d)}
  mine, theirs = read(one), read(two)
  assert list(mine) == list(theirs) and len(mine) == 5  # Nothing is lost or doubled.
  for id, e in mine.items():
    tokens = lambda e: [[s.completion.tokens.tolist() for s in t.steps] for t in e.trajectories]
    assert tokens(theirs[id]) == tokens(e) and theirs[id].policy_version == e.policy_version
    assert theirs[id].vote.answer == e.vote.answer
    np.testing.assert_allclose(theirs[id].vote.confidence, e.vote.confidence, atol=1e-4)
    np.testing.assert_allclose(theirs[id].key, e.key, atol=1e-5)
  assert len({e.policy_version for e in mine.values()}) > 1  # Later ones by what was learned.
  saved, again, before = published(one), published(two), load_file(MODEL / "model.safetensors")
  apart = lambda a, b: np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
  gaps, learned = apart(saved, again), apart(saved, before)
  assert gaps.max() < 2 * 2.27e-5 and gaps.sum() < 0.01 * learned.sum()
  steps = lambda d, name: [line["step"] for line in logged(d, name)]
  for name in ("metrics.jsonl", "learn/metrics.jsonl", "trajectories.jsonl"):
    assert steps(two, name) == steps(one, name)
  found = json.loads((two / "result.json").read_text())
  seconds = ("answer_p50_s", "answer_p95_s", "update_p50_s")
  found |= {name: result[name] for name in seconds}
  assert found == pytest.approx(result, abs=1e-6)  # Confidences make up `ece_before`.
  assert result["updates_applied"] > 0


def remembered(workdir: Path) -> list[Experience]:
  """Oldest first."""
  patches = Chat.from_directory(MODEL, tools=()).patches
  dim = 2 * load_config(MODEL).text.width
  with Memory(workdir / "memory.sqlite", dim=dim, backend="exact") as memory:
    return [memory.get(id, patches) for id in memory.ids()]


def published(workdir: Path) -> dict[str, np.ndarray]:
  """The weights that answered last."""
  save_checkpoint(workdir, workdir)
  return weights(workdir)


def kill_the_second(started: list[subprocess.Popen], workdir: Path, *, steps: int) -> None:
  """After so many logged steps. The first ends within a minute, and says who is lost."""
  try:
    wait_for(lambda: len(logged(workdir)) >= steps, 240)
    started[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert started[0].wait(timeout=60) != 0
    assert time.monotonic() - began < 60
  finally:
    for process in started:
      process.kill()
  log = (workdir.parent / f"{workdir.name}-0.log").read_text()
  # The words depend on whether an exchange or the silence was noticed first.
  lost = r"Task 1 heartbeat timeout|stopped sending heartbeats\):\s+1\b"
  assert re.search(lost, log), log[-3000:]


def agree(found: list[float], wanted: list[float]) -> None:
  """float32 sums in another order; nearly 0 where GRPO's advantages cancel."""
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def wait_for(condition, seconds: float) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f"not after {seconds} s"
    time.sleep(0.2)


def test_alone_a_process_asks_nobody():
  assert cluster.agree(3, 5) == (3, 5) and cluster.first()
  assert cluster.averaged({"a": 1.5}) == {"a": 1.5}
  assert cluster.share(6, "questions") == cluster.split(6) == range(6)
  assert cluster.everyone({1}) == [{1}] and cluster.told(lambda: "x") == "x"


def test_a_share_must_be_equal(monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 4)
  monkeypatch.setattr("jax.process_index", lambda: 2)
  assert cluster.share(8, "batch") == range(4, 6)
  with pytest.raises(ValueError, match="batch 6 must be a multiple of the 4 processes"):
    cluster.share(6, "batch")


def test_what_is_split_is_all_there(monkeypatch):
  """Fewer things than processes: some have none."""
  monkeypatch.setattr("jax.process_count", lambda: 4)
  for n in (0, 1, 3, 6, 8):
    parts = []
    for i in range(4):
      monkeypatch.setattr("jax.process_index", lambda i=i: i)
      parts.append(cluster.split(n))
    assert [x for part in parts for x in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_values_of_any_size_are_exchanged_in_pieces_of_one(monkeypatch):
  """Two threads are the processes: one has a word, the other some pieces."""
  shapes, slots, meet = set(), [b"", b""], threading.Barrier(2)
  index = lambda: int(threading.current_thread().name)

  def gathered(x):
    shapes.add(x.shape)
    slots[index()] = x
    meet.wait(10)
    both = np.stack(slots)
    meet.wait(10)
    return both

  monkeypatch.setattr("jax.process_count", lambda: 2)
  monkeypatch.setattr(cluster, "_gathered", gathered)
  have, found = ["word", b"x" * (2 * cluster.PIECE + 1)], {}
  run = lambda i: found.update({i: cluster.everyone(have[i])})
  threads = [threading.Thread(target=run, args=(i,), name=str(i)) for i in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert found == {0: have, 1: have}
  assert shapes == {(), (cluster.PIECE,)}
