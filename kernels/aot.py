"""Compiles the ops for TPUs and GPUs that are not here, and says what the compiler made of them.

    python -m kernels.aot --targets v5e v5p v6e h100 a100 --out runs/aot.json

Needs the extra `aot` (libtpu, CUDA's compiler); no TPU and no GPU. The compile is the real one: a
tile that does not fit VMEM or shared memory, or an operation that Mosaic does not have, fails here
as it would on the chip; ptxas says what it made of registers. Nothing is run, so nothing is said
about speed. Exit code 1 where anything failed to compile or does not fit the chip's memory.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import attention_gpu, specs
from kernels.attention import attention
from kernels.token_logps import token_logps

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A slice of the smallest size that can be described, and the HBM of one of its chips."""

  topology: str
  sides: tuple[int, ...]
  memory: int  # Bytes: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
  backend: str = "tpu"
  call: str = "tpu_custom_call"

  def mesh(self) -> Mesh:
    described = topologies.get_topology_desc(platform="tpu", topology_name=self.topology)
    return topologies.make_mesh(described, self.sides, ("x", "y", "z")[: len(self.sides)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
  """What the compiler has to know of a GPU, from NVIDIA's data sheet and CUDA's guide."""

  name: str
  capability: tuple[int, int]
  processors: int
  lanes: int  # float32 units of a multiprocessor.
  shared: int  # Bytes of shared memory of a multiprocessor; a block gets all but 1 KiB.
  cache: int  # Bytes of L2.
  bandwidth: int  # Bytes a second.
  clock: float  # GHz.
  memory: int
  backend: str
  call: str = "mosaic_gpu"

  def mesh(self) -> Mesh:
    config = f"""
      platform_name: "CUDA"
      device_description_str: "{self.name}"
      dnn_version_info {{ major: 9 minor: 10 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
        core_count: {self.processors}
        fpus_per_core: {self.lanes}
        shared_memory_per_core: {self.shared}
        shared_memory_per_block_optin: {self.shared - 1024}
        shared_memory_per_block: 49152
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        threads_per_core_limit: 2048
        threads_per_block_limit: 1024
        threads_per_warp: 32
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
        l2_cache_size: {self.cache}
        memory_bandwidth: {self.bandwidth}
        clock_rate_ghz: {self.clock}
        device_memory_size: {self.memory}
      }}"""
    described = topologies.get_topology_desc(
      platform="cuda", target_config=config, topology="1x1x1"
    )
    return topologies.make_mesh(described, (1,), ("x",))


TARGETS = {
  "v5e": Tpu("v5e:2x2", (2, 2), 16 * GIB),
  "v5p": Tpu("v5p:2x2x1", (2, 2, 1), 95 * GIB),
  "v6e": Tpu("v6e:2x2", (2, 2), 32 * GIB),
  # https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c (SXM5)
  "h100": Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    processors=132,
    lanes=128,
    shared=228 * 1024,
    cache=50 * 2**20,
    bandwidth=3_350_000_000_000,
    clock=1.98,
    memory=80 * GIB,
    backend="gpu",
  ),
  # https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
  "a100": Gpu(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    processors=108,
    lanes=64,
    shared=164 * 1024,
    cache=40 * 2**20,
    bandwidth=2_039_000_000_000,
    clock=1.41,
    memory=80 * GIB,
    backend="xla",
  ),
}


def attend(spec: specs.Attention, target: Tpu | Gpu) -> Callable:
  """By the target's own kernels where they serve the spec."""
  backend = target.backend
  if backend == "gpu" and not attention_gpu.serves(spec.dtype, spec.H):
    backend = "xla"
  return lambda q, k, v, q_at, kv_at: attention(
    q, k, v, causal=spec.causal, q_segments=q_at, kv_segments=kv_at, backend=backend
  )


def logps(spec: specs.TokenLogps, target: Tpu | Gpu) -> Callable:
  return lambda hidden, head, tokens: token_logps(hidden, head, tokens)[0]


# op -> (specs, what runs one, which of its arguments have gradients)
OPS = {
  "attention": (specs.ATTENTION, attend, (0, 1, 2)),
  "token_logps": (specs.TOKEN_LOGPS, logps, (0, 1)),
}


def compiled(function: Callable, shapes: specs.Shapes, target: Tpu | Gpu) -> jax.stages.Compiled:
  """For one chip: inside a shard_map, where Mosaic learns the generation, and on copies."""
  mesh = target.mesh()
  everywhere = NamedSharding(mesh, PartitionSpec())
  inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in shapes]
  one = jax.shard_map(
    function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
  )
  platform = "tpu" if isinstance(target, Tpu) else "cuda"
  with jax.set_mesh(mesh):
    return jax.jit(one).trace(*inputs).lower(lowering_platforms=(platform,)).compile()


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


def measure(op: str, name: str, direction: str, target: str) -> dict:
  """One row of the table."""
  named, make, arguments = OPS[op]
  spec, chip = named[name], TARGETS[target]
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
  return {
    **row,
    "seconds": seconds,
    "kernels": len(re.findall(rf'custom_call_target="{chip.call}\w*"', program.as_text())),
    "temporary": memory.temp_size_in_bytes,
    "peak": peak,
    "error": "" if peak <= chip.memory else f"peak {peak} exceeds {chip.memory} bytes of memory",
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
          if "registers" in row:
            shown += f" {row['registers']} registers, {row['spills']} bytes spilled"
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
