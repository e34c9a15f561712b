"""What requests so far say of the next one's vote: which answers come up, whose answers tell."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pixelis_jax.algo import voting
from pixelis_jax.algo.information import Information, Lead
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import Ballot, Task, Trajectory, Vote

Voter: TypeAlias = tuple[View, Trajectory]  # How it looked, and what it saw and said.

# What an old request keeps at each new one, in leads. They are of some 400, 200 and 70 requests, as
# who has little to be ahead by shows it in many only, and who sees best now has to show it soon;
# and of some 20: a lead from before what is asked changed must not be learned from after.
SPANS = (0.995, 0.99, 0.97, 0.9)
# Standard errors of a view's lead: chance takes one so far in 1 of 700, one of 14 in 1 of 50.
CLEARER = 3.0
# And of its lead over the last span: of one that is twice its error chance leaves less in 1 of 15.
LATELY = 0.5
# Of what `to_dict` gives; raised when that changes its shape.
FORM = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """What the requests so far say, without labels: which answers come up, whose answers tell.

  Attributes:
    prior: how often each answer comes up.
    views: what each view's answers tell.
    leads: over each of `SPANS`, by view, how much more they tell than the plain look's.
    surer: and how many nats less entropy they have than the plain look's.
  """

  prior: voting.AnswerPrior
  views: Information
  leads: tuple[Mapping[str, Lead], ...] = ({},) * len(SPANS)
  surer: tuple[Mapping[str, Lead], ...] = ({},) * len(SPANS)

  @classmethod
  def start(cls, c: Any) -> "History":
    """Before any request."""
    views = Information(decay=c.view_decay, vote_decay=c.decay)
    return cls(prior=voting.AnswerPrior(decay=c.decay), views=views)

  def heard(self, tasks: Sequence[Task], voters: Sequence[Sequence[Voter]], c: Any) -> "History":
    """After these requests, as far as it concerns what each view tells.

    Args:
      tasks: what was asked.
      voters: of each task.
      c: fields verifier, and those of `ballots`.
    """
    views, leads, surer = self.views, self.leads, self.surer
    for task, voted in zip(tasks, voters, strict=True):
      said = [(view.name, t.answer, entropy(t)) for view, t in voted]
      cast = voting.clustered(self.ballots(voted, c), verifier=c.verifier)
      vote = voting.entropy_weighted(cast).answer
      views = views.update(task.kind, said, vote)
      tells = [(name, views.tells(task.kind, name, answer, nats)) for name, answer, nats in said]
      weight = views.balance(task.kind, vote)
      leads = _over_plain(leads, tells, weight=weight)
      surer = _over_plain(surer, [(name, -nats) for name, _, nats in said])
    return dataclasses.replace(self, views=views, leads=leads, surer=surer)

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

    Its confidence is the rule's times how far the voters are to be believed: those who agree on
    what they cannot see teach nothing. `trust_half` 0 believes all; so is a memory that votes
    alone, as each of its ballots weighs what its vote was believed.

    Args:
      voted: the task's voters.
      remembered: ballots of similar experiences.
      c: fields rule, verifier and trust_half, and those of `ballots`.
    """
    if c.rule not in voting.RULES:
      raise ValueError(f"vote.rule {c.rule!r} must be one of {list(voting.RULES)}")
    cast = voting.clustered([*self.ballots(voted, c), *remembered], verifier=c.verifier)
    vote = voting.RULES[c.rule](cast, self.prior)
    if not (c.trust_half and voted):
      return vote
    trust = self.views.trust([view.name for view, _ in voted], half=c.trust_half)
    return dataclasses.replace(vote, confidence=vote.confidence * trust)

  def clearer(
    self, voted: Sequence[Voter], vote: Vote, c: Any
  ) -> tuple[Trajectory, Trajectory] | None:
    """`Experience.looks`: of the views that said what was voted the heaviest, if it is clearer.

    It is where it told more than the plain look by `CLEARER` standard errors, or was surer by as
    many and told no less: which view is right on one request is also a matter of luck, as is which
    tells most on a few. That is over any of the longer `SPANS`; over the last, by `LATELY`.
    Where most answers are the same there is little to tell, however requests are weighed, and who
    sees best is but surer; who is surer and tells less says what it always says.

    Args:
      voted: the task's voters.
      vote: `self.vote` on them.
      c: field verifier.
    """
    plain = next((t for view, t in voted if view == IDENTITY), None)
    heard = voting.strongest(vote, verifier=c.verifier)
    if plain is None or heard is None:
      return None
    view, clear = voted[heard]

    def ahead(span: int, errors: float) -> bool:
      # The plain look has no lead over itself.
      lead, surer = (of[span].get(view.name, Lead()).errors for of in (self.leads, self.surer))
      return lead >= errors or (surer >= errors and lead >= 0)

    *long, last = range(len(SPANS))
    clearer = any(ahead(span, CLEARER) for span in long) and ahead(last, LATELY)
    return (plain, clear) if clearer else None

  def voted(self, voted: Sequence[Voter]) -> "History":
    """After one request, as far as it concerns which answers come up."""
    ballots = [Ballot(answer=t.answer, weight=1.0, view=view.name) for view, t in voted]
    return dataclasses.replace(self, prior=self.prior.update(voting.majority(ballots).counts))

  def to_dict(self) -> dict[str, Any]:
    """Plain values that `from_dict` takes back; JSON can hold them."""
    kept = lambda spans: [
      {name: dataclasses.asdict(lead) for name, lead in leads.items()} for leads in spans
    ]
    over = {"leads": kept(self.leads), "surer": kept(self.surer)}
    return {
      "form": FORM,
      "prior": self.prior.to_dict(),
      "views": self.views.to_dict(),
      **over,
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
    return cls(prior=prior, views=views, **over)


def entropy(trajectory: Trajectory) -> float:
  """How unsure the answer is: nats over the last turn."""
  return float(trajectory.steps[-1].completion.entropies.sum())


def _over_plain(
  spans: Sequence[Mapping[str, Lead]],
  found: Sequence[tuple[str, float]],
  *,
  weight: float = 1.0,
) -> tuple[Mapping[str, Lead], ...]:
  """The leads after a request on which each voter, named by its view, has so many nats."""
  of = collections.defaultdict(list)
  for name, nats in found:
    of[name].append(nats)
  plain = of.pop(IDENTITY.name, None)
  if plain is None:
    return tuple(spans)
  more = {name: statistics.fmean(nats) - statistics.fmean(plain) for name, nats in of.items()}

  def after(leads: Mapping[str, Lead], decay: float) -> Mapping[str, Lead]:
    add = lambda name, nats: leads.get(name, Lead()).add(nats, decay=decay, weight=weight)
    return {**leads, **{name: add(name, nats) for name, nats in more.items()}}

  return tuple(after(leads, decay) for leads, decay in zip(spans, SPANS, strict=True))
