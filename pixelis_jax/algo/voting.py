"""From a table of ballots to one answer: each rule is one function over the table.

Ballots are grouped by what they mean (`answers.canonical`), so "1/2" and "0.5" do not split a vote.
A ballot without an answer counts in every share's denominator and can never win. `Vote.share` is
the winner's part of all the weight, `Vote.margin` that minus the runner-up's. `Vote.confidence` is
the share, unless the rule or the caller knows a reason to lower it. It never falls when a voter
changes to the winner's side. A tie has margin 0 and goes to the alphabetically first answer, so
that it is the same everywhere; `gate` refuses it.

Memory neighbours are ballots too: `source` is the experience's id, `weight` comes from
`similarity_weight`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixelis_jax.algo import answers, verifiers
from pixelis_jax.types import Ballot, Vote

TIE = 1e-9  # Shares closer than this differ by rounding only.
# Of the voters that agree, by heads: how far a weighted vote is believed; straight lines between.
AGREEING, BELIEVED = (0.0, 0.3, 0.7, 1.0), (0.5, 0.6, 0.8, 1.0)
SURE = 0.5  # Of the heaviest ballot's weight: what a voter needs to be heard by `confident`.
FORGET = 1e-4  # Weight under which an answer is dropped: open vocabularies must not grow for ever.


def check_fading(decay: float, smoothing: float) -> None:
  """Raises ValueError where counts with these constants would not fade, or not be smoothed."""
  if not (0 < decay < 1 and 0 < smoothing < math.inf):
    raise ValueError(f"decay {decay} must lie in (0, 1) and smoothing {smoothing} be positive")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPrior:
  """How often each answer came up lately, whatever was asked: what a policy says anyway.

  Attributes:
    counts: decayed weight of each canonical answer; replaced, never changed.
    decay: what an old request's weight keeps at each update; 0.99 remembers about 100 requests.
    smoothing: requests that every answer, seen or not, is taken to have had already. It bounds how
      far a stray ballot for a rare answer is raised: by at most (1 / (1 - decay) + smoothing) /
      smoothing.
  """

  counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  decay: float = 0.99
  smoothing: float = 5.0

  def __post_init__(self):
    check_fading(self.decay, self.smoothing)
    for answer, weight in self.counts.items():
      if not 0 <= weight < math.inf:
        raise ValueError(f"weight {weight} of answer {answer!r} must be finite and not negative")

  def update(self, counts: Mapping[str, float]) -> "AnswerPrior":
    """The prior after one request.

    Args:
      counts: share of each answer, before any correction: `majority(ballots).counts`. Feeding back
        corrected shares would make the prior chase itself.
    """
    updated = {answer: weight * self.decay for answer, weight in self.counts.items()}
    for answer, weight in counts.items():
      key = answers.canonical(answer)
      updated[key] = updated.get(key, 0.0) + weight
    return dataclasses.replace(self, counts={a: w for a, w in updated.items() if w >= FORGET})

  def expected(self, answer: str) -> float:
    """Smoothed frequency in (0, 1], one place kept for all unseen answers; 1 before any request."""
    seen = self.counts.get(answers.canonical(answer), 0.0)
    total = math.fsum(self.counts.values())
    return (seen + self.smoothing) / (total + self.smoothing * (len(self.counts) + 1))

  def balance(self, answer: str) -> float:
    """The weight under which all answers count equally often: 1 / (their number * `expected`).

    Smoothed like `expected`: 1 before any request, and bounded for answers hardly seen.
    """
    return 1.0 / ((len(self.counts) + 1) * self.expected(answer))

  def to_dict(self) -> dict[str, object]:
    """Plain values that `AnswerPrior(**values)` takes back; JSON can hold them."""
    return {"counts": dict(self.counts), "decay": self.decay, "smoothing": self.smoothing}


def majority(ballots: Sequence[Ballot]) -> Vote:
  """One ballot, one vote, weights ignored: TTRL's rule (https://arxiv.org/abs/2504.16084)."""
  return _vote(ballots, [1.0] * len(ballots))


def prior_divided(ballots: Sequence[Ballot], prior: AnswerPrior) -> Vote:
  """One ballot, one vote, each answer's votes divided by how often it comes up anyway.

  Ballots without an answer keep their share. With nothing observed yet it is `majority`.
  """
  return _vote(ballots, _divided(ballots, [1.0] * len(ballots), prior))


