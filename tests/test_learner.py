"""One step does what its loss says: on a policy small enough for paper, and on the real one."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from pixelis_jax import batch, learner, sharding
from pixelis_jax.algo.correction import RolloutCorrection
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.data import demos
from pixelis_jax.data.tasks import DemoSource, TaskSource
from pixelis_jax.model import trainable
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.types import Demo, DemoTurn
from tests import episodes
from tests.episodes import copied, max_difference

ZERO = np.float32(0.0)


def inputs_of(tokens: np.ndarray) -> batch.Inputs:
  """What a policy that reads tokens only needs."""
  segments = np.ones_like(tokens)
  return batch.Inputs(tokens=tokens, positions=None, sources=None, segments=segments, vision=None)


@pytest.fixture
def table_policy(policy, monkeypatch):
  """A policy of one distribution: params["logits"] [V], whatever came before."""

  def logps(model, params, inputs):
    log_p = jax.nn.log_softmax(params["logits"])
    entropy = -jnp.sum(jnp.exp(log_p) * log_p)
    taken = log_p[inputs.tokens]
    return taken, jnp.full_like(taken, entropy)

  def taken_logps(model, params, states, tokens):
    return logps(model, params, SimpleNamespace(tokens=tokens))

  monkeypatch.setattr(learner, "logps", logps)
  monkeypatch.setattr(learner, "taken_logps", taken_logps)
  # A state of one channel that is 1 everywhere: the aim head's weights are what it predicts.
  ones = lambda m, p, inputs, features: jnp.ones((*inputs.tokens.shape, 1))
  monkeypatch.setattr(learner, "decoded", ones)
  monkeypatch.setattr(type(policy.model), "encode", lambda self, params, vision: vision)
  return {"logits": jnp.asarray([0.0, 0.0, np.log(2.0)], jnp.float32)}  # p = 1/4, 1/4, 1/2


def grpo_batch(tokens, mask, old, advantages, kl_weights=None) -> batch.GrpoBatch:
  column = lambda x: np.asarray(x, np.float32)[:, None]
  weights = np.ones(len(tokens)) if kl_weights is None else kl_weights
  return batch.GrpoBatch(
    inputs=inputs_of(np.asarray(tokens, np.int32)),
    loss_mask=np.asarray(mask, bool),
    old_logps=np.asarray(old, np.float32),
    advantages=column(advantages),
    kl_weights=column(weights),
  )


def grpo(model, **changes):
  return jax.jit(learner.grpo_loss(model, Objective(**{"clip_ratio_high": 0.28} | changes)))


def table_batch(**changes) -> batch.GrpoBatch:
  """Three sampled tokens at ratio 1: 0 and 2 with advantage 2, 1 with advantage -1."""
  quarter, half = np.log(0.25), np.log(0.5)
  settings = {
    "tokens": [[0, 2, 1], [1, 0, 0]],
    "mask": [[True, True, False], [True, False, False]],
    "old": [[quarter, half, 0.0], [quarter, 0.0, 0.0]],
    "advantages": [2.0, -1.0],
  }
  return grpo_batch(**settings | changes)


def test_grpo_gradient_is_the_one_on_paper(policy, table_policy):
  packed = table_batch()
  value, grads = jax.value_and_grad(lambda p: grpo(policy.model)(p, packed, ZERO)[0])(table_policy)
  # Loss -(2 + 2 - 1) / 3. Its gradient is -sum A (onehot - p) / 3 with p = (1/4, 1/4, 1/2):
  # A onehot sums to (2, -1, 2), A p to 3 p = (3/4, 3/4, 3/2). Means taken row by row would weigh
  # the second row's only token by 1/2 instead of 1/3.
  np.testing.assert_allclose(value, -1.0, rtol=1e-6)
  expected = -np.array([2 - 0.75, -1 - 0.75, 2 - 1.5]) / 3
  np.testing.assert_allclose(grads["logits"], expected, rtol=1e-5)


def test_a_step_follows_the_gradient_and_counts(policy, table_policy):
  packed, tx = table_batch(), optax.sgd(0.3)
  step = learner.make_step(grpo(policy.model), tx, donate=False)
  state = learner.init_state(table_policy, tx, seed=0)
  after, measured = step(state, packed, ZERO)
  moved = np.asarray(after.params["logits"]) - np.asarray(table_policy["logits"])
  np.testing.assert_allclose(moved, 0.1 * np.array([1.25, -1.75, 0.5]), rtol=1e-5)
  assert int(after.step) == 1 and float(measured["skipped"]) == 0.0
  norm = np.sqrt(1.25**2 + 1.75**2 + 0.5**2) / 3
  np.testing.assert_allclose(measured["grad_norm"], norm, rtol=1e-5)
  # donate=False: the old state is still there, unchanged.
  assert int(state.step) == 0
  np.testing.assert_array_equal(state.params["logits"], table_policy["logits"])
  again, _ = step(state, packed, ZERO)
  assert max_difference(again.params, after.params) == 0.0


def test_kl_weights_scale_each_rows_hold(policy, table_policy):
  # The reference gave the tokens of row 0 twice the probability, that of row 1 half of it:
  # k3 = r - log r - 1 with r = p_ref / p is 1 - log 2 twice, and log 2 - 1/2 once.
  up, down = 1 - np.log(2.0), np.log(2.0) - 0.5
  packed = table_batch(kl_weights=[10.0, 1.0])
  ref = packed.old_logps + np.log(np.array([[2.0], [0.5]], np.float32))
  packed = packed.replace(ref_logps=ref)
  plain, _ = grpo(policy.model)(table_policy, packed, ZERO)
  held, measured = grpo(policy.model)(table_policy, packed, np.float32(0.5))
  np.testing.assert_allclose(held - plain, 0.5 * (10 * 2 * up + down) / 3, rtol=1e-5)
  # The loss's parts, before the coefficient: at ratio 1 the policy's is -(2 + 2 - 1) / 3.
  np.testing.assert_allclose(measured["pg_loss"], -1.0, rtol=1e-6)
  np.testing.assert_allclose(measured["kl_loss"], (10 * 2 * up + down) / 3, rtol=1e-5)
  # `kl` is unweighted, and of rows that push: here both, below only the second.
  np.testing.assert_allclose(measured["kl"], (2 * up + down) / 3, rtol=1e-5)
  rehearsed = table_batch(kl_weights=[10.0, 1.0], advantages=[0.0, -1.0]).replace(ref_logps=ref)
  _, measured = grpo(policy.model)(table_policy, rehearsed, np.float32(0.5))
  np.testing.assert_allclose(measured["kl"], down, rtol=1e-5)


def test_tokens_that_nobody_sampled_start_at_ratio_one(policy, table_policy):
  """The table's sampled tokens are at ratio 1, too: the same value and the same gradient."""
  sampled = table_batch()
  given = table_batch(old=[[np.nan, np.nan, 0.0], [np.log(0.25), 0.0, 0.0]], kl_weights=[0.0, 1.0])
  sampled = sampled.replace(ref_logps=sampled.old_logps)
  given = given.replace(ref_logps=sampled.old_logps)
  value = lambda b: jax.grad(lambda p: grpo(policy.model)(p, b, ZERO)[0])
  assert max_difference(value(sampled)(table_policy), value(given)(table_policy)) < 1e-7
  assert max_difference(value(given)(table_policy), jax.tree.map(jnp.zeros_like, table_policy)) > 0
  # They are not held, and tell nothing of the KL: here that of row 1 alone.
  ref = sampled.old_logps + np.log(np.array([[2.0], [0.5]], np.float32))
  _, measured = grpo(policy.model)(table_policy, given.replace(ref_logps=ref), np.float32(0.5))
  np.testing.assert_allclose(measured["kl"], np.log(2.0) - 0.5, rtol=1e-5)


