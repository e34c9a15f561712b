"""The vision tower: patches in window order -> merged features in reading order.

Axes: N images (one a row), P patches, K values of a patch, M = P / merge^2 merged units, E tower
width, H head width, D width of the language model. Facts from transformers 5.23,
modeling_qwen2_5_vl.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import attention
from pixelis_jax.model.config import VisionConfig
from pixelis_jax.model.layers import ACTIVATION, GatedMlp, Linear, Norm, frequencies, rotate, stack
from pixelis_jax.model.layout import VisionInputs

_NORM_EPS = 1e-6  # Fixed in the original; the config has no field for it.


class Attention(nnx.Module):
  """Bidirectional attention within segments."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    E = config.width
    axes = ("embed", None, "heads")
    self.qkv = Linear((E, 3, E), axes, bias=True, rngs=rngs)
    self.proj = Linear((E, E), ("heads", "embed"), bias=True, rngs=rngs)
    self.heads = config.heads

  def __call__(
    self, x: Float[Array, "N P E"], angles: Float[Array, "N P J"], segments: Int[Array, "N P"]
  ) -> Float[Array, "N P E"]:
    N, P, E = x.shape
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(N, P, 3, self.heads, -1), 2, 0)
    out = attention(
      rotate(q, angles),
      rotate(k, angles),
      v,
      causal=False,
      q_segments=segments,
      kv_segments=segments,
    )
    return self.proj(out.reshape(N, P, E))


class Block(nnx.Module):
  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    axes = ("embed", "mlp")
    self.norm1 = Norm(config.width, "embed", eps=_NORM_EPS)
    self.attn = Attention(config, rngs=rngs)
    self.norm2 = Norm(config.width, "embed", eps=_NORM_EPS)
    self.mlp = GatedMlp(
      config.width, config.mlp_width, axes, config.activation, bias=True, rngs=rngs
    )

  def __call__(
    self, x: Float[Array, "N P E"], angles: Float[Array, "N P J"], segments: Int[Array, "N P"]
  ) -> Float[Array, "N P E"]:
    x = x + self.attn(self.norm1(x), angles, segments)
    return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
  """merge^2 neighbouring patches, already contiguous, become one feature of the decoder's width."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    wide = config.width * config.merge_unit
    self.norm = Norm(config.width, "embed", eps=_NORM_EPS)
    self.fc1 = Linear((wide, wide), ("embed", "mlp"), bias=True, rngs=rngs)
    self.fc2 = Linear((wide, config.out_width), ("mlp", "embed"), bias=True, rngs=rngs)
    self.unit = config.merge_unit

  def __call__(self, x: Float[Array, "N P E"]) -> Float[Array, "N M D"]:
    N, P, E = x.shape
    merged = self.norm(x).reshape(N, P // self.unit, E * self.unit)
    return self.fc2(ACTIVATION["gelu"](self.fc1(merged)))


class Tower(nnx.Module):
  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    axes = ("patch", "embed")
    self.patch = Linear((config.patch_values, config.width), axes, bias=False, rngs=rngs)
    self.blocks = stack(config.depth, lambda rngs: Block(config, rngs=rngs), rngs)
    self.merger = Merger(config, rngs=rngs)
    self.config = config

  def __call__(self, vision: VisionInputs, *, remat: bool) -> Float[Array, "N M D"]:
    angles_NPJ = self.angles(jnp.asarray(vision.positions))
    segments = jnp.asarray(vision.window_segments), jnp.asarray(vision.frame_segments)
    graphdef, blocks = nnx.split(self.blocks)

    def body(x_NPE, scanned):
      params, full = scanned
      block = nnx.merge(graphdef, params)
      return block(x_NPE, angles_NPJ, jnp.where(full, segments[1], segments[0])), None

    kernel = self.patch.kernel[...]
    x_NPE = self.patch(jnp.asarray(vision.patches).astype(kernel.dtype))
    step = jax.checkpoint(body) if remat else body
    x_NPE, _ = jax.lax.scan(step, x_NPE, (blocks, self.full_attention()))
    merged_NMD = self.merger(x_NPE)
    return jnp.take_along_axis(merged_NMD, jnp.asarray(vision.inverse)[:, :, None], axis=1)

  def full_attention(self) -> Bool[Array, " L"]:
    """Which blocks attend within the whole frame; the others attend within their window."""
    return jnp.asarray([i in self.config.full_blocks for i in range(self.config.depth)])

  def angles(self, positions: Int[Array, "N P 2"]) -> Float[Array, "N P J"]:
    """Half of the head's rotary pairs turn with the row, half with the column."""
    inverse = jnp.asarray(frequencies(self.config.head_width // 2, self.config.rope_theta))
    angles = positions.astype(jnp.float32)[..., None] * inverse[None, None, None, :]
    return angles.reshape(*positions.shape[:2], -1)
