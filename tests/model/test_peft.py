"""Adapters against peft itself, both ways, on tiny random models."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from pixelis_jax.model import lora
from pixelis_jax.model.load import load
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.model.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from tests.model import oracle

# As for the whole model: logits have a spread of about 9, and float32 sums in other orders leave
# some 1e-5 of it. A scale wrong by a factor moves them by more than 1.
TOLERANCE = 1e-4
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# One layer's q, and both layers' down, have other ranks; k another alpha.
PATTERNS = {
  "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 5},
  "alpha_pattern": {"layers.0.self_attn.k_proj": 20},
}
# What can be adapted in each family: peft's ends of names, and our paths.
TOWERS = {
  "qwen2_5_vl": (["qkv", "attn.proj", "mlp.0", "mlp.2", "patch_embed.proj"], "visual/.*"),
  "qwen3_vl": (["qkv", "attn.proj", "linear_fc1", "linear_fc2", "patch_embed.proj"], "visual/.*"),
  "qwen3": ([], "text/.*"),
}


@pytest.fixture(scope="module", params=TOWERS)
def pair(request, tmp_path_factory) -> SimpleNamespace:
  """A model on both sides, without adapters."""
  path = tmp_path_factory.mktemp("pair") / "model"
  theirs = oracle.hf_model(tied=True, family=request.param)
  model, params = load(oracle.saved(theirs, path))
  batch = oracle.two_rows(model.config)
  with jax.default_matmul_precision("highest"):
    features = oracle.encoded(model, params, batch.vision)
  return SimpleNamespace(
    path=path, model=model, params=params, batch=batch, features=features, family=request.param
  )


def ours(pair, model, params) -> np.ndarray:
  """Our logits where only the decoder has adapters."""
  return oracle.logits(model, params, pair.batch, pair.features)


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def base(pair):
  """A fresh torch model each time: peft changes the one that it is given."""
  return oracle.MODELS[pair.family].from_pretrained(pair.path, attn_implementation="eager").eval()


def by_peft(pair, path, **settings) -> np.ndarray:
  """Logits of a random adapter that peft made and saved."""
  torch.manual_seed(1)
  settings = {"r": 4, "lora_alpha": 8, "target_modules": DECODER} | settings
  model = peft.get_peft_model(base(pair), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "lora_B" in name:  # peft starts it at zero.
        weight.copy_(0.1 * torch.randn_like(weight))
  model.save_pretrained(path)
  return theirs(model, pair)


def loaded_by_peft(pair, path) -> np.ndarray:
  return theirs(peft.PeftModel.from_pretrained(base(pair), path).eval(), pair)


def theirs(model, pair) -> np.ndarray:
  whole = model.get_base_model()
  with torch.no_grad():
    logits = model(**oracle.hf_inputs(whole, pair.batch)).logits
  return logits[torch.tensor(pair.batch.valid)].numpy()


@pytest.fixture(autouse=True)
def quiet():
  """peft 0.21 reads a field that transformers 5.24 deprecates."""
  with warnings.catch_warnings():
    warnings.filterwarnings(
      "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
    yield


def test_an_adapter_of_peft_gives_the_same_logits(pair, tmp_path):
  """Ranks, alphas and rank-stabilised scales at once: a mistake in any of them moves the logits."""
  assert_read(pair, tmp_path, **PATTERNS, use_rslora=True, lora_alpha=3)


def assert_read(pair, tmp_path, **settings):
  """Our logits with an adapter of peft, beside the weights and merged into them, are peft's."""
  expected = by_peft(pair, tmp_path, **settings)
  model, params = load_adapter(tmp_path, pair.model, pair.params)
  assert np.abs(expected - ours(pair, pair.model, pair.params)).max() > 1000 * TOLERANCE
  # Of Qwen2.5-VL's tower the MLPs have the decoder's names, and so adapters.
  features = None if pair.family == "qwen2_5_vl" else pair.features
  got = oracle.logits(model, params, pair.batch, features)
  assert_allclose(got, expected, atol=TOLERANCE)
  # And so do the merged weights.
  got = oracle.logits(pair.model, lora.merge(params), pair.batch, features)
  assert_allclose(got, expected, atol=TOLERANCE)


