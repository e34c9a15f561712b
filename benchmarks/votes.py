"""How often a vote is right before anything is learned: each view by itself, and each voting rule.

    python benchmarks/votes.py --streams dim blur rotate dim-skewed --n 384 --out runs/votes

The unlearned policy of configs/demo.py answers each stream's requests once a view (greedy) and
`samples` times (at its temperature). Labels are read by this script only. The memory, empty at
first in the demo too, does not vote here. Prints a table with 95% Wilson intervals; the same
rows go to OUT/votes.json with the command, commit and device.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
from record import record  # The file beside this one.

from configs import demo
from pixelis_jax import evaluate, sampler, ttrl
from pixelis_jax.algo import voting
from pixelis_jax.algo.answers import equal
from pixelis_jax.data.tasks import drop_labels
from pixelis_jax.metrics import interval
from pixelis_jax.online import passes
from pixelis_jax.types import Ballot, Task

GATED = "informed views, gated"


def answers(c: Any, answer: ttrl.Answerer, tasks: list[Task]) -> dict[str, list[str | None]]:
  """Each rule's and each view's answer to each request; None where there is none, or refused."""
  history = ttrl.History.start(c.vote)
  blind = c.vote.copy_and_resolve_references().unlock()
  blind.view_temperature = math.inf
  found: dict[str, list[str | None]] = {}
  for at in range(0, len(tasks), c.arrivals):
    arrived = [drop_labels(task) for task in tasks[at : at + c.arrivals]]
    samples = answer.sample(arrived, answer.policy.params, jax.random.key(at), 0)
    voted = answer.voters(arrived, samples)
    history = history.heard(arrived, voted)
    for group, views in zip(samples, voted, strict=True):
      own = [Ballot(answer=t.answer, weight=1.0, view="identity") for t in group]
      plain, informed = history.ballots(views, blind), history.vote(views, (), c.vote)
      for name, vote in {
        "majority of samples (TTRL)": voting.majority(own),
        "majority of views": voting.majority(plain),
        "views divided by answer frequency": voting.prior_divided(plain, history.prior),
        "views weighed by entropy": voting.entropy_weighted(plain),
        "informed views": informed,
        GATED: informed if passes(informed, c) else None,
      }.items():
        found.setdefault(name, []).append(None if vote is None else vote.answer)
      for view, trajectory in views:
        found.setdefault(view.name, []).append(trajectory.answer)
      history = history.voted(views)
  return found


def rows(stream: str, n: int) -> list[dict]:
  """One row a rule and a view: how often it is right, of those that passed where it is gated."""
  c = demo.get_config(stream).copy_and_resolve_references().unlock()
  c.stream.n = n
  policy = sampler.load_policy(c.model)
  tasks = evaluate.made(c.stream)
  answer = ttrl.Answerer(c, policy, ttrl.Published(0, policy.params), None)
  made = []
  for name, said in answers(c, answer, tasks).items():
    pairs = [(a, t.answer) for a, t in zip(said, tasks, strict=True)]
    heard = [(a, truth) for a, truth in pairs if name != GATED or a is not None]
    right = sum(a is not None and equal(a, truth) for a, truth in heard)
    low, high = interval(right, max(len(heard), 1))
    made.append(
      {"stream": stream, "voter": name, "n": len(heard), "of": n}
      | {"right": right / max(len(heard), 1), "low": low, "high": high}
    )
  return made


def table(rows: list[dict]) -> str:
  """Markdown: a row a voter, a column a stream; percent right."""
  streams = list(dict.fromkeys(row["stream"] for row in rows))
  lines = [f"| voter | {' | '.join(streams)} |", "|---" * (len(streams) + 1) + "|"]
  for voter in dict.fromkeys(row["voter"] for row in rows):
    cells = []
    for row in (row for row in rows if row["voter"] == voter):
      span = f"{100 * row['right']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
      cells.append(span if row["n"] == row["of"] else f"{span}, n {row['n']}")
    lines.append(f"| {voter} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--streams", nargs="+", default=["dim", "blur", "rotate", "dim-skewed"])
  parser.add_argument("--n", type=int, default=384)
  parser.add_argument("--out", type=Path, default=Path("runs/votes"))
  args = parser.parse_args()
  found = [row for stream in args.streams for row in rows(stream, args.n)]
  print(table(found))
  print(json.dumps(record(args.out, "votes", {"rows": found})))


if __name__ == "__main__":
  main()
