"""Test-time RL, the parts: how a request is answered, and how what was voted is learned.

`Answerer` reads the published parameters and never waits; `Learner` owns the TrainState. They share
three objects (memory, inbox, published) and nothing else. Labels cannot reach either: `Answerer`
refuses a task that carries one.

Of several processes each plays its share of the requests and computes its share of an update; the
first counts the votes over what all said and tells them, and all hold the same experiences.
"""

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float32, PRNGKeyArray

from pixelis_jax import agent, batch, cluster, exchange, learner, sampler, sharding
from pixelis_jax.algo import advantages, rewards, voting
from pixelis_jax.algo.answers import equal
from pixelis_jax.algo.information import Information
from pixelis_jax.algo.kl import AdaptiveKl
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.data.demos import ANSWER
from pixelis_jax.memory.store import Memory
from pixelis_jax.metrics import Metrics
from pixelis_jax.tools.views import IDENTITY, View, views_for
from pixelis_jax.types import Ballot, Experience, Task, Trajectory, Vote

Voter: TypeAlias = tuple[View, Trajectory]  # How it looked, and what it saw and said.
Weighted: TypeAlias = tuple[batch.Row, float, float]  # A row, its advantage, its weight in the KL.


class Published:
  """The parameters answers are given with. Swapped whole; a reader keeps what it took.

  Later ones are put on the devices of the first, straight from those that they were learned on.
  """

  def __init__(self, version: int, params: learner.Params, learned: Mesh | None = None):
    """`learned`: the devices that later ones come from, where they are others."""
    self._latest = (version, params)  # One reference: reading and replacing it are atomic.
    places = jax.tree.map(lambda x: x.sharding, params)
    kept = partial(jax.device_put, device=places)
    self._carry = kept if learned is None else sharding.Carrier(places, learned)

  def latest(self) -> tuple[int, learner.Params]:
    return self._latest

  def publish(self, version: int, params: learner.Params) -> None:
    self._latest = (version, self._carry(params))