def test_every_linear_layer_may_be_adapted(pair, tmp_path):
  """The tower's too: the fused qkv, the mergers, and the convolution of the patches."""
  names, path = TOWERS[pair.family]
  expected = by_peft(pair, tmp_path / "theirs", target_modules=DECODER + names)
  model, params = load_adapter(tmp_path / "theirs", pair.model, pair.params)
  kernels = {row for row in flat(params) if row[-1] == "kernel"}
  assert {(*row[:-1], "kernel") for row in flat(params) if row[-1] == "lora_a"} == kernels
  assert_allclose(oracle.logits(model, params, pair.batch), expected, atol=TOLERANCE)
  save_adapter(tmp_path / "ours", model, params, "somewhere")
  assert_allclose(loaded_by_peft(pair, tmp_path / "ours"), expected, atol=TOLERANCE)
  # The same tensors, by the same names.
  one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
  assert one.keys() == other.keys()
  for key, tensor in one.items():
    np.testing.assert_array_equal(tensor, other[key], err_msg=key)


def flat(params):
  return nnx.traversals.flatten_mapping(params)


def random_adapter(pair, **settings):
  model = dataclasses.replace(pair.model, lora=LoraConfig(**{"rank": 4, "alpha": 6.0} | settings))
  params = flat(model.adapt(pair.params, jax.random.key(0)))
  rng = np.random.default_rng(1)
  for path, a in params.items():
    if path[-1] == "lora_a":
      at = (*path[:-1], "lora_b")
      used = np.asarray(a).any(axis=-2)
      b = rng.normal(0, 0.1, params[at].shape).astype(np.float32)
      params[at] = jnp.asarray(b * used.reshape(*used.shape, *[1] * (b.ndim - used.ndim)))
  return model, nnx.traversals.unflatten_mapping(params)


def test_peft_loads_our_adapters(pair, tmp_path):
  """Other ranks, other alphas and dropout at once: each must be written where peft looks for it."""
  model, params = random_adapter(
    pair,
    dropout=0.1,
    ranks=(("text/layers/attn/q", (2, 7)), ("text/layers/mlp/up", (0, 1))),
    alphas=(("text/layers/mlp/gate", (1.5, 12.0)),),
  )
  expected = ours(pair, model, params)
  assert np.abs(expected - ours(pair, pair.model, pair.params)).max() > 1000 * TOLERANCE
  save_adapter(tmp_path, model, params, "org/model")
  assert_allclose(loaded_by_peft(pair, tmp_path), expected, atol=TOLERANCE)
  read = peft.LoraConfig.from_pretrained(tmp_path)
  assert read.base_model_name_or_path == "org/model" and read.task_type == "CAUSAL_LM"
  assert (read.r, read.lora_alpha, read.lora_dropout) == (4, 6, 0.1)
  again_model, again = load_adapter(tmp_path, pair.model, pair.params)
  assert again_model.lora.dropout == model.lora.dropout
  leaves = flat(params)
  assert flat(again).keys() == leaves.keys()
  for path, leaf in flat(again).items():
    np.testing.assert_array_equal(leaf, leaves[path], err_msg=str(path))


