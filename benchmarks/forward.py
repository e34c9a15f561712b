r"""Speed beside torch: the same checkpoint and inputs, runs in turn, on this CPU or on one GPU.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
      python benchmarks/forward.py --sizes tiny 50m 300m --repeats 5 --out runs/forward
    XLA_PYTHON_CLIENT_PREALLOCATE=false \
      python benchmarks/forward.py --sizes 7b --dtype bfloat16 --tokens 2048 --side 64 --new 128

Rows: `tower` (image features), `forward` (log-probabilities of the next tokens of whole rows with
an image each), `backward` (that and the gradient for all weights), `prefill` and `generate` (one
greedy token, and many, behind a prompt with an image, from a key-value cache), and `decode`, what
the other tokens of `generate` took beyond `prefill`. tiny is assets/tiny-vl; the others are random
Qwen2.5-VLs of about that many weights, 7b in the shapes of Qwen2.5-VL-7B. Torch is transformers'
own model with scaled dot product attention, eager; with --compile its forward and backward are
measured through torch.compile too, with --unrolled our programs hold no loops. Both sides run on
JAX's default device. The ratio is torch's median time over ours: above 1 ours is faster. Results
are compared first, both with torch's in float32: a benchmark of two different computations says
nothing.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from record import ROOT, record  # The file beside this one.
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pixelis_jax import batch, learner
from pixelis_jax.model.load import load, load_config
from pixelis_jax.model.policy import Model, Params
from pixelis_jax.types import Patches

# (width, layers, heads, key heads, MLP, vocabulary; tower width, depth, heads, MLP)
SIZES = {
  "50m": (512, 10, 8, 2, 1536, 8192, 384, 6, 6, 1024),
  "300m": (1024, 18, 16, 4, 3584, 16384, 640, 10, 10, 1792),
  "7b": (3584, 28, 28, 4, 18944, 152064, 1280, 32, 16, 3420),
}
PASSES = ("tower", "forward", "backward", "prefill", "generate")
# How far a result may be from torch's in float32, as a share of its norm: sums in other orders over
# up to 28 layers. Where torch's own is further, in bfloat16, half as far again as that.
ERROR, TIMES = 1e-3, 1.5
# By how many nats first greedy tokens may be less likely than the likeliest in float32, on average;
# bfloat16 moves a log-probability by about a tenth of this. In float32 tokens are the same as well,
# but for rows that parted: two that parted once stay apart.
REGRET = {"float32": 1e-3, "bfloat16": 0.1}
SAME = 0.9


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is measured: the dtype; rows, tokens of a row, patches along an image, tokens decoded."""

  dtype: str
  rows: int
  tokens: int
  side: int
  new: int

  @property
  def device(self) -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def checkpoint(size: str, folder: Path, setting: Setting) -> Path:
  if size == "tiny":
    return ROOT / "assets/tiny-vl"
  D, L, N, K, F, V, E, depth, heads, M = SIZES[size]
  pairs = D // N // 2
  config = Qwen2_5_VLConfig(
    text_config={
      "vocab_size": V,
      "hidden_size": D,
      "intermediate_size": F,
      "num_hidden_layers": L,
      "num_attention_heads": N,
      "num_key_value_heads": K,
      "bos_token_id": None,
      "eos_token_id": None,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8],
      },
    },
    vision_config={
      "hidden_size": E,
      "depth": depth,
      "num_heads": heads,
      "intermediate_size": M,
      "out_hidden_size": D,
      "fullatt_block_indexes": [depth // 2 - 1, depth - 1],
    },
    image_token_id=V - 1,
    video_token_id=V - 2,
    vision_start_token_id=V - 3,
    vision_end_token_id=V - 4,
    tie_word_embeddings=size != "7b",
  )
  torch.manual_seed(0)
  config.dtype = torch.bfloat16 if setting.dtype == "bfloat16" else torch.float32
  with torch.device(setting.device):
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
  model.save_pretrained(folder / size)
  return folder / size


