"""Which released models fit which slices: `pixelis plan` of each pair, as one table.

    PYTHONPATH=.venv/aot python benchmarks/plans.py --out runs/plans

A pair takes two to four minutes and is kept in the directory: an interrupted table goes on. Columns
are GiB on a device, `moved` what a device receives in an update; nothing is run. Exit code 0
whether things fit or not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from record import record  # The file beside this one.

from configs import common

SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-64", "v6e-64", "a100-8", "h100-8")
GIB = 2**30


def plan(size: str, topology: str, out: Path, overrides: list[str]) -> dict:
  """The plan's record, made once; {"problems": [why]} where nothing could be compiled."""
  file = out / f"{size}-{topology}.json"
  if not file.exists():
    command = [sys.executable, "-m", "pixelis_jax.cli", "plan", f"--out={file}"]
    command += [f"--config=configs/rft.py:{size}", f"--topology={topology}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if not file.exists():
      file.write_text(json.dumps({"problems": done.stderr.strip().splitlines()[-1:]}))
  return json.loads(file.read_text())


def row(size: str, topology: str, found: dict) -> str:
  """One line of the table."""
  if "programs" not in found:
    return f"| {size} | {topology} | {found['problems'][0]} | | | | | |"
  programs = {p["name"]: p for p in found["programs"]}
  peak = lambda p: "-" if p["error"] else f"{(p['peak'] + p['beside']) / GIB:.1f}"
  update = programs["update"]
  held = sum(found["held"][k] for k in ("weights that learn", "weights that do not", "optimizer"))
  rollout = max(
    (p for name, p in programs.items() if name != "update"), key=lambda p: p["peak"] + p["beside"]
  )
  moved = sum(update["moved"].values()) / GIB
  fits = "yes" if not found["problems"] else "; ".join(found["problems"])
  return (
    f"| {size} | {topology} | {found['memory'] / GIB:.0f} | {held / GIB:.2f} | {peak(update)} |"
    f" {peak(rollout)} | {moved:.0f} | {fits} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", nargs="+", default=list(common.SIZES), choices=common.SIZES)
  parser.add_argument("--slices", nargs="+", default=list(SLICES))
  parser.add_argument("--out", type=Path, default=Path("runs/plans"))
  args, overrides = parser.parse_known_args()
  args.out.mkdir(parents=True, exist_ok=True)
  rows = []
  print("| model | slice | GiB | state | update | rollout | moved | fits |")
  print("|---|---|---|---|---|---|---|---|")
  for size in args.sizes:
    for topology in args.slices:
      found = plan(size, topology, args.out, overrides)
      rows.append({"size": size, "topology": topology, **found})
      print(row(size, topology, found), flush=True)
  record(args.out, "plans", {"rows": rows, "overrides": overrides})


if __name__ == "__main__":
  main()
