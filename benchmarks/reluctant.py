"""A policy that could look and seldom does, from which RL has to learn when to: its tool use, made.

    python benchmarks/reluctant.py --out runs/reluctant
    python benchmarks/grpo.py --model runs/reluctant/model --out runs/grpo
    python benchmarks/reluctant.py --looks 0.3 --abstain 0.94 --out runs/abstaining

The SFT weights of the embedded model always look, and are right in 19 of 20 digit scenes: nothing
is left to learn. Here they are tuned on rows of which the share `looks` looks before it answers, as
demonstrated, and all others give the answer at once, under the same prompt. An overview does not
show what is asked, so that they teach to guess. Of those that look the share `abstain` looks at the
right place and says that it cannot read what is there: as long as a policy does that, looking is
worth less than a guess. It writes OUT/model, and OUT/reluctant.json: of samples at temperature 1
how many look (RaPR), and how many are right of those and of the others, with command and commit.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from record import begin, record  # The file beside this one.

from configs import tiny_sft
from pixelis_jax import agent, evaluate, sampler, sft
from pixelis_jax.algo.answers import equal
from pixelis_jax.data import demos
from pixelis_jax.data.mixture import Mixture
from pixelis_jax.data.questions import write_questions
from pixelis_jax.types import Box, Task, Trajectory

ROWS = "rows.jsonl"
ABSTAINED = "unreadable"


def settings(args: argparse.Namespace) -> Any:
  """Rows are the file's, but for the looks that are read, which are demonstrations."""
  c = tiny_sft.get_config("debug").copy_and_resolve_references().unlock()
  c.seed, c.model.path, c.model.random_seed = args.seed, args.start, -1
  c.data.file, c.data.made = str(args.out / ROWS), args.looks * (1.0 - args.abstain)
  c.data.n, c.data.parts, c.data.direct, c.data.zoom_only = 1_000_000, 0, 0.0, 1.0
  c.batch, c.see_steps = 24, 0
  c.optimizer.lr, c.optimizer.steps, c.optimizer.warmup = args.lr, args.steps, args.steps // 10
  c.eval.n, c.eval.every, c.log_every, c.save_every = args.n, args.steps, 20, args.steps
  return c.lock()


def rows(args: argparse.Namespace, tasks: Sequence[Task]) -> list[Task]:
  """Questions without boxes, which are answered at once, and some that are looked at for nothing.

  Their part of the file is such that of all rows, demonstrations too, they are `looks * abstain`.
  """
  abstaining = args.looks * args.abstain
  share = abstaining / (1.0 - args.looks + abstaining)
  rng, made = np.random.default_rng(args.seed), []
  for task in tasks:
    x, y = task.boxes[0].center
    half = demos.TIGHT * task.boxes[0].width / 2  # As it is demonstrated.
    box = Box(x - half, y - half, x + half, y + half)
    changes = {"boxes": (box,), "answer": ABSTAINED} if rng.random() < share else {"boxes": ()}
    made.append(dataclasses.replace(task, **changes))
  return made


def shares(played: Sequence[Trajectory]) -> dict[str, float | None]:
  """Who looked, and who was right; None of those of whom there are none."""
  looked = np.array([t.calls > 0 for t in played])
  right = np.array([t.answer is not None and equal(t.answer, t.task.answer) for t in played])
  of = lambda those: float(right[those].mean()) if those.any() else None
  return {
    "rapr": float(looked.mean()),
    "right": float(right.mean()),
    "right_looked": of(looked),
    "right_guessed": of(~looked),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--start", default="assets/tiny-vl-sft", help="a model that looks")
  parser.add_argument("--looks", type=float, default=0.1)
  parser.add_argument("--abstain", type=float, default=0.0, help="share of these, for nothing")
  parser.add_argument("--guesses", type=int, default=2048, help="questions of the other rows")
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--lr", type=float, default=3e-4)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--n", type=int, default=400, help="held-out questions")
  parser.add_argument("--out", type=Path, default=Path("runs/reluctant"))
  args = parser.parse_args()
  asked = {name: value for name, value in vars(args).items() if name != "out"}
  begin(args.out, {name: str(value) for name, value in asked.items()})
  c = settings(args)
  if not (args.out / ROWS).exists():
    made = Mixture(split="train", seed=1_000 + args.seed, kinds=c.data.kinds, size=args.guesses)
    write_questions(args.out / ROWS, rows(args, list(made)))
  sft.main(c, args.out)
  c.model.path = str(args.out / "model")
  policy = sampler.load_policy(c.model)
  generate = policy.sampler.bind(
    policy.params, key=jax.random.key(args.seed), version=0, temperature=1.0
  )
  held_out, limits = evaluate.tasks(c.eval, policy), agent.Limits(**c.limits)
  found = evaluate.run(held_out, generate=generate, run=policy.tools.run, limits=limits)
  result = shares(found.trajectories)
  print(json.dumps({**result, **record(args.out, "reluctant", {**asked, **result})}))


if __name__ == "__main__":
  main()
