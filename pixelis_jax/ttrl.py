"""Test-time RL, the path that learns: from what was voted, towards weights that are served.

`Learner` owns the TrainState and is the only one who publishes. With the path that serves
(answering.py) it shares what handover.py has, and the memory, and nothing else.

Of several processes each computes its share of an update, and all hold the same experiences.
"""

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float32
from ml_collections import FrozenConfigDict

from pixelis_jax import agent, batch, cluster, exchange, learner, sampler, sharding
from pixelis_jax.algo import advantages, pace, voting
from pixelis_jax.algo.kl import AdaptiveKl
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.algo.pseudo_rewards import PseudoReward, agreement, pseudo_rewards
from pixelis_jax.algo.replay import Replay
from pixelis_jax.algo.verifiers import alike
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.data.demos import ANSWER
from pixelis_jax.handover import Inbox, Published
from pixelis_jax.looks import Looks
from pixelis_jax.metrics import Metrics, named, outcomes, spreads
from pixelis_jax.model import lora, trainable
from pixelis_jax.model.policy import Model
from pixelis_jax.types import Experience, Task, Trajectory, Vote, content_key

Weighted: TypeAlias = tuple[batch.Row, float, float]  # A row, its advantage, its weight in the KL.
Recall: TypeAlias = Callable[[Sequence[str]], list[Experience]]


@dataclasses.dataclass(frozen=True)
class Probe:
  """The original domain, fixed at the start and unlabelled: what must not be forgotten.

  `rehearsed` are the reference's own episodes, held by KL in each update; `expected` are its greedy
  answers to `canary`, which what is published has to keep giving, by the rule `verifier`.
  """

  rehearsed: tuple[Trajectory, ...]
  canary: tuple[Task, ...]
  expected: tuple[str | None, ...]
  verifier: str

  def agreement(self, answers: Sequence[str | None]) -> float:
    """The share of canary answers that mean what the reference's did."""
    same = [
      alike(answer, e, verifier=self.verifier)
      for answer, e in zip(answers, self.expected, strict=True)
      if e is not None
    ]
    return float(np.mean(same)) if same else 1.0


def make_probe(c: Any, policy: sampler.Policy, tasks: Sequence[Task]) -> Probe:
  """Plays the first `c.probe.canary` tasks greedily and the others by sampling."""
  canary, others = tasks[: c.probe.canary], tasks[c.probe.canary :]
  played = _share(c, policy, policy.params, canary, temperature=0.0)
  rehearsed = _share(c, policy, policy.params, others, temperature=1.0)
  return Probe(
    rehearsed=tuple(exchange.trajectories(rehearsed, policy.chat.patches)),
    canary=tuple(canary),
    expected=tuple(_answers(played)),
    verifier=c.vote.verifier,
  )


def _share(
  c: Any, policy: sampler.Policy, params: learner.Params, tasks: Sequence[Task], temperature: float
) -> list[Trajectory]:
  """This process's share of the tasks, played once each with these parameters."""
  own, key = cluster.split(len(tasks)), jax.random.key(c.seed)
  how = {"version": 0, "temperature": temperature, "first": own.start}
  generate = policy.sampler.bind(params, key=key, **how)
  mine, limits = tasks[own.start : own.stop], agent.Limits(**c.limits)
  return agent.play(mine, generate=generate, run=policy.tools.run, limits=limits)


def _answers(mine: Sequence[Trajectory]) -> list[str | None]:
  """Of all processes' shares, in the order of the tasks."""
  return [answer for part in cluster.everyone([t.answer for t in mine]) for answer in part]