def test_samples_of_another_policy_are_corrected(policy, table_policy):
  """Row 0's sampler gave its tokens 1 / 1.5 of the probability they have now, row 1's a third."""
  current = table_batch().old_logps
  off = np.log(np.array([[1.5], [3.0]], np.float32))
  sampled = table_batch(old=np.where(table_batch().loss_mask, current - off, 0.0))
  correct = lambda **how: learner.make_correction(RolloutCorrection(**how))(sampled, current)[0]
  corrected = correct(rollout_is="token")
  value, grads = jax.value_and_grad(lambda p: grpo(policy.model)(p, corrected, ZERO)[0])(
    table_policy
  )
  # Weights 1.5 and 2 (3, truncated) on ratios of 1: -(1.5 * 2 + 1.5 * 2 - 2) / 3. By the ratio to
  # the sampler, clipped, it would be -(2 * 1.28 + 2 * 1.28 - 3) / 3 = -0.71.
  np.testing.assert_allclose(value, -4 / 3, rtol=1e-6)
  # -sum w A (onehot - p) / 3: w A is 3, 3, -2, which sum to 4.
  expected = -np.array([3 - 1.0, -2 - 1.0, 3 - 2.0]) / 3
  np.testing.assert_allclose(grads["logits"], expected, rtol=1e-5)
  # Row 1 is too far off: it leaves the mean, whose denominator is then 2.
  corrected = correct(rollout_is="token", rollout_rs="seq_sum_k1", rollout_rs_threshold=2.5)
  value, _ = grpo(policy.model)(table_policy, corrected, ZERO)
  np.testing.assert_allclose(value, -(3 + 3) / 2, rtol=1e-6)


