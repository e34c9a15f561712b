"""Plans: the command on the embedded model, and what it says."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest

from configs import rft
from kernels.chips import CHIPS
from pixelis_jax import plan
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model

ROOT = Path(__file__).parents[1]


MISTAKES = {
  "v5e-5 is no slice": ["--topology=v5e-5"],
  "mesh data=1 fsdp=8 tensor=1 needs 8": ["--topology=v5e-4", "--config.mesh.fsdp=8"],
  "unknown config field": ["--topology=v5e-4", "--config.mesh.fspd=2"],
}
COMMANDS = """
import json, sys
from pixelis_jax import cli
for arguments in json.loads(sys.argv[1]):
  try:
    code = cli.main(["plan", *arguments])
  except SystemExit as end:
    print(end, file=sys.stderr)
    code = 2
  print("exit code", code, flush=True)
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """(the plan's record, what was printed, the errors) of `pixelis plan`, MISTAKES before it.

  In a process of its own: it loads the chips' compilers.
  """
  out = tmp_path_factory.mktemp("plan") / "plan.json"
  sizes = ["--images=2", "--patches=64", "--asked=40", "--written=24", f"--out={out}"]
  mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
  mesh += ["--config.rollout_mesh.data=2", "--config.rollout_mesh.tensor=2"]
  # A row for each device, or two: more of them compile for longer, into the same programs.
  mesh += ["--config.grpo.questions=2", "--config.grpo.group=2", "--config.rows_multiple=4"]
  mesh += ["--config.model.rows_multiple=4", "--config.model.max_rows=4"]
  mesh += ["--config.model.path=assets/tiny-vl", "--config.model.dtype=bfloat16"]
  config = "--config=configs/tiny_rft.py"
  commands = [[config, *wrong] for wrong in MISTAKES.values()]
  commands += [[config, "--topology=v5e-4", *mesh, *sizes]]
  paths = [str(ROOT / ".venv" / "aot"), os.environ.get("PYTHONPATH", "")]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "XLA_FLAGS": ""}
  # A third of the time: what is compiled need not be fast, and its sizes are not looked at.
  env |= {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0", "JAX_MEMORY_FITTING_EFFORT": "-1.0"}
  command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=env)
  codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
  assert codes == ["exit code 2"] * len(MISTAKES) + ["exit code 0"], done.stderr[-3000:]
  return json.loads(out.read_text()), done.stdout, done.stderr


def test_the_embedded_model_fits_four_chips(planned):
  found, printed, _ = planned
  assert [p["name"] for p in found["programs"]] == ["update", "look", "read", "write"]
  assert all(0 < p["arguments"] < p["peak"] + p["beside"] < 2**30 for p in found["programs"])
  assert "\nfits\n" in printed


def test_what_is_held_is_arithmetic(planned):
  """What has an "embed" axis is split by fsdp 2, what has heads, mlp or words by tensor 2. Weights
  that learn are float32, Adam keeps two more of each and its count, those that play are bfloat16.
  """
  model, held = Model(load_config(ROOT / "assets/tiny-vl")), planned[0]["held"]
  leaf = lambda node: isinstance(node, tuple)
  axes = jax.tree.leaves(model.axes(), is_leaf=leaf)
  sizes = [x.size for x in jax.tree.leaves(model.shapes())]
  fsdp = sum(n // (1 + ("embed" in names)) for n, names in zip(sizes, axes, strict=True))
  split = {"heads", "kv_heads", "mlp", "vocab"}
  tensor = sum(n // (1 + bool(split & set(names))) for n, names in zip(sizes, axes, strict=True))
  assert held["weights that learn"] == held["gradients"] == 4 * fsdp
  assert 0 <= held["optimizer"] - 8 * fsdp <= 16
  assert held["weights that play"] == 2 * tensor


def test_rollouts_move_less_than_a_layer_of_weights_a_token(planned):
  """Split heads exchange sums of hidden states; no weight is gathered while tokens are written.

  The keys' projections alone, of 3 layers, would be 3 * 128 * 64 * 2 bytes; the bound is 27 kB.
  """
  write = planned[0]["programs"][3]
  assert set(write["moved"]) <= {"all-reduce", "all-gather"}
  weights = planned[0]["held"]["weights that play"]
  assert sum(write["moved"].values()) / 32 < weights / 32  # 32 tokens.


def test_advice_is_what_would_help():
  """An update of 256 episodes, in 16 or all at once; weights that take more than half of a v5e."""
  c = rft.get_config("qwen2_5_vl_32b").copy_and_resolve_references().unlock()
  of = partial(plan.Program, devices=16, seconds=1.0, beside=0)
  held = dict.fromkeys(("weights that learn", "optimizer", "gradients"), 2**30)
  found = lambda play, *programs: plan.advice(
    c,
    plan.Plan(
      chip=CHIPS["v5e"],
      devices=16,
      held={**held, "weights that play": play},
      programs=programs,
    ),
  )
  large = of(name="update", peak=17 * 2**30)
  assert found(9 * 2**30, of(name="update", peak=15 * 2**30)) == []
  (said,) = found(2**30, large)
  assert said == "update: raise accumulate (now 1, 16 episodes at a time)"
  c.accumulate = 16
  (said,) = found(2**30, large)
  assert said == "update: one episode at a time is too much: raise mesh.tensor (now 1)"
  weights, rows = found(9 * 2**30, of(name="write", error="RESOURCE_EXHAUSTED"))
  assert weights.startswith("what plays takes 9.0 GiB a device: raise rollout_mesh.tensor (now 4;")
  assert rows.startswith(f"write: lower model.max_rows (now {c.model.max_rows}), or raise")


def test_mistakes_are_one_line(planned):
  lines = planned[2].splitlines()
  for message in MISTAKES:
    assert [message in line for line in lines].count(True) == 1, message
