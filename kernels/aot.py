"""Compiles the ops for TPUs that are not here, and says what the compiler made of them.

    python -m kernels.aot --targets v5e v5p v6e --out runs/aot.json

Needs the extra `aot` (libtpu); no TPU. The compile is the real one: a tile that does not fit VMEM,
or an operation that Mosaic does not have, fails here as it would on the chip. Nothing is run, so
nothing is said about speed. Exit code 1 where anything failed to compile or does not fit in HBM.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before JAX looks for devices: a host without TPUs has nobody to ask about them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kernels import specs
from kernels.attention import attention
from kernels.token_logps import token_logps

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
  """A slice of the smallest size that can be described, and the HBM of one of its chips."""

  topology: str
  sides: tuple[int, ...]
  hbm: int  # Bytes: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm


TARGETS = {
  "v5e": Target("v5e:2x2", (2, 2), 16 * GIB),
  "v5p": Target("v5p:2x2x1", (2, 2, 1), 95 * GIB),
  "v6e": Target("v6e:2x2", (2, 2), 32 * GIB),
}


def attend(spec: specs.Attention) -> Callable:
  return lambda q, k, v, q_at, kv_at: attention(
    q, k, v, causal=spec.causal, q_segments=q_at, kv_segments=kv_at, backend="tpu"
  )


def logps(spec: specs.TokenLogps) -> Callable:
  return lambda hidden, head, tokens: token_logps(hidden, head, tokens)[0]


# op -> (specs, what runs one, which of its arguments have gradients)
OPS = {
  "attention": (specs.ATTENTION, attend, (0, 1, 2)),
  "token_logps": (specs.TOKEN_LOGPS, logps, (0, 1)),
}


def compiled(function: Callable, shapes: specs.Shapes, target: Target) -> jax.stages.Compiled:
  """For one chip: inside a shard_map, where Mosaic learns the generation, and on copies."""
  described = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
  mesh = topologies.make_mesh(described, target.sides, ("x", "y", "z")[: len(target.sides)])
  everywhere = NamedSharding(mesh, PartitionSpec())
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in shapes]
  one = jax.shard_map(
    function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
  )
  with jax.set_mesh(mesh):
    return jax.jit(one).trace(*inputs).lower(lowering_platforms=("tpu",)).compile()


def measure(op: str, name: str, direction: str, target: str) -> dict:
  """One row of the table."""
  named, make, arguments = OPS[op]
  spec, chip = named[name], TARGETS[target]
  function = make(spec)
  if direction == "backward":
    function = specs.backward(function, arguments)
  row = {"target": target, "op": op, "spec": name, "direction": direction}
  began = time.monotonic()
  try:
    program = compiled(function, spec.shapes(), chip)
  except jax.errors.JaxRuntimeError as e:  # What Mosaic and XLA refuse is the finding.
    return {**row, "error": str(e).split("\n")[0]}
  seconds, memory = time.monotonic() - began, program.memory_analysis()
  peak = memory.peak_memory_in_bytes
  return {
    **row,
    "seconds": seconds,
    "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
    "temporary": memory.temp_size_in_bytes,
    "peak": peak,
    "error": "" if peak <= chip.hbm else f"peak {peak} exceeds HBM of {chip.hbm} bytes",
  }


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
  parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
  parser.add_argument("--specs", nargs="+", default=[], help="names in kernels/specs.py; all")
  parser.add_argument("--out", type=Path, help="the rows as JSON")
  args = parser.parse_args(argv)
  rows = []
  sizes = f"{'compile':>8} {'kernels':>7} {'temp':>9} {'peak':>9}"
  print(f"{'chip':4} {'op':11} {'spec':22} {'pass':8} {sizes}")
  for target in args.targets:
    for op in args.ops:
      for name in args.specs or OPS[op][0]:
        if name not in OPS[op][0]:
          continue
        for direction in ("forward", "backward"):
          row = measure(op, name, direction, target)
          rows.append(row)
          shown = f"{target:4} {op:11} {name:22} {direction:8}"
          if "seconds" in row:
            shown += f" {row['seconds']:7.1f}s {row['kernels']:7d}"
            shown += f" {row['temporary'] / GIB:6.2f}GiB {row['peak'] / GIB:6.2f}GiB"
          print(f"{shown} {row['error']}".rstrip(), flush=True)
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