class Learner:
  """The learning path: the only owner of the TrainState, and the only one who publishes.

  An update reads new experiences, and with them some that it has read before: requests come once,
  and once is not enough. The step does not donate: an update may be refused, and then the old state
  stands.
  """

  def __init__(
    self,
    c: Any,
    policy: sampler.Policy,
    published: Published,
    probe: Probe,
    workdir: Path,
    recall: Recall,
  ):
    """Restores what was last published from `workdir`, and publishes it.

    `recall` gives the experiences of these ids again, as many of them as are still remembered.
    """
    self.c, self.policy, self.published, self.probe = c, policy, published, probe
    self.recall = recall
    model, dtype = policy.model, c.model.dtype
    self.step, tx = make_step(model, FrozenConfigDict(c.learn), dtype)
    self.logps = learner.make_logps(model, dtype, parts=c.learn.accumulate)
    trained, self.base = trainable.parts(model, policy.params, c.model.freeze)
    # Of what answers, where that is on these devices, or of what learns.
    answers, here = published.latest()[1], _devices(policy.params)
    answers = answers if _devices(answers) == here else policy.params
    _, self.still = trainable.parts(model, answers, c.model.freeze)
    self.state = learner.init_state(trained, tx, seed=c.seed)
    self.average = trained
    self.looks = Looks(c, policy, trained, probe.rehearsed)
    held = {"target": c.kl.target, "tolerance": c.kl.tolerance, "horizon": c.kl.horizon}
    self.kl = AdaptiveKl(coef=c.kl.coef, **held)
    self.throttle = pace.Throttle(c.learn.per_minute)
    self.lessons: Counter[str] = Counter()  # By question; only where their number has a limit.
    self.reward = PseudoReward(**c.learn.reward)
    # Ids of what was read, by the share of samples that disagreed: unanimity teaches nothing.
    self.replay: Replay[str] = Replay(c.learn.replay.capacity, alpha=c.learn.replay.alpha)
    self.applied = self.refused = 0
    self.unpublished = 0  # Updates applied since what is served now.
    self.learned: str | None = None  # The id of the last experience read.
    self.taught = voting.AnswerPrior(decay=c.vote.decay)  # Answers of the experiences read.
    self.latest_kl = 0.0
    self.checkpoints = Checkpoints(workdir / FOLDER, keep=c.keep)
    if restored := self.checkpoints.restore(self._tree()):
      tree, extra = restored
      self._set(tree)
      self.looks.add(recall(extra["looks"]))
      self.kl = dataclasses.replace(self.kl, coef=extra["kl_coef"])
      self.applied, self.refused = extra["applied"], extra["refused"]
      self.learned = extra["learned"]
      self.taught = voting.AnswerPrior(**extra["taught"])
      self.lessons = Counter(extra["lessons"])
      for id, wrong in extra["replay"]:
        self.replay.add([id], np.float32([wrong]))
      published.publish(self.updates, self.average)
    self.stable = self._tree()  # With what is served now.
    self.metrics = Metrics(workdir / "learn", resume=self.updates, c=c)

  def whole(self, trained: learner.Params) -> learner.Params:
    """All parameters: these, and those that do not learn."""
    return lora.join(trained, self.base)

  @property
  def updates(self) -> int:
    """Batches read so far, applied or refused."""
    return self.applied + self.refused

  def signals(self) -> dict[str, float]:
    """For a progress display."""
    return {"actor/kl": self.latest_kl, "updates_applied": float(self.applied)}

  def run(self, inbox: Inbox) -> None:
    """Learns until the inbox is closed and empty."""
    while (taken := inbox.take(self.c.learn.requests)) is not None:
      self._learn(taken)
    if self.checkpoints.latest_step() != self.updates and self.updates:
      self.publish()

  def catch_up(self, inbox: Inbox) -> None:
    """Learns while there is enough for an update."""
    while len(inbox) >= self.c.learn.requests:
      self._learn(inbox.take(self.c.learn.requests))

  def _learn(self, taken: Sequence[Experience]) -> None:
    """One update, published when it is due."""
    self.throttle.start()
    started = time.monotonic()
    measured = self.update(taken)
    self.learned = taken[-1].id
    if self.updates % self.c.learn.publish_every == 0:
      measured |= self.publish()
    counts = {"updates_applied": float(self.applied), "updates_refused": float(self.refused)}
    seconds = {"timing_s/learn": time.monotonic() - started}
    self.metrics.log(self.updates, {**measured, **counts, **seconds})

  def close(self) -> None:
    """Releases the log and the checkpoint threads."""
    self.metrics.close()
    self.checkpoints.close()

  def update(self, taken: Sequence[Experience]) -> dict[str, float]:
    """One step on what was sampled, towards what was voted; refused if it leaves the KL guard.

    Some of what was read before is read again beside what is `taken`; metrics are of the latter.
    """
    c, verifier, new = self.c.learn, self.c.vote.verifier, len(taken)
    fresh = self._fresh(taken)
    taken = [*taken, *self._again()]
    taken = [self._drawn(experience, i) for i, experience in enumerate(taken)]
    fresh = np.pad(fresh, (0, len(taken) - new), constant_values=True)
    agreed = np.stack([self._agreed(e) for e in taken])
    earned = np.array(
      [pseudo_rewards(e.trajectories, e.vote, self.reward, verifier=verifier) for e in taken],
      np.float32,
    )
    lengths = batch.sampled_tokens([e.trajectories for e in taken])
    pushes = advantages.advantages(earned, lengths, adv_estimator=c.adv_estimator)
    kept = advantages.keep_groups(earned)
    measured = {
      "majority_voting_reward": float(agreed[:new].mean()),
      "zero_variance": 1.0 - float(kept[:new].mean()),
      "replayed": (len(taken) - new) / new,
      **spreads(outcomes(earned[:new], pushes[:new], lengths[:new])),
    }
    wrong = 1.0 - agreed[:new].mean(axis=1)
    self.replay.add([experience.id for experience in taken[:new]], wrong * fresh[:new])
    self.looks.add([experience for experience, may in zip(taken, fresh, strict=True) if may])
    if (agreed.all() and not kept.any()) or not fresh.any():
      self.refused += 1  # Nothing to learn.
      return measured
    rows = [*self._pushing(taken, earned, pushes, fresh), *self._rehearsing()]
    packed = sharding.put_rows(self._pack(rows), self.policy.model.mesh)
    packed = packed.replace(ref_logps=self.logps(self.policy.params, packed.inputs))
    dropout = jax.random.fold_in(self.state.rng, self.updates)
    coef = jnp.float32(self.kl.coef)
    proposed, update = self.step(self.state, packed, self.base, dropout, coef)
    sure = [experience.vote.confidence for experience in taken]
    share = pace.rate_share(sure, rule=c.lr_rule, lr=c.lr, lr_min=c.lr_min)
    if share < 1.0:  # AdamW's step is linear in its rate: a part of the rate is a part of the way.
      nearer = _average(self.state.params, proposed.params, 1.0 - share)
      proposed = proposed.replace(params=nearer)
    params, eyes, seen = self.looks.teach(proposed.params, self.base, self.updates)
    proposed = proposed.replace(params=params)
    after = float(_pushing_kl(self.logps(self.whole(proposed.params), packed.inputs), packed))
    before = float(update["kl"])
    self.kl = self.kl.update(after) if np.isfinite(after) else self.kl
    if not np.isfinite(after) or (after > self.c.kl.limit and after > before):
      self.refused += 1
    else:
      self.applied += 1
      self.unpublished += 1
      self.latest_kl = after
      self.state, self.looks.state = proposed, eyes
      self.average = _average(self.average, proposed.params, c.ema)
    update |= {"kl": after, "kl_coef": self.kl.coef, **seen}
    return {**measured, **{k: float(v) for k, v in named(update, "actor").items()}}

  def publish(self) -> dict[str, float]:
    """Serves the averaged parameters if the canary agrees, else goes back to the last that did."""
    served = self.policy.sampler.serve(self.average)
    whole = lora.join(served, self.still)
    played = _share(self.c, self.policy, whole, self.probe.canary, temperature=0.0)
    score = self.probe.agreement(_answers(played))
    if score < 1.0 - self.c.probe.tolerance:
      self._set(self.stable)
      self.applied -= self.unpublished
      self.refused += self.unpublished
      self.kl = dataclasses.replace(self.kl, coef=min(2 * self.kl.coef, self.kl.high))
      served = self.policy.sampler.serve(self.average)
    self.unpublished = 0
    self.stable = self._tree()
    extra = {
      "kl_coef": self.kl.coef,
      "applied": self.applied,
      "refused": self.refused,
      "learned": self.learned,
      "taught": self.taught.to_dict(),
      "lessons": dict(self.lessons),
      "replay": self.replay.to_list(),
      "looks": self.looks.ids,
    }
    version = self.updates
    self.checkpoints.save(version, self.stable, extra)
    self.checkpoints.wait()  # On disk first, served second.
    self.published.publish(version, served)
    return {"canary": score, "policy_version": float(version)}

  def _tree(self) -> dict[str, Any]:
    """All arrays that learning goes on from."""
    return {"state": self.state, "average": self.average, "looks": self.looks.state}

  def _set(self, tree: dict[str, Any]) -> None:
    self.state, self.average, self.looks.state = tree["state"], tree["average"], tree["looks"]

  def _again(self) -> list[Experience]:
    """Some of what was read before, drawn by chance, as far as it is still remembered."""
    rng = np.random.default_rng((self.c.seed, self.updates, 0, 1))  # Zeros at the end say nothing.
    drawn = self.replay.draw(self.c.learn.replay.experiences, rng)
    return self.recall([id for id, _ in drawn]) if drawn else []

  def _drawn(self, experience: Experience, i: int) -> Experience:
    """The `i`-th of an update, with as many of its samples as learn, drawn by chance.

    More may vote than learn: TTRL has 64 votes and trains on 32. It keeps the first ones.
    """
    n, samples = self.c.learn.samples, experience.trajectories
    if not 0 < n < len(samples):
      return experience
    rng = np.random.default_rng((self.c.seed, self.updates, 1 + i))
    kept = sorted(rng.choice(len(samples), size=n, replace=False).tolist())
    return dataclasses.replace(experience, trajectories=tuple(samples[k] for k in kept))

  def _fresh(self, taken: Sequence[Experience]) -> Bool[np.ndarray, " Q"]:
    """Which of these questions have taught less often than `learn.per_question`; 0 is no limit."""
    most = self.c.learn.per_question
    fresh = np.ones(len(taken), bool)
    for i, experience in enumerate(taken if most else ()):
      question = asked(experience)
      fresh[i] = self.lessons[question] < most
      self.lessons[question] += int(fresh[i])
    return fresh

  def _agreed(self, experience: Experience) -> Float32[np.ndarray, " G"]:
    """How right each sample's answer is if the voted one is."""
    e, verifier = experience, self.c.vote.verifier
    return np.array(agreement(e.trajectories, e.vote, self.reward, verifier), np.float32)

  def _pushing(
    self,
    taken: Sequence[Experience],
    earned: Float32[np.ndarray, "Q G"],
    pushes: Float32[np.ndarray, "Q G"],
    fresh: Bool[np.ndarray, " Q"],
  ) -> list[Weighted]:
    """What these experiences teach: their most telling samples, and corrections of these.

    Those that are not `fresh` push nowhere; they stay in because an update has one shape.
    """
    c, rows = self.c.learn, []
    for experience in taken:
      self.taught = self.taught.update({experience.vote.answer: 1.0})
    for experience, earned_G, push_G, may in zip(taken, earned, pushes, fresh, strict=True):
      # What is asked most must not teach most: a skewed stream would make a skewed policy.
      weight = self.taught.balance(experience.vote.answer) * bool(may)
      chosen = advantages.contrast(earned_G, c.contrast)
      samples = [experience.trajectories[i] for i in chosen]
      # Unanimous groups stay in, though all they do is be held by the KL: an update has one shape.
      for i, sample in zip(chosen, samples, strict=True):
        rows.append((batch.trajectory_row(sample), weight * float(push_G[i]), 1.0))
      wrong = 1.0 - float(self._agreed(experience).mean())
      push = weight * c.correction_weight * wrong * self.reward.trusts(experience.vote)
      rows += [(row, push, 0.0) for row in self._corrections(samples, experience.vote)]
    return rows

  def _corrections(self, samples: Sequence[Trajectory], vote: Vote) -> list[batch.Row]:
    """What the first samples saw, with the voted answer in the place of theirs.

    A vote says what every answer earns, not only the sampled ones. Where the policy all but never
    samples the right one, as in a new domain, sampled rewards alone would take very long to say so
    (cf. off-policy guidance in the group, LUFFY, https://arxiv.org/abs/2504.14945).
    """
    rows = []
    for trajectory in samples:
      last = trajectory.steps[-1].completion
      before, box, after = last.text.rpartition(ANSWER.format(trajectory.answer))
      if len(rows) < self.c.learn.corrections and trajectory.answer is not None and box:
        text = before + ANSWER.format(vote.answer) + after
        rows.append(batch.corrected_row(trajectory, self.policy.chat.target(text)))
    return rows

  def _rehearsing(self) -> list[Weighted]:
    """Some of the probe's episodes, which push nowhere and are held to the reference."""
    c = self.c.probe
    rng = np.random.default_rng((self.c.seed, self.updates))
    n = min(c.rehearse, len(self.probe.rehearsed))
    picked = rng.choice(len(self.probe.rehearsed), size=n, replace=False)
    held = c.weight / self.kl.coef  # The same whatever the coefficient is now.
    return [(batch.trajectory_row(self.probe.rehearsed[i]), 0.0, held) for i in picked]

  def _pack(self, rows: Sequence[Weighted]) -> batch.GrpoBatch:
    """This process's share of the rows that leave the update's shape as it is: any other is a
    program to compile.

    Raises ValueError, naming the sizes, where none does: then nothing would ever be learned.
    """
    c = self.c.learn
    tokens = [len(row.tokens) for row, *_ in rows]
    patches = [max((len(i.patches) for i in row.images), default=0) for row, *_ in rows]
    fit = [
      row
      for row, t, p in zip(rows, tokens, patches, strict=True)
      if t <= c.max_tokens and p <= c.max_patches
    ]
    if not fit:
      raise ValueError(
        f"no row of an update fits learn.max_tokens={c.max_tokens} and "
        f"learn.max_patches={c.max_patches}: the shortest has {min(tokens)} tokens, the one with "
        f"the smallest images {min(patches)} patches"
      )
    own, model = cluster.split(len(fit)), self.policy.model
    blocks = sharding.own_blocks(model.mesh) * c.accumulate
    multiple = math.lcm(c.rows_multiple, model.blocks * c.accumulate)
    mine = fit[own.start : own.stop]
    return batch.pack_grpo(
      [row for row, *_ in mine],
      np.array([push for _, push, _ in mine], np.float32),
      model.config,
      max_tokens=c.max_tokens,
      multiple_of=multiple // jax.process_count(),
      blocks=blocks,
      kl_weights=np.array([held for *_, held in mine], np.float32),
    )


@functools.cache  # A run learns twice from its stream, to compare: with one program.
def make_step(
  model: Model, c: FrozenConfigDict, dtype: str
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], optax.GradientTransformation]:
  """((state, batch, base, key, kl_coef) -> (state, metrics), its optimizer)."""
  tx = learner.adamw(c, learner.warmed(c.lr, c.warmup))
  loss = learner.computed_in(learner.grpo_loss(model, Objective(**c.loss)), dtype)
  how = {"parts": c.accumulate, "mesh": model.mesh, "donate": False}
  return learner.make_step(learner.adapted(model, loss), tx, **how), tx


def asked(experience: Experience) -> str:
  """One name for all visits to a question: of its words and of what they were shown with."""
  first = experience.trajectories[0]
  shown = [patches.key for patches in first.steps[0].completion.context.images]
  return content_key(first.task.question, *shown)


def _devices(params: learner.Params) -> set[jax.Device]:
  """Where parameters lie."""
  return jax.tree.leaves(params)[0].sharding.device_set


_average = jax.jit(learner.ema)
_pushing_kl = jax.jit(learner.pushing_kl)
