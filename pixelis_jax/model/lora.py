"""LoRA (https://arxiv.org/abs/2106.09685): low-rank adapters beside the kernels, in the same tree.

An adapted module has, beside `kernel` [I, ...], `lora_a` [I, r], `lora_b` [r, ...] and the number
`lora_scale` = alpha / rank, all three float32 whatever the kernel is, and stacked over layers like
everything else: y = x W + b + scale (dropout(x) A) B. Layers of lower rank are padded with zeros.
Both gradients of the padding are exactly zero, since each has the other's zeros as a factor, so it
stays zero. `lora_a` and `lora_b` are trained; the scale is not.

Dropout is on where the parameters hold keys (`keyed`), and nowhere else: training adds them to the
tree for one step, evaluation and sampling never see any.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PRNGKeyArray

from pixelis_jax.model.layers import Linear

Params: TypeAlias = dict  # As in policy.py.
Layers: TypeAlias = tuple[tuple[str, tuple], ...]  # (module path, a number for each layer), ...

# Module paths are those of the tree: a kernel's path without "/kernel".
TARGETS = ("text/layers/attn/[qkvo]", "text/layers/mlp/(gate|up|down)")
TRAINED = ("lora_a", "lora_b")
_LEAVES = (*TRAINED, "lora_scale", "lora_key")
_flatten = nnx.traversals.flatten_mapping
_unflatten = nnx.traversals.unflatten_mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which modules have adapters, and how large these are.

  `targets` are regular expressions that must match a module's whole path in our tree, such as
  "visual/blocks/attn/qkv"; the default is every linear layer of the decoder. `ranks` and `alphas`
  give modules a number for each layer in place of `rank` and `alpha`. A rank of 0 is no adapter.
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  targets: tuple[str, ...] = TARGETS
  ranks: Layers = ()
  alphas: Layers = ()

  def __post_init__(self):
    if self.rank < 0 or any(rank < 0 for _, layers in self.ranks for rank in layers):
      raise ValueError(f"rank {self.rank} and ranks {self.ranks} must not be negative")
    if not 0.0 <= self.dropout < 1.0:
      raise ValueError(f"dropout {self.dropout} must be at least 0 and less than 1")

  def of(self, modules: Mapping[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(ranks, alphas) of each adapted module, one number a layer.

    Args:
      modules: Path of each linear layer of the model -> how many layers are stacked in it.

    Raises ValueError for a target that no path matches, for `ranks` and `alphas` of modules that
    are not there or have other numbers of layers, and where nothing is adapted.
    """
    for target in self.targets:
      if not any(re.fullmatch(target, path) for path in modules):
        raise ValueError(f"LoRA target {target!r} matches none of {sorted(modules)}")
    for path, layers in (*self.ranks, *self.alphas):
      if modules.get(path) != len(layers):
        raise ValueError(
          f"LoRA names {len(layers)} layers of {path!r}; the model has {dict(modules)}"
        )
    ranks_of, alphas_of, chosen = dict(self.ranks), dict(self.alphas), {}
    for path, count in modules.items():
      ranks = np.array(ranks_of.get(path, (self.rank,) * count), np.int32)
      if ranks.any() and any(re.fullmatch(target, path) for target in self.targets):
        chosen[path] = ranks, np.array(alphas_of.get(path, (self.alpha,) * count), np.float64)
    if not chosen:
      raise ValueError(f"LoRA of rank {self.rank} with targets {self.targets} adapts nothing")
    return chosen


