"""Times each op beside its definition on the device at hand: ratios, roofline and memory.

    python -m kernels.bench --specs 1k 4k 16k --repeats 5 --out runs/bench.json

A row is one op, shape and pass: the median of interleaved runs of the op and of its reference,
their ratio (above 1 the op is faster), the share of the roofline that the op reaches, and the
temporary memory of both as the compiler planned it. The roofline is the lower of the rate of a
large matrix product, measured in the same run, and of what the bytes of the spec allow at the rate
of a large copy; operations and bytes are counted from the spec, for a backward pass 3.5 and 3 times
those of the forward one. A reference that would take more than --most GiB is not run. On a GPU,
attention in plain XLA's tiles stands beside it too, and cuDNN's where rows are one segment each:
it has no other mask; and beside the other ops the kernels that nothing prefers yet. On a TPU JAX's
own splash attention stands beside ours.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jaxtyping import Array, Float, Int

from kernels import attention_gpu, specs, tiles, token_logps_gpu
from kernels import decode_attention as decode
from kernels import token_logps as logps
from kernels.attention import attention, reference

Sides = dict[str, Callable]

GIB = 2**30


def attend(spec: specs.Attention) -> Sides:
  """The op, its definition, and what else the device has."""

  def naive(q, k, v, q_at, kv_at):
    return reference(q, k, v, tiles.visible(spec.causal, q_at, kv_at))

  def by(backend):
    return lambda q, k, v, q_at, kv_at: attention(
      q, k, v, causal=spec.causal, q_segments=q_at, kv_segments=kv_at, backend=backend
    )

  def cudnn(q, k, v, q_at, kv_at):
    lengths = {
      "query_seq_lengths": (q_at != 0).sum(axis=1, dtype=jnp.int32),
      "key_value_seq_lengths": (kv_at != 0).sum(axis=1, dtype=jnp.int32),
    }
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=spec.causal, implementation="cudnn", **lengths
    )

  sides = {"op": by(None), "reference": naive}
  if jax.default_backend() == "tpu":
    sides["splash"] = functools.partial(splash_attention, causal=spec.causal)
  if jax.default_backend() == "gpu":
    sides["xla"] = by("xla")
    if not spec.segment:
      sides["cudnn"] = cudnn
  return sides


def splash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  q_at: Int[Array, "B T"],
  kv_at: Int[Array, "B S"],
  *,
  causal: bool,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """JAX's kernel for TPUs, in blocks of up to 512. Padding sees padding; with ours, nothing."""
  (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
  mask = (splash_masks.CausalMask if causal else splash_masks.FullMask)((T, S))
  block_q, block_kv = min(512, T), min(512, S)
  sizes = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  # One key head and the query heads that share it; then all key heads, and all rows.
  kernel = splash.make_splash_mqa_single_device(
    splash_masks.MultiHeadMask([mask] * (N // K)), block_sizes=sizes, interpret=interpret
  )
  kernel = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))
  heads_first = lambda x: jnp.moveaxis(x, 1, -2)  # [B, K, S, H], and queries [B, K, R, T, H].
  queries = heads_first((q * q.shape[-1] ** -0.5).reshape(*q.shape[:2], K, N // K, -1))
  out = kernel(queries, heads_first(k), heads_first(v), splash.SegmentIds(q=q_at, kv=kv_at))
  return jnp.moveaxis(out, -2, 1).reshape(q.shape)


def score(spec: specs.TokenLogps) -> Sides:
  """The op, its definition, whose logits are all there at once, and the kernel for GPUs."""

  def by(backend):
    return lambda hidden, head, tokens: logps.token_logps(hidden, head, tokens, backend=backend)[0]

  backends = {"op": "xla", "reference": "reference"}
  if jax.default_backend() == "gpu" and not token_logps_gpu.refusal(spec.dtype, spec.D, spec.V):
    backends["kernel"] = "gpu"
  return {side: by(backend) for side, backend in backends.items()}


def read(spec: specs.DecodeAttention) -> Sides:
  """The op, its definition, where every row has its prompt's keys, and the kernel for GPUs."""

  def by(backend):
    return lambda q, k, v, seen, *prompts: decode.decode_attention(
      q, k, v, seen, decode.Prompts(*prompts), backend=backend
    )

  backends = {"op": "xla", "reference": "reference"}
  if jax.default_backend() == "gpu" and attention_gpu.serves(spec.dtype, spec.H):
    backends["kernel"] = "gpu"
  return {side: by(backend) for side, backend in backends.items()}


# op -> (specs, what runs one, which of its arguments have gradients)
OPS = {
  "attention": (specs.ATTENTION, attend, (0, 1, 2)),
  "token_logps": (specs.TOKEN_LOGPS, score, (0, 1)),
  "decode_attention": (specs.DECODE_ATTENTION, read, ()),
}


def seconds(run: Callable, inputs: tuple) -> float:
  began = time.perf_counter()
  jax.block_until_ready(run(*inputs))
  return time.perf_counter() - began


def median(run: Callable, inputs: tuple, repeats: int) -> float:
  seconds(run, inputs)  # The first call compiles.
  return statistics.median(seconds(run, inputs) for _ in range(repeats))


def machine(repeats: int) -> tuple[float, float]:
  """(operations a second of a matrix product, bytes a second of a copy), both large.

  The product is of the device's fast numbers, and of random ones: zeros take less power.
  """
  host = jax.default_backend() == "cpu"
  side, count, dtype = (2048, 2**26, jnp.float32) if host else (8192, 2**30, jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)
  rate = 2.0 * side**3 / median(jax.jit(lambda x: x @ x), (x,), repeats)
  flat = jnp.ones(count, jnp.float32)
  return rate, 8.0 * count / median(jax.jit(lambda x: x + 1), (flat,), repeats)


def measure(op: str, name: str, direction: str, *, peak, most: int, repeats: int) -> dict:
  """One row of the table."""
  named, make, arguments = OPS[op]
  spec = named[name]
  inputs = spec.inputs(np.random.default_rng(0))
  sides = make(spec)
  if direction == "backward":
    sides = {side: specs.backward(run, arguments) for side, run in sides.items()}
  programs = {side: jax.jit(run).lower(*inputs).compile() for side, run in sides.items()}
  memory = {s: p.memory_analysis().temp_size_in_bytes for s, p in programs.items()}
  programs = {s: p for s, p in programs.items() if s == "op" or memory[s] <= most}
  times: dict[str, list[float]] = {side: [] for side in programs}
  for run in programs.values():
    seconds(run, inputs)
  for _ in range(repeats):
    for side, run in programs.items():
      times[side].append(seconds(run, inputs))
  found = {side: statistics.median(taken) for side, taken in times.items()}
  more = (1.0, 1.0) if direction == "forward" else (3.5, 3.0)
  least = max(more[0] * spec.operations() / peak[0], more[1] * spec.traffic() / peak[1])
  return {
    "op": op,
    "spec": name,
    "direction": direction,
    "seconds": found,
    "roofline": least / found["op"],
    "temporary": memory,
  }


def shown(row: dict) -> str:
  """The row as a line of the table."""
  ours, memory = row["seconds"]["op"], row["temporary"]
  line = f"{row['op']:16} {row['spec']:22} {row['direction']:8} {1e3 * ours:9.3f}"
  line += f" {100 * row['roofline']:7.1f}% {memory['op'] / 2**20:8.1f}"
  for side in memory:
    if side != "op":
      theirs = row["seconds"].get(side)
      time = "too large" if theirs is None else f"{1e3 * theirs:.3f} ms, {theirs / ours:.2f}"
      line += f"  {side}: {time}, {memory[side] / 2**20:.1f} MiB"
  return line


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument("--specs", nargs="+", default=["tiny", "1k", "4k", "16k"])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--most", type=float, default=12.0, help="GiB of a reference's temporaries")
  parser.add_argument("--out", type=Path, help="the rows as JSON")
  args = parser.parse_args(argv)
  cases = [
    (op, name, direction)
    for op in args.ops
    for name in args.specs
    if name in OPS[op][0]
    for direction in ("forward", "backward")[: 1 + bool(OPS[op][2])]
  ]
  if not cases:
    parser.error(f"no op of {args.ops} has a spec of {args.specs}")
  peak = machine(args.repeats)
  device = jax.devices()[0].device_kind
  print(f"{device}: product {peak[0] / 1e9:.0f} GFLOP/s, copy {peak[1] / 1e9:.1f} GB/s")
  print(f"{'op':16} {'spec':22} {'pass':8} {'ms':>9} {'roofline':>8} {'MiB':>8}  beside it")
  rows, most = [], int(args.most * GIB)
  for case in cases:
    rows.append(measure(*case, peak=peak, most=most, repeats=args.repeats))
    print(shown(rows[-1]), flush=True)
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"device": device, "product": peak[0], "copy": peak[1], "repeats": args.repeats}
    args.out.write_text(json.dumps({**facts, "rows": rows}, indent=2))
  return 0


if __name__ == "__main__":
  sys.exit(main())
