"""How right an answer is, from 0 to 1, by the rules of benchmarks: one table from name to rule.

`equal` is what is used where nothing else is said. The others are what a benchmark asks for where
almost right earns something, or where another spelling is right; all read answers as
`answers.canonical` does.
"""

import math
import re
from collections.abc import Callable, Sequence

from pixelis_jax.algo import answers
from pixelis_jax.types import Box

CLOSE, FAR = 0.05, 0.20  # Reason-RFT's tolerances, parts of the truth.
RELAXED = 0.05  # ChartQA's, a part of the truth.
ANLS = 0.5  # Similarity below which ANLS gives nothing.
ALIKE = 0.5  # What an answer must earn against another to be of one mind with it.

_LETTERED = re.compile(r"\s*(?:\(([A-Ja-j])\)|([A-Ja-j])[).:])\s*(\S.*)", re.DOTALL)
_CHANGE = re.compile(r"(\w+)\(\s*(\w+)\s*,\s*'?(\w+)'?\s*\)")


def verify(answer: str | None, target: str, *, verifier: str) -> float:
  """How right the answer is; no answer is 0. ValueError for a name that is not in `VERIFIERS`."""
  rule = _rule(verifier)
  if answer is None or not answers.canonical(answer):
    return 0.0
  return rule(answer, target)


def alike(a: str | None, b: str | None, *, verifier: str) -> bool:
  """Whether two answers are equal, or one earns at least 1/2 where the other is the target."""
  if answers.equal(a, b):
    return True
  if verifier == "equal" or not (_is_target(a, verifier) and _is_target(b, verifier)):
    return False
  return max(verify(a, b, verifier=verifier), verify(b, a, verifier=verifier)) >= ALIKE


def cluster(
  texts: Sequence[str | None], weights: Sequence[float], *, verifier: str
) -> dict[str, list[int]]:
  """Indices by the canonical answer that speaks for them; as `answers.cluster` where it is `equal`.

  Other rules are no equivalence: of 1.00, 1.04 and 1.08 each is within 5% of the next only. So the
  answer of most weight gathers all that are like it, then of those left the next, whatever the
  order of the texts; equally heavy ones go alphabetically. What cannot be a target, such as words
  where boxes are compared, is in no cluster.
  """
  groups = answers.cluster(texts)
  if verifier == "equal":
    return groups
  heavy = {a: math.fsum(weights[i] for i in members) for a, members in groups.items()}
  found: dict[str, list[int]] = {}
  for answer in sorted(groups, key=lambda a: (-heavy[a], a)):
    if _is_target(answer, verifier):
      leader = next((a for a in found if alike(answer, a, verifier=verifier)), answer)
      found.setdefault(leader, []).extend(groups[answer])
  return found


def _is_target(answer: str | None, verifier: str) -> bool:
  if answer is None or not answers.canonical(answer):
    return False
  rule = _rule(verifier)
  try:
    rule(answer, answer)
  except ValueError:  # The policy wrote what no answer can be held against: that is data.
    return False
  return True


def _rule(verifier: str) -> Callable[[str, str], float]:
  if verifier not in VERIFIERS:
    raise ValueError(f"verifier {verifier!r} must be one of {list(VERIFIERS)}")
  return VERIFIERS[verifier]


def equal(answer: str, target: str) -> float:
  """1 if both mean the same (`answers.equal`)."""
  return float(answers.equal(answer, target))


def choice(answer: str, target: str) -> float:
  """As `equal`; and where the target is an option with its text, that text alone is right too."""
  lettered = _LETTERED.fullmatch(target)
  texts = [target] if lettered is None else [target, lettered.group(3)]
  return max(equal(answer, text) for text in texts)


def tolerance(answer: str, target: str) -> float:
  """Reason-RFT's for numbers (arXiv 2503.20752): 1 within 5%, 0 beyond 20%, a cosine between.

  Both must have the same unit. Of a target of 0 nothing is a part: only 0 is right.
  """
  off = _relative_error(answer, target)
  if off is None:
    return equal(answer, target)
  if CLOSE <= off <= FAR:
    return 0.5 * (math.cos(math.pi * (off - CLOSE) / (FAR - CLOSE)) + 1)
  return float(off < CLOSE)


def relaxed(answer: str, target: str) -> float:
  """ChartQA's relaxed accuracy: numbers within 5% of the target; all else as `equal`."""
  off = _relative_error(answer, target)
  return equal(answer, target) if off is None else float(off <= RELAXED)