@dataclasses.dataclass
class Inputs:
  """One batch for both sides: ours packed, theirs as tensors."""

  ours: batch.Inputs
  theirs: dict[str, torch.Tensor]


def inputs(model: Model, theirs: Qwen2_5_VLForConditionalGeneration, setting: Setting) -> Inputs:
  config, draw = model.config, np.random.default_rng(0)
  count = setting.side**2 // config.vision.merge_unit
  rows, images = [], []
  for i in range(setting.rows):
    tokens = draw.integers(0, 200, setting.tokens).astype(np.int32)
    tokens[8 : 8 + count] = config.image_token
    tokens[7], tokens[8 + count] = config.vision_start_token, config.vision_end_token
    grid = (1, setting.side, setting.side)
    patches = draw.standard_normal((setting.side**2, config.vision.patch_values))
    side = setting.side * config.vision.patch
    images.append(
      Patches(patches=patches.astype(np.float32), grid=grid, size=(side, side), key=str(i))
    )
    rows.append(
      batch.Row(
        tokens=tokens,
        images=(images[-1],),
        loss_mask=np.ones(setting.tokens, bool),
        logps=np.zeros(setting.tokens, np.float32),
      )
    )
  packed = batch.pack_inputs(rows, config, max_tokens=setting.tokens)
  tokens = torch.tensor(np.stack([row.tokens for row in rows])).long()
  grids = torch.tensor([image.grid for image in images])
  kinds = (tokens == config.image_token).int()
  positions, _ = theirs.model.get_rope_index(tokens, kinds, image_grid_thw=grids)
  given = {
    "input_ids": tokens,
    "position_ids": positions,
    "pixel_values": torch.tensor(np.concatenate([image.patches for image in images])),
    "image_grid_thw": grids,
    "mm_token_type_ids": kinds,
  }
  return Inputs(
    ours=jax.tree.map(jnp.asarray, packed),
    theirs={name: x.to(setting.device) for name, x in given.items()},
  )


def our_greedy(model: Model, count: int, setting: Setting) -> Callable:
  """Prefill and `count` greedy tokens in one program."""

  rows = setting.rows

  def run(params: Params, given: batch.Inputs) -> jax.Array:
    features = model.encode(params, given.vision)
    features = features.reshape(1, -1, features.shape[-1])
    cache = model.init_cache(rows, setting.tokens + setting.new, jnp.dtype(setting.dtype))
    text = (given.tokens, given.positions, features, given.sources, given.segments)
    hidden, cache = model.extend(params, cache, *text)
    nowhere, one = jnp.full((rows, 1), -1, jnp.int32), jnp.ones((rows, 1), jnp.int32)
    start, apart = given.positions[:, :, -1:] + 1, model.apart(params)

    def step(i, carry):
      cache, hidden, out = carry
      token = jnp.argmax(hidden @ model.head(params).T, axis=-1).astype(jnp.int32)
      out = out.at[:, i].set(token)
      nothing = jnp.zeros((1, 0, hidden.shape[-1]), hidden.dtype)
      hidden, cache = model.extend(
        params, cache, token[:, None], start + i, nothing, nowhere, one, apart
      )
      return cache, hidden[:, 0], out

    out = jnp.zeros((rows, count), jnp.int32)
    return jax.lax.fori_loop(0, count, step, (cache, hidden[:, -1], out))[2]

  return jax.jit(run)


