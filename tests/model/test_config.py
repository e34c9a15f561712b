"""Every spelling of the families' config.json, and the values we refuse."""

import copy
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2_5_VLConfig, Qwen3Config, Qwen3VLConfig

from pixelis_jax.model.config import ModelConfig
from tests.model import oracle

SHAPES = Path(__file__).parents[2] / "assets" / "shapes"


def published(name: str) -> dict:
  """The facts of a released checkpoint's config.json."""
  return json.loads((SHAPES / name / "config.json").read_text())


HUB_3B = published("qwen2_5_vl_3b")  # Flat, as transformers 4 wrote it.
HUB_QWEN3_VL_8B, HUB_QWEN3_8B = published("qwen3_vl_8b"), published("qwen3_8b")
# As its config.json was written by transformers 4.42.
HUB_SMOLLM2 = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 576,
  "intermediate_size": 1536,
  "is_llama_config": True,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 9,
  "num_hidden_layers": 30,
  "num_key_value_heads": 3,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_interleaved": False,
  "rope_scaling": None,
  "rope_theta": 100000,
  "tie_word_embeddings": True,
  "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
  "vocab_size": 49152,
}


def changed(path: str, value: object, base: dict | None = None) -> dict:
  raw = copy.deepcopy(HUB_3B if base is None else base)
  *parents, leaf = path.split("/")
  node = raw
  for parent in parents:
    node = node[parent]
  node[leaf] = value
  return raw


def test_flat_hub_config():
  config = ModelConfig.from_hf(HUB_3B)
  assert (config.text.layers, config.text.head_width, config.text.kv_heads) == (36, 128, 2)
  assert config.text.mrope_section == (16, 24, 24)
  assert config.text.rope_theta == 1e6 and config.text.norm_eps == 1e-6 and config.text.tied
  vision = config.vision
  assert (vision.head_width, vision.patch_values, vision.merge_unit) == (80, 1176, 4)
  assert vision.window_side == 4  # 112 pixels = 8 patches = 4 merged units.
  assert vision.tokens_per_second == 2 and vision.rope_theta == 1e4
  assert (config.image_token, config.video_token) == (151655, 151656)


def test_qwen3_vl_hub_config():
  config = ModelConfig.from_hf(HUB_QWEN3_VL_8B)
  text, vision = config.text, config.vision
  assert (text.layers, text.heads, text.kv_heads, text.head_width) == (36, 32, 8, 128)
  assert text.rope_theta == 5e6 and text.qk_norm and not text.qkv_bias and not text.tied
  # 64 pairs: rows turn 1, 4, ... 58, columns 2, 5, ... 59, time the 24 others, all from 60 on.
  assert text.rotary_axes[:6] == (0, 1, 2, 0, 1, 2) and text.rotary_axes[57:] == (0, 1, 2, *[0] * 4)
  assert [text.rotary_axes.count(axis) for axis in range(3)] == [24, 20, 20]
  assert (vision.head_width, vision.patch_values, vision.position_side) == (72, 1536, 48)
  assert vision.window_side is None and vision.deepstack == (8, 16, 24)
  assert config.feature_width == 4 * 4096


def test_qwen3_hub_config():
  config = ModelConfig.from_hf(HUB_QWEN3_8B)
  assert config.vision is None and config.image_token is None
  assert config.text.rope_theta == 1e6 and config.text.qk_norm
  assert config.text.rotary_axes == (0,) * 64