def entropy_weighted(ballots: Sequence[Ballot]) -> Vote:
  """Ballots count by their weight: `entropy_weight` of each sample, or any other confidence."""
  return _vote(ballots, [ballot.weight for ballot in ballots])


def weighted(ballots: Sequence[Ballot]) -> Vote:
  """Shares of weight; the winner is believed the more, the more voters agree by heads.

  The torch project's rule, whose factor fell between 1/6 and 2/6 of agreeing voters, so that one
  heavy voter against many light ones passed for agreement. Here it rises throughout.
  """
  return _believed(entropy_weighted(ballots))


def confident(ballots: Sequence[Ballot]) -> Vote:
  """As `weighted`, by the squares of the weights, of voters at least half as heavy as the heaviest.

  The torch project's "confidence". Weights have no scale of their own here, so the threshold is
  relative: its own left nobody where all were unsure.
  """
  heaviest = max((ballot.weight for ballot in ballots), default=0.0)
  heard = [ballot for ballot in ballots if ballot.weight >= SURE * heaviest]
  vote = _believed(_vote(heard, [ballot.weight**2 for ballot in heard]))
  return dataclasses.replace(vote, ballots=tuple(ballots))


def ensemble(ballots: Sequence[Ballot]) -> Vote:
  """The mean of `majority`, `weighted` and `confident`: of their shares, and of their confidence.

  A rule that has another winner adds no confidence. The torch project raised it by a fifth where
  all three agree; they count the same ballots, so that is no evidence.
  """
  votes = [rule(ballots) for rule in (majority, weighted, confident)]
  named = sorted({answer for vote in votes for answer in vote.counts})
  mean = lambda values: math.fsum(values) / len(votes)
  vote = _decided({a: mean(v.counts.get(a, 0.0) for v in votes) for a in named}, ballots)
  sure = mean(v.confidence for v in votes if v.answer == vote.answer)
  return dataclasses.replace(vote, confidence=min(sure, vote.share))


def entropy_weighted_prior_divided(ballots: Sequence[Ballot], prior: AnswerPrior) -> Vote:
  """Weights as in `entropy_weighted`, each answer's sum divided as in `prior_divided`."""
  return _vote(ballots, _divided(ballots, [ballot.weight for ballot in ballots], prior))


# name -> rule(ballots, prior); a rule that needs no prior ignores it.
RULES: dict[str, Callable[[Sequence[Ballot], AnswerPrior], Vote]] = {
  "majority": lambda ballots, prior: majority(ballots),
  "prior_divided": prior_divided,
  "entropy_weighted": lambda ballots, prior: entropy_weighted(ballots),
  "entropy_weighted_prior_divided": entropy_weighted_prior_divided,
  "weighted": lambda ballots, prior: weighted(ballots),
  "confidence": lambda ballots, prior: confident(ballots),
  "ensemble": lambda ballots, prior: ensemble(ballots),
}


def clustered(ballots: Sequence[Ballot], *, verifier: str) -> list[Ballot]:
  """The ballots, each for the answer that speaks for its cluster (`verifiers.cluster`).

  Rules tell answers apart by meaning; this comes before them where almost the same counts as the
  same. Ballots in no cluster are for None. Nothing changes where the verifier is `equal`.
  """
  if verifier == "equal":
    return list(ballots)
  said, weights = [b.answer for b in ballots], [b.weight for b in ballots]
  found = verifiers.cluster(said, weights, verifier=verifier)
  meant = {i: answer for answer, members in found.items() for i in members}
  return [dataclasses.replace(b, answer=meant.get(i)) for i, b in enumerate(ballots)]


def strongest(vote: Vote, *, verifier: str) -> int | None:
  """Which of the request's own ballots for what was voted weighs most: the first of equals.

  None where none is for that. A memory's ballots saw nothing of the request.
  """
  agree = [
    i
    for i, ballot in enumerate(vote.ballots)
    if ballot.source == "self" and verifiers.alike(ballot.answer, vote.answer, verifier=verifier)
  ]
  return max(agree, key=lambda i: vote.ballots[i].weight, default=None)


def gate(vote: Vote, *, confidence: float, margin: float, votes: int = 1) -> bool:
  """Whether a vote may be learned from: an answer, sure enough, by enough of a margin, and no tie.

  Both thresholds lie in [0, 1]; `votes` is how many ballots must have an answer at all, which
  matters where only a memory votes. SCRL (https://arxiv.org/abs/2603.19880) trusts share 0.375 and
  margin 0.125.
  """
  if not (0 <= confidence <= 1 and 0 <= margin <= 1):
    raise ValueError(f"confidence {confidence} and margin {margin} must lie in [0, 1]")
  sure = vote.confidence >= confidence and vote.margin >= margin
  heard = sum(map(len, answers.cluster([ballot.answer for ballot in vote.ballots]).values()))
  return vote.answer is not None and vote.margin > 0 and sure and heard >= votes


