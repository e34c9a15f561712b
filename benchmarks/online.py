"""The online loop over shifts and seeds: its gain, its forgetting, plain majority voting beside it.

    python benchmarks/online.py --shifts blur dim-skewed static --seeds 0 1 2 --out runs/bench

Runs `pixelis_jax.online` once for each shift and seed (a finished one is not run again) and prints
one table: means over the seeds of held-out accuracy, and the 95% interval (Student's t) of each
change. The same rows go to OUT/online.json with the command, commit and device.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from record import ROOT, record, span  # The file beside this one.

from pixelis_jax.metrics import mean_interval


def run(shift: str, seed: int, out: Path, extra: list[str]) -> dict:
  """The result of one run; raises CalledProcessError if it failed."""
  workdir = out / f"{shift}-{seed}"
  command = [sys.executable, "-m", "pixelis_jax.online", f"--config=configs/demo.py:{shift}"]
  command += [f"--workdir={workdir}", f"--config.seed={seed}", *extra]
  subprocess.run(command, check=True, cwd=ROOT)
  return json.loads((workdir / "result.json").read_text())


def row(shift: str, results: list[dict]) -> dict:
  """Means over the seeds, in percent."""
  percent = lambda name: [100 * r[name] for r in results if r[name] is not None]
  gain = np.subtract(percent("shifted_after"), percent("shifted_before"))
  kept = np.subtract(percent("original_after"), percent("original_before"))
  names = ("shifted_before", "shifted_after", "majority_after", "original_before", "original_after")
  several = len(results) > 1
  return {
    "shift": shift,
    "seeds": [r["seed"] for r in results],
    "n": results[0]["n"],
    **{name: float(np.mean(percent(name))) if percent(name) else None for name in names},
    "gain": float(gain.mean()),
    "gain_interval": mean_interval(gain.tolist()) if several else None,
    "original_change": float(kept.mean()),
    "original_interval": mean_interval(kept.tolist()) if several else None,
    "updates_applied": float(np.mean([r["updates_applied"] for r in results])),
    "updates_refused": float(np.mean([r["updates_refused"] for r in results])),
    "answer_p50_s": float(np.median([r["answer_p50_s"] for r in results])),
    "answer_p95_s": float(np.median([r["answer_p95_s"] for r in results])),
  }


def table(rows: list[dict]) -> str:
  """Markdown."""
  number = lambda x: "-" if x is None else f"{x:.1f}"
  lines = [
    "| stream | before | after | gain (95%) | plain majority | original before | change (95%) |"
    " updates applied / refused |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in rows:
    lines.append(
      f"| {r['shift']} | {r['shifted_before']:.1f} | {r['shifted_after']:.1f} "
      f"| {r['gain']:+.1f}{span(r['gain_interval'])} | {number(r['majority_after'])} "
      f"| {r['original_before']:.1f} | {r['original_change']:+.1f}{span(r['original_interval'])} "
      f"| {r['updates_applied']:.0f} / {r['updates_refused']:.0f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shifts", nargs="+", default=["blur", "dim-skewed", "static"])
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--out", type=Path, default=Path("runs/bench"))
  args, extra = parser.parse_known_args()
  rows = [row(s, [run(s, seed, args.out, extra) for seed in args.seeds]) for s in args.shifts]
  print(table(rows))
  print(json.dumps(record(args.out, "online", {"rows": rows})))


if __name__ == "__main__":
  main()
