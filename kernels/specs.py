"""Real shapes under names: what tests, the benchmark and ahead-of-time compilation run the ops on.

Text shapes are those of a training step's row, prompts and rollouts packed into it; tower shapes
are one image of 1792 x 1792 pixels.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

Shapes = tuple[jax.ShapeDtypeStruct, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
  """B rows of T tokens, N query heads, K key heads, H wide; `segment` tokens a segment, 0: one."""

  B: int
  T: int
  N: int
  K: int
  H: int
  causal: bool
  segment: int = 0
  dtype: DTypeLike = jnp.bfloat16

  def shapes(self) -> Shapes:
    """q, k, v, and the segments of queries and keys."""
    heads = lambda n: jax.ShapeDtypeStruct((self.B, self.T, n, self.H), self.dtype)
    numbers = jax.ShapeDtypeStruct((self.B, self.T), jnp.int32)
    return heads(self.N), heads(self.K), heads(self.K), numbers, numbers

  def inputs(self, rng: np.random.Generator) -> tuple[jax.Array, ...]:
    """Standard normal heads; the last eighth of each row is padding."""
    *heads, numbers, _ = self.shapes()
    drawn = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in heads]
    at = np.arange(self.T) // (self.segment or self.T) + 1
    at[self.T - self.T // 8 :] = 0
    at = jnp.asarray(np.broadcast_to(at, numbers.shape), jnp.int32)
    return *drawn, at, at

  def operations(self) -> float:
    """Multiplications and additions of a forward pass's two products, where anything is seen."""
    seen = self.T * (self.segment or self.T) * (0.5 if self.causal else 1.0)
    return 4.0 * self.B * self.N * self.H * seen

  def traffic(self) -> float:
    """Bytes that a forward pass has to read and write at least: q, k, v and the output."""
    tokens = self.B * self.T * self.H * (2 * self.N + 2 * self.K)
    return float(tokens * jnp.dtype(self.dtype).itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogps:
  """C tokens, D wide, V words."""

  C: int
  D: int
  V: int
  dtype: DTypeLike = jnp.bfloat16

  def shapes(self) -> Shapes:
    """Hidden states, the head, and the tokens."""
    return (
      jax.ShapeDtypeStruct((1, self.C, self.D), self.dtype),
      jax.ShapeDtypeStruct((self.V, self.D), self.dtype),
      jax.ShapeDtypeStruct((1, self.C), jnp.int32),
    )

  def inputs(self, rng: np.random.Generator) -> tuple[jax.Array, ...]:
    """Logits of order 1."""
    hidden, head, tokens = self.shapes()
    draw = lambda x, scale: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)
    targets = jnp.asarray(rng.integers(0, self.V, tokens.shape), jnp.int32)
    return draw(hidden, 1.0), draw(head, self.D**-0.5), targets

  def operations(self) -> float:
    """Multiplications and additions of the logits."""
    return 2.0 * self.C * self.D * self.V

  def traffic(self) -> float:
    """Bytes of the hidden states and the head, each read once."""
    return float((self.C + self.V) * self.D * jnp.dtype(self.dtype).itemsize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAttention:
  """B rows of S slots, N query heads, K key heads, H wide; G prompts of P tokens."""

  B: int
  S: int
  N: int
  K: int
  H: int
  G: int
  P: int
  dtype: DTypeLike = jnp.bfloat16

  def shapes(self) -> Shapes:
    """q, k, v and which slots are seen; keys and values of prompts and which tokens are seen."""
    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, self.dtype)
    seen = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool_)
    own, prompts = (self.B, self.S, self.K, self.H), (self.G, self.K, self.P, self.H)
    q = numbers(self.B, self.N, self.H)
    cache = numbers(*own), numbers(*own), seen(self.B, self.S)
    return q, *cache, numbers(*prompts), numbers(*prompts), seen(self.G, self.P)

  def inputs(self, rng: np.random.Generator) -> tuple[jax.Array, ...]:
    """Standard normal heads; the last half of the slots and eighth of the prompts is not seen."""
    shapes = self.shapes()
    drawn = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in shapes]
    drawn[3] = jnp.broadcast_to(jnp.arange(self.S)[None] < self.S // 2, shapes[3].shape)
    drawn[6] = jnp.broadcast_to(jnp.arange(self.P)[None] < self.P - self.P // 8, shapes[6].shape)
    return tuple(drawn)

  def operations(self) -> float:
    """Multiplications and additions of a token's two products."""
    return 4.0 * self.B * self.N * self.H * (self.S + self.P)

  def traffic(self) -> float:
    """Bytes of keys and values, each read once."""
    keys = 2 * self.K * self.H * (self.B * self.S + self.G * self.P)
    return float(keys * jnp.dtype(self.dtype).itemsize)


_FLOAT32 = {"dtype": jnp.float32}
_LONG = (1, 4, 16)  # Thousands of tokens, on shapes whose quadratic form still fits a host.

ATTENTION = {
  "qwen2_5_vl_7b": Attention(B=1, T=8192, N=28, K=4, H=128, causal=True, segment=2048),
  "qwen2_5_vl_7b_row": Attention(B=1, T=8192, N=28, K=4, H=128, causal=True),
  "qwen2_5_vl_7b_windows": Attention(B=1, T=16384, N=16, K=16, H=80, causal=False, segment=64),
  "qwen2_5_vl_7b_frames": Attention(B=1, T=16384, N=16, K=16, H=80, causal=False),
  "qwen3_vl_8b": Attention(B=1, T=8192, N=32, K=8, H=128, causal=True, segment=2048),
  "qwen3_vl_8b_frames": Attention(B=1, T=12544, N=16, K=16, H=72, causal=False),
  "qwen3_8b": Attention(B=1, T=8192, N=32, K=8, H=128, causal=True, segment=2048),
  "small": Attention(B=1, T=512, N=4, K=2, H=64, causal=True, segment=128),
  "tiny": Attention(B=32, T=128, N=4, K=2, H=32, causal=True, **_FLOAT32),
  "tiny_windows": Attention(B=64, T=64, N=4, K=4, H=16, causal=False, segment=16, **_FLOAT32),
  **{f"{n}k": Attention(B=1, T=1024 * n, N=2, K=1, H=64, causal=True, **_FLOAT32) for n in _LONG},
}

TOKEN_LOGPS = {
  "qwen2_5_vl_7b": TokenLogps(C=8192, D=3584, V=152_064),
  "qwen3_vl_8b": TokenLogps(C=8192, D=4096, V=151_936),
  "qwen3_8b": TokenLogps(C=8192, D=4096, V=151_936),
  "small": TokenLogps(C=256, D=128, V=600),
  "tiny": TokenLogps(C=4096, D=128, V=512, **_FLOAT32),
  **{f"{n}k": TokenLogps(C=1024 * n, D=256, V=32_768, **_FLOAT32) for n in _LONG},
}

# A token of 16 questions of 8 samples, prompts with an image.
DECODE_ATTENTION = {
  "qwen2_5_vl_7b": DecodeAttention(B=128, S=512, N=28, K=4, H=128, G=16, P=2048),
  "qwen3_vl_8b": DecodeAttention(B=128, S=512, N=32, K=8, H=128, G=16, P=2048),
  "small": DecodeAttention(B=4, S=64, N=4, K=2, H=64, G=2, P=256),
  "tiny": DecodeAttention(B=32, S=96, N=4, K=2, H=32, G=4, P=64, **_FLOAT32),
}


def backward(function: Callable, arguments: tuple[int, ...]) -> Callable:
  """The gradients of a sum of what the function returns."""
  total = lambda *x: function(*x).astype(jnp.float32).sum()
  return jax.grad(total, argnums=arguments)
