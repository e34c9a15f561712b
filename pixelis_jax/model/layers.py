"""Weights with logical axis names, and the few layers that tower and decoder share.

A weight's names are nnx metadata `axes`; `Model.axes` collects them and `sharding` resolves them.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from kernels.attention import attention, preferred_backend
from pixelis_jax.sharding import local, shardings, whole

Axes: TypeAlias = tuple[str | None, ...]

# The names are those of Hugging Face's ACT2FN: "gelu" is the exact one.
ACTIVATION = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
}
EMBEDDING_STD = 0.1
# What a layer's backward pass computes again: nothing, all but the products with weights, or all.
REMAT: dict[str, Callable[[Callable], Callable]] = {
  "nothing": lambda body: body,
  "products": functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
  "layers": jax.checkpoint,
}
# Logical axes of what flows through layers, and of [B, T, N, H] and [B, S, K, H] in attention.
STATES: Axes = ("batch", None, None)
QUERIES: Axes = ("batch", None, "heads", None)
KEYS: Axes = ("batch", None, "kv_heads", None)


def weight(
  shape: tuple[int, ...], axes: Axes, rngs: nnx.Rngs, *, std: float = EMBEDDING_STD
) -> nnx.Param:
  """Normal around 0; the default deviation is that of embeddings."""
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
  """y = x W + b; W is [in, ...], and y has its output axes.

  `lora.attach` may add an adapter, whose share is added to y; `int8.attach` makes W int8.
  """

  def __init__(self, shape: tuple[int, ...], axes: Axes, *, bias: bool, rngs: nnx.Rngs):
    # LeCun's deviation: with a fixed 0.02 narrow models hardly learn to see at first.
    self.kernel = weight(shape, axes, rngs, std=shape[0] ** -0.5)
    self.bias = nnx.Param(jnp.zeros(shape[1:], jnp.float32), axes=axes[1:]) if bias else None

  def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch_and_outputs"]:
    # One flat matrix product: with several batch axes XLA CPU transposes copies for the gradient.
    flat = x.reshape(-1, x.shape[-1])
    y = self.product(flat, self.kernel[...])
    if self.bias is not None:
      y = y + self.bias[...][None]
    if hasattr(self, "lora_a"):
      y = y + self.low_rank(flat)
    return y.reshape(*x.shape[:-1], *y.shape[1:])

  def product(
    self, x: Float[Array, "M I"], kernel: Shaped[Array, "I ..."]
  ) -> Float[Array, "M ..."]:
    """x W, where W may be int8 with a scale an output."""
    if not hasattr(self, "kernel_scale"):
      return jnp.tensordot(x, kernel, axes=1)
    y = jnp.tensordot(x, kernel.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)
    return (y * self.kernel_scale[...][None]).astype(x.dtype)

  def low_rank(self, x: Float[Array, "M I"]) -> Float[Array, "M ..."]:
    """scale (dropout(x) A) B, products in the dtype of x like the kernel's own, scaled in float32.

    The r numbers are scaled, not the O: all large products, the gradients' too, are in that dtype.
    """
    if hasattr(self, "lora_key"):
      kept = jax.random.bernoulli(self.lora_key[...], 1.0 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1.0 - self.dropout), 0.0)
    a, b = (w[...].astype(x.dtype) for w in (self.lora_a, self.lora_b))
    low = self.lora_scale[...] * (x @ a).astype(jnp.float32)
    return jnp.tensordot(low.astype(x.dtype), b, axes=1)


class Norm(nnx.Module):
  """RMS norm, computed in float32."""

  def __init__(self, width: int, axis: str | None, *, eps: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(axis,))
    self.eps = eps

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.eps)
    scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Mean 0 and variance 1, computed in float32, then scale and bias."""

  def __init__(self, width: int, axis: str, *, eps: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(axis,))
    self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), axes=(axis,))
    self.eps = eps

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.eps)
    wide = lambda w: w[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * wide(self.scale) + wide(self.bias)).astype(x.dtype)