def test_llama_hub_config():
  text = ModelConfig.from_hf(HUB_SMOLLM2).text
  assert (text.layers, text.heads, text.kv_heads, text.head_width) == (30, 9, 3, 64)
  assert text.rope_theta == 1e5 and text.tied and not text.qkv_bias and not text.qk_norm
  assert text.rotary_axes == (0,) * 32
  # The class's defaults: as many key heads as query heads, theta 1e4; the width alone gives heads.
  few = ModelConfig.from_hf({"model_type": "llama", "hidden_size": 512}).text
  assert (few.kv_heads, few.head_width, few.rope_theta, few.tied) == (32, 16, 1e4, False)


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("mlp_bias", True, "mlp_bias = True"),
    ("attention_bias", True, "attention_bias = True"),
    ("pretraining_tp", 2, "pretraining_tp = 2"),
    ("rope_interleaved", True, "rope_interleaved = True"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_type = 'llama3'"),
    ("hidden_size", 580, "hidden_size 580 must be divisible by num_attention_heads 9"),
  ],
)
def test_what_we_do_not_compute_of_llama_is_refused(path, value, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_hf(changed(path, value, HUB_SMOLLM2))


def test_the_spellings_mean_the_same():
  """transformers reads the flat file and writes it nested, with rope_parameters."""
  nested = Qwen2_5_VLConfig(**copy.deepcopy(HUB_3B)).to_dict()
  assert "rope_parameters" in nested["text_config"] and "rope_scaling" not in nested
  assert ModelConfig.from_hf(nested) == ModelConfig.from_hf(HUB_3B)
  for hub, made in (
    (HUB_QWEN3_VL_8B, Qwen3VLConfig),
    (HUB_QWEN3_8B, Qwen3Config),
    (HUB_SMOLLM2, LlamaConfig),
  ):
    assert ModelConfig.from_hf(made(**copy.deepcopy(hub)).to_dict()) == ModelConfig.from_hf(hub)


@pytest.mark.parametrize("family", oracle.MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_by_transformers_5(family, tied):
  config = ModelConfig.from_hf(oracle.hf_config(tied=tied, family=family).to_dict())
  assert config.text.tied is tied
  assert config.text.rope_theta == (5e6 if tied else 1e4)
  if family == "qwen2_5_vl":
    assert config.text.mrope_section == ((1, 3, 4) if tied else (2, 3, 3))
    assert config.vision.full_blocks == (1,)
  if family == "qwen3_vl":
    assert config.text.mrope_section == ((5, 4, 3) if tied else (6, 3, 3))
    assert config.vision.deepstack == ((0, 2) if tied else (1,))


def test_tied_flag_in_the_text_config_counts():
  """Where transformers 4 kept it; the root then says False or nothing."""
  raw = oracle.hf_config(tied=False).to_dict()
  assert ModelConfig.from_hf(changed("text_config/tie_word_embeddings", True, raw)).text.tied


def test_omitted_fields_have_the_classes_defaults():
  """transformers 4 leaves out what equals its class: theta 1e6, merge 2, window 112."""
  raw = changed("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 24]})
  del raw["rope_theta"]
  for field in ("spatial_merge_size", "window_size", "patch_size", "hidden_act"):
    del raw["vision_config"][field]
  assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(HUB_3B)


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("model_type", "qwen2_vl", "model_type = 'qwen2_vl' is not supported"),
    ("logit_scale", 2.0, r"config has fields .* does not know: \['logit_scale'\]"),
    ("vision_config/qk_norm", True, r"vision config has fields .*: \['qk_norm'\]"),
    ("rope_scaling/beta", 1.0, r"rope_parameters has fields .*: \['beta'\]"),
    ("rope_scaling/mrope_interleaved", True, "mrope_interleaved = True"),
    ("vision_config/fullatt_block_indexes", [15, 7], r"\[15, 7\] must rise"),
    ("use_sliding_window", True, "use_sliding_window = True"),
    ("attention_dropout", 0.1, "attention_dropout = 0.1"),
    ("hidden_act", "swish2", "hidden_act = 'swish2'"),
    ("head_dim", 64, "head_dim = 64"),
    ("layer_types", ["full_attention", "sliding_attention"], "layer_types = 'sliding_attention'"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type = 'yarn'"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 16]}, "must sum to half the head"),
    ("rope_parameters", {"rope_theta": 1e4}, "rope_scaling .* and rope_parameters .* disagree"),
    ("num_key_value_heads", 3, "16 must be divisible by num_key_value_heads 3"),
    ("vision_config/hidden_act", "tanh", "vision hidden_act = 'tanh'"),
    ("vision_config/patch_size", [14, 16], "patch_size .* must be one number"),
    ("vision_config/out_hidden_size", 3584, "out_hidden_size 3584 must equal hidden_size 2048"),
    ("vision_config/window_size", 14, "window_size 14 must be at least 28"),
    ("vision_config/fullatt_block_indexes", [7, 32], r"\[32\] must be in \[0, 32\)"),
    ("vision_config/rope_parameters", {"rope_type": "default"}, "vision rope_type = 'default'"),
  ],
)
def test_what_we_do_not_compute_is_refused_by_name(path, value, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_hf(changed(path, value))


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("text_config/attention_bias", True, "attention_bias = True"),
    ("text_config/rope_scaling/mrope_interleaved", False, "mrope_interleaved = False"),
    ("text_config/rope_scaling/mrope_section", [24, 20, 16], "must sum to half the head width 128"),
    ("text_config/num_hidden_layers", 2, r"\(8, 16, 24\) must not outnumber the decoder's 2"),
    ("vision_config/num_position_embeddings", 2300, "2300 must be a square"),
    ("vision_config/deepstack_visual_indexes", [8, 27], r"\[27\] must be in \[0, 27\)"),
    ("vision_config/window_size", 112, r"does not know: \['window_size'\]"),
  ],
)
def test_what_we_do_not_compute_of_qwen3_vl_is_refused(path, value, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig.from_hf(changed(path, value, HUB_QWEN3_VL_8B))


def test_a_text_model_has_no_sections():
  rope = {"rope_type": "default", "mrope_section": [24, 20, 20]}
  with pytest.raises(ValueError, match="mrope_section is not supported for model_type 'qwen3'"):
    ModelConfig.from_hf(changed("rope_scaling", rope, HUB_QWEN3_8B))
