"""Each loss on a few tokens whose value, gradient and cut are worked out beside it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelis_jax.algo.policy_losses import POLICY_LOSSES, Objective, push

OLD = -1.5  # Every token's log-probability by the policy that sampled.


@partial(jax.jit, static_argnums=4)
def differentiated(log_ratio, advantages, mask, segments, c):
  """(losses by token, measured by token, gradient of the masked sum)."""
  old = jnp.full_like(log_ratio, OLD)

  def total(x):
    loss, measured = push(x, old, advantages, mask, segments, c)
    return jnp.where(mask, loss, 0.0).sum(), (loss, measured)

  grads, (loss, measured) = jax.grad(total, has_aux=True)(old + log_ratio)
  return loss, measured, grads


def pushed(log_ratio, advantages, mask=None, segments=None, **settings):
  log_ratio = np.float32(log_ratio)
  mask = np.ones(log_ratio.shape, bool) if mask is None else np.array(mask, bool)
  segments = np.ones(log_ratio.shape, np.int32) if segments is None else np.int32(segments)
  c = Objective(**settings)
  return jax.device_get(differentiated(log_ratio, np.float32(advantages), mask, segments, c))


CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}


def test_ppo_clip_bounds_gains_from_above_only():
  # Ratios 1, e, 1/e with advantage 2: 1, 1.28, 0.3679 (the low side is free); the fourth is masked.
  # Both sides bounded at 0.2 would be -2, -2.4, -1.6.
  loss, measured, grads = pushed([[0, 1, -1, 5]], [[2]], [[1, 1, 1, 0]], **CLIP)
  np.testing.assert_allclose(loss[0, :3], [-2, -2.56, -2 / np.e], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[0, 1, 0, 0]])
  np.testing.assert_allclose(measured["ratio_mean"][0, :3], [1, np.e, 1 / np.e], rtol=1e-6)
  # Old less new log-probabilities, as in verl; k3 would be 0, e - 2 and 1 / e.
  np.testing.assert_allclose(measured["ppo_kl"][0, :3], [0, -1, 1], atol=1e-6)
  # -A ratio where nothing is cut: at ratio 1, REINFORCE.
  np.testing.assert_allclose(grads, [[-2, 0, -2 / np.e, 0]], rtol=1e-6)


def test_ppo_clip_bounds_losses_from_below_and_the_dual_clip_from_above():
  # Ratios e (free), 1/e -> 0.8, e^2 (free).
  loss, _, grads = pushed([[1, -1, 2]], [[-1]], **CLIP)
  np.testing.assert_allclose(loss, [[np.e, 0.8, np.e**2]], rtol=1e-6)
  np.testing.assert_allclose(grads, [[np.e, 0, np.e**2]], rtol=1e-6)
  # e < 3 stays, e^2 = 7.39 becomes 3.
  loss, measured, grads = pushed([[1, -1, 2]], [[-1]], clip_ratio_c=3.0, **CLIP)
  np.testing.assert_allclose(loss, [[np.e, 0.8, 3]], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[0, 1, 1]])
  assert grads[0, 2] == 0
  # Positive advantages know nothing of it.
  loss, *_ = pushed([[1, -1, 2]], [[1]], clip_ratio_c=3.0, **CLIP)
  np.testing.assert_allclose(loss, [[-1.28, -1 / np.e, -1.28]], rtol=1e-6)


def test_gspo_has_one_ratio_for_a_sequence():
  # Sequences (0.2, -0.1) and (0.4): means 0.05 and 0.4. Token ratios would be e^0.2, e^-0.1; over
  # the row all three would be e^(0.5 / 3).
  settings = {"loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean"}
  at = {"segments": [[1, 1, 2]], "clip_ratio_low": 0.1, "clip_ratio_high": 0.1}
  loss, measured, grads = pushed([[0.2, -0.1, 0.4]], [[1]], **settings, **at)
  np.testing.assert_allclose(loss, [[-np.exp(0.05), -np.exp(0.05), -1.1]], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[0, 0, 1]])
  # The whole sequence's ratio, and each token's own gradient.
  np.testing.assert_allclose(grads, [[-np.exp(0.05), -np.exp(0.05), 0]], rtol=1e-5)


def test_sapo_fades_softly_and_faster_where_tokens_lose():
  # Gate 4 / tau * sigmoid(tau (ratio - 1)): at ratio 1, 2 / tau. Its slope is 4 s (1 - s) ratio:
  # 1 there; at ratio 2, s = sigmoid(tau).
  loss, _, grads = pushed([[0, np.log(2)]], [[1, 1]], loss_mode="sapo")
  s = 1 / (1 + np.exp(-1))
  np.testing.assert_allclose(loss, [[-2, -4 * s]], rtol=1e-6)
  np.testing.assert_allclose(grads, [[-1, -4 * s * (1 - s) * 2]], rtol=1e-5)
  s = 1 / (1 + np.exp(-1.05))  # tau_neg; with tau_pos 1, 1.5726 and not 1.5343.
  loss, _, grads = pushed([[0, np.log(2)]], [[-1, -1]], loss_mode="sapo")
  np.testing.assert_allclose(loss, [[2 / 1.05, 4 / 1.05 * s]], rtol=1e-6)
  np.testing.assert_allclose(grads, [[1, 4 * s * (1 - s) * 2]], rtol=1e-5)


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
  # Ratios 1 and e -> 1.28: -weight * A * logp, with log-probs -1.5 and -0.5.
  loss, measured, grads = pushed([[0, 1]], [[2]], loss_mode="cispo", **CLIP)
  np.testing.assert_allclose(loss, [[2 * 1.5, 1.28 * 2 * 0.5]], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[0, 1]])
  # PPO's second gradient is 0; without the stop it would have the weight's own in it.
  np.testing.assert_allclose(grads, [[-2, -2.56]], rtol=1e-6)


def test_gmpo_is_the_geometric_mean_of_bounded_ratios():
  # Bounds are on log-ratios: 1 -> 0.4, -0.6 stays where advantages are positive. Mean -0.1.
  settings = {"loss_mode": "gmpo", "loss_agg_mode": "seq-mean-token-mean"}
  at = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
  loss, measured, grads = pushed([[1, -0.6]], [[2]], **settings, **at)
  np.testing.assert_allclose(loss, [[-2 * np.exp(-0.1)] * 2], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[1, 0]])
  # Of the sum of both tokens' losses; the cut one has none.
  np.testing.assert_allclose(grads, [[0, -2 * np.exp(-0.1)]], rtol=1e-5)
  # Negative: -0.6 -> -0.4, 1 stays: 0.3. The other side's rule would give -0.1.
  loss, *_ = pushed([[1, -0.6]], [[-2]], **settings, **at)
  np.testing.assert_allclose(loss, [[2 * np.exp(0.3)] * 2], rtol=1e-6)


# Advantages 3, -1, -1, -1 (mean 0); log-probs -1.5 + (2, -2, 0, 0) (mean -1.5): covariances 6, 2,
# 0, 0 about the mean.
COV = ([[2, -2, 0, 0]], [[3, -1, -1, -1]])


def test_clip_cov_drops_some_tokens_of_a_band_of_covariance():
  wide = {"clip_ratio_low": 1.0, "clip_ratio_high": 10.0, "loss_mode": "clip_cov"}
  # A quarter of 4 tokens is one; of the two above 1 only that with 2 is below 5.
  loss, measured, grads = pushed(*COV, clip_cov_ratio=0.25, **wide)
  free = [-3 * np.e**2, np.e**-2, 1, 1]
  np.testing.assert_allclose(loss, [[free[0], 0, 1, 1]], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[0, 1, 0, 0]])
  assert grads[0, 1] == 0 and grads[0, 0] != 0
  # One at least, however small the share; both where the share and the band are wide.
  loss, *_ = pushed(*COV, clip_cov_ratio=1e-6, **wide)
  assert loss[0, 1] == 0
  loss, measured, _ = pushed(*COV, clip_cov_ratio=1.0, clip_cov_ub=9.0, **wide)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[1, 1, 0, 0]])
  # Masked tokens count in no mean: the other three have one advantage, so nothing covaries.
  _, measured, _ = pushed(*COV, mask=[[0, 1, 1, 1]], clip_cov_ratio=1.0, **wide)
  assert not measured["pg_clipfrac"].any()


def test_clip_cov_draws_among_the_telling():
  wide = {"clip_ratio_low": 1.0, "clip_ratio_high": 10.0, "loss_mode": "clip_cov"}
  ratios, advantages = [[2.0, -2.0] * 8], [[1.0, -1.0] * 8]  # All covary by 2.
  draws = {
    tuple(
      pushed(np.float32(ratios) + shift, advantages, clip_cov_ratio=0.25, **wide)[1]["pg_clipfrac"][
        0
      ].tolist()
    )
    for shift in (0.0, 1e-3, 2e-3, 3e-3)
  }
  # A quarter of 16, and not always the same: always the first four would be one draw.
  assert {sum(draw) for draw in draws} == {4.0} and len(draws) > 1


def test_kl_cov_holds_the_tokens_that_covary_most():
  settings = {"loss_mode": "kl_cov", "kl_cov_ratio": 0.25, "ppo_kl_coef": 0.5}
  loss, measured, grads = pushed(*COV, **settings)
  # The first pays 0.5 |2| = 1; nothing is clipped, though e^2 > 1.2.
  free = np.array([-3 * np.e**2, np.e**-2, 1, 1])
  np.testing.assert_allclose(loss, [free + [1, 0, 0, 0]], rtol=1e-6)
  np.testing.assert_array_equal(measured["pg_clipfrac"], [[1, 0, 0, 0]])
  np.testing.assert_allclose(grads, [free + [0.5, 0, 0, 0]], rtol=1e-5)


@pytest.mark.parametrize("loss_mode", POLICY_LOSSES)
def test_masked_garbage_and_extreme_ratios_stay_finite(loss_mode):
  c = {"loss_mode": loss_mode, "loss_agg_mode": "seq-mean-token-mean"}
  garbage = [[0.1, np.nan, np.inf, -np.inf, 1000, -1000]]
  mask = [[1, 0, 0, 0, 1, 1]]
  for advantage in (1.0, -1.0):
    loss, measured, grads = pushed(garbage, [[advantage]], mask, **c)
    at = np.array(mask, bool)
    assert np.isfinite(loss[at]).all() and np.isfinite(grads[at]).all()
    assert all(np.isfinite(x[at]).all() for x in measured.values())
    np.testing.assert_array_equal(grads[~at], 0)
  loss, _, grads = pushed(garbage, [[1.0]], [[0] * 6], **c)
  np.testing.assert_array_equal(grads, 0)


def test_wrong_settings_are_named():
  with pytest.raises(ValueError, match=r"loss_mode 'gpso' must be one of \['ppo_clip', 'gspo'"):
    Objective(loss_mode="gpso")
  with pytest.raises(ValueError, match=r"loss_agg_mode 'mean' must be one of \['token-mean', 'seq"):
    Objective(loss_agg_mode="mean")
  with pytest.raises(ValueError, match=r"kl_loss_type 'k4' must be one of \['k1', 'k2', 'k3'"):
    Objective(kl_loss_type="k4")
  with pytest.raises(ValueError, match="'gspo' weighs sequences alike: its loss_agg_mode must be"):
    Objective(loss_mode="gspo")
  with pytest.raises(ValueError, match="clip_ratio_c 0.9 must be above 1"):
    Objective(clip_ratio_c=0.9)
  with pytest.raises(ValueError, match="loss_scale_factor 0.0 must be a positive number"):
    Objective(loss_scale_factor=0.0)
