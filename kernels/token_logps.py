"""Log-probabilities of given tokens without the [B, T, V] logits.

Axes: B rows, T tokens, D width, V vocabulary, C tokens of one chunk.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def token_logps(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  temperature: float = 1.0,
  chunk: int = 1024,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
  """(log p(target), entropy in nats over V), of softmax(hidden head^T / temperature), in float32.

  At most `chunk` rows of logits exist at once, in the backward pass too: each chunk is recomputed.
  `hidden[b, t]` is the state that predicts `targets[b, t]`. Both results carry gradients.
  Raises ValueError if temperature or chunk is not positive.
  """
  if temperature <= 0 or chunk <= 0:
    raise ValueError(f"temperature {temperature} and chunk {chunk} must be positive")
  B, T, D = hidden.shape
  count = -(-B * T // chunk)
  size = min(chunk, B * T)
  padding = count * size - B * T
  hidden_CD = jnp.pad(hidden.reshape(B * T, D), ((0, padding), (0, 0)))
  targets_C = jnp.pad(targets.reshape(B * T), (0, padding))

  @jax.checkpoint
  def body(carry, scanned):
    return carry, reference(*scanned, head, temperature)

  scanned = hidden_CD.reshape(count, size, D), targets_C.reshape(count, size)
  _, results = jax.lax.scan(body, None, scanned)
  logps, entropies = (x.reshape(-1)[: B * T].reshape(B, T) for x in results)
  return logps, entropies


def reference(
  hidden_CD: Float[Array, "C D"],
  targets_C: Int[Array, " C"],
  head_VD: Float[Array, "V D"],
  temperature: float,
) -> tuple[Float32[Array, " C"], Float32[Array, " C"]]:
  """The definition, with all logits of its tokens at once.

  Sums over the vocabulary and nothing else: where a head's words lie on several devices, each
  computes its own logits, and they exchange a few numbers a token. To gather the target's logit
  would collect all logits first.
  """
  logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, head_VD, preferred_element_type=jnp.float32)
  logits_CV /= temperature
  top_C = jax.lax.stop_gradient(logits_CV.max(axis=-1))
  below_CV = logits_CV - top_C[:, None]
  weights_CV = jnp.exp(below_CV)
  total_C = weights_CV.sum(axis=-1)
  words_V = jnp.arange(head_VD.shape[0], dtype=targets_C.dtype)
  target_C = jnp.where(words_V[None, :] == targets_C[:, None], below_CV, 0.0).sum(axis=-1)
  entropy_C = jnp.log(total_C) - (weights_CV * below_CV).sum(axis=-1) / total_C
  return target_C - jnp.log(total_C), entropy_C