class Mlp(nnx.Module):
  """fc2(act(fc1 x)); `inner` and `outer` are the widths behind fc1 and fc2."""

  def __init__(
    self, width: int, inner: int, outer: int, axes: Axes, activation: str, *, rngs: nnx.Rngs
  ):
    outer_axis, inner_axis = axes
    self.fc1 = Linear((width, inner), (outer_axis, inner_axis), bias=True, rngs=rngs)
    self.fc2 = Linear((inner, outer), (inner_axis, outer_axis), bias=True, rngs=rngs)
    self.activation = activation

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch O"]:
    return self.fc2(ACTIVATION[self.activation](self.fc1(x)))


class GatedMlp(nnx.Module):
  """down(act(gate x) * up x)."""

  def __init__(
    self, width: int, inner: int, axes: Axes, activation: str, *, bias: bool, rngs: nnx.Rngs
  ):
    outer_axis, inner_axis = axes
    self.gate = Linear((width, inner), (outer_axis, inner_axis), bias=bias, rngs=rngs)
    self.up = Linear((width, inner), (outer_axis, inner_axis), bias=bias, rngs=rngs)
    self.down = Linear((inner, width), (inner_axis, outer_axis), bias=bias, rngs=rngs)
    self.activation = activation

  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    return self.down(ACTIVATION[self.activation](self.gate(x)) * self.up(x))


def stack(count: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
  """`count` modules of one structure as one, each weight with a leading "layers" axis."""
  stacked = nnx.split_rngs(splits=count)(nnx.vmap(build, in_axes=(0,), out_axes=0))(rngs)
  for _, variable in nnx.iter_graph(stacked):
    if isinstance(variable, nnx.Variable):
      variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
  return stacked


def gathered(layer: Any, mesh: Mesh | None) -> Any:
  """One of the layers of a `stack`, whole along `fsdp`: what the layer computes with.

  Without it the partitioner may move the activations in place of the weights. The gradient goes
  back in the weights' own layout, summed and scattered at once.
  """
  one = lambda v: v.replace(used(v[...], v.get_metadata("axes")[1:], mesh))
  return jax.tree.map(one, layer, is_leaf=lambda node: isinstance(node, nnx.Variable))


def used(x: Shaped[Array, "..."], axes: Axes, mesh: Mesh | None) -> Shaped[Array, "..."]:
  """A weight with these axes, whole along `fsdp`; see `gathered`."""
  return x if mesh is None or mesh.size == 1 else _gathered(x, axes, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: Shaped[Array, "..."], axes: Axes, mesh: Mesh) -> Shaped[Array, "..."]:
  return jax.lax.with_sharding_constraint(x, whole(axes, x, mesh))


def _gathered_forward(x, axes, mesh):
  return _gathered(x, axes, mesh), None


def _gathered_backward(axes, mesh, _, grad):
  return (jax.lax.with_sharding_constraint(grad, shardings(axes, grad, mesh)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""] | int = 0,
  *,
  causal: bool,
  mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
  """`kernels.attention` by what the mesh's devices prefer, each on its own rows and heads."""
  device = None if mesh is None else mesh.devices.flat[0]
  backend = preferred_backend(q.dtype, q.shape[-1], device)

  def own(q, k, v, q_segments, kv_segments, q_offset):
    at = {"q_segments": q_segments, "kv_segments": kv_segments, "q_offset": q_offset}
    return attention(q, k, v, causal=causal, backend=backend, **at)

  queries, keys, rows = QUERIES, KEYS, ("batch", None)
  inside = local(own, (queries, keys, keys, rows, rows, ()), queries, mesh)
  return inside(q, k, v, q_segments, kv_segments, jnp.asarray(q_offset, jnp.int32))


def frequencies(width: int, theta: float) -> Float[np.ndarray, " J"]:
  """theta^(-2 j / width) for j < width / 2, rounded once to float32."""
  return (theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)).astype(np.float32)


def rotate(
  x_BTNH: Float[Array, "B T N H"], angles_BTJ: Float[Array, "B T J"]
) -> Float[Array, "B T N H"]:
  """Rotary embedding on halves (x1, x2): pairs are H / 2 apart. Angles must be float32.

  bfloat16 angles are off by up to 0.25 rad at position 128; the rotation is done in float32 too.
  """
  cos = jnp.cos(angles_BTJ)[:, :, None, :]
  sin = jnp.sin(angles_BTJ)[:, :, None, :]
  x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)
