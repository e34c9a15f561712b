"""What a GRPO update costs as the mesh grows, with as much work for each device: weak scaling.

    python benchmarks/scaling.py --devices 1 2 4 8 --repeats 5 --out runs/scaling

The embedded model on virtual CPU devices, which share the cores: bytes are those of the compiled
program and hold on any device, seconds are of all devices' work one after the other, so that what
counts is how far a row exceeds its number of devices. `state` is weights and optimizer on a device.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax

MOST = 8
jax.config.update("jax_num_cpu_devices", MOST)  # Before JAX looks for devices.

import numpy as np  # noqa: E402
from record import ROOT, record  # noqa: E402 - the file beside this one.

from configs import tiny_rft  # noqa: E402
from pixelis_jax import traffic, workloads  # noqa: E402

LAYOUTS = ("data", "fsdp")
EPISODE = workloads.Episode(images=2, patches=64, asked=160, written=64)


@dataclasses.dataclass(frozen=True)
class Row:
  layout: str
  devices: int
  seconds: float
  moved: int
  state: int


def filled(x: jax.ShapeDtypeStruct) -> jax.Array:
  """An array like this in which all rows are full: segments, masks and indices are 1."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.device_put(jax.random.key(0), x.sharding)
  whole = np.zeros(x.shape, x.dtype) if x.dtype.kind == "f" else np.ones(x.shape, x.dtype)
  return jax.device_put(whole, x.sharding)


def measure(layout: str, devices: int, c: Any, repeats: int) -> Row:
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 1, 1
  c.mesh[layout] = devices
  held, ((_, _, step, arguments, *_), *_) = workloads.runs(c, jax.devices()[:devices], EPISODE)
  compiled = step.lower(*arguments).compile()
  moved = sum(traffic.moved(compiled.as_text()).values())
  state, *rest = jax.tree.map(filled, arguments)
  state, _ = compiled(state, *rest)
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    state, _ = compiled(state, *rest)
    jax.block_until_ready(state)
    times.append(time.perf_counter() - began)
  kept = held["weights that learn"] + held["optimizer"]
  return Row(layout, devices, statistics.median(times), moved, kept)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
  parser.add_argument("--questions", type=int, default=2, help="of 4 episodes, a device")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
  args = parser.parse_args()
  rows = []
  print("| split over | devices | seconds | moved, MB a device | state, MB a device |")
  print("|---|---|---|---|---|")
  for layout in LAYOUTS:
    for devices in args.devices:
      c = tiny_rft.get_config().copy_and_resolve_references().unlock()
      c.model.path, c.grpo.group, c.rows_multiple = str(ROOT / "assets/tiny-vl"), 4, 1
      c.grpo.questions = args.questions * devices
      row = measure(layout, devices, c, args.repeats)
      rows.append(dataclasses.asdict(row))
      print(
        f"| {layout} | {devices} | {row.seconds:.2f} | {row.moved / 1e6:.1f} |"
        f" {row.state / 1e6:.1f} |",
        flush=True,
      )
  record(args.out, "scaling", {"rows": rows, "questions": args.questions})


if __name__ == "__main__":
  main()
