"""SFT of the embedded model from random weights, on executed demonstrations of digit scenes.

    python -m pixelis_jax.sft --config=configs/tiny_sft.py --workdir=runs/tiny-sft

"tools" for one that has every tool, on digits and on all kinds of questions that need one; "debug"
and "tools-debug" for a few steps.
"""

from ml_collections import ConfigDict

from configs import common

OPTIONS = ("", "debug", "tools", "tools-debug")


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
  c.data.file = ""
  c.data.made = 0.0  # Share of rows that are made all the same.
  c.data.kept = 0  # Rows of a dataset that stay in memory: to decode a film takes 80 ms.
  c.data.n = 1_000_000  # Tasks before the first repeats.
  c.data.kinds = common.DIGITS  # Equally often; see data.mixture.KINDS.
  c.data.toured = ()  # More kinds, of which rows that teach where to look are, and no others.
  c.data.parts = 118_400  # Rows that teach where to look and how to read apart.
  c.data.look = 0.6  # Share of these that teach where to look,
  c.data.recite = 0.0  # and that teach to say what READ_TEXT read.
  c.data.zoom_only = 0.0  # Share of scenes' prompts that list zoom_in alone, not all tools.
  c.data.direct = 0.1  # Share of rows that answer without tools, under a prompt without tools.
  c.data.mistakes = 0.0  # Share of demonstrations that first look at the wrong place.
  c.data.threads = 2
  c.batch = 32
  c.see_steps = 900  # First steps, in which the tower alone learns what images show.
  c.max_row = 384
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
  c.packed = False  # Several conversations a row: pays where attention is not the cost.
  c.entropy_weight = 0.0
  c.aim_weight = 0.5  # Of two auxiliary losses, see learner.sft_loss; their heads are not saved.
  c.sight_weight = 1.0
  c.optimizer = common.optimizer(lr=1e-3, steps=5700, warmup=50)
  c.optimizer.patch_scale = 0.1
  c.optimizer.final_fraction = 0.02
  c.eval = common.evaluation(n=200, every=1900)
  c.log_every = 20
  c.save_every = 250
  c.keep = 2
  c.wandb = common.wandb()
  c.profile = False  # A profiler's trace of three steps, in `profile` in the workdir.
  if arg.startswith("tools"):
    common.all_tools(c, c.eval)
    # Puzzles are built first: to solve one takes a third of a second.
    c.data.file, c.data.made, c.data.kept = "runs/data/tiny", 0.78, 4096
    c.data.toured, c.data.zoom_only = ("read", "count", "color", "shape"), 0.5
    c.data.parts, c.data.look, c.data.recite = 72_000, 0.45, 0.04  # Up to step 3,300.
    # From 100 to 470 tokens: several share a row.
    c.batch, c.max_row, c.packed = 28, 512, True
    c.optimizer.steps, c.eval.every = 5200, 2600
  if arg == "tools-debug":
    c.data.file, c.data.made, c.data.kinds, c.data.toured = "", 0.0, c.eval.kinds, ()
  if arg.endswith("debug"):
    c.batch, c.data.n, c.data.parts = 4, 64, 8
    c.see_steps, c.optimizer.steps, c.optimizer.warmup = 1, 4, 1
    c.eval.n, c.eval.every, c.log_every, c.save_every = 4, 4, 1, 2
  c.lock()
  return c
