"""The online rules side by side, on the same streams: what each gains, what it forgets, the worst.

    python benchmarks/rules.py --seeds 0 1 2 --out runs/rules
    python benchmarks/rules.py --rows "views" "gate 0.3" "gate 0.8" --streams blur --out runs/rules
    python benchmarks/rules.py --seeds 2 --known docs/results/rules.json --out runs/rules

A row of `ROWS` is the demo's config with a few fields changed; a column of `STREAMS` is what is
asked: a shift, "-skewed" where 60% of its answers are one digit, or a stream that means ill:

  static      noise in the place of pictures
  repeated    one question of the shift blur again and again
  misled      questions of the shift blur on which most of the policy's own samples are wrong alike

A cell is `pixelis_jax.online` once a seed, answers and learning in turn, so that it is a function
of its seed; a finished run is not run again, nor are cells of the tables --known, which the new one
takes over, a later table's in the place of an earlier one's. Accuracies before are one for all
rows. "Worst" is the lowest share of right samples in any 64 requests in a row, by labels that are
read when all is over, less that of the first 64. The table goes to OUT/rules.json with command,
commit and device; where one row is asked for, how it went on each stream is printed as well, and
what it gains over groups of them.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from record import begin, commit, grid, known, record, span  # The file beside this one.

from configs import demo
from pixelis_jax import evaluate, online, sampler
from pixelis_jax.algo import verifiers, voting
from pixelis_jax.answering import Answerer
from pixelis_jax.data.requests import write_requests
from pixelis_jax.data.tasks import drop_labels
from pixelis_jax.handover import Published
from pixelis_jax.metrics import METRICS_FILE, mean_interval, read_lines
from pixelis_jax.types import Ballot, Task

SHIFTED = ("rotate", "dim", "invert", "noise", "blur", "writers")
STREAMS = (*SHIFTED, *(f"{shift}-skewed" for shift in SHIFTED), "static", "repeated", "misled")
NAMED = ("noise", "rotate", "dim", "invert", "writers")  # For which the aim of 25 points was set.
GROUPS = {
  f"{name}{kind}": tuple(f"{shift}{suffix}" for suffix in suffixes for shift in shifts)
  for name, shifts in (("all", SHIFTED), ("without blur", NAMED))
  for kind, suffixes in (("", ("", "-skewed")), (", even", ("",)), (", skewed", ("-skewed",)))
}
WEAK = 0.8  # Accuracy before, under which a shift counts as one that there is something to gain on.
CRAFTED = ("repeated", "misled")
MEASURED = ("shifted_before", "shifted_after", "original_before", "original_after")
WINDOW = 64  # Requests of which a share of right samples is one number.
# Who has no view that could tell more than the plain look.
SAMPLED = {"vote.voters": ("samples",), "vote.rule": "majority", "gate.clearer": False}
REMEMBERED = {**SAMPLED, "vote.voters": ("samples", "memory")}
SCRL = {"learn.reward.rule": "scrl", "gate.confidence": 0.375, "gate.margin": 0.125}
ROWS: dict[str, dict[str, Any]] = {
  # What others learn from: the policy's own samples.
  "majority": SAMPLED,  # TTRL
  "majority, memory": REMEMBERED,
  "weighted": {**REMEMBERED, "vote.rule": "weighted"},  # These three are Pixelis'.
  "weighted, no memory": {**SAMPLED, "vote.rule": "weighted"},
  "confidence": {**REMEMBERED, "vote.rule": "confidence"},
  "confidence, no memory": {**SAMPLED, "vote.rule": "confidence"},
  "ensemble": {**REMEMBERED, "vote.rule": "ensemble"},
  "ensemble, no memory": {**SAMPLED, "vote.rule": "ensemble"},
  "prior divided": {**SAMPLED, "vote.rule": "prior_divided"},
  "prior divided, memory": {**REMEMBERED, "vote.rule": "prior_divided"},
  "soft": {**SAMPLED, "learn.reward.rule": "soft"},  # TTRV
  "soft, memory": {**REMEMBERED, "learn.reward.rule": "soft"},
  "scrl": {**SAMPLED, **SCRL},
  "scrl, memory": {**REMEMBERED, **SCRL},
  "evol": {**SAMPLED, "learn.reward.rule": "evol"},
  "evol, memory": {**REMEMBERED, "learn.reward.rule": "evol"},
  "flip-rate guard": {**REMEMBERED, "guard.weight": 0.5},  # TTRL-Guard
  # The reference looks in other ways.
  "views": {},
  "views, no memory": {"vote.voters": ("views",)},
  "views, counted": {"vote.rule": "majority"},
  "views, prior divided": {"vote.rule": "entropy_weighted_prior_divided"},
  "views and samples": {"vote.voters": ("views", "samples", "memory")},
  "views, all trusted": {"vote.trust_half": 0.0},
  "views, no hindsight": {"hindsight": 0},
  "views, none clearer": {"gate.clearer": False},
  "views, answers alone": {"learn.look.updates": 0},
  "views, no copies": {"learn.look.copies": 0},
  "views, no canary": {"probe.tolerance": 1.0},
  # How much each number matters.
  "gate 0.3": {"gate.confidence": 0.3, "gate.margin": 0.1},
  "gate 0.5": {"gate.confidence": 0.5, "gate.margin": 0.3},
  "gate 0.8": {"gate.confidence": 0.8, "gate.margin": 0.5},
  "k 2": {"memory.k": 2},
  "k 32": {"memory.k": 32},
  "looks x 4": {"learn.look.updates": 24},
  "n 3": {"samples": 3},
  "n 12": {"samples": 12},
  "KL 0.01": {"kl.target": 0.01, "kl.coef": 0.5},
  "KL 0.2": {"kl.target": 0.2, "kl.coef": 0.02},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
  """One row on one stream with one seed; shares from 0 to 1, None where there are no labels.

  `commit` is that of the code that ran.
  """

  row: str
  stream: str
  seed: int
  shifted_before: float
  shifted_after: float
  original_before: float
  original_after: float
  votes_right: float | None
  worst: float | None
  applied: int
  refused: int
  commit: str

  @property
  def gain(self) -> float:
    """Points."""
    return 100 * (self.shifted_after - self.shifted_before)

  @property
  def kept(self) -> float:
    """Points: how the original domain changed."""
    return 100 * (self.original_after - self.original_before)


def settings(args: argparse.Namespace, row: str, stream: str, seed: int, folder: Path) -> Any:
  """The demo's config, changed as the row says; a crafted stream is a file in `folder`."""
  c = demo.get_config("blur" if stream in CRAFTED else stream)
  c = c.copy_and_resolve_references().unlock()
  c.seed, c.stream.seed = seed, 2000 + seed
  c.model.path, c.baseline, c.pace, c.keep = args.model, False, "lockstep", 1
  c.stream.n, c.shifted.n, c.original.n = args.requests, args.n, args.n
  if stream in CRAFTED:
    c.requests = str(folder / f"{stream}.jsonl")
  c.update_from_flattened_dict(ROWS[row])
  return c.lock()


