"""Plans: traffic read from a program's text, and the command on the embedded model."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import rft, tiny_rft, tiny_sft
from kernels.chips import CHIPS
from pixelis_jax import batch, learner, packing, plan, sampler, sft, sharding
from pixelis_jax.data import demos
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model
from tests import fakes

ROOT = Path(__file__).parents[1]

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%layer (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %whole = bf16[8,64]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={1}
  %sum.1 = f32[2,4]{1,0} reduce-scatter(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%until (carry: (s32[])) -> pred[] {
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

%below (carry: (s32[])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%part (w: f32[2]) -> f32[8] {
  %piece = f32[8]{0} all-gather(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}

%shifted (carry: (s32[])) -> (s32[]) {
  %begin = f32[8]{0} fusion(%w), kind=kCustom, calls=%part
  %end = f32[8]{0} all-gather(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %alone.2 = f32[8]{0} all-gather(%w), channel_id=8, replica_groups=mesh['a'=1,'b'=4] {'a'}
}

%token (carry: (s32[])) -> (s32[]) {
  %all-reduce.2 = f32[10]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  %alone = f32[1000]{0} all-reduce(%q), replica_groups=[8,1]<=[8], to_apply=%add
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %l = (s32[]) while(%s), condition=%until, body=%layer, config={"known_trip_count":{"n":"28"}}
  %m = (s32[]) while(%s), condition=%below, body=%shifted
  %open = (s32[]) while(%s), condition=%until, body=%token
  %begun = (f32[16]{0}, f32[64]{0}) all-gather-start(%v), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[64]{0} all-gather-done(%begun)
  ROOT %out = f32[4] copy(%p0)
}
"""


def test_traffic_counts_loops_and_what_each_kind_moves():
  """28 layers of 8 * 64 bfloat16 numbers, once 64 float32 ones, and 5 times 8, which begin in one
  place and end in another. A reduce-scatter takes in its result of 8 numbers from each of 4; an
  all-reduce of 10 moves in and out; among one device nothing moves.
  """
  moved = plan.moved(PROGRAM, unknown=3)
  assert moved == {
    "all-gather": 28 * 8 * 64 * 2 + 64 * 4 + 5 * 8 * 4,
    "reduce-scatter": 28 * 4 * 8 * 4,
    "all-reduce": 3 * 2 * 10 * 4,
  }


def test_an_episode_counts_its_images():
  episode = plan.Episode(images=3, patches=400, asked=50, written=20)
  assert (episode.prompt(4), episode.tokens(4)) == (150, 370)
  assert plan.Episode(images=0, asked=50, written=20).tokens(4) == 70


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


def test_an_sft_update_is_planned_as_it_is_run(policy):
  """The same program from abstract arrays as from real ones: shapes, dtypes and places."""
  c = tiny_sft.get_config().copy_and_resolve_references().unlock()
  c.model.path, c.batch, c.packed = str(ROOT / "assets/tiny-vl"), 6, False
  c.mesh.data, c.mesh.fsdp, c.model.lora.rank, c.max_row = 2, 2, 2, 96
  # Demonstrations as in the plan: 6 of 96 tokens, two images of 64 patches each, on 4 devices.
  episode = plan.Episode(images=2, patches=64, asked=40, written=24)
  _, ((name, mesh, step, (state, packed, *rest), *_),) = plan.runs(c, jax.devices()[:4], episode)
  assert name == "update" and mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1}

  model = sampler.adapted_model(c.model, Model(load_config(c.model.path), mesh=mesh))
  params = model.init(jax.random.key(0))
  params = learner.with_heads(model, params, jax.random.key(0), labels=demos.LABELS)
  trained, base = learner.parts(model, params["policy"])
  real_step, tx, _ = sft.make_step(c, model)
  real_state = learner.init_state({**params, "policy": trained}, tx, seed=0)
  images = [
    [policy.images.process(fakes.image(80, 80, seed=2 * i + j)) for j in range(2)] for i in range(6)
  ]
  rows = [demonstration(model.config, shown) for shown in images]
  real = batch.pack_sft(
    rows, model.config, max_tokens=c.max_row, multiple_of=4, blocks=4, labels=demos.LABELS
  )
  real = sharding.put_rows(real, mesh)
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert described(state) == described(real_state)
  assert described(packed) == described(real)
  assert described(rest[0]) == described({"policy": base})
  at = lambda tree: [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)]
  assert at((state.params, packed)) == at((real_state.params, real))
  out, _ = step.trace(state, packed, *rest).out_info
  assert described(out) == described(real_state)


def test_rollouts_that_lag_are_planned_on_devices_of_their_own():
  """The update on four, rollouts on the two behind, with weights for the next step beside."""
  c = tiny_rft.get_config().copy_and_resolve_references().unlock()
  c.model.path, c.mesh.data, c.mesh.fsdp = str(ROOT / "assets/tiny-vl"), 1, 4
  c.staleness, c.rollout_mesh.data, c.rollout_mesh.tensor = 1, -1, 2
  held, planned = plan.runs(c, jax.devices()[:6], plan.Episode(patches=64, asked=40, written=24))
  on = {name: ([d.id for d in mesh.devices.flat], beside) for name, mesh, *_, beside, _ in planned}
  plays = [4, 5], held["weights that play"]
  assert on == {"update": ([0, 1, 2, 3], 0), "look": plays, "read": plays, "write": plays}


@pytest.mark.parametrize(
  "size, devices, rows, length",
  [
    # 32 questions of 4 episodes of 256 + 512 + 2 * 1024 tokens, of which 5 fit into a row: 26 rows,
    # for 2 devices 13 each, which round up to 16, and 5 * 2,816 tokens to 16,384.
    ("qwen2_5_vl_3b", 2, 32, 16_384),
    # On 64 parts each row holds 2 of them.
    ("qwen2_5_vl_3b", 8, 64, 6144),
    # Without images 21 episodes fit, and 16 are there for each of 8: 12,288 tokens.
    ("qwen3_8b", 8, 8, 12_288),
  ],
)
def test_rows_of_an_update_are_those_that_are_packed(size, devices, rows, length):
  c = rft.get_config(size).copy_and_resolve_references().unlock()
  c.mesh.data, c.mesh.fsdp, c.grpo.group = devices, 1, 4
  c.rollout_mesh.tensor, c.accumulate = 1, 8 if rows == 64 else 1
  _, (update, *_) = plan.runs(c, jax.devices()[:devices], plan.Episode())
  _, _, _, (_, packed, *_), *_ = update
  assert packed.inputs.tokens.shape == (rows, length)
  tokens = 768 if size == "qwen3_8b" else 2816
  placed = packing.place(
    [tokens] * 128,
    max_tokens=c.max_row,
    packed=True,
    blocks=devices * c.accumulate,
    multiple_of=devices * c.accumulate,
  )
  assert placed.shape == (rows, length)


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


def demonstration(config, images) -> batch.Row:
  """96 tokens, the two images' among them."""
  tokens = np.zeros(96, np.int32)
  for at, image in zip((1, 40), images, strict=True):
    tokens[at : at + len(image.patches) // 4] = config.image_token
  zeros = np.zeros(96, np.float32)
  return batch.Row(tokens=tokens, images=tuple(images), loss_mask=zeros == 0, logps=zeros)


def test_mistakes_are_one_line(planned):
  lines = planned[2].splitlines()
  for message in MISTAKES:
    assert [message in line for line in lines].count(True) == 1, message
