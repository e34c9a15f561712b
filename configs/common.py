"""Parts that several configs share. Data only."""

from ml_collections import ConfigDict


def model(path: str = "assets/tiny-vl") -> ConfigDict:
  """A Hugging Face directory and how it is played."""
  c = ConfigDict()
  c.path = path
  c.loader = ""  # "package.module:function" in place of a path; see sampler.load_policy.
  c.random_seed = -1  # 0 or more: fresh weights from this seed in place of the directory's.
  c.adapter = ""  # A PEFT directory: LoRA weights that belong to this model; none by default.
  c.dtype = "float32"
  c.int8 = False  # The layers' kernels as int8: half of bfloat16's memory, for inference only.
  c.tools = ("zoom_in",)
  c.preset = "qwen"
  c.guidelines = ""  # Appended to the user's question.
  c.max_tokens = 32  # Sampled tokens a turn.
  c.max_rows = 256  # Episodes decoded together.
  c.rows_multiple = 1  # Rows are padded to multiples of this; see sampler.Sampler.
  # What tools work with where there is a choice; see tools.Options.
  c.tool_options = ConfigDict()
  c.tool_options.tracker = "csrt"  # Or "flow", which is quick, or "template".
  c.tool_options.segmenter = "grabcut"  # Or a folder with a SAM-family model as ONNX files.
  c.tool_options.reader = "rapidocr"  # Or "tesseract".
  c.tool_options.language = ""  # Of text, where a call names none; "" for all known letters.
  # Limits of a call to a costly tool, in a process of its own; see tools.workers.Settings.
  c.workers = ConfigDict({"seconds": 30.0, "gigabytes": 2.0, "processes": 0, "cached": 0.25})
  return c


def trained(path: str = "assets/tiny-vl") -> ConfigDict:
  """A model, and which of its weights learn: all but `freeze`, or with a LoRA rank adapters."""
  c = model(path)
  c.master = "float32"  # Of weights that learn; a step computes with copies in `dtype`.
  c.remat = "nothing"  # What a backward pass computes again: nothing, products or layers.
  c.freeze = ()  # Parts whose weights stay, such as "visual" or "text/embedding".
  c.lora = ConfigDict()
  c.lora.rank = 0  # Of every target; 0: none but those that `ranks` lists.
  c.lora.ranks = ""  # A JSON file with a rank for each layer; see model.lora.read_ranks.
  c.lora.alpha = 32.0  # An adapter's share is alpha / rank.
  c.lora.dropout = 0.0
  # Regular expressions of whole paths of our tree; these are the decoder's linear layers.
  c.lora.targets = ("text/layers/attn/[qkvo]", "text/layers/mlp/(gate|up|down)")
  return c


def own(c: ConfigDict, *, tools: bool) -> None:
  """Room for the turns and images of a released model; without tools for one that only reads."""
  c.model.max_tokens, c.model.rows_multiple = 1024, 1
  c.limits.tokens = 16_384
  if not tools:
    c.model.tools = ()


# Released models, by assets/shapes, and over how many devices rollouts split their heads: those of
# one process, and a host of a TPU slice has 4.
SIZES = {
  "qwen2_5_vl_3b": 2,
  "qwen2_5_vl_7b": 4,
  "qwen2_5_vl_32b": 4,
  "qwen3_vl_8b": 4,
  "qwen3_8b": 4,
}


def released(c: ConfigDict, size: str) -> None:
  """A model of `SIZES` by its shapes alone: enough to plan, not to run."""
  c.model.path = f"assets/shapes/{size}"
  c.model.dtype, c.model.remat = "bfloat16", "layers"


WAYS = ("", "text", "lora", "text-lora")  # Models of one's own, and what of them learns.
TRAINED = (*WAYS, *(f"{size}{way}" for size in SIZES for way in ("", "-lora")))


