"""GRPO of the embedded model after SFT: task + format + Pixel-Reasoner curiosity.

    python -m pixelis_jax.rft --config=configs/tiny_rft.py --workdir=runs/tiny-rft

It asks about digit scenes alone; "tools" asks all kinds of questions. Other arguments are a recipe:
what "dapo" (https://arxiv.org/abs/2503.14476), "gspo" (2507.18071) or "gmpo" (2507.20673) learns
by, or "deepeyes" (2505.14362) pays for, with all else as it is here; or "dynamics", which pays for
what a forward model did not expect (1705.05363) in the place of Pixel-Reasoner's curiosity.
"""

from ml_collections import ConfigDict

from configs import common

RECIPES = ("dapo", "gspo", "gmpo", "deepeyes", "dynamics")
OPTIONS = ("", "debug", "tools", "tools-debug", *RECIPES)


def get_config(arg: str = "") -> ConfigDict:
  if arg not in OPTIONS:
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}")
  c = ConfigDict()
  c.seed = 0
  c.model = common.trained("assets/tiny-vl-sft")
  c.model.rows_multiple = 64
  c.limits = common.limits()
  c.mesh = common.mesh()
  c.rollout_mesh = common.rollout_mesh()
  # Updates that rollouts lag behind, played meanwhile on devices of their own, `rollout_mesh`'s,
  # behind those of `mesh`: set rollout_mesh.data, and grpo.rollout_correction. 0: on the same.
  c.staleness = 0
  c.accumulate = 1  # Parts of an update that are computed one after the other, to save memory.
  c.data = ConfigDict()
  c.data.file = ""  # Labelled questions (data/questions.py) in place of made ones.
  c.data.n = 1_000_000
  c.data.kinds = common.DIGITS  # Equally often; see data.mixture.KINDS.
  c.grpo = ConfigDict()
  c.grpo.questions = 32
  c.grpo.group = 8
  c.grpo.temperature = 1.0
  c.grpo.loss = common.objective(c.limits.get_ref("tokens") * 1.0)
  c.grpo.adv_estimator = "dr_grpo"  # A name in advantages.ESTIMATORS.
  c.grpo.kl_coef = 0.0  # Of the KL to the starting weights; 0 leaves the reference out.
  c.grpo.over_turn_masking = False  # Episodes that the limits cut off teach nothing.
  # Dynamic sampling: groups of one task reward are left out and others asked in their place.
  c.grpo.filter_groups = ConfigDict({"enable": False, "max_num_gen_batches": 10})
  # Selective sample replay: earlier samples, by |advantage| ** alpha, in their place; 0: none.
  c.grpo.replay = ConfigDict({"capacity": 0, "alpha": 1.0})
  # Where the sampler is not the policy that an update starts from; see algo.correction.
  c.grpo.rollout_correction = ConfigDict()
  c.grpo.rollout_correction.rollout_is = "off"  # "token" or "sequence".
  c.grpo.rollout_correction.rollout_is_threshold = 2.0
  c.grpo.rollout_correction.rollout_rs = "off"  # A name in correction.REJECTIONS.
  c.grpo.rollout_correction.rollout_rs_threshold = 2.0
  c.reward = ConfigDict()
  c.reward.curiosity = "paper"
  c.reward.verifier = "equal"  # A name in verifiers.VERIFIERS: by which rule answers are right.
  c.reward.call_target = -1  # Calls an episode should have; -1: as many as it has boxes.
  # From `buffer` tokens below what an episode may have, tokens cost; a buffer of 0: none.
  c.reward.overlong = ConfigDict({"tokens": c.limits.get_ref("tokens"), "buffer": 0})
  c.reward.weights = ConfigDict({"task": 1.0, "format": 0.1, "curiosity": 1.0})
  c.reward.weights.update(dict.fromkeys(("coherence", "tool_cost", "misuse"), 0.0))
  c.reward.weights.update(dict.fromkeys(("tool_bonus", "call_target", "overlong"), 0.0))
  c.reward.weights.dynamics = 0.0  # 0: no forward model is trained, and no calls are encoded.
  c.reward.dynamics = ConfigDict()  # Of surprise.Surprise.
  c.reward.dynamics.hidden = 256  # Width of the forward model's layer.
  c.reward.dynamics.lr = 1e-3
  c.reward.dynamics.passes = 4  # Over a step's transitions, an update each.
  c.reward.dynamics.warmup = 256  # Transitions before any is paid for: then the unit is known.
  c.reward.dynamics.clip = 5.0  # What a call can earn at most, in root mean square errors.
  c.reward.curriculum = ConfigDict()
  c.reward.curriculum.start = "full"  # "goal" for a curriculum; see algo.curriculum.Settings.
  c.reward.curriculum.check_every, c.reward.curriculum.min_steps = 100, 1000
  c.reward.curriculum.window, c.reward.curriculum.patience = 100, 5
  c.reward.curriculum.goal_success, c.reward.curriculum.goal_steps = 0.70, 10_000
  c.reward.curriculum.slope, c.reward.curriculum.combined = 0.001, 0.65
  c.reward.curriculum.coherence_steps = 20_000
  c.max_row = 384
  c.rows_multiple = 64  # Rows and images of an update: the larger, the fewer programs are compiled.
  c.packed = False  # Several conversations a row: pays where attention is not the cost.
  c.optimizer = common.optimizer(lr=2e-5, steps=12, warmup=2)
  c.optimizer.patch_scale = 0.1
  c.optimizer.b2 = 0.99
  c.eval = common.evaluation(n=200, every=12)
  c.log_every = 1
  c.save_every = 6
  c.keep = 2
  c.wandb = common.wandb()
  c.profile = False  # A profiler's trace of three steps, in `profile` in the workdir.
  if arg in RECIPES and arg != "dynamics":
    c.grpo.adv_estimator = "grpo"
  if arg == "dapo":
    c.grpo.filter_groups.enable = True
    c.reward.overlong.buffer = c.limits.get_ref("tokens") // 5
    c.reward.weights.overlong = 1.0
  if arg == "gspo":
    c.grpo.loss.loss_mode, c.grpo.loss.loss_agg_mode = "gspo", "seq-mean-token-mean"
    c.grpo.loss.clip_ratio_low, c.grpo.loss.clip_ratio_high = 3e-4, 4e-4
  if arg == "gmpo":
    c.grpo.loss.loss_mode, c.grpo.loss.loss_agg_mode = "gmpo", "seq-mean-token-mean"
    c.grpo.loss.clip_ratio_low, c.grpo.loss.clip_ratio_high = 0.4, 0.4
  if arg == "deepeyes":
    c.reward.curiosity = "off"
    c.reward.weights.task, c.reward.weights.format, c.reward.weights.tool_bonus = 0.8, 0.2, 1.2
  if arg == "dynamics":
    c.reward.curiosity = "off"
    c.reward.weights.dynamics = 0.05  # Pixelis' (configs/rft_config.yaml, its last stage).
  if arg.startswith("tools"):
    common.all_tools(c, c.data, c.eval)
    c.grpo.questions = 16  # Their tools take as long as all the rest.
    c.max_row, c.packed = 512, True
    c.optimizer.lr = 1e-4
  if arg.endswith("debug"):
    c.model.path, c.grpo.questions, c.grpo.group = "assets/tiny-vl", 2, 4
    c.model.rows_multiple, c.rows_multiple = 1, 1
    c.optimizer.steps, c.optimizer.warmup = 4, 1
    c.eval.n, c.eval.every, c.log_every, c.save_every = 4, 4, 1, 2
  c.lock()
  return c
