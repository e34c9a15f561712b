"""The console script's commands that read and write weights: ranks, convert."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixelis_jax import cli, weights
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


# convert


def test_convert_there_and_back(tmp_path, capsys):
  orbax, back = tmp_path / "orbax", tmp_path / "back"
  assert cli.main(["convert", str(ASSETS), str(orbax)]) == 0
  # BUILD.md's count of the embedded model.
  assert capsys.readouterr().out == f"{orbax}: Orbax, 841728 parameters, float32\n"
  assert cli.main(["convert", str(orbax), str(back)]) == 0
  assert capsys.readouterr().out == f"{back}: Hugging Face, 841728 parameters, float32\n"
  assert {f.name for f in back.iterdir()} == {f.name for f in ASSETS.iterdir()}
  for file in ASSETS.iterdir():
    if file.name != WEIGHTS:
      assert (back / file.name).read_bytes() == file.read_bytes(), file.name
  theirs, ours = load_file(ASSETS / WEIGHTS), load_file(back / WEIGHTS)
  assert theirs.keys() == ours.keys()
  assert all(ours[name].tobytes() == tensor.tobytes() for name, tensor in theirs.items())


def test_score_reads_either_form(tmp_path):
  messages = tmp_path / "m.json"
  messages.write_text(json.dumps([{"role": "user", "content": "red"}]))
  weights.convert(ASSETS, tmp_path / "orbax")
  scores = []
  for model in (ASSETS, tmp_path / "orbax"):
    argv = ["score", "--model", str(model), "--messages", str(messages)]
    assert cli.main([*argv, "--out", str(tmp_path / "out.json")]) == 0
    scores.append(json.loads((tmp_path / "out.json").read_text()))
  assert scores[0] == scores[1]


def test_convert_says_what_is_wrong(tmp_path, capsys):
  out = tmp_path / "out"
  assert "there is no directory" in refused(capsys, "convert", tmp_path / "no", out)
  assert "has neither of params/ (Orbax)" in refused(capsys, "convert", tmp_path, out)
  weights.convert(ASSETS, out)
  assert "out is there already: --force replaces it" in refused(capsys, "convert", ASSETS, out)
  assert cli.main(["convert", str(ASSETS), str(out), "--force"]) == 0
  capsys.readouterr()
  (file,) = (out / "params" / "0" / "state").glob("manifest.ocdbt")
  file.write_bytes(file.read_bytes()[:9])
  told = refused(capsys, "convert", out, tmp_path / "back")
  assert f"{file} is damaged: 9 bytes" in told and not (tmp_path / "back").exists()
