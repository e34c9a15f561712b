"""The language model: Qwen2 and Qwen3 decoder layers under multimodal rotary positions (m-RoPE).

Axes: B rows, T query tokens, S cached tokens, D width, N query heads, K key heads, H head width,
J = H / 2 rotary pairs, L layers, F feature rows, W their width (D, and D for each DeepStack
level). Facts from transformers 5.24, modeling_qwen2_5_vl.py, modeling_qwen3_vl.py and
modeling_qwen3.py.
"""

from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kernels.attention import attention
from kernels.decode_attention import Prompts, decode_attention
from kernels.tiles import visible
from pixelis_jax.model.config import TextConfig
from pixelis_jax.model.layers import GatedMlp, Linear, Norm, frequencies, rotate, stack, weight


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
  def empty(cls, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> "Cache":
    """Nothing written yet; `shape` is (L, B, S, K, H)."""
    return cls(
      keys=jnp.zeros(shape, dtype),
      values=jnp.zeros(shape, dtype),
      segments=jnp.zeros(shape[1:3], jnp.int32),
      end=jnp.zeros((), jnp.int32),
    )

  def share(self, index: Int[Array, " G"], *, copies: int, capacity: int) -> "Cache":
    """Each of these rows as the prompt of `copies` new ones, with room for `capacity` slots."""
    L, _, _, K, H = self.keys.shape
    heads_first = lambda x: jnp.take(x, index, axis=1).swapaxes(2, 3)
    segments = jnp.take(self.segments, index, axis=0)
    shared = Shared(heads_first(self.keys), heads_first(self.values), segments)
    new = Cache.empty((L, len(index) * copies, capacity, K, H), self.keys.dtype)
    return new.replace(shared=shared)

  def gather(self, index: Int[Array, " B"], *, capacity: int) -> "Cache":
    """These rows, each with its own copy of its prompt, and room for `capacity` slots."""
    taken = [jnp.take(x, index, axis=1) for x in (self.keys, self.values)]
    segments, end = jnp.take(self.segments, index, axis=0), self.end
    if self.shared is not None:
      prompt = index // (self.segments.shape[0] // self.shared.segments.shape[0])
      before = lambda x: jnp.take(x, prompt, axis=1).swapaxes(2, 3)
      prompts = before(self.shared.keys), before(self.shared.values)
      taken = [jnp.concatenate(pair, axis=2) for pair in zip(prompts, taken, strict=True)]
      segments = jnp.concatenate([jnp.take(self.shared.segments, prompt, axis=0), segments], axis=1)
      end = self.length
    room = (0, max(capacity - segments.shape[1], 0))
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), room, (0, 0), (0, 0))) for x in taken)
    return Cache(keys=keys, values=values, segments=jnp.pad(segments, ((0, 0), room)), end=end)

  @property
  def length(self) -> Int[Array, ""]:
    """Slots a row takes by itself."""
    return self.end + (0 if self.shared is None else self.shared.segments.shape[1])


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
  def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
    self.embedding = weight((config.vocab_size, config.width), ("vocab", "embed"), rngs)
    self.layers = stack(config.layers, lambda rngs: Layer(config, rngs=rngs), rngs)
    self.norm = Norm(config.width, "embed", eps=config.norm_eps)
    self.config = config

  def embed(
    self,
    tokens: Int[Array, "B T"],
    features: Float[Array, "F W"],
    sources: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """Row `sources[b, t]` of `features` where that is not negative, else the token's embedding."""
    x_BTD = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
    if features.shape[0] == 0:
      return x_BTD
    shown_BTD = self.shown(features, sources, 0).astype(x_BTD.dtype)
    return jnp.where((sources >= 0)[:, :, None], shown_BTD, x_BTD)

  def shown(
    self, features: Float[Array, "F W"], sources: Int[Array, "B T"], part: int | Int[Array, ""]
  ) -> Float[Array, "B T D"]:
    """Part 0 of a feature enters the decoder, part i + 1 is added after layer i."""
    parts_FSD = features.reshape(features.shape[0], -1, self.config.width)
    part_FD = jax.lax.dynamic_index_in_dim(parts_FSD, part, axis=1, keepdims=False)
    return jnp.take(part_FD, sources, axis=0, mode="clip")

  def deepen(
    self,
    x_BTD: Float[Array, "B T D"],
    features: Float[Array, "F W"],
    sources: Int[Array, "B T"],
    layer: Int[Array, ""],
  ) -> Float[Array, "B T D"]:
    """What a layer gives, and at image tokens its DeepStack level where there is one."""
    levels = features.shape[1] // self.config.width - 1
    if levels == 0 or features.shape[0] == 0:
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
    features: Float[Array, "F W"],
    sources: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    remat: bool,
  ) -> Float[Array, "B T D"]:
    """Whole sequences at once, causal within a row's segments."""
    angles_BTJ = self.angles(positions)
    graphdef, layers = nnx.split(self.layers)

    def body(x, scanned):
      params, index = scanned
      layer = nnx.merge(graphdef, params)
      q, k, v = layer.attn.project(layer.norm1(x), angles_BTJ)
      seen = attention(q, k, v, causal=True, q_segments=segments, kv_segments=segments)
      x = layer.feed(x + layer.attn.output(seen))
      return self.deepen(x, features, sources, index), None

    x_BTD = self.embed(tokens, features, sources)
    step = jax.checkpoint(body) if remat else body
    x_BTD, _ = jax.lax.scan(step, x_BTD, (layers, self.indices()))
    return self.norm(x_BTD)

  def extend(
    self,
    cache: Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    features: Float[Array, "F W"],
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
      layer = nnx.merge(graphdef, params)
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
        seen = decode_attention(q[:, 0], k_all, v_all, own, prompts)[:, None]
      else:
        at = {"q_segments": segments, "kv_segments": kv_segments, "q_offset": cache.end}
        seen = attention(q, k_all, v_all, causal=True, **at)
      x = layer.feed(x + layer.attn.output(seen))
      return (self.deepen(x, features, sources, index), keys, values), None

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

  def indices(self) -> Int[Array, " L"]:
    return jnp.arange(self.config.layers, dtype=jnp.int32)