def test_clip_bounds_are_the_configured_ones(policy, table_policy):
  # Token 0 was sampled at probability 1/8: ratio 2, cut at 1.28 where the advantage is positive.
  packed = grpo_batch([[0]], [[True]], [[np.log(0.125)]], [1.0])
  value, measured = grpo(policy.model)(table_policy, packed, ZERO)
  np.testing.assert_allclose(value, -1.28, rtol=1e-6)
  assert float(measured["pg_clipfrac"]) == 1.0
  value, _ = grpo(policy.model, clip_ratio_high=3.0)(table_policy, packed, ZERO)
  np.testing.assert_allclose(value, -2.0, rtol=1e-6)
  # At ratio 1/2 and a negative advantage the lower bound holds: 0.8.
  packed = grpo_batch([[0]], [[True]], [[np.log(0.5)]], [-1.0])
  value, _ = grpo(policy.model)(table_policy, packed, ZERO)
  np.testing.assert_allclose(value, 0.8, rtol=1e-6)


def test_entropy_is_rewarded(policy, table_policy):
  packed = table_batch()
  entropy = 0.5 * np.log(4) + 0.5 * np.log(2)
  plain, measured = grpo(policy.model)(table_policy, packed, ZERO)
  weighed, _ = grpo(policy.model, entropy_coeff=0.1)(table_policy, packed, ZERO)
  np.testing.assert_allclose(measured["entropy"], entropy, rtol=1e-6)
  np.testing.assert_allclose(plain - weighed, 0.1 * entropy, rtol=1e-5)


