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
  assert unknown.returncode != 0 and "shift" in unknown.stderr.splitlines()[-1]