class Inbox:
  """What learning has yet to read, oldest first. Answering puts and never waits; learning takes."""

  def __init__(self):
    self._waiting: deque[Experience] = deque()
    self._changed = threading.Condition()
    self._closed = False

  def __len__(self) -> int:
    return len(self._waiting)

  def put(self, experience: Experience) -> None:
    with self._changed:
      self._waiting.append(experience)
      self._changed.notify_all()

  def close(self) -> None:
    """No more will come: `take` hands out what is left, then None."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()

  def take(self, n: int) -> list[Experience] | None:
    """The next n, fewer only after `close`; None when nothing is left."""
    with self._changed:
      self._changed.wait_for(lambda: len(self._waiting) >= n or self._closed)
      taken = [self._waiting.popleft() for _ in range(min(n, len(self._waiting)))]
      return taken or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """What the requests so far say, without labels: which answers come up, whose answers tell."""

  prior: voting.AnswerPrior
  views: Information

  @classmethod
  def start(cls, c: Any) -> "History":
    """Before any request."""
    return cls(prior=voting.AnswerPrior(decay=c.decay), views=Information(decay=c.decay))

  def heard(self, tasks: Sequence[Task], voters: Sequence[Sequence[Voter]]) -> "History":
    """After these requests, as far as it concerns what each view tells."""
    views = self.views
    for task, voted in zip(tasks, voters, strict=True):
      views = views.update(task.kind, [(v.name, t.answer, entropy(t)) for v, t in voted])
    return dataclasses.replace(self, views=views)

  def ballots(self, voted: Sequence[Voter], c: Any) -> list[Ballot]:
    """One task's voters, weighed by how sure each is here and by how much its view tells anywhere.

    Args:
      voted: the task's voters.
      c: fields view_temperature and entropy_temperature, in nats.
    """
    tells = self.views.weights([view.name for view, _ in voted], temperature=c.view_temperature)
    sure = lambda t: voting.entropy_weight(entropy(t), temperature=c.entropy_temperature)
    return [
      Ballot(answer=t.answer, weight=tells[view.name] * sure(t), view=view.name)
      for view, t in voted
    ]

  def vote(self, voted: Sequence[Voter], remembered: Sequence[Ballot], c: Any) -> Vote:
    """What the voters and the memory's ballots come to.

    Its confidence is its share times how far the voters are to be believed: those who agree on what
    they cannot see teach nothing. `trust_half` 0 believes all.

    Args:
      voted: the task's voters.
      remembered: ballots of similar experiences.
      c: fields rule and trust_half, and those of `ballots`.
    """
    vote = voting.RULES[c.rule]([*self.ballots(voted, c), *remembered], self.prior)
    if not c.trust_half:
      return vote
    trust = self.views.trust([view.name for view, _ in voted], half=c.trust_half)
    return dataclasses.replace(vote, confidence=vote.share * trust)

  def voted(self, voted: Sequence[Voter]) -> "History":
    """After one request, as far as it concerns which answers come up."""
    ballots = [Ballot(answer=t.answer, weight=1.0, view=view.name) for view, t in voted]
    return dataclasses.replace(self, prior=self.prior.update(voting.majority(ballots).counts))

  def to_dict(self) -> dict[str, Any]:
    """Plain values that `from_dict` takes back; JSON can hold them."""
    return {"prior": self.prior.to_dict(), "views": self.views.to_dict()}

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "History":
    prior, views = voting.AnswerPrior(**values["prior"]), Information.from_dict(values["views"])
    return cls(prior=prior, views=views)


@dataclasses.dataclass(frozen=True)
class Answerer:
  """The serving path. `reference` casts the votes; it never learns, so no vote can chase itself."""

  c: Any
  policy: sampler.Policy  # Its parameters are the reference.
  published: Published
  memory: Memory | None  # None where another process, the first, has it.

  def __call__(
    self,
    tasks: Sequence[Task],
    key: PRNGKeyArray,
    history: History,
    keys: Float32[np.ndarray, "N E"] | None = None,
  ) -> tuple[list[Experience], History]:
    """Answers the tasks, none of which may carry a label; the history after them.

    `keys` are unit vectors to remember the tasks by; the reference makes them where there are none.
    """
    labelled = [t.id for t in tasks if t.answer is not None or t.boxes]
    if labelled:
      raise ValueError(f"task {labelled[0]!r} carries a label: drop labels before the online loop")
    version, params = self.published.latest()
    own = cluster.split(len(tasks))
    mine = tasks[own.start : own.stop]
    groups = self.sample(mine, params, key, version, first=own.start)
    voters = self.voters(mine, groups)
    if keys is None:
      keys = sampler.embed(self.policy, mine, [group[0][1].steps for group in voters])
      keys = np.concatenate(cluster.everyone(keys))
    groups, voters = self._exchanged(groups, voters)
    votes, history = cluster.told(lambda: self._votes(tasks, voters, keys, history))
    experiences = [
      Experience(
        id=task.id, key=vector, trajectories=tuple(group), vote=vote, policy_version=version
      )
      for task, group, vote, vector in zip(tasks, groups, votes, keys, strict=True)
    ]
    return experiences, history

  def _votes(
    self,
    tasks: Sequence[Task],
    voters: Sequence[Sequence[Voter]],
    keys: Float32[np.ndarray, "N E"],
    history: History,
  ) -> tuple[list[Vote], History]:
    """The votes on these tasks, and the history after them."""
    history = history.heard(tasks, voters)
    votes = []
    for task, voted, vector in zip(tasks, voters, keys, strict=True):
      votes.append(history.vote(voted, self._remembered(task, vector), self.c.vote))
      history = history.voted(voted)
    return votes, history

  def _exchanged(
    self, groups: list[list[Trajectory]], voters: list[list[Voter]]
  ) -> tuple[list[list[Trajectory]], list[list[Voter]]]:
    """What each process's tasks were given, as that of all tasks; of voters what they said."""
    if jax.process_count() == 1:
      return groups, voters
    mine = [trajectory for group in groups for trajectory in group]
    played = exchange.trajectories(mine, self.policy.chat.patches)
    heard = [[(view, exchange.said(t)) for view, t in voted] for voted in voters]
    heard = [voted for part in cluster.everyone(heard) for voted in part]
    return _grouped(played, self.c.samples), heard

  def sample(
    self,
    tasks: Sequence[Task],
    params: learner.Params,
    key: PRNGKeyArray,
    version: int,
    first: int = 0,
  ) -> list[list[Trajectory]]:
    """`samples` episodes of each task by the policy with these parameters.

    `first` is the number of the first task, which its draws come from.
    """
    c, how = self.c, {"version": version, "temperature": self.c.temperature}
    generate = self.policy.sampler.bind(params, key=key, first=first * c.samples, **how)
    played = self._play([task for task in tasks for _ in range(c.samples)], generate, None)
    return _grouped(played, c.samples)

  def _play(self, tasks, generate, views) -> list[Trajectory]:
    limits = agent.Limits(**self.c.limits)
    run = self.policy.tools.run
    return agent.play(tasks, generate=generate, run=run, limits=limits, views=views)

  def voters(
    self, tasks: Sequence[Task], groups: Sequence[Sequence[Trajectory]]
  ) -> list[list[Voter]]:
    """Each task's voters: a reference episode a view, or the samples in `groups`.

    A task that shows nothing cannot be looked at in other ways: its samples vote.
    """
    if self.c.vote.voters == "samples":
      return [[(IDENTITY, t) for t in group] for group in groups]
    if self.c.vote.voters != "views":
      raise ValueError(f"vote.voters {self.c.vote.voters!r} must be 'views' or 'samples'")
    views = [views_for(task.kind) if task.images or task.videos else () for task in tasks]
    pairs = [(task, view) for task, seen in zip(tasks, views, strict=True) for view in seen]
    generate = self.policy.sampler.bind(
      self.policy.params, key=jax.random.key(0), version=0, temperature=0.0
    )
    played = iter(self._play([task for task, _ in pairs], generate, [view for _, view in pairs]))
    looked = [[(view, next(played)) for view in seen] for seen in views]
    return [
      voted or [(IDENTITY, t) for t in group] for voted, group in zip(looked, groups, strict=True)
    ]

  def _remembered(self, task: Task, key: np.ndarray) -> list[Ballot]:
    """The nearest experiences of the kind vote with their similarity times their confidence."""
    c = self.c.memory
    if not c.weight:
      return []
    near = self.memory.search(key, c.k, exclude=(task.id,))
    return [
      Ballot(
        answer=n.answer,
        weight=c.weight
        * n.confidence
        * voting.similarity_weight(n.similarity, bandwidth=c.bandwidth),
        view="memory",
        source=n.id,
      )
      for n in near
      if n.kind == task.kind and n.answer is not None
    ]


