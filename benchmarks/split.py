"""GRPO steps with rollouts and updates on the same devices, and each on their own: times, bytes.

    python benchmarks/split.py --steps 12 --out runs/split

The embedded model on virtual CPU devices, which share the cores. `colocated` plays on all devices,
then updates on all; `split` plays on half of them while the other half updates, each step with
weights from before the last update (`staleness`). Seconds are medians over the steps that compile
nothing, from the runs' own logs: `rollout` and `update` are those of the devices that do it,
`waited` what updates waited for rollouts. Of publishing, `copied` is what the devices that play
receive, `exchanged` what those that learn did before, to cut weights as these hold them.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import jax

MOST = 8
jax.config.update("jax_num_cpu_devices", MOST)  # Before JAX looks for devices.

from record import ROOT, record  # noqa: E402 - the file beside this one.

from configs import tiny_rft  # noqa: E402
from pixelis_jax import rft, sampler, traffic  # noqa: E402

PARTS = ("timing_s/step", "timing_s/gen", "timing_s/update_actor", "timing_s/wait")
# (mesh, rollout_mesh): sizes of data, fsdp, tensor.
LAYOUTS = (((1, 1, 1), (1, 1, 1)), ((1, 4, 1), (2, 1, 2)), ((1, 4, 1), (4, 1, 1)))


def config(steps: int) -> Any:
  """GRPO of the embedded model, whose rollouts fill few shapes."""
  c = tiny_rft.get_config().copy_and_resolve_references().unlock()
  c.model.path = str(ROOT / "assets/tiny-vl")
  c.grpo.questions, c.eval.n = 16, 2
  c.optimizer.steps = c.eval.every = c.save_every = steps
  c.grpo.temperature = 1.5  # The embedded model is right too often: groups would not differ.
  return c


def place(c: Any, mesh: tuple[int, int, int], rollouts: tuple[int, int, int]) -> None:
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = mesh
  c.rollout_mesh.data, c.rollout_mesh.fsdp, c.rollout_mesh.tensor = rollouts


def seconds(c: Any, workdir: Path, compiled: int) -> dict[str, float]:
  """A run's medians over its steps from `compiled` on."""
  shutil.rmtree(workdir, ignore_errors=True)
  rft.main(c, workdir)
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  steps = [line for line in lines if "timing_s/step" in line and line["step"] > compiled]
  return {name: statistics.median(line.get(name, 0.0) for line in steps[:-1]) for name in PARTS}


def sent(c: Any) -> tuple[int, int]:
  """(bytes that the devices that play receive, bytes that those that learn do before)."""
  mesh, playing = rft.meshes(c)
  key = jax.random.key(0)
  policy = sampler.load_policy(c.model, mesh=mesh, rollouts=playing, adapters=key)
  carrier = policy.sampler.carrier(mesh, policy.params)
  moved = traffic.moved(carrier.cut.lower(policy.params).compile().as_text())
  carried = jax.tree.leaves(carrier(policy.params))
  copies = [shard.data.nbytes for x in carried for shard in x.addressable_shards]
  return sum(copies), sum(moved.values()) * mesh.size


def timed(args: argparse.Namespace) -> dict[str, dict[str, float]]:
  """Two devices both ways, printed: layout -> medians."""
  c, found = config(args.steps), {}
  place(c, (2, 1, 1), (0, 1, 1))
  found["colocated"] = seconds(c, args.out / "colocated", args.compiled)
  place(c, (1, 1, 1), (1, 1, 1))
  c.staleness = 1
  found["split"] = seconds(c, args.out / "split", args.compiled)
  print("| layout | seconds a step | rollout | update | waited |\n|---|---|---|---|---|")
  for name, s in found.items():
    print(f"| {name} | " + " | ".join(f"{s[part]:.2f}" for part in PARTS) + " |")
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=12, help="0: only what publishing moves")
  parser.add_argument("--compiled", type=int, default=4, help="first steps, which compile")
  parser.add_argument("--out", type=Path, default=Path("runs/split"))
  args = parser.parse_args()
  found = timed(args) if args.steps else {}
  c, published = config(1), []
  c.staleness = 1
  print("| mesh | rollout_mesh | copied, MB | exchanged, MB |\n|---|---|---|---|")
  for mesh, rollouts in LAYOUTS:
    place(c, mesh, rollouts)
    copied, exchanged = sent(c)
    row = {"mesh": mesh, "rollout_mesh": rollouts, "copied": copied, "exchanged": exchanged}
    published.append(row)
    print(f"| {mesh} | {rollouts} | {copied / 1e6:.1f} | {exchanged / 1e6:.1f} |", flush=True)
  record(args.out, "split", {"steps": found, "published": published})


if __name__ == "__main__":
  main()
