"""Rollout correction: where the policy that sampled is not the one that an update starts from.

The sampler may be some updates behind, or compute in another precision. As in verl
(docs/algo/rollout_corr.md, "decoupled") its log-probabilities and those of the weights that the
update starts from are kept apart: the loss takes its ratio to the latter, and a constant weight,
the ratio of the two, makes up for who sampled. Truncating it bounds the variance
(https://arxiv.org/abs/1802.01561); rejection leaves out sequences that are too far off.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pixelis_jax.algo.losses import (
  LOG_RATIO,
  Aux,
  by_sequence,
  first_tokens,
  kl_k3,
  sequence_mean,
  token_mean,
)

OFF = "off"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCorrection:
  """What is made of the ratio; names and defaults are verl's.

  Attributes:
    rollout_is: a name in `WEIGHTS`, or "off".
    rollout_is_threshold: weights are at most this.
    rollout_rs: a name in `REJECTIONS`, or "off".
    rollout_rs_threshold: of a k1, how many times likelier a sequence may be to either policy; of
      others, the largest divergence, in nats.
  """

  rollout_is: str = OFF
  rollout_is_threshold: float = 2.0
  rollout_rs: str = OFF
  rollout_rs_threshold: float = 2.0

  def __post_init__(self):
    for field, table in {"rollout_is": WEIGHTS, "rollout_rs": REJECTIONS}.items():
      if getattr(self, field) not in (OFF, *table):
        raise ValueError(f"{field} {getattr(self, field)!r} must be one of {[OFF, *table]}")
    if not (self.rollout_is_threshold >= 1 and self.rollout_rs_threshold > 0):
      raise ValueError(
        f"rollout_is_threshold {self.rollout_is_threshold} must be at least 1, "
        f"rollout_rs_threshold {self.rollout_rs_threshold} positive"
      )

  @property
  def on(self) -> bool:
    """Whether anything is corrected."""
    return self.rollout_is != OFF or self.rollout_rs != OFF


def correct(
  logps: Float[Array, "B T"],
  rollout_logps: Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  segments: Int[Array, "B T"],
  c: RolloutCorrection,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Aux]:
  """(each token's weight, the tokens of sequences that stay, what is measured).

  What is measured has the names of verl/trainer/ppo/rollout_corr_helper.py and
  verl/utils/debug/metrics.py.

  Args:
    logps: of the policy that the update starts from.
    rollout_logps: the sampler's; NaN at tokens that nobody sampled, whose weight is 1.
    mask: the trained tokens.
    segments: the sequences.
    c: the correction.
  """
  sampled = mask & ~jnp.isnan(rollout_logps)
  log_ratio = jnp.where(sampled, logps - rollout_logps, 0.0)
  weights, keep = jnp.ones_like(log_ratio), mask
  if c.rollout_is != OFF:
    ratio = _exp(WEIGHTS[c.rollout_is](log_ratio, sampled, segments))
    weights = jnp.where(sampled, jnp.minimum(ratio, c.rollout_is_threshold), 1.0)
  if c.rollout_rs != OFF:
    keep = mask & REJECTIONS[c.rollout_rs](log_ratio, sampled, segments, c.rollout_rs_threshold)
  firsts = first_tokens(mask, segments)
  rejected = 1.0 - keep.astype(weights.dtype)
  apart = jnp.abs(jnp.exp(logps) - jnp.exp(rollout_logps))
  measured = {
    "rollout_corr/k3_kl": token_mean(kl_k3(rollout_logps, logps), sampled),
    "training/rollout_probs_diff_mean": token_mean(apart, sampled),
    "rollout_corr/rollout_is_mean": token_mean(weights, sampled),
    "rollout_corr/rollout_rs_seq_masked_fraction": token_mean(rejected, firsts),
  }
  return weights, keep, measured


def _exp(log_ratio: Array) -> Array:
  return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO, LOG_RATIO))


# Level -> the log-ratio that weighs a token: its own, or its sequence's (all its tokens' product).
WEIGHTS: dict[str, Callable[[Array, Array, Array], Array]] = {
  "token": lambda log_ratio, mask, segments: log_ratio,
  "sequence": by_sequence,
}


def _mean_k1(log_ratio: Array, mask: Array, segments: Array, threshold: float) -> Array:
  return jnp.abs(sequence_mean(log_ratio, mask, segments)) <= jnp.log(threshold)


def _sum_k1(log_ratio: Array, mask: Array, segments: Array, threshold: float) -> Array:
  return jnp.abs(by_sequence(log_ratio, mask, segments)) <= jnp.log(threshold)


def _mean_k3(log_ratio: Array, mask: Array, segments: Array, threshold: float) -> Array:
  k3 = kl_k3(jnp.zeros_like(log_ratio), log_ratio)
  return sequence_mean(k3, mask, segments) <= threshold


def _max_k2(log_ratio: Array, mask: Array, segments: Array, threshold: float) -> Array:
  beyond = 0.5 * jnp.square(log_ratio) > threshold
  return by_sequence(beyond.astype(log_ratio.dtype), mask, segments) == 0


# Rule -> whether a token's sequence stays. k1 is the log-ratio: its sum is the sequence's, its mean
# the geometric mean of its tokens'.
REJECTIONS: dict[str, Callable[[Array, Array, Array, float], Array]] = {
  "seq_sum_k1": _sum_k1,
  "seq_mean_k1": _mean_k1,
  "seq_mean_k3": _mean_k3,
  "seq_max_k2": _max_k2,
}