def test_sft_loss_is_the_mean_over_supervised_tokens(policy, table_policy):
  aims = np.full((2, 3, 2), np.nan, np.float32)
  aims[0, 0], aims[1, 1] = (1.5, 0.0), (0.5, 2.0)
  packed = batch.SftBatch(
    inputs=inputs_of(np.array([[0, 2, 2], [1, 1, 1]], np.int32)),
    loss_mask=np.array([[True, True, False], [True, False, False]]),
    aims=aims,
    sights=None,
  )
  params = {"policy": table_policy, "aim": jnp.array([[0.5, 0.0]], jnp.float32)}
  weights = {"entropy_weight": 0.0, "sight_weight": 0.0}
  loss = jax.jit(learner.sft_loss(policy.model, aim_weight=0.0, **weights))
  value, measured = loss(params, packed)
  nll = (2 * np.log(4) + np.log(2)) / 3
  np.testing.assert_allclose(value, nll, rtol=1e-6)
  # Known aims are missed by (1, 0) and (0, 2): mean squares 1/2 and 2. Only the first stands before
  # a supervised token, and counts again. NaN elsewhere counts for nothing.
  aimed = jax.jit(learner.sft_loss(policy.model, aim_weight=3.0, **weights))
  (value, measured), grads = jax.value_and_grad(aimed, has_aux=True)(params, packed)
  np.testing.assert_allclose(value, nll + 3 * (0.5 + (0.5 + 2) / 2), rtol=1e-6)
  np.testing.assert_allclose(measured["aim_error"], 0.5, rtol=1e-6)
  # d/dw of (w - aim)^2.mean() is w - aim: 3 * ((-1, 0) + ((-1, 0) + (0, -2)) / 2).
  np.testing.assert_allclose(grads["aim"], [[-4.5, -3.0]], rtol=1e-6)
  # "Likely" is more than one half: p = 1/2 is not, rounding or no.
  more = {"logits": table_policy["logits"].at[2].add(0.1)}
  _, measured = loss({**params, "policy": more}, packed)
  np.testing.assert_allclose(measured["likely_tokens"], 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counter(policy, table_policy, bad):
  packed, tx = table_batch(), optax.adamw(0.1)
  step = learner.make_step(grpo(policy.model), tx, donate=False)
  state = learner.init_state(table_policy, tx, seed=0)
  state, _ = step(state, packed, ZERO)
  broken = packed.replace(advantages=np.array([[bad], [1.0]], np.float32))
  after, measured = step(state, broken, ZERO)
  assert float(measured["skipped"]) == 1.0 and int(after.step) == 2
  assert max_difference(after.params, state.params) == 0.0
  before, now = jax.tree.leaves(state.opt_state), jax.tree.leaves(after.opt_state)
  for x, y in zip(before, now, strict=True):  # Moments and their count.
    np.testing.assert_array_equal(x, y)
  assert max_difference({"mu": before[1]}, {"mu": jnp.zeros_like(before[1])}) > 0
  after, measured = step(after, packed, ZERO)
  assert float(measured["skipped"]) == 0.0 and max_difference(after.params, state.params) > 0


def test_only_adapters_are_trained(policy):
  """The base is an argument, not a constant, and is the same bits after a donating step."""
  model = dataclasses.replace(policy.model, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.5))
  trained, base = trainable.parts(model, model.adapt(policy.params, jax.random.key(1)))
  before = copied(base)

  def loss(params, batch):
    tokens = jnp.asarray(batch.inputs.tokens)  # [2, 3], as all that follows.
    positions = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None, None], (2, 3, 3))
    nothing = jnp.zeros((1, 0, model.config.text.width))
    states = model.hidden(
      params, tokens, positions, nothing, jnp.full_like(tokens, -1), jnp.ones_like(tokens)
    )
    return states[:, :, 0].sum(), {}

  tx, keys = optax.adamw(1e-2, weight_decay=0.5), jax.random.split(jax.random.key(2))
  whole = learner.adapted(model, loss)
  step = learner.make_step(whole, tx)
  state = learner.init_state(copied(trained), tx, seed=0)
  moments = [
    path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x.ndim
  ]
  assert set(moments) == {"lora_a", "lora_b"}
  assert len(moments) == 2 * len(jax.tree.leaves(trained))
  state, one = step(state, table_batch(), base, keys[0])
  assert max_difference(base, before) == 0.0
  moved = state.params["text"]["layers"]["attn"]["q"]["lora_b"]
  assert 5e-3 < float(jnp.abs(moved).max()) < 2e-2  # Adam's first step is the rate.
  # B was zero, so A has no gradient yet: only decay moves it, by 1e-2 * 0.5 of itself.
  a = lambda tree: tree["text"]["layers"]["attn"]["q"]["lora_a"]
  np.testing.assert_allclose(a(state.params), 0.995 * a(trained), rtol=1e-5)
  # Another key drops other inputs, the same one the same.
  start = lambda: learner.init_state(copied(trained), tx, seed=0)
  again, other = (step(start(), table_batch(), base, key)[1]["grad_norm"] for key in keys)
  assert float(again) == float(one["grad_norm"]) != float(other)
  # An argument is no constant of the program: the text of a program with the base in it is longer.
  text = jax.jit(whole).lower(trained, table_batch(), base, keys[0]).as_text()
  assert len(text) < sum(x.nbytes for x in jax.tree.leaves(base)) / 2


def test_without_adapters_all_is_trained(policy):
  trained, base = trainable.parts(policy.model, policy.params)
  assert trained is policy.params and base == {}


def test_an_update_passes_back_only_through_what_learns(policy):
  """Forward, back for what a layer read, back for its weights; a held tower is looked through."""

  def passes(model, freeze=()):
    params = model.adapt(policy.params, jax.random.key(0)) if model.lora else policy.params
    return learner.passes(model, trainable.parts(model, params, freeze)[0])

  assert passes(policy.model) == {"text": 3, "visual": 3}
  assert passes(policy.model, ["visual"]) == {"text": 3, "visual": 1}
  assert passes(policy.model, ["text"]) == {"text": 2, "visual": 3}
  adapters = dataclasses.replace(policy.model, lora=LoraConfig(rank=2, alpha=4.0))
  assert passes(adapters) == {"text": 2, "visual": 1}


