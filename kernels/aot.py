"""Compiles the ops for TPUs and GPUs that are not here, and says what the compiler made of them.

    python -m kernels.aot --targets v5e v5p v6e h100 a100 --out runs/aot.json

Needs the extra `aot` (libtpu, CUDA's compiler); no TPU and no GPU. The compile is the real one: a
tile that does not fit VMEM or shared memory, or an operation that Mosaic does not have, fails here
as it would on the chip; ptxas says what it made of registers. Nothing is run, so nothing is said
about speed. Exit code 1 where anything failed to compile or does not fit the chip's memory.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from kernels import attention_gpu, specs, token_logps_gpu
from kernels.attention import attention
from kernels.chips import CHIPS, GIB, Gpu, Tpu, smallest, without_devices
from kernels.decode_attention import Prompts, decode_attention
from kernels.token_logps import token_logps


def attend(spec: specs.Attention, target: Tpu | Gpu) -> Callable:
  """By the target's own kernels where they serve the spec."""
  backend = target.backend
  if backend == "gpu" and not attention_gpu.serves(spec.dtype, spec.H):
    backend = "xla"
  return lambda q, k, v, q_at, kv_at: attention(
    q, k, v, causal=spec.causal, q_segments=q_at, kv_segments=kv_at, backend=backend
  )


def logps(spec: specs.TokenLogps, target: Tpu | Gpu, backend: str = "xla") -> Callable:
  return lambda hidden, head, tokens: token_logps(hidden, head, tokens, backend=backend)[0]


def logps_kernel(spec: specs.TokenLogps, target: Tpu | Gpu) -> Callable | None:
  served = target.backend == "gpu" and not token_logps_gpu.refusal(spec.dtype, spec.D, spec.V)
  return logps(spec, target, "gpu") if served else None


def decode(spec: specs.DecodeAttention, target: Tpu | Gpu, backend: str = "xla") -> Callable:
  return lambda q, k, v, seen, *prompts: decode_attention(
    q, k, v, seen, Prompts(*prompts), backend=backend
  )


def decode_kernel(spec: specs.DecodeAttention, target: Tpu | Gpu) -> Callable | None:
  served = target.backend == "gpu" and attention_gpu.serves(spec.dtype, spec.H)
  return decode(spec, target, "gpu") if served else None


DIRECTIONS = ("forward", "backward")

# op -> (specs, what runs one, None where nothing does; which of its arguments have gradients).
# Those called _kernel run on no device unless they are asked for by name.
OPS = {
  "attention": (specs.ATTENTION, attend, (0, 1, 2)),
  "token_logps": (specs.TOKEN_LOGPS, logps, (0, 1)),
  "token_logps_kernel": (specs.TOKEN_LOGPS, logps_kernel, (0, 1)),
  "decode_attention": (specs.DECODE_ATTENTION, decode, ()),
  "decode_attention_kernel": (specs.DECODE_ATTENTION, decode_kernel, ()),
}


def compiled(function: Callable, shapes: specs.Shapes, target: Tpu | Gpu) -> jax.stages.Compiled:
  """For one chip: inside a shard_map, where Mosaic learns the generation, and on copies."""
  mesh = smallest(target)
  everywhere = NamedSharding(mesh, PartitionSpec())
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in shapes]
  one = jax.shard_map(
    function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
  )
  with jax.set_mesh(mesh):
    return jax.jit(one).trace(*inputs).lower(lowering_platforms=(target.platform,)).compile()


@contextlib.contextmanager
def registers() -> Iterator[Callable[[], dict[str, int]]]:
  """A function that says what ptxas told of the Mosaic kernels that were compiled within.

  {"registers": the most of a thread at its launch, "spills": bytes stored to local memory, of all}.
  """
  with tempfile.TemporaryDirectory() as folder:
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}

    def told() -> dict[str, int]:
      logs = [file.read_text() for file in Path(folder).glob("*.ptxas")]
      spills = [re.search(r"frame, (\d+) bytes spill stores", log)[1] for log in logs]
      used = [re.search(r"Used (\d+) registers", log)[1] for log in logs]
      if not logs:
        return {}
      return {"registers": max(map(int, used)), "spills": sum(map(int, spills))}

    try:
      yield told
    finally:
      del os.environ["MOSAIC_GPU_DUMP_PTXAS"], os.environ["MOSAIC_GPU_DUMP_TO"]


