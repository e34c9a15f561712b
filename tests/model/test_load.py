"""Checkpoint directories: from transformers, back to transformers, and damaged ones."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from pixelis_jax.model.load import INDEX, WEIGHTS, load, save
from pixelis_jax.sharding import make_mesh
from tests.model import oracle

KINDS = [("qwen2_5_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", False), ("qwen3", True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def checkpoint(request, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("checkpoint")
  family, tied = request.param
  oracle.hf_model(tied=tied, family=family).save_pretrained(path)
  (path / "tokenizer.json").write_text("{}")
  return path


@pytest.fixture
def tied(tmp_path, tmp_path_factory) -> Path:
  """A copy that a test may damage."""
  oracle.hf_model(tied=True).save_pretrained(tmp_path / "tied")
  return tmp_path / "tied"


@pytest.fixture(params=[2**26, 0], ids=["whole", "by layer"])
def stacks(request, monkeypatch) -> None:
  """Small stacks of layers go through the host whole, large ones layer by layer: then all do."""
  monkeypatch.setattr("pixelis_jax.model.load.STACK_BYTES", request.param)


def same(a: dict, b: dict) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(assert_array_equal, a, b)


def rewrite(path: Path, change) -> None:
  tensors = change(load_file(path / WEIGHTS))
  save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def test_transformers_loads_what_we_save_and_agrees(checkpoint, tmp_path):
  model, params = load(checkpoint)
  # Changed weights, so that a stale copy of the source cannot pass.
  params = jax.tree.map(lambda w: np.asarray(w) * np.float32(1.25), params)
  save(tmp_path / "out", model, params, source=checkpoint)
  theirs = oracle.MODELS[model.config.family].from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  theirs = theirs.eval()
  batch = oracle.two_rows(model.config)
  with torch.no_grad():
    expected = theirs(**oracle.hf_inputs(theirs, batch)).logits.numpy()
  got = oracle.logits(model, params, batch)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got / scale, expected[batch.valid] / scale, atol=1e-5)
  assert (tmp_path / "out" / "tokenizer.json").exists()
  same(load(tmp_path / "out")[1], params)


def test_saving_writes_the_tensors_transformers_writes(checkpoint, tmp_path):
  model, params = load(checkpoint)
  save(tmp_path / "out", model, params, source=checkpoint)
  theirs, ours = load_file(checkpoint / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
  assert theirs.keys() == ours.keys()
  for name, tensor in theirs.items():
    assert_array_equal(ours[name], tensor, err_msg=name)


def test_module_spelling_of_names_is_read(tied):
  """`model.language_model.*` and `model.visual.*`: the paths of the modules in memory."""

  def respell(name: str) -> str:
    if name.startswith("visual."):
      return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)

  expected = load(tied)[1]
  rewrite(tied, lambda tensors: {respell(k): v for k, v in tensors.items()})
  assert any(k.startswith("model.language_model.") for k in load_file(tied / WEIGHTS))
  same(load(tied)[1], expected)


def test_sharded_checkpoint(tied, tmp_path):
  oracle.hf_model(tied=True).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
  assert (tmp_path / "sharded" / INDEX).exists()
  assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
  model, params = load(tmp_path / "sharded")
  same(params, load(tied)[1])
  # Saved again it is one file: the old index would point to shards that are not there.
  save(tmp_path / "out", model, params, source=tmp_path / "sharded")
  assert not (tmp_path / "out" / INDEX).exists()
  same(load(tmp_path / "out")[1], params)


def test_saving_in_shards(tied, tmp_path):
  """No file beyond the limit but one that holds a single tensor; transformers reads the index."""
  model, params = load(tied)
  out, limit = tmp_path / "out", 60_000
  save(out, model, params, source=tied, shard_bytes=limit)
  files = sorted(out.glob("*.safetensors"))
  assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
  index, total = json.loads((out / INDEX).read_text()), 0
  for file in files:
    tensors = load_file(file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    total += size
    assert size <= limit or len(tensors) == 1
    assert {k for k, name in index["weight_map"].items() if name == file.name} == tensors.keys()
  assert index["metadata"]["total_size"] == total
  same(load(out)[1], params)
  theirs = oracle.MODELS["qwen2_5_vl"].from_pretrained(out)
  expected = dict(oracle.hf_model(tied=True).named_parameters())
  for name, parameter in theirs.named_parameters():
    assert torch.equal(parameter, expected[name]), name
  # Saved whole over the shards: nothing of them is left.
  save(out, model, params, source=tied)
  assert [file.name for file in out.glob("*.safetensors*")] == [WEIGHTS]


def test_a_mesh_gets_each_weight_in_its_sharding(tied, stacks):
  """Read straight into place: the same weights, split as their logical axes say."""
  mesh = make_mesh(data=1, fsdp=2)
  model, params = load(tied, mesh=mesh)
  same(params, load(tied)[1])
  assert jax.tree.map(lambda w: w.sharding, params) == model.shardings()
  kernel = params["text"]["layers"]["mlp"]["up"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32, 80)}


def test_tied_checkpoint_may_carry_its_head(tied):
  expected = load(tied)[1]
  rewrite(tied, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].copy()})
  same(load(tied)[1], expected)


def test_bfloat16_in_and_out(tied, tmp_path):
  oracle.hf_model(tied=True).bfloat16().save_pretrained(tmp_path / "low")
  model, params = load(tmp_path / "low", dtype=jnp.bfloat16)
  assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  exact = load(tied)[1]
  same(params, jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), exact))
  save(tmp_path / "out", model, params, source=tied)  # The source's config says float32.
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
  same(load(tmp_path / "out", dtype=jnp.bfloat16)[1], params)


def test_each_weight_may_keep_its_own_dtype(checkpoint, tmp_path, stacks):
  """Norms in float32 among bfloat16, as some checkpoints are: read, and written, bit for bit."""

  def mixed(tensors):
    return {k: w if "norm" in k else w.astype(jnp.bfloat16) for k, w in tensors.items()}

  source = Path(shutil.copytree(checkpoint, tmp_path / "mixed"))
  rewrite(source, mixed)
  model, params = load(source, dtype=None)
  assert params["text"]["norm"]["scale"].dtype == jnp.float32
  assert params["text"]["layers"]["norm1"]["scale"].dtype == jnp.float32
  assert params["text"]["embedding"].dtype == jnp.bfloat16
  save(tmp_path / "out", model, params, source=source)
  theirs, ours = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
  assert theirs.keys() == ours.keys()
  for name, tensor in theirs.items():
    assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name


def test_dtypes_that_cannot_be_kept_are_listed(tied):
  def change(tensors):
    mixed, wide = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    low = {mixed: tensors[mixed].astype(jnp.bfloat16), wide: tensors[wide].astype(np.float64)}
    return tensors | low

  rewrite(tied, change)
  with pytest.raises(ValueError, match="the layers of a weight must share one dtype") as error:
    load(tied, dtype=None)
  assert "model.layers.{}.mlp.up_proj.weight is ['BF16', 'F32']" in str(error.value)
  assert "model.norm.weight is ['F64']" in str(error.value)
  load(tied)  # In float32 all of them can be read.


def test_all_wrong_tensors_are_listed_at_once(tied):
  def damage(tensors):
    del tensors["visual.merger.mlp.0.bias"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["visual.extra"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(65, np.float32)
    return tensors

  rewrite(tied, damage)
  with pytest.raises(ValueError) as error:
    load(tied)
  text = str(error.value)
  assert "missing ['model.layers.1.mlp.up_proj.weight', 'visual.merger.mlp.0.bias']" in text
  assert "unexpected ['visual.extra']" in text
  assert "model.norm.weight is [65], must be [64]" in text


def test_a_transposed_kernel_of_another_shape_is_refused(tied):
  name = "model.layers.0.mlp.up_proj.weight"
  rewrite(tied, lambda t: {**t, name: np.ascontiguousarray(t[name].T)})
  with pytest.raises(ValueError, match=r"up_proj.weight is \[64, 80\], must be \[80, 64\]"):
    load(tied)


def test_one_tensor_under_two_names_is_refused(tied):
  rewrite(tied, lambda t: {**t, "model.language_model.norm.weight": t["model.norm.weight"].copy()})
  with pytest.raises(ValueError, match="holds model.norm.weight twice"):
    load(tied)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_file_is_named(tied, keep):
  whole = (tied / WEIGHTS).read_bytes()
  (tied / WEIGHTS).write_bytes(whole[:keep])
  with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated"):
    load(tied)


def test_missing_files_are_named(tied, tmp_path):
  with pytest.raises(FileNotFoundError, match="config.json is missing"):
    load(tmp_path / "nowhere")
  (tied / WEIGHTS).unlink()
  with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is missing"):
    load(tied)


def test_a_missing_shard_and_a_stale_index_are_named(tmp_path):
  path = tmp_path / "sharded"
  oracle.hf_model(tied=True).save_pretrained(path, max_shard_size="60KB")
  stale = tmp_path / "stale"
  shutil.copytree(path, stale)
  gone = sorted(path.glob("*.safetensors"))[1]
  gone.unlink()
  with pytest.raises(FileNotFoundError, match=f"{gone.name} is missing"):
    load(path)
  raw = json.loads((stale / INDEX).read_text())
  raw["weight_map"]["visual.ghost"] = gone.name
  (stale / INDEX).write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=r"do not hold: \['visual.ghost'\]"):
    load(stale)


def test_a_damaged_config_is_named(tied):
  (tied / "config.json").write_text('{"model_type": ')
  with pytest.raises(ValueError, match="config.json is not JSON"):
    load(tied)
  (tied / "config.json").write_text('{"model_type": "llava"}')
  with pytest.raises(ValueError, match="config.json: .* 'llava' is not supported"):
    load(tied)


def test_save_refuses_its_source_and_foreign_params(tied, tmp_path):
  model, params = load(tied)
  with pytest.raises(ValueError, match="must differ from source"):
    save(tied, model, params, source=tied)
  wrong = {**params, "text": {**params["text"], "embedding": jnp.zeros((3, 4))}}
  with pytest.raises(ValueError, match=r"text/embedding is \[3, 4\], must be \[96, 64\]"):
    save(tmp_path / "out", model, wrong, source=tied)
  assert not (tmp_path / "out").exists()
