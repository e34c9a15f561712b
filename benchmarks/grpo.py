"""What GRPO's parts are worth, from one SFT model: rewards, estimators, losses, what is sampled.

    python benchmarks/reluctant.py --out runs/reluctant
    python benchmarks/grpo.py --rows sft task "+ coherence" "+ curiosity" "+ online" --out runs/grpo
    python benchmarks/grpo.py --known docs/results/grpo.json --seeds 0 1 2 --out runs/grpo
    python benchmarks/grpo.py --model runs/abstaining/model --steps 200 \
      --rows sft task dr_grpo "curiosity, release" "curiosity x 4" --out runs/grpo-abstaining

The model is one that seldom looks (benchmarks/reluctant.py), so that there is something to learn;
or one to which looking is worth less than guessing, so that its tool use collapses: does curiosity
stop that? A row of `ROWS` is configs/tiny_rft.py with a few fields changed; "sft" is the model as
it is, and "+ online" goes on from "+ curiosity" with unlabelled requests of the original domain.
Each seed has other questions and other samples; a finished run is not run again, nor are those that
--known, earlier grpo.json, have: the new one takes them over, a later one's in the place of an
earlier one's. Held-out questions are one set for all rows. A cell is the mean over the seeds with
its 95% interval (Student's t); of samples that are right, of rewards, of who looks at all (RaPR)
and of groups that tell nothing, over the first and the last `EDGE` steps. The curves go to
OUT/grpo.json with command, commit and device.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import begin, commit, known, record  # The file beside this one.

from configs import demo, tiny_rft
from pixelis_jax import agent, evaluate, online, rft, sampler
from pixelis_jax.metrics import METRICS_FILE, mean_interval, read_lines

EDGE = 5
CURVES = {
  "sampled right": "task",  # At temperature 1, where held-out answers are greedy.
  "reward": "critic/rewards/mean",
  "RaPR": "rapr",
  "zero variance": "zero_variance",
}
ASKED = ("model", "steps", "lr", "questions", "n", "requests")
ONLY_TASK = {"reward.weights.curiosity": 0.0}
COHERENT = {**ONLY_TASK, "reward.weights.coherence": 0.1}
SFT, ONLINE, START = "sft", "+ online", "+ curiosity"
ROWS: dict[str, dict[str, Any]] = {
  SFT: {},
  # Pixelis' ablation.
  "task": ONLY_TASK,
  "+ coherence": COHERENT,
  START: {**COHERENT, "reward.weights.curiosity": 1.0},
  ONLINE: {},
  # What keeps a policy looking that gains nothing by it yet (benchmarks/reluctant.py --abstain).
  "curiosity, release": {"reward.curiosity": "release"},
  "curiosity x 4": {"reward.weights.curiosity": 4.0},
  # configs/tiny_rft.py as it is: dr_grpo, task, format and curiosity. Then others of each table.
  "dr_grpo": {},
  **{
    name: {"grpo.adv_estimator": name}
    for name in ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo")
  },
  **{name: {"grpo.loss.loss_mode": name} for name in ("sapo", "cispo", "clip_cov", "kl_cov")},
  "dynamic sampling": {"grpo.filter_groups.enable": True},
  "SSR": {"grpo.replay.capacity": 1024, "grpo.replay.alpha": 1.0},
  **{recipe: {} for recipe in tiny_rft.RECIPES},  # As that config has them.
}


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
  """A row with one seed: held-out accuracy, calls a question, and what was logged of each step.

  `commit` is that of the code that ran.
  """

  row: str
  seed: int
  accuracy: float
  calls: float
  curves: dict[str, list[float]]
  commit: str


def settings(args: argparse.Namespace, row: str, seed: int) -> Any:
  recipe = row if row in tiny_rft.RECIPES else ""
  c = tiny_rft.get_config(recipe).copy_and_resolve_references().unlock()
  c.seed, c.model.path = seed, args.model
  c.optimizer.steps, c.optimizer.lr, c.grpo.questions = args.steps, args.lr, args.questions
  c.eval.n, c.eval.every = args.n, args.steps
  c.update_from_flattened_dict(ROWS[row])
  return c.lock()


def run(args: argparse.Namespace, row: str, seed: int) -> Run:
  """One seed of a row; OUT/ROW-SEED holds it."""
  workdir = args.out / f"{row.replace(' ', '')}-{seed}"
  begin(workdir, {name: str(vars(args)[name]) for name in ASKED})
  result = workdir / "result.json"
  if not result.exists():
    measure = {SFT: asked_alone, ONLINE: learn_online}.get(row, train)
    found = measure(args, row, seed, workdir)
    result.write_text(json.dumps({**found, "commit": commit()}))
  return Run(row=row, seed=seed, **json.loads(result.read_text()))


def asked_alone(args: argparse.Namespace, row: str, seed: int, workdir: Path) -> dict[str, Any]:
  """The model as it is, on the questions that all rows are asked."""
  c = settings(args, row, seed)
  policy = sampler.load_policy(c.model)
  limits = agent.Limits(**c.limits)
  found = evaluate.greedy(policy, policy.params, evaluate.tasks(c.eval, policy), limits=limits)
  return {"accuracy": found.accuracy, "calls": found.tool_calls, "curves": {}}


def train(args: argparse.Namespace, row: str, seed: int, workdir: Path) -> dict[str, Any]:
  """GRPO, and what its log says."""
  rft.main(settings(args, row, seed), workdir)
  lines = read_lines(workdir / METRICS_FILE)
  curve = lambda name: [line[name] for line in lines if name in line]
  return {
    "accuracy": curve("val-core/all/acc/mean@1")[-1],
    "calls": curve("val-aux/all/tool_call_counts/mean@1")[-1],
    "curves": {title: curve(name) for title, name in CURVES.items()},
  }


def learn_online(args: argparse.Namespace, row: str, seed: int, workdir: Path) -> dict[str, Any]:
  """The loop from what `START` left, on requests of the domain that it was trained in."""
  start = args.out / f"{START.replace(' ', '')}-{seed}" / "model"
  if not start.is_dir():
    raise FileNotFoundError(f"{start} is not there: the row {ONLINE!r} comes after {START!r}")
  c = demo.get_config("blur").copy_and_resolve_references().unlock()
  c.seed, c.stream.seed, c.pace, c.baseline = seed, 2000 + seed, "lockstep", False
  c.model.path, c.stream.shift, c.stream.n = str(start), "none", args.requests
  c.shifted.shift = "none"
  c.gate.clearer = False  # No view tells more than the plain look where it was trained.
  for questions in (c.shifted, c.original):
    questions.n, questions.seed = args.n, tiny_rft.get_config().eval.seed
  found = online.main(c.lock(), workdir / "online")
  calls = found["tool_calls_per_question"]
  return {"accuracy": found["original_after"], "calls": calls, "curves": {}}


def line(runs: Sequence[Run]) -> dict[str, Any]:
  """A row of the table: accuracy in percent, and of each curve the means of its edges."""
  accuracy = [100 * r.accuracy for r in runs]
  edges = {
    title: [
      float(np.mean([np.mean(part(r.curves[title])) for r in runs]))
      for part in (lambda x: x[:EDGE], lambda x: x[-EDGE:])
    ]
    for title in CURVES
    if runs[0].curves
  }
  return {
    "row": runs[0].row,
    "seeds": [r.seed for r in runs],
    "accuracy": float(np.mean(accuracy)),
    "interval": mean_interval(accuracy) if len(runs) > 1 else None,
    "calls": float(np.mean([r.calls for r in runs])),
    "edges": edges,
  }


def lines(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """A line a row, in the order of `ROWS`."""
  by_row = [[r for r in runs if r.row == row] for row in ROWS]
  return [line(found) for found in by_row if found]


def table(lines: Sequence[dict[str, Any]]) -> str:
  """Markdown."""
  titles = [*CURVES]
  made = [
    f"| row | held-out accuracy (95%) | calls a question | {' | '.join(titles)} |",
    "|---" * (3 + len(titles)) + "|",
  ]
  for found in lines:
    span = found["interval"]
    interval = "" if span is None else f" ({span[0]:.1f} to {span[1]:.1f})"
    edges = [found["edges"].get(title) for title in titles]
    cells = ["-" if e is None else f"{e[0]:.2f} to {e[1]:.2f}" for e in edges]
    accuracy = f"{found['accuracy']:.1f}{interval}"
    made.append(f"| {found['row']} | {accuracy} | {found['calls']:.2f} | {' | '.join(cells)} |")
  return "\n".join(made)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="runs/reluctant/model")
  parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--questions", type=int, default=16)
  parser.add_argument("--lr", type=float, default=1e-4)
  parser.add_argument("--n", type=int, default=400, help="held-out questions")
  parser.add_argument("--requests", type=int, default=256, help=f"of {ONLINE!r}")
  parser.add_argument(
    "--known", nargs="+", type=Path, default=[], help="of earlier runs: OUT/grpo.json"
  )
  parser.add_argument("--out", type=Path, default=Path("runs/grpo"))
  args = parser.parse_args()
  asked = {name: vars(args)[name] for name in ASKED}
  runs = [Run(**found) for found in known(args.known, "runs", asked, by=("row", "seed"))]
  for seed in args.seeds:
    for row in args.rows:
      # "sft" has no seed.
      if not any(r.row == row and (r.seed == seed or row == SFT) for r in runs):
        runs.append(run(args, row, seed))
      kept = [dataclasses.asdict(r) for r in runs]
      record(args.out, "grpo", {**asked, "rows": lines(runs), "runs": kept})
  print(table(lines(runs)))


if __name__ == "__main__":
  main()
