"""The oracle of the port: tiny random transformers models, and the same inputs for both sides."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pixelis_jax.model import layout
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.layout import VisionInputs
from pixelis_jax.types import Patches

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IMAGE, VIDEO, START, END = 90, 91, 88, 89
WORDS = 80  # Text tokens are below this.


def hf_config(*, tied: bool) -> Qwen2_5_VLConfig:
  """Heads 4 to 2, three unequal m-RoPE sections, windows of 2 x 2 merged units, one full block."""
  config = Qwen2_5_VLConfig(
    text_config={
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
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6 if tied else 1e4,
        "mrope_section": [1, 3, 4] if tied else [2, 3, 3],
      },
    },
    vision_config={
      "depth": 3,
      "hidden_size": 40,
      "intermediate_size": 48,
      "num_heads": 2,
      "patch_size": 4,
      "window_size": 16,
      "out_hidden_size": 64,
      "fullatt_block_indexes": [1],
      "hidden_act": "silu" if tied else "gelu_pytorch_tanh",
    },
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    tie_word_embeddings=tied,
  )
  config._attn_implementation = "eager"
  return config


def hf_model(*, tied: bool) -> Qwen2_5_VLForConditionalGeneration:
  """Weights large enough that every part of the network moves the logits by far more than 1e-4."""
  torch.manual_seed(0)
  model = Qwen2_5_VLForConditionalGeneration(hf_config(tied=tied)).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      if parameter.ndim == 1:
        is_norm = "norm" in name or "ln_q" in name
        parameter.copy_(1 + 0.2 * noise if is_norm else 0.3 * noise)
      else:
        parameter.copy_(noise * (1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5))
  return model


def image(grid: tuple[int, int, int], config: ModelConfig, seed: int) -> Patches:
  """Random patches of the given grid."""
  vision = config.vision
  shape = (grid[0] * grid[1] * grid[2], vision.patch_values)
  patches = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
  size = grid[1] * vision.patch, grid[2] * vision.patch
  return Patches(patches=patches, grid=grid, size=size, key=f"{grid} {seed}")


def text(count: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, WORDS, count).astype(np.int32)


def shown(image: Patches, config: ModelConfig, token: int = IMAGE) -> np.ndarray:
  """The placeholders of an image between its start and end tokens."""
  count = layout.feature_count(image, config.vision)
  return np.array([START, *[token] * count, END], np.int32)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of tokens and images, as our model takes them; `rows` are unpadded (tokens, images)."""

  rows: Sequence[tuple[np.ndarray, Sequence[Patches]]]
  tokens: jnp.ndarray
  positions: jnp.ndarray
  sources: jnp.ndarray
  segments: jnp.ndarray
  vision: VisionInputs

  @property
  def valid(self) -> np.ndarray:
    return np.asarray(self.segments) != 0

  def arguments(self, features: jnp.ndarray) -> tuple:
    return self.tokens, self.positions, features, self.sources, self.segments


def batch(config: ModelConfig, rows, *, length: int, left: Sequence[bool], patches: int) -> Batch:
  """Pads each row to `length`, on the left where `left` says so; one more image row than needed."""
  B = len(rows)
  tokens, segments = np.zeros((B, length), np.int32), np.zeros((B, length), np.int32)
  positions = np.zeros((B, 3, length), np.int32)
  sources = np.full((B, length), -1, np.int32)
  images, per_row = [], patches // config.vision.merge_unit
  for b, (row, row_images) in enumerate(rows):
    at = length - len(row) if left[b] else 0
    here = slice(at, at + len(row))
    tokens[b, here], segments[b, here] = row, 1
    positions[b, :, here], _ = layout.mrope_positions(row, [i.grid for i in row_images], config)
    flat = [
      (len(images) + i) * per_row + np.arange(layout.feature_count(image, config.vision))
      for i, image in enumerate(row_images)
    ]
    sources[b, here][row == IMAGE] = np.concatenate(flat)
    images += row_images
  vision = layout.vision_inputs(images, config.vision, rows=len(images) + 1, patches=patches)
  arrays = (jnp.asarray(x) for x in (tokens, positions, sources, segments))
  return Batch(rows, *arrays, vision)


def two_rows(config: ModelConfig) -> Batch:
  """320 tokens: two images and right padding; one image and left padding.

  Grids 6 x 10 and 10 x 6 are no multiple of the 4 x 4 patch windows. 320 tokens because a short
  prompt cannot see a rotary bug.
  """
  a, b = image((1, 8, 12), config, 1), image((1, 6, 10), config, 2)
  c = image((1, 10, 6), config, 3)
  first = [text(40, 4), shown(a, config), text(11, 5), shown(b, config), text(200, 6)]
  second = [text(7, 7), shown(c, config), text(260, 8)]
  rows = [(np.concatenate(first), (a, b)), (np.concatenate(second), (c,))]
  return batch(config, rows, length=320, left=(False, True), patches=112)


def hf_inputs(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> dict[str, torch.Tensor]:
  """The same batch for transformers, with its own positions."""
  tokens = torch.tensor(np.asarray(batch.tokens)).long()
  mask = torch.tensor(batch.valid).long()
  images = [i for _, row_images in batch.rows for i in row_images]
  grids = torch.tensor([i.grid for i in images])
  kinds = (tokens == IMAGE).int() * mask.int()
  positions, _ = model.model.get_rope_index(
    tokens, kinds, image_grid_thw=grids, attention_mask=mask
  )
  return {
    "input_ids": tokens,
    "attention_mask": mask,
    "position_ids": positions,
    "pixel_values": torch.tensor(np.concatenate([i.patches for i in images])),
    "image_grid_thw": grids,
  }


def saved(model: Qwen2_5_VLForConditionalGeneration, path: Path) -> Path:
  model.save_pretrained(path)
  return path


def saved_gradients(model: Qwen2_5_VLForConditionalGeneration, path: str | os.PathLike) -> Path:
  """A checkpoint whose weights are the gradients: read back through the same name table."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter.grad)
  return saved(model, Path(path))
