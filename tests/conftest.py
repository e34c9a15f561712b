"""Strictness for every test: eight CPU devices, no implicit promotion, no network."""

import importlib
import os
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before JAX starts its backend. Tests compile far more than they compute: without LLVM's costly
# passes and XLA's newer emitters that takes a third of the time; JAX 0.11 has no others. A program
# that is cut up for several threads takes an eighth more in all, and the cores are busy anyway. And
# in the order that XLA prefers, two independent all-reduces may begin in another order on each CPU
# device and wait for ever.
os.environ["XLA_FLAGS"] = " ".join(
  [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false" if Version(version("jaxlib")) < Version("0.11") else "",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    os.environ.get("XLA_FLAGS", ""),
  ]
)

import jax
import pytest

LARGE = "flax.nnx grain optax orbax.checkpoint scipy.ndimage sklearn.datasets tensorboardX torch"
LONG = ("cluster", "plan", "online", "rft", "meshes", "policy", "sampler", "sft", "learner", "aot")
CACHE = Path(__file__).parents[1] / ".cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)  # Sharding bugs show on a laptop.
jax.config.update("jax_numpy_dtype_promotion", "strict")  # float32 / int32 is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")  # (B, T) - (T,) is an error.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_configure(config: pytest.Config) -> None:
  """Imports the large packages before our own modules do, and not where other processes run tests.

  What a module under jaxtyping's hook imports first is compiled anew, as its caches have names of
  their own: 20 seconds a process.
  """
  if getattr(config.option, "dist", "no") == "no":
    for name in (*LARGE.split(), "transformers"):
      importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest files come first: processes that share the suite then end at about the same time.

  Tests marked gpu or tpu are skipped, with the reason, unless JAX's backend is that device.
  """
  rank = {f"test_{name}": i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))
  backend = jax.default_backend()
  for item in items:
    for device in ("gpu", "tpu"):
      if item.get_closest_marker(device) and backend != device:
        item.add_marker(pytest.mark.skip(reason=f"needs a {device}; JAX's backend is {backend}"))


@pytest.fixture(scope="session")
def model_config():
  """The embedded model with random weights: the same programs, no trained file needed."""
  from configs import common  # Not at the top: jaxtyping's import hook must come first.

  c = common.model(str(Path(__file__).parents[1] / "assets" / "tiny-vl"))
  c.random_seed, c.max_tokens = 0, 6
  c.rows_multiple = 8  # Tests with fewer rows share their programs.
  return c


@pytest.fixture(scope="session")
def policy(model_config):
  """Shared, so that its programs compile once: tests leave it as it is."""
  from pixelis_jax import sampler

  return sampler.load_policy(model_config)


@pytest.fixture
def toolbox():
  """zoom_in for a policy that sees everything at 80x80."""
  from pixelis_jax.tools import Toolbox

  return Toolbox(["zoom_in"], shown_size=lambda height, width: (80, 80))
