"""Online test-time RL: unlabelled requests are answered, and teach the policy where it is sure.

    python -m pixelis_jax.online --config=configs/demo.py:blur --workdir=runs/demo

Killed at any point, the same command continues: answered requests are in the memory in one
transaction with the stream's position, and what is published was on disk before it was served.

In several processes each plays its share of the requests that arrive together, with weights that
may lie in all of them. What was played is exchanged; the first process counts the votes, with its
memory and the history, and tells them. So all have one list of experiences, and each computes its
share of an update. Answers and updates take turns (`pace` "lockstep"): programs of two threads
would begin in another order in each process, and wait for one another for ever.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Float32

from pixelis_jax import (
  agent,
  cluster,
  evaluate,
  exchange,
  learner,
  program,
  runs,
  sampler,
  sharding,
)
from pixelis_jax.algo import calibration, pseudo_rewards, verifiers
from pixelis_jax.answering import Answerer, passes
from pixelis_jax.data.requests import Request, read_requests
from pixelis_jax.data.tasks import drop_labels
from pixelis_jax.data.video import Budget
from pixelis_jax.handover import Inbox, Published
from pixelis_jax.history import History
from pixelis_jax.memory.store import Memory
from pixelis_jax.metrics import (
  METRICS_FILE,
  TRAJECTORIES_FILE,
  Metrics,
  TrajectoryLog,
  check_wandb,
  interval,
  read_lines,
)
from pixelis_jax.model import trainable
from pixelis_jax.ttrl import Learner, Probe, make_probe
from pixelis_jax.types import Experience, Task, Vote

PACES = ("learner", "none", "lockstep")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a run of the loop leaves behind: the published parameters, and how it went."""

  params: learner.Params
  applied: int
  refused: int
  latencies: list[float]  # Seconds from requests' arrival to their answers, one an arrival.
  learning: list[float]  # Seconds an update took, beside the answering.


