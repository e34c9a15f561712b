"""Calls a second that the tools answer, as a batch of episodes makes them.

    python benchmarks/throughput.py --n 12 --seed 1 --out runs/throughput

Scripted solvers answer questions of all kinds, n each, and the calls that they made are made again,
an operation's all at once from as many threads as episodes have:
  alone       in this process, one after the other
  1, 2, ...   by so many worker processes, nothing remembered
  remembered  by workers that have computed the same before
Workers have started and loaded their models before. Medians of the repeats, which take turns. Small
operations are never sent to workers: their columns say what the threads cost.
"""

import argparse
import json
import operator
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from record import record  # The file beside this one.

from pixelis_jax import agent
from pixelis_jax.chat.family import frame_of
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.data.mixture import KINDS, Mixture
from pixelis_jax.tools import TOOLS, Options, Toolbox
from pixelis_jax.tools.workers import Settings, Workers
from pixelis_jax.types import Task, ToolCall, ToolResult, value


@value
class Made:
  """A call, and what it was made after."""

  call: ToolCall
  task: Task
  results: tuple[ToolResult, ...]


def calls(mixture: Mixture, n: int, toolbox: Toolbox) -> Iterator[Made]:
  """What the kinds' solvers call on the first n questions."""
  for i in range(n):
    asked, results = mixture.asked(i), []
    solver = asked.solve(toolbox.sight(asked.task, results))
    call = next(solver, None)
    while call is not None:
      yield Made(call=call, task=asked.task, results=tuple(results))
      results.append(toolbox.run(call, asked.task, results))
      try:
        call = solver.send(results[-1])
      except StopIteration:
        call = None


def seconds(made: Sequence[Made], toolbox: Toolbox, threads: int) -> float:
  """Until all have been answered."""
  run = lambda one: toolbox.run(one.call, one.task, one.results)
  with ThreadPoolExecutor(threads) as pool:
    began = time.perf_counter()
    list(pool.map(run, made))
    return time.perf_counter() - began


def measure(made: Sequence[Made], ways: dict[str, tuple[Toolbox, int]], repeats: int) -> dict:
  """Of each way calls a second: the median, the lowest and the highest."""
  rates = {way: [] for way in ways}
  for toolbox, threads in ways.values():  # Workers start, load their models and remember.
    seconds(made, toolbox, threads)
  for _ in range(repeats):
    for way, (toolbox, threads) in ways.items():
      rates[way].append(len(made) / seconds(made, toolbox, threads))
  return {way: [float(f(found)) for f in (np.median, min, max)] for way, found in rates.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--n", type=int, default=12, help="questions a kind")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
  parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--tracker", default="csrt")
  parser.add_argument("--model", type=Path, default=Path("assets/tiny-vl"), help="that would call")
  parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
  args = parser.parse_args()
  cv2.setNumThreads(1)  # As in a worker.
  shown = {"shown_size": frame_of(args.model), "shown_frames": clips_of(args.model)}
  options = Options(tracker=args.tracker)
  box = lambda compute: Toolbox(tuple(TOOLS["qwen"]), **shown, compute=compute, options=options)
  pools = {n: Workers(Settings(processes=n, cached=0.0)) for n in args.processes}
  remembering = Workers(Settings(processes=max(args.processes), cached=1.0))
  ways = {
    "alone": (box(operator.call), 1),
    **{str(n): (box(pool.compute), agent.THREADS) for n, pool in pools.items()},
    "remembered": (box(remembering.compute), agent.THREADS),
  }
  made: dict[str, list[Made]] = {}
  for kind in args.kinds:
    mixture = Mixture(split="stream", seed=args.seed, kinds=(kind,), size=args.n)
    for one in calls(mixture, args.n, ways["alone"][0]):
      made.setdefault(one.call.name, []).append(one)
  print(f"{'operation':18}{'calls':>6}  " + "".join(f"{way:>12}" for way in ways))
  rows = {}
  for name, asked in made.items():
    rows[name] = {"calls": len(asked), **measure(asked, ways, args.repeats)}
    rates = "".join(f"{rows[name][way][0]:12.1f}" for way in ways)
    print(f"{name:18}{len(asked):6}  {rates}", flush=True)
  for pool in (*pools.values(), remembering):
    pool.close()
  settings = {"seed": args.seed, "n": args.n, "tracker": args.tracker}
  print(json.dumps(record(args.out, "throughput", {**settings, "rows": rows})))


if __name__ == "__main__":
  main()
