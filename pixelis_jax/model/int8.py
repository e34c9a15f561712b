"""Weight-only int8 for inference: kernels of the layers as int8, one float32 scale an output.

W is about q * scale with scale = max |W| / 127 over an output's inputs (symmetric, absmax: sec. 2
of https://arxiv.org/abs/2208.07339), so y = (x q) scale: activations stay as they are, and q, at
most 127, is exact in bfloat16. Only the stacked layers of decoder and tower are quantised: they
hold nearly all weights; embeddings, head, patch embedding, mergers, norms and biases keep their
dtype.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int8

from pixelis_jax.model.layers import Linear

_STACKS = ("text/layers/", "visual/blocks/")


def quantised(path: str) -> bool:
  """Whether the weight at this path ("text/layers/attn/q/kernel") is kept as int8."""
  return path.startswith(_STACKS) and path.endswith("/kernel")


def quantise(
  kernel: Float[np.ndarray, "I ..."],
) -> tuple[Int8[np.ndarray, "I ..."], Float32[np.ndarray, "..."]]:
  """(q, scale) of one layer's kernel; an output whose weights are all 0 has scale 0."""
  exact = kernel.astype(np.float32)
  scale = np.abs(exact).max(axis=0) / np.float32(127)
  q = np.rint(exact / np.where(scale == 0, 1, scale)).astype(np.int8)
  return q, scale


def attach(root: nnx.Module) -> None:
  """Makes the layers of a model expect int8 kernels and their scales."""
  for path, node in nnx.iter_graph(root):
    name = "/".join(map(str, path)) + "/kernel"
    if isinstance(node, Linear) and quantised(name):
      shape, axes = node.kernel.shape, node.kernel.get_metadata("axes")
      node.kernel = nnx.Param(jnp.zeros(shape, jnp.int8), axes=axes)
      scale = jnp.zeros((shape[0], *shape[2:]), jnp.float32)
      node.kernel_scale = nnx.Param(scale, axes=(axes[0], *axes[2:]))
