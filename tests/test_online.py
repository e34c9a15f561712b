"""The whole loop on real scenes: what it leaves, how it continues after a kill, what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import demo
from pixelis_jax import answering, online, sampler
from pixelis_jax.algo.calibration import Calibration
from pixelis_jax.checkpoint import Checkpoints
from pixelis_jax.history import History
from pixelis_jax.memory.store import Memory
from tests import fakes
from tests.conftest import CACHE
from tests.programs import program

ROOT = Path(__file__).parents[1]
KEYS = (
  "shift seed n shifted_before shifted_after original_before original_after majority_after"
  " tool_calls_per_question updates_applied updates_refused answer_p50_s answer_p95_s update_p50_s"
  " label_accuracy ece_before ece_after"
).split()


@pytest.fixture(scope="module")
def config(model_config):
  # One kind of question: prompts that are as long share their programs.
  c = demo.get_config("debug/framed").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed = model_config.path, 0
  c.limits.turns, c.baseline, c.memory.backend = 2, False, "exact"
  c.calibration.method = "platt"
  return c.lock()


@pytest.fixture(scope="module")
def policy(config):
  """As `finished` has it, so that its programs are there."""
  answering, _ = online.meshes(config)
  return sampler.load_policy(config.model, mesh=answering)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("online") / "run"
  return workdir, online.main(config, workdir)


def test_a_run_leaves_what_the_readme_says(finished, config):
  workdir, result = finished
  assert set(KEYS) <= set(result)
  assert result == json.loads((workdir / "result.json").read_text())
  assert result["n"] == config.shifted.n and 0 <= result["shifted_after"] <= 1
  lines = [json.loads(x) for x in (workdir / "trajectories.jsonl").read_text().splitlines()]
  streamed = [x for x in lines if x["tag"] == "stream"]
  assert len(streamed) == config.stream.n * config.samples
  assert all(x["truth"] is None and x["vote"] is not None for x in streamed)
  found = Calibration.from_dict(json.loads((workdir / "calibration.json").read_text()))
  votes = [x["vote"] for x in streamed]
  assert all(v["confidence"] == pytest.approx(found(v["uncalibrated"])) for v in votes)
  scored = [x for x in lines if x["tag"] == "shifted_after"]
  assert len(scored) == config.shifted.n and all(x["truth"] for x in scored)
  assert all((workdir / path).exists() for x in lines for path in x["images"])
  assert list((workdir / "tensorboard").iterdir())


def test_what_votes_were_worth_is_read_when_all_is_over(config, tmp_path):
  """Of four requests two were answered, one of them right; a line a sample, a vote a request."""
  asked = online.evaluate.made(config.stream)
  line = lambda i, answer, said=None, **vote: {
    "id": asked[i].id,
    "step": 2 * (i + 1),
    "answer": said,
    "tag": "stream",
    "vote": {"answer": answer, "confidence": 0.45, "uncalibrated": 0.85, **vote},
  }
  truth = asked[0].answer
  lines = [line(0, truth), line(0, truth, said=truth), *[line(1, None, confidence=0.55)] * 2]
  lines.append({**line(2, "wrong"), "tag": "shifted_after"})
  (tmp_path / "trajectories.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  # Before: 1 of 2 right at 0.85. After: one right at 0.45, in another bin one wrong at 0.55.
  got = online._reliability(config, tmp_path)
  # By the vote as by the label one of the first two samples is paid, and none of the others.
  first = {"label_accuracy": 1.0, "reward_accuracy": 1.0, "ground_truth_ratio": 0.5, "pass@2": 1.0}
  second = {"label_accuracy": 0.0, "reward_accuracy": 1.0, "ground_truth_ratio": 0, "pass@2": 0}
  mean = {name: (value + second[name]) / 2 for name, value in first.items()}
  assert got == pytest.approx({**mean, "ece_before": 0.35, "ece_after": 0.55})
  c = config.copy_and_resolve_references().unlock()
  c.calibration.method = "none"
  got = online._reliability(c, tmp_path)
  assert (got["ece_before"], got["ece_after"]) == (pytest.approx(0.55), None)
  # By arrival, and once though it was read twice: a run that is killed here reads it again.
  logged = [json.loads(x) for x in (tmp_path / "labels/metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in logged] == [2, 4]
  assert logged[0].items() >= first.items() and logged[1].items() >= second.items()
  c.requests = "some.jsonl"  # Nobody knows the answers.
  assert set(online._reliability(c, tmp_path).values()) == {None}


def test_an_unknown_calibration_is_named_before_anything_is_played(config, policy):
  c = config.copy_and_resolve_references().unlock()
  c.calibration.method = "beta"
  with pytest.raises(ValueError, match="calibration.method 'beta' must be one of"):
    online.calibrate(c, policy)


def test_a_finished_run_is_not_run_again(finished, config, capsys):
  workdir, result = finished
  assert online.main(config, workdir) == result
  assert "is complete" in capsys.readouterr().out


def test_another_config_in_the_same_workdir_is_refused(finished, config):
  workdir, _ = finished
  other = config.copy_and_resolve_references().unlock()
  other.seed = 1
  with pytest.raises(ValueError, match=r"other values of \['seed'\]"):
    online.main(other, workdir)


def test_a_learner_that_dies_stops_the_loop(config, policy, tmp_path, monkeypatch):
  def update(self, taken):
    raise FloatingPointError("boom")

  monkeypatch.setattr(online.Learner, "update", update)
  monkeypatch.setattr(online, "passes", lambda vote, *, seen, c: True)
  stream = online.requests(config, policy)
  probe = online.make_probe(
    config, policy, [online.drop_labels(t) for t in online.evaluate.made(config.probe.tasks)]
  )
  with pytest.raises(FloatingPointError, match="boom"):
    online.run(config, policy, policy, stream, probe, tmp_path, lambda done, signals: None)


def test_a_request_file_is_the_stream(config, policy, tmp_path, capsys):
  """A malformed line is reported with its number and skipped; the sender's vectors are the keys."""
  c = config.copy_and_resolve_references().unlock()
  c.requests, c.memory.embedding_size = str(tmp_path / "r.jsonl"), 4
  Image.fromarray(fakes.image(40, 40)).save(tmp_path / "a.png")
  ask = {"question": "what?", "image": "a.png", "embedding": [3.0, 0.0, 4.0, 0.0]}
  lines = [json.dumps({"request_id": str(i), **ask, "labels": [7]}) for i in range(3)]
  (tmp_path / "r.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
  stream = online.requests(c, policy)
  told = capsys.readouterr().out
  assert "line 2" in told and "3 read" in told and "1 malformed" in told
  probe = online.make_probe(
    c, policy, [online.drop_labels(t) for t in online.evaluate.made(c.probe.tasks)]
  )
  online.run(c, policy, policy, stream, probe, tmp_path / "run", lambda done, signals: None)
  with Memory(tmp_path / "run" / "memory.sqlite", dim=4, backend="exact") as memory:
    assert memory.ids() == ["0", "1", "2"]
    (near, *_) = memory.search(np.array([0.6, 0.0, 0.8, 0.0], np.float32), 1)
  np.testing.assert_allclose(near.similarity, 1.0, rtol=1e-5)


def test_answers_and_learning_have_devices_of_their_own(config):
  c = config.copy_and_resolve_references().unlock()
  c.mesh.tensor, c.learn.mesh.data, c.learn.mesh.fsdp = 2, -1, 3
  numbers = lambda mesh: [device.id for device in mesh.devices.flat]
  answering, learning = online.meshes(c)
  assert (numbers(answering), numbers(learning)) == ([0, 1], [2, 3, 4, 5, 6, 7])
  assert learning.shape == {"data": 2, "fsdp": 3, "tensor": 1}
  c.mesh.tensor, c.learn.mesh.data, c.learn.mesh.fsdp = 1, 0, 1
  answering, learning = online.meshes(c)
  assert answering is learning and numbers(answering) == [0]


def test_several_devices_that_answer_need_others_that_learn(config):
  c = config.copy_and_resolve_references().unlock()
  c.mesh.data = 2
  with pytest.raises(ValueError, match="learning needs devices of its own, set learn.mesh.data"):
    online.meshes(c)
  c.mesh.data, c.learn.mesh.data = 8, 1
  with pytest.raises(ValueError, match="mesh data=1 fsdp=1 tensor=1 needs 1 devices"):
    online.meshes(c)


def test_what_is_learned_must_be_cut_as_answers_need_it(config):
  c = config.copy_and_resolve_references().unlock()
  c.mesh.tensor, c.learn.mesh.data = 2, 3
  with pytest.raises(ValueError, match="in 2 parts: the 3 devices .* must be 1 or a multiple"):
    online.meshes(c)


def test_in_turn_answers_and_learning_share_several_devices(config):
  c = config.copy_and_resolve_references().unlock()
  c.mesh.data, c.pace = 2, "lockstep"
  answering, learning = online.meshes(c)
  assert answering is learning and answering.size == 2


def test_what_learns_may_lie_in_other_parts_of_the_same_devices(config):
  c = config.copy_and_resolve_references().unlock()
  c.mesh.data, c.mesh.tensor, c.pace, c.learn.mesh.fsdp = 2, 2, "lockstep", -1
  answering, learning = online.meshes(c)
  assert dict(answering.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
  assert dict(learning.shape) == {"data": 1, "fsdp": 4, "tensor": 1}
  assert [*answering.devices.flat] == [*learning.devices.flat]
  c.learn.mesh.fsdp = 2
  assert dict(online.meshes(c)[1].shape) == {"data": 2, "fsdp": 2, "tensor": 1}


def test_several_processes_take_turns(config, monkeypatch):
  """Two threads would begin their programs in another order in each process."""
  c = config.copy_and_resolve_references().unlock()
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(ValueError, match="pace 'learner' needs one process, not 2: .* 'lockstep'"):
    online.meshes(c)
  c.pace, c.learn.mesh.data = "lockstep", -1
  with pytest.raises(ValueError, match="learn.mesh.data -1 needs one process, not 2"):
    online.meshes(c)
  c.pace = "soon"
  with pytest.raises(ValueError, match="pace 'soon' must be one of"):
    online.meshes(c)


@pytest.mark.parametrize("stopped", (None, 8, 12))
def test_what_is_judged_again_is_learned_from_once_and_comes_last(
  config, policy, tmp_path, monkeypatch, stopped
):
  """A view is clearer when twelve requests are over: with each arrival four are judged again, the
  latest first, and when nothing arrives any more all that are left. So it is in a run that is
  stopped when so many were answered, and goes on."""
  monkeypatch.setattr(History, "_ahead", lambda self, view: len(self.latest) >= 12)
  monkeypatch.setattr(History, "_since", lambda self, view: 0)
  clearer = lambda self, said, vote, c: "wide" if self._ahead("wide") else None
  monkeypatch.setattr(History, "clearer", clearer)
  always = lambda vote, *, seen, c: seen
  monkeypatch.setattr(online, "passes", always)
  monkeypatch.setattr(answering, "passes", always)
  learned = []

  def update(self, taken):
    learned.extend(e.id for e in taken)
    self.refused += 1
    return {}

  monkeypatch.setattr(online.Learner, "update", update)
  c = config.copy_and_resolve_references().unlock()
  c.stream.n, c.pace = 12, "lockstep"
  stream = online.requests(c, policy)
  asked = [request.task.id for request in stream]
  probed = [online.drop_labels(t) for t in online.evaluate.made(c.probe.tasks)]
  probe = online.make_probe(c, policy, probed)

  def answered(done, signals):
    if done == stopped:
      raise KeyboardInterrupt

  run = lambda told: online.run(c, policy, policy, stream, probe, tmp_path, told)
  if stopped:
    with pytest.raises(KeyboardInterrupt):
      run(answered)
  run(lambda done, signals: None)
  # With the third arrival the second is judged again, then the third, then the first.
  order = [*asked[7:3:-1], *asked[:7:-1], *asked[3::-1]]
  assert learned == order
  dim = 2 * policy.model.config.text.width
  with Memory(tmp_path / "memory.sqlite", dim=dim, backend="exact") as memory:
    assert memory.ids() == order  # As they are looked for when a run goes on.
    history = History.from_dict(memory.get_state("stream")["history"])
  assert len(history.latest) == 12 and not any(asked.open for asked in history.latest)
  lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["judged_again"] for line in lines] == [0.0, 0.0, 4.0]


def test_all_that_is_left_is_judged_again_though_none_of_some_passes(
  config, policy, tmp_path, monkeypatch
):
  judged = []

  def again(self, history, new=()):
    judged.append(len(new))
    return [], history if len(judged) == 4 else dataclasses.replace(history)

  monkeypatch.setattr(online.Answerer, "again", again)
  c = config.copy_and_resolve_references().unlock()
  c.stream.n, c.probe.tasks.n, c.probe.canary = 4, 2, 1
  probed = [online.drop_labels(t) for t in online.evaluate.made(c.probe.tasks)]
  probe, stream = online.make_probe(c, policy, probed), online.requests(c, policy)
  online.run(c, policy, policy, stream, probe, tmp_path, lambda done, signals: None)
  assert judged == [4, 0, 0, 0]  # With the arrival, and when nothing arrives any more.


def test_a_missing_stream_is_named(config, policy, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.requests = str(tmp_path / "none.jsonl")
  with pytest.raises(FileNotFoundError, match="none.jsonl"):
    online.requests(c, policy)


def test_int8_weights_do_not_learn(config, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.model.int8 = True
  with pytest.raises(ValueError, match="model.int8 only answers"):
    online.main(c, tmp_path)


def test_a_missing_model_is_named(config, tmp_path):
  c = config.copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed = "no/such/model", -1
  with pytest.raises(FileNotFoundError, match="no/such/model"):
    online.main(c, tmp_path)


# In the midst of it, however busy the machine is: once half of the replies are logged.
KILLED = """
import os, signal
from pixelis_jax.metrics import Metrics
log = Metrics.log
def logged(self, step, values):
  log(self, step, values)
  if "memory_size" in values and step == 12:
    os.kill(os.getpid(), signal.SIGKILL)
Metrics.log = logged
"""


def test_kill_dash_nine_loses_and_doubles_nothing(config, tmp_path, policy):
  """Killed after half of the replies and continued: each request is in memory once."""
  workdir = tmp_path / "run"
  command = [*program("online", before=KILLED), "--config=configs/demo.py:debug/framed"]
  command += [f"--workdir={workdir}", f"--config.model.path={config.model.path}"]
  command += ["--config.model.random_seed=0", "--config.baseline=False"]
  command += ["--config.calibration.method=platt"]
  command += ["--config.stream.n=24", "--config.limits.turns=2", "--config.memory.backend=exact"]
  command += ["--config.gate.confidence=0.0", "--config.gate.margin=0.0"]
  command += ["--config.gate.clearer=False"]
  again = config.copy_and_resolve_references().unlock()  # The same, in this process.
  again.stream.n, again.gate.confidence, again.gate.margin = 24, 0.0, 0.0
  again.gate.clearer = False
  # As many devices as here, as programs are kept for: it finds what `finished` has compiled.
  env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_NUM_CPU_DEVICES": "8"}
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  killed = subprocess.run(command, cwd=ROOT, env=env, timeout=240, check=False, **quiet)
  assert killed.returncode == -signal.SIGKILL
  metrics = workdir / "metrics.jsonl"
  dim = 2 * policy.model.config.text.width
  with Memory(workdir / "memory.sqlite", dim=dim, backend="exact") as memory:
    answered, state = memory.ids(), memory.get_state("stream")
  assert len(answered) == state["next"] == 12
  checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
  published = checkpoints.latest_step()
  checkpoints.close()
  result = online.main(again.lock(), workdir)
  with Memory(workdir / "memory.sqlite", dim=dim, backend="exact") as memory:
    ids = memory.ids()
  assert ids[: len(answered)] == answered and len(ids) == len(set(ids)) == 24
  applied = result["updates_applied"] + result["updates_refused"]
  assert applied >= (published or 0)
  steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
  assert steps == sorted(set(steps)) == list(np.arange(4, 25, 4))
