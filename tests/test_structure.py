"""The shape of the repository: imports point down, the map is the tree, every file has its test."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import file_map

ROOT = Path(__file__).parents[1]

# Level of each module of pixelis_jax. Imports point down, or sideways where SIBLINGS says so.
LEVELS = {
  1: ("types", "cluster", "sharding", "metrics", "program", "traffic"),
  2: ("model", "chat", "tools", "algo", "memory", "checkpoint", "packing"),
  3: ("batch", "exchange", "handover", "history", "weights", "timing"),
  4: ("sampler", "agent", "learner", "data"),
  5: ("answering", "evaluate", "lessons", "looks", "rollouts", "runs", "surprise"),
  6: ("ttrl",),
  7: ("sft", "rft", "online"),
  8: ("plan", "workloads", "cli", "serve"),
}
SIBLINGS = {1, 8}  # metrics may take types; cli starts plan and serve, plan takes workloads.
LEVEL = {part: level for level, parts in LEVELS.items() for part in parts}
MAY_IMPORT_KERNELS = {"model", "algo", "plan", "cli"}  # The last two read of chips.
OUTSIDE = {  # Third-party packages each folder outside the levels may import.
  "kernels": {"jax", "jaxtyping", "numpy", "kernels"},
  "configs": {"ml_collections", "configs"},
}
# Files over 400 lines are named in a review; over 600 they are split.
MAX_LINES = 600


def modules(*folders: str) -> list[str]:
  return [p.relative_to(ROOT).as_posix() for f in folders for p in sorted((ROOT / f).rglob("*.py"))]


def imports(path: str) -> set[str]:
  """Dotted names a file imports anywhere, local imports and TYPE_CHECKING included.

  `from pixelis_jax import types` counts as `pixelis_jax.types`.
  """
  found = set()
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def part(path: str) -> str:
  """`pixelis_jax/model/vision.py` -> `model`; `pixelis_jax/agent.py` -> `agent`."""
  return Path(path).parts[1].removesuffix(".py")


def wrong_imports(path: str, names: set[str]) -> list[str]:
  """What this module of pixelis_jax imports against the levels."""
  mine, wrong = part(path), []
  for name in sorted(names):
    root, *rest = name.split(".")
    if root in ("configs", "tests", "benchmarks", "scripts", "torch"):
      wrong.append(f"{path} imports {name}: nothing in pixelis_jax may")
    elif root == "kernels" and mine not in MAY_IMPORT_KERNELS:
      wrong.append(f"{path} imports {name}: only {sorted(MAY_IMPORT_KERNELS)} may")
    elif root == "pixelis_jax" and rest and rest[0] != mine:
      theirs = rest[0]
      assert theirs in LEVEL, f"{theirs} (imported by {path}) has no level in LEVELS"
      same = LEVEL[mine] == LEVEL[theirs] and LEVEL[mine] in SIBLINGS
      if not (LEVEL[theirs] < LEVEL[mine] or same):
        wrong.append(f"{path} (level {LEVEL[mine]}) imports {name} (level {LEVEL[theirs]})")
  return wrong


@pytest.mark.parametrize(
  "path", [p for p in modules("pixelis_jax") if p != "pixelis_jax/__init__.py"]
)
def test_imports_point_down(path):
  assert part(path) in LEVEL, f"{path} has no level: add {part(path)!r} to LEVELS and to BUILD.md"
  assert not wrong_imports(path, imports(path))


@pytest.mark.parametrize(
  "path, name, wrong",
  [
    ("pixelis_jax/agent.py", "pixelis_jax.types.Task", False),
    ("pixelis_jax/agent.py", "pixelis_jax.sampler", True),  # siblings
    ("pixelis_jax/model/load.py", "pixelis_jax.model.vision", False),
    ("pixelis_jax/model/load.py", "pixelis_jax.chat.images", True),  # siblings
    ("pixelis_jax/batch.py", "pixelis_jax.learner.TrainState", True),  # up
    ("pixelis_jax/algo/losses.py", "kernels.token_logps", False),
    ("pixelis_jax/sampler.py", "kernels.attention", True),
    ("pixelis_jax/cli.py", "pixelis_jax.serve.report", False),
    ("pixelis_jax/model/load.py", "torch", True),
    ("pixelis_jax/rft.py", "configs.demo", True),
  ],
)
def test_the_import_rule_sees_what_it_should(path, name, wrong):
  assert bool(wrong_imports(path, {name})) == wrong


@pytest.mark.parametrize("folder", OUTSIDE)
def test_kernels_and_configs_stand_alone(folder):
  allowed = OUTSIDE[folder] | sys.stdlib_module_names
  for path in modules(folder):
    extra = {name.split(".")[0] for name in imports(path)} - allowed
    assert not extra, (
      f"{path} imports {sorted(extra)}; {folder}/ may import {sorted(OUTSIDE[folder])}"
    )


@pytest.mark.parametrize("path", modules("pixelis_jax", "kernels", "configs"))
def test_no_exception_is_swallowed(path):
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.ExceptHandler):
      caught = (
        {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"all"}
      )
      broad = caught & {"all", "Exception", "BaseException"}
      assert not broad, f"{path}:{node.lineno} catches {broad}: name what the code can handle"


def test_build_map_is_the_tree():
  text = (ROOT / "BUILD.md").read_text()
  written = text.split(file_map.BEGIN)[1].split(file_map.END)[0]
  assert written == file_map.file_map(), "BUILD.md is behind: run python scripts/file_map.py"


@pytest.mark.parametrize("path", [str(p) for p in file_map.source_files()])
def test_every_file_says_what_it_is(path):
  assert file_map.phrase(ROOT / path), f"{path} has no docstring for BUILD.md's map"


def where_tested(path: str) -> Path:
  """Where a source file is tested; a package's own code under the package's name."""
  file = Path(path)
  folders = file.parts[1:-1] if file.parts[0] == "pixelis_jax" else file.parts[:-1]
  stem = folders[-1] if file.stem == "__init__" else file.stem
  return Path("tests", *folders, f"test_{stem}.py")


@pytest.mark.parametrize(
  "path", [str(p) for p in file_map.source_files() if p.parts[0] in ("pixelis_jax", "kernels")]
)
def test_every_source_file_has_its_test(path):
  assert (ROOT / where_tested(path)).exists(), f"{path} is not tested: write {where_tested(path)}"


@pytest.mark.parametrize("path", modules(*file_map.FOLDERS, "tests"))
def test_files_are_short(path):
  lines = len((ROOT / path).read_text().splitlines())
  assert lines <= MAX_LINES, f"{path} has {lines} lines; split it (limit {MAX_LINES})"


def test_requirements_pin_what_pyproject_asks():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  asked = {r.name: r for r in map(Requirement, project["dependencies"])}
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  pinned = {r.name: r for r in (Requirement(line) for line in lines if line and line[0] != "#")}
  assert pinned.keys() == asked.keys()
  assert pinned["jax"].extras == {"cuda12"}
  for name, pin in pinned.items():
    (exact,) = pin.specifier
    assert exact.operator == "==", f"{pin} is not pinned"
    assert asked[name].specifier.contains(exact.version), f"{pin} is outside {asked[name]}"
    assert str(pin.marker) == str(asked[name].marker), f"{pin} and {asked[name]} differ in markers"
