"""The language model: Qwen2, Qwen3 and Llama layers under multimodal rotary positions (m-RoPE).

Axes: B rows, T query tokens, S cached tokens, D width, N query heads, K key heads, H head width,
J = H / 2 rotary pairs, L layers, F feature rows, W their width (D, and D for each DeepStack
level). Facts from transformers 5.24, modeling_qwen2_5_vl.py, modeling_qwen3_vl.py,
modeling_qwen3.py and modeling_llama.py.
"""

from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels.decode_attention import Prompts, decode_attention
from kernels.tiles import visible
from pixelis_jax.model.config import TextConfig
from pixelis_jax.model.layers import (
  KEYS,
  REMAT,
  STATES,
  GatedMlp,
  Linear,
  Norm,
  attend,
  frequencies,
  gathered,
  rotate,
  stack,
  used,
  weight,
)
from pixelis_jax.sharding import constrain, local, row_blocks


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class Shared:
  """G prompts of P tokens before the slots of a cache, each seen by B / G rows in turn.

  Head-major, as `decode_attention` reads them.
  """

  keys: Float[Array, "L G K P H"]
  values: Float[Array, "L G K P H"]
  segments: Int[Array, "G P"]

  def of(self, layer: Int[Array, ""], dtype: DTypeLike) -> Prompts:
    """What one layer's queries see of them, in their dtype."""
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(dtype)
    return Prompts(pick(self.keys), pick(self.values), self.segments != 0)


@no_type_check
@flax.struct.dataclass
class Cache:
  """Keys and values already turned; slot s of every row was written by the same call.

  `segments` 0 marks a slot that nobody may see (empty, or that row's padding); `end` is the next
  slot to write, shared by all rows. With `shared` prompts in front, rows grow token by token.
  """

  keys: Float[Array, "L B S K H"]
  values: Float[Array, "L B S K H"]
  segments: Int[Array, "B S"]
  end: Int[Array, ""]
  shared: Shared | None = None

  @classmethod
  def empty(
    cls, shape: tuple[int, int, int, int, int], dtype: DTypeLike, mesh: Mesh | None = None
  ) -> "Cache":
    """Nothing written yet; `shape` is (L, B, S, K, H)."""
    return cls(
      keys=jnp.zeros(shape, dtype),
      values=jnp.zeros(shape, dtype),
      segments=jnp.zeros(shape[1:3], jnp.int32),
      end=jnp.zeros((), jnp.int32),
    ).constrained(mesh)

  def constrained(self, mesh: Mesh | None) -> "Cache":
    """In a jitted function: rows and heads held to where the mesh has them."""
    hold = lambda axes, *arrays: (constrain(x, axes, mesh) for x in arrays)
    keys, values = hold((None, *KEYS), self.keys, self.values)
    (segments,) = hold(("batch", None), self.segments)
    shared = self.shared
    if shared is not None:
      before = hold((None, "batch", "kv_heads", None, None), shared.keys, shared.values)
      shared = Shared(*before, *hold(("batch", None), shared.segments))
    return Cache(keys, values, segments, self.end, shared)

  def share(
    self, index: Int[Array, " G"], *, copies: int, capacity: int, mesh: Mesh | None = None
  ) -> "Cache":
    """Each of these rows as the prompt of `copies` new ones, with room for `capacity` slots.

    `index` counts from the start of each row's own block of the mesh.
    """
    L, _, _, K, H = self.keys.shape
    blocks = row_blocks(mesh)
    heads_first = lambda x: rows_of(x, index, 1, blocks).swapaxes(2, 3)
    segments = rows_of(self.segments, index, 0, blocks)
    shared = Shared(heads_first(self.keys), heads_first(self.values), segments)
    new = Cache.empty((L, len(index) * copies, capacity, K, H), self.keys.dtype)
    return new.replace(shared=shared).constrained(mesh)

  def gather(self, index: Int[Array, " B"], *, capacity: int, mesh: Mesh | None = None) -> "Cache":
    """These rows, each with its own copy of its prompt, and room for `capacity` slots.

    `index` as for `share`.
    """
    blocks = row_blocks(mesh)
    taken = [rows_of(x, index, 1, blocks) for x in (self.keys, self.values)]
    segments, end = rows_of(self.segments, index, 0, blocks), self.end
    if self.shared is not None:
      prompt = index // (self.segments.shape[0] // self.shared.segments.shape[0])
      before = lambda x: rows_of(x, prompt, 1, blocks).swapaxes(2, 3)
      prompts = before(self.shared.keys), before(self.shared.values)
      taken = [jnp.concatenate(pair, axis=2) for pair in zip(prompts, taken, strict=True)]
      prompt_segments = rows_of(self.shared.segments, prompt, 0, blocks)
      segments = jnp.concatenate([prompt_segments, segments], axis=1)
      end = self.length
    room = (0, max(capacity - segments.shape[1], 0))
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), room, (0, 0), (0, 0))) for x in taken)
    return Cache(keys, values, jnp.pad(segments, ((0, 0), room)), end).constrained(mesh)

  @property
  def length(self) -> Int[Array, ""]:
    """Slots a row takes by itself."""
    return self.end + (0 if self.shared is None else self.shared.segments.shape[1])