def craft(c: Any, stream: str) -> None:
  """Writes the requests of a stream that means ill to `c.requests`, where they are not yet."""
  if Path(c.requests).exists():
    return
  Path(c.requests).parent.mkdir(parents=True, exist_ok=True)
  asked = list(evaluate.made(c.stream))
  if stream == "repeated":
    write_requests(c.requests, renumbered(asked[:1], c.stream.n))
    return
  policy = sampler.load_policy(c.model)
  answer = Answerer(c, policy, Published(0, policy.params), None)
  wrong: list[Task] = []
  for at in range(0, len(asked), c.arrivals):
    arrived = [drop_labels(task) for task in asked[at : at + c.arrivals]]
    groups = answer.sample(arrived, policy.params, jax.random.key(c.seed), 0, first=at)
    for task, group in zip(asked[at : at + c.arrivals], groups, strict=True):
      if misleads([t.answer for t in group], task.answer):
        wrong.append(task)
  write_requests(c.requests, renumbered(wrong, c.stream.n))


def misleads(said: Sequence[str | None], truth: str) -> bool:
  """Whether these samples have a majority, and it is wrong."""
  vote = voting.majority([Ballot(answer=answer, weight=1.0, view="samples") for answer in said])
  return vote.margin > 0 and not verifiers.alike(vote.answer, truth, verifier="equal")


