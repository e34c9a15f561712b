"""Losses over token log-probabilities, as exact means over all the tokens of a batch.

`count` is the number of trained tokens in the whole batch. Under one jit over sharded rows it may
be left out: sums are global there. A caller that accumulates over parts passes the whole batch's
count to each part and adds up values, auxiliary values and gradients; a mean of the parts' means
would weigh short parts too much.

A sequence is a segment, not a row: several may share one. Segment 0 is padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Aux = dict[str, jax.Array]
LOG_RATIO = 20.0  # Bound on log-probability differences before exp, as in verl.
K3 = 10.0  # Bound on one token's KL estimate, as in verl.


def token_mean(
  x: Float[Array, "*axes"], mask: Bool[Array, "*axes"], *, count: Float[Array, ""] | None = None
) -> Float[Array, ""]:
  """Sum of `x` where `mask`, over `count` or the number of True; 0 where there are none."""
  count = mask.sum(dtype=x.dtype) if count is None else count
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(count, 1.0)


def first_tokens(mask: Bool[Array, "B T"], segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """The first True of each sequence: as many as there are sequences with any."""
  taken = mask.astype(jnp.int32)
  through = jnp.cumsum(taken, axis=1)
  starts = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  # Counts only rise: the largest so far at a start is the one at the last start.
  before = jax.lax.cummax(jnp.where(starts, through - taken, 0), axis=1)
  return mask & (through - before == 1)


def by_sequence(
  x: Float[Array, "B T"], mask: Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """At every token the sum of `x` over its sequence, where `mask`."""
  size = x.shape[1] + 1  # A row has no more segments than tokens, and padding.

  def summed(x_T: Array, segments_T: Array) -> Array:
    return jnp.zeros(size, x.dtype).at[segments_T].add(x_T)[segments_T]

  return jax.vmap(summed)(jnp.where(mask, x, 0.0), segments)


def sequence_mean(
  x: Float[Array, "B T"], mask: Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """At every token the mean of `x` over its sequence, where `mask`; 0 where there is none."""
  lengths = by_sequence(jnp.ones_like(x), mask, segments)
  return by_sequence(x, mask, segments) / jnp.maximum(lengths, 1.0)


def clipped_surrogate(
  logps: Float[Array, "B T"],
  old_logps: Float[Array, "B T"],
  advantages: Float[Array, "B 1"] | Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  *,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None = None,
  entropies: Float[Array, "B T"] | None = None,
  weights: Float[Array, "B T"] | None = None,
  count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Aux]:
  """PPO's clipped loss with DAPO's separate bounds: ratio within [1 - clip_low, 1 + clip_high].

  Args:
    logps: of the policy that learns, at temperature 1.
    old_logps: of the policy that sampled; constants.
    advantages: one for each row, or one for each token.
    mask: the sampled tokens.
    clip_low: for example 0.2.
    clip_high: 0.28 in DAPO (https://arxiv.org/abs/2503.14476), 0.2 in PPO.
    dual_clip: where an advantage is negative the loss is at most `dual_clip` * |advantage| (verl:
      3.0; https://arxiv.org/abs/1912.09729); None: no such bound.
    entropies: only measured; None if there are none.
    weights: each token's loss is multiplied with, see `correction`; None: 1.
    count: see the module.

  Returns:
    The loss, and token means: clip_fraction (tokens whose gradient a bound cut off), ratio_mean,
    approx_kl (k3 estimate of KL(old || new), in nats), and entropy (nats) where given.
  """
  # Masked positions may hold anything; they must not reach exp, whose gradient would be NaN.
  log_ratio = jnp.clip(jnp.where(mask, logps - old_logps, 0.0), -LOG_RATIO, LOG_RATIO)
  ratio = jnp.exp(log_ratio)
  free = -advantages * ratio
  bounded = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = jnp.maximum(free, bounded)
  clipped = bounded > free
  if dual_clip is not None:
    most = jnp.where(advantages < 0, -advantages * dual_clip, jnp.inf)
    clipped |= loss > most
    loss = jnp.minimum(loss, most)
  measured = {
    "clip_fraction": clipped.astype(loss.dtype),
    "ratio_mean": ratio,
    "approx_kl": jnp.expm1(log_ratio) - log_ratio,
  }
  if weights is not None:
    loss = loss * weights
  if entropies is not None:
    measured["entropy"] = entropies
  aux = {
    name: jax.lax.stop_gradient(token_mean(x, mask, count=count)) for name, x in measured.items()
  }
  return token_mean(loss, mask, count=count), aux


def kl_k3(logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Each token's estimate of KL(policy || reference) in nats, never negative.

  It is exp(d) - d - 1 with d = ref_logps - logps.   Unbiased on tokens the policy sampled
  (http://joschu.net/blog/kl-approx.html). d is held within +-20 and the value under 10, beyond
  which it has no gradient.
  """
  d = jnp.clip(ref_logps - logps, -LOG_RATIO, LOG_RATIO)
  return jnp.clip(jnp.expm1(d) - d, 0.0, K3)  # expm1: near 0, exp(d) - 1 would be all rounding.


def cross_entropy(
  logps: Float[Array, "B T"],
  entropies: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  *,
  entropy_weight: float,
  count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Aux]:
  """Negative log-likelihood minus `entropy_weight` times the entropy, in nats a token.

  The entropy term is the confidence penalty of https://arxiv.org/abs/1701.06548: it does what label
  smoothing does without the mean log-probability over the vocabulary, which the fused kernel does
  not return. Auxiliary values: nll, entropy.
  """
  nll = token_mean(-logps, mask, count=count)
  entropy = token_mean(entropies, mask, count=count)
  return nll - entropy_weight * entropy, {"nll": nll, "entropy": entropy}
