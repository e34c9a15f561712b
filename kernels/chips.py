"""Chips that are not here, as compilers know them: their memory, their speed, and slices of them.

A slice is named as its seller does: v5e-64 and v6e-64 have 64 chips, v5p-64 counts TensorCores and
has 32, h100-8 has 8 GPUs. Nothing runs on the devices given here; programs compile for them. Needs
the extra `aot` (libtpu, CUDA's compiler), and JAX on the CPU: see `without_devices`.
"""

import dataclasses
import os

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

GIB = 2**30


def without_devices() -> None:
  """Before JAX looks for devices: a host without TPUs has nobody to ask about them."""
  if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Its lock is for processes that share chips.
  }


@dataclasses.dataclass(frozen=True)
class Tpu:
  """One generation. `sizes` are the slices that can be had: the number in the name -> its sides.

  Bytes of HBM, bytes a second, bfloat16 operations a second of a chip:
  https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
  """

  name: str
  memory: int
  bandwidth: float
  rate: float
  sizes: dict[int, tuple[int, ...]]
  kinds: tuple[str, ...]  # What JAX calls it.
  backend: str = "tpu"
  call: str = "tpu_custom_call"
  platform: str = "tpu"

  def devices(self, size: int) -> list[jax.Device]:
    """Of the slice of this size; ValueError names those there are."""
    if size not in self.sizes:
      raise ValueError(f"{self.name}-{size} is no slice; there are {self._names()}")
    sides = "x".join(map(str, self.sizes[size]))
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{self.name}:{sides}")
    return list(described.devices)

  def _names(self) -> list[str]:
    return [f"{self.name}-{size}" for size in self.sizes]


_SQUARES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
  8: (2, 2, 1),
  16: (2, 2, 2),
  32: (2, 2, 4),
  64: (2, 4, 4),
  128: (4, 4, 4),
  256: (4, 4, 8),
  512: (4, 8, 8),
}


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
  rate: float  # bfloat16 operations a second, dense.
  backend: str
  call: str = "mosaic_gpu"
  platform: str = "cuda"

  @property
  def kinds(self) -> tuple[str, ...]:
    """What JAX calls it."""
    return (self.name,)

  def devices(self, size: int) -> list[jax.Device]:
    """Machines of 8, or one with fewer; ValueError for other numbers."""
    if size < 1 or (size > 8 and size % 8):
      raise ValueError(f"{size} GPUs are no machines of 8, and no part of one")
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
    hosts = f"1x{-(-size // 8)}x{min(size, 8)}"
    described = topologies.get_topology_desc(platform="cuda", target_config=config, topology=hosts)
    return list(described.devices)


# https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c (SXM5)
_H100 = Gpu(
  name="NVIDIA H100 80GB HBM3",
  capability=(9, 0),
  processors=132,
  lanes=128,
  shared=228 * 1024,
  cache=50 * 2**20,
  bandwidth=3_350_000_000_000,
  clock=1.98,
  memory=80 * GIB,
  rate=989e12,
  backend="gpu",
)

CHIPS = {
  "v5e": Tpu("v5e", 16 * GIB, 819e9, 197e12, _SQUARES, ("TPU v5 lite", "TPU v5e")),
  "v5p": Tpu("v5p", 95 * GIB, 2765e9, 459e12, _CUBES, ("TPU v5", "TPU v5p")),
  "v6e": Tpu("v6e", 32 * GIB, 1640e9, 918e12, _SQUARES, ("TPU v6 lite", "TPU v6e")),
  "h100": _H100,
  # https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
  "h200": dataclasses.replace(
    _H100,
    name="NVIDIA H200",
    cache=60 * 2**20,
    bandwidth=4_800_000_000_000,
    memory=140 * GIB,
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
    rate=312e12,
    backend="xla",
  ),
}


def slice_of(name: str) -> tuple[Tpu | Gpu, list[jax.Device]]:
  """(chip, its devices) of "v5e-64", "h100-8" and the like; ValueError says what there is."""
  chip, _, size = name.partition("-")
  if chip not in CHIPS or not size.isdecimal():
    raise ValueError(f"topology {name!r} must be one of {sorted(CHIPS)}, a dash and a size")
  return CHIPS[chip], CHIPS[chip].devices(int(size))


def smallest(chip: Tpu | Gpu) -> Mesh:
  """A mesh of the smallest slice that can be described."""
  devices = chip.devices(min(chip.sizes) if isinstance(chip, Tpu) else 1)
  return jax.make_mesh((len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices)