def test_ema_keeps_its_share():
  average, params = {"a": jnp.asarray([1.0, 2.0])}, {"a": jnp.asarray([3.0, 2.0])}
  np.testing.assert_allclose(learner.ema(average, params, 0.75)["a"], [1.5, 2.0], rtol=1e-6)


# The real model. Losses and gradients are compared through one plain SGD step at rate 1.


@pytest.fixture(scope="module")
def played(policy):
  """Four two-turn episodes with pictures in both turns."""
  generate = policy.sampler.bind(policy.params, key=jax.random.key(0), version=0)
  tasks = [episodes.task(f"q{i}", "what? " * (i + 1), seed=i) for i in range(4)]
  return episodes.two_turns(generate, tasks, [episodes.crop(i) for i in range(4)])


@pytest.fixture(scope="module")
def sgd_step(policy):
  return learner.make_step(grpo(policy.model), optax.sgd(1.0), donate=False)


@pytest.fixture(scope="module")
def state(policy):
  return learner.init_state(policy.params, optax.sgd(1.0), seed=0)


ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5], np.float32)


def pack(policy, trajectories, advantages, **options):
  rows = [batch.trajectory_row(t) for t in trajectories]
  return batch.pack_grpo(rows, advantages, policy.model.config, max_tokens=512, **options)


def test_one_step_makes_rewarded_tokens_likelier(policy, played, sgd_step, state):
  packed = pack(policy, played, ADVANTAGES)
  read = learner.make_logps(policy.model)
  after, measured = sgd_step(state, packed, ZERO)
  # At a small rate: to first order every rewarded row gains and every punished one loses.
  small = lambda old, new: np.asarray(old) + np.float32(1e-2) * (np.asarray(new) - np.asarray(old))
  moved = jax.tree.map(small, state.params, after.params)
  gained = np.asarray(read(moved, packed.inputs)) - np.asarray(read(policy.params, packed.inputs))
  gained = np.where(packed.loss_mask, gained, 0.0).sum(axis=1)
  assert (np.sign(gained) == np.sign(ADVANTAGES)).all(), gained
  assert abs(float(measured["ratio_mean"]) - 1.0) < 1e-5  # old_logps are the learner's own.
  assert float(measured["pg_clipfrac"]) == 0.0


def test_parts_of_a_batch_add_up_to_it_and_padding_changes_nothing(policy, played, sgd_step, state):
  """Parts hold different numbers of tokens: a mean of means would weigh short ones too much.

  The first has two rows, the others one and a row of padding.
  """
  few = np.arange(512)[None, :] % 3 > 0  # Of the last row's tokens two thirds are trained.

  def trained(b: batch.GrpoBatch) -> batch.GrpoBatch:
    mask = np.where(b.advantages == -0.5, few[:, : b.loss_mask.shape[1]], True)
    return b.replace(loss_mask=b.loss_mask & mask)

  bare = trained(pack(policy, played, ADVANTAGES))
  packed = trained(pack(policy, played, ADVANTAGES, multiple_of=6, blocks=3))
  assert (len(bare.loss_mask), len(packed.loss_mask)) == (4, 6)
  tokens = packed.loss_mask.reshape(3, -1).sum(axis=1)
  assert len(set(tokens.tolist())) == 3
  whole, measured_whole = sgd_step(state, bare, ZERO)
  step = learner.make_step(grpo(policy.model), optax.sgd(1.0), parts=3, donate=False)
  summed, measured = step(state, packed, ZERO)
  for name in measured_whole:
    np.testing.assert_allclose(measured[name], measured_whole[name], rtol=1e-5, atol=1e-6)
  # Sums in another order: some 1e-6 of gradients of up to about 1.
  assert max_difference(summed.params, whole.params) < 1e-5
  assert max_difference(summed.params, state.params) > 1e-2