def cases(ops: list[str], names: list[str], target: str) -> Iterator[tuple[str, str, str]]:
  """(op, spec, direction) of what there is for the target; of equal specs the first."""
  for op in ops:
    named, make, arguments = OPS[op]
    asked = {name: spec for name, spec in named.items() if not names or name in names}
    first = {spec: name for name, spec in reversed(asked.items())}
    for spec, name in reversed(first.items()):
      if make(spec, CHIPS[target]) is not None:
        yield from ((op, name, direction) for direction in DIRECTIONS[: 1 + bool(arguments)])


def measure(op: str, name: str, direction: str, target: str) -> dict:
  """One row of the table."""
  named, make, arguments = OPS[op]
  spec, chip = named[name], CHIPS[target]
  function = make(spec, chip)
  if direction == "backward":
    function = specs.backward(function, arguments)
  row = {"target": target, "op": op, "spec": name, "direction": direction}
  began = time.monotonic()
  with registers() as ptxas:
    try:
      program = compiled(function, spec.shapes(), chip)
    except jax.errors.JaxRuntimeError as e:  # What Mosaic and XLA refuse is the finding.
      return {**row, "error": str(e).split("\n")[0]}
    row |= ptxas()
  seconds, memory = time.monotonic() - began, program.memory_analysis()
  peak = memory.peak_memory_in_bytes
  calls = [
    line
    for line in program.as_text().splitlines()
    if re.search(rf'custom_call_target="{chip.call}\w*"', line)
  ]
  scoped = [re.search(r'"memory_space":"1","offset":"0","size":"(\d+)"', call) for call in calls]
  return {
    **row,
    **({"vmem": max(int(found[1]) for found in scoped)} if all(scoped) and scoped else {}),
    "seconds": seconds,
    "kernels": len(calls),
    "temporary": memory.temp_size_in_bytes,
    "peak": peak,
    "error": "" if peak <= chip.memory else f"peak {peak} exceeds {chip.memory} bytes of memory",
  }


def shown(row: dict) -> str:
  """The row as a line of the table."""
  line = f"{row['target']:4} {row['op']:23} {row['spec']:22} {row['direction']:8}"
  if "seconds" in row:
    line += f" {row['seconds']:7.1f}s {row['kernels']:7d}"
    line += f" {row['temporary'] / GIB:6.2f}GiB {row['peak'] / GIB:6.2f}GiB"
  if "vmem" in row:
    line += f" {row['vmem'] / 2**20:.1f}MiB of VMEM"
  if "registers" in row:
    line += f" {row['registers']} registers, {row['spills']} bytes spilled"
  return f"{line} {row['error']}".rstrip()


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  targets = [name for name in CHIPS if name != "h200"]  # An H100 with other memory.
  parser.add_argument("--targets", nargs="+", choices=CHIPS, default=targets)
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument("--specs", nargs="+", default=[], help="names in kernels/specs.py; all")
  parser.add_argument("--out", type=Path, help="the rows as JSON")
  args = parser.parse_args(argv)
  without_devices()
  rows = []
  sizes = f"{'compile':>8} {'kernels':>7} {'temp':>9} {'peak':>9}"
  print(f"{'chip':4} {'op':23} {'spec':22} {'pass':8} {sizes}")
  for target in args.targets:
    for case in cases(args.ops, args.specs, target):
      rows.append(measure(*case, target))
      print(shown(rows[-1]), flush=True)
  if not rows:
    parser.error(f"no op of {args.ops} has a spec of {args.specs}")
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=2))
  failed = [row for row in rows if row["error"]]
  print(f"{len(rows) - len(failed)} of {len(rows)} compiled and fit")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