def _grouped(played: Sequence[Trajectory], size: int) -> list[list[Trajectory]]:
  """So many in a row as one group."""
  return [list(played[at : at + size]) for at in range(0, len(played), size)]


def entropy(trajectory: Trajectory) -> float:
  """How unsure the answer is: nats over the last turn."""
  return float(trajectory.steps[-1].completion.entropies.sum())


@dataclasses.dataclass(frozen=True)
class Probe:
  """The original domain, fixed at the start and unlabelled: what must not be forgotten.

  `rehearsed` are the reference's own episodes, held by KL in each update; `expected` are its greedy
  answers to `canary`, which what is published has to keep giving.
  """

  rehearsed: tuple[Trajectory, ...]
  canary: tuple[Task, ...]
  expected: tuple[str | None, ...]

  def agreement(self, answers: Sequence[str | None]) -> float:
    """The share of canary answers that mean what the reference's did."""
    same = [
      answer is not None and equal(answer, e)
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

  The step does not donate: an update may be refused, and then the old state stands.
  """

  def __init__(
    self, c: Any, policy: sampler.Policy, published: Published, probe: Probe, workdir: Path
  ):
    """Restores what was last published from `workdir`, and publishes it."""
    self.c, self.policy, self.published, self.probe = c, policy, published, probe
    model, o = policy.model, c.learn
    # Adam's first steps are all of full size, whatever the gradients say: they start small.
    rate = optax.linear_schedule(o.lr / o.warmup, o.lr, o.warmup - 1)
    tx = learner.adamw(o, rate, freeze=o.freeze)
    loss = learner.grpo_loss(model, Objective(**o.loss))
    self.step = learner.make_step(learner.frozen(loss, o.freeze), tx, donate=False)
    self.logps = learner.make_logps(model)
    self.state = learner.init_state(policy.params, tx, seed=c.seed)
    self.average = policy.params
    self.kl = AdaptiveKl(coef=c.kl.coef, target=c.kl.target, horizon=c.kl.horizon)
    self.applied = self.refused = 0
    self.unpublished = 0  # Updates applied since what is served now.
    self.learned: str | None = None  # The id of the last experience read.
    self.taught = voting.AnswerPrior(decay=c.vote.decay)  # Answers of the experiences read.
    self.latest_kl = 0.0
    self.checkpoints = Checkpoints(workdir / FOLDER, keep=c.keep)
    if restored := self.checkpoints.restore({"state": self.state, "average": self.average}):
      tree, extra = restored
      self.state, self.average = tree["state"], tree["average"]
      self.kl = dataclasses.replace(self.kl, coef=extra["kl_coef"])
      self.applied, self.refused = extra["applied"], extra["refused"]
      self.learned = extra["learned"]
      self.taught = voting.AnswerPrior(**extra["taught"])
      published.publish(self.updates, self.average)
    self.stable = (self.state, self.average)  # What is served now.
    self.metrics = Metrics(workdir / "learn", resume=self.updates)

  @property
  def updates(self) -> int:
    """Batches read so far, applied or refused."""
    return self.applied + self.refused

  def signals(self) -> dict[str, float]:
    """For a progress display."""
    return {"kl": self.latest_kl, "updates_applied": float(self.applied)}

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
    started = time.monotonic()
    measured = self.update(taken)
    self.learned = taken[-1].id
    if self.updates % self.c.learn.publish_every == 0:
      measured |= self.publish()
    counts = {"updates_applied": float(self.applied), "updates_refused": float(self.refused)}
    seconds = {"learn_seconds": time.monotonic() - started}
    self.metrics.log(self.updates, {**measured, **counts, **seconds})

  def close(self) -> None:
    """Releases the log and the checkpoint threads."""
    self.metrics.close()
    self.checkpoints.close()

  def update(self, taken: Sequence[Experience]) -> dict[str, float]:
    """One step on what was sampled, towards what was voted; refused if it leaves the KL guard."""
    c = self.c.learn
    targets = np.array(
      [[rewards.agreement(t, e.vote.answer) for t in e.trajectories] for e in taken], np.float32
    )
    lengths = batch.sampled_tokens([e.trajectories for e in taken])
    pushes = advantages.advantages(targets, lengths, adv_estimator=c.adv_estimator)
    kept = advantages.keep_groups(targets)
    measured = {"agreement": float(targets.mean()), "zero_variance": 1.0 - float(kept.mean())}
    if targets.all():
      self.refused += 1  # Nothing to learn.
      return measured
    rows = [*self._pushing(taken, targets, pushes), *self._rehearsing()]
    packed = sharding.put_rows(self._pack(rows), self.policy.model.mesh)
    packed = packed.replace(ref_logps=self.logps(self.policy.params, packed.inputs))
    proposed, update = self.step(self.state, packed, jnp.float32(self.kl.coef))
    after = float(_pushing_kl(self.logps(proposed.params, packed.inputs), packed))
    before = float(update["kl"])
    self.kl = self.kl.update(after) if np.isfinite(after) else self.kl
    if not np.isfinite(after) or (after > self.c.kl.limit and after > before):
      self.refused += 1
    else:
      self.applied += 1
      self.unpublished += 1
      self.latest_kl = after
      self.state = proposed
      self.average = _average(self.average, proposed.params, c.ema)
    kl = {"kl": after, "kl_coef": self.kl.coef}
    return {**measured, **{k: float(v) for k, v in update.items()}, **kl}

  def publish(self) -> dict[str, float]:
    """Serves the averaged parameters if the canary agrees, else goes back to the last that did."""
    played = _share(self.c, self.policy, self.average, self.probe.canary, temperature=0.0)
    score = self.probe.agreement(_answers(played))
    if score < 1.0 - self.c.probe.tolerance:
      self.state, self.average = self.stable
      self.applied -= self.unpublished
      self.refused += self.unpublished
      self.kl = dataclasses.replace(self.kl, coef=min(2 * self.kl.coef, self.kl.high))
    self.unpublished = 0
    self.stable = (self.state, self.average)
    extra = {
      "kl_coef": self.kl.coef,
      "applied": self.applied,
      "refused": self.refused,
      "learned": self.learned,
      "taught": self.taught.to_dict(),
    }
    version = self.updates
    self.checkpoints.save(version, {"state": self.state, "average": self.average}, extra)
    self.checkpoints.wait()  # On disk first, served second.
    self.published.publish(version, self.average)
    return {"canary": score, "policy_version": float(version)}

  def _pushing(
    self,
    taken: Sequence[Experience],
    targets: Float32[np.ndarray, "Q G"],
    pushes: Float32[np.ndarray, "Q G"],
  ) -> list[Weighted]:
    """What these experiences teach: their most telling samples, and corrections of these."""
    c, rows = self.c.learn, []
    for experience in taken:
      self.taught = self.taught.update({experience.vote.answer: 1.0})
    for experience, target_G, push_G in zip(taken, targets, pushes, strict=True):
      # What is asked most must not teach most: a skewed stream would make a skewed policy.
      weight = self.taught.balance(experience.vote.answer)
      chosen = advantages.contrast(target_G, c.contrast)
      samples = [experience.trajectories[i] for i in chosen]
      # Unanimous groups stay in, though all they do is be held by the KL: an update has one shape.
      for i, sample in zip(chosen, samples, strict=True):
        rows.append((batch.trajectory_row(sample), weight * float(push_G[i]), 1.0))
      push = weight * c.correction_weight * (1.0 - float(target_G.mean()))
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
    mine = fit[own.start : own.stop]
    return batch.pack_grpo(
      [row for row, *_ in mine],
      np.array([push for _, push, _ in mine], np.float32),
      model.config,
      max_tokens=c.max_tokens,
      multiple_of=math.lcm(c.rows_multiple, model.blocks) // jax.process_count(),
      blocks=sharding.own_blocks(model.mesh),
      kl_weights=np.array([held for *_, held in mine], np.float32),
    )


_average = jax.jit(learner.ema)
_pushing_kl = jax.jit(learner.pushing_kl)
