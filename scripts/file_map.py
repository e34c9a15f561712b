"""Writes BUILD.md's file map: every source file with the first line of its docstring.

python scripts/file_map.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("pixelis_jax", "configs", "kernels", "benchmarks", "scripts")
BEGIN, END = "<!-- file map: python scripts/file_map.py -->\n", "<!-- end of the file map -->\n"


def source_files() -> list[Path]:
  """Files of the mapped folders, relative; no caches, no `__init__.py` that holds no code."""
  files = (
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
  )
  return [p.relative_to(ROOT) for p in files if p.name != "__init__.py" or has_code(p)]


def has_code(path: Path) -> bool:
  """Whether a module holds more than its docstring."""
  body = ast.parse(path.read_text()).body
  return any(
    not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body
  )


def phrase(path: Path) -> str:
  """The docstring's first line; for other files the first line that says something."""
  text = path.read_text()
  if path.suffix == ".py":
    text = ast.get_docstring(ast.parse(text)) or ""
  lines = (line.strip("#{}<>!-*/ ") for line in text.splitlines() if not line.startswith("#!"))
  return next((line for line in lines if line), "")


def file_map() -> str:
  """The block between the markers, fenced."""
  paths = source_files()
  width = max(len(path.as_posix()) for path in paths)
  rows = [f"{path.as_posix():<{width}}  {phrase(ROOT / path)}".rstrip() for path in paths]
  return "\n".join(["```", *rows, "```", ""])


def main() -> None:
  build = ROOT / "BUILD.md"
  before, rest = build.read_text().split(BEGIN)
  _, after = rest.split(END)
  build.write_text(before + BEGIN + file_map() + END + after)


if __name__ == "__main__":
  main()