def test_every_mean_of_sft_is_the_whole_batchs(policy):
  """Aims and sights have counts of their own: a part may have none of them."""
  demo = lambda i, boxes: demos_of(policy, i, boxes)
  rows = [demo(0, True), demo(1, False), demo(2, True), demo(3, True)]
  loss = learner.sft_loss(policy.model, entropy_weight=0.1, aim_weight=0.5, sight_weight=1.0)
  params = learner.with_heads(policy.model, policy.params, jax.random.key(0), labels=demos.LABELS)
  start = learner.init_state(params, optax.sgd(1.0), seed=0)

  def run(parts):
    step = learner.make_step(loss, optax.sgd(1.0), parts=parts, donate=False)
    at = {"max_tokens": 512, "multiple_of": parts, "blocks": parts, "labels": demos.LABELS}
    return step(start, batch.pack_sft(rows, policy.model.config, **at))

  (whole, measured_whole), (summed, measured) = run(1), run(4)
  for name in measured_whole:
    np.testing.assert_allclose(measured[name], measured_whole[name], rtol=1e-5, atol=1e-6)
  assert float(measured["aim_error"]) > 0 and float(measured["sight_error"]) > 0
  assert max_difference(summed.params, whole.params) < 1e-5


def demos_of(policy, seed: int, looks: bool) -> batch.Row:
  """A demonstration with an aim and sights, or one that answers at once and has neither."""
  tasks = TaskSource(split="train", seed=seed, kinds=("framed",), size=4)
  if not looks:
    return batch.demo_row(demos.direct(tasks[0]), policy.chat)
  looking = DemoSource(tasks=tasks, toolbox=policy.tools, mistakes=0.0)
  return batch.demo_row(looking[0], policy.chat)


def test_bfloat16_computes_and_float32_learns(policy, played, sgd_step, state):
  """Gradients come back in float32, near those of float32; what is kept is not rounded."""
  packed = pack(policy, played, ADVANTAGES)
  loss = learner.computed_in(grpo(policy.model), "bfloat16")
  grads, _ = jax.jit(jax.grad(loss, has_aux=True))(policy.params, packed, ZERO)
  after, _ = sgd_step(state, packed, ZERO)  # At a rate of 1: it moved by the float32 gradient.
  moved = lambda old, new: np.asarray(old) - np.asarray(new)
  exact = jax.tree.map(moved, state.params, after.params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  mine, theirs = flat(grads), flat(exact)
  cosine = mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs))
  # 8 bits of mantissa in some 20 roundings that follow each other: a few percent of direction.
  assert 0.99 < float(cosine) < 1.0 - 1e-6


def test_a_donating_step_agrees_and_consumes_its_state(policy, table_policy):
  packed, tx = table_batch(), optax.sgd(1.0)
  donating, keeping = (
    learner.make_step(grpo(policy.model), tx, **how) for how in ({}, {"donate": False})
  )
  mine = learner.init_state(copied(table_policy), tx, seed=0)
  after, _ = donating(mine, packed, ZERO)
  kept, _ = keeping(learner.init_state(table_policy, tx, seed=0), packed, ZERO)
  assert max_difference(after.params, kept.params) == 0.0
  assert mine.params["logits"].is_deleted() and not table_policy["logits"].is_deleted()


