"""Test-time RL, the path that serves: a request is answered, and voted on, and nothing waits.

`Answerer` reads the published parameters; what it returns is remembered and learned from elsewhere
(ttrl.py). Labels cannot reach either: it refuses a task that carries one.

Of several processes each plays its share of the requests; the first counts the votes over what all
said and tells them, and all hold the same experiences.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Float32, PRNGKeyArray

from pixelis_jax import agent, cluster, exchange, sampler
from pixelis_jax.algo import voting
from pixelis_jax.algo.calibration import Calibration
from pixelis_jax.handover import Params, Published
from pixelis_jax.history import History, Said
from pixelis_jax.memory.store import Memory
from pixelis_jax.tools.views import BY_NAME, IDENTITY, View, views_for
from pixelis_jax.types import Ballot, Experience, Task, Trajectory, Vote

T = TypeVar("T")
VOTERS = ("views", "samples", "memory")
Voter: TypeAlias = tuple[View, Trajectory]  # How it looked, and what it saw and said.
Looks: TypeAlias = tuple[Trajectory, Trajectory]  # `Experience.looks`.


@dataclasses.dataclass(frozen=True)
class Answerer:
  """The serving path. `reference` casts the votes; it never learns, so no vote can chase itself."""

  c: Any
  policy: sampler.Policy  # Its parameters are the reference.
  published: Published
  memory: Memory | None  # None where another process, the first, has it.
  calibration: Calibration | None = None  # From how far votes are believed to how often they hold.

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
      seen = [[*(t for _, t in v), *g][0].steps for v, g in zip(voters, groups, strict=True)]
      keys = np.concatenate(cluster.everyone(sampler.embed(self.policy, mine, seen)))
    groups, said = self._exchanged(groups, voters)
    votes, history = cluster.told(lambda: self._votes(tasks, said, keys, history))
    clear = [history.clearer(s, v, self.c.vote) for s, v in zip(said, votes, strict=True)]
    looks = self._looks(voters, clear[own.start : own.stop])
    experiences = [
      Experience(
        id=task.id,
        key=vector,
        trajectories=tuple(group),
        vote=vote,
        policy_version=version,
        looks=look,
      )
      for task, group, vote, vector, look in zip(tasks, groups, votes, keys, looks, strict=True)
    ]
    most = self.c.hindsight if self.c.gate.clearer else 0
    return experiences, history.kept(tasks, said, votes, clear, most=most)

  def again(
    self, history: History, new: Sequence[Experience] = ()
  ) -> tuple[list[Experience], History]:
    """Earlier requests that a view is clearer for by now, judged again; the history after that.

    As many at once as arrive together, and each once. What was sampled then stays, with the vote of
    now, and with looks, which the reference takes again: it does not learn, and takes the same.
    What is `new` was judged by what is known now, and is not in the memory yet. Where there was
    nothing to judge the history is the same object.
    """
    bounds, just = functools.partial(passes, seen=True, c=self.c.gate), {e.id for e in new}
    earlier = (asked for asked in history.again(self.c.vote, bounds) if asked.id not in just)
    found = {asked.id: asked for asked in itertools.islice(earlier, self.c.arrivals)}
    if not found:
      return [], history
    process = self.policy.chat.patches
    old = exchange.experiences(lambda: self.memory.recall([*found], process), process)
    tasks, said = [e.trajectories[0].task for e in old], [found[e.id].said for e in old]
    keys = [e.key for e in old]
    vote = lambda: [
      self._vote(*request, history) for request in zip(tasks, said, keys, strict=True)
    ]
    votes = cluster.told(vote)
    clear = [history.clearer(s, v, self.c.vote) for s, v in zip(said, votes, strict=True)]
    passing = [
      (dataclasses.replace(e, vote=v), view)
      for e, v, view in zip(old, votes, clear, strict=True)
      if view is not None and passes(v, seen=True, c=self.c.gate)
    ]
    own = cluster.split(len(passing))
    mine = passing[own.start : own.stop]
    pairs = [
      (e.trajectories[0].task, seen) for e, view in mine for seen in (IDENTITY, BY_NAME[view])
    ]
    views = [view for _, view in pairs]
    saw = _grouped([*zip(views, self._looked(pairs), strict=True)], 2)
    looks = self._looks(saw, [view for _, view in mine])
    experiences = [
      dataclasses.replace(e, looks=look) for (e, _), look in zip(passing, looks, strict=True)
    ]
    return experiences, history.settled(found.keys())

  def _votes(
    self,
    tasks: Sequence[Task],
    said: Sequence[Sequence[Said]],
    keys: Float32[np.ndarray, "N E"],
    history: History,
  ) -> tuple[list[Vote], History]:
    """The votes on these tasks, and the history after them."""
    history = history.heard(tasks, said, self.c.vote)
    votes = []
    for task, voters, key in zip(tasks, said, keys, strict=True):
      votes.append(self._vote(task, voters, key, history))
      history = history.voted(voters)
    return votes, history

  def _vote(self, task: Task, said: Sequence[Said], key: np.ndarray, history: History) -> Vote:
    """By what the voters and the memory say, as far as that is believed."""
    vote = history.vote(said, self._remembered(task, key), self.c.vote)
    return self._guarded(self._calibrated(vote), task, key)

  def _looks(
    self, saw: Sequence[Sequence[Voter]], clear: Sequence[str | None]
  ) -> list[Looks | None]:
    """`Experience.looks` of all tasks, from what this process's voters saw and who is clearer."""
    first = lambda voted, name: next(played for view, played in voted if view.name == name)
    pairs = [
      (first(voted, IDENTITY.name), first(voted, name))
      for voted, name in zip(saw, clear, strict=True)
      if name is not None
    ]
    there = cluster.everyone([name is not None for name in clear])
    played = exchange.trajectories([t for pair in pairs for t in pair], self.policy.chat.patches)
    played = iter(_grouped(played, 2))
    return [tuple(next(played)) if one else None for part in there for one in part]

  def _exchanged(
    self, groups: list[list[Trajectory]], voters: list[list[Voter]]
  ) -> tuple[list[list[Trajectory]], list[list[Said]]]:
    """What each process's tasks were given, as that of all tasks; of voters what they said."""
    mine = [trajectory for group in groups for trajectory in group]
    played = exchange.trajectories(mine, self.policy.chat.patches)
    said = [[Said.of(view.name, t) for view, t in voted] for voted in voters]
    said = [voted for part in cluster.everyone(said) for voted in part]
    return _grouped(played, self.c.samples), said

  def sample(
    self,
    tasks: Sequence[Task],
    params: Params,
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
    """Each task's voters: a reference episode a view, the samples in `groups`, or both.

    A task that shows nothing cannot be looked at in other ways: its samples vote. Where the memory
    votes alone there are none.
    """
    named = self.c.vote.voters
    if not named or not set(named) <= set(VOTERS):
      raise ValueError(f"vote.voters {tuple(named)} must be some of {VOTERS}")
    sampled = [[(IDENTITY, t) for t in group] for group in groups]
    if "views" not in named:
      return sampled if "samples" in named else [[] for _ in groups]
    views = [views_for(task.kind) if task.images or task.videos else () for task in tasks]
    pairs = [(task, view) for task, seen in zip(tasks, views, strict=True) for view in seen]
    played = iter(self._looked(pairs))
    looked = [[(view, next(played)) for view in seen] for seen in views]
    if "samples" in named:
      return [[*voted, *own] for voted, own in zip(looked, sampled, strict=True)]
    return [voted or own for voted, own in zip(looked, sampled, strict=True)]

  def _looked(self, pairs: Sequence[tuple[Task, View]]) -> list[Trajectory]:
    """The reference's episode of each task, looking in this way: the same at any time."""
    generate = self.policy.sampler.bind(
      self.policy.params, key=jax.random.key(0), version=0, temperature=0.0
    )
    return self._play([task for task, _ in pairs], generate, [view for _, view in pairs])

  def _calibrated(self, vote: Vote) -> Vote:
    if self.calibration is None:
      return vote
    raw = vote.confidence
    return dataclasses.replace(vote, confidence=self.calibration(raw), uncalibrated=raw)

  def _guarded(self, vote: Vote, task: Task, key: np.ndarray) -> Vote:
    """Less believed where earlier visits to this question, or one as near, had other answers."""
    c = self.c.guard
    if not c.weight:
      return vote
    near = self.memory.search(key, c.visits, exclude=(task.id,))
    same = [n for n in near if n.similarity >= c.similarity and n.kind == task.kind]
    voted = {n.id: n.answer for n in same if n.answer is not None}
    before = [voted[id] for id in self.memory.in_order(voted)]
    return voting.guarded(vote, before, weight=c.weight, verifier=self.c.vote.verifier)

  def _remembered(self, task: Task, key: np.ndarray) -> list[Ballot]:
    """The nearest experiences of the kind vote with their similarity times their confidence."""
    c = self.c.memory
    if "memory" not in self.c.vote.voters:
      return []
    if not c.weight > 0:
      raise ValueError(f"memory.weight {c.weight} must be positive where the memory votes")
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


def passes(vote: Vote, *, seen: bool, c: Any) -> bool:
  """Whether the policy may learn from this vote: sure enough, and by who sees better.

  With `clearer` some view has to have told more than the plain look. Where none has, what the
  voters agree on the policy says itself, and their mistakes are its own.

  Args:
    vote: on a request.
    seen: whether a view is clearer there.
    c: the gate: `clearer`, and the bounds of `voting.gate`.
  """
  bounds = {name: bound for name, bound in c.items() if name != "clearer"}
  return (seen or not c.clearer) and voting.gate(vote, **bounds)


def _grouped(played: Sequence[T], size: int) -> list[list[T]]:
  """So many in a row as one group."""
  return [list(played[at : at + size]) for at in range(0, len(played), size)]
