"""What each sample earns by a vote, where there is no label: a rule is a function of both.

The vote says how much weight each answer got (`Vote.counts`); whoever cast it, the samples are paid
by it. TTRL (https://arxiv.org/abs/2504.16084) pays agreement with the winner. What followed it pays
otherwise where the winner is not all that a vote knows.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pixelis_jax.algo import answers, rewards, verifiers
from pixelis_jax.types import Trajectory, Vote

ROUNDING = 1e-9  # Of novelties: closer ones are one.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PseudoReward:
  """A rule and its constants; checked when built. Defaults are the papers'.

  Attributes:
    rule: a name in `RULES`.
    entropy: of "soft": what the votes' entropy, from 0 to 1, costs.
    share: of "scrl": of the weight, what an answer must have to be rewarded.
    margin: by which it must lead.
    rare: of the weight, what an answer must be under to be punished.
    uncertainty: what an answer costs for each nat that its samples are less sure than all are.
  """

  rule: str = "agreement"
  entropy: float = 0.75
  share: float = 0.375
  margin: float = 0.125
  rare: float = 0.125
  uncertainty: float = 0.1

  def __post_init__(self):
    if self.rule not in RULES:
      raise ValueError(f"pseudo-reward rule {self.rule!r} must be one of {list(RULES)}")
    if not all(0 <= x <= 1 for x in (self.share, self.margin, self.rare)):
      raise ValueError(
        f"share {self.share}, margin {self.margin} and rare {self.rare} must lie in [0, 1]"
      )
    if not (self.entropy >= 0 and self.uncertainty >= 0):
      raise ValueError(
        f"entropy {self.entropy} and uncertainty {self.uncertainty} must not be negative"
      )

  def trusts(self, vote: Vote) -> bool:
    """Whether the winner may be taught: "scrl" rewards only one that leads by enough."""
    return self.rule != "scrl" or (vote.share >= self.share and vote.margin > self.margin)


def pseudo_rewards(
  samples: Sequence[Trajectory], vote: Vote, c: PseudoReward, *, verifier: str = "equal"
) -> list[float]:
  """One reward a sample of the question that was voted on, by the rule `c.rule`.

  `verifier` says by which rule two answers are one; it must be that of the vote. Raises ValueError
  for a vote without an answer.
  """
  if vote.answer is None:
    raise ValueError("a vote without an answer pays nobody: keep it behind the gate")
  return RULES[c.rule](samples, vote, c, verifier)


def agreement(
  samples: Sequence[Trajectory], vote: Vote, c: PseudoReward, verifier: str
) -> list[float]:
  """How right each answer is if the winner is (TTRL)."""
  return [rewards.agreement(sample, vote.answer, verifier=verifier) for sample in samples]


def soft(samples: Sequence[Trajectory], vote: Vote, c: PseudoReward, verifier: str) -> list[float]:
  """Each answer's share, less `entropy` times the votes' entropy over its maximum: TTRV.

  https://arxiv.org/abs/2510.06783. The second term is one for a question's samples: it is lost
  where an estimator compares these alone, and tells questions apart where it whitens over all.
  """
  shares = [share for share in vote.counts.values() if share > 0]
  total = math.fsum(shares)
  nats = -math.fsum(share / total * math.log(share / total) for share in shares)
  spread = nats / math.log(len(shares)) if len(shares) > 1 else 0.0
  return [_share(sample, vote, verifier) - c.entropy * spread for sample in samples]


def scrl(samples: Sequence[Trajectory], vote: Vote, c: PseudoReward, verifier: str) -> list[float]:
  """The winner's share where it leads by enough, and punishment of rare answers given unsurely.

  SCRL, https://arxiv.org/abs/2603.19880: an answer whose share p is under `rare`, and whose samples
  are no surer than those of the question on average, earns p - rare; one that is neither rewarded
  nor punished 0. All pay for being less sure than the average, no answer earns -1. There is
  something to learn where nothing is trusted, so its gate may stand open.
  """
  unsure = [_entropy(sample) for sample in samples]
  average = sum(unsure) / len(unsure)
  said, won = [sample.answer for sample in samples], _won(samples, vote, c, verifier)
  earned = [-1.0] * len(samples)
  for members in verifiers.cluster(said, [1.0] * len(samples), verifier=verifier).values():
    first = members[0]
    p = _share(samples[first], vote, verifier)
    excess = sum(unsure[i] for i in members) / len(members) - average
    if won[first] and c.trusts(vote):
      base = p
    else:
      base = p - c.rare if p < c.rare and excess >= 0 else 0.0
    for i in members:
      earned[i] = base - c.uncertainty * excess
  return earned


def evol(samples: Sequence[Trajectory], vote: Vote, c: PseudoReward, verifier: str) -> list[float]:
  """The winner's samples earn 1/2 to 1, others -1 to -1/2, the more the less alike: EVOL-RL.

  https://arxiv.org/abs/2509.15194: agreement selects, novelty keeps a policy from saying one thing
  in one way. Novelty is 1 less half the mean likeness to the samples on its side, half the greatest
  to any, stretched over the samples of a side to 0 to 1 (all 1/2 where equal). The paper compares
  embeddings by another model; here likeness is the cosine of counts of tokens and pairs of tokens.
  """
  like, won = _likeness(samples), _won(samples, vote, c, verifier)
  earned = [-1.0] * len(samples)
  for side, base in ((True, 0.5), (False, -1.0)):
    members = [i for i in range(len(samples)) if won[i] is side and _answered(samples[i])]
    novel = [_novelty(i, members, like) for i in members]
    low, high = min(novel, default=0.0), max(novel, default=0.0)
    for i, value in zip(members, novel, strict=True):
      place = (value - low) / (high - low) if high - low > ROUNDING else 0.5
      earned[i] = base + 0.5 * place
  return earned


Rule = Callable[[Sequence[Trajectory], Vote, PseudoReward, str], list[float]]
RULES: dict[str, Rule] = {"agreement": agreement, "soft": soft, "scrl": scrl, "evol": evol}


def by_label(
  answers: Sequence[str | None], voted: str | None, truth: str, *, verifier: str
) -> dict[str, float]:
  """What one request's vote and samples were worth by its label: TTRL's metrics under its names.

  https://github.com/PRIME-RL/TTRL/blob/main/verl/verl/utils/reward_score/ttrl/ttt_metrics.py. For
  what is over: nothing that learns may call it.
  """
  alike = lambda a, b: verifiers.alike(a, b, verifier=verifier)
  right = [alike(answer, truth) for answer in answers]
  paid = [alike(answer, voted) for answer in answers]
  agreed = [a == b for a, b in zip(right, paid, strict=True)]
  return {
    "label_accuracy": float(alike(voted, truth)),
    "reward_accuracy": sum(agreed) / len(agreed),
    "ground_truth_ratio": sum(right) / len(right),
    f"pass@{len(right)}": float(any(right)),
  }


def _won(samples: Sequence[Trajectory], vote: Vote, c: PseudoReward, verifier: str) -> list[bool]:
  """Whether each is on the winner's side."""
  return [right >= verifiers.ALIKE for right in agreement(samples, vote, c, verifier)]