def guarded(vote: Vote, before: Sequence[str], *, weight: float, verifier: str) -> Vote:
  """The vote, believed less where a question's answer flips from visit to visit.

  What flips is not known, and learning from each visit would only undo the last one's lesson:
  TTRL-Guard (https://arxiv.org/abs/2605.19444), which halves such rewards.

  Args:
    vote: of this visit.
    before: what was voted at earlier visits to this question or one like it, oldest first.
    weight: in [0, 1]: with 1 an answer that changed at each visit is not believed at all.
    verifier: by which two answers are one.
  """
  if not 0 <= weight <= 1:
    raise ValueError(f"guard.weight {weight} must lie in [0, 1]")
  if vote.answer is None or not before:
    return vote
  visits = itertools.pairwise([*before, vote.answer])
  flips = sum(not verifiers.alike(a, b, verifier=verifier) for a, b in visits)
  kept = 1.0 - weight * flips / len(before)
  return dataclasses.replace(vote, confidence=vote.confidence * kept)


def entropy_weight(entropy: float, *, temperature: float) -> float:
  """exp(-entropy / temperature) in (0, 1], for a voter's mean entropy in nats a token."""
  if not (entropy >= 0 and temperature > 0):
    raise ValueError(
      f"entropy {entropy} must not be negative and temperature {temperature} be positive"
    )
  return math.exp(-entropy / temperature)


def similarity_weight(cosine: float, *, bandwidth: float) -> float:
  """exp((cosine - 1) / bandwidth) in (0, 1]: a memory neighbour's weight; 1 for equal keys."""
  if not (abs(cosine) <= 1 + 1e-5 and bandwidth > 0):
    raise ValueError(f"cosine {cosine} must lie in [-1, 1] and bandwidth {bandwidth} be positive")
  return math.exp((min(cosine, 1.0) - 1) / bandwidth)


def _divided(
  ballots: Sequence[Ballot], weights: Sequence[float], prior: AnswerPrior
) -> list[float]:
  """Weights over prior frequency, rescaled to leave the answered ballots' sum as it was."""
  groups = answers.cluster([ballot.answer for ballot in ballots])
  divided = list(weights)
  for answer, members in groups.items():
    for i in members:
      divided[i] = weights[i] / prior.expected(answer)
  answered = [i for members in groups.values() for i in members]
  after = math.fsum(divided[i] for i in answered)
  scale = math.fsum(weights[i] for i in answered) / after if after > 0 else 1.0
  for i in answered:
    divided[i] *= scale
  return divided


def _vote(ballots: Sequence[Ballot], weights: Sequence[float]) -> Vote:
  for ballot, weight in zip(ballots, weights, strict=True):
    if not 0 <= weight < math.inf:
      raise ValueError(
        f"weight {weight} of the ballot for {ballot.answer!r} must be finite and not negative"
      )
  total = math.fsum(weights)  # fsum: the order of the ballots must not decide a vote.
  groups = answers.cluster([ballot.answer for ballot in ballots])
  shares = {
    a: math.fsum(weights[i] for i in members) / (total or 1.0) for a, members in groups.items()
  }
  return _decided(shares, ballots)


def _decided(shares: Mapping[str, float], ballots: Sequence[Ballot]) -> Vote:
  counts = dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))
  top = max(counts.values(), default=0.0)
  if top <= 0:
    return Vote(
      answer=None, confidence=0.0, share=0.0, margin=0.0, counts=counts, ballots=tuple(ballots)
    )
  winner = min(answer for answer, share in counts.items() if top - share <= TIE)
  margin = top - max((share for answer, share in counts.items() if answer != winner), default=0.0)
  return Vote(
    answer=winner,
    confidence=top,
    share=top,
    margin=margin if margin > TIE else 0.0,
    counts=counts,
    ballots=tuple(ballots),
  )


def _believed(vote: Vote) -> Vote:
  """A vote with less confidence where few voters, by heads, are for its winner."""
  heads = majority(vote.ballots).counts.get(vote.answer, 0.0)
  factor = float(np.interp(heads, AGREEING, BELIEVED))
  return dataclasses.replace(vote, confidence=vote.share * factor)
