"""Two processes train what one trains: real programs on loopback, each with a device of its own.

Compiling is what costs. So one pair runs all programs one after the other, on prompts, rows and
turns of the same sizes; and what both processes run is compiled by the first.
"""

import dataclasses
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
from tests.data.datasets import built
from tests.programs import WITHOUT_TORCH, program

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "tiny-vl"
SPLIT = {"mesh.data": 1, "mesh.fsdp": 2}  # Weights lie in both processes.
SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"  # tests/conftest.py
KINDS = ("framed",)  # Of all questions: prompts are as long, and pictures as large, everywhere.
# JAX has the first process compile for all, by keys that must be equal in all. On CPUs these also
# name the devices as each process sees them; so the others would wait for what never comes.
SHARED = """
from jax._src import cache_key
assert cache_key._hash_accelerator_config
cache_key._hash_accelerator_config = lambda *_: None
"""
SHARING = {
  "JAX_COMPILATION_CACHE_DIR": str(CACHE),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1",
  "JAX_SHARE_BINARY_BETWEEN_HOSTS_TIMEOUT_MS": "200000",
}
ONE_BY_ONE = """
import json
from importlib import import_module
from pathlib import Path
from pixelis_jax import cluster, program
at, index, *runs = sys.argv[1:]
cluster.join(at, 2, int(index))
for run in runs:
  name, workdir, *flags = json.loads(run)
  import_module(f"pixelis_jax.{name}").main(program.read(flags), Path(workdir))
  print(name, "is done", flush=True)
"""
# Five requests, two at a time, and updates of two of those that teach: three at most.
ONLINE = {
  "pace": "lockstep",
  "arrivals": 2,
  "limits.turns": 2,
  "baseline": False,
  "memory.backend": "exact",
  "gate.confidence": 0.0,
  "gate.margin": 0.0,
  "gate.clearer": False,
  "learn.rows_multiple": 16,  # One program.
  "temperature": 1.5,  # The embedded model is right too often: groups would not differ.
  "samples": 3,  # No divisor of 16 rows: they share the programs of the probe's single ones.
  "vote.voters": ("samples", "memory"),  # Fewer programs than those of 13 views.
  "stream.n": 5,
  **{f"{name}.kinds": KINDS for name in ("stream", "shifted", "original", "probe.tasks")},
}
ONLINE_IN_TWO = {**ONLINE, "mesh.data": 2}
RFT = {
  "optimizer.steps": 2,
  "limits.turns": 2,
  "eval.n": 3,
  "grpo.temperature": 1.5,
  "grpo.questions": 4,
  "model.rows_multiple": 16,  # As online has.
  "rows_multiple": 16,
  # A forward model beside the policy learns from what both processes' calls showed.
  "reward.weights.dynamics": 0.05,
  "reward.dynamics.warmup": 1,
  "data.kinds": KINDS,
  "eval.kinds": KINDS,
}
# The rate is that of the peak, however many steps there are to be. After two of them what is read
# gets harder.
SFT = {
  "optimizer.final_fraction": 1.0,
  "see_steps": 0,
  "model.random_seed": -1,
  "limits.turns": 1,
  "data.parts": 0,
  "data.scenes": 0,
  "data.direct": 0.0,
  "model.rows_multiple": 16,  # Alone, its evaluation has the programs of the others'.
  "eval.kinds": KINDS,
  "eval.every": 2,
  "curriculum.enable": True,
  "curriculum.simple": (1.0, 0.0),
  "curriculum.medium": (0.0, 0.0),  # Scenes of one kind are too alike for thirds.
  "curriculum.hard": (0.0, 1.0),
  "curriculum.target": 0.0,
  "curriculum.window": 1,
  "curriculum.patience": 1,
  "curriculum.min_steps": 2,
  "curriculum.cooldown": 0,
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two processes and the folder with their logs."""

  folder: Path
  name: str
  processes: list[subprocess.Popen]

  def logs(self) -> list[str]:
    return [self._log(i).read_text() for i in range(2)]

  def _log(self, index: int) -> Path:
    return self.folder / f"{self.name}-{index}.log"

  def wait_for(self, condition, seconds: float = 240) -> None:
    """Until it holds; a process that fails meanwhile says what went wrong."""
    end = time.monotonic() + seconds
    while not condition():
      self.check([None, 0])
      assert time.monotonic() < end, f"not after {seconds} s"
      time.sleep(0.2)

  def done(self, program: str) -> None:
    self.wait_for(lambda: all(f"{program} is done" in log for log in self.logs()))

  def check(self, allowed: list[int | None]) -> None:
    """Exit codes; their output is what a failure shows."""
    good = all(process.poll() in allowed for process in self.processes)
    assert good, "\n".join(log[-3000:] for log in self.logs())

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def start(self, index: int, command: list[str], *arguments: str) -> None:
    """A process with one device."""
    env = {**os.environ, **SHARING, "JAX_NUM_CPU_DEVICES": "1"}
    # What keeps devices of one process from waiting for each other lets processes cross messages.
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace(SCHEDULER, "")
    how = {"cwd": ROOT, "env": env, "stderr": subprocess.STDOUT}
    with self._log(index).open("w") as log:
      process = subprocess.Popen([*command, *arguments], stdout=log, **how)
    self.processes.append(process)


def port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
  """`pixelis_jax.online` in two processes; the second is killed after the first answers."""
  pair = Pair(tmp_path_factory.mktemp("pair"), "lost", [])
  workdir, at = pair.folder / "online", port()
  for i in range(2):
    joined = [f"--coordinator=127.0.0.1:{at}", "--processes=2", f"--process={i}"]
    command = program("online", before=SHARED)
    pair.start(i, command, f"--workdir={workdir}", *joined, *flags("demo", ONLINE_IN_TWO))
  try:
    pair.wait_for(lambda: logged(workdir))
    pair.processes[1].send_signal(signal.SIGKILL)
    pair.processes[0].wait(timeout=60)
    yield pair
  finally:
    pair.kill()


@pytest.fixture(scope="module")
def pair(lost):
  """Two processes that go on with `online`, then run rft, then sft until they are stopped."""
  pair = Pair(lost.folder, "pair", [])
  split = {**SPLIT, "rollout_mesh.data": 2}
  demos = built(lost.folder, n=18, kinds={"framed": 1.0}, sorts={"golden": 1.0})
  many = {"data.file": str(demos.folder), "optimizer.steps": 1000, "save_every": 1000}
  runs = [
    ["online", str(pair.folder / "online"), *flags("demo", ONLINE_IN_TWO)],
    # Weights that play are whole in both: the processes then exchange nothing at each token.
    ["rft", str(pair.folder / "rft"), *flags("tiny_rft", {**RFT, **split})],
    ["sft", str(pair.folder / "sft"), *flags("tiny_sft", {**SFT, **SPLIT, **many})],
  ]
  at = f"127.0.0.1:{port()}"
  for i in range(2):
    command = [sys.executable, "-c", WITHOUT_TORCH + SHARED + ONE_BY_ONE]
    pair.start(i, command, at, str(i), *map(json.dumps, runs))
  try:
    yield pair
  finally:
    pair.kill()


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


def test_a_process_that_is_killed_ends_the_other_which_says_who_is_lost(lost):
  """Within a minute, or the wait in `lost` would have failed."""
  assert lost.processes[0].returncode != 0
  # The words depend on whether an exchange or the silence was noticed first.
  words = r"Task 1 heartbeat timeout|stopped sending heartbeats\):\s+1\b"
  assert re.search(words, lost.logs()[0]), lost.logs()[0][-3000:]


def test_online_in_two_processes_killed_and_resumed_is_online_in_one(pair, tmp_path):
  """Five requests, two at a time: the last is one process's alone. One of the two is killed after
  the first answers; the same command goes on, and answers, votes and teaches as one process does.

  Logits differ by float32 sums in another order, which moves no sampled token here. Adam divides a
  gradient by its own size, so where one is nearly 0 its rounding moves a weight by up to the rate,
  either way: three updates at 1, 2 and 3 eighths of 1e-4, of which the published average has 0.2,
  then 0.8 of that and 0.2, come to 2.26e-5. Few gradients are nearly 0, so all gaps together are
  far below what was learned; an update from one process's rows would learn something else.
  """
  one, two = tmp_path / "one", pair.folder / "online"
  result = alone(online, demo, one, ONLINE)
  pair.done("online")

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


def test_two_processes_train_what_one_trains(pair, tmp_path):
  """Weights split over both; each plays and packs its share of each step.

  Losses agree to float32 sums in another order. Adam divides a gradient by its own size, so that
  where one is nearly 0 its rounding moves a weight by up to the rate: 2 steps of at most 2e-5,
  in either direction. As many lines are written as by one process, and one evaluation is over all
  questions.
  """
  one, two = tmp_path / "one", pair.folder / "rft"
  alone(rft, tiny_rft, one, RFT)
  pair.done("rft")
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
  assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
  assert values(two, evaluate.ACCURACY) == values(one, evaluate.ACCURACY) != []


def test_sft_in_two_processes_is_stopped_by_telling_one(pair, tmp_path):
  """With a checkpoint and no failure; until then they read and learned what one process does, which
  is a stage of the curriculum and something of the next.
  """
  two, demos = pair.folder / "sft", str(pair.folder / "few")
  pair.wait_for(lambda: len(losses(two)) >= 3)
  pair.processes[0].send_signal(signal.SIGTERM)
  pair.done("sft")
  for process in pair.processes:
    process.wait(timeout=60)
  pair.check([0])
  steps = len(losses(two))
  assert f"stopped by SIGTERM at step {steps}" in pair.logs()[0]
  checkpoints = Checkpoints(two / FOLDER, keep=1)
  assert checkpoints.latest_step() == steps
  checkpoints.close()
  one = tmp_path / "one"
  alone(sft, tiny_sft, one, SFT | {"data.file": demos, "optimizer.steps": steps})
  agree(losses(two), losses(one))
  assert values(two, "stage") == values(one, "stage")
  assert values(two, "stage")[:3] == [0.0, 0.0, 1.0]


def remembered(workdir: Path) -> list[Experience]:
  """Oldest first."""
  patches = Chat.from_directory(MODEL, tools=()).patches
  dim = 2 * load_config(MODEL).text.width
  with Memory(workdir / "memory.sqlite", dim=dim, backend="exact") as memory:
    return memory.recall(memory.ids(), patches)


def published(workdir: Path) -> dict[str, np.ndarray]:
  """The weights that answered last."""
  save_checkpoint(workdir, workdir)
  return weights(workdir)


def agree(found: list[float], wanted: list[float]) -> None:
  """float32 sums in another order; nearly 0 where GRPO's advantages cancel."""
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


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