def run(
  c: Any,
  policy: sampler.Policy,
  learning: sampler.Policy,
  stream: Sequence[Request],
  probe: Probe,
  workdir: Path,
  on_answers: Callable[[int, dict[str, float]], None],
  calibrated: calibration.Calibration | None = None,
) -> Outcome:
  """Answers the whole stream and learns from it meanwhile; continues where the workdir stopped.

  Args:
    policy: answers, and with its own weights votes.
    learning: the policy whose weights learn, on the devices that learn; on several these must be
      devices of their own.
    stream: unlabelled, the same requests in the same order when a run is continued.
    on_answers: called with (requests answered so far, signals that need no label).
    calibrated: what is known of how often such votes are right.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  here, plays = policy.model.mesh, learning.sampler.model.mesh
  serve = policy.sampler.serve
  if plays != here:
    learned, _ = trainable.parts(learning.model, learning.params, c.model.freeze)
    serve = policy.sampler.carrier(plays, learned)
  published = Published(0, policy.params, serve)
  with _memory(c, policy, workdir) as memory:
    start = {"next": 0, "history": History.start(c.vote).to_dict()}
    state = cluster.told(lambda: memory.get_state("stream") or start)
    process = policy.chat.patches
    recall = lambda ids: exchange.experiences(lambda: memory.recall(ids, process), process)
    learn = Learner(c, learning, published, probe, workdir, recall)
    answer = Answerer(c, policy, published, memory, calibrated)
    inbox = Inbox()
    waiting = lambda: _waiting(memory, learn.learned, policy, c)
    inbox.put(*exchange.experiences(waiting, process))
    history = History.from_dict(state["history"])
    with (
      contextlib.closing(learn),
      TrajectoryLog(workdir, resume=state["next"]) as trajectories,
      Metrics(workdir, resume=state["next"], c=c) as metrics,
      (InTurn if c.pace == "lockstep" else Beside)(c, learn, inbox) as learner_path,
    ):
      for at in range(state["next"], len(stream), c.arrivals):
        if not learner_path.ready():
          break
        arrived = stream[at : at + c.arrivals]
        started = time.monotonic()
        key = jax.random.fold_in(jax.random.key(c.seed), at)
        tasks = [request.task for request in arrived]
        keys = _keys(arrived, c.memory.embedding_size)
        experiences, history = answer(tasks, key, history, keys)
        seconds = {"timing_s/answer": time.monotonic() - started}
        done = at + len(arrived)
        found, history = answer.again(history, experiences)
        _remember(memory, done, history, experiences, found)
        admitted = [e for e in experiences if _admitted(e, c)]
        inbox.put(*admitted, *found)
        size = 0 if memory is None else len(memory)
        counts = {"admitted": len(admitted), "again": len(found), "size": size}
        signals = _signals(experiences, published.latest()[0], **counts)
        metrics.log(done, {**signals, **seconds})
        for experience in experiences:
          for trajectory in experience.trajectories:
            trajectories.write(done, "stream", trajectory, vote=experience.vote)
        on_answers(done, {**signals, **learn.signals()})
      # Nothing arrives any more: the others too that may be judged again are.
      found, after = answer.again(history)
      while after is not history and learner_path.ready():
        history = after
        _remember(memory, len(stream), history, (), found)
        inbox.put(*found)
        found, after = answer.again(history)
  _, params = published.latest()
  # From the log: it remembers those of a run that was stopped and continued.
  logged = lambda path, name: cluster.told(
    lambda: [line[name] for line in read_lines(path / METRICS_FILE)]
  )
  return Outcome(
    params=params,
    applied=learn.applied,
    refused=learn.refused,
    latencies=logged(workdir, "timing_s/answer"),
    learning=logged(workdir / "learn", "timing_s/learn"),
  )


class Beside:
  """Learning in another thread: no answer waits for it."""

  def __init__(self, c: Any, learn: Learner, inbox: Inbox):
    self._inbox, self._pool = inbox, concurrent.futures.ThreadPoolExecutor(1)
    # The load generator's own patience: it sends the next requests when learning is near.
    self._most = c.learn.requests + c.arrivals if c.pace == "learner" else None
    self._done = self._pool.submit(learn.run, inbox)

  def __enter__(self) -> "Beside":
    return self

  def ready(self) -> bool:
    """Waits for the next arrivals; False where the learner died, which must not go unnoticed."""
    while self._most is not None and len(self._inbox) >= self._most and not self._done.done():
      time.sleep(0.005)
    return not self._done.done()

  def __exit__(self, kind: type | None, *_) -> None:
    """Learns what is left; raises what the learner raised."""
    self._inbox.close()
    self._pool.shutdown()
    if kind is None:
      self._done.result()


class InTurn:
  """Learning in the thread that answers, between the arrivals: the same order in all processes."""

  def __init__(self, c: Any, learn: Learner, inbox: Inbox):
    self._learn, self._inbox = learn, inbox

  def __enter__(self) -> "InTurn":
    return self

  def ready(self) -> bool:
    """Learns from all that makes up an update."""
    self._learn.catch_up(self._inbox)
    return True

  def __exit__(self, kind: type | None, *_) -> None:
    """Learns what is left, unless something went wrong: other processes may not be there."""
    self._inbox.close()
    if kind is None:
      self._learn.run(self._inbox)


@contextlib.contextmanager
def _memory(c: Any, policy: sampler.Policy, workdir: Path) -> Iterator[Memory | None]:
  """The workdir's memory; None where another process, the first, has it."""
  if not cluster.first():
    yield None
    return
  dim = c.memory.embedding_size or 2 * policy.model.config.text.width
  settings = {"backend": c.memory.backend, "capacity": c.memory.capacity}
  with Memory(workdir / "memory.sqlite", dim=dim, **settings) as memory:
    yield memory


def _remember(
  memory: Memory | None,
  done: int,
  history: History,
  new: Sequence[Experience],
  again: Sequence[Experience],
) -> None:
  """In one transaction; those that were judged again come last, as they are learned from."""
  if memory is not None:
    state = {"stream": {"next": done, "history": history.to_dict()}}
    memory.add_all([*new, *again], state=state, anew=[e.id for e in again])


