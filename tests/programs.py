"""Programs of ours in processes of their own."""

import sys

# Transformers imports torch where it is installed: 3 of 8 seconds, for nothing that we use.
WITHOUT_TORCH = 'import runpy, sys; sys.modules["torch"] = None\n'


def program(name: str, *, before: str = "") -> list[str]:
  """The command `python -m pixelis_jax.NAME`, to be followed by flags; `before` is run first."""
  run = f'runpy.run_module("pixelis_jax.{name}", run_name="__main__", alter_sys=True)'
  return [sys.executable, "-c", WITHOUT_TORCH + before + run]
