"""Manifests and datasets of a few digit scenes."""

import json
from pathlib import Path

from pixelis_jax.data import build, manifest
from pixelis_jax.data.built import Dataset

MODEL = str(Path(__file__).parents[2] / "assets" / "tiny-vl")


def fields(**changes) -> dict:
  """Of a manifest."""
  return {
    "name": "few",
    "seed": 0,
    "split": "train",
    "n": 6,
    "kinds": {"framed": 0.5, "parity": 0.5},
    "sorts": {"golden": 0.5, "corrected": 0.5},
    "hard_negative_weight": 1.5,
    "pictures": None,
    "model": MODEL,
    "tool_options": {},
  } | changes


def write(folder: Path, name: str = "few.json", **changes) -> Path:
  """A manifest's file."""
  path = folder / name
  path.write_text(json.dumps(fields(**changes)))
  return path


def built(folder: Path, **changes) -> Dataset:
  """A dataset in `folder`/few, made by this process."""
  out = folder / "few"
  made(manifest.read(write(folder, **changes)), out)
  return Dataset.open(out)


def made(m: manifest.Manifest, out: Path) -> None:
  build.build(m, out, workers=None, command="built by a test")
