"""serve/doctor.py: each kind of trouble is found and comes with what to do."""

from types import SimpleNamespace

import pytest

from pixelis_jax.serve import doctor


def problems() -> list[str]:
  return doctor.examine()[1]


@pytest.fixture
def healthy(monkeypatch):
  """What is wrong with this machine itself is none of these tests' business."""
  monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
  assert problems() == []


def test_old_and_missing_packages(healthy, monkeypatch):
  found = doctor._version
  versions = {"jax": "0.1", "flax": None}
  monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, found(name)))
  flax, jax = problems()
  assert flax.startswith("flax is not installed: pip install")
  assert jax.startswith("jax is 0.1, >=") and "is needed: pip install" in jax


def test_project_not_installed(healthy, monkeypatch):
  monkeypatch.setattr(doctor, "PROJECT", "pixelis-elsewhere")
  (problem,) = problems()
  assert problem.startswith("pixelis-elsewhere is not installed: pip install -e '.[cpu]'")


def test_the_attention_backend_is_told():
  assert doctor.examine()[0]["attention backend"] == "xla for bfloat16, xla for float32"


@pytest.mark.parametrize("capability, backend", [("9.0", "gpu"), ("8.0", "xla")])
def test_the_attention_backend_of_a_gpu(monkeypatch, capability, backend):
  """A Hopper GPU has a kernel for 16-bit numbers; an older one has not."""
  gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
  monkeypatch.setattr("jax.devices", lambda: [gpu])
  [told] = doctor._attention()[0].values()
  assert told == f"{backend} for bfloat16, xla for float32"


def test_no_device(healthy, monkeypatch):
  def no_devices():
    raise RuntimeError("Unknown backend:\n 'tpu' requested")

  monkeypatch.setattr(doctor.jax, "devices", no_devices)
  (problem,) = problems()
  assert "Unknown backend: 'tpu' requested; unset JAX_PLATFORMS" in problem


def test_a_gpu_that_jax_does_not_use(healthy, monkeypatch):
  monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
  cpu = SimpleNamespace(device_kind="cpu", platform="cpu", id=0, memory_stats=lambda: None)
  monkeypatch.setattr(doctor.jax, "devices", lambda: [cpu])
  (problem,) = problems()
  assert "JAX runs on the CPU: pip install -e '.[cuda12]'" in problem


def test_memory_of_accelerators(healthy, monkeypatch):
  stats = {"bytes_limit": 80 * 2**30, "bytes_in_use": 2**29}
  gpu = SimpleNamespace(
    device_kind="H100",
    platform="gpu",
    id=3,
    memory_stats=lambda: stats,
    compute_capability="9.0",
  )
  monkeypatch.setattr(doctor.jax, "devices", lambda: [gpu, gpu])
  monkeypatch.setattr(doctor.jax, "local_devices", lambda: [gpu])
  facts, wrong = doctor.examine()
  assert facts["devices"] == "2 x H100 (gpu)" and not wrong
  assert facts["memory of device 3"] == "80.0 GiB, 0.5 GiB in use"


def test_a_cache_that_cannot_be_written(healthy, monkeypatch, tmp_path):
  before = doctor.jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tmp_path)
  doctor.jax.config.update("jax_compilation_cache_dir", str(tmp_path / "a" / "b"))
  try:
    (problem,) = problems()  # Neither a nor b is there: tmp_path decides.
  finally:
    doctor.jax.config.update("jax_compilation_cache_dir", before)
  assert "cannot be written: set JAX_COMPILATION_CACHE_DIR" in problem


@pytest.mark.parametrize("hidden", [True, False])
def test_kernels_taken_for_another(healthy, monkeypatch, hidden):
  if hidden:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
  else:
    monkeypatch.setattr(doctor, "is_kernels_available", lambda: True)
  (problem,) = problems()
  said = "does not find ours" if hidden else "takes our kernels for Hugging Face's"
  assert said in problem and "pip uninstall kernels" in problem


def test_memory_where_there_is_no_meminfo(healthy, monkeypatch, tmp_path):
  monkeypatch.setattr(doctor, "_MEMINFO", tmp_path / "meminfo")
  assert doctor.examine()[0]["memory"].endswith("GiB in all")
