"""What is installed, what it runs on, and what to do about what is wrong."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import jax
from packaging.requirements import Requirement
from transformers.utils.import_utils import is_kernels_available

from pixelis_jax.model.policy import attention_backend

PROJECT = "pixelis-jax"
# Shown where installed: what the extras bring, and what jax and transformers stand on.
OPTIONAL = ("jaxlib", "jax-cuda12-plugin", "libtpu", "torch")
_MEMINFO = Path("/proc/meminfo")  # Linux.
INSTALL = "pip install -e '.[cpu]' (or cuda12, tpu) in the repository"


def examine() -> tuple[dict[str, str], list[str]]:
  """(facts, problems): each problem ends with what to do. Never raises for what it finds."""
  facts, problems = {"python": f"{platform.python_version()} ({sys.executable})"}, []
  for part in (_packages, _devices, _attention, _compilation_cache, _kernels, _memory):
    found, wrong = part()
    facts |= found
    problems += wrong
  return facts, problems


def _packages() -> tuple[dict[str, str], list[str]]:
  try:
    declared = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or ()]
  except importlib.metadata.PackageNotFoundError:
    return {PROJECT: "not installed"}, [f"{PROJECT} is not installed: {INSTALL}"]
  # Extras are left out: their markers are false without an extra's name.
  needed = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
  facts, problems = {PROJECT: importlib.metadata.version(PROJECT)}, []
  for requirement in sorted(needed, key=lambda r: r.name.lower()):
    version = _version(requirement.name)
    facts[requirement.name] = version or "not installed"
    if version is None:
      problems.append(f"{requirement.name} is not installed: {INSTALL}")
    elif not requirement.specifier.contains(version, prereleases=True):
      problems.append(
        f"{requirement.name} is {version}, {requirement.specifier} is needed: {INSTALL}"
      )
  if "scann" not in {r.name for r in needed}:
    facts["scann"] = "not available on this platform: the exact index serves instead"
  facts |= {name: version for name in OPTIONAL if (version := _version(name))}
  return facts, problems


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _devices() -> tuple[dict[str, str], list[str]]:
  try:
    devices = jax.devices()
  except RuntimeError as error:  # A platform that was asked for and is not there.
    return {"devices": "none"}, [
      f"JAX finds no device: {' '.join(str(error).split())}; unset JAX_PLATFORMS, or {INSTALL}"
    ]
  kinds = {d.device_kind: sum(e.device_kind == d.device_kind for e in devices) for d in devices}
  named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
  facts, problems = {"devices": f"{named} ({devices[0].platform})"}, []
  for device in jax.local_devices():
    if stats := device.memory_stats():  # None on a CPU.
      used, limit = stats.get("bytes_in_use", 0), stats.get("bytes_limit", 0)
      facts[f"memory of device {device.id}"] = f"{_gib(limit)}, {_gib(used)} in use"
  if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
    problems.append(
      "there is an NVIDIA driver, and JAX runs on the CPU: pip install -e '.[cuda12]', "
      "and unset JAX_PLATFORMS if it is set"
    )
  return facts, problems


def _attention() -> tuple[dict[str, str], list[str]]:
  try:
    told = [f"{attention_backend(dtype)} for {dtype}" for dtype in ("bfloat16", "float32")]
  except RuntimeError:  # No device, as `_devices` says.
    return {}, []
  return {"attention backend": ", ".join(told)}, []


def _compilation_cache() -> tuple[dict[str, str], list[str]]:
  folder = jax.config.jax_compilation_cache_dir
  if not folder:
    unset = "none: every start compiles; JAX_COMPILATION_CACHE_DIR=DIR keeps programs"
    return {"compilation cache": unset}, []
  nearest = next((p for p in (Path(folder), *Path(folder).parents) if p.exists()), Path("."))
  if "://" not in folder and not os.access(nearest, os.W_OK):
    return {"compilation cache": folder}, [
      f"compilation cache {folder} cannot be written: set JAX_COMPILATION_CACHE_DIR to one that can"
    ]
  return {"compilation cache": folder}, []


def _kernels() -> tuple[dict[str, str], list[str]]:
  """Hugging Face has a package of the same name as our `kernels`; only one can be imported."""
  spec = importlib.util.find_spec("kernels")
  folders = list(spec.submodule_search_locations or ()) if spec else []
  ours = any((Path(folder) / "token_logps.py").is_file() for folder in folders)
  installed = _version("kernels")
  facts = {"kernels": f"{'ours' if ours else 'not ours'}, {', '.join(folders) or 'not found'}"}
  if installed is not None:
    facts["kernels"] += f"; Hugging Face's {installed} is installed"
  if not ours:
    return facts, [f"`import kernels` does not find ours: pip uninstall kernels, then {INSTALL}"]
  if is_kernels_available():
    return facts, ["transformers takes our kernels for Hugging Face's: pip uninstall kernels"]
  return facts, []


def _memory() -> tuple[dict[str, str], list[str]]:
  if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
    return {"memory": "unknown on this platform"}, []
  total = _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
  if not _MEMINFO.is_file():
    return {"memory": f"{total} in all"}, []
  lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
  available = int(lines["MemAvailable"].split()[0]) * 1024  # The file counts in KiB.
  return {"memory": f"{total} in all, {_gib(available)} available"}, []


def _gib(count: int) -> str:
  return f"{count / 2**30:.1f} GiB"