def _relative_error(answer: str, target: str) -> float | None:
  """|answer - target| / |target|; None without numbers of one unit, or for a target of 0."""
  mine, true = answers.number(answer), answers.number(target)
  if mine is None or true is None or mine[1] != true[1] or true[0] == 0:
    return None
  return float(abs(mine[0] - true[0]) / abs(true[0]))


def anls(answer: str, target: str) -> float:
  """Normalised Levenshtein similarity, 0 below one half: InfographicVQA's and DocVQA's.

  Case and runs of spaces do not count. Their mean over questions is the benchmark's number.
  """
  a, b = (" ".join(text.casefold().split()) for text in (answer, target))
  longest = max(len(a), len(b))
  if min(len(a), len(b)) < ANLS * longest:  # As far apart as their lengths, at least.
    return 0.0
  similarity = 1 - _edits(a, b) / longest
  return similarity if similarity >= ANLS else 0.0


def _edits(a: str, b: str) -> int:
  """The Levenshtein distance."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    before, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
  return row[-1]


def iou(answer: str, target: str) -> float:
  """Intersection over union of two boxes, x0, y0, x1, y1 each in whatever frame the target is in.

  Raises ValueError for a target that is no box.
  """
  true, mine = _box(target), _box(answer)
  if true is None:
    raise ValueError(f"target {target!r} must be a box: four numbers with x0 < x1 and y0 < y1")
  return 0.0 if mine is None else mine.iou(true)


def iou_50(answer: str, target: str) -> float:
  """1 if `iou` is one half or more: RefCOCO's."""
  return float(iou(answer, target) >= 0.5)


def _box(text: str) -> Box | None:
  corners = [answers.number(element) for element in answers.elements(text)]
  if len(corners) != 4 or any(corner is None or corner[1] for corner in corners):
    return None
  x0, y0, x1, y1 = (float(value) for value, _ in corners)
  return Box(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def set_f1(answer: str, target: str) -> float:
  """F1 of two lists or sets, in any order; elements are equal where they mean the same."""
  mine, true = set(answers.elements(answer)), set(answers.elements(target))
  return 2 * len(mine & true) / (len(mine) + len(true))


def trance(answer: str, target: str) -> float:
  """Reason-RFT's partial credit for sequences of changes, such as change_color(2, red).

  Each change is matched with at most one of the target's: 1 for all three parts, 1/2 for function
  and object or function and value, 1/4 for the function alone; over the longer sequence, times the
  share of the answer's changes that repeat none before. Order does not count, as there.
  """
  return _matched(answer, target, (1.0, 0.5, 0.5, 0.25))


def trance_full(answer: str, target: str) -> float:
  """As `trance`, for whole matches only: what Reason-RFT's released 7B was trained with."""
  return _matched(answer, target, (1.0, 0.0, 0.0, 0.0))


def trance_penalty(answer: str, target: str) -> float:
  """As `trance`, but partial matches cost 1/4, 1/4 and 1/2: from -1/2."""
  return _matched(answer, target, (1.0, -0.25, -0.25, -0.5))


_PARTS = ((0, 1, 2), (0, 1), (0, 2), (0,))  # Of a change, what a match has in common.


def _matched(answer: str, target: str, credits: Sequence[float]) -> float:
  said, true = _CHANGE.findall(answer), list(dict.fromkeys(_CHANGE.findall(target)))
  if not true:
    raise ValueError(f"target {target!r} must be changes such as change_color(2, red)")
  mine = list(dict.fromkeys(said))
  if not mine:
    return 0.0
  longer, once, total = max(len(mine), len(true)), len(mine) / len(said), 0.0
  for parts, credit in zip(_PARTS, credits, strict=True):
    common = lambda change, parts=parts: [change[i] for i in parts]
    for change in list(mine):
      found = next((t for t in true if common(t) == common(change)), None)
      if found is not None:
        mine.remove(change)
        true.remove(found)
        total += credit
  return total * once / longer


VERIFIERS: dict[str, Callable[[str, str], float]] = {
  "equal": equal,
  "choice": choice,
  "tolerance": tolerance,
  "relaxed": relaxed,
  "anls": anls,
  "iou": iou,
  "iou_50": iou_50,
  "set_f1": set_f1,
  "trance": trance,
  "trance_full": trance_full,
  "trance_penalty": trance_penalty,
}
