"""Kernels compile for the chips they are meant for, and the command says so of what does not."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """The small spec for a chip of each kind, in a process of its own: it loads their compilers."""
  out = tmp_path_factory.mktemp("aot") / "aot.json"
  command = [sys.executable, "-m", "kernels.aot", "--targets", "v5e", "h100", "a100"]
  command += ["--out", str(out), "--specs", "small"]
  # Where `make test` puts the extra `aot`; installed with the rest, it is found as well.
  paths = [str(ROOT / ".venv" / "aot"), os.environ.get("PYTHONPATH", "")]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
  env["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "-1.0"  # Of XLA, around the kernels.
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


@pytest.mark.parametrize(
  "op, direction, kernels",
  [
    ("token_logps_kernel", "forward", 1),
    ("token_logps_kernel", "backward", 2),  # The forward one again, and one for the gradients.
    ("decode_attention_kernel", "forward", 1),
  ],
)
def test_kernels_that_nothing_prefers_compile_for_hopper(rows, op, direction, kernels):
  row = found(rows, "h100", op, "small", direction)
  assert row["kernels"] == kernels and row["registers"] == 168 and row["spills"] == 0
  assert {row["target"] for row in rows if row["op"] == op} == {"h100"}


def test_equal_specs_are_compiled_once():
  names = [name for op, name, direction in aot.cases(["attention"], [], "h100")]
  assert names.count("qwen3_vl_8b") == 2 and "qwen3_8b" not in names
  assert [*aot.cases(["decode_attention"], ["tiny"], "v5e")] == [
    ("decode_attention", "tiny", "forward")
  ]


def test_registers_and_vmem_are_told_of_kernels(rows):
  row = found(rows, "h100", "attention", "small", "forward")
  # 65,536 registers for 3 warpgroups of 128 threads, in steps of 8: no more than 168 at the launch.
  assert row["registers"] == 168 and row["spills"] < 256
  row = found(rows, "v5e", "attention", "small", "forward")
  # A tile of logits, 512 x 512 in float32, is 1 MiB; a kernel may have 16.
  assert "registers" not in row and 2**20 < row["vmem"] < 2**24


def test_every_op_fits_every_chip(rows):
  counts = Counter(row["target"] for row in rows)
  # Forward and backward of attention and token_logps, forward of decode_attention.
  assert counts == {"v5e": 5, "a100": 5, "h100": 5 + 3}
  assert all(row["error"] == "" and row["peak"] < 2**30 for row in rows)


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
