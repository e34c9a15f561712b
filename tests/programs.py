"""Programs of ours in processes of their own."""

import sys

# Transformers imports torch where it is installed: 3 of 8 seconds, for nothing that we use. Others
# only look whether it is there, which None would not tell them.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
import tensorboardX
from transformers import AutoTokenizer
del sys.modules["torch"]
"""


def program(name: str, *, before: str = "") -> list[str]:
  """The command `python -m pixelis_jax.NAME`, to be followed by flags; `before` is run first."""
  run = f'runpy.run_module("pixelis_jax.{name}", run_name="__main__", alter_sys=True)'
  return [sys.executable, "-c", WITHOUT_TORCH + before + run]
