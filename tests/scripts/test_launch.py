"""What the launch scripts would run, printed and not run."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ["--", "pixelis_jax.rft", "--config=configs/rft.py:qwen2_5_vl_7b"]


def dry(script: str, *arguments: str) -> subprocess.CompletedProcess:
  command = [str(ROOT / "scripts" / script), "--dry-run", *arguments]
  env = {**os.environ, "REPO": "https://example.org/pixelis_jax"}
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, env=env)


@pytest.mark.parametrize(
  "slice, type, software",
  [
    ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
    ("v5p-64", "v5p-64", "v2-alpha-tpuv5"),
    ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
  ],
)
def test_a_tpu_slice_is_asked_for_and_runs_on_all_workers(slice, type, software):
  done = dry("launch_tpu.sh", "pod", "zone", slice, "gs://data", *PROGRAM, "--workdir=BUCKET/a b")
  assert done.returncode == 0, done.stderr
  asked, installed, mounted, started = done.stdout.splitlines()
  assert f"--accelerator-type={type} " in asked and f"--runtime-version={software} " in asked
  for line in (installed, mounted, started):
    assert line.startswith("gcloud compute tpus tpu-vm ssh pod --zone=zone --worker=all ")
  commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
  assert commit.stdout.strip() in installed and "example.org/pixelis_jax" in installed
  assert "gcsfuse" in mounted and "data" in mounted and "gs://" not in mounted
  # The bucket's place, a space kept in its argument, and one of several processes.
  assert "bucket/runs" not in started and "--distributed" in started
  assert r"--workdir=\$HOME/bucket/a\\\ b" in started


def test_a_workload_of_a_cluster():
  done = dry("launch_gke.sh", "one", "cluster", "v5e-16", "image", *PROGRAM)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("xpk workload create --cluster=cluster --workload=one ")
  assert "--tpu-type=v5litepod-16 " in done.stdout and "--distributed" in done.stdout


def test_a_job_of_several_machines():
  done = dry("launch_slurm.sh", "one", "2", "8", *PROGRAM, "--workdir=/shared/a b")
  assert done.returncode == 0, done.stderr
  assert "#SBATCH --job-name=one --nodes=2 --ntasks-per-node=8 --gpus-per-node=8" in done.stdout
  assert "--requeue" in done.stdout and "--signal=TERM@120" in done.stdout
  assert done.stdout.rstrip().endswith(r"--workdir=/shared/a\ b --distributed")


@pytest.mark.parametrize(
  "script, arguments, message",
  [
    ("launch_tpu.sh", ("pod", "zone", "v4-8", "gs://b", *PROGRAM), "slice v4-8 must be v5e-N"),
    ("launch_gke.sh", ("one", "cluster", "h100-8", "image", *PROGRAM), "slice h100-8 must be"),
    ("launch_tpu.sh", ("pod", "zone"), "scripts/launch_tpu.sh [--dry-run] NAME ZONE"),
    ("launch_slurm.sh", ("one", "2"), "scripts/launch_slurm.sh [--dry-run] NAME NODES"),
  ],
)
def test_mistakes_say_what_would_be_right(script, arguments, message):
  done = dry(script, *arguments)
  assert done.returncode == 2 and message in done.stderr