def test_targets_are_short_where_they_say_the_same(pair, tmp_path):
  """The tower of Qwen2.5-VL has a gate, an up and a down of the same names: these need paths."""
  save_adapter(tmp_path, *random_adapter(pair), "base")
  targets = set(json.loads((tmp_path / CONFIG).read_text())["target_modules"])
  attention, mlp = set(DECODER[:4]), set(DECODER[4:])
  if pair.family == "qwen2_5_vl":
    mlp = {f"language_model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in mlp}
  assert targets == attention | mlp


on_one = pytest.mark.parametrize("pair", ["qwen2_5_vl"], indirect=True)


@on_one
def test_an_adapter_of_one_layer_leaves_the_others(pair, tmp_path):
  assert_read(pair, tmp_path, layers_to_transform=[1])


@on_one
def test_names_of_older_transformers_are_read(pair, tmp_path):
  """Before 4.52 the language model and the tower had no common parent."""
  settings = {"target_modules": [*DECODER, "qkv"], "alpha_pattern": {"layers.0.mlp.up_proj": 20}}
  expected = by_peft(pair, tmp_path, **settings)
  older = lambda key: key.replace("model.language_model.", "model.").replace(
    "model.visual", "visual"
  )
  tensors = {older(key): x for key, x in load_file(tmp_path / WEIGHTS).items()}
  assert "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight" in tensors
  assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in tensors
  save_file(tensors, tmp_path / WEIGHTS)
  changed(tmp_path, alpha_pattern={"model.layers.0.mlp.up_proj": 20})
  model, params = load_adapter(tmp_path, pair.model, pair.params)
  assert_allclose(oracle.logits(model, params, pair.batch), expected, atol=TOLERANCE)


@on_one
def test_bfloat16_adapters_are_read(pair, tmp_path):
  by_peft(pair, tmp_path)
  tensors = load_file(tmp_path / WEIGHTS)
  low = {key: x.astype(jnp.bfloat16) for key, x in tensors.items()}
  save_file(low, tmp_path / WEIGHTS)
  _, params = load_adapter(tmp_path, pair.model, pair.params)
  a = params["text"]["layers"]["attn"]["q"]["lora_a"]
  key = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
  assert a.dtype == np.float32
  np.testing.assert_array_equal(np.asarray(a)[1].T, low[key].astype(np.float32))


def changed(path, **settings):
  file = path / CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
  path = tmp_path_factory.mktemp("adapter")
  save_adapter(path, *random_adapter(pair), "base")
  return path


@pytest.fixture
def broken(saved, tmp_path):
  """A copy that a test may damage."""
  for name in (CONFIG, WEIGHTS):
    (tmp_path / name).write_bytes((saved / name).read_bytes())
  return tmp_path


@on_one
@pytest.mark.parametrize(
  "settings, match",
  [
    ({"use_dora": True}, "use_dora True is not supported"),
    ({"bias": "all"}, "bias 'all' is not supported"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
    ({"lora_bias": True}, "lora_bias True"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"use_something_new": 3}, "use_something_new 3 is not supported"),
    ({"peft_type": "IA3"}, "peft_type 'IA3' must be 'LORA'"),
    ({"r": None}, "r None must be a whole number"),
    ({"r": 5}, "has rank 4, adapter_config.json says 5"),
  ],
)
def test_settings_that_we_do_not_compute_are_named(pair, broken, settings, match):
  changed(broken, **settings)
  with pytest.raises(ValueError, match=match):
    load_adapter(broken, pair.model, pair.params)


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@on_one
@pytest.mark.parametrize(
  "change, match",
  [
    (
      lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[Q]},
      "lm_head.lora_A.weight belong",
    ),
    (lambda t: t | {Q.replace("0", "7"): t[Q]}, r"layers\.7\..*belongs to no linear layer"),
    (lambda t: t | {Q.replace("lora_A.weight", "lora_magnitude_vector"): t[Q]}, "magnitude_vector"),
    (lambda t: {k: x for k, x in t.items() if k != Q}, "q_proj has lora_B alone"),
    (lambda t: t | {Q: t[Q][:, :-1].copy()}, r"q_proj has A \[4, 63\].*must be \[r, 64\]"),
    (lambda t: t | {Q: t[Q][:-1].copy()}, r"A \[3, 64\] and B \[64, 4\]"),
    (lambda t: {}, "holds no adapter"),
  ],
  ids=["head", "layer", "dora", "alone", "width", "rank", "empty"],
)
def test_tensors_that_do_not_fit_are_named(pair, broken, change, match):
  save_file(change(load_file(broken / WEIGHTS)), broken / WEIGHTS)
  with pytest.raises(ValueError, match=match):
    load_adapter(broken, pair.model, pair.params)


@on_one
def test_damaged_and_missing_files_are_named(pair, broken):
  whole = (broken / WEIGHTS).read_bytes()
  (broken / WEIGHTS).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated"):
    load_adapter(broken, pair.model, pair.params)
  (broken / WEIGHTS).unlink()
  with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is missing"):
    load_adapter(broken, pair.model, pair.params)
  (broken / CONFIG).write_text("{")
  with pytest.raises(ValueError, match=f"{CONFIG} is not JSON"):
    load_adapter(broken, pair.model, pair.params)
  (broken / CONFIG).unlink()
  with pytest.raises(FileNotFoundError, match=f"{CONFIG} is missing"):
    load_adapter(broken, pair.model, pair.params)


@on_one
def test_a_model_without_adapters_has_none_to_save(pair, tmp_path):
  with pytest.raises(ValueError, match="has no adapters to write"):
    save_adapter(tmp_path, pair.model, pair.params, "base")
