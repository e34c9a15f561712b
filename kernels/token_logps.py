"""Log-probabilities of given tokens without the [B, T, V] logits.

Axes: B rows, T tokens, D width, V vocabulary, C chunks of a row.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kernels import token_logps_gpu

BACKENDS = ("reference", "xla", "gpu")
CHUNK = 1024  # Tokens.


def token_logps(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  temperature: float = 1.0,
  chunk: int = CHUNK,
  backend: str = "xla",
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
  """(log p(target), entropy in nats over V), of softmax(hidden head^T / temperature), in float32.

  Logits of at most `chunk` tokens, or of one token of each row, exist at once, in the backward pass
  too: each chunk is recomputed.
  `hidden[b, t]` is the state that predicts `targets[b, t]`. Both results carry gradients.

  Args:
    backend: "reference", the definition, with all logits at once; "xla", the same by chunks,
      anywhere; "gpu", Pallas kernels for Hopper GPUs, which keep logits in registers and write
      gradients of as many as `chunk` tokens have. Those have not been timed, so nothing prefers
      them, and they see one device: a head whose words lie on several is for "xla".

  Raises ValueError if temperature or chunk is not positive, for an unknown backend, and for what
  "gpu" does not have.
  """
  if temperature <= 0 or chunk <= 0:
    raise ValueError(f"temperature {temperature} and chunk {chunk} must be positive")
  if backend not in BACKENDS:
    raise ValueError(f"token_logps backend {backend!r} must be one of {BACKENDS}")
  _say_once(backend, hidden.shape, head.shape, str(hidden.dtype))
  if backend == "reference":
    return reference(hidden, targets, head, temperature)
  if backend == "gpu":
    return _on_gpu(hidden, head, targets, temperature, chunk)
  return _by_chunks(hidden, head, targets, temperature, chunk)


@functools.cache
def _say_once(backend: str, hidden: tuple, head: tuple, dtype: str) -> None:
  logging.getLogger(__name__).info("token_logps %s by %s, %s: %s", hidden, head, dtype, backend)


def _on_gpu(hidden, head, targets, temperature, chunk):
  B, T, D = hidden.shape
  refusal = token_logps_gpu.refusal(hidden.dtype, D, len(head))
  if refusal is not None:
    raise ValueError(f'token_logps backend "gpu" {refusal}: choose "xla"')
  flat = hidden.reshape(B * T, D), head, targets.reshape(-1)
  return tuple(x.reshape(B, T) for x in token_logps_gpu.score(*flat, temperature, chunk))


def _by_chunks(hidden, head, targets, temperature, chunk):
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
