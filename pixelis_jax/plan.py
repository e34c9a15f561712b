"""Whether a run fits devices that are not here: its programs compiled for them, memory and traffic.

    pixelis plan --config=configs/rft.py:qwen2_5_vl_7b --topology=v5e-64

The compiler is the devices' own: what exceeds a TPU's memory is refused here as it would be there.
Needs the extra `aot` and config.json, no weights. Nothing is run: no time is measured, and what the
chips could do at most is arithmetic.
"""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from kernels.chips import GIB, Gpu, Tpu, slice_of
from pixelis_jax import traffic, workloads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One compiled program; sizes are bytes on one of its devices.

  `beside` is what else lies on the device while it runs. `flops` are of all devices together,
  `moved` bytes that a device receives, by kind of collective. An `error` is the compiler's.
  """

  name: str
  devices: int
  seconds: float
  beside: int
  arguments: int = 0
  temporary: int = 0
  peak: int = 0
  flops: int = 0
  moved: Mapping[str, int] = dataclasses.field(default_factory=dict)
  error: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The programs of a run on a slice, and what lies on each device: name -> bytes."""

  chip: Tpu | Gpu
  devices: int
  held: Mapping[str, int]
  programs: tuple[Program, ...]

  def problems(self) -> list[str]:
    """Why it does not fit; empty where it does."""
    found = []
    for p in self.programs:
      if p.error:
        found.append(f"{p.name} does not compile: {p.error}")
      elif p.peak + p.beside > self.chip.memory:
        need = (p.peak + p.beside) / GIB
        found.append(f"{p.name} needs {need:.2f} of {self.chip.memory / GIB:.0f} GiB on a device")
    return found


def make(c: Any, topology: str, episode: workloads.Episode) -> Plan:
  """Compiles what a program with this config runs on this slice, see `chips.slice_of`.

  Raises ValueError for an unknown slice, a mesh that does not fit it, an episode that would not be
  learned from, and FileNotFoundError without the model's config.json.
  """
  chip, devices = slice_of(topology)
  held, planned = workloads.runs(c, devices, episode)
  programs = tuple(_compile(chip, run) for run in planned)
  used = {device for run in planned for device in run.mesh.devices.flat}
  return Plan(chip=chip, devices=len(used), held=held, programs=programs)


def _compile(chip: Tpu | Gpu, run: workloads.Run) -> Program:
  began = time.monotonic()
  about = {"devices": run.mesh.size, "beside": run.beside, "flops": run.flops}
  try:
    with jax.set_mesh(run.mesh):  # Mosaic learns from it which chip it compiles for.
      traced = run.function.trace(*run.arguments, **run.options)
      compiled = traced.lower(lowering_platforms=(chip.platform,)).compile()
  except jax.errors.JaxRuntimeError as e:  # What the compiler refuses is the finding.
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+", str(e))
    reason = found[0] if found else str(e).split("\n")[0]
    return Program(name=run.name, seconds=time.monotonic() - began, error=reason, **about)
  memory = compiled.memory_analysis()
  return Program(
    name=run.name,
    seconds=time.monotonic() - began,
    arguments=memory.argument_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
    moved=traffic.moved(compiled.as_text(), unknown=run.options.get("max_tokens", 1)),
    **about,
  )


def record(plan: Plan) -> dict[str, Any]:
  """For json."""
  programs = [dataclasses.asdict(p) for p in plan.programs]
  about = {"chip": plan.chip.name, "devices": plan.devices, "memory": plan.chip.memory}
  return {**about, "held": dict(plan.held), "programs": programs, "problems": plan.problems()}