def their_logps(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
  logits = model(**given, use_cache=False).logits[:, :-1].log_softmax(-1)
  return logits.gather(-1, given["input_ids"][:, 1:, None])[..., 0]


def their_gradient(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
  model.zero_grad()
  their_logps(model, given).mean().backward()
  return model.model.language_model.embed_tokens.weight.grad


def pairs(
  path: Path, compiled: bool, setting: Setting
) -> dict[str, tuple[Callable, Callable, Callable | None]]:
  """Row -> (ours, torch eager, torch compiled or None), each without arguments."""
  dtype = jnp.dtype(setting.dtype)
  model, params = load(path, dtype=dtype)
  theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=setting.dtype)
  theirs = theirs.to(setting.device).eval()
  given = inputs(model, theirs, setting)
  encode = jax.jit(lambda params, vision: model.encode(params, vision))
  logps = jax.jit(lambda params, inputs: learner.logps(model, params, inputs)[0][:, 1:])
  mean = lambda params, inputs: learner.logps(model, params, inputs)[0][:, 1:].mean()
  gradient = jax.jit(jax.grad(mean))
  first, many = (our_greedy(model, count, setting) for count in (1, setting.new))
  tower = lambda: (
    theirs.model.visual(given.theirs["pixel_values"], given.theirs["image_grid_thw"]).pooler_output
  )
  greedy = lambda count: theirs.generate(
    **{k: v for k, v in given.theirs.items() if k != "position_ids"},
    attention_mask=torch.ones_like(given.theirs["input_ids"]),
    max_new_tokens=count,
    min_new_tokens=count,
    do_sample=False,
    pad_token_id=0,
  )[:, setting.tokens :]
  fast = torch.compile(theirs) if compiled else None
  quick = lambda run: None if fast is None else lambda: run(fast, given.theirs)
  return {
    "tower": (lambda: encode(params, given.ours.vision), no_grad(tower), None),
    "forward": (
      lambda: logps(params, given.ours),
      no_grad(lambda: their_logps(theirs, given.theirs)),
      no_grad(quick(their_logps)),
    ),
    "backward": (
      lambda: gradient(params, given.ours)["text"]["embedding"],
      lambda: their_gradient(theirs, given.theirs),
      None if fast is None else lambda: their_logps(fast, given.theirs).mean().backward(),
    ),
    "prefill": (lambda: first(params, given.ours), no_grad(lambda: greedy(1)), None),
    "generate": (lambda: many(params, given.ours), no_grad(lambda: greedy(setting.new)), None),
  }


def no_grad(run: Callable | None) -> Callable | None:
  return None if run is None else torch.no_grad()(run)


def exact(path: Path, setting: Setting, passes: Sequence[str]) -> dict[str, np.ndarray]:
  """What torch computes in float32: a pass's result, of greedy ones first log-probabilities."""
  theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
  theirs = theirs.to(setting.device).eval()
  given = inputs(Model(load_config(path)), theirs, setting).theirs
  tower = lambda: theirs.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
  last = lambda: theirs(**given, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(-1)
  runs = {
    "tower": no_grad(tower),
    "forward": no_grad(lambda: their_logps(theirs, given)),
    "backward": lambda: their_gradient(theirs, given),
    "prefill": no_grad(last),
    "generate": no_grad(last),
  }
  return {name: numbers(runs[name]()) for name in passes}


def numbers(x: jax.Array | torch.Tensor) -> np.ndarray:
  x = x.detach().float().cpu() if isinstance(x, torch.Tensor) else x
  return np.asarray(x, np.float64)


def check(
  name: str, mine: np.ndarray, other: np.ndarray, wanted: np.ndarray, dtype: str
) -> tuple[float, float]:
  """How far ours and torch's are from what float32 gives; raises where ours is too far."""
  if name in ("prefill", "generate"):
    best = wanted.max(axis=-1)
    first = lambda tokens: wanted[np.arange(len(wanted)), tokens[:, 0].astype(int)]
    ours, torchs = (float((best - first(tokens)).mean()) for tokens in (mine, other))
    assert ours <= REGRET[dtype], f"{name}: first tokens are {ours:.2g} nats from the likeliest"
    same = float((mine == other).mean())
    assert dtype != "float32" or same >= SAME, f"{name}: {same:.0%} of the tokens agree"
    return ours, torchs
  distance = lambda x: float(np.linalg.norm(x.reshape(wanted.shape) - wanted))
  ours, torchs = (distance(x) / float(np.linalg.norm(wanted)) for x in (mine, other))
  most = max(ERROR, TIMES * torchs)
  assert ours <= most, f"{name}: {ours:.1e} from float32 is beyond {most:.1e}"
  return ours, torchs


def seconds(run: Callable) -> float:
  began = time.perf_counter()
  jax.block_until_ready(run())
  if torch.cuda.is_initialized():
    torch.cuda.synchronize()
  return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", nargs="+", choices=["tiny", *SIZES], default=["tiny", *SIZES])
  parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
  parser.add_argument("--dtype", choices=REGRET, default="float32")
  parser.add_argument("--rows", type=int, default=4)
  parser.add_argument("--tokens", type=int, default=256, help="of a row, its image's among them")
  parser.add_argument("--side", type=int, default=16, help="patches along an image")
  parser.add_argument("--new", type=int, default=64, help="tokens decoded")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
  parser.add_argument("--unrolled", action="store_true", help="our loops over layers written out")
  parser.add_argument("--out", type=Path, default=Path("runs/forward"))
  args = parser.parse_args()
  if args.unrolled:
    jax.lax.scan = functools.partial(jax.lax.scan, unroll=True)
  setting = Setting(args.dtype, args.rows, args.tokens, args.side, args.new)
  rows = []
  head = (
    f"{'size':5} {'row':9} {'ours s':>8} {'torch s':>8} {'ratio':>6} {'error':>8} {'of torch':>8}"
    f" {'compiled':>9} {'ratio':>6}"
  )
  print(head, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    for size in args.sizes:
      path = checkpoint(size, Path(folder), setting)
      wanted = exact(path, setting, args.passes)
      torch.cuda.empty_cache()  # What torch keeps, JAX cannot take.
      for name, (mine, eager, fast) in pairs(path, args.compile, setting).items():
        if name not in args.passes:
          continue
        errors = check(name, numbers(mine()), numbers(eager()), wanted[name], args.dtype)
        sides = {"ours": mine, "eager": eager, "compiled": fast}
        sides = {side: run for side, run in sides.items() if run is not None}
        for run in sides.values():
          run()  # The first call compiles.
        times = {side: [] for side in sides}
        for _ in range(args.repeats):
          for side, run in sides.items():
            times[side].append(seconds(run))
        rows.append({**row(size, name, times, setting, errors), "errors": errors})
        if name == "generate" and rows[-2:-1] and rows[-2]["row"] == "prefill":
          before = rows[-2]["times"]
          beyond = {s: [b - a for a, b in zip(before[s], times[s], strict=True)] for s in times}
          rows.append(row(size, "decode", beyond, setting))
  facts = {"threads": torch.get_num_threads(), "tunables": os.environ.get("GLIBC_TUNABLES", "")}
  facts |= {"jax": jax.__version__, "torch": torch.__version__}
  record(args.out, "forward", {"setting": dataclasses.asdict(setting), "rows": rows, **facts})


def row(
  size: str,
  name: str,
  times: dict[str, list[float]],
  setting: Setting,
  errors: tuple[float, float] | None = None,
) -> dict:
  """The medians of a row, printed."""
  median = {side: statistics.median(taken) for side, taken in times.items()}
  ours, torch_s = median["ours"], median["eager"]
  line = f"{size:5} {name:9} {ours:8.3f} {torch_s:8.3f} {torch_s / ours:6.2f}"
  line += " " * 18 if errors is None else f" {errors[0]:8.1e} {errors[1]:8.1e}"
  if "compiled" in median:
    line += f" {median['compiled']:9.3f} {median['compiled'] / ours:6.2f}"
  if name == "decode":
    tokens = setting.rows * (setting.new - 1)
    line += f"  {tokens / ours:.0f} and {tokens / torch_s:.0f} tokens/s"
  print(line, flush=True)
  return {"size": size, "row": name, **median, "times": times}


if __name__ == "__main__":
  main()