def test_sight_loss_is_the_one_on_paper(policy, table_policy):
  nothing, unknown = (0.0, *[np.nan] * 8), (np.nan,) * 9
  missed, exact, several = (
    (1.0, 1.0, 3.0, 0.0, 2.0, *[0.0] * 4),
    (1.0, *[0.0] * 8),
    (1.0, *[np.nan] * 8),
  )
  # One object in the first cell, none in the next; two in the third, and one nobody described.
  sights = [[[missed, nothing], [nothing, nothing]], [[exact, several], [unknown, unknown]]]
  sights = np.array(sights, np.float32)
  features = jnp.full((2, 2, 1), 5.0)  # Normed to 1: the head's weights are what it says.
  head = jnp.zeros((1, 2, 9)).at[0, 0, 0].set(np.log(2.0))
  params = {"policy": table_policy, "sight": head, "sight_bias": jnp.zeros((2, 9))}
  # Of labels and nothing, p = 1/2, 1/4, 1/4 everywhere. Where an object is: -log of 1/2, and of the
  # geometric mean of 1/2 and 1/4; where none is, -log of 1/4.
  held = (np.log(2) + (np.log(2) + np.log(4)) / 2) / 2
  place = (1 + 9 + 0 + 4) / 8 / 2  # Of two known places one is missed, by (1, 3, 0, 2, 0, ...).
  inputs = batch.Inputs(tokens=None, positions=None, sources=None, segments=None, vision=features)
  packed = batch.SftBatch(inputs=inputs, loss_mask=None, aims=None, sights=sights)
  value, measured = jax.jit(learner.see_loss(policy.model))(params, packed)
  np.testing.assert_allclose(value, held + np.log(4) + place, rtol=1e-5)
  np.testing.assert_allclose(measured["sight_error"], place, rtol=1e-5)
  # The same, weighed, beside the tokens' loss.
  tokens = np.array([[0, 0], [0, 0]], np.int32)
  packed = packed.replace(
    inputs=inputs_of(tokens).replace(vision=features),
    loss_mask=np.ones((2, 2), bool),
    aims=np.full((2, 2, 2), np.nan, np.float32),
  )
  loss = learner.sft_loss(policy.model, entropy_weight=0.0, aim_weight=1.0, sight_weight=0.5)
  both, _ = jax.jit(loss)({**params, "aim": jnp.zeros((1, 2))}, packed)
  np.testing.assert_allclose(both, np.log(4) + 0.5 * value, rtol=1e-5)


def test_demonstrations_are_learned_on_supervised_turns_only(policy):
  """A row whose turn is not supervised has no gradient from it, though it is read."""
  turns = lambda first, on: (
    DemoTurn(text=first, result=episodes.crop(1), supervised=on),
    DemoTurn(text=r"\boxed{7}", result=None),
  )
  rows = [
    batch.demo_row(Demo(task=episodes.task("a"), turns=turns("look", on)), policy.chat)
    for on in (True, False)
  ]
  tx = optax.adam(3e-3)
  loss = learner.sft_loss(policy.model, entropy_weight=0.0, aim_weight=0.0, sight_weight=0.0)
  step = learner.make_step(loss, tx)
  params = learner.with_heads(policy.model, copied(policy.params), jax.random.key(0), labels=0)
  state = learner.init_state(params, tx, seed=0)
  packed = batch.pack_sft(rows[1:], policy.model.config, max_tokens=512)
  target = policy.chat.target(r"\boxed{7}")
  assert packed.loss_mask.sum() == len(target)
  assert rows[0].loss_mask.sum() == len(target) + len(policy.chat.target("look"))
  losses = []
  for _ in range(8):
    state, measured = step(state, packed)
    losses.append(float(measured["loss"]))
  # From knowing nothing, around log 512 nats a token, towards knowing one answer by heart.
  assert losses[0] > 3 and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 1, "fsdp": 2}])
def test_a_state_lies_on_its_weights_mesh(policy, axes):
  """Also its counters: a restored leaf is committed to where it was, and must fit the others."""
  mesh = sharding.make_mesh(**axes)
  model = dataclasses.replace(policy.model, mesh=mesh)
  params = jax.device_put(policy.params, model.shardings())
  c = common.optimizer(lr=1e-3, steps=20, warmup=0).unlock()
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  for c.muon_scale in (0.0, 1.0):
    tx, _ = learner.make_optimizer(c)
    state = learner.init_state(params, tx, seed=0)
    # Typed keys have data too; `devices` is where every leaf is.
    assert all(len(leaf.devices()) == 2 for leaf in jax.tree.leaves(state))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1 or leaf.size > 9]
    # Adam has two of a weight, Muon one of a layer's matrix.
    wanted = collections.Counter()
    for name, leaf in named.items():
      matrix = name.endswith("/kernel") and "patch" not in name
      wanted[leaf.shape, leaf.sharding] += 1 if matrix and c.muon_scale else 2
    assert collections.Counter((leaf.shape, leaf.sharding) for leaf in moments) == wanted
    later = state.replace(
      opt_state=jax.tree.map(lambda leaf: leaf + 1, state.opt_state), step=state.step + 1
    )
    back = learner.rewound(later, state, tx)
    assert max_difference(back.opt_state, state.opt_state) == 1.0  # Of counters: steps go on.
    found = [
      leaf for leaf in jax.tree.leaves(back.opt_state) if leaf.shape in {k[0] for k in wanted}
    ]
    assert not any(leaf.any() for leaf in found)
