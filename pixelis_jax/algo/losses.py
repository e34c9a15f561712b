"""Losses over token log-probabilities, as exact means over all the tokens or sequences of a batch.

`count` is the number of trained tokens (or sequences) in the whole batch. Under one jit over
sharded rows it may be left out: sums are global there. A caller that accumulates over parts passes
the whole batch's count to each part and adds up values, auxiliary values and gradients; a mean of
the parts' means would weigh short parts too much.

A sequence is a segment, not a row: several may share one. Segment 0 is padding.
"""

from collections.abc import Callable, Mapping

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


def aggregate(
  x: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  segments: Int[Array, "B T"],
  *,
  mode: str,
  scale: float,
  counts: Mapping[str, Float[Array, ""]] | None = None,
) -> Float[Array, ""]:
  """One number for a batch, by verl's `loss_agg_mode`; sequences without a True do not count.

  Args:
    x: by token.
    mask: the tokens that count.
    segments: of the tokens.
    mode: one of `AGGREGATIONS`. "token-mean" weighs all tokens alike; the others all sequences:
      "seq-mean-token-sum" by the sum over its tokens, "seq-mean-token-mean" by their mean,
      "seq-mean-token-sum-norm" (Dr. GRPO, https://arxiv.org/abs/2503.20783) by their sum over a
      constant.
    scale: that constant, `loss_scale_factor` in verl.
    counts: "tokens" and "sequences" of the whole batch; see the module.
  """
  if mode == "token-mean":
    return token_mean(x, mask, count=None if counts is None else counts["tokens"])
  weighed = AGGREGATIONS[mode](x, mask, segments, scale)
  firsts = first_tokens(mask, segments)
  count = firsts.sum(dtype=x.dtype) if counts is None else counts["sequences"]
  return token_mean(weighed, mask, count=count)


def _token_mean(x: Array, mask: Array, segments: Array, scale: float) -> Array:
  return x / jnp.maximum(by_sequence(jnp.ones_like(x), mask, segments), 1.0)


# Mode -> what each token adds to the sum that is divided by the number of tokens or sequences.
AGGREGATIONS: dict[str, Callable[[Array, Array, Array, float], Array]] = {
  "token-mean": lambda x, mask, segments, scale: x,
  "seq-mean-token-sum": lambda x, mask, segments, scale: x,
  "seq-mean-token-mean": _token_mean,
  "seq-mean-token-sum-norm": lambda x, mask, segments, scale: x / scale,
}


def kl_k3(logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Each token's estimate of KL(policy || reference) in nats, never negative.

  It is exp(d) - d - 1 with d = ref_logps - logps. Unbiased on tokens the policy sampled
  (http://joschu.net/blog/kl-approx.html). d is held within +-20 and the value under 10, beyond
  which it has no gradient.
  """
  d = jnp.clip(ref_logps - logps, -LOG_RATIO, LOG_RATIO)
  return jnp.clip(jnp.expm1(d) - d, 0.0, K3)  # expm1: near 0, exp(d) - 1 would be all rounding.


def kl_k1(logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """logps - ref_logps: unbiased, of either sign; its gradient says nothing of the reference."""
  return logps - ref_logps


def kl_k2(logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Half the squared difference: biased, but its gradient is an unbiased one of the KL."""
  return 0.5 * jnp.square(logps - ref_logps)


def _with_k2s_gradient(
  estimate: Callable[[Array, Array], Array],
) -> Callable[[Array, Array], Array]:
  """The estimate's value with k2's gradient: its own is not the KL's."""

  def estimated(logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"]) -> Float[Array, "B T"]:
    k2 = kl_k2(logps, ref_logps)
    return jax.lax.stop_gradient(estimate(logps, ref_logps) - k2) + k2

  return estimated


# verl's `kl_loss_type` -> estimate by token; "+" is its value with k2's gradient.
KL: dict[str, Callable[[Array, Array], Array]] = {
  "k1": kl_k1,
  "k2": kl_k2,
  "k3": kl_k3,
  "k1+": _with_k2s_gradient(kl_k1),
  "k3+": _with_k2s_gradient(kl_k3),
}


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
