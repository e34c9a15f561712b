"""The vision tower: patches in window order -> merged features in reading order.

One tower for both families: Qwen2.5-VL's has windows, RMS norms and gated MLPs; Qwen3-VL's has
neither, but learned positions and DeepStack (https://arxiv.org/abs/2406.04334): features of some
blocks, which the decoder adds after its first layers.

Axes: N images (one a row), P patches, K values of a patch, M = P / merge^2 merged units, E tower
width, H head width, D width of the language model, S DeepStack levels. Facts from transformers
5.24, modeling_qwen2_5_vl.py and modeling_qwen3_vl.py.
"""

import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pixelis_jax.model.config import VisionConfig
from pixelis_jax.model.layers import (
  REMAT,
  STATES,
  GatedMlp,
  LayerNorm,
  Linear,
  Mlp,
  Norm,
  attend,
  frequencies,
  gathered,
  rotate,
  stack,
  weight,
)
from pixelis_jax.model.layout import VisionInputs
from pixelis_jax.sharding import constrain

_NORM_EPS = 1e-6  # Fixed in the original; the config has no field for it.


class Attention(nnx.Module):
  """Bidirectional attention within segments."""

  def __init__(self, config: VisionConfig, *, mesh: Mesh | None, rngs: nnx.Rngs):
    E = config.width
    axes = ("embed", None, "heads")
    self.qkv = Linear((E, 3, E), axes, bias=True, rngs=rngs)
    self.proj = Linear((E, E), ("heads", "embed"), bias=True, rngs=rngs)
    self.heads, self.mesh = config.heads, mesh

  def __call__(
    self, x: Float[Array, "N P E"], angles: Float[Array, "N P J"], segments: Int[Array, "N P"]
  ) -> Float[Array, "N P E"]:
    N, P, E = x.shape
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(N, P, 3, self.heads, -1), 2, 0)
    q, k = rotate(q, angles), rotate(k, angles)
    out = attend(q, k, v, segments, segments, causal=False, mesh=self.mesh)
    return self.proj(out.reshape(N, P, E))


