import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAIN = "from pixelis_jax import program; program.launch(lambda c, d: print(c.eval.n, repr(d)))"


def run(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-c", MAIN, *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_config_overrides_and_workdir_reach_main():
  done = run("--config=configs/evaluate.py", "--workdir=some/where", "--config.eval.n=3")
  assert (done.returncode, done.stdout) == (0, "3 PosixPath('some/where')\n"), done.stderr


def test_what_is_missing_or_unknown_is_named():
  missing = run("--config=configs/evaluate.py")
  assert missing.returncode != 0 and "--workdir" in missing.stderr
  unknown = run("--config=configs/evaluate.py", "--workdir=d", "--config.eval.shfit=dim")
  assert unknown.returncode != 0 and "Traceback" not in unknown.stderr
  assert 'Did you mean "shift"' in unknown.stderr


def test_an_unknown_config_argument_is_said_without_a_traceback():
  done = run("--config=configs/demo.py:dimm", "--workdir=d")
  assert done.returncode != 0 and "Traceback" not in done.stderr
  assert "configs/demo.py:dimm" in done.stderr
  assert "config argument 'dimm' must be one of ('', 'debug'" in done.stderr
  lost = run("--config=configs/none.py", "--workdir=d")
  assert lost.returncode != 0 and "Traceback" not in lost.stderr
  assert "No such file or directory: 'configs/none.py'" in lost.stderr
