"""The forward model learns what calls do, and what it has learned pays no longer."""

import jax
import numpy as np
import optax
import pytest

from configs import tiny_rft
from pixelis_jax import learner, sampler, sharding, surprise
from pixelis_jax.algo import dynamics
from pixelis_jax.model.icm import ForwardModel
from pixelis_jax.types import Completion, Status, Step, ToolCall, ToolResult, Trajectory
from tests import episodes
from tests.episodes import max_difference

WIDTH, KINDS = 8, 4


@pytest.fixture(scope="module")
def learning():
  """(fresh state, its step) of a small forward model."""
  model = ForwardModel(width=WIDTH, actions=KINDS, hidden=32)
  tx = optax.adam(1e-2)
  step = learner.make_step(surprise.forward_loss(model), tx, donate=False)
  return learner.init_state(model.init(jax.random.key(0)), tx, seed=0), step


def units(rng, *shape):
  x = rng.standard_normal((*shape, WIDTH)).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def world(rng, rows=64):
  """Half of the calls lead to one fixed state for each kind of call; half to a random one."""
  there = units(np.random.default_rng(7), KINDS)
  kinds, noisy = rng.integers(KINDS // 2, size=rows), np.arange(rows) % 2 == 1
  actions = np.eye(KINDS, dtype=np.float32)[kinds + noisy * (KINDS // 2)]
  following = np.where(noisy[:, None], units(rng, rows), there[kinds])
  ones = np.ones(rows, np.float32)
  return surprise.Transitions(units(rng, rows), actions, following, ones), noisy


def test_what_can_be_predicted_is_learned_and_noise_stays(learning):
  """A noisy TV: whatever is learned, a random unit vector is at least 1 away on average, which is
  the error of who predicts its mean, 0. Fresh draws at each step: nothing is learned by heart.
  """
  state, step = learning
  rng, errors = np.random.default_rng(0), []
  for _ in range(150):
    rows, noisy = world(rng)
    state, measured = step(state, rows)
    found = np.asarray(measured["errors"])
    errors.append((found[~noisy].mean(), found[noisy].mean()))
    assert measured["skipped"] == 0.0
  # At first nothing is expected to change: two random unit vectors are 2 apart, squared.
  assert errors[0] == pytest.approx((2.0, 2.0), abs=0.5)
  known, noise = np.mean(errors[-10:], axis=0)
  assert known < 0.1 and 0.9 < noise < 1.5


def test_a_look_that_is_repeated_stops_paying(learning):
  """The unit falls as well, but slower than the error: it remembers all of the run."""
  state, step = learning
  rows, _ = world(np.random.default_rng(1), rows=64)
  rows = jax.tree.map(lambda x: x[:8], rows)  # The same eight again and again: noise, too.
  scale, paid = dynamics.Scale(), []
  for _ in range(150):
    state, measured = step(state, rows)
    scale = scale.after(count=float(measured["count"]), square=float(measured["square"]))
    paid.append(dynamics.reward(np.asarray(measured["errors"]), scale.unit, clip=5.0))
  assert 0.7 < paid[0] <= 1.0 and paid[-1] < 0.05


def test_padding_is_no_transition(learning):
  state, step = learning
  rows, _ = world(np.random.default_rng(2))
  few = surprise.Transitions(*(x[:8] for x in (rows.states, rows.actions, rows.following)), 1.0)
  few = few.replace(weights=np.float32([1, 1, 1, 0, 0, 0, 0, 0]))
  alone = jax.tree.map(lambda x: x[:3], few)
  (after, measured), (wanted, expected) = step(state, few), step(state, alone)
  for name in ("loss", "change", "count", "square"):
    np.testing.assert_allclose(measured[name], expected[name], rtol=1e-6)
  assert float(measured["count"]) == 3.0 and not np.any(measured["errors"][3:])
  # The mean over 8 would move weights elsewhere; 1e-5 is what a sum's order may do to Adam.
  assert max_difference(after.params, wanted.params) < 1e-5


@pytest.fixture(scope="module")
def config():
  c = tiny_rft.get_config("dynamics").copy_and_resolve_references().unlock()
  c.reward.dynamics.warmup, c.rows_multiple = 4, 8
  return c.lock()


def looked(policy, seed: int, *results: ToolResult) -> Trajectory:
  """An episode whose calls had these results; nothing is sampled: what is shown counts."""
  task, steps = episodes.task(f"q{seed}", seed=seed), []
  context, nothing = policy.chat.prompt(task), np.zeros(0, np.float32)
  sampled = {"tokens": np.zeros(0, np.int32), "logps": nothing, "entropies": nothing}
  said = lambda: Completion(context=context, **sampled, text="", finished=True, policy_version=0)
  for n, result in enumerate(results):
    call = ToolCall(name="zoom_in", arguments={"bbox_2d": [0, 0, 20 + seed, 20 + n]})
    steps.append(Step(completion=said(), call=call, result=result))
    context = policy.chat.result(result)
  steps.append(Step(completion=said()))
  return Trajectory(task=task, steps=tuple(steps), status=Status.NO_ANSWER, answer=None)


@pytest.fixture(scope="module")
def played(policy):
  """Four transitions: one, none, two and one."""
  crops = (1, 0, 2, 1)
  return [
    looked(policy, seed, *(episodes.crop(seed + n) for n in range(count)))
    for seed, count in enumerate(crops)
  ]


def on(policy, config, **mesh):
  return surprise.Surprise(config, policy, sharding.make_mesh(**(mesh or {"data": 1})))


@pytest.fixture(scope="module")
def alone(policy, config, played):
  """(the reward of two steps, and the model after them) on one device."""
  curious = on(policy, config)
  return [curious(played), curious(played)], curious


def test_episodes_are_paid_for_what_their_calls_showed(alone, policy, played):
  (first, measured), (again, later) = alone[0]
  # At first the model says that nothing changes: what is paid is how far the states are apart.
  said = lambda n: "Here is the zoomed image." if n > 1 else "what?"
  told = lambda t, n: sampler.embed(policy, [t.task], [t.steps[:n]], [said(n)])
  moved = lambda t, n: float(np.square(told(t, n + 1) - told(t, n)).sum())
  change = [[moved(t, n + 1) for n in range(len(t.steps) - 1)] for t in played]
  every = np.concatenate(change)
  unit = np.sqrt(np.mean(every**2))
  expected = [np.mean(c) / unit if c else 0.0 for c in change]
  np.testing.assert_allclose(first, expected, rtol=1e-4)
  assert measured["dynamics_error"] == pytest.approx(every.mean(), rel=1e-4)
  assert measured["dynamics_change"] == pytest.approx(every.mean(), rel=1e-4)
  assert measured["dynamics_scale"] == pytest.approx(unit, rel=1e-4)
  # Then it has learned from them: the same looks are worth less, and no look still nothing.
  assert later["dynamics_error"] < 0.9 * measured["dynamics_error"]
  assert again[1] == 0.0 and all(b < a for a, b in zip(first, again, strict=True) if a)


def test_words_are_a_part_of_what_is_shown(policy, config, played):
  """Tools such as READ_TEXT show nothing else; the picture stays what it was."""
  words = [looked(policy, 0, ToolResult(text=text)) for text in ("what?", "Here.")]
  paid, _ = on(policy, config)([*played, *words])
  # The question's own words change nothing at all.
  assert paid[4] < 1e-6 < 0.01 < paid[5] < paid[0]


def test_several_devices_learn_what_one_learns(alone, policy, config, played):
  curious = on(policy, config, data=2)
  for wanted, expected in alone[0]:
    found, measured = curious(played)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert measured == pytest.approx(expected, rel=1e-4)


def test_nothing_is_paid_before_the_unit_is_known(policy, config, played):
  c = config.copy_and_resolve_references().unlock()
  c.reward.dynamics.warmup = 5
  curious = on(policy, c)
  assert curious(played)[0] == [0.0] * 4  # Four transitions.
  assert curious(played)[0][0] > 0.0  # Eight.


def test_a_step_without_a_look_teaches_nothing(policy, config, learning, played):
  curious = on(policy, config)
  before = curious.beside(learning[0])["dynamics"]
  assert curious([played[1]]) == ([0.0], {"dynamics_scale": 0.0})
  assert curious.beside(learning[0])["dynamics"] is before


def test_where_it_weighs_nothing_there_is_nothing(policy, config, learning, played):
  c = config.copy_and_resolve_references().unlock()
  c.reward.weights.dynamics = 0.0
  curious, state = on(policy, c), learning[0]
  assert curious(played) == (None, {}) and curious.extra() == {}
  # What a checkpoint holds is what it has always held.
  assert curious.beside(state) is state and curious.resumed(state, {}) is state


@pytest.mark.parametrize(
  "name, value, match",
  [
    ("passes", 0, "reward.dynamics: passes 0 must be positive"),
    ("clip", 0.0, "reward.dynamics: clip 0.0 must be positive"),
    ("lr", -1e-3, "reward.dynamics: lr -0.001 must be positive"),
  ],
)
def test_settings_that_cannot_be_are_named(policy, config, name, value, match):
  c = config.copy_and_resolve_references().unlock()
  c.reward.dynamics[name] = value
  with pytest.raises(ValueError, match=match):
    on(policy, c)


def test_a_policy_without_tools_cannot_be_curious(policy, config):
  bare = sampler.with_tools(policy.settings, policy.model, policy.params, ())
  with pytest.raises(
    ValueError, match="weights.dynamics 0.05 must be 0 for a policy without tools"
  ):
    on(bare, config)
