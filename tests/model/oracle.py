"""The oracle of the port: tiny random transformers models, and the same inputs for both sides."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import (
  LlamaConfig,
  LlamaForCausalLM,
  PretrainedConfig,
  PreTrainedModel,
  Qwen2_5_VLConfig,
  Qwen2_5_VLForConditionalGeneration,
  Qwen3Config,
  Qwen3ForCausalLM,
  Qwen3VLConfig,
  Qwen3VLForConditionalGeneration,
)

from pixelis_jax.model import layout
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.layout import VisionInputs
from pixelis_jax.model.policy import Model
from pixelis_jax.types import Patches

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IMAGE, VIDEO, START, END = 90, 91, 88, 89
WORDS = 80  # Text tokens are below this.
MODELS = {
  "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
  "qwen3_vl": Qwen3VLForConditionalGeneration,
  "qwen3": Qwen3ForCausalLM,
  "llama": LlamaForCausalLM,
}
TEXT_CONFIGS = {"qwen3": Qwen3Config, "llama": LlamaConfig}


def hf_config(*, tied: bool, family: str = "qwen2_5_vl") -> PretrainedConfig:
  """The tied and the untied model of a family differ in most fields, so that none goes unread."""
  text = _text_config(tied, family)
  if family in TEXT_CONFIGS:
    config = TEXT_CONFIGS[family](**text, tie_word_embeddings=tied)
  else:
    made = Qwen2_5_VLConfig if family == "qwen2_5_vl" else Qwen3VLConfig
    config = made(
      text_config=text,
      vision_config=_vision_config(tied, family),
      image_token_id=IMAGE,
      video_token_id=VIDEO,
      vision_start_token_id=START,
      vision_end_token_id=END,
      tie_word_embeddings=tied,
    )
  config._attn_implementation = "eager"
  return config


def _text_config(tied: bool, family: str) -> dict:
  """Heads 4 to 2 (or 1), unequal m-RoPE sections, and heads wider than width / heads.

  Not in Qwen2.5-VL, whose width is its heads', nor in the tied Llama, which leaves it open.
  """
  rope = {"rope_type": "default", "rope_theta": 5e6 if tied else 1e4}
  config = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2 if tied else 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2 if tied else 1,
    "hidden_act": "silu" if tied else "gelu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  if family == "qwen2_5_vl":
    return config | {"rope_parameters": rope | {"mrope_section": [1, 3, 4] if tied else [2, 3, 3]}}
  if family != "llama" or not tied:
    config |= {"head_dim": 24}
  if family in TEXT_CONFIGS:
    return config | {"rope_parameters": rope}
  section = [5, 4, 3] if tied else [6, 3, 3]
  return config | {"rope_parameters": rope | {"mrope_section": section, "mrope_interleaved": True}}


def _vision_config(tied: bool, family: str) -> dict:
  """Qwen2.5: windows of 2 x 2 merged units, one full block. Qwen3: a 6 x 6 table, two levels."""
  config = {
    "depth": 3,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
  }
  if family == "qwen2_5_vl":
    activation = "silu" if tied else "gelu_pytorch_tanh"
    return config | {"window_size": 16, "fullatt_block_indexes": [1], "hidden_act": activation}
  return config | {
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2] if tied else [1],
    "hidden_act": "gelu_pytorch_tanh" if tied else "silu",
  }


def hf_model(*, tied: bool, family: str = "qwen2_5_vl") -> PreTrainedModel:
  """Weights large enough that every part of the network moves the logits by far more than 1e-4."""
  torch.manual_seed(0)
  model = MODELS[family](hf_config(tied=tied, family=family)).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      if parameter.ndim == 1:
        is_scale = name.endswith("weight")  # Of a norm; all other vectors are biases.
        parameter.copy_(1 + 0.2 * noise if is_scale else 0.3 * noise)
      else:
        table = "embed_tokens" in name or "pos_embed" in name
        parameter.copy_(noise * (1.0 if table else parameter[0].numel() ** -0.5))
  return model


def decoder(model: PreTrainedModel) -> torch.nn.Module:
  """The language model's layers and final norm."""
  return getattr(model.model, "language_model", model.model)


