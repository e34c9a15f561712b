"""What requests so far say of the next one's vote: which answers come up, whose answers tell.

And of that of earlier ones: who sees clearer shows late where most answers are alike, and what was
asked before is then judged again by what is known now.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from pixelis_jax.algo import changes, voting
from pixelis_jax.algo.information import Information, Lead
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import Ballot, Task, Trajectory, Vote

# What an old request keeps at each new one, in leads. They are of some 400, 200 and 70 requests, as
# who has little to be ahead by shows it in many only, and who sees best now has to show it soon;
# and of some 20: a lead from before what is asked changed must not be learned from after.
SPANS = (0.995, 0.99, 0.97, 0.9)
# Standard errors of a view's lead: chance takes one so far in 1 of 700, one of 14 in 1 of 50.
CLEARER = 3.0
# And of its lead over the last span: of one that is twice its error chance leaves less in 1 of 15.
LATELY = 0.5
# Where the latest requests began to be as they are now is looked for by this one's mean lead.
_NOW = 2
# Of what `to_dict` gives; raised when that changes its shape.
FORM = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
  """What a voter said, looking in the way of this name: all that a vote needs of its episode.

  `nats` is how unsure the answer was: the entropy of the last turn.
  """

  view: str
  answer: str | None
  nats: float

  @classmethod
  def of(cls, view: str, played: Trajectory) -> "Said":
    return cls(view, played.answer, float(played.steps[-1].completion.entropies.sum()))


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
  """One of the latest requests.

  Attributes:
    id: of the request, and its experience.
    kind: of the question.
    said: what its voters said.
    voted: what that came to.
    open: whether its vote was for no clearer view, and it was not judged again yet.
  """

  id: str
  kind: str
  said: tuple[Said, ...]
  voted: str | None
  open: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """What the requests so far say, without labels: which answers come up, whose answers tell.

  Attributes:
    prior: how often each answer comes up.
    views: what each view's answers tell.
    leads: over each of `SPANS`, by view, how much more they tell than the plain look's.
    surer: and how many nats less entropy they have than the plain look's.
    latest: requests, the oldest first.
  """

  prior: voting.AnswerPrior
  views: Information
  leads: tuple[Mapping[str, Lead], ...] = ({},) * len(SPANS)
  surer: tuple[Mapping[str, Lead], ...] = ({},) * len(SPANS)
  latest: tuple[Asked, ...] = ()

  @classmethod
  def start(cls, c: Any) -> "History":
    """Before any request."""
    views = Information(decay=c.view_decay, vote_decay=c.decay)
    return cls(prior=voting.AnswerPrior(decay=c.decay), views=views)

  def heard(self, tasks: Sequence[Task], voters: Sequence[Sequence[Said]], c: Any) -> "History":
    """After these requests, as far as it concerns what each view tells.

    Args:
      tasks: what was asked.
      voters: of each task, what they said.
      c: fields verifier, and those of `ballots`.
    """
    views, leads, surer = self.views, self.leads, self.surer
    for task, said in zip(tasks, voters, strict=True):
      cast = voting.clustered(self.ballots(said, c), verifier=c.verifier)
      vote = voting.entropy_weighted(cast).answer
      views = views.update(task.kind, [(s.view, s.answer, s.nats) for s in said], vote)
      more, weight = _over_plain(said, _told(views, task.kind)), views.balance(task.kind, vote)
      leads = _after(leads, more, weight=weight)
      surer = _after(surer, _over_plain(said, _sure))
    return dataclasses.replace(self, views=views, leads=leads, surer=surer)

  def ballots(self, said: Sequence[Said], c: Any) -> list[Ballot]:
    """One task's voters, weighed by how sure each is here and by how much its view tells anywhere.

    Args:
      said: by the task's voters.
      c: fields view_temperature and entropy_temperature, in nats.
    """
    tells = self.views.weights([s.view for s in said], temperature=c.view_temperature)
    sure = lambda s: voting.entropy_weight(s.nats, temperature=c.entropy_temperature)
    return [Ballot(answer=s.answer, weight=tells[s.view] * sure(s), view=s.view) for s in said]

  def vote(self, said: Sequence[Said], remembered: Sequence[Ballot], c: Any) -> Vote:
    """What the voters and the memory's ballots come to.

    Its confidence is the rule's times how far the voters are to be believed: those who agree on
    what they cannot see teach nothing. `trust_half` 0 believes all; so is a memory that votes
    alone, as each of its ballots weighs what its vote was believed.

    Args:
      said: by the task's voters.
      remembered: ballots of similar experiences.
      c: fields rule, verifier and trust_half, and those of `ballots`.
    """
    if c.rule not in voting.RULES:
      raise ValueError(f"vote.rule {c.rule!r} must be one of {list(voting.RULES)}")
    cast = voting.clustered([*self.ballots(said, c), *remembered], verifier=c.verifier)
    vote = voting.RULES[c.rule](cast, self.prior)
    if not (c.trust_half and said):
      return vote
    trust = self.views.trust([s.view for s in said], half=c.trust_half)
    return dataclasses.replace(vote, confidence=vote.confidence * trust)

  def clearer(self, said: Sequence[Said], vote: Vote, c: Any) -> str | None:
    """Of the views that said what was voted the heaviest, if it is clearer than the plain look.

    It is where it told more than the plain look by `CLEARER` standard errors, or was surer by as
    many and told no less: which view is right on one request is also a matter of luck, as is which
    tells most on a few. That is over any of the longer `SPANS`; over the last, by `LATELY`.
    Where most answers are the same there is little to tell, however requests are weighed, and who
    sees best is but surer; who is surer and tells less says what it always says.

    Args:
      said: by the task's voters.
      vote: `self.vote` on that.
      c: field verifier.
    """
    heard = voting.strongest(vote, verifier=c.verifier)
    if heard is None or not any(s.view == IDENTITY.name for s in said):
      return None
    view = said[heard].view
    return view if self._ahead(view) else None

  def _ahead(self, view: str) -> bool:
    """Whether this view is clearer than the plain look: see `clearer`."""

    def ahead(span: int, errors: float) -> bool:
      # The plain look has no lead over itself.
      lead, surer = (of[span].get(view, Lead()).errors for of in (self.leads, self.surer))
      return lead >= errors or (surer >= errors and lead >= 0)

    *long, last = range(len(SPANS))
    return any(ahead(span, CLEARER) for span in long) and ahead(last, LATELY)

  def voted(self, said: Sequence[Said]) -> "History":
    """After one request, as far as it concerns which answers come up."""
    ballots = [Ballot(answer=s.answer, weight=1.0, view=s.view) for s in said]
    return dataclasses.replace(self, prior=self.prior.update(voting.majority(ballots).counts))

  def kept(
    self,
    tasks: Sequence[Task],
    voters: Sequence[Sequence[Said]],
    votes: Sequence[Vote],
    clearer: Sequence[str | None],
    *,
    most: int,
  ) -> "History":
    """With these as the latest requests, of which `most` are kept.

    Args:
      tasks: what was asked.
      voters: of each task, what they said.
      votes: what that came to.
      clearer: the view that is clearer on each, if one is.
      most: how many in all.
    """
    asked = [
      Asked(task.id, task.kind, tuple(said), vote.answer, open=view is None)
      for task, said, vote, view in zip(tasks, voters, votes, clearer, strict=True)
    ]
    latest = (*self.latest, *asked)
    return dataclasses.replace(self, latest=latest[max(len(latest) - most, 0) :])

  def settled(self, ids: Collection[str]) -> "History":
    """After these were judged again."""
    after = lambda asked: dataclasses.replace(asked, open=asked.open and asked.id not in ids)
    return dataclasses.replace(self, latest=tuple(map(after, self.latest)))

  def again(self, c: Any, passes: Callable[[Vote], bool]) -> Iterator[Asked]:
    """Requests whose votes were for no clearer view then, and are for one by what is known now.

    The latest come first. They go as far back as requests are like those of now (`changes.since`):
    by how far the view is ahead of the plain look in what it tells, and in how sure it is, where it
    is ahead at all. What it says of another domain's pictures is not to be learned from, however
    sure it is.

    Args:
      c: as `vote` has it.
      passes: whether a vote may be learned from.
    """
    views = {s.view for asked in self.latest if asked.open for s in asked.said}
    since = {view: self._since(view) for view in views if self._ahead(view)}
    first = min(since.values(), default=len(self.latest))
    for at in reversed(range(first, len(self.latest))):
      asked = self.latest[at]
      if not asked.open:
        continue
      vote = self.vote(asked.said, (), c)
      view = self.clearer(asked.said, vote, c)
      if view is not None and at >= since[view] and passes(vote):
        yield asked

  def _since(self, view: str) -> int:
    """From which of the latest requests on they are like those of now, by this view's leads."""
    at, tells, surer, weights = [], [], [], []
    for i, asked in enumerate(self.latest):
      said = [s for s in asked.said if s.view in (view, IDENTITY.name)]
      more = _over_plain(said, _told(self.views, asked.kind))
      if view in more:
        at.append(i)
        tells.append(more[view])
        surer.append(_over_plain(said, _sure)[view])
        weights.append(self.views.balance(asked.kind, asked.voted))
    # As the leads are counted: what is told by its weight, how sure it is of each alike.
    told, sure = (of[_NOW].get(view, Lead()).mean for of in (self.leads, self.surer))
    ways = ((tells, told, weights), (surer, sure, None))
    first = max((changes.since(*way) for way in ways if way[1] > 0), default=len(at))
    return at[first] if first < len(at) else len(self.latest)

  def to_dict(self) -> dict[str, Any]:
    """Plain values that `from_dict` takes back; JSON can hold them."""
    kept = lambda spans: [
      {name: dataclasses.asdict(lead) for name, lead in leads.items()} for leads in spans
    ]
    return {
      "form": FORM,
      "prior": self.prior.to_dict(),
      "views": self.views.to_dict(),
      "leads": kept(self.leads),
      "surer": kept(self.surer),
      # By hand: there are thousands of voters, and `dataclasses` takes its time with each.
      "latest": [
        [a.id, a.kind, [[s.view, s.answer, s.nats] for s in a.said], a.voted, a.open]
        for a in self.latest
      ],
    }

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "History":
    """Raises ValueError for what another version of this module wrote in another form."""
    if values.get("form") != FORM:
      raise ValueError(
        f"the history is of form {values.get('form')}, written by another version of pixelis_jax;"
        f" this one reads form {FORM}: start in a new workdir"
      )
    prior, views = voting.AnswerPrior(**values["prior"]), Information.from_dict(values["views"])
    over = {
      field: tuple({name: Lead(**lead) for name, lead in leads.items()} for leads in values[field])
      for field in ("leads", "surer")
    }
    latest = tuple(
      Asked(id, kind, tuple(Said(*one) for one in said), voted, open)
      for id, kind, said, voted, open in values["latest"]
    )
    return cls(prior=prior, views=views, **over, latest=latest)


