"""How often a vote is right before anything is learned: each view by itself, and each voting rule.

    python benchmarks/votes.py --streams dim blur rotate dim-skewed --n 384 --out runs/votes

The unlearned policy of configs/demo.py answers each stream's requests once a view (greedy) and
`samples` times (at its temperature); every rule is then a function over these same ballots. Labels
are read by this script only. The memory, empty at first in the demo too, does not vote here.
Three tables: votes that are right, in percent with 95% Wilson intervals; the expected calibration
error of their confidence, of informed views also as `calibration.method` maps it, fitted to the
labelled questions of the original domain that the demo's config names; and of a question's right
and wrong samples, paired, how often the right one earns more by a pseudo-reward (half of the ties):
50 is chance. The same rows go to OUT/votes.json with the command, commit and device.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from record import grid, record  # The file beside this one.

from configs import demo
from pixelis_jax import evaluate, sampler
from pixelis_jax.algo import calibration, pseudo_rewards, voting
from pixelis_jax.algo.answers import equal
from pixelis_jax.answering import Answerer, passes
from pixelis_jax.data.tasks import drop_labels
from pixelis_jax.handover import Published
from pixelis_jax.history import History, Said
from pixelis_jax.metrics import interval
from pixelis_jax.types import Ballot, Task, Trajectory, Vote

INFORMED = "informed views"
CLEARER = "informed views, where one is clearer"
GATED = "informed views, gated"
AGAIN = "informed views, judged again"
TAUGHT = ("majority of samples (TTRL)", INFORMED)  # Votes that samples are paid by.


def votes(
  c: Any, group: Sequence[Trajectory], views: Sequence[Said], history: History
) -> dict[str, Vote]:
  """Each rule's vote on one request."""
  blind = c.vote.copy_and_resolve_references().unlock()
  blind.view_temperature = math.inf
  own = [Ballot(answer=t.answer, weight=1.0, view="identity") for t in group]
  plain, weighed = history.ballots(views, blind), history.ballots(views, c.vote)
  return {
    "majority of samples (TTRL)": voting.majority(own),
    "majority of views": voting.majority(plain),
    "views divided by answer frequency": voting.prior_divided(plain, history.prior),
    "views weighed by entropy": voting.entropy_weighted(plain),
    INFORMED: history.vote(views, (), c.vote),
    "informed views, weighted": voting.weighted(weighed),
    "informed views, confidence": voting.confident(weighed),
    "informed views, ensemble": voting.ensemble(weighed),
  }


def played(c: Any, answer: Answerer, tasks: Sequence[Task], again: dict[str, Vote]):
  """(task, samples, votes by rule, answers by view, the view that is clearer) of each request, in
  the stream's order; in `again`, by id, votes on earlier ones that were judged again.
  """
  history, gate = History.start(c.vote), functools.partial(passes, seen=True, c=c.gate)
  for at in range(0, len(tasks), c.arrivals):
    asked = tasks[at : at + c.arrivals]
    arrived = [drop_labels(task) for task in asked]
    samples = answer.sample(arrived, answer.policy.params, jax.random.key(at), 0)
    voted = answer.voters(arrived, samples)
    said = [[Said.of(view.name, t) for view, t in voters] for voters in voted]
    history = history.heard(arrived, said, c.vote)
    informed, clearer = [], []
    for task, group, views in zip(asked, samples, said, strict=True):
      cast = votes(c, group, views, history)
      informed.append(cast[INFORMED])
      clearer.append(history.clearer(views, cast[INFORMED], c.vote))
      yield task, group, cast, {s.view: s.answer for s in views}, clearer[-1]
      history = history.voted(views)
    history = history.kept(arrived, said, informed, clearer, most=c.hindsight)
    found = {a.id: history.vote(a.said, (), c.vote) for a in history.again(c.vote, gate)}
    history = history.settled(found.keys())
    again |= found


def answerer(c: Any, policy: sampler.Policy) -> Answerer:
  """Of the unlearned policy, without a memory."""
  return Answerer(c, policy, Published(0, policy.params), None)


def calibrations(policy: sampler.Policy) -> dict[str, calibration.Calibration]:
  """By method: how often informed votes are right on labelled questions, which are no stream's."""
  c = demo.get_config()
  asked = list(evaluate.made(c.calibration.tasks))
  found = [(t, cast[INFORMED]) for t, _, cast, *_ in played(c, answerer(c, policy), asked, {})]
  right = [equal(vote.answer, task.answer) for task, vote in found]
  sure = [vote.confidence for _, vote in found]
  return {method: calibration.fit(sure, right, method=method) for method in calibration.METHODS}


