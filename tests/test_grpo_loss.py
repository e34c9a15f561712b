"""The loss of an update as a whole: every objective, over packed rows, in one piece or in parts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelis_jax import batch, learner
from pixelis_jax.algo.losses import AGGREGATIONS, KL
from pixelis_jax.algo.policy_losses import POLICY_LOSSES, SEQUENCES_ALIKE, Objective
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model

MODEL = Model(load_config(Path(__file__).parents[1] / "assets" / "tiny-vl"))  # Asked nothing.
# Rows 0 and 1 hold two sequences each, row 2 one, row 3 none: 2, 1, 3, 1 and 4 trained tokens.
SEGMENTS = np.int32([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1], [0] * 6])
MASK = np.array([[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1], [0] * 6], bool)


@pytest.fixture
def packed(monkeypatch) -> batch.GrpoBatch:
  """A policy whose parameters are its tokens' log-probabilities, and samples of another."""
  taken = lambda model, params, inputs: (params[inputs.tokens], -params[inputs.tokens])
  monkeypatch.setattr(learner, "logps", taken)
  rng = np.random.default_rng(0)
  each = lambda values: np.float32(np.where(SEGMENTS, values, 0.0))
  by_sequence = rng.normal(size=(4, 3))[np.arange(4)[:, None], SEGMENTS]
  tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
  return batch.GrpoBatch(
    inputs=batch.Inputs(
      tokens=tokens, positions=None, sources=None, segments=SEGMENTS, vision=None
    ),
    loss_mask=MASK,
    old_logps=each(np.log(rng.uniform(0.2, 0.8, (4, 6)))),
    advantages=each(by_sequence),
    kl_weights=each(1.0),
    ref_logps=each(np.log(rng.uniform(0.2, 0.8, (4, 6)))),
  )


PARAMS = jnp.asarray(np.log(np.random.default_rng(1).uniform(0.2, 0.8, 24)), jnp.float32)
COEF = jnp.float32(0.1)


def differentiated(packed, parts=1, **settings):
  """((value, measured), gradient) by the loss in so many parts."""
  loss = learner.grpo_loss(MODEL, Objective(**settings))
  return jax.device_get(jax.jit(learner.accumulated(loss, parts, None))(PARAMS, packed, COEF))


def test_the_published_runs_loss_stands(packed):
  """Bit for bit the one that BUILD.md's numbers were made with; written out here as it was."""

  def published(params):
    taken = params[packed.inputs.tokens]
    log_ratio = jnp.clip(jnp.where(MASK, taken - packed.old_logps, 0.0), -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    free = -packed.advantages * ratio
    bounded = -packed.advantages * jnp.clip(ratio, 1.0 - 0.2, 1.0 + 0.28)
    d = jnp.clip(packed.ref_logps - taken, -20.0, 20.0)
    k3 = jnp.clip(jnp.expm1(d) - d, 0.0, 10.0)
    mean = lambda x: jnp.where(MASK, x, 0.0).sum() / jnp.maximum(MASK.sum(dtype=jnp.float32), 1.0)
    return (
      mean(jnp.maximum(free, bounded)) + COEF * mean(k3 * packed.kl_weights) - 0.0 * mean(-taken)
    )

  loss = learner.grpo_loss(MODEL, Objective(clip_ratio_high=0.28))
  with jax.disable_jit():  # Compilers may round in other places.
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(PARAMS, _on_device(packed), COEF)
    packed = _on_device(packed)
    expected, gradient = jax.value_and_grad(published)(PARAMS)
  assert value == expected
  np.testing.assert_array_equal(grads, gradient)


def _on_device(packed):
  return jax.tree.map(jnp.asarray, packed)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_sequences_count_once_however_an_update_is_cut(packed, mode):
  settings = {"loss_agg_mode": mode, "loss_scale_factor": 8.0, "entropy_coeff": 0.01}
  (value, measured), grads = differentiated(packed, **settings)
  (same, again), gradient = differentiated(packed, parts=4, **settings)
  np.testing.assert_allclose(same, value, rtol=1e-5)
  np.testing.assert_allclose(gradient, grads, atol=1e-6)
  for name in measured:
    np.testing.assert_allclose(again[name], measured[name], rtol=1e-5)
  # By hand. A row taken for a sequence, or the parts' own counts, would divide by other numbers.
  ratio = np.exp(np.where(MASK, np.asarray(PARAMS).reshape(4, 6) - packed.old_logps, 0.0))
  pushed = np.maximum(-packed.advantages * ratio, -packed.advantages * np.clip(ratio, 0.8, 1.2))
  d = packed.ref_logps - np.asarray(PARAMS).reshape(4, 6)
  total = pushed + 0.1 * (np.expm1(d) - d) + 0.01 * np.asarray(PARAMS).reshape(4, 6)
  by = [total[(SEGMENTS == s) & MASK & (np.arange(4)[:, None] == b)] for b, s in
        [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]]  # fmt: skip
  expected = {
    "token-mean": np.concatenate(by).mean(),
    "seq-mean-token-sum": np.mean([x.sum() for x in by]),
    "seq-mean-token-mean": np.mean([x.mean() for x in by]),
    "seq-mean-token-sum-norm": np.mean([x.sum() for x in by]) / 8,
  }[mode]
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_every_objective_is_reachable_and_another(packed):
  found = {}
  for loss_mode in POLICY_LOSSES:
    # By sequence, as some must be; any covariance may be cut, as those here are small.
    how = {"loss_agg_mode": SEQUENCES_ALIKE, "clip_cov_lb": -9.0}
    _, grads = differentiated(packed, loss_mode=loss_mode, **how)
    assert np.isfinite(grads).all() and not grads.reshape(4, 6)[~MASK].any()
    found[loss_mode] = tuple(grads.tolist())
  assert len(set(found.values())) == len(POLICY_LOSSES)


def test_the_kls_type_is_the_configured_one(packed):
  taken = np.asarray(PARAMS).reshape(4, 6)
  (without, _), _ = differentiated(packed.replace(kl_weights=np.zeros_like(MASK, np.float32)))
  for kl_loss_type, estimate in KL.items():
    (value, _), _ = differentiated(packed, kl_loss_type=kl_loss_type)
    expected = np.asarray(estimate(jnp.asarray(taken), jnp.asarray(packed.ref_logps)))[MASK].mean()
    np.testing.assert_allclose(value - without, 0.1 * expected, atol=1e-6)