def rows_of(x: Array, index: Int[Array, " B"], axis: int, blocks: int) -> Array:
  """Rows of x along an axis; in each of the equal blocks of both, `index` counts from its start.

  So no block needs another's rows, and where each lies on a device of its own nothing is sent.
  """
  split = lambda x, axis: x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
  take = jax.vmap(lambda x, i: jnp.take(x, i, axis=axis), in_axes=(axis, 0), out_axes=axis)
  taken = take(split(x, axis), split(index, 0))
  return taken.reshape(*x.shape[:axis], len(index), *x.shape[axis + 1 :])


class Attention(nnx.Module):
  """Causal attention with grouped query heads.

  Qwen2.5 has biases on q, k and v; Qwen3 norms each head of q and k instead.
  """

  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
    D, H, bias = config.width, config.head_width, config.qkv_bias
    N, K = config.heads * H, config.kv_heads * H
    self.q = Linear((D, N), ("embed", "heads"), bias=bias, rngs=rngs)
    self.k = Linear((D, K), ("embed", "kv_heads"), bias=bias, rngs=rngs)
    self.v = Linear((D, K), ("embed", "kv_heads"), bias=bias, rngs=rngs)
    self.o = Linear((N, D), ("heads", "embed"), bias=False, rngs=rngs)
    norm = lambda: Norm(H, None, eps=config.norm_eps) if config.qk_norm else None
    self.q_norm, self.k_norm = norm(), norm()
    self.head_width = H

  def project(
    self, x: Float[Array, "B T D"], angles: Float[Array, "B T J"]
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """(q, k, v), q and k turned to their positions."""
    q, k, v = (
      y.reshape(*x.shape[:2], -1, self.head_width) for y in (self.q(x), self.k(x), self.v(x))
    )
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    return rotate(q, angles), rotate(k, angles), v

  def output(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    return self.o(x.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
    self.norm1 = Norm(config.width, "embed", eps=config.norm_eps)
    self.attn = Attention(config, rngs=rngs)
    self.norm2 = Norm(config.width, "embed", eps=config.norm_eps)
    self.mlp = GatedMlp(
      config.width, config.mlp_width, ("embed", "mlp"), config.activation, bias=False, rngs=rngs
    )

  def feed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x + self.mlp(self.norm2(x))


class Decoder(nnx.Module):
  def __init__(self, config: TextConfig, *, mesh: Mesh | None = None, rngs: nnx.Rngs):
    self.embedding = weight((config.vocab_size, config.width), ("vocab", "embed"), rngs)
    self.layers = stack(config.layers, lambda rngs: Layer(config, rngs=rngs), rngs)
    self.norm = Norm(config.width, "embed", eps=config.norm_eps)
    self.config, self.mesh = config, mesh

  def embed(
    self,
    tokens: Int[Array, "B T"],
    features: Float[Array, "X F W"],
    sources: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """Row `sources[b, t]` of its block's features where not negative, else the embedding."""
    table_VD = used(self.embedding[...], ("vocab", "embed"), self.mesh)
    x_BTD = jnp.take(table_VD, tokens, axis=0, mode="clip")
    if features.shape[1] > 0:
      shown_BTD = self.shown(features, sources, 0).astype(x_BTD.dtype)
      x_BTD = jnp.where((sources >= 0)[:, :, None], shown_BTD, x_BTD)
    return constrain(x_BTD, STATES, self.mesh)

  def shown(
    self, features: Float[Array, "X F W"], sources: Int[Array, "B T"], part: int | Int[Array, ""]
  ) -> Float[Array, "B T D"]:
    """Part 0 of a feature enters the decoder, part i + 1 is added after layer i."""
    X, F, _ = features.shape
    parts_XFSD = features.reshape(X, F, -1, self.config.width)
    part_XFD = jax.lax.dynamic_index_in_dim(parts_XFSD, part, axis=2, keepdims=False)
    own = jax.vmap(lambda part, rows: jnp.take(part, rows, axis=0, mode="clip"))
    return own(part_XFD, sources.reshape(X, -1)).reshape(*sources.shape, -1)

  def deepen(
    self,
    x_BTD: Float[Array, "B T D"],
    features: Float[Array, "X F W"],
    sources: Int[Array, "B T"],
    layer: Int[Array, ""],
  ) -> Float[Array, "B T D"]:
    """What a layer gives, and at image tokens its DeepStack level where there is one."""
    levels = features.shape[2] // self.config.width - 1
    if levels == 0 or features.shape[1] == 0:
      return x_BTD

    def add(x):
      level = self.shown(features, sources, layer + 1).astype(x.dtype)
      return x + jnp.where((sources >= 0)[:, :, None], level, 0)

    return jax.lax.cond(layer < levels, add, lambda x: x, x_BTD)

  def angles(self, positions: Int[Array, "B 3 T"]) -> Float[Array, "B T J"]:
    """Rotary pair j turns with the axis (t, h or w) whose section of `mrope_section` holds j."""
    axis_J = np.array(self.config.rotary_axes)
    inverse_J = jnp.asarray(frequencies(self.config.head_width, self.config.rope_theta))
    turned_BTJ = positions.swapaxes(1, 2)[:, :, axis_J].astype(jnp.float32)
    return turned_BTJ * inverse_J[None, None, :]

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    features: Float[Array, "X F W"],
    sources: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    remat: str,
  ) -> Float[Array, "B T D"]:
    """Whole sequences at once, causal within a row's segments."""
    angles_BTJ = self.angles(positions)
    graphdef, layers = nnx.split(self.layers)

    def body(x, scanned):
      params, index = scanned
      layer = nnx.merge(graphdef, gathered(params, self.mesh))
      q, k, v = layer.attn.project(layer.norm1(x), angles_BTJ)
      seen = attend(q, k, v, segments, segments, causal=True, mesh=self.mesh)
      x = layer.feed(x + layer.attn.output(seen))
      x = self.deepen(x, features, sources, index)
      return constrain(x, STATES, self.mesh), None

    x_BTD = self.embed(tokens, features, sources)
    x_BTD, _ = jax.lax.scan(REMAT[remat](body), x_BTD, (layers, self.indices()))
    return self.norm(x_BTD)

  def extend(
    self,
    cache: Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    features: Float[Array, "X F W"],
    sources: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    apart: Sequence[dict] | None = None,
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """T more tokens a row, written to slots [end, end + T) and attending to all slots so far.

    With `apart`, each layer's weights by themselves, the layers follow each other unscanned.
    """
    angles_BTJ = self.angles(positions)
    graphdef, layers = nnx.split(self.layers)
    zero = jnp.zeros_like(cache.end)
    single = tokens.shape[1] == 1
    if cache.shared is not None and not single:
      raise ValueError(
        f"rows that share prompts grow by one token, not {tokens.shape[1]}: gather them"
      )
    kv_segments = jax.lax.dynamic_update_slice(cache.segments, segments, (zero, cache.end))

    # The whole cache is carried, not scanned over: the loop then writes T slots in place.
    def body(carry, scanned):
      x, keys, values = carry
      params, index = scanned
      layer = nnx.merge(graphdef, params if apart else gathered(params, self.mesh))
      q, k, v = layer.attn.project(layer.norm1(x), angles_BTJ)
      at = (index, zero, cache.end, zero, zero)
      keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at)
      values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at)
      k_all, v_all = (
        jax.lax.dynamic_index_in_dim(x, index, keepdims=False).astype(q.dtype)
        for x in (keys, values)
      )
      if single:
        own = visible(True, segments, kv_segments, cache.end)[:, 0]
        prompts = None if cache.shared is None else cache.shared.of(index, q.dtype)
        seen = self.attend_one(q[:, 0], k_all, v_all, own, prompts)[:, None]
      else:
        at = q, k_all, v_all, segments, kv_segments, cache.end
        seen = attend(*at, causal=True, mesh=self.mesh)
      x = layer.feed(x + layer.attn.output(seen))
      x = self.deepen(x, features, sources, index)
      return (constrain(x, STATES, self.mesh), keys, values), None

    carry = (self.embed(tokens, features, sources), cache.keys, cache.values)
    if apart is None:
      carry, _ = jax.lax.scan(body, carry, (layers, self.indices()))
    else:
      for index, layer in enumerate(apart):
        carry, _ = body(carry, (layer, jnp.asarray(index, jnp.int32)))
    x_BTD, keys, values = carry
    end = cache.end + jnp.asarray(tokens.shape[1], cache.end.dtype)
    written = cache.replace(keys=keys, values=values, segments=kv_segments, end=end)
    return self.norm(x_BTD), written

  def attend_one(
    self,
    q: Float[Array, "B N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "B S"],
    prompts: Prompts | None,
  ) -> Float[Array, "B N H"]:
    """`kernels.decode_attention`, each device on its own rows and heads."""
    shared, rows = ("batch", "kv_heads", None, None), ("batch", None)
    queries = ("batch", "heads", None)
    inputs = [queries, KEYS, KEYS, rows, *((shared, shared, rows) if prompts else ())]
    own = lambda q, k, v, seen, *of: decode_attention(q, k, v, seen, Prompts(*of) if of else None)
    return local(own, inputs, queries, self.mesh)(q, k, v, seen, *(prompts or ()))

  def indices(self) -> Int[Array, " L"]:
    return jnp.arange(self.config.layers, dtype=jnp.int32)
