"""First turns of GRPO's rollouts: prompts whose keys are shared by their samples, and copied.

    python benchmarks/rollouts.py --questions 32 --group 8 --out runs/rollouts

Both sides read each prompt once and sample the same number of episodes, in turn. A prompt's samples
share its keys where they follow each other; dealt out in rounds, each has its own copy.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from record import record  # The file beside this one.

from configs import common
from pixelis_jax import sampler
from pixelis_jax.data.tasks import TaskSource
from pixelis_jax.types import Task, Turns

Requests = list[tuple[Task, Turns]]


def timed(policy: sampler.Policy, requests: Requests, seed: int) -> tuple[float, int, int]:
  """Seconds, sampled tokens, and bytes of the cache that is left."""
  generate = policy.sampler.bind(policy.params, key=jax.random.key(seed), version=0)
  began = time.perf_counter()
  completions = generate(requests)
  seconds = time.perf_counter() - began
  cache = next(iter(generate.prefixes.values()))[1].cache
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  return seconds, sum(len(c.tokens) for c in completions), size


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="assets/tiny-vl")
  parser.add_argument("--questions", type=int, default=32)
  parser.add_argument("--group", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--out", type=Path, default=Path("runs/rollouts"))
  args = parser.parse_args()
  policy = sampler.load_policy(common.model(args.model))
  source = TaskSource(split="train", seed=0, kinds=("framed", "beside", "parity"), size=10_000)
  tasks = [source[i] for i in range(args.questions)]
  sides = {
    "shared": [(task, ()) for task in tasks for _ in range(args.group)],
    "copied": [(task, ()) for _ in range(args.group) for task in tasks],
  }
  found: dict[str, list[tuple[float, int, int]]] = {side: [] for side in sides}
  for requests in sides.values():
    timed(policy, requests, 0)  # The first call compiles.
  for seed in range(args.repeats):
    for side, requests in sides.items():
      found[side].append(timed(policy, requests, seed))
  rows = {}
  for side, runs in found.items():
    seconds, tokens, size = (statistics.median(x) for x in zip(*runs, strict=True))
    rows[side] = {"seconds": seconds, "tokens": tokens, "cache_bytes": size, "runs": runs}
    print(f"{side}: {seconds:.3f} s, {tokens} tokens, cache {size / 2**20:.1f} MiB")
  ratios = [c[0] / s[0] for s, c in zip(found["shared"], found["copied"], strict=True)]
  print(f"copied / shared {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
  about = {"questions": args.questions, "group": args.group, "ratio": float(np.median(ratios))}
  record(args.out, "rollouts", {**about, **rows})


if __name__ == "__main__":
  main()
