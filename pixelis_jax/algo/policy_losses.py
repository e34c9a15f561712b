"""What pushes the policy: one loss a token from its probability ratio and its advantage.

Names, formulas and constants are those of verl (verl/trainer/ppo/core_algos.py), "ppo_clip" but for
its name ("vanilla" there). Each loss is one function over the same table of tokens; how tokens
become one number is `losses.aggregate`'s to say.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pixelis_jax.algo.losses import (
  AGGREGATIONS,
  KL,
  LOG_RATIO,
  sequence_mean,
  token_mean,
)

SEQUENCE_RATIO = 10.0  # Bound on GSPO's log-ratio before exp, as in verl.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
  """The loss of an update and its constants; checked when built.

  Attributes:
    loss_mode: a name in `POLICY_LOSSES`.
    clip_ratio_low: ratios below 1 minus this are cut where the advantage is negative.
    clip_ratio_high: ratios above 1 plus this where it is positive. Above `clip_ratio_low` it is
      DAPO's clip-higher (https://arxiv.org/abs/2503.14476).
    clip_ratio_c: of ppo_clip: where an advantage is negative the loss is at most this times its
      size (https://arxiv.org/abs/1912.09729; verl 3.0); 0: no such bound.
    tau_pos: of sapo, the gate's steepness where the advantage is positive.
    tau_neg: of sapo, elsewhere.
    clip_cov_ratio: of clip_cov, the share of tokens that are cut.
    clip_cov_lb: of clip_cov, the covariance above which a token may be.
    clip_cov_ub: of clip_cov, and below which.
    kl_cov_ratio: of kl_cov, the share of tokens that are held.
    ppo_kl_coef: of kl_cov, how hard.
    loss_agg_mode: a name in `losses.AGGREGATIONS`, for the policy's loss, KL and entropy alike.
    loss_scale_factor: tokens, the constant of "seq-mean-token-sum-norm".
    kl_loss_type: a name in `losses.KL`.
    entropy_coeff: the entropy is rewarded with it.
  """

  loss_mode: str = "ppo_clip"
  clip_ratio_low: float = 0.2
  clip_ratio_high: float = 0.2
  clip_ratio_c: float = 0.0
  tau_pos: float = 1.0
  tau_neg: float = 1.05
  clip_cov_ratio: float = 2e-4
  clip_cov_lb: float = 1.0
  clip_cov_ub: float = 5.0
  kl_cov_ratio: float = 2e-4
  ppo_kl_coef: float = 0.1
  loss_agg_mode: str = "token-mean"
  loss_scale_factor: float = 1.0
  kl_loss_type: str = "k3"
  entropy_coeff: float = 0.0

  def __post_init__(self):
    tables = {"loss_mode": POLICY_LOSSES, "loss_agg_mode": AGGREGATIONS, "kl_loss_type": KL}
    for field, table in tables.items():
      if getattr(self, field) not in table:
        raise ValueError(f"{field} {getattr(self, field)!r} must be one of {list(table)}")
    if self.loss_mode in OF_SEQUENCES and self.loss_agg_mode != SEQUENCES_ALIKE:
      raise ValueError(
        f"loss_mode {self.loss_mode!r} weighs sequences alike: its loss_agg_mode must be "
        f"{SEQUENCES_ALIKE!r}, not {self.loss_agg_mode!r}"
      )
    if self.clip_ratio_c and self.clip_ratio_c <= 1:
      raise ValueError(f"clip_ratio_c {self.clip_ratio_c} must be above 1, or 0 for no bound")
    if not 0 < self.loss_scale_factor < math.inf:
      raise ValueError(f"loss_scale_factor {self.loss_scale_factor} must be a positive number")


class Tokens(NamedTuple):
  """A batch, token by token. `log_ratio` is to the policy that sampled, and 0 off the mask."""

  logps: Float[Array, "B T"]
  log_ratio: Float[Array, "B T"]
  advantages: Float[Array, "B 1"] | Float[Array, "B T"]
  mask: Bool[Array, "B T"]
  segments: Int[Array, "B T"]


# By token: the loss, and whether a bound cut or a penalty changed it.
Pushed = tuple[Float[Array, "B T"], Bool[Array, "B T"]]


def push(
  logps: Float[Array, "B T"],
  old_logps: Float[Array, "B T"],
  advantages: Float[Array, "B 1"] | Float[Array, "B T"],
  mask: Bool[Array, "B T"],
  segments: Int[Array, "B T"],
  c: Objective,
) -> tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]:
  """Each token's loss by `c.loss_mode`, and what is measured of it, without gradients.

  Args:
    logps: of the policy that learns, at temperature 1.
    old_logps: of the policy that the ratio is taken to; constants.
    advantages: one for each row, or one for each token.
    mask: the trained tokens.
    segments: the sequences.
    c: the objective.

  Returns:
    The losses, and by token: pg_clipfrac (1 where a bound cut off the gradient, or kl_cov holds),
    ratio_mean, and ppo_kl (k1 estimate of KL(old || new), in nats, of either sign).
  """
  # Masked positions may hold anything; they must not reach exp, whose gradient would be NaN.
  log_ratio = jnp.clip(jnp.where(mask, logps - old_logps, 0.0), -LOG_RATIO, LOG_RATIO)
  tokens = Tokens(logps, log_ratio, advantages, mask, segments)
  loss, changed = POLICY_LOSSES[c.loss_mode](tokens, c)
  measured = {
    "pg_clipfrac": changed.astype(loss.dtype),
    "ratio_mean": jnp.exp(log_ratio),
    "ppo_kl": -log_ratio,
  }
  return loss, jax.lax.stop_gradient(measured)


def _clipped(ratio: Array, t: Tokens, c: Objective) -> Pushed:
  """The larger of the losses at the ratio and at its bound."""
  free = -t.advantages * ratio
  bounded = -t.advantages * jnp.clip(ratio, 1.0 - c.clip_ratio_low, 1.0 + c.clip_ratio_high)
  return jnp.maximum(free, bounded), bounded > free


def ppo_clip(t: Tokens, c: Objective) -> Pushed:
  """PPO's clipped surrogate (https://arxiv.org/abs/1707.06347) with separate and dual bounds."""
  loss, clipped = _clipped(jnp.exp(t.log_ratio), t, c)
  if c.clip_ratio_c:
    most = jnp.where(t.advantages < 0, -t.advantages * c.clip_ratio_c, jnp.inf)
    clipped |= loss > most
    loss = jnp.minimum(loss, most)
  return loss, clipped


def gspo(t: Tokens, c: Objective) -> Pushed:
  """The ratio of whole sequences, its length-th root: https://arxiv.org/abs/2507.18071.

  The token form: each token has its sequence's ratio and a gradient of its own. Bounds are far
  tighter than PPO's, 3e-4 and 4e-4 there.
  """
  sequence = jax.lax.stop_gradient(sequence_mean(t.log_ratio, t.mask, t.segments))
  own = jnp.where(t.mask, t.logps, 0.0)
  log_ratio = jnp.minimum(own - jax.lax.stop_gradient(own) + sequence, SEQUENCE_RATIO)
  return _clipped(jnp.exp(log_ratio), t, c)


def sapo(t: Tokens, c: Objective) -> Pushed:
  """A soft gate in place of the cut, steeper where tokens lose: https://arxiv.org/abs/2511.20347."""
  tau = jnp.where(t.advantages > 0, c.tau_pos, c.tau_neg)
  gate = jax.nn.sigmoid(tau * (jnp.exp(t.log_ratio) - 1.0)) * (4.0 / tau)
  return -gate * t.advantages, jnp.zeros_like(t.mask)


def cispo(t: Tokens, c: Objective) -> Pushed:
  """REINFORCE weighed by the bounded ratio: no token loses its gradient.

  MiniMax-M1, https://arxiv.org/abs/2506.13585. What counts as clipped is a ratio at its bound.
  """
  ratio = jnp.exp(t.log_ratio)
  bounded = jnp.clip(ratio, 1.0 - c.clip_ratio_low, 1.0 + c.clip_ratio_high)
  logps = jnp.where(t.mask, t.logps, 0.0)
  return -jax.lax.stop_gradient(bounded) * t.advantages * logps, bounded != ratio


def gmpo(t: Tokens, c: Objective) -> Pushed:
  """The geometric mean of a sequence's ratios, cut token by token: https://arxiv.org/abs/2507.20673.

  Bounds are on log-ratios, wide (0.4 there), and each on the side on which its advantage pushes.
  """
  sign = jnp.sign(t.advantages)
  bounded = jnp.clip(t.log_ratio, -c.clip_ratio_low, c.clip_ratio_high)
  least = jnp.minimum(sign * t.log_ratio, sign * bounded)
  ratio = jnp.exp(sequence_mean(sign * least, t.mask, t.segments))
  return -t.advantages * ratio, least < sign * t.log_ratio


def clip_cov(t: Tokens, c: Objective) -> Pushed:
  """PPO's loss without some tokens that would cost most entropy: https://arxiv.org/abs/2505.22617.

  A share of all tokens is drawn from those whose advantage and log-probability vary together most.
  What was cut anyway is not drawn. The draw follows from the batch: a resumed run draws the same.
  Shares and means are a part's own where an update is computed in parts, as in verl.
  """
  loss, clipped = ppo_clip(t, c)
  together = _covariance(t)
  telling = t.mask & ~clipped & (together > c.clip_cov_lb) & (together < c.clip_cov_ub)
  seed = jax.lax.bitcast_convert_type(jnp.where(t.mask, t.logps, 0.0).sum(), jnp.uint32)
  drawn = jax.random.uniform(jax.random.key(seed), telling.shape)
  cut = _largest(drawn, telling, c.clip_cov_ratio * t.mask.sum(dtype=loss.dtype))
  return jnp.where(cut, 0.0, loss), clipped | cut


def kl_cov(t: Tokens, c: Objective) -> Pushed:
  """The tokens that would cost most entropy are held by |log-ratio|; nothing is clipped.

  https://arxiv.org/abs/2505.22617. Shares and means as in `clip_cov`.
  """
  loss = -t.advantages * jnp.exp(t.log_ratio)
  held = _largest(_covariance(t), t.mask, c.kl_cov_ratio * t.mask.sum(dtype=loss.dtype))
  return jnp.where(held, loss + c.ppo_kl_coef * jnp.abs(t.log_ratio), loss), held


def _covariance(t: Tokens) -> Float[Array, "B T"]:
  """How advantage and log-probability vary together, token by token; a constant."""
  advantages = jnp.broadcast_to(t.advantages, t.mask.shape)
  logps = jax.lax.stop_gradient(jnp.where(t.mask, t.logps, 0.0))
  return (advantages - token_mean(advantages, t.mask)) * (logps - token_mean(logps, t.mask))


def _largest(
  x: Float[Array, "B T"], among: Bool[Array, "B T"], n: Float[Array, ""]
) -> Bool[Array, "B T"]:
  """The n (at least one) largest among these tokens, all of them where they are fewer.

  Equals of the last one are taken too.
  """
  ranked = jnp.sort(jnp.where(among, x, -jnp.inf).ravel())
  last = ranked[ranked.size - jnp.maximum(n.astype(jnp.int32), 1)]
  return among & (x >= last)


POLICY_LOSSES: dict[str, Callable[[Tokens, Objective], Pushed]] = {
  "ppo_clip": ppo_clip,
  "gspo": gspo,
  "sapo": sapo,
  "cispo": cispo,
  "gmpo": gmpo,
  "clip_cov": clip_cov,
  "kl_cov": kl_cov,
}
OF_SEQUENCES = ("gspo", "gmpo")  # Whose tokens share a ratio.
SEQUENCES_ALIKE = "seq-mean-token-mean"