def _told(views: Information, kind: str) -> Callable[[Said], float]:
  """Nats that a voter's answer to a question of this kind tells."""
  return lambda said: views.tells(kind, said.view, said.answer, said.nats)


def _sure(said: Said) -> float:
  """How sure an answer is, so that more is surer."""
  return -said.nats


def _over_plain(said: Sequence[Said], nats: Callable[[Said], float]) -> dict[str, float]:
  """By how many nats each view is ahead of the plain look on one request; of none without one."""
  of = collections.defaultdict(list)
  for one in said:
    of[one.view].append(nats(one))
  plain = of.pop(IDENTITY.name, None)
  if plain is None:
    return {}
  return {view: statistics.fmean(mine) - statistics.fmean(plain) for view, mine in of.items()}


def _after(
  spans: Sequence[Mapping[str, Lead]], more: Mapping[str, float], *, weight: float = 1.0
) -> tuple[Mapping[str, Lead], ...]:
  """The leads after a request on which views were so many nats ahead."""

  def after(leads: Mapping[str, Lead], decay: float) -> Mapping[str, Lead]:
    add = lambda view, nats: leads.get(view, Lead()).add(nats, decay=decay, weight=weight)
    return {**leads, **{view: add(view, nats) for view, nats in more.items()}}

  return tuple(after(leads, decay) for leads, decay in zip(spans, SPANS, strict=True))
