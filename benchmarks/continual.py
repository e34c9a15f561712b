"""Continual learning: domains one after the other in one stream; what is learned, and what stays.

    python benchmarks/continual.py --seeds 0 1 2 --out runs/continual

One online run a seed reads the domains' requests in turn, without labels and without being told
where one ends. After each domain the published weights answer held-out questions of all of them,
and of the original one. R[i][j] is the accuracy on domain j after domain i, R[-1] that before any:

  learned    mean over domains of R[j][j] - R[-1][j]
  retained   mean over domains of R[last][j] - R[-1][j]
  forgotten  mean over all domains but the last of max over i of R[i][j], less R[last][j]

The last is the forgetting measure of https://arxiv.org/abs/1801.10112. A cell of the table is the
mean over the seeds, an interval Student's t. It goes to OUT/continual.json with command, commit and
device. A stage that was finished is not run again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from record import begin, record, span  # The file beside this one.

from configs import demo
from pixelis_jax import agent, evaluate, online, sampler, ttrl
from pixelis_jax.data.requests import Request
from pixelis_jax.data.tasks import drop_labels
from pixelis_jax.metrics import mean_interval
from pixelis_jax.types import Task

DOMAINS = ("dim", "rotate", "blur", "noise", "invert")
ORIGINAL = "none"


def settings(args: argparse.Namespace, seed: int) -> Any:
  """The demo's config; streams and held-out questions are made here, a domain each."""
  c = demo.get_config("blur").copy_and_resolve_references().unlock()
  c.seed, c.pace, c.keep, c.model.path = seed, "lockstep", 1, args.model
  return c.lock()


def asked(c: Any, of: str, shift: str, *, n: int, seed: int) -> list[Task]:
  """Questions of one domain, from the handwriting of `of`, a field of the config."""
  questions = c[of].copy_and_resolve_references().unlock()
  questions.shift, questions.n, questions.seed = shift, n, seed
  return list(evaluate.made(questions))


def run(args: argparse.Namespace, seed: int) -> Float[np.ndarray, "stages domains"]:
  """Accuracy, 0 to 1: rows before any domain and after each, columns domains and the original."""
  workdir = args.out / str(seed)
  told = {name: str(vars(args)[name]) for name in ("model", "requests", "n")}
  begin(workdir, told | {"domains": " ".join(args.domains)})
  c = settings(args, seed)
  policy = sampler.load_policy(c.model)
  held_out = [
    asked(c, "shifted", shift, n=args.n, seed=c.shifted.seed) for shift in (*args.domains, ORIGINAL)
  ]
  # Seeds differ from domain to domain, and with them the ids: no request comes twice.
  stream: list[Request] = []
  for at, shift in enumerate(args.domains):
    tasks = asked(c, "stream", shift, n=args.requests, seed=2000 + 100 * seed + at)
    stream += [Request(task=drop_labels(task)) for task in tasks]
  probed = evaluate.tasks(c.probe.tasks, policy)
  probe = ttrl.make_probe(c, policy, [drop_labels(task) for task in probed])
  limits = agent.Limits(**c.limits)
  rows = []
  for stage in range(len(args.domains) + 1):
    kept = workdir / f"stage-{stage}.json"
    if not kept.exists():
      params = policy.params
      if stage:
        end = stage * args.requests
        say = lambda done, signals, end=end: print(f"seed {seed}: {done} of {end}", flush=True)
        # A longer stream under the same workdir is a run that goes on.
        learned = online.run(c, policy, policy, stream[:end], probe, workdir / "online", say)
        params = learned.params
      found = [evaluate.greedy(policy, params, tasks, limits=limits) for tasks in held_out]
      kept.write_text(json.dumps([result.accuracy for result in found]))
    rows.append(json.loads(kept.read_text()))
  return np.array(rows)


def measures(accuracy: Float[np.ndarray, "stages domains"]) -> dict[str, float]:
  """Points; the last column is the original domain, of which only the change is told."""
  before, *after = 100 * accuracy
  after = np.array(after)
  domains = after[:, :-1]
  count = len(domains)
  own = domains[np.arange(count), np.arange(count)]
  best = domains[:, :-1].max(axis=0)
  return {
    "learned": float((own - before[:-1]).mean()),
    "retained": float((domains[-1] - before[:-1]).mean()),
    "forgotten": float((best - domains[-1, :-1]).mean()) if count > 1 else 0.0,
    "original": float(after[-1, -1] - before[-1]),
  }


def table(domains: Sequence[str], found: Sequence[Float[np.ndarray, "stages domains"]]) -> str:
  """Markdown: accuracy in percent after each domain, then the measures."""
  mean = 100 * np.mean(found, axis=0)
  names = ["before", *(f"after {domain}" for domain in domains)]
  made = [f"| | {' | '.join([*domains, 'original'])} |", "|---" * (len(domains) + 2) + "|"]
  for name, row in zip(names, mean, strict=True):
    made.append(f"| {name} | {' | '.join(f'{x:.1f}' for x in row)} |")
  made += ["", "| measure | points (95%) |", "|---|---|"]
  told = [measures(accuracy) for accuracy in found]
  for name in told[0]:
    values = [m[name] for m in told]
    interval = mean_interval(values) if len(values) > 1 else None
    made.append(f"| {name} | {np.mean(values):+.1f}{span(interval)} |")
  return "\n".join(made)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--domains", nargs="+", default=DOMAINS, help="shifts, in this order")
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--requests", type=int, default=256, help="of each domain")
  parser.add_argument("--n", type=int, default=200, help="held-out questions of each domain")
  parser.add_argument("--model", default="assets/tiny-vl")
  parser.add_argument("--out", type=Path, default=Path("runs/continual"))
  args = parser.parse_args()
  found = [run(args, seed) for seed in args.seeds]
  print(table(args.domains, found))
  kept = {"domains": list(args.domains), "accuracy": [a.tolist() for a in found]}
  record(args.out, "continual", {**kept, "measures": [measures(a) for a in found]})


if __name__ == "__main__":
  main()
