"""A model's directory in both forms: there and back bit for bit, damage, interruptions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixelis_jax import sampler, weights
from pixelis_jax.model import load as hugging_face
from pixelis_jax.model.load import INDEX, WEIGHTS
from pixelis_jax.sharding import make_mesh
from tests.model import oracle

ROOT = Path(__file__).parents[1]


def hf(path: Path, family: str = "qwen2_5_vl", **options) -> Path:
  """A tiny random checkpoint with files and folders of its own."""
  oracle.hf_model(tied=True, family=family).save_pretrained(path, **options)
  (path / "tokenizer.json").write_text("{}")
  (path / "chat_template.jinja").write_text("{{ messages }}")
  (path / "additional_chat_templates").mkdir()
  (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
  return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
  return hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def orbax(source) -> Path:
  path = source.parent / "orbax"
  weights.convert(source, path)
  return path


@pytest.fixture
def broken(orbax, tmp_path) -> Path:
  """A copy that a test may damage."""
  return Path(shutil.copytree(orbax, tmp_path / "broken"))


def same_tree(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def others(path: Path) -> dict[str, bytes]:
  """Relative name -> content of all but weights."""
  files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
  return {
    name: file.read_bytes()
    for name, file in files.items()
    if ".safetensors" not in name and not name.startswith("params/")
  }


def tensors(path: Path) -> dict[str, tuple]:
  """Name -> dtype, shape and bytes, over all files."""
  found = {}
  for file in path.glob("*.safetensors"):
    found |= {k: (v.dtype, v.shape, v.tobytes()) for k, v in load_file(file).items()}
  return found


# The bits of bfloat16 that arithmetic would change: a quiet and a signalling NaN with payloads,
# minus zero, the smallest subnormal, minus infinity.
ODD = np.array([0x7FC1, 0xFF81, 0x8000, 0x0001, 0xFF80], np.uint16)


FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
  """A folder for each family, of a checkpoint `hf`, converted to `orbax` and that `back`.

  bfloat16 with float32 norms, some values `ODD`; by one process without this suite's XLA flags:
  older emitters quieten a signalling NaN. Layer by layer, as large weights are.
  """
  path = tmp_path_factory.mktemp("converted")
  for family in FAMILIES:
    source = hf(path / family / "hf", family)
    low = {
      k: w if "norm" in k else w.astype(jnp.bfloat16)
      for k, w in load_file(source / WEIGHTS).items()
    }
    low[odd_name(low)].view(np.uint16).reshape(-1)[: len(ODD)] = ODD
    save_file(low, source / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=4))
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  pairs = [
    str(path / family / name) for family in FAMILIES for name in ("hf", "orbax", "orbax", "back")
  ]
  script = "import sys; from pixelis_jax import cli; at = iter(sys.argv[1:])\n"
  script += "from pixelis_jax.model import load; load.STACK_BYTES = 0\n"
  script += "sys.exit(any(cli.main(['convert', *pair]) for pair in zip(at, at)))"
  command = [sys.executable, "-c", script, *pairs]
  subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=240)
  return path


def odd_name(names) -> str:
  (name,) = (k for k in names if "layers.1.mlp.up_proj" in k)
  return name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(converted, family):
  """The odd values survive, and so does each other file."""
  path = converted / family
  source = path / "hf"
  assert weights.is_orbax(path / "orbax") and not weights.is_orbax(source)
  assert not list((path / "orbax").rglob("*.safetensors"))
  assert others(path / "orbax") == others(source)
  assert others(path / "back") == others(source)
  assert tensors(path / "back") == tensors(source)
  assert tensors(source)[odd_name(tensors(source))][2][: 2 * len(ODD)] == ODD.tobytes()
  assert {p.name for p in path.iterdir()} == {"hf", "orbax", "back"}  # No .partial is left.


def test_shards_are_read(tmp_path, orbax):
  source = hf(tmp_path / "sharded", max_shard_size="60KB")
  assert (source / INDEX).exists()
  weights.convert(source, tmp_path / "orbax")
  weights.convert(tmp_path / "orbax", tmp_path / "back")
  assert tensors(tmp_path / "back") == tensors(source)
  assert not (tmp_path / "back" / INDEX).exists()


def test_orbax_to_hugging_face_to_orbax(orbax, tmp_path):
  weights.convert(orbax, tmp_path / "hf")
  weights.convert(tmp_path / "hf", tmp_path / "again")
  same_tree(weights.load(tmp_path / "again", dtype=None)[1], weights.load(orbax, dtype=None)[1])
  assert others(tmp_path / "again") == others(orbax)


def test_either_form_is_loaded(source, orbax):
  """The same model, the same weights, in the dtype and on the mesh that were asked for."""
  model, params = hugging_face.load(source)
  for path in (source, orbax):
    got_model, got = weights.load(path)
    assert got_model == model
    same_tree(got, params)
    low = weights.load(path, dtype=jnp.bfloat16)[1]
    same_tree(low, jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), params))
  mesh = make_mesh(data=1, fsdp=2)
  model, split = weights.load(orbax, mesh=mesh)
  assert jax.tree.map(lambda w: w.sharding, split) == model.shardings()
  same_tree(split, params)


def test_programs_read_the_orbax_form(model_config, tmp_path):
  """As model.path: the same policy, tokenizer and processor included."""
  c = model_config.copy_and_resolve_references().unlock()
  c.random_seed = -1
  expected = sampler.load_policy(c)
  weights.convert(c.path, tmp_path / "orbax")
  c.path = str(tmp_path / "orbax")
  policy = sampler.load_policy(c)
  same_tree(policy.params, expected.params)
  tokens = np.arange(50, 60, dtype=np.int32)
  assert policy.chat.decode(tokens) == expected.chat.decode(tokens)


# what is refused


def test_nothing_is_overwritten_without_force(source, orbax, tmp_path):
  out = Path(shutil.copytree(source, tmp_path / "out"))
  (out / "stale.txt").write_text("of the old model")
  with pytest.raises(ValueError, match="out is there already: --force replaces it"):
    weights.convert(source, out)
  assert (out / "stale.txt").exists() and not (out / "params").exists()
  weights.convert(source, out, force=True)
  assert weights.is_orbax(out)  # Nothing of the old form is left to be read in its place.
  assert others(out) == others(source)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_models_only(source, tmp_path):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "letters.txt").write_text("dear")
  with pytest.raises(ValueError, match="home is no model's directory"):
    weights.convert(source, tmp_path / "home", force=True)
  with pytest.raises(ValueError, match="letters.txt is there already, and is not a directory"):
    weights.convert(source, tmp_path / "home" / "letters.txt", force=True)
  (tmp_path / "empty").mkdir()
  weights.convert(source, tmp_path / "empty")
  assert weights.is_orbax(tmp_path / "empty")


@pytest.mark.parametrize("out", ["hf", "hf/inside", "."])
def test_out_is_another_directory(source, tmp_path, out):
  shutil.copytree(source, tmp_path / "hf")
  with pytest.raises(ValueError, match="neither inside the other"):
    weights.convert(tmp_path / "hf", tmp_path / out, force=True)
  assert others(tmp_path / "hf") == others(source)


def test_what_is_no_model_is_refused(source, orbax, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty has neither of params/"):
    weights.convert(tmp_path / "empty", tmp_path / "out")
  both = Path(shutil.copytree(orbax, tmp_path / "both"))
  shutil.copy(source / WEIGHTS, both)
  for read in (weights.load, lambda path: weights.convert(path, tmp_path / "out")):
    with pytest.raises(ValueError, match="both has both of params/"):
      read(both)
  assert not (tmp_path / "out").exists()


def truncate(file: Path) -> None:
  file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
  """One bit in the middle: Orbax alone would give other weights without a word."""
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_every_damaged_file_of_the_orbax_form_is_named(broken, tmp_path, damage):
  names = json.loads((broken / "params" / "files.json").read_text())["files"]
  params = broken / "params"
  found = {p.relative_to(params).as_posix() for p in params.rglob("*") if p.is_file()}
  assert found == {*names, "files.json"}
  for name in names:
    whole = (broken / "params" / name).read_bytes()
    damage(broken / "params" / name)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
      weights.convert(broken, tmp_path / "out")
    (broken / "params" / name).write_bytes(whole)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "name, kind, said",
  [
    ("params/0/layout/metadata", FileNotFoundError, "layout/metadata is missing"),
    ("params/files.json", FileNotFoundError, "files.json is missing"),
    ("config.json", FileNotFoundError, "config.json is missing"),
  ],
)
def test_missing_files_are_named(broken, tmp_path, name, kind, said):
  (broken / name).unlink()
  with pytest.raises(kind, match=said):
    weights.convert(broken, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_list_of_files_that_is_damaged_is_named(broken):
  for content in ("{", "{}", "[]"):
    (broken / "params" / "files.json").write_text(content)
    with pytest.raises(ValueError, match="files.json is damaged"):
      weights.load(broken)


def test_a_config_of_another_model_is_refused(broken):
  config = json.loads((broken / "config.json").read_text())
  config["text_config"]["intermediate_size"] = 96
  (broken / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="does not fit: .*'up'.* is wanted"):
    weights.load(broken)


def test_a_damaged_hugging_face_directory_is_named(source, tmp_path):
  cut = Path(shutil.copytree(source, tmp_path / "cut"))
  (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-1])
  with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated"):
    weights.convert(cut, tmp_path / "out")
  tensors = load_file(source / WEIGHTS)
  low = {k: w.astype(jnp.bfloat16) if "layers.1.mlp.up" in k else w for k, w in tensors.items()}
  save_file(low, cut / WEIGHTS, metadata={"format": "pt"})
  with pytest.raises(ValueError, match=r"up_proj.weight is \['BF16', 'F32'\]"):
    weights.convert(cut, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["cut"]


# interruptions


@pytest.mark.parametrize("form", ["source", "orbax"])
def test_a_failure_leaves_nothing(form, request, tmp_path, monkeypatch):
  """As a full disk would, after the weights are written; what was there stays."""
  source, out = request.getfixturevalue(form), tmp_path / "out"

  def full(*args, **kwargs):
    raise OSError("no space left")

  monkeypatch.setattr(shutil, "copytree", full)
  with pytest.raises(OSError, match="no space left"):
    weights.convert(source, out)
  assert not list(tmp_path.iterdir())
  out.mkdir()
  (out / "config.json").write_text("old")
  with pytest.raises(OSError, match="no space left"):
    weights.convert(source, out, force=True)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  assert (out / "config.json").read_text() == "old"


def test_a_killed_run_leaves_no_directory_and_is_done_again(source, tmp_path):
  """Killed with the weights written, before the rest: no OUT, and the next run makes it."""
  code = (
    "import os, sys\n"
    "from pixelis_jax import weights\n"
    "weights.hugging_face.copy_files = lambda *_: os._exit(9)\n"
    "weights.convert(*sys.argv[1:])"
  )
  out = tmp_path / "out"
  done = subprocess.run([sys.executable, "-c", code, str(source), str(out)], cwd=ROOT)
  assert done.returncode == 9
  assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
  with pytest.raises(FileNotFoundError, match="config.json is missing"):
    weights.load(tmp_path / "out.partial")  # Even by that name it is no model.
  weights.convert(source, out)
  assert [p.name for p in tmp_path.iterdir()] == ["out"] and others(out) == others(source)