def image(
  grid: tuple[int, int, int], config: ModelConfig, seed: int, *, interval: float | None = None
) -> Patches:
  """Random patches of the given grid; a video where there is an interval."""
  vision = config.vision
  shape = (grid[0] * grid[1] * grid[2], vision.patch_values)
  patches = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
  size = grid[1] * vision.patch, grid[2] * vision.patch
  key = f"{grid} {seed} {interval}"
  return Patches(patches=patches, grid=grid, size=size, key=key, interval=interval)


def text(count: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, WORDS, count).astype(np.int32)


def shown(image: Patches, config: ModelConfig) -> np.ndarray:
  """The placeholders between start and end tokens; Qwen3-VL's frames each behind their time."""
  token = IMAGE if image.interval is None else VIDEO
  count = layout.feature_count(image, config.vision)
  if image.interval is None or config.family == "qwen2_5_vl":
    return np.array([START, *[token] * count, END], np.int32)
  frames = image.grid[0]
  frame = [START, *[token] * (count // frames), END]
  return np.concatenate([[*text(3, t), *frame] for t in range(frames)]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of tokens and images, as our model takes them; `rows` are unpadded (tokens, images)."""

  rows: Sequence[tuple[np.ndarray, Sequence[Patches]]]
  tokens: np.ndarray
  positions: np.ndarray
  sources: np.ndarray
  segments: np.ndarray
  vision: VisionInputs | None

  @property
  def valid(self) -> np.ndarray:
    return self.segments != 0

  def arguments(self, features: jax.Array | np.ndarray) -> tuple:
    """Of `Model.hidden`, where all rows are one block with these features [F, W]."""
    return self.tokens, self.positions, features[None], self.sources, self.segments


def batch(config: ModelConfig, rows, *, length: int, left: Sequence[bool], patches: int) -> Batch:
  """Pads each row to `length`, on the left where `left` says so; one more image row than needed."""
  B = len(rows)
  tokens, segments = np.zeros((B, length), np.int32), np.zeros((B, length), np.int32)
  positions = np.zeros((B, 3, length), np.int32)
  sources = np.full((B, length), -1, np.int32)
  images, per_row = [], patches // 4
  for b, (row, row_images) in enumerate(rows):
    at = length - len(row) if left[b] else 0
    here = slice(at, at + len(row))
    tokens[b, here], segments[b, here] = row, 1
    positions[b, :, here], _ = layout.mrope_positions(row, row_images, config)
    flat = [
      (len(images) + i) * per_row + np.arange(layout.feature_count(image, config.vision))
      for i, image in enumerate(row_images)
    ]
    if flat:
      sources[b, here][(row == IMAGE) | (row == VIDEO)] = np.concatenate(flat)
    images += row_images
  vision = None
  if config.vision is not None:
    vision = layout.vision_inputs(images, config.vision, rows=len(images) + 1, patches=patches)
  return Batch(rows, tokens, positions, sources, segments, vision)


def two_rows(config: ModelConfig) -> Batch:
  """320 tokens: two images and right padding; one image, a video and left padding.

  Grids 6 x 10 and 10 x 6 are no multiple of the 4 x 4 patch windows. 320 tokens because a short
  prompt cannot see a rotary bug. Text only, the same lengths without images.
  """
  if config.vision is None:
    rows = [(text(300, 4), ()), (text(311, 7), ())]
    return batch(config, rows, length=320, left=(False, True), patches=112)
  a, b = image((1, 8, 12), config, 1), image((1, 6, 10), config, 2)
  c, clip = image((1, 10, 6), config, 3), image((3, 6, 4), config, 4, interval=0.3)
  first = [text(40, 4), shown(a, config), text(11, 5), shown(b, config), text(200, 6)]
  second = [text(7, 7), shown(c, config), text(5, 9), shown(clip, config), text(235, 8)]
  rows = [(np.concatenate(first), (a, b)), (np.concatenate(second), (c, clip))]
  return batch(config, rows, length=320, left=(False, True), patches=112)


@functools.lru_cache(maxsize=16)
def tower(model: Model):
  return jax.jit(lambda params, vision: model.encode(params, vision))


@functools.lru_cache(maxsize=16)
def decoder_of(model: Model):
  @jax.jit
  def run(params, features, tokens, positions, sources, segments):
    hidden = model.hidden(params, tokens, positions, features, sources, segments)
    return hidden, hidden @ model.head(params).T

  return run


def encoded(model: Model, params, vision: VisionInputs | None) -> jax.Array | np.ndarray:
  """Features [F, W] of all images, in the order of their rows."""
  if vision is None:
    return np.zeros((0, model.config.feature_width), np.float32)
  features = tower(model)(params, vision)
  return features.reshape(-1, features.shape[-1])


def forward(model: Model, params, batch: Batch, features=None) -> tuple[jax.Array, jax.Array]:
  """Our final hidden states [B, T, D] and logits [B, T, V].

  Tower and decoder are compiled once a model, whatever its weights and its inputs' layout; with
  `features` the tower is left out.
  """
  if features is None:
    features = encoded(model, params, batch.vision)
  tokens, positions, features, sources, segments = batch.arguments(features)
  return decoder_of(model)(params, features, tokens, positions, sources, segments)


def hidden(model: Model, params, batch: Batch, features=None) -> np.ndarray:
  """Final hidden states of the tokens that are no padding, [tokens, D]."""
  return np.asarray(forward(model, params, batch, features)[0])[batch.valid]


def logits(model: Model, params, batch: Batch, features=None) -> np.ndarray:
  """Those of the tokens that are no padding, [tokens, V]."""
  return np.asarray(forward(model, params, batch, features)[1])[batch.valid]


def weights(model: Model, seed: int, *, spread: float = 1.0) -> dict:
  """Random float32 weights, `spread` times as far apart as those of `Model.init`.

  By NumPy: a program that draws as many weights takes seconds to compile.
  """
  rng = np.random.default_rng(seed)

  def drawn(path, x):
    *at, name = (entry.key for entry in path)
    if name in ("bias", "scale"):
      return jnp.asarray(np.full(x.shape, name == "scale", np.float32))
    stacked = not {"layers", "blocks", "deep"}.isdisjoint(at)
    std = x.shape[1 if stacked else 0] ** -0.5 if name == "kernel" else 0.1
    return jnp.asarray(spread * std * rng.standard_normal(x.shape, np.float32))

  return jax.tree_util.tree_map_with_path(drawn, model.shapes())


def hf_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
  """The same batch for transformers, with its own positions."""
  tokens = torch.tensor(np.asarray(batch.tokens)).long()
  mask = torch.tensor(batch.valid).long()
  inputs = {"input_ids": tokens, "attention_mask": mask}
  if batch.vision is None:
    # Counted from the first token on the left-padded row too, as `generate` does.
    return inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
  kinds = ((tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()) * mask.int()
  stills, clips = (
    [i for _, images in batch.rows for i in images if (i.interval is not None) is moving]
    for moving in (False, True)
  )
  patches = lambda images: torch.tensor(np.concatenate([i.patches for i in images]))
  inputs |= {
    "pixel_values": patches(stills),
    "image_grid_thw": torch.tensor([i.grid for i in stills]),
  }
  if clips:
    inputs |= {
      "pixel_values_videos": patches(clips),
      "video_grid_thw": torch.tensor([i.grid for i in clips]),
    }
  seconds = {}
  if clips and isinstance(model, Qwen2_5_VLForConditionalGeneration):
    seconds = {"second_per_grid_ts": torch.tensor([i.interval for i in clips])}
  grids = {k: v.clone() for k, v in inputs.items() if k.endswith("grid_thw")}
  positions, _ = model.model.get_rope_index(tokens, kinds, attention_mask=mask, **grids, **seconds)
  return inputs | {"position_ids": positions}


def saved(model: PreTrainedModel, path: Path) -> Path:
  model.save_pretrained(path)
  return path


def saved_gradients(model: PreTrainedModel, path: str | os.PathLike) -> Path:
  """A checkpoint whose weights are the gradients: read back through the same name table."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter.grad)
  return saved(model, Path(path))