def read_ranks(file: str | os.PathLike) -> Layers:
  """`LoraConfig.ranks` of a JSON file {"ranks": {"text/layers/attn/q/kernel": [rank, ...]}, ...}.

  Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
  """
  file = Path(file)
  if not file.is_file():
    raise FileNotFoundError(f"there is no rank file {file}")
  try:
    ranks = json.loads(file.read_text(encoding="utf-8"))["ranks"]
    listed = {path: list(layers) for path, layers in ranks.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{file} must be JSON like {{"ranks": {{path: [rank, ...]}}}}') from error
  for path, layers in listed.items():
    if not path.endswith("/kernel") or any(type(r) is not int or r < 0 for r in layers):
      raise ValueError(f"{file}: {path!r}: {layers} must be a kernel's path and whole ranks")
  return tuple((path.removesuffix("/kernel"), tuple(layers)) for path, layers in listed.items())


def scales(ranks: np.ndarray, alphas: np.ndarray) -> np.ndarray:
  """alpha / rank in float32, 0 where there is no adapter."""
  return np.where(ranks > 0, alphas / np.maximum(ranks, 1), 0.0).astype(np.float32)


def attach(root: nnx.Module, lora: LoraConfig, *, rngs: nnx.Rngs, keys: bool = False) -> None:
  """Gives the modules that `lora` chooses their adapters, as PEFT starts them: A random, B zero.

  A is uniform within I^-0.5 (Kaiming's with a = sqrt 5). With `keys` they expect those of `keyed`.
  """
  nodes = ((path, node) for path, node in nnx.iter_graph(root) if isinstance(node, Linear))
  linears = {"/".join(map(str, path)): linear for path, linear in nodes}
  stacked = {path: x.kernel.get_metadata("axes")[0] == "layers" for path, x in linears.items()}
  counts = {path: x.kernel.shape[0] if stacked[path] else 1 for path, x in linears.items()}
  for path, (ranks, alphas) in lora.of(counts).items():
    linear = linears[path]
    lead = 1 if stacked[path] else 0
    shape, axes = linear.kernel.shape, linear.kernel.get_metadata("axes")
    layers, inputs, outputs = shape[:lead], shape[lead], shape[lead + 1 :]
    r = int(ranks.max())
    used = (np.arange(r) < ranks[:, None]).reshape(*layers, 1, r)
    a = jax.random.uniform(rngs.params(), (*layers, inputs, r), minval=-1.0) * inputs**-0.5
    linear.lora_a = nnx.Param(jnp.where(used, a, 0.0), axes=(*axes[: lead + 1], None))
    b = jnp.zeros((*layers, r, *outputs), jnp.float32)
    linear.lora_b = nnx.Param(b, axes=(*axes[:lead], None, *axes[lead + 1 :]))
    scale = jnp.asarray(scales(ranks, alphas).reshape(layers))
    linear.lora_scale = nnx.Param(scale, axes=axes[:lead])
    if keys:
      linear.lora_key = nnx.Param(_keys(rngs.params(), scale), axes=axes[:lead])
      linear.dropout = lora.dropout


def adapters(params: Params) -> Params:
  """The leaves that LoRA adds to a model's parameters, and nothing else."""
  return _chosen(params, lambda name: name in _LEAVES)


def plain(params: Params) -> Params:
  """The base alone: the same arrays, not copies, in the tree of the model without adapters."""
  return _chosen(params, lambda name: name not in _LEAVES)


def split(params: Params) -> tuple[Params, Params]:
  """(what is trained: every A and B, what is frozen: the base and the scales); no array is copied.

  Back together by `join`.
  """
  trained = lambda name: name in TRAINED
  return _chosen(params, trained), _chosen(params, lambda name: not trained(name))


def join(one: Params, other: Params) -> Params:
  """One tree of the leaves of both, which share none."""
  first, second = _flatten(one), _flatten(other)
  both = first.keys() & second.keys()
  assert not both, f"{sorted(both)} are in both trees"
  return _unflatten({**first, **second})


def replaced(params: Params, by: Params) -> Params:
  """The parameters with these of them in the place of theirs."""
  return _unflatten({**_flatten(params), **_flatten(by)})


def keyed(params: Params, key: PRNGKeyArray) -> Params:
  """The parameters with a dropout key for each adapter of each layer, all different."""
  flat = _flatten(params)
  scales = sorted(path for path in flat if path[-1] == "lora_scale")
  keys = {
    (*path[:-1], "lora_key"): _keys(jax.random.fold_in(key, i), flat[path])
    for i, path in enumerate(scales)
  }
  return _unflatten({**flat, **keys})


def is_keyed(params: Mapping) -> bool:
  """Whether dropout is on."""
  return any(path[-1] == "lora_key" for path in _flatten(params))


def merge(params: Params) -> Params:
  """Plain parameters of W + scale A B: float32 arithmetic, then the weight's own dtype."""
  found = _flatten(params)
  merged = _flatten(plain(params))
  for *module, name in found:
    if name == "lora_a":
      parts = (found[(*module, part)] for part in ("kernel", "lora_a", "lora_b", "lora_scale"))
      merged[(*module, "kernel")] = _merged(*parts)
  return _unflatten(merged)


@jax.jit
def _merged(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
  """Layer by layer: a float32 copy of all of them would be twice a bfloat16 model's stack."""

  def one(layer: tuple[Array, Array, Array, Array]) -> Array:
    w, a, b, scale = layer
    flat = b.reshape(b.shape[0], -1).astype(jnp.float32)
    low = jnp.matmul(a.astype(jnp.float32), flat, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + scale * low.reshape(w.shape)).astype(w.dtype)

  layers = (kernel, a, b, scale)
  return jax.lax.map(one, layers) if scale.ndim else one(layers)


def _keys(key: PRNGKeyArray, scale: Float[Array, "..."]) -> Key[Array, "..."]:
  """One for each layer."""
  return jax.random.split(key, scale.shape) if scale.ndim else key


def _chosen(params: Params, wanted: Any) -> Params:
  return _unflatten({path: x for path, x in _flatten(params).items() if wanted(path[-1])})
