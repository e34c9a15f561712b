"""The policy as pure functions of a parameter tree: Qwen2.5-VL, Qwen3-VL, text-only Qwen3 or Llama.

The Flax NNX modules of `vision.py` and `decoder.py` declare the weights; they are split once, here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Float, Float32, Int, PRNGKeyArray

from kernels import token_logps as kernel
from kernels.attention import preferred_backend
from pixelis_jax.model import int8 as quantised
from pixelis_jax.model import lora as adapters
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.decoder import Cache, Decoder
from pixelis_jax.model.layers import REMAT, STATES, used, weight
from pixelis_jax.model.layout import VisionInputs
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.model.vision import Tower
from pixelis_jax.sharding import constrain, local, parts, row_blocks, shardings

Params: TypeAlias = dict  # Nested dict of arrays; layers and blocks are stacked on a leading axis.


class _Modules(nnx.Module):
  def __init__(self, config: ModelConfig, *, mesh: Mesh | None, rngs: nnx.Rngs):
    text = config.text
    self.visual = None if config.vision is None else Tower(config.vision, mesh=mesh, rngs=rngs)
    self.text = Decoder(text, mesh=mesh, rngs=rngs)
    shape = (text.vocab_size, text.width)
    self.head = None if text.tied else weight(shape, ("vocab", "embed"), rngs)


@dataclasses.dataclass(frozen=True)
class Model:
  """The policy's functions. Hashable, so it may be a static argument or closed over by a jit.

  `remat`, one of `layers.REMAT`, is what the backward pass of `encode` and `hidden` computes again
  in place of keeping it. With `lora` the parameters hold adapters, see lora.py; these are float32
  in every dtype. With `int8` the layers' kernels are int8, see int8.py: such parameters are
  loaded, neither initialised nor saved.

  With a `mesh` arrays lie as sharding.py says: parameters as `shardings`, rows of a batch in
  `blocks` equal parts. ValueError where its tensor axis does not divide the heads.
  """

  config: ModelConfig
  remat: str = "nothing"
  lora: LoraConfig | None = None
  int8: bool = False
  mesh: Mesh | None = None
  graphdef: nnx.GraphDef = dataclasses.field(init=False, repr=False)
  keyed_graphdef: nnx.GraphDef = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    self._check()
    graphdef, _ = self._abstract()
    keyed = graphdef if self.lora is None else self._abstract(keys=True)[0]
    object.__setattr__(self, "graphdef", graphdef)
    object.__setattr__(self, "keyed_graphdef", keyed)

  def init(self, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Params:
    """Random weights (normal, std 0.1 for embeddings and fan_in^-0.5 else), biases zero."""
    assert not self.int8, "int8 weights come from `load`, not from a random draw"
    return _initialise(self, jnp.dtype(dtype))(key)

  def adapt(self, params: Params, key: PRNGKeyArray) -> Params:
    """The parameters of the model without `lora`, and fresh adapters that change no output yet."""
    return adapters.join(params, _fresh(self)(key))

  def shapes(self, dtype: DTypeLike = jnp.float32) -> Params:
    """What `init` returns, as `jax.ShapeDtypeStruct`s."""
    _, state = self._abstract()
    pure = nnx.to_pure_dict(state)
    described = lambda path, x: jax.ShapeDtypeStruct(x.shape, _kept(path, dtype, x.dtype))
    return jax.tree_util.tree_map_with_path(described, pure)

  def axes(self) -> Params:
    """The logical axis names of each weight, a tuple in place of each array of `init`."""
    _, state = self._abstract()
    named = {path: variable.get_metadata("axes") for path, variable in nnx.to_flat_state(state)}
    return nnx.traversals.unflatten_mapping(named)

  def shardings(self) -> Params | None:
    """Where each weight lies; None without a mesh."""
    return None if self.mesh is None else shardings(self.axes(), self.shapes(), self.mesh)

  @property
  def blocks(self) -> int:
    """Equal parts in which the rows of a batch lie, and the images that they show with them."""
    return row_blocks(self.mesh)

  def encode(self, params: Params, vision: VisionInputs) -> Float[Array, "N M W"]:
    """Image features in reading order, M = P / merge^2 a row; what follows an image is noise.

    W is `config.feature_width`: the decoder's width, and as much again for each DeepStack level.
    Raises ValueError if the model is text-only.
    """
    if self.config.vision is None:
      raise ValueError(f"a {self.config.family} model has no vision tower to encode images with")
    features = self._modules(params).visual(vision, remat=self.remat)
    return constrain(features, STATES, self.mesh)

  def hidden(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    features: Float[Array, "X F W"],
    sources: Int[Array, "B T"],
    segments: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """Final, normed hidden states of whole rows: a token sees the earlier ones of its segment.

    `features` are all images' of each of X equal blocks of rows, flat; F may be 0. `sources` is the
    row of its block's features that an image token stands for and -1 elsewhere; segment 0 is
    padding, whose outputs mean nothing.
    """
    text = self._modules(params).text
    return text(tokens, positions, features, sources, segments, remat=self.remat)

  def init_cache(self, rows: int, capacity: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache of `capacity` slots a row."""
    text = self.config.text
    shape = (text.layers, rows, capacity, text.kv_heads, text.head_width)
    return Cache.empty(shape, dtype, self.mesh)

  def extend(
    self,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    features: Float[Array, "X F W"],
    sources: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    apart: tuple[Params, ...] | None = None,
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Prefill and decode in one: T slots written at `cache.end` for all rows, then attended.

    Arguments as for `hidden`; `apart` may be what `apart` gives for these parameters. The caller
    keeps end + T <= capacity: a write past it would be moved back over older slots. Donate the
    cache, or carry it in a loop, so that it is updated in place.
    Raises ValueError if T alone exceeds the capacity.
    """
    if tokens.shape[1] > cache.segments.shape[1]:
      raise ValueError(f"{tokens.shape[1]} tokens do not fit {cache.segments.shape[1]} slots")
    text = self._modules(params).text
    return text.extend(cache, tokens, positions, features, sources, segments, apart)

  def apart(self, params: Params) -> tuple[Params, ...] | None:
    """Each decoder layer's weights by themselves, for a loop of `extend`; None where it is no use.

    A scan takes a layer's weights out of the stack at each token. XLA's CPU backend copies them
    for that: as much memory traffic again as the few rows of a decoding step need. Elsewhere a scan
    keeps the program as small as one layer.
    """
    if jax.default_backend() != "cpu" or self.mesh is not None and self.mesh.size > 1:
      return None
    layers = params["text"]["layers"]
    pick = lambda i: jax.tree.map(lambda x: x[i], layers)
    return tuple(pick(i) for i in range(self.config.text.layers))

  def head(self, params: Params) -> Float[Array, "V D"]:
    """The output projection: logits are hidden @ head.T. The embedding itself when tied."""
    return params["text"]["embedding"] if self.config.text.tied else params["head"]

  def token_logps(
    self,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
  ) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """(log p(target), entropy in nats), where `hidden[b, t]` predicts `targets[b, t]`.

    By `kernels.token_logps`: the [B, T, V] logits never exist at once.
    """
    head = used(self.head(params), ("vocab", "embed"), self.mesh)
    score = functools.partial(kernel.token_logps, temperature=temperature)
    own = local(score, (("batch",), (), ("batch",)), ("batch",), self.mesh, rows_only=True)
    return own(hidden, head, targets)

  def embedding(self, params: Params) -> Float[Array, "V D"]:
    """The table that turns token ids into the decoder's input."""
    return params["text"]["embedding"]

  def _check(self) -> None:
    if self.remat not in REMAT:
      raise ValueError(f"remat {self.remat!r} must be one of {tuple(REMAT)}")
    tensor, text, vision = parts("heads", self.mesh), self.config.text, self.config.vision
    heads = {"text_config.num_key_value_heads": text.kv_heads}
    if vision is not None:
      heads["vision_config.num_heads"] = vision.heads
    for name, count in heads.items():
      if count % tensor:
        raise ValueError(f"mesh tensor={tensor} must divide {name}={count}")

  def _modules(self, params: Params) -> _Modules:
    keyed = self.lora is not None and adapters.is_keyed(params)
    return nnx.merge(self.keyed_graphdef if keyed else self.graphdef, params)

  def _abstract(self, *, keys: bool = False) -> tuple[Any, Any]:
    return _abstract(self.config, self.lora, self.int8, self.mesh, keys)


@functools.lru_cache(maxsize=16)
def _initialise(model: Model, dtype: jnp.dtype) -> Callable[[PRNGKeyArray], Params]:
  """`Model.init`, compiled once."""

  def build(key: PRNGKeyArray) -> Params:
    _, state = nnx.split(_build(nnx.Rngs(key), model.config, model.lora, False, model.mesh))
    cast = lambda path, x: x.astype(_kept(path, dtype, x.dtype))
    return jax.tree_util.tree_map_with_path(cast, nnx.to_pure_dict(state))

  return jax.jit(build, out_shardings=model.shardings())


@functools.lru_cache(maxsize=16)
def _fresh(model: Model) -> Callable[[PRNGKeyArray], Params]:
  """The adapters of `Model.init` alone, compiled once."""
  return jax.jit(lambda key: adapters.adapters(model.init(key)))


@functools.lru_cache(maxsize=64)
def _abstract(
  config: ModelConfig, lora: LoraConfig | None, int8: bool, mesh: Mesh | None, keys: bool
) -> tuple[Any, Any]:
  """(graph definition, state) without arrays; kept, as tracing takes a quarter of a second."""
  return nnx.split(nnx.eval_shape(lambda: _build(nnx.Rngs(0), config, lora, int8, mesh, keys)))


def _build(
  rngs: nnx.Rngs,
  config: ModelConfig,
  lora: LoraConfig | None,
  int8: bool,
  mesh: Mesh | None,
  keys: bool = False,
) -> _Modules:
  modules = _Modules(config, mesh=mesh, rngs=rngs)
  if int8:
    quantised.attach(modules)
  if lora is not None:
    adapters.attach(modules, lora, rngs=rngs, keys=keys)
  return modules


def attention_backend(dtype: DTypeLike) -> str:
  """What computes attention over weights of this dtype here, heads as wide as Qwen's."""
  return preferred_backend(jnp.dtype(dtype), 128)


def _kept(path: tuple, dtype: DTypeLike, built: DTypeLike) -> DTypeLike:
  """The dtype of a weight. int8 and its scales keep the one they are built with.

  So do adapters: bfloat16 would round the small steps of training away.
  """
  name = path[-1].key
  fixed = built == jnp.int8 or name == "kernel_scale" or name.startswith("lora_")
  return built if fixed else dtype
