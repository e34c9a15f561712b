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
  return c


def trained(path: str = "assets/tiny-vl") -> ConfigDict:
  """A model, and which of its weights learn: all but `freeze`, or with a LoRA rank adapters."""
  c = model(path)
  c.freeze = ()  # Parts whose weights stay, such as "visual" or "text/embedding".
  c.lora = ConfigDict()
  c.lora.rank = 0  # Of every target; 0: none but those that `ranks` lists.
  c.lora.ranks = ""  # A JSON file with a rank for each layer; see model.lora.read_ranks.
  c.lora.alpha = 32.0  # An adapter's share is alpha / rank.
  c.lora.dropout = 0.0
  # Regular expressions of whole paths of our tree; these are the decoder's linear layers.
  c.lora.targets = ("text/layers/attn/[qkvo]", "text/layers/mlp/(gate|up|down)")
  return c


def limits() -> ConfigDict:
  """agent.Limits of an episode."""
  c = ConfigDict()
  c.turns = 4
  c.tokens = 320
  c.bad_calls = 1
  c.seconds = float("inf")
  return c


def evaluation(
  split: str = "held_out", shift: str = "none", n: int = 200, seed: int = 1000
) -> ConfigDict:
  """Labelled questions, and how often they are asked."""
  c = ConfigDict()
  c.split = split
  c.shift = shift
  c.skew = -1  # A digit that 60% of the answers are; -1 for balanced.
  c.kinds = ("framed", "beside", "parity")
  c.n = n
  c.seed = seed
  c.every = 200  # Training steps between evaluations.
  return c


def mesh() -> ConfigDict:
  """sharding.make_mesh; data -1 takes what the others leave."""
  c = ConfigDict()
  c.data, c.fsdp, c.tensor = -1, 1, 1
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
  c.patch_scale = 1.0  # Of lr, for the patch embedding; see learner.make_optimizer.
  return c