def renumbered(asked: Sequence[Task], n: int) -> list[Task]:
  """`n` unlabelled tasks: these in turn, each visit under an id of its own."""
  if not asked:
    raise ValueError("no question is left to ask")
  visits = [asked[i % len(asked)] for i in range(n)]
  return [dataclasses.replace(drop_labels(t), id=f"{i}-{t.id}") for i, t in enumerate(visits)]


def run(args: argparse.Namespace, row: str, stream: str, seed: int) -> Cell:
  """One cell; what all rows have in common lies in a folder of the stream and the seed."""
  shared = args.out / f"{stream}-{seed}"
  begin(shared, {name: str(vars(args)[name]) for name in ("model", "requests", "n")})
  c, workdir = settings(args, row, stream, seed, shared), shared / row.replace(", ", "-")
  kept = workdir / "cell.json"
  if kept.exists():
    return Cell(**json.loads(kept.read_text()))
  if stream in CRAFTED:
    craft(c, stream)
  before = shared / "before.json"  # What `online` measures first, under its own name.
  if before.exists() and not (workdir / before.name).exists():
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(before, workdir / before.name)
  result = online.main(c, workdir)
  shutil.copyfile(workdir / before.name, before)
  labels = workdir / "labels" / METRICS_FILE
  right = [line["ground_truth_ratio"] for line in read_lines(labels)] if labels.exists() else []
  cell = Cell(
    row=row,
    stream=stream,
    seed=seed,
    votes_right=result["label_accuracy"],
    worst=worst(right, WINDOW // c.arrivals),
    applied=result["updates_applied"],
    refused=result["updates_refused"],
    commit=commit(),
    **{name: result[name] for name in MEASURED},
  )
  kept.write_text(json.dumps(dataclasses.asdict(cell)))
  return cell


def worst(right: Sequence[float], window: int) -> float | None:
  """The lowest mean of so many neighbours less that of the first; None where there are fewer."""
  if len(right) < window:
    return None
  means = np.convolve(right, np.full(window, 1 / window), mode="valid")
  return float(means.min() - means[0])


def gains(cells: Sequence[Cell], streams: Sequence[str]) -> list[float]:
  """A row's gain in points with each seed, its mean over those of these streams that start weak.

  That is below `WEAK` on average over the seeds. A seed that lacks one has no part in it.
  """
  found = {s: [cell for cell in cells if cell.stream == s] for s in streams}
  weak = [s for s in streams if np.mean([c.shifted_before for c in found[s]]) < WEAK]
  by_seed = [
    [cell.gain for s in weak for cell in found[s] if cell.seed == seed]
    for seed in sorted({cell.seed for cell in cells})
  ]
  return [float(np.mean(each)) for each in by_seed if len(each) == len(weak) > 0]


def summary(cells: Sequence[Cell]) -> list[dict[str, Any]]:
  """A line a row of the table, points and percent.

  `gain` is the mean over the seeds, with a 95% interval (Student's t), of those over all shifts
  that the row was run on (`gains`). `end` and `kept` are the worst of any stream, means over its
  seeds.
  """
  lines = []
  for row in dict.fromkeys(cell.row for cell in cells):
    mine = [cell for cell in cells if cell.row == row]
    by_stream = {
      s: [c for c in mine if c.stream == s] for s in dict.fromkeys(c.stream for c in mine)
    }
    mean = lambda found: float(np.mean(found))
    gained = gains(mine, [stream for stream in by_stream if stream in GROUPS["all"]])
    told = [c.votes_right for c in mine if c.votes_right is not None]
    falls = [c.worst for c in mine if c.worst is not None]
    lines.append(
      {
        "row": row,
        "streams": {
          stream: [mean([c.shifted_before for c in found]), mean([c.shifted_after for c in found])]
          for stream, found in by_stream.items()
        },
        "seeds": sorted({cell.seed for cell in mine}),
        "runs": len(mine),
        "gain": mean(gained) if gained else None,
        "gain_interval": mean_interval(gained) if len(gained) > 1 else None,
        "end": min(mean([c.gain for c in found]) for found in by_stream.values()),
        "kept": min(mean([c.kept for c in found]) for found in by_stream.values()),
        "worst": 100 * min(falls) if falls else None,
        "votes_right": 100 * mean(told) if told else None,
        "applied": mean([c.applied for c in mine]),
        "refused": mean([c.refused for c in mine]),
      }
    )
  return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: first the rows, then each row's accuracy after each stream, below those before."""
  points = lambda x: "-" if x is None else f"{x:+.1f}"
  share = lambda x: "-" if x is None else f"{x:.1f}"
  made = [
    "| rule | runs | gain (95%) | worst end | worst moment | original, worst | votes right |"
    " applied / refused |",
    "|---|---|---|---|---|---|---|---|",
  ]
  made += [
    f"| {line['row']} | {line['runs']} | {points(line['gain'])}{span(line['gain_interval'])} "
    f"| {points(line['end'])} | {points(line['worst'])} | {points(line['kept'])} "
    f"| {share(line['votes_right'])} | {line['applied']:.0f} / {line['refused']:.0f} |"
    for line in lines
  ]
  before = {s: percent(ends[0]) for line in lines for s, ends in line["streams"].items()}
  cells = {("before", stream): before[stream] for stream in STREAMS if stream in before}
  for line in lines:
    cells |= {(line["row"], s): percent(ends[1]) for s, ends in line["streams"].items()}
  return "\n".join([*made, "", grid("rule", cells)])


def by_stream(cells: Sequence[Cell]) -> str:
  """Markdown: how one row went on each stream, means over the seeds and each seed's end."""
  streams = [stream for stream in STREAMS if any(cell.stream == stream for cell in cells)]
  runs = {stream: [cell for cell in cells if cell.stream == stream] for stream in streams}
  ends = lambda name: lambda found: percent(np.mean([getattr(c, name) for c in found]))
  told = lambda found: [c.votes_right for c in found if c.votes_right is not None]
  columns = {
    "before": ends("shifted_before"),
    "after": ends("shifted_after"),
    "each seed": lambda found: " ".join(percent(c.shifted_after) for c in found),
    "original before": ends("original_before"),
    "original after": ends("original_after"),
    "votes right": lambda found: percent(np.mean(told(found))) if told(found) else "-",
    "applied / refused": lambda found: " / ".join(
      f"{np.mean([getattr(c, name) for c in found]):.0f}" for name in ("applied", "refused")
    ),
  }
  shown = {(name, s): show(runs[s]) for name, show in columns.items() for s in streams}
  return grid(cells[0].row, shown)


def by_group(cells: Sequence[Cell]) -> str:
  """Markdown: what one row gains in points on average over each of `GROUPS` that it has whole."""
  there = {cell.stream for cell in cells}
  each = {name: gains(cells, group) for name, group in GROUPS.items() if there.issuperset(group)}
  shown = {
    ("gain", name): f"{np.mean(found):+.1f}{span(mean_interval(found) if found[1:] else None)}"
    for name, found in each.items()
    if found
  }
  return grid("over the shifts that start weak", shown) if shown else ""


def percent(share: float) -> str:
  return f"{100 * share:.1f}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
  parser.add_argument("--streams", nargs="+", choices=STREAMS, default=STREAMS, metavar="STREAM")
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--requests", type=int, default=384)
  parser.add_argument("--n", type=int, default=200, help="held-out questions of each domain")
  parser.add_argument("--model", default="assets/tiny-vl")
  parser.add_argument(
    "--known", nargs="+", type=Path, default=[], help="of earlier runs: OUT/rules.json"
  )
  parser.add_argument("--out", type=Path, default=Path("runs/rules"))
  args = parser.parse_args()
  asked = {name: vars(args)[name] for name in ("model", "requests", "n")}
  cells = [Cell(**cell) for cell in known(args.known, "cells", asked, by=("row", "stream", "seed"))]
  there = {(cell.row, cell.stream, cell.seed) for cell in cells}
  for seed in args.seeds:  # All rows of one seed before the next: a table that is stopped is whole.
    for stream in args.streams:
      left = [row for row in args.rows if (row, stream, seed) not in there]
      cells += [run(args, row, stream, seed) for row in left]
      found = {"cells": [dataclasses.asdict(cell) for cell in cells], "rows": summary(cells)}
      record(args.out, "rules", {**asked, **found})
  print(table(summary(cells)))
  for row in args.rows if len(args.rows) == 1 else ():
    mine = [cell for cell in cells if cell.row == row]
    print("", by_stream(mine), "", by_group(mine), sep="\n")


if __name__ == "__main__":
  main()
