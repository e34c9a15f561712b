import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load_benchmark(monkeypatch):
  """name -> the module: a script, which imports the files beside it."""
  monkeypatch.syspath_prepend(FOLDER)

  def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # Dataclasses look there.
    spec.loader.exec_module(module)
    return module

  return load
