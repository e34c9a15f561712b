"""SFT of the embedded model from random weights, on executed demonstrations of every tool.

    python -m pixelis_jax.data.build --manifest=docs/manifests/tiny.json --out=runs/tiny-data
    python -m pixelis_jax.sft --config=configs/tiny_sft.py --workdir=runs/tiny-sft

Puzzles are built first, as to solve one takes a third of a second; digit scenes are made as they
are read. "debug" for a few steps on digit scenes alone, "tools-debug" on all kinds; both make all.
"""

from ml_collections import ConfigDict

from configs import common

OPTIONS = ("", "debug", "tools-debug")


def get_config(arg: str = "") -> ConfigDict:
  if arg not in OPTIONS:
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}")
  c = ConfigDict()
  c.seed = 0
  c.model = common.trained()
  c.model.random_seed = 0
  c.limits = common.limits()
  c.mesh = common.mesh()
  c.rollout_mesh = common.rollout_mesh()
  c.accumulate = 1  # Parts of an update that are computed one after the other, to save memory.
  c.data = ConfigDict()
  # In place of scenes: labelled questions (data/questions.py), or a dataset (data/build.py).
  c.data.file = "runs/tiny-data"
  c.data.made = 0.7  # Share of rows that are made all the same.
  # Rows of the dataset that stay in memory, as to decode a film takes 80 ms, and tours of puzzles.
  c.data.kept = 4096
  c.data.n = 1_000_000  # Tasks before the first repeats.
  c.data.kinds = common.DIGITS  # Equally often; see data.mixture.KINDS.
  # More kinds, of which rows that teach where to look are, and no others.
  c.data.toured = ("read", "count", "color", "shape", "hidden")
  c.data.scenes = 24_000  # First rows, all of digit scenes: to step 1,000.
  c.data.parts = 60_000  # Rows that teach where to look and how to answer apart: to step 2,500.
  c.data.look = 0.65  # Share of these that teach where to look,
  c.data.recite = 0.2  # and that teach to answer from what tools said.
  c.data.zoom_only = 0.5  # Share of scenes' prompts that list zoom_in alone, not all tools.
  c.data.direct = 0.1  # Share of rows that answer without tools, under a prompt without tools.
  c.data.mistakes = 0.0  # Share of demonstrations that first look at the wrong place.
  c.data.threads = 2
  c.batch = 24
  c.see_steps = 400  # First steps, in which the tower alone learns what images show.
  c.max_row = 512
  # Of a dataset in data.file: algo.data_curriculum.Settings, which says what each field is.
  c.curriculum = ConfigDict()
  c.curriculum.enable = False
  c.curriculum.simple = (1.0, 0.7, 0.4, 0.2, 0.2)  # Shares of what is read, stage by stage.
  c.curriculum.medium = (0.0, 0.3, 0.4, 0.4, 0.3)
  c.curriculum.hard = (0.0, 0.0, 0.2, 0.4, 0.5)
  c.curriculum.target, c.curriculum.tolerance = 0.7, 0.05
  c.curriculum.window, c.curriculum.patience = 3, 2
  c.curriculum.min_steps, c.curriculum.max_steps = 500, 2000
  c.curriculum.cooldown, c.curriculum.backoff = 400, 2.0
  c.packed = True  # Several conversations a row, as they have from 100 to 470 tokens.
  c.entropy_weight = 0.0
  c.aim_weight = 0.5  # Of two auxiliary losses, see learner.sft_loss; their heads are not saved.
  c.sight_weight = 1.0
  c.optimizer = common.optimizer(lr=3e-3, steps=3800, warmup=50)
  c.optimizer.muon_scale = 3.3
  c.optimizer.patch_scale = 0.1
  c.optimizer.final_fraction = 0.02
  c.eval = common.evaluation(n=200, every=3800)
  c.log_every = 20
  c.save_every = 250
  c.keep = 2
  c.wandb = common.wandb()
  c.profile = False  # A profiler's trace of three steps, in `profile` in the workdir.
  if arg == "debug":
    c.data.recite, c.max_row, c.packed = 0.0, 384, False
  else:
    common.all_tools(c, c.eval)
  if arg.endswith("debug"):
    c.data.file, c.data.made, c.data.kept, c.data.toured = "", 0.0, 0, ()
    c.data.kinds = c.eval.kinds
    c.batch, c.data.n, c.data.parts, c.data.scenes = 4, 64, 8, 0
    c.see_steps, c.optimizer.steps, c.optimizer.warmup = 1, 4, 1
    c.optimizer.muon_scale = 0.0  # Its programs take half as long again to compile.
    c.eval.n, c.eval.every, c.log_every, c.save_every = 4, 4, 1, 2
  c.lock()
  return c