def advice(c: Any, plan: Plan) -> list[str]:
  """What to change where it does not fit, the most telling first."""
  over = {p.name: p for p in plan.programs if p.error or p.peak + p.beside > plan.chip.memory}
  if not over:
    return []
  said = []
  (learns, mesh), (plays, rollouts) = _meshes(c)
  how, optimizer = (c.learn, "learn") if "arrivals" in c else (c, "optimizer")
  accumulate = "learn.accumulate" if "arrivals" in c else "accumulate"
  answering = ("weights that do not", "weights that play")
  learning = sum(n for name, n in plan.held.items() if name not in answering)
  if learning > plan.chip.memory / 2:
    said.append(
      f"what learns takes {learning / GIB:.1f} GiB a device: raise {learns}.fsdp (more devices),"
      f" set {optimizer}.mu_dtype=bfloat16, or train adapters (model.lora.rank)"
    )
  playing = plan.held["weights that play"]
  if ("grpo" in c or "arrivals" in c) and playing > plan.chip.memory / 2:
    said.append(
      f"what plays takes {playing / GIB:.1f} GiB a device: raise {plays}.tensor (now"
      f" {rollouts.tensor}; devices of one process), or {plays}.fsdp (now"
      f" {rollouts.fsdp}), whose weights are gathered at each token"
    )
  if update := over.get("update") or over.get("score"):
    read = workloads.lot(c, update.devices // mesh.tensor)
    if read.parts < read.sequences:
      said.append(
        f"{update.name}: raise {accumulate} (now {how.accumulate},"
        f" {read.sequences // read.parts} episodes at a time)"
      )
    else:
      said.append(
        f"{update.name}: one episode at a time is too much: raise {learns}.tensor (now"
        f" {mesh.tensor})"
      )
  if "see" in over or "targets" in over:
    said.append(
      f"targets, see: lower learn.look.pairs (now {c.learn.look.pairs}) and learn.look.held (now"
      f" {c.learn.look.held})"
    )
  if "look" in over or "read" in over:
    asked = f"grpo.questions (now {c.grpo.questions})" if "grpo" in c else "model.max_rows"
    said.append(f"look, read: lower {asked}")
  if "write" in over:
    said.append(
      f"write: lower model.max_rows (now {c.model.max_rows}), or raise {plays}.tensor"
      f" (now {rollouts.tensor})"
    )
  return said


def _meshes(c: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
  """The mesh that learns and the one that plays, each with its field's name."""
  if "arrivals" in c:
    plays = "mesh", c.mesh
    return ("learn.mesh", c.learn.mesh) if c.learn.mesh.data else plays, plays
  return ("mesh", c.mesh), ("rollout_mesh", c.rollout_mesh)


def table(c: Any, plan: Plan) -> str:
  """What lies on a device, what each program takes, and whether it fits."""
  memory = plan.chip.memory
  lines = [f"{plan.devices} devices of {memory / GIB:.0f} GiB; on each, GiB:"]
  lines += [f"  {name:<22} {bytes_ / GIB:8.3f}" for name, bytes_ in plan.held.items()]
  lines.append(
    f"{'program':<8} {'compile':>8} {'arguments':>10} {'temporary':>10} {'peak':>8} {'beside':>8}"
    f" {'TFLOP':>9} {'at least':>9}  moved, GiB"
  )
  for p in plan.programs:
    if p.error:
      lines.append(f"{p.name:<8} {p.seconds:7.1f}s  {p.error}")
      continue
    seconds = p.flops / (p.devices * plan.chip.rate)
    traffic = ", ".join(f"{kind} {n / GIB:.2f}" for kind, n in sorted(p.moved.items())) or "nothing"
    lines.append(
      f"{p.name:<8} {p.seconds:7.1f}s {p.arguments / GIB:10.2f} {p.temporary / GIB:10.2f}"
      f" {p.peak / GIB:8.2f} {p.beside / GIB:8.2f} {p.flops / 1e12:9.1f} {seconds:8.3f}s  {traffic}"
    )
  problems = plan.problems()
  lines += [f"does not fit: {problem}" for problem in problems] or ["fits"]
  lines += [f"  {said}" for said in advice(c, plan)]
  return "\n".join(lines)
