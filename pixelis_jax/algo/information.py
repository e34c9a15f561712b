"""How much each voter's answers tell of what was asked, judged from unlabelled requests alone.

A voter that cannot read the pictures may still be sure of its answers: then it says the same ones
whatever it is shown, or is unsure. The mutual information between picture and answer is low in both
cases: the entropy of its answers over many requests minus the mean entropy of one of them (Bridle,
Heading and MacKay, "Unsupervised Classifiers, Mutual Information and 'Phantom Targets'", 1991; the
objective of SHOT, https://arxiv.org/abs/2002.08546).

Where most of what is asked has one answer, who sees that has little to tell, and who errs has more.
So requests weigh as if all answers that are voted were as frequent.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from pixelis_jax.algo import answers
from pixelis_jax.algo.voting import FORGET, AnswerPrior, check_fading


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
  """Weighted sums over some of one voter's requests of one kind; replaced, never changed.

  Attributes:
    asked: requests.
    entropy: nats, over requests with an answer: how unsure it was of each.
    counts: requests by canonical answer.
  """

  asked: float = 0.0
  entropy: float = 0.0
  counts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def times(self, weight: float) -> "Tally":
    """Of the same requests, each of which weighs so many times as much."""
    counts = {a: w * weight for a, w in self.counts.items() if w * weight >= FORGET}
    return Tally(asked=self.asked * weight, entropy=self.entropy * weight, counts=counts)

  def __add__(self, other: "Tally") -> "Tally":
    counts = dict(self.counts)
    for answer, weight in other.counts.items():
      counts[answer] = counts.get(answer, 0.0) + weight
    asked, entropy = self.asked + other.asked, self.entropy + other.entropy
    return Tally(asked=asked, entropy=entropy, counts=counts)

  def add(self, answer: str | None, entropy: float) -> "Tally":
    """One more request; an empty answer is none."""
    asked = self.asked + 1.0
    canonical = _canonical(answer)
    if not canonical:
      return dataclasses.replace(self, asked=asked)
    counts = {**self.counts, canonical: self.counts.get(canonical, 0.0) + 1.0}
    return Tally(asked=asked, entropy=self.entropy + entropy, counts=counts)

  def tells(self, answer: str | None, entropy: float) -> float:
    """Nats that this answer tells by how often it came up, itself counted; 0 of none.

    And 0 of one that was forgotten since: such a rare one would tell more than any other.
    """
    canonical = _canonical(answer)
    if canonical not in self.counts:
      return 0.0
    return math.log(math.fsum(self.counts.values()) / self.counts[canonical]) - entropy

  @property
  def told(self) -> float:
    """Nats told in all: 0 for requests without an answer; below 0 for a voter all but guessing."""
    total = math.fsum(self.counts.values())
    return -math.fsum(w * math.log(w / total) for w in self.counts.values()) - self.entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Information:
  """The tallies of all voters by name and kind of question; replaced, never changed.

  Attributes:
    tallies: voter -> kind -> canonical answer that was voted -> `Tally`. Kinds are kept apart: that
      questions of one kind get other answers than those of another tells nothing.
    voted: kind -> how often each answer is voted.
    decay: what an old request of a kind keeps at each new one; 0.99 remembers about 100.
    smoothing: requests before differences between voters count half.
    vote_decay: as `decay`, in `voted`. Who sees best may change from one request to the next; a
      memory as short does not know which answers are rare.
    vote_smoothing: `AnswerPrior.smoothing` of `voted`. 5 of each of ten answers, beside the 100
      that are remembered, would hide half of how unevenly they are voted.
  """

  tallies: Mapping[str, Mapping[str, Mapping[str, Tally]]] = dataclasses.field(default_factory=dict)
  voted: Mapping[str, AnswerPrior] = dataclasses.field(default_factory=dict)
  decay: float = 0.99
  smoothing: float = 16.0
  vote_decay: float = 0.99
  vote_smoothing: float = 1.0

  def __post_init__(self):
    check_fading(self.decay, self.smoothing)
    check_fading(self.vote_decay, self.vote_smoothing)

  def update(
    self, kind: str, voters: Iterable[tuple[str, str | None, float]], voted: str | None
  ) -> "Information":
    """After one request.

    Args:
      kind: of the question.
      voters: (name, answer, entropy in nats of the answer) of each; a name may come up repeatedly.
      voted: what they came to.
    """
    tallies = {name: dict(kinds) for name, kinds in self.tallies.items()}
    heard, result = set(), _canonical(voted)
    for name, answer, entropy in voters:
      if not 0 <= entropy < math.inf:
        raise ValueError(f"entropy {entropy} of voter {name!r} must be finite and not negative")
      kinds = tallies.setdefault(name, {})
      mine = kinds.get(kind, {})
      mine = dict(mine) if name in heard else {of: t.times(self.decay) for of, t in mine.items()}
      mine[result] = mine.get(result, Tally()).add(answer, entropy)
      kinds[kind] = {of: tally for of, tally in mine.items() if tally.asked >= FORGET}
      heard.add(name)
    unheard = AnswerPrior(decay=self.vote_decay, smoothing=self.vote_smoothing)
    often = self.voted.get(kind, unheard).update({result: 1.0})
    return dataclasses.replace(self, tallies=tallies, voted={**self.voted, kind: often})

  def balance(self, kind: str, voted: str | None) -> float:
    """What a request with this vote weighs, so that all that are voted weigh alike."""
    often = self.voted.get(kind)
    return often.balance(_canonical(voted)) if often else 1.0

  def tells(self, kind: str, name: str, answer: str | None, entropy: float) -> float:
    """Nats that an answer of a request that was heard tells: `Tally.tells` of this voter's."""
    return self._balanced(name, kind).tells(answer, entropy)

  def told(self, name: str) -> float:
    """Nats that an answer of this voter tells on average; 0 before any request."""
    return self._told.get(name, 0.0)

  def weights(self, names: Iterable[str], *, temperature: float) -> dict[str, float]:
    """Each voter's weight, 1 on average; a voter that tells `temperature` nats less has 1/e of it.

    Before there are many requests the weights are closer to 1; infinite temperature makes all 1.
    """
    if not temperature > 0:
      raise ValueError(f"temperature {temperature} must be positive")
    told = {name: self.told(name) for name in names}
    most = max(told.values(), default=0.0)
    # One factor for all, or a voter heard less often than others would gain by that.
    asked = max((self._asked(name) for name in told), default=0.0)
    sure = asked / (asked + self.smoothing)
    raw = {name: math.exp(sure * (told[name] - most) / temperature) for name in told}
    total = math.fsum(raw.values())
    return {name: len(raw) * weight / total for name, weight in raw.items()}

  def trust(self, names: Iterable[str], *, half: float) -> float:
    """How far to believe these voters at all, in [0, 1): m / (m + half), m what the best one tells.

    It is 0 where none tells anything, as where there is nothing to see, and 1/2 where the best
    tells `half` nats.
    """
    if not half > 0:
      raise ValueError(f"half {half} must be positive")
    most = max((self.told(name) for name in names), default=0.0)
    return max(most, 0.0) / (max(most, 0.0) + half)

  @functools.cached_property
  def _told(self) -> Mapping[str, float]:
    """By voter: one for all votes that are weighed by the same requests."""
    found = {}
    for name, kinds in self.tallies.items():
      balanced = [self._balanced(name, kind) for kind in kinds]
      asked = math.fsum(t.asked for t in balanced)
      found[name] = math.fsum(t.told for t in balanced) / asked if asked else 0.0
    return found

  def _asked(self, name: str) -> float:
    kinds = self.tallies.get(name, {}).values()
    return math.fsum(tally.asked for of in kinds for tally in of.values())

  def _balanced(self, name: str, kind: str) -> Tally:
    """All of a voter's requests of a kind, each weighing what its vote says."""
    of = self.tallies[name][kind].items()
    return sum((tally.times(self.balance(kind, voted)) for voted, tally in of), start=Tally())

  def to_dict(self) -> dict[str, object]:
    """Plain values that `from_dict` takes back; JSON can hold them."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping) -> "Information":
    tallies = {
      name: {
        kind: {voted: Tally(**tally) for voted, tally in of.items()} for kind, of in kinds.items()
      }
      for name, kinds in values.get("tallies", {}).items()
    }
    voted = {kind: AnswerPrior(**prior) for kind, prior in values.get("voted", {}).items()}
    return cls(**{**values, "tallies": tallies, "voted": voted})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
  """How many nats one voter is ahead of another, and how surely; replaced, never changed.

  The two are compared request by request: that one picture is harder than the next, or one answer
  rarer, counts for both alike and so not at all.

  Attributes:
    requests: decayed sum of the weights of those which both heard.
    squared: decayed sum of the squares of these weights.
    nats: decayed and weighted sum of how far the one was ahead.
    spread: decayed and weighted sum of the squares of that.
  """

  requests: float = 0.0
  squared: float = 0.0
  nats: float = 0.0
  spread: float = 0.0

  def add(self, nats: float, *, decay: float, weight: float = 1.0) -> "Lead":
    """One more request, on which the one was so many nats ahead."""
    return Lead(
      requests=self.requests * decay + weight,
      squared=self.squared * decay**2 + weight**2,
      nats=self.nats * decay + weight * nats,
      spread=self.spread * decay + weight * nats**2,
    )

  @property
  def mean(self) -> float:
    """The mean lead in nats; 0 before any request."""
    return self.nats / self.requests if self.requests else 0.0

  @property
  def errors(self) -> float:
    """The mean lead in its standard errors; 0 before any request.

    The variance is that of the requests and of one more that is a nat off the mean, or two alike
    would be certain.
    """
    if not self.requests:
      return 0.0
    variance = (self.spread - self.nats**2 / self.requests + 1.0) / self.requests
    return self.nats / math.sqrt(variance * self.squared)  # Of the sum, as of the mean.


def _canonical(answer: str | None) -> str:
  """Under which an answer is counted; empty for none."""
  return answers.canonical(answer) if answer is not None else ""