def _answered(sample: Trajectory) -> bool:
  return sample.answer is not None and bool(answers.canonical(sample.answer))


def _share(sample: Trajectory, vote: Vote, verifier: str) -> float:
  """The part of the vote's weight that went to this answer, or to one that is like it."""
  if not _answered(sample):
    return 0.0
  canonical = answers.canonical(sample.answer)
  if canonical in vote.counts or verifier == "equal":
    return vote.counts.get(canonical, 0.0)
  like = lambda answer: verifiers.alike(canonical, answer, verifier=verifier)
  return max((share for answer, share in vote.counts.items() if like(answer)), default=0.0)


def _entropy(sample: Trajectory) -> float:
  """Mean nats over all sampled tokens."""
  return float(np.mean(np.concatenate([step.completion.entropies for step in sample.steps])))


def _likeness(samples: Sequence[Trajectory]) -> Float[np.ndarray, "G G"]:
  """Cosines of the samples' counts of tokens and of pairs of neighbouring tokens, 0 to 1."""
  counts = []
  for sample in samples:
    tokens = [step.completion.tokens.tolist() for step in sample.steps]
    pairs = [pair for turn in tokens for pair in itertools.pairwise(turn)]
    counts.append(collections.Counter([*itertools.chain(*tokens), *pairs]))
  column = {feature: i for i, feature in enumerate(dict.fromkeys(itertools.chain(*counts)))}
  table = np.zeros((len(samples), len(column)))
  for row, count in zip(table, counts, strict=True):
    row[[column[feature] for feature in count]] = list(count.values())
  table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
  return table @ table.T


def _novelty(i: int, side: Sequence[int], like: Float[np.ndarray, "G G"]) -> float:
  """How little sample i is like those on its side, and like the nearest of all."""
  mine = [like[i, j] for j in side if j != i]
  others = [like[i, j] for j in range(len(like)) if j != i]
  mean = sum(mine) / len(mine) if mine else 0.0
  return 1.0 - 0.5 * float(mean) - 0.5 * float(max(others, default=0.0))