def own_training(c: ConfigDict, arg: str, *, lr: float, lora_lr: float, steps: int) -> None:
  """Long rows, a rate and room for a model of `TRAINED`."""
  if arg not in TRAINED:
    raise ValueError(f"config argument {arg!r} must be one of {TRAINED}")
  c.model = trained()
  own(c, tools="text" not in arg and not arg.startswith("qwen3_8b"))
  size = arg.removesuffix("-lora")
  if size in SIZES:
    released(c, size)
    # Each weight lies on one device, and is gathered when it is used; rollouts, which would gather
    # all of them at each token, split heads and matrices instead.
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.rollout_mesh.data, c.rollout_mesh.tensor = -1, SIZES[size]
  c.max_row, c.packed = 16_384, True
  c.optimizer = optimizer(lr=lr, steps=steps, warmup=steps // 20)
  if "lora" in arg:
    c.model.lora.rank, c.optimizer.lr = 16, lora_lr


TOOLS = (
  "zoom_in",
  "segment_object_at",
  "get_properties",
  "read_text",
  "track_object",
  "select_frames",
)
DIGITS = ("framed", "beside", "parity")
PUZZLES = ("read", "count", "clock", "larger", "color", "shape", "moved", "hidden")


def all_tools(c: ConfigDict, *asked: ConfigDict) -> None:
  """Every tool of ours, and in each of `asked` beside digits every kind of question that needs one.

  Sizes are of the embedded model's words: an episode has up to 410 tokens.
  """
  c.model.tools = TOOLS
  c.model.tool_options.tracker = "flow"  # 16 frames take CSRT more than a second.
  # A demonstration whose tool was stopped is left out: on a busy machine data would be others.
  c.model.workers.seconds = 600.0
  c.limits.turns, c.limits.tokens = 5, 512  # "moved": a frame, three paths, and the answer.
  for questions in asked:
    questions.kinds = (*questions.kinds, *PUZZLES)


def limits() -> ConfigDict:
  """agent.Limits of an episode."""
  c = ConfigDict()
  c.turns = 4
  c.tokens = 320
  c.bad_calls = 1
  c.seconds = float("inf")
  c.answer = "boxed"  # Where it is: in the last \boxed{}, or "number": the last number there is.
  return c


def scenes(split: str, shift: str = "none", n: int = 200, seed: int = 1000) -> ConfigDict:
  """Questions that are made: of digit scenes, or of data/kinds."""
  c = ConfigDict()
  c.split = split
  c.shift = shift
  c.skew = -1  # A digit that 60% of the answers are; -1 for balanced.
  c.kinds = DIGITS  # Equally often; see data.mixture.KINDS.
  c.n = n
  c.seed = seed
  return c


def questions(
  split: str = "held_out", shift: str = "none", n: int = 200, seed: int = 1000
) -> ConfigDict:
  """Labelled questions: those of `scenes`, or the first n of a file."""
  c = scenes(split, shift, n, seed)
  c.file = ""  # Labelled questions (data/questions.py) in place of made ones.
  c.verifier = "equal"  # A name in verifiers.VERIFIERS: by which rule answers are scored.
  return c


def evaluation(n: int = 200, every: int = 200) -> ConfigDict:
  """Held-out questions, and how often they are asked."""
  c = questions(n=n)
  c.every = every  # Training steps between evaluations.
  return c


def objective(tokens: float = 1024.0) -> ConfigDict:
  """algo.policy_losses.Objective, which says what each field is; names and defaults are verl's."""
  c = ConfigDict()
  c.loss_mode = "ppo_clip"  # Or gspo, sapo, cispo, gmpo, clip_cov, kl_cov.
  c.clip_ratio_low, c.clip_ratio_high = 0.2, 0.28
  c.clip_ratio_c = 0.0  # Dual clip; 0: none.
  c.tau_pos, c.tau_neg = 1.0, 1.05
  c.clip_cov_ratio, c.clip_cov_lb, c.clip_cov_ub = 2e-4, 1.0, 5.0
  c.kl_cov_ratio, c.ppo_kl_coef = 2e-4, 0.1
  c.loss_agg_mode = "token-mean"
  c.loss_scale_factor = tokens  # What "seq-mean-token-sum-norm" divides by.
  c.kl_loss_type = "k3"
  c.entropy_coeff = 0.0
  return c


def pseudo_reward() -> ConfigDict:
  """algo.pseudo_rewards.PseudoReward: what samples earn by a vote; defaults are the papers'."""
  c = ConfigDict()
  c.rule = "agreement"  # TTRL's; or soft (TTRV), scrl, evol.
  c.entropy = 0.75  # Of soft.
  c.share, c.margin, c.rare, c.uncertainty = 0.375, 0.125, 0.125, 0.1  # Of scrl.
  return c


def wandb() -> ConfigDict:
  """Whether W&B is told what metrics.jsonl is; see metrics.check_wandb."""
  c = ConfigDict()
  c.mode = "off"  # Or "offline": into the workdir, nothing leaves the machine; or "online".
  c.project = "pixelis_jax"
  return c


def mesh() -> ConfigDict:
  """sharding.make_mesh; data -1 takes what the others leave."""
  c = ConfigDict()
  c.data, c.fsdp, c.tensor = -1, 1, 1
  return c


def rollout_mesh() -> ConfigDict:
  """The devices of the mesh under other sizes, where rollouts are played; data 0: as they are.

  With a `staleness` those behind the mesh's.
  """
  c = ConfigDict()
  c.data, c.fsdp, c.tensor = 0, 1, 1
  return c


def optimizer(lr: float, steps: int, warmup: int) -> ConfigDict:
  """AdamW; lr falls along a cosine from its peak to `final_fraction` of it."""
  c = ConfigDict()
  c.lr = lr
  c.steps = steps
  c.warmup = warmup
  c.final_fraction = 0.1
  c.b1, c.b2 = 0.9, 0.95
  c.weight_decay = 0.01
  c.clip_norm = 1.0
  c.mu_dtype = "float32"  # Of Adam's first moment: bfloat16 is 2 bytes a weight less.
  c.muon_scale = 0.0  # Of lr, for the layers' matrices, moved by Muon; at 0 AdamW moves all.
  c.patch_scale = 1.0  # Of lr, for the patch embedding; see learner.make_optimizer.
  return c
