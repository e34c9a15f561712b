import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelis_jax.algo.correction import RolloutCorrection, correct

LN2, LN3, LN6 = np.log(2.0), np.log(3.0), np.log(6.0)
# Two sequences share the first row; the second row's has one token, then padding that holds
# anything. Log-ratios of the update's first policy to the sampler.
LOG_RATIO = np.array([[LN2, LN3, -LN2, 0.0], [np.log(1.5), np.nan, np.inf, 0.0]], np.float32)
SEGMENTS = np.array([[1, 1, 2, 2], [1, 0, 0, 0]], np.int32)
MASK = SEGMENTS > 0
SAMPLED = np.full((2, 4), np.log(0.2), np.float32)

run = jax.jit(correct, static_argnums=4)


def corrected(log_ratio=LOG_RATIO, **settings):
  c = RolloutCorrection(**settings)
  weights, keep, measured = run(SAMPLED + log_ratio, jnp.asarray(SAMPLED), MASK, SEGMENTS, c)
  return np.asarray(weights)[MASK], np.asarray(keep), {k: float(v) for k, v in measured.items()}


def test_a_tokens_weight_is_its_ratio_at_most_the_threshold():
  weights, keep, measured = corrected(rollout_is="token")
  # 3 is cut to 2. The inverse ratio would be 1/2, 1/3, 2, 1, 2/3.
  np.testing.assert_allclose(weights, [2, 2, 0.5, 1, 1.5], rtol=1e-6)
  assert (keep == MASK).all()
  np.testing.assert_allclose(measured["rollout_corr/rollout_is_mean"], 7 / 5, rtol=1e-6)
  weights, *_ = corrected(rollout_is="token", rollout_is_threshold=2.5)
  np.testing.assert_allclose(weights, [2, 2.5, 0.5, 1, 1.5], rtol=1e-6)


def test_a_sequences_weight_is_the_product_of_its_tokens():
  weights, *_ = corrected(rollout_is="sequence")
  # 6, cut to 2, and 1/2. Over the row, which is no sequence, all four would be 3, cut to 2.
  np.testing.assert_allclose(weights, [2, 2, 0.5, 0.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize(
  ("rule", "threshold", "kept"),
  [
    # Sums ln 6, -ln 2, ln 1.5 against ln 2.5: only the first is too far, to either side.
    ("seq_sum_k1", 2.5, [0, 0, 1, 1, 1]),
    ("seq_sum_k1", 1.8, [0, 0, 0, 0, 1]),
    # Means ln 6 / 2 = 0.90, -0.35, 0.41 against ln 2 = 0.69; the row's, 0.27, would stay.
    ("seq_mean_k1", 2.0, [0, 0, 1, 1, 1]),
    # e^d - 1 - d: means (0.31 + 0.90) / 2 = 0.60, (0.19 + 0) / 2 = 0.10, 0.095.
    ("seq_mean_k3", 0.2, [0, 0, 1, 1, 1]),
    # d^2 / 2: largest 0.60 and 0.24, 0.08. By their mean, 0.42, the first would stay.
    ("seq_max_k2", 0.5, [0, 0, 1, 1, 1]),
  ],
)
def test_sequences_that_are_too_far_off_are_left_out_whole(rule, threshold, kept):
  weights, keep, measured = corrected(rollout_rs=rule, rollout_rs_threshold=threshold)
  assert keep[MASK].tolist() == kept
  assert not keep[~MASK].any() and (weights == 1).all()
  # Of three sequences, not of five tokens.
  rejected = 1 - (kept[0] + kept[2] + kept[4]) / 3
  np.testing.assert_allclose(
    measured["rollout_corr/rollout_rs_seq_masked_fraction"], rejected, rtol=1e-6
  )


def test_how_far_the_sampler_is_off_is_measured_over_its_tokens():
  _, _, measured = corrected()
  # k3 of the KL from the sampler: e^d - 1 - d with d the log-ratios. The k1 of the other
  # direction, the mean log-ratio, is (ln 6 - ln 2 + ln 1.5) / 5 = 0.30.
  k3 = [1 - LN2, 2 - LN3, LN2 - 0.5, 0, 0.5 - np.log(1.5)]
  np.testing.assert_allclose(measured["rollout_corr/k3_kl"], np.mean(k3), rtol=1e-5)
  # Probabilities 0.2 become 0.4, 0.6, 0.1, 0.2, 0.3.
  np.testing.assert_allclose(measured["training/rollout_probs_diff_mean"], 0.8 / 5, rtol=1e-5)


def test_tokens_that_nobody_sampled_are_not_corrected():
  def with_unsampled(rollout, c):
    return run(jnp.asarray(SAMPLED + LN3, jnp.float32), rollout, MASK, SEGMENTS, c)

  rollout = jnp.asarray(SAMPLED).at[0, 1].set(jnp.nan)
  weights, _, measured = with_unsampled(rollout, RolloutCorrection(rollout_is="token"))
  assert np.asarray(weights)[MASK].tolist() == [2, 1, 2, 2, 2]
  assert np.isfinite(measured["rollout_corr/k3_kl"])


def test_wrong_settings_are_named():
  with pytest.raises(
    ValueError, match=r"rollout_is 'tokens' must be one of \['off', 'token', 'seq"
  ):
    RolloutCorrection(rollout_is="tokens")
  with pytest.raises(ValueError, match=r"rollout_rs 'seq_k1' must be one of \['off', 'seq_sum_k1'"):
    RolloutCorrection(rollout_rs="seq_k1")
  with pytest.raises(ValueError, match="rollout_is_threshold 0.5 must be at least 1"):
    RolloutCorrection(rollout_is="token", rollout_is_threshold=0.5)
