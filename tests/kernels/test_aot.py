"""Kernels compile for the chips they are meant for, and the command says so of what does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """The small specs for a chip of each kind, in a process of its own: it loads their compilers."""
  out = tmp_path_factory.mktemp("aot") / "aot.json"
  command = [sys.executable, "-m", "kernels.aot", "--targets", "v5e", "h100", "a100"]
  command += ["--out", str(out), "--specs", "small", "tiny"]
  # Where `make test` puts the extra `aot`; installed with the rest, it is found as well.
  paths = [str(ROOT / ".venv" / "aot"), os.environ.get("PYTHONPATH", "")]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=env)
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  return json.loads(out.read_text())


def found(rows, target, op, spec, direction):
  at = {"target": target, "op": op, "spec": spec, "direction": direction}
  [row] = [row for row in rows if at.items() <= row.items()]
  return row


@pytest.mark.parametrize("target, kernels", [("v5e", 1), ("h100", 1), ("a100", 0)])
def test_attention_compiles_to_kernels(rows, target, kernels):
  """Backward: the forward one again, then one for the queries and one for the keys."""
  assert found(rows, target, "attention", "small", "forward")["kernels"] == kernels
  assert found(rows, target, "attention", "small", "backward")["kernels"] == 3 * kernels


def test_registers_are_told_of_mosaic_kernels(rows):
  row = found(rows, "h100", "attention", "small", "forward")
  # 65,536 registers for 3 warpgroups of 128 threads, in steps of 8: no more than 168 at the launch.
  assert row["registers"] == 168 and row["spills"] < 256
  assert "registers" not in found(rows, "v5e", "attention", "small", "forward")


def test_every_op_fits_every_chip(rows):
  for target in ("v5e", "h100", "a100"):
    for direction in ("forward", "backward"):
      for op, spec in (("attention", "small"), ("attention", "tiny"), ("token_logps", "tiny")):
        row = found(rows, target, op, spec, direction)
        assert row["error"] == "" and row["peak"] < 2**30


def test_what_does_not_fit_is_an_error(monkeypatch, capsys):
  def measure(op, name, direction, target):
    error = "" if direction == "forward" else "peak 9 exceeds 8 bytes of memory"
    return {"target": target, "op": op, "spec": name, "direction": direction, "error": error}

  monkeypatch.setattr(aot, "measure", measure)
  assert aot.main(["--targets", "v5e", "--ops", "attention", "--specs", "tiny"]) == 1
  assert "exceeds 8 bytes" in (told := capsys.readouterr().out) and "1 of 2 compiled" in told
  with pytest.raises(SystemExit):
    aot.main(["--specs", "no_such_spec"])
  assert "no op of" in capsys.readouterr().err
