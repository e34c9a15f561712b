"""Test-time RL, the path that serves: a request is answered, and voted on, and nothing waits.

`Answerer` reads the published parameters; what it returns is remembered and learned from elsewhere
(ttrl.py). Labels cannot reach either: it refuses a task that carries one.

Of several processes each plays its share of the requests; the first counts the votes over what all
said and tells them, and all hold the same experiences.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, PRNGKeyArray

from pixelis_jax import agent, cluster, exchange, sampler
from pixelis_jax.algo import voting
from pixelis_jax.algo.calibration import Calibration
from pixelis_jax.handover import Params, Published
from pixelis_jax.history import History, Voter
from pixelis_jax.memory.store import Memory
from pixelis_jax.tools.views import IDENTITY, views_for
from pixelis_jax.types import Ballot, Experience, Task, Trajectory, Vote

VOTERS = ("views", "samples", "memory")


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
    saw, (groups, voters) = voters, self._exchanged(groups, voters)
    votes, history = cluster.told(lambda: self._votes(tasks, voters, keys, history))
    looks = self._looks(saw, votes[own.start : own.stop], history)
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
    return experiences, history

  def _votes(
    self,
    tasks: Sequence[Task],
    voters: Sequence[Sequence[Voter]],
    keys: Float32[np.ndarray, "N E"],
    history: History,
  ) -> tuple[list[Vote], History]:
    """The votes on these tasks, and the history after them."""
    history = history.heard(tasks, voters, self.c.vote)
    votes = []
    for task, voted, vector in zip(tasks, voters, keys, strict=True):
      vote = history.vote(voted, self._remembered(task, vector), self.c.vote)
      votes.append(self._guarded(self._calibrated(vote), task, vector))
      history = history.voted(voted)
    return votes, history

  def _looks(
    self, saw: Sequence[Sequence[Voter]], votes: Sequence[Vote], history: History
  ) -> list[tuple[Trajectory, Trajectory] | None]:
    """`Experience.looks` of all tasks, from what this process's voters saw and what was voted."""
    pairs = zip(saw, votes, strict=True)
    found = [history.clearer(voted, vote, self.c.vote) for voted, vote in pairs]
    there = cluster.everyone([pair is not None for pair in found])
    played = [trajectory for pair in found for trajectory in pair or ()]
    played = iter(_grouped(exchange.trajectories(played, self.policy.chat.patches), 2))
    return [tuple(next(played)) if one else None for part in there for one in part]

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
    generate = self.policy.sampler.bind(
      self.policy.params, key=jax.random.key(0), version=0, temperature=0.0
    )
    played = iter(self._play([task for task, _ in pairs], generate, [view for _, view in pairs]))
    looked = [[(view, next(played)) for view in seen] for seen in views]
    if "samples" in named:
      return [[*voted, *own] for voted, own in zip(looked, sampled, strict=True)]
    return [voted or own for voted, own in zip(looked, sampled, strict=True)]

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


def _grouped(played: Sequence[Trajectory], size: int) -> list[list[Trajectory]]:
  """So many in a row as one group."""
  return [list(played[at : at + size]) for at in range(0, len(played), size)]
