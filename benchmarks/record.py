"""What a benchmark leaves: its numbers, and how they came about."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent


def record(out: Path, name: str, result: dict) -> dict[str, str]:
  """Writes out/name.json: the result with command, commit and device; returns these three."""
  about = {
    "command": shlex.join(["python", *sys.argv]),
    "commit": commit(),
    "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
  }
  out.mkdir(parents=True, exist_ok=True)
  (out / f"{name}.json").write_text(json.dumps({**about, **result}, indent=2) + "\n")
  return about


def commit() -> str:
  """Of this code; ends in "-dirty" where files were changed, "unknown" without a history."""
  describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
  found = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=ROOT)
  return found.stdout.strip() or "unknown"


def known(files: Sequence[Path], key: str, asked: dict, *, by: Sequence[str]) -> list[dict]:
  """What `record` wrote under `key` in earlier runs, here or on another machine.

  Where two have all of the fields `by` alike, the one of the later file stands for both, in the
  place of the first.

  Raises FileNotFoundError, or ValueError where a file was made with other settings than `asked`.
  """
  latest = {}
  for file in files:
    found = json.loads(file.read_text())
    if differ := _differing(found, asked):
      raise ValueError(f"{file} was made with {differ}, asked is {asked}")
    latest |= {tuple(one[name] for name in by): one for one in found[key]}
  return [*latest.values()]


def begin(folder: Path, asked: dict[str, str]) -> None:
  """Keeps what a folder's results depend on; ValueError where it was begun with other settings."""
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / "settings.json"
  if file.exists() and (found := json.loads(file.read_text())) != asked:
    differ = _differing(found, asked)
    raise ValueError(f"{folder} was begun with {differ}: remove it, or name another --out")
  file.write_text(json.dumps(asked, indent=2))


def _differing(found: dict, asked: dict) -> dict:
  """What was found under the names of `asked`, where it is something else."""
  return {name: found.get(name) for name in asked if found.get(name) != asked[name]}


def span(interval: tuple[float, float] | None) -> str:
  """The interval of a change in points, as it stands behind its mean; "" where there is none."""
  return "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"


def grid(title: str, cells: dict[tuple[str, str], str]) -> str:
  """Markdown: a row for each first key, a column for each second, a hyphen where there is none."""
  across, down = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
  lines = [f"| {title} | {' | '.join(across)} |", "|---" * (len(across) + 1) + "|"]
  lines += [f"| {d} | {' | '.join(cells.get((d, a), '-') for a in across)} |" for d in down]
  return "\n".join(lines)
