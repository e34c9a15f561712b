"""What claims to be a TPU kernel compiles for a TPU, and the command says so of what does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """The small specs for the smallest chip; in a process of its own, as libtpu is loaded there."""
  out = tmp_path_factory.mktemp("aot") / "aot.json"
  command = [sys.executable, "-m", "kernels.aot", "--targets", "v5e", "--out", str(out)]
  command += ["--specs", "tiny", "tiny_windows"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  assert "6 of 6 compiled and fit" in done.stdout
  return json.loads(out.read_text())


def test_kernels_compile_for_a_tpu(rows):
  of = lambda op, direction: [
    row for row in rows if row["op"] == op and row["direction"] == direction
  ]
  # One kernel forward; backward again forward, then for the queries and for the keys.
  assert [row["kernels"] for row in of("attention", "forward")] == [1, 1]
  assert [row["kernels"] for row in of("attention", "backward")] == [3, 3]
  assert all(row["error"] == "" and row["peak"] < 2**30 for row in rows)


def test_what_does_not_fit_is_an_error(monkeypatch, capsys):
  def measure(op, name, direction, target):
    error = "" if direction == "forward" else "peak 9 exceeds HBM of 8 bytes"
    return {"target": target, "op": op, "spec": name, "direction": direction, "error": error}

  monkeypatch.setattr(aot, "measure", measure)
  assert aot.main(["--targets", "v5e", "--ops", "attention", "--specs", "tiny"]) == 1
  assert "exceeds HBM" in (told := capsys.readouterr().out) and "1 of 2 compiled" in told
  with pytest.raises(SystemExit):
    aot.main(["--specs", "no_such_spec"])
  assert "no op of" in capsys.readouterr().err