def _keys(arrived: Sequence[Request], size: int) -> Float32[np.ndarray, "N E"] | None:
  """The senders' embeddings as unit vectors; None where the config has the reference make keys."""
  if not size:
    return None
  missing = [r.task.id for r in arrived if r.embedding is None]
  if missing:
    raise ValueError(f"request {missing[0]!r} has no embedding; memory.embedding_size is {size}")
  keys = np.stack([r.embedding for r in arrived])
  return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def requests(c: Any, policy: sampler.Policy) -> list[Request]:
  """The stream: the file `c.requests`, or questions of `c.stream` without their labels.

  Prints each refused request and the counts. FileNotFoundError names a file that is not there.
  """
  if not c.requests:
    return [Request(task=drop_labels(task)) for task in evaluate.made(c.stream)]
  counts: collections.Counter = collections.Counter()
  stream = list(
    read_requests(
      c.requests,
      report=program.say,
      counts=counts,
      sees=policy.sees,
      decode=policy.chat.decode,
      embedding_size=c.memory.embedding_size or None,
      budget=Budget(**c.video),
    )
  )
  program.say(f"{c.requests}: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items())))
  return stream


def meshes(c: Any, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
  """(where answers are given, where is learned): `c.mesh`, and the devices behind it, by default of
  all there are.

  Both may be one device, or, where they take turns, the same devices. On several, programs of two
  threads would begin in another order on each device, and wait for one another for ever. On the
  same devices what learns may lie in other parts: `learn.mesh.data` 0, its fsdp and tensor say so.

  Raises ValueError for meshes or a pace that cannot be.
  """
  in_turn, count = c.pace == "lockstep", jax.process_count()
  if devices is None:
    devices = jax.devices()
  else:
    count = len({device.process_index for device in devices})
  if c.pace not in PACES:
    raise ValueError(f"pace {c.pace!r} must be one of {PACES}")
  if count > 1 and not in_turn:
    raise ValueError(f"pace {c.pace!r} needs one process, not {count}: set it to 'lockstep'")
  if count > 1 and c.learn.mesh.data:
    raise ValueError(
      f"learn.mesh.data {c.learn.mesh.data} needs one process, not {count}: set it to 0, answers "
      "and learning take turns on the devices of mesh"
    )
  answering = sharding.make_mesh(**c.mesh, devices=devices)
  if c.learn.mesh.data:
    learning = sharding.make_mesh(**c.learn.mesh, devices=devices[answering.size :])
    sharding.bridge(learning, answering)  # What is learned can be published: or it says why not.
    return answering, learning
  if answering.size > 1 and not in_turn:
    raise ValueError(
      f"mesh {dict(answering.shape)} has {answering.size} devices: learning needs devices of its "
      "own, set learn.mesh.data (-1: those that mesh leaves), or pace to 'lockstep'"
    )
  fsdp, tensor = c.learn.mesh.fsdp, c.learn.mesh.tensor
  if fsdp == tensor == 1:
    return answering, answering
  return answering, sharding.relaid(answering, 1 if -1 in (fsdp, tensor) else -1, fsdp, tensor)


def calibrate(c: Any, policy: sampler.Policy) -> calibration.Calibration:
  """How often votes are right on `c.calibration.tasks`, which are answered as the stream will be.

  Their labels are compared with votes that are over. They are no requests of the stream, whose own
  labels nothing reads before the end.
  """
  how = c.calibration
  calibration.check(how.method)
  tasks, history = evaluate.tasks(how.tasks, policy), History.start(c.vote)
  votes: list[Vote] = []
  with (
    tempfile.TemporaryDirectory() as folder,
    Memory(
      Path(folder) / "memory.sqlite",
      dim=2 * policy.model.config.text.width,
      backend=c.memory.backend,
    ) as memory,
  ):
    answer = Answerer(c, policy, Published(0, policy.params), memory)
    for at in range(0, len(tasks), c.arrivals):
      arrived = [drop_labels(task) for task in tasks[at : at + c.arrivals]]
      key = jax.random.fold_in(jax.random.key(c.seed), at)
      experiences, history = answer(arrived, key, history)
      memory.add_all(experiences)
      votes += [experience.vote for experience in experiences]
  right = [_right(v.answer, t, c) for v, t in zip(votes, tasks, strict=True)]
  return calibration.fit([vote.confidence for vote in votes], right, method=how.method)


def _right(voted: str | None, task: Task, c: Any) -> bool:
  return verifiers.alike(voted, task.answer, verifier=c.vote.verifier)


def _reliability(c: Any, workdir: Path) -> dict[str, float | None]:
  """How often the stream's votes were right, and how far from that their confidence was.

  What else labels say is `pseudo_rewards.by_label`: here of all requests, and in the workdir's
  `labels` of what arrived together. Errors are `calibration.ece`, before calibration and after;
  None where there was none. A stream from a file has no labels. Read from the log when all is over.
  """
  if c.requests:
    return dict.fromkeys(("label_accuracy", "ece_before", "ece_after"))
  truths = {task.id: task.answer for task in evaluate.made(c.stream)}
  asked: dict[str, list[dict]] = collections.defaultdict(list)
  for line in read_lines(workdir / TRAJECTORIES_FILE):
    if line["tag"] == "stream":
      asked[line["id"]].append(line)
  votes, found, arrived = [], [], collections.defaultdict(list)
  for id, samples in asked.items():
    answers, vote = [line["answer"] for line in samples], samples[0]["vote"]
    how = {"verifier": c.vote.verifier}
    found.append(pseudo_rewards.by_label(answers, vote["answer"], truths[id], **how))
    arrived[samples[0]["step"]].append(found[-1])
    votes.append(vote)
  with Metrics(workdir / "labels", resume=0, c=c) as metrics:
    for step, together in arrived.items():
      metrics.log(step, _mean(together))
  right = [values["label_accuracy"] == 1.0 for values in found]
  used, raw = ([vote[name] for vote in votes] for name in ("confidence", "uncalibrated"))
  done = c.calibration.method != calibration.NONE
  before, after = calibration.ece(raw if done else used, right), calibration.ece(used, right)
  return {**_mean(found), "ece_before": before, "ece_after": after if done else None}


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
  return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _admitted(experience: Experience, c: Any) -> bool:
  return passes(experience.vote, seen=experience.looks is not None, c=c.gate)


def _waiting(
  memory: Memory, learned: str | None, policy: sampler.Policy, c: Any
) -> list[Experience]:
  """What was answered but not yet learned from when the process ended.

  All entries have one priority, so the oldest are evicted first: if `learned` is gone, all that is
  left is newer.
  """
  ids = memory.ids()
  start = ids.index(learned) + 1 if learned in ids else 0
  found = memory.recall(ids[start:], policy.chat.patches)
  return [experience for experience in found if _admitted(experience, c)]


def _signals(
  experiences: Sequence[Experience], version: int, *, admitted: int, again: int, size: int
) -> dict[str, float]:
  return {
    "majority_ratio": float(np.mean([e.vote.share for e in experiences])),
    "vote_confidence": float(np.mean([e.vote.confidence for e in experiences])),
    "vote_margin": float(np.mean([e.vote.margin for e in experiences])),
    "gate_rate": admitted / len(experiences),
    "judged_again": float(again),
    "memory_size": float(size),
    "policy_version": float(version),
  }


def main(c: Any, workdir: Path) -> dict[str, Any]:
  """The whole experiment: score, answer and learn from the unlabelled stream, score again."""
  check_wandb(c.wandb)
  if jax.process_count() > 1:
    # `jax.distributed` has it only noted; here it may end a process at any point, as without it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  runs.keep_config(workdir, c, same=True)
  if result := _kept(workdir / "result.json"):
    program.say(f"{workdir} is complete; remove it to run again\n{table(result)}")
    return result
  answering, learning = meshes(c)
  where = {"mesh": learning, "rollouts": None if c.learn.mesh.data else answering}
  learned = sampler.load_policy(c.model, **where, adapters=jax.random.key(c.seed))
  policy = sampler.serving(learned, answering)
  shifted, original = evaluate.tasks(c.shifted, policy), evaluate.tasks(c.original, policy)
  if len(shifted) != len(original):
    raise ValueError(
      f"{len(shifted)} shifted and {len(original)} original questions: the result has one n, set "
      "shifted.n and original.n to a number that both have"
    )
  stream = requests(c, policy)
  probed = evaluate.tasks(c.probe.tasks, policy)
  probe = make_probe(c, policy, [drop_labels(task) for task in probed])
  score = lambda: _scores(c, policy, policy.params, shifted, original)
  before = _made_once(workdir / "before.json", score)
  outcome = _watched(c, policy, learned, stream, probe, workdir, "views")
  with TrajectoryLog(workdir, resume=len(stream)) as log:
    after = _scores(c, policy, outcome.params, shifted, original, log, len(stream) + 1)
  result = {
    "shift": Path(c.shifted.file).stem or c.shifted.shift,
    "skew": c.stream.skew,
    "seed": c.seed,
    "n": len(shifted),
    "requests": len(stream),
    "shifted_before": before["shifted"],
    "shifted_after": after["shifted"],
    "original_before": before["original"],
    "original_after": after["original"],
    "majority_after": None,
    "tool_calls_per_question": after["tool_calls"],
    "updates_applied": outcome.applied,
    "updates_refused": outcome.refused,
    "answer_p50_s": float(np.percentile(outcome.latencies, 50)),
    "answer_p95_s": float(np.percentile(outcome.latencies, 95)),
    "update_p50_s": float(np.median(outcome.learning)) if outcome.learning else None,
    **cluster.told(lambda: _reliability(c, workdir)),
  }
  if c.baseline:
    plain = c.copy_and_resolve_references()
    plain.vote.voters, plain.vote.rule = ("samples",), "majority"
    plain.gate.clearer = False  # All look plainly.
    rival = _watched(plain, policy, learned, stream, probe, workdir / "majority", "majority")
    result["majority_after"] = _scores(c, policy, rival.params, shifted, ())["shifted"]
  _keep(workdir / "result.json", result)
  program.say(table(result))
  return result


def table(result: dict[str, Any]) -> str:
  """The result as a person reads it: percent with 95% Wilson intervals."""
  n = result["n"]

  def cell(name: str) -> str:
    if result[name] is None:
      return "-"
    low, high = interval(round(result[name] * n), n)
    return f"{100 * result[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"

  rows = [
    ("held-out accuracy, percent (95%)", "before", "after"),
    (f"shifted domain ({result['shift']})", cell("shifted_before"), cell("shifted_after")),
    ("original domain", cell("original_before"), cell("original_after")),
    ("shifted, plain majority vote", cell("shifted_before"), cell("majority_after")),
  ]
  facts = [
    f"n {n} held-out questions a domain, {result['requests']} unlabelled requests",
    f"seed {result['seed']}, tool calls a question {result['tool_calls_per_question']:.2f}",
    f"updates applied {result['updates_applied']}, refused {result['updates_refused']}",
    f"answers took {result['answer_p50_s']:.2f} s (median), {result['answer_p95_s']:.2f} s (p95)",
  ]
  if result["ece_after"] is not None:
    errors = f"{result['ece_before']:.3f} before calibration, {result['ece_after']:.3f} after"
    facts.append(f"votes were right {100 * result['label_accuracy']:.1f}%, calibration {errors}")
  if result["update_p50_s"] is not None:
    facts.append(f"updates took {result['update_p50_s']:.2f} s (median), beside the answers")
  return "\n".join([*(f"{a:<34} {b:<24} {d}" for a, b, d in rows), *facts])


def _scores(c: Any, policy, params, shifted, original, log=None, step: int = 0) -> dict[str, float]:
  """Accuracy of these parameters on both domains, greedy. Beside `_reliability`, which also comes
  last, and `calibrate` the only place that reads a label.
  """
  limits = agent.Limits(**c.limits)
  scores = {}
  for name, asked in (("original", original), ("shifted", shifted)):
    if not asked:
      continue
    how = {"limits": limits, "verifier": c[name].verifier}
    result = evaluate.greedy(policy, params, asked, **how)
    scores |= {name: result.accuracy, "tool_calls": result.tool_calls}
    played = exchange.trajectories(result.trajectories, policy.chat.patches) if log else ()
    for trajectory in played:
      log.write(step, f"{name}_after", trajectory, truth=trajectory.task.answer)
  return scores


def _watched(c: Any, policy, learning, stream, probe, workdir: Path, name: str) -> Outcome:
  """`run`, with a progress bar of signals that need no labels; calibrated once, where asked for."""
  calibrated = None
  if c.calibration.method != calibration.NONE:
    workdir.mkdir(parents=True, exist_ok=True)
    make = lambda: dataclasses.asdict(calibrate(c, policy))
    found = _made_once(workdir / "calibration.json", make)
    calibrated = calibration.Calibration.from_dict(found)
  total, quiet = len(stream), not cluster.first()
  with tqdm.tqdm(total=total, desc=name, unit="q", smoothing=0.05, disable=quiet) as bar:

    def on_answers(answered: int, signals: dict[str, float]) -> None:
      shown = ("majority_ratio", "gate_rate", "actor/kl", "memory_size", "updates_applied")
      bar.set_postfix({k: f"{signals[k]:.3g}" for k in shown if k in signals}, refresh=False)
      bar.update(answered - bar.n)

    return run(c, policy, learning, stream, probe, workdir, on_answers, calibrated)


def _made_once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What `make` gave, in this run or the one that it continues; all processes call it together."""
  found = _kept(path)
  if found is None:
    found = make()
    _keep(path, found)
  return found


def _kept(path: Path) -> dict[str, Any] | None:
  """The JSON in `path`, the same in all processes; None where there is none yet."""
  return cluster.told(lambda: json.loads(path.read_text()) if path.exists() else None)


def _keep(path: Path, values: dict[str, Any]) -> None:
  """Written by the first process, whole."""
  if cluster.first():
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(values, indent=2))
    aside.replace(path)


if __name__ == "__main__":
  program.launch(main)
