"""GRPO of the embedded model after SFT: task + format + Pixel-Reasoner curiosity.

python -m pixelis_jax.rft --config=configs/tiny_rft.py --workdir=runs/tiny-rft
"""

from ml_collections import ConfigDict

from configs import common

OPTIONS = ("", "debug")


def get_config(arg: str = "") -> ConfigDict:
  if arg not in OPTIONS:
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}")
  c = ConfigDict()
  c.seed = 0
  c.model = common.trained("runs/tiny-sft/model")
  c.model.rows_multiple = 64
  c.limits = common.limits()
  c.mesh = common.mesh()
  c.rollout_mesh = common.rollout_mesh()
  # Updates that rollouts lag behind, played meanwhile on devices of their own, `rollout_mesh`'s,
  # behind those of `mesh`: set rollout_mesh.data, and grpo.rollout_correction. 0: on the same.
  c.staleness = 0
  c.accumulate = 1  # Parts of an update that are computed one after the other, to save memory.
  c.data = ConfigDict()
  c.data.file = ""  # Labelled questions (data/questions.py) in place of scenes.
  c.data.n = 1_000_000
  c.data.kinds = ("framed", "beside", "parity")
  c.grpo = ConfigDict()
  c.grpo.questions = 32
  c.grpo.group = 8
  c.grpo.temperature = 1.0
  c.grpo.loss = common.objective(c.limits.get_ref("tokens") * 1.0)
  c.grpo.adv_estimator = "dr_grpo"  # A name in advantages.ESTIMATORS.
  c.grpo.kl_coef = 0.0  # Of the KL to the starting weights; 0 leaves the reference out.
  # Where the sampler is not the policy that an update starts from; see algo.correction.
  c.grpo.rollout_correction = ConfigDict()
  c.grpo.rollout_correction.rollout_is = "off"  # "token" or "sequence".
  c.grpo.rollout_correction.rollout_is_threshold = 2.0
  c.grpo.rollout_correction.rollout_rs = "off"  # A name in correction.REJECTIONS.
  c.grpo.rollout_correction.rollout_rs_threshold = 2.0
  c.reward = ConfigDict()
  c.reward.curiosity = "paper"
  c.reward.weights = ConfigDict(
    {"task": 1.0, "format": 0.1, "curiosity": 1.0, "coherence": 0.0, "tool_cost": 0.0}
  )
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
  c.profile = False  # A profiler's trace of three steps, in `profile` in the workdir.
  if arg == "debug":
    c.model.path, c.grpo.questions, c.grpo.group = "assets/tiny-vl", 2, 4
    c.model.rows_multiple, c.rows_multiple = 1, 1
    c.optimizer.steps, c.optimizer.warmup = 4, 1
    c.eval.n, c.eval.every, c.log_every, c.save_every = 4, 4, 1, 2
  c.lock()
  return c
