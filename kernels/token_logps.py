"""Log-probabilities of given tokens without the [B, T, V] logits.

Axes: B rows, T tokens, D width, V vocabulary, C chunks of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

CHUNK = 1024  # Tokens.


def token_logps(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  temperature: float = 1.0,
  chunk: int = CHUNK,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
  """(log p(target), entropy in nats over V), of softmax(hidden head^T / temperature), in float32.

  Logits of at most `chunk` tokens, or of one token of each row, exist at once, in the backward pass
  too: each chunk is recomputed.
  `hidden[b, t]` is the state that predicts `targets[b, t]`. Both results carry gradients.
  Raises ValueError if temperature or chunk is not positive.
  """
  if temperature <= 0 or chunk <= 0:
    raise ValueError(f"temperature {temperature} and chunk {chunk} must be positive")
  B, T, D = hidden.shape
  size = min(max(chunk // B, 1), T)
  count = -(-T // size)
  padding = (0, 0), (0, count * size - T)
  hidden_CBTD = jnp.pad(hidden, (*padding, (0, 0))).reshape(B, count, size, D).swapaxes(0, 1)
  targets_CBT = jnp.pad(targets, padding).reshape(B, count, size).swapaxes(0, 1)

  @jax.checkpoint
  def body(carry, scanned):
    return carry, reference(*scanned, head, temperature)

  _, results = jax.lax.scan(body, None, (hidden_CBTD, targets_CBT))
  logps, entropies = (x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in results)
  return logps, entropies


def reference(
  hidden_BTD: Float[Array, "B T D"],
  targets_BT: Int[Array, "B T"],
  head_VD: Float[Array, "V D"],
  temperature: float,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
  """The definition, with all logits of its tokens at once.

  Sums over the vocabulary and nothing else: where a head's words lie on several devices, each
  computes its own logits, and they exchange a few numbers a token. To gather the target's logit
  would collect all logits first.
  """
  logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  logits_BTV /= temperature
  top_BT = jax.lax.stop_gradient(logits_BTV.max(axis=-1))
  below_BTV = logits_BTV - top_BT[..., None]
  weights_BTV = jnp.exp(below_BTV)
  total_BT = weights_BTV.sum(axis=-1)
  words_V = jnp.arange(head_VD.shape[0], dtype=targets_BT.dtype)
  target_BT = jnp.where(words_V[None, None] == targets_BT[..., None], below_BTV, 0.0).sum(axis=-1)
  entropy_BT = jnp.log(total_BT) - (weights_BTV * below_BTV).sum(axis=-1) / total_BT
  return target_BT - jnp.log(total_BT), entropy_BT
