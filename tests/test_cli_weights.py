"""The console script's commands that read and write weights: ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixelis_jax import cli
from pixelis_jax.model.load import WEIGHTS

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets" / "tiny-vl"


def refused(capsys, *argv) -> str:
  """The one line that a mistake prints; nothing else is printed, and the exit code is 2."""
  assert cli.main([str(a) for a in argv]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith(f"pixelis {argv[0]}: ")
  return err


# ranks


@pytest.fixture
def tuned(tmp_path) -> Path:
  """The embedded model with two directions added to one matrix: units 0 and 5, equally."""
  path = Path(shutil.copytree(ASSETS, tmp_path / "tuned"))
  tensors = load_file(path / WEIGHTS)
  weight = tensors["model.layers.2.mlp.down_proj.weight"].copy()
  weight[0, 0] += 1.0
  weight[5, 5] += 1.0
  tensors["model.layers.2.mlp.down_proj.weight"] = weight
  save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
  return path


def test_ranks_writes_the_plan_and_prints_its_table(tuned, tmp_path, capsys):
  out = tmp_path / "made" / "ranks.json"
  argv = ["ranks", "--base", str(ASSETS), "--tuned", str(tuned), "--out", str(out), "--min", "1"]
  assert cli.main(argv) == 0
  planned = json.loads(out.read_text())
  assert planned.keys() == {"ranks", "energy", "settings", "base", "tuned", "parameters", "share"}
  assert planned["ranks"]["text/layers/mlp/down/kernel"] == [0, 0, 2]
  np.testing.assert_allclose(planned["energy"]["text/layers/mlp/down/kernel"], 1)
  assert planned["settings"] == {"energy": 0.9, "min": 1, "max": 128, "smooth": 0.8}
  assert planned["parameters"] == 2 * (128 + 256)  # Width 128, MLP 256.
  assert (planned["base"], planned["tuned"]) == ("tiny-vl", "tuned")
  assert [file.name for file in out.parent.iterdir()] == ["ranks.json"]
  printed = capsys.readouterr().out
  assert "mlp/down" in printed and "20 of 21 matrices did not change" in printed
  assert printed.endswith(f"{out}\n")


@pytest.mark.parametrize(
  "options, said",
  [
    (("--energy", "90"), "energy 90.0 must be in (0, 1]"),
    (("--min", "200"), "min 200 and max 128 must satisfy"),
    (("--smooth", "2"), "smooth 2.0 must be in [0, 1]"),
    (("--tuned", "nowhere"), "there is no directory nowhere"),
    (("--out", ROOT), "is a directory: --out names a file"),
    (("--tuned", ASSETS), "base and tuned are both"),
  ],
)
def test_ranks_says_what_is_wrong(tuned, tmp_path, capsys, options, said):
  out = tmp_path / "ranks.json"
  argv = ("ranks", "--base", ASSETS, "--tuned", tuned, "--out", out, *options)
  assert said in refused(capsys, *argv)
  assert not out.exists()
