"""What `make` would do, without doing it: what users copy, and the message they may meet."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess:
  # `make test` runs this too: its own flags must not reach the inner one.
  env = {name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
  return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_demo_passes_its_options_on(tmp_path):
  done = make("-n", f"VENV={tmp_path}/v", "demo", "SEED=7", "SHIFT=blur", "WORKDIR=elsewhere")
  assert done.returncode == 0, done.stderr
  online = "-m pixelis_jax.online --config=configs/demo.py:blur --workdir=elsewhere --config.seed=7"
  order = [done.stdout.index(part) for part in ("-m venv", "-e '.[cpu]'", online, "view elsewhere")]
  assert order == sorted(order)


def test_a_demo_of_other_kinds_has_a_workdir_of_its_own(tmp_path):
  done = make("-n", f"VENV={tmp_path}/v", "demo", "KIND=color+shape")
  config = "--config=configs/demo.py:dim/color+shape --workdir=runs/demo-dim-color+shape-0"
  assert f"{config} --config.seed=0\n" in done.stdout


def test_demos_of_different_settings_share_no_workdir(tmp_path):
  workdirs = set()
  for options in ((), ("SEED=7",), ("SHIFT=blur",)):
    done = make("-n", f"VENV={tmp_path}/v", "demo", *options)
    (workdir,) = re.findall(r"--workdir=(\S+)", done.stdout)
    assert f"pixelis view {workdir}\n" in done.stdout
    workdirs.add(workdir)
  assert workdirs == {"runs/demo-dim-0", "runs/demo-dim-7", "runs/demo-blur-0"}


def test_tiny_hands_each_model_to_the_next_step(tmp_path):
  done = make("-n", f"VENV={tmp_path}/v", "tiny", "TINY=t")
  steps = (
    "scripts/tiny_init.py --out assets/tiny-vl",
    "pixelis_jax.data.build --manifest=docs/manifests/tiny.json --out=t-data",
    "pixelis_jax.sft --config=configs/tiny_sft.py --workdir=t-sft --config.data.file=t-data",
    "--workdir=t-rft --config.model.path=t-sft/model",
    "pixelis export t-sft assets/tiny-vl-sft --force",
    "pixelis export t-rft assets/tiny-vl --force",
  )
  order = [done.stdout.index(part) for part in steps]
  assert order == sorted(order)


def test_test_runs_the_three_checks_and_nothing_installs_twice(tmp_path):
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin" / "pip").touch()
  stamp = tmp_path / ".installed-test"
  stamp.touch()
  newer = (ROOT / "pyproject.toml").stat().st_mtime + 10
  os.utime(stamp, (newer, newer))
  done = make("-n", f"VENV={tmp_path}", "test")
  assert done.returncode == 0, done.stderr
  assert "install" not in done.stdout
  for check in ("ruff check .", "ruff format --check .", "-m pytest -q"):
    assert check in done.stdout


@pytest.mark.parametrize("found", ["none", "Python 3.9.2"])
def test_no_new_enough_python_is_said(tmp_path, found):
  python = tmp_path / "python"
  if found != "none":
    python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{found}"\n')
    python.chmod(0o755)
  done = make(f"VENV={tmp_path}/v", "demo", f"PYTHON={python}")
  assert done.returncode != 0
  assert f"needs Python 3.11 or newer, found {found}." in done.stderr
  assert "make demo PYTHON=/path/to/python" in done.stderr
  assert not (tmp_path / "v").exists()
