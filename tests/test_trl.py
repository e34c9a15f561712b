"""The objectives beside those of TRL's trainers, value and gradient, on the same tokens."""

import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelis_jax import batch, learner
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.model.load import load_config
from pixelis_jax.model.policy import Model

MODEL = Model(load_config(Path(__file__).parents[1] / "assets" / "tiny-vl"))  # Asked nothing.
B, T, BETA = 4, 6, 0.1
RNG = np.random.default_rng(0)
LENGTHS = np.array([6, 1, 4, 3])
MASK = np.arange(T) < LENGTHS[:, None]
# Some ratios beyond any bound: log-ratios of up to about 1.5.
TAKEN, OLD, REF = (np.float32(np.log(RNG.uniform(0.15, 0.9, (B, T)))) for _ in range(3))
ADVANTAGES = np.float32([1.0, -1.0, 0.5, -2.0])
WEIGHTS = np.float32(RNG.uniform(0.3, 2.0, (B, T)))

BY_SEQUENCE = "seq-mean-token-mean"
# TRL's settings, and ours.
PAIRS = {
  "grpo": ({}, {"loss_agg_mode": BY_SEQUENCE}),
  "bnpo": ({"loss_type": "bnpo"}, {}),
  "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"clip_ratio_high": 0.28}),
  "dr_grpo": (
    {"loss_type": "dr_grpo"},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 16.0},
  ),
  "dual clip": ({"loss_type": "bnpo", "delta": 1.5}, {"clip_ratio_c": 1.5}),
  "corrected": ({"loss_type": "bnpo", "corrected": True}, {}),
  "gspo": (
    {"importance_sampling_level": "sequence"},
    {"loss_mode": "gspo", "loss_agg_mode": BY_SEQUENCE},
  ),
  "sapo": ({"loss_type": "sapo"}, {"loss_mode": "sapo", "loss_agg_mode": BY_SEQUENCE}),
  # TRL's bound is of the ratio itself, and there is none below.
  "cispo": (
    {"loss_type": "cispo", "epsilon_high": 1.4},
    {"loss_mode": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 0.4},
  ),
  "gmpo": (
    {"gmpo": True, "epsilon_low": 0.4, "epsilon_high": 0.4},
    {
      "loss_mode": "gmpo",
      "loss_agg_mode": BY_SEQUENCE,
      "clip_ratio_low": 0.4,
      "clip_ratio_high": 0.4,
    },
  ),
}


@pytest.fixture(scope="module")
def trl():
  """TRL's two trainers; it warns of its experiments and of its packages."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
  return SimpleNamespace(grpo=GRPOTrainer, gmpo=GMPOTrainer)


def theirs(trl, *, corrected=False, gmpo=False, delta=None, **settings):
  """(loss, gradient by the log-probabilities) of a trainer that is given its model's output."""
  import torch

  taken = torch.tensor(TAKEN, requires_grad=True)
  same = SimpleNamespace(
    num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x
  )
  trainer = SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *_, **__: (taken, torch.zeros(B, T), None),
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    _entropy_bonus_enabled=False,
    beta=BETA,
    args=SimpleNamespace(
      delta=delta,
      use_bias_correction_kl=False,
      sapo_temperature_pos=1.0,
      sapo_temperature_neg=1.05,
      steps_per_generation=1,
    ),
    use_vllm=corrected,
    vllm_importance_sampling_correction=True,
    model=SimpleNamespace(training=False),
    current_gradient_accumulation_steps=1,
    max_completion_length=16,
    accelerator=same,
    _metrics=defaultdict(lambda: defaultdict(list)),
    **{
      "loss_type": "grpo",
      "importance_sampling_level": "token",
      "epsilon_low": 0.2,
      "epsilon_high": 0.2,
      **settings,
    },
  )
  ids = torch.zeros(B, T, dtype=torch.long)
  inputs = {
    "prompt_ids": ids[:, :1],
    "prompt_mask": ids[:, :1] + 1,
    "completion_ids": ids,
    "completion_mask": torch.tensor(MASK).int(),
    "advantages": torch.tensor(ADVANTAGES),
    "old_per_token_logps": torch.tensor(OLD),
    "ref_per_token_logps": torch.tensor(REF),
    "importance_sampling_ratio": torch.tensor(WEIGHTS),
    "num_items_in_batch": torch.tensor(float(MASK.sum())),
  }
  kind = trl.gmpo if gmpo else trl.grpo
  loss = kind._compute_loss(trainer, trainer.model, inputs)
  loss.backward()
  return loss.item(), taken.grad.numpy()


def ours(monkeypatch, *, corrected, **settings):
  """The same by `learner.grpo_loss`; the parameters are the log-probabilities."""
  monkeypatch.setattr(learner, "logps", lambda model, params, inputs: (params, params))
  tokens = np.zeros((B, T), np.int32)
  packed = batch.GrpoBatch(
    inputs=batch.Inputs(
      tokens=tokens, positions=None, sources=None, segments=np.int32(MASK), vision=None
    ),
    loss_mask=MASK,
    old_logps=OLD,
    advantages=ADVANTAGES[:, None],
    kl_weights=np.ones((B, 1), np.float32),
    ref_logps=REF,
    is_weights=WEIGHTS if corrected else None,
  )
  loss = learner.grpo_loss(MODEL, Objective(**settings))
  differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, _), gradient = differentiated(jnp.asarray(TAKEN), packed, jnp.float32(BETA))
  return float(value), np.asarray(gradient)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_are_those_of_trl(trl, monkeypatch, name):
  their_settings, our_settings = PAIRS[name]
  expected, gradient = theirs(trl, **their_settings)
  value, grads = ours(monkeypatch, corrected=their_settings.get("corrected", False), **our_settings)
  # float32 sums of two dozen numbers of about 1.
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(grads, gradient, atol=1e-6)
  assert np.abs(gradient).max() > 0.01
