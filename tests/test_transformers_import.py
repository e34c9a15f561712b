"""Our `kernels` shadows Hugging Face's package of that name; transformers must not take it so.

transformers reads the version of whatever `kernels` it finds and imports names from it when the
version is in its range (`is_kernels_available`). Ours must stay outside: no `__version__`, and the
project's version, which is what an installed `kernels` reports, must not fall in that range.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess:
  """From the repository root, as a user would: `-c` puts the root first on the path."""
  return subprocess.run(
    [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
  )


def test_transformers_imports_from_the_root_without_torch():
  done = run(
    "import sys; sys.modules['torch'] = None\n"
    "from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl\n"
    "from transformers.utils.import_utils import is_kernels_available\n"
    "import kernels\n"
    f"assert kernels.__file__.startswith({str(ROOT)!r}), kernels.__file__\n"
    "assert not is_kernels_available()\n"
  )
  assert done.returncode == 0, done.stderr


def test_everything_imports_in_one_process_without_a_warning():
  done = run(
    "import jax, torch, flax.nnx, grain, orbax.checkpoint, tensorboardX, tensorflow_datasets\n"
    "import importlib.util\n"
    "if importlib.util.find_spec('scann'): import scann\n"  # x86-64 Linux only.
    "from transformers import Qwen2_5_VLForConditionalGeneration\n"
    "import transformers.integrations.hub_kernels\n"
    "assert float(jax.numpy.ones(2).sum()) == float(torch.ones(2).sum()) == 2\n"
  )
  assert done.returncode == 0, done.stderr


def test_kernels_init_is_only_a_docstring():
  body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
  assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