def rows(
  stream: str, n: int, policy: sampler.Policy, maps: Mapping[str, calibration.Calibration]
) -> list[dict]:
  """One row a rule, a view and a pseudo-reward; of the votes that count where some do not."""
  c = demo.get_config(stream).copy_and_resolve_references().unlock()
  c.stream.n = n
  answer = answerer(c, policy)
  outcomes: dict[str, list[tuple[bool, float | None]]] = {}
  leads: dict[str, list[float]] = {}
  asked, again = list(evaluate.made(c.stream)), {}
  for task, group, cast, seen, clearer in played(c, answer, asked, again):
    right = lambda said, task=task: said is not None and equal(said, task.answer)
    for name, vote in cast.items():
      outcomes.setdefault(name, []).append((right(vote.answer), vote.confidence))
    there = clearer is not None
    gated = passes(cast[INFORMED], seen=there, c=c.gate)
    for name, counts in ((CLEARER, there), (GATED, gated)):
      outcomes.setdefault(name, []).extend(outcomes[INFORMED][-1:] * counts)
    for method, calibrated in maps.items():
      won, sure = outcomes[INFORMED][-1]
      outcomes.setdefault(f"{INFORMED}, {method}", []).append((won, calibrated(sure)))
    for name, said in seen.items():
      outcomes.setdefault(name, []).append((right(said), None))
    truth = [right(t.answer) for t in group]
    for by, rule in itertools.product(TAUGHT, pseudo_rewards.RULES):
      if cast[by].answer is not None:
        reward = pseudo_rewards.PseudoReward(rule=rule)
        earned = pseudo_rewards.pseudo_rewards(group, cast[by], reward)
        leads.setdefault(f"{rule}, {by}", []).extend(pairs(earned, truth))
  truths = {task.id: task.answer for task in asked}
  outcomes[AGAIN] = [
    (vote.answer is not None and equal(vote.answer, truths[id]), vote.confidence)
    for id, vote in again.items()
  ]
  made = [vote_row(stream, name, found, n) for name, found in outcomes.items()]
  return made + [
    {"stream": stream, "reward": name, "pairs": len(found), "ranked": sum(found) / len(found)}
    for name, found in leads.items()
    if found
  ]


def vote_row(stream: str, name: str, found: list[tuple[bool, float | None]], of: int) -> dict:
  """How often a voter was right, and the calibration error of its confidence where it has one."""
  right = [won for won, _ in found]
  low, high = interval(sum(right), max(len(right), 1))
  sure = [confidence for _, confidence in found if confidence is not None]
  return {
    "stream": stream,
    "voter": name,
    "n": len(found),
    "of": of,
    "right": sum(right) / max(len(right), 1),
    "low": low,
    "high": high,
    "ece": calibration.ece(sure, right) if sure else None,
  }


def pairs(earned: Sequence[float], truth: Sequence[bool]) -> list[float]:
  """Of each right with each wrong sample: 1 if the right one earned more, 1/2 for as much."""
  right = [e for e, won in zip(earned, truth, strict=True) if won]
  wrong = [e for e, won in zip(earned, truth, strict=True) if not won]
  return [float(a > b) + 0.5 * (a == b) for a, b in itertools.product(right, wrong)]


def tables(rows: list[dict]) -> str:
  """Percent right, calibration errors, and pairs that are ranked right in percent."""
  right, errors, ranked = {}, {}, {}
  for row in rows:
    if "reward" in row:
      text = f"{100 * row['ranked']:.1f}, n {row['pairs']}"
      ranked[row["reward"], row["stream"]] = text
      continue
    at = row["voter"], row["stream"]
    span = f"{100 * row['right']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    some = f"{span}, n {row['n']}" if row["n"] else "none"
    right[at] = span if row["n"] == row["of"] else some
    if row["ece"] is not None:
      errors[at] = f"{row['ece']:.3f}"
  titled = {"voter": right, "calibration error": errors, "pseudo-reward": ranked}
  return "\n\n".join(grid(title, cells) for title, cells in titled.items())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--streams", nargs="+", default=["dim", "blur", "rotate", "dim-skewed"])
  parser.add_argument("--n", type=int, default=384)
  parser.add_argument("--out", type=Path, default=Path("runs/votes"))
  args = parser.parse_args()
  policy = sampler.load_policy(demo.get_config().model)  # One for all streams.
  maps = calibrations(policy)
  found = [row for stream in args.streams for row in rows(stream, args.n, policy, maps)]
  print(tables(found))
  print(json.dumps(record(args.out, "votes", {"rows": found})))


if __name__ == "__main__":
  main()
