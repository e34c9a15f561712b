"""What the policy computes, in floating point operations, counted from its shapes.

A multiplication and an addition are two. Counted are products with weights and those of attention,
as model FLOPs utilisation does (https://arxiv.org/abs/2204.02311, appendix B); norms, rotations and
softmax are not. XLA's own count takes a scanned layer for one.
"""

import dataclasses

from kernels.chips import CHIPS
from pixelis_jax.model.config import ModelConfig, TextConfig, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A pass forward: how many of what, padding left out.

  `pairs` are (query, key) pairs that attention looks at; `words` tokens whose logits are computed;
  `patch_pairs` and `window_pairs` those of the tower's full and windowed blocks.
  """

  tokens: int = 0
  pairs: int = 0
  words: int = 0
  patches: int = 0
  patch_pairs: int = 0
  window_pairs: int = 0


def decoding(config: TextConfig, work: Work) -> int:
  """Of the decoder and its head."""
  D, H = config.width, config.head_width
  heads, kv_heads = config.heads * H, config.kv_heads * H
  layer = D * (2 * heads + 2 * kv_heads) + 3 * D * config.mlp_width
  products = config.layers * layer * work.tokens + D * config.vocab_size * work.words
  return 2 * products + 4 * config.layers * heads * work.pairs


def seeing(config: VisionConfig, work: Work) -> int:
  """Of the tower, its mergers included."""
  E, wide = config.width, config.width * config.merge_unit
  mlps = 2 if config.window is None else 3
  block = 4 * E * E + mlps * E * config.mlp_width
  mergers = (1 + len(config.deepstack)) * (wide * wide + wide * config.out_width)
  once = config.patch_values * E
  products = (
    work.patches * (config.depth * block + once) + work.patches // config.merge_unit * mergers
  )
  full = config.depth if config.window is None else len(config.full_blocks)
  pairs = full * work.patch_pairs + (config.depth - full) * work.window_pairs
  return 2 * products + 4 * E * pairs


def forward(config: ModelConfig, work: Work) -> int:
  """Of a pass forward."""
  return update(config, work, text=1, visual=1)


def update(config: ModelConfig, work: Work, *, text: int = 3, visual: int = 3) -> int:
  """Of a pass forward and back: that of the decoder so many times, and that of the tower.

  Back through a layer are two products for each of the pass forward: the gradient of what it read,
  and that of its weights. What is computed again to save memory is no work.
  """
  tower = 0 if config.vision is None else seeing(config.vision, work)
  return text * decoding(config.text, work) + visual * tower


def peak(kind: str) -> float | None:
  """bfloat16 operations a second of a chip, by JAX's name for it; None of one not in CHIPS."""
  rates = (chip.rate for chip in CHIPS.values() if kind in chip.kinds)
  return next(rates, None)