class Block(nnx.Module):
  def __init__(self, config: VisionConfig, *, mesh: Mesh | None, rngs: nnx.Rngs):
    axes, E = ("embed", "mlp"), config.width
    norm = LayerNorm if config.window is None else Norm
    self.norm1 = norm(E, "embed", eps=_NORM_EPS)
    self.attn = Attention(config, mesh=mesh, rngs=rngs)
    self.norm2 = norm(E, "embed", eps=_NORM_EPS)
    if config.window is None:
      self.mlp = Mlp(E, config.mlp_width, E, axes, config.activation, rngs=rngs)
    else:
      self.mlp = GatedMlp(E, config.mlp_width, axes, config.activation, bias=True, rngs=rngs)

  def __call__(
    self, x: Float[Array, "N P E"], angles: Float[Array, "N P J"], segments: Int[Array, "N P"]
  ) -> Float[Array, "N P E"]:
    x = x + self.attn(self.norm1(x), angles, segments)
    return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
  """merge^2 neighbouring patches, already contiguous, become one feature of the decoder's width.

  Each patch is normed before; a `late` merger norms the merged ones.
  """

  def __init__(self, config: VisionConfig, *, late: bool = False, rngs: nnx.Rngs):
    wide = config.width * config.merge_unit
    norm = LayerNorm if config.window is None else Norm
    self.norm = norm(wide if late else config.width, "embed", eps=_NORM_EPS)
    self.mlp = Mlp(wide, wide, config.out_width, ("embed", "mlp"), "gelu", rngs=rngs)
    self.unit, self.late = config.merge_unit, late

  def __call__(self, x: Float[Array, "N P E"]) -> Float[Array, "N M D"]:
    N, P, E = x.shape
    merge = lambda x: x.reshape(N, P // self.unit, E * self.unit)
    return self.mlp(self.norm(merge(x)) if self.late else merge(self.norm(x)))


class Tower(nnx.Module):
  def __init__(self, config: VisionConfig, *, mesh: Mesh | None = None, rngs: nnx.Rngs):
    new = config.window is None
    shape = (config.patch_values, config.width)
    self.patch = Linear(shape, ("patch", "embed"), bias=new, rngs=rngs)
    table = (config.position_side**2, config.width)
    self.table = weight(table, (None, "embed"), rngs) if config.position_side else None
    self.blocks = stack(config.depth, lambda rngs: Block(config, mesh=mesh, rngs=rngs), rngs)
    self.merger = Merger(config, rngs=rngs)
    build = lambda rngs: Merger(config, late=True, rngs=rngs)
    self.deep = stack(len(config.deepstack), build, rngs) if config.deepstack else None
    self.config, self.mesh = config, mesh

  def __call__(self, vision: VisionInputs, *, remat: str) -> Float[Array, "N M W"]:
    """W is `config.feature_width`: the feature, then its DeepStack levels side by side."""
    angles_NPJ = self.angles(jnp.asarray(vision.positions))
    segments = jnp.asarray(vision.window_segments), jnp.asarray(vision.frame_segments)
    graphdef, blocks = nnx.split(self.blocks)

    def body(carry, scanned):
      x_NPE, deep_SNPE = carry
      params, full, level = scanned
      block = nnx.merge(graphdef, gathered(params, self.mesh))
      x_NPE = block(x_NPE, angles_NPJ, jnp.where(full, segments[1], segments[0]))
      x_NPE = constrain(x_NPE, STATES, self.mesh)
      if self.deep is not None:  # A block without a level writes past the end, that is nowhere.
        deep_SNPE = deep_SNPE.at[level].set(x_NPE, mode="drop")
      return (x_NPE, deep_SNPE), None

    x_NPE = constrain(self.embed(vision), STATES, self.mesh)
    deep_SNPE = jnp.zeros((len(self.config.deepstack), *x_NPE.shape), x_NPE.dtype)
    scanned = blocks, self.full_attention(), self.levels()
    (x_NPE, deep_SNPE), _ = jax.lax.scan(REMAT[remat](body), (x_NPE, deep_SNPE), scanned)
    merged_NMW = jnp.concatenate([self.merger(x_NPE), *self.deepened(deep_SNPE)], axis=-1)
    return jnp.take_along_axis(merged_NMW, jnp.asarray(vision.inverse)[:, :, None], axis=1)

  def embed(self, vision: VisionInputs) -> Float[Array, "N P E"]:
    """Patches projected, each with its place in the learned table where there is one."""
    kernel = self.patch.kernel[...]
    x_NPE = self.patch(jnp.asarray(vision.patches).astype(kernel.dtype))
    if self.table is None:
      return x_NPE
    corners_NP4E = jnp.take(self.table[...], jnp.asarray(vision.corners), axis=0)
    shares_NP4 = jnp.asarray(vision.shares)
    places_NPE = jnp.einsum("npce,npc->npe", corners_NP4E.astype(jnp.float32), shares_NP4)
    return x_NPE + places_NPE.astype(x_NPE.dtype)

  def deepened(self, deep_SNPE: Float[Array, "S N P E"]) -> list[Float[Array, "N M D"]]:
    """Each level through its own merger."""
    if self.deep is None:
      return []
    graphdef, params = nnx.split(self.deep)
    one = lambda level: nnx.merge(graphdef, jax.tree.map(operator.itemgetter(level), params))
    return [one(level)(x_NPE) for level, x_NPE in enumerate(deep_SNPE)]

  def levels(self) -> Int[Array, " L"]:
    """The DeepStack level that each block's output becomes; the number of levels where none."""
    deepstack = self.config.deepstack
    level = lambda i: deepstack.index(i) if i in deepstack else len(deepstack)
    return jnp.asarray([level(i) for i in range(self.config.depth)], jnp.int32)

  def full_attention(self) -> Bool[Array, " L"]:
    """Which blocks attend within the whole frame; the others attend within their window."""
    full, depth = self.config.full_blocks, self.config.depth
    return jnp.asarray([self.config.window is None or i in full for i in range(depth)])

  def angles(self, positions: Int[Array, "N P 2"]) -> Float[Array, "N P J"]:
    """Half of the head's rotary pairs turn with the row, half with the column."""
    inverse = jnp.asarray(frequencies(self.config.head_width // 2, self.config.rope_theta))
    angles = positions.astype(jnp.float32)[..., None] * inverse[None, None, None, :]
    return angles.reshape(*positions.shape[:2], -1)
