"""SFT, GRPO and online in several processes on loopback: do they learn as one does; one is lost.

    python benchmarks/processes.py --processes 1 2 4 --out runs/processes

The debug configs of the embedded model. Each process has one CPU device, weights are split over all
of them (`mesh.fsdp`), and each reads, plays and packs its share. Gaps are to the first count's run:
the largest of any loss, of any weight, and the median weight's; of online the weights are those
published last, and its evaluations are equal where all answers and votes of the stream are, too.
Then one process of the largest count is killed, the others end, and the same command goes on until
a SIGTERM to one. What takes long is compiling: with the XLA_FLAGS of tests/conftest.py (but its
last) a third of the time.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from record import ROOT, record  # The file beside this one.
from safetensors.numpy import load_file

from pixelis_jax.evaluate import ACCURACY
from pixelis_jax.runs import save_checkpoint

TRAINING = ["--config.optimizer.steps=2", "--config.eval.n=3"]
ARGUMENTS = {
  "sft": ["--config=configs/tiny_sft.py:debug", *TRAINING],
  # The embedded model is right too often: groups would not differ.
  "rft": [
    "--config=configs/tiny_rft.py:debug",
    *TRAINING,
    "--config.grpo.temperature=1.5",
    "--config.grpo.questions=4",
    "--config.model.rows_multiple=16",
    "--config.rows_multiple=16",
  ],
  # Nine requests, four at a time: of the last some processes have none. All votes teach.
  "online": [
    "--config=configs/demo.py:debug",
    "--config.pace=lockstep",
    "--config.stream.n=9",
    "--config.gate.confidence=0.0",
    "--config.gate.margin=0.0",
    "--config.gate.clearer=False",
    "--config.temperature=1.5",
    "--config.samples=4",
    "--config.baseline=False",
  ],
}
PARTS = (*ARGUMENTS, "lost")
LOST = r"Task (\d+) heartbeat timeout|stopped sending heartbeats\):\s+(\d+)\b"


def start(program: str, workdir: Path, count: int, *arguments: str) -> list[subprocess.Popen]:
  """The program in so many processes; their output goes to `workdir`-<process>.log."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, "-m", f"pixelis_jax.{program}", f"--workdir={workdir}", *arguments]
  command += ["--config.mesh.data=1", f"--config.mesh.fsdp={count}"]
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
  env["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
  started = []
  for i in range(count):
    at = [coordinator, f"--processes={count}", f"--process={i}"] if count > 1 else []
    with Path(f"{workdir}-{i}.log").open("w") as log:
      quiet = {"stdout": log, "stderr": subprocess.STDOUT}
      started.append(subprocess.Popen([*command, *at], cwd=ROOT, env=env, **quiet))
  return started


def wait(started: list[subprocess.Popen], workdir: Path, seconds: float) -> None:
  """Until all have ended well; SystemExit with the end of a log where one has not."""
  try:
    codes = [process.wait(timeout=seconds) for process in started]
  finally:
    for process in started:
      process.kill()
  for i, code in enumerate(codes):
    if code:
      raise SystemExit(
        f"process {i} ended with {code}:\n{Path(f'{workdir}-{i}.log').read_text()[-3000:]}"
      )


def lines(workdir: Path) -> list[dict[str, float]]:
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(workdir: Path, name: str) -> list[float]:
  return [line[name] for line in lines(workdir) if name in line]


def train(program: str, workdir: Path, count: int) -> dict:
  """Losses, scores and weights of a run; one that has ended before is not run again."""
  ended = workdir / ("result.json" if program == "online" else "model/model.safetensors")
  if not ended.exists():
    wait(start(program, workdir, count, *ARGUMENTS[program]), workdir, 900)
  if program == "online":
    losses = logged(workdir / "learn", "actor/loss")
    save_checkpoint(workdir, workdir)
    scores = [answers(workdir), accuracies(json.loads(ended.read_text()))]
  else:
    losses = logged(workdir, "train/loss" if program == "sft" else "actor/loss")
    scores = logged(workdir, ACCURACY)
  weights = load_file(workdir / "model" / "model.safetensors")
  return {"losses": np.array(losses), "scores": scores, "weights": weights}


def accuracies(result: dict) -> dict[str, float]:
  names = ("shifted_before", "shifted_after", "original_before", "original_after")
  return {name: result[name] for name in names}


def answers(workdir: Path) -> list[tuple[str, str | None, str | None]]:
  """(request, a sample's answer, the voted one) of a stream's samples."""
  found = map(json.loads, (workdir / "trajectories.jsonl").read_text().splitlines())
  return [(t["id"], t["answer"], t["vote"]["answer"]) for t in found if t["tag"] == "stream"]


def gaps(one: dict, many: dict) -> dict[str, float | bool]:
  assert one["weights"].keys() == many["weights"].keys() and len(one["losses"])
  apart = [np.abs(x - many["weights"][name]).ravel() for name, x in one["weights"].items()]
  weights = np.concatenate(apart)
  return {
    "loss": float(np.abs(one["losses"] - many["losses"]).max()),
    "largest_weight": float(weights.max()),
    "median_weight": float(np.median(weights)),
    "evaluations_equal": one["scores"] == many["scores"],
  }


def lose_one(workdir: Path, count: int) -> dict:
  """Kills the last of `count` processes of an SFT run: how the others ended, and what followed."""
  shutil.rmtree(workdir, ignore_errors=True)
  config = ["--config=configs/tiny_sft.py:debug", "--config.optimizer.steps=400"]
  config += ["--config.eval.every=400", "--config.save_every=1", "--config.see_steps=0"]
  started = start("sft", workdir, count, *config)
  until(lambda: len(lines(workdir)) > 2, started)
  started[-1].kill()
  began = time.monotonic()
  try:
    codes = [process.wait(timeout=120) for process in started[:-1]]
  finally:
    for process in started:
      process.kill()
  ended = time.monotonic() - began
  told = [re.findall(LOST, Path(f"{workdir}-{i}.log").read_text()) for i in range(count - 1)]
  named = [sorted({int(a or b) for a, b in found}) for found in told]
  before = len(lines(workdir))
  again = start("sft", workdir, count, *config)
  until(lambda: len(lines(workdir)) > before + 1, again)
  again[0].send_signal(signal.SIGTERM)
  wait(again, workdir, 300)
  steps = [line["step"] for line in lines(workdir)]
  return {
    "seconds": ended,
    "codes": codes,
    "named": named,
    "resumed": steps == sorted(set(steps)) and len(steps) > before,
  }


def until(condition, started: list[subprocess.Popen]) -> None:
  end = time.monotonic() + 600
  while not condition():
    if time.monotonic() > end or any(process.poll() for process in started):
      for process in started:
        process.kill()
      raise SystemExit("the run did not come to where one process is lost")
    time.sleep(0.2)


def compare(program: str, counts: list[int], out: Path) -> list[dict]:
  """A row for each count but the first."""
  first, *others = counts
  one = train(program, out / f"{program}-{first}", first)
  rows = []
  for count in others:
    many = train(program, out / f"{program}-{count}", count)
    row = {"program": program, "processes": count, **gaps(one, many)}
    rows.append(row)
    print(
      f"| {program} | {count} | {row['loss']:.1e} |"
      f" {row['largest_weight']:.1e} | {row['median_weight']:.1e} |"
      f" {'equal' if row['evaluations_equal'] else 'differ'} |",
      flush=True,
    )
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
  parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
  parser.add_argument("--out", type=Path, default=Path("runs/processes"))
  args = parser.parse_args()
  args.out = args.out.absolute()
  args.out.mkdir(parents=True, exist_ok=True)
  print("| program | processes | loss | largest weight | median weight | evaluations |")
  print("|---|---|---|---|---|---|")
  rows = [
    row
    for part in args.parts
    if part in ARGUMENTS
    for row in compare(part, args.processes, args.out)
  ]
  result, most = {"rows": rows}, max(args.processes)
  if "lost" in args.parts:
    lost = result["lost"] = lose_one(args.out / "lost", most)
    print(
      f"of {most} processes the last was killed: the others ended after {lost['seconds']:.0f} s"
      f" with codes {lost['codes']}, naming {lost['named']}; the same command"
      f" {'went on' if lost['resumed'] else 'did not go on'}, and a SIGTERM to one ended all with 0"
    )
  record(args.out, "processes", result)


if __name__ == "__main__":
  main()
