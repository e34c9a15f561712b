"""Lowering and compile time of the 7B policy's training step as its decoder grows deeper.

    python benchmarks/compile.py --layers 8 14 28 --out runs/compile

The step is that of GRPO (gradients, remat, clipping, AdamW) on Qwen2.5-VL-7B's shapes in bfloat16,
one row of 1024 tokens with an image of 1024 patches, compiled for the devices of this machine. All
arrays are abstract, so no memory is needed. Each depth is compiled `repeats` times, the depths in
turn, without a cache on disk; the table gives medians and the ratio to the shallowest.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from record import record  # The file beside this one.

from configs import common
from pixelis_jax import batch, learner
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model
from pixelis_jax.types import Patches

SHAPES = Path(__file__).parents[1] / "assets" / "shapes" / "qwen2_5_vl_7b"
TOKENS, SIDE = 1024, 32  # Of the row; of the image, in patches.


def policy(layers: int) -> Model:
  config = load_config(SHAPES)
  text = dataclasses.replace(config.text, layers=layers)
  return Model(dataclasses.replace(config, text=text), remat="layers")


def packed(config: ModelConfig) -> batch.GrpoBatch:
  """One row with one image; only its shapes are used."""
  count = SIDE**2 // config.vision.merge_unit
  tokens = np.zeros(TOKENS, np.int32)
  tokens[8 : 8 + count] = config.image_token
  image = Patches(
    patches=np.zeros((SIDE**2, config.vision.patch_values), np.float32),
    grid=(1, SIDE, SIDE),
    size=(SIDE * config.vision.patch,) * 2,
    key="",
  )
  row = batch.Row(
    tokens=tokens,
    images=(image,),
    loss_mask=np.arange(TOKENS) >= TOKENS // 2,
    logps=np.zeros(TOKENS, np.float32),
  )
  return batch.pack_grpo([row], np.ones(1), config, max_tokens=TOKENS)


def seconds(layers: int) -> tuple[float, float]:
  """(lowering, compiling) of one step."""
  model = policy(layers)
  tx, _ = learner.make_optimizer(common.optimizer(lr=1e-6, steps=100, warmup=10))
  loss = learner.grpo_loss(model, Objective(clip_ratio_high=0.28))
  step = learner.make_step(loss, tx)
  params = model.shapes(jnp.bfloat16)
  state = jax.eval_shape(
    lambda params: learner.TrainState(
      step=jnp.int32(0), params=params, opt_state=tx.init(params), rng=jax.random.key(0)
    ),
    params,
  )
  data = packed(model.config)
  coef = jax.ShapeDtypeStruct((), jnp.float32)
  began = time.perf_counter()
  lowered = step.lower(state, data, coef)
  middle = time.perf_counter()
  lowered.compile()
  return middle - began, time.perf_counter() - middle


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, nargs="+", default=[8, 14, 28])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", type=Path, default=Path("runs/compile"))
  args = parser.parse_args()
  taken: dict[int, list[tuple[float, float]]] = {layers: [] for layers in args.layers}
  for _ in range(args.repeats):
    for layers in args.layers:
      taken[layers].append(seconds(layers))
  rows = []
  print(f"{'layers':>6} {'lower s':>8} {'compile s':>9} {'both, ratio':>12}")
  for layers, times in taken.items():
    lower, compiled = (statistics.median(column) for column in zip(*times, strict=True))
    rows.append({"layers": layers, "lower": lower, "compile": compiled, "times": times})
    ratio = (lower + compiled) / (rows[0]["lower"] + rows[0]["compile"])
    print(f"{layers:6} {lower:8.2f} {compiled:9.2f} {ratio:12.2f}")
  record(args.out, "compile", {"rows": rows})


if __name__ == "__main__":
  main()
