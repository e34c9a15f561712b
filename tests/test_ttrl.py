"""A learner that may refuse: what an update is made of, and what is served of it."""

import dataclasses

import jax
import numpy as np
import pytest

from pixelis_jax import sampler, sharding, ttrl
from pixelis_jax.algo.pace import Throttle
from pixelis_jax.handover import Inbox, Published
from pixelis_jax.model import trainable
from pixelis_jax.types import Status, Step, Trajectory
from tests import episodes, fakes
from tests.episodes import experience, max_difference, seen, unlabelled


@pytest.fixture(scope="module")
def config(model_config):
  return episodes.online_config(model_config.path)


@pytest.fixture
def probe(config, policy):
  tasks = [unlabelled(f"p{i}", seed=10 + i) for i in range(6)]
  return ttrl.make_probe(config, policy, tasks)


@pytest.fixture
def learner(config, policy, probe, tmp_path):
  """Makes learners. Random weights move far in one step: the KL guard is open unless closed."""
  made = []

  def make(probe=probe, recall=lambda ids: [], **changes):
    c = config.copy_and_resolve_references().unlock()
    for path, value in {"kl__limit": 1e9, **changes}.items():
      c.update_from_flattened_dict({path.replace("__", "."): value})
    made.append(ttrl.Learner(c, policy, Published(0, policy.params), probe, tmp_path, recall))
    return made[-1]

  yield make
  for each in made:
    each.close()


def test_an_update_moves_towards_the_vote_and_is_served_after_the_canary(config, policy, learner):
  task = unlabelled("a")
  e = experience(policy, task, {0})
  learn = learner()
  inbox = Inbox()
  inbox.put(e)
  inbox.put(experience(policy, task, {0}, id="f"))
  inbox.close()
  learn.run(inbox)
  version, served = learn.published.latest()
  assert (version, learn.applied, learn.refused, learn.learned) == (1, 1, 0, "f")
  # What is served is the average of reference and proposal: (1 - ema) of the way.
  moved = max_difference(learn.whole(learn.state.params), policy.params)
  # float32 rounds parameters below 1 by at most 2^-25, and two of them differ here.
  np.testing.assert_allclose(
    max_difference(served, policy.params), (1 - config.learn.ema) * moved, rtol=1e-6, atol=6e-8
  )


def test_what_is_learned_on_other_devices_is_served_from_the_first(config, policy, probe, tmp_path):
  """Two devices learn beside the one that answers; the same update, and it comes back to that."""
  c = config.copy_and_resolve_references().unlock()
  c.kl.limit, c.probe.tolerance, c.learn.publish_every = 1e9, 1.0, 1
  others = sharding.make_mesh(1, 2, 1, devices=jax.devices()[1:])
  answering = sampler.on_mesh(policy, sharding.make_mesh(1))
  there = sampler.on_mesh(policy, others)
  learned, _ = trainable.parts(there.model, there.params, c.model.freeze)
  carry = answering.sampler.carrier(others, learned)
  published = Published(0, answering.params, carry)
  learn = ttrl.Learner(c, there, published, probe, tmp_path, list)
  inbox = Inbox()
  for id in ("e", "f"):
    inbox.put(experience(policy, unlabelled("a"), {0}, id=id))
  inbox.close()
  learn.run(inbox)
  learn.close()
  version, served = published.latest()
  assert version == 1 and max_difference(served, policy.params) > 0.0
  where = lambda tree: {d.id for x in jax.tree.leaves(tree) for d in x.devices()}
  assert where(learn.average) == {1, 2} and where(served) == where(policy.params) == {0}
  assert max_difference(served, learn.whole(learn.average)) == 0.0


def test_corrections_are_the_samples_with_the_voted_answer_in_place_of_theirs(policy, learner):
  """Of five, one answered in no box and one not at all; of the others the first two are taken."""
  task, chat = unlabelled("a"), policy.chat

  def sample(text, answer):
    completion = fakes.completion(text, context=chat.prompt(task))
    return Trajectory(
      task=task, steps=(Step(completion=completion),), status=Status.ANSWERED, answer=answer
    )

  samples = (
    sample("it is 2", "2"),
    sample("who knows", None),
    sample(r"a \boxed{2}, no \boxed{2}.", "2"),
    sample(r"\boxed{1}", "1"),
    sample(r"\boxed{3}", "3"),
  )
  vote = experience(policy, task, {0}).vote
  rows = learner(learn__corrections=2)._corrections(samples, vote)
  taught = [chat.decode(row.tokens[row.loss_mask]) for row in rows]
  ends = chat.decode(chat.target(""))
  assert taught == [rf"a \boxed{{2}}, no \boxed{{1}}.{ends}", rf"\boxed{{1}}{ends}"]
  assert learner(learn__corrections=0)._corrections(samples, vote) == []


def pushing(learn, *experiences):
  """(row, advantage, KL weight) of the experiences, one group a row of rewards."""
  targets = np.array([[float(t.answer == "1") for t in e.trajectories] for e in experiences])
  targets = targets.astype(np.float32)
  pushes = targets - targets.mean(1, keepdims=True)
  return learn._pushing(experiences, targets, pushes, learn._fresh(experiences))


def test_an_experience_teaches_its_most_telling_samples(policy, learner):
  """Of samples 0 to 3 only 2 agrees: it and the last of the others are shown, each once."""
  learn = learner(learn__contrast=2, learn__corrections=0)
  e = experience(policy, unlabelled("a"), {2})
  rows = pushing(learn, e)
  # One agrees of four: advantages 3/4 and -1/4. The answer came up once: (1 + 5) / (1 + 10) of two
  # places, so its weight is 11 / 12.
  assert [push for _, push, _ in rows] == pytest.approx([0.75 * 11 / 12, -0.25 * 11 / 12])
  for (row, _, held), sample in zip(rows, (e.trajectories[2], e.trajectories[3]), strict=True):
    assert held == 1.0
    np.testing.assert_array_equal(row.tokens, ttrl.batch.trajectory_row(sample).tokens)


def test_more_vote_than_learn_and_chance_decides_who(policy, learner):
  learn = learner(learn__samples=2)
  e = experience(policy, unlabelled("a"), {0})
  drawn = [[e.trajectories.index(t) for t in learn._drawn(e, i).trajectories] for i in range(20)]
  assert all(len(set(kept)) == 2 and kept == sorted(kept) for kept in drawn)
  assert {i for kept in drawn for i in kept} == {0, 1, 2, 3}  # Not the first two.
  assert drawn == [
    [e.trajectories.index(t) for t in learn._drawn(e, i).trajectories] for i in range(20)
  ]
  assert learner(learn__samples=0)._drawn(e, 0) is learner(learn__samples=9)._drawn(e, 0) is e


def test_samples_earn_by_the_rule_and_are_chosen_by_it(policy, learner, monkeypatch):
  """Votes of 2/3 for "1" and 1/3 for "2": soft frequencies pay both, agreement only one."""
  e = experience(policy, unlabelled("a"), {0})
  e = dataclasses.replace(e, vote=dataclasses.replace(e.vote, counts={"1": 2 / 3, "2": 1 / 3}))
  learn = learner(learn__reward__rule="soft")
  seen = []

  def pushing(taken, earned, pushes, fresh):
    seen.append((earned, pushes))
    raise StopAsyncIteration  # Before anything is computed.

  monkeypatch.setattr(learn, "_pushing", pushing)
  with pytest.raises(StopAsyncIteration):
    learn.update([e])
  earned, pushes = seen[0]
  # The same entropy is taken from all: 1/3 lies between the two. Dr. GRPO: less the mean.
  np.testing.assert_allclose(earned[0, 0] - earned[0, 1:], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(pushes[0], [1 / 4, -1 / 12, -1 / 12, -1 / 12], rtol=1e-5)


def test_what_scrl_does_not_trust_is_shown_to_nobody(policy, learner, monkeypatch):
  """It learns from negatives where no answer leads: the winner must not be taught by the way."""
  learn = learner(learn__reward__rule="scrl", learn__contrast=1)
  shown = lambda samples, vote: [ttrl.batch.trajectory_row(samples[0])]
  monkeypatch.setattr(learn, "_corrections", shown)
  e = experience(policy, unlabelled("a"), {0})
  weak = dataclasses.replace(e, vote=dataclasses.replace(e.vote, share=0.3))
  (_, (_, taught, _), *_), (_, (_, untaught, _)) = pushing(learn, e), pushing(learn, weak)
  assert taught > 0.0 and untaught == 0.0


def test_an_answer_voted_often_pushes_less_each_time(policy, learner):
  learn = learner(learn__contrast=1, learn__corrections=0)
  common = experience(policy, unlabelled("a"), {0})
  rare = dataclasses.replace(common, vote=dataclasses.replace(common.vote, answer="7"))
  rows = pushing(learn, *[common] * 9, rare)
  pushes = [push for _, push, _ in rows]
  assert pushes[0] == pushes[8] and pushes[9] > 1.5 * pushes[0]


def test_rehearsal_is_held_the_same_whatever_the_coefficient(config, learner):
  learn = learner()
  for coef in (0.1, 2.0):
    learn.kl = dataclasses.replace(learn.kl, coef=coef)
    rows = learn._rehearsing()
    assert len(rows) == config.probe.rehearse
    for _, push, held in rows:
      assert push == 0.0
      assert held * coef == pytest.approx(config.probe.weight)


def test_rows_that_would_need_another_program_are_left_out(policy, learner):
  rows = pushing(learner(), experience(policy, unlabelled("a"), {0}))
  tokens = len(rows[0][0].tokens)
  short = batch_row(rows[0][0], tokens - 1)
  # The multiple is the config's; the longer row is not among the packed.
  packed = learner(learn__max_tokens=tokens - 1)._pack([*rows, (short, 0.5, 1.0)])
  assert packed.advantages.ravel().tolist().count(0.0) == len(packed.advantages) - 1
  with pytest.raises(ValueError, match=rf"learn.max_tokens=8 .* shortest has {tokens} tokens"):
    learner(learn__max_tokens=8)._pack(rows)
  with pytest.raises(ValueError, match="learn.max_patches=1: .* smallest images"):
    learner(learn__max_patches=1)._pack(rows)


def batch_row(row, n):
  """The row's first n tokens."""
  cut = {name: getattr(row, name)[:n] for name in ("tokens", "loss_mask", "logps")}
  return ttrl.batch.Row(images=row.images, **cut)


def test_only_what_is_not_frozen_learns(policy, learner):
  learn = learner(model__freeze=("text",))
  learn.update([experience(policy, unlabelled("a"), {0})])
  assert learn.applied == 1
  assert learn.state.params.keys() == {"visual"} == learn.average.keys()
  assert max_difference(learn.state.params["visual"], policy.params["visual"]) > 0.0
  now, was = learn.whole(learn.state.params)["text"], policy.params["text"]
  assert jax.tree.all(jax.tree.map(lambda x, y: x is y, now, was))  # There is one copy.


def test_an_update_in_parts_is_the_same(policy, learner):
  """All means are over the whole update: four parts, of which some have no row that pushes."""
  taken = [experience(policy, unlabelled("a"), {0})]
  # Of rehearsed rows, which weigh 800 times as much in the KL, the gradient is rounding alone.
  made = (learner(learn__accumulate=parts, probe__rehearse=0) for parts in (1, 4))
  whole, split = (learn.update(taken) for learn in made)
  same = ("actor/grad_norm", "actor/loss", "actor/pg_loss", "actor/entropy")
  # float32 sums in another order.
  assert [split[k] for k in same] == pytest.approx([whole[k] for k in same], rel=1e-5, abs=1e-6)
  assert whole["actor/grad_norm"] > 0.0


@pytest.mark.parametrize("rank", [0, 2])
def test_what_learns_is_float32_and_what_is_served_is_not(config, probe, tmp_path, rank):
  """The weights themselves, or adapters beside a base that is bfloat16 already."""
  c = config.copy_and_resolve_references().unlock()
  c.model.dtype, c.model.lora.rank, c.kl.limit, c.probe.tolerance = "bfloat16", rank, 1e9, 1.0
  c.model.lora.targets = ("visual/blocks/attn/qkv",)
  mesh = sharding.make_mesh(1)
  learned = sampler.load_policy(c.model, mesh=mesh, adapters=jax.random.key(0))
  plays = sampler.serving(learned, mesh)
  published = Published(0, plays.params, plays.sampler.serve)
  learn = ttrl.Learner(c, learned, published, probe, tmp_path, list)
  learn.update([experience(plays, unlabelled("a"), {0})])
  learn.publish()
  learn.close()
  assert learn.applied == 1
  dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
  assert dtypes(learn.state.params) == dtypes(learn.average) == {"float32"}
  adapters, served = ttrl.lora.split(published.latest()[1])
  assert dtypes(ttrl.lora.plain(served)) == {"bfloat16"}
  assert dtypes(adapters) == ({"float32"} if rank else set())
  leaves = len(jax.tree.leaves(learn.state.params))
  assert leaves == (2 if rank else len(jax.tree.leaves(plays.params["visual"])))


def test_a_question_teaches_so_often_and_no_more(policy, learner):
  """The limit is of a question, whatever its id; another picture is another question."""
  learn = learner(learn__per_question=2, learn__contrast=1)
  twice = [experience(policy, unlabelled("a"), {0}), experience(policy, unlabelled("b"), {0})]
  other = experience(policy, unlabelled("c", seed=1), {0})
  assert ttrl.asked(twice[0]) == ttrl.asked(twice[1]) != ttrl.asked(other)
  pushes = [push for _, push, _ in pushing(learn, *twice, twice[0], other)]
  assert [push > 0 for push in pushes] == [True, True, False, True]
  measured = learn.update(twice)  # Neither may teach again: nothing is computed.
  assert (learn.applied, learn.refused) == (0, 1) and "actor/kl" not in measured
  assert list(learner()._fresh([*twice, *twice])) == [True] * 4


def test_sure_votes_move_the_policy_less(policy, learner):
  """Adam's step is linear in its rate: with confidence 0.9 a tenth of the way, from one state."""
  learn, moved = learner(), []
  state, kl = learn.state, learn.kl
  for learn.c.learn.lr_rule in ("fixed", "confidence"):
    learn.state, learn.kl = state, kl
    learn.update([experience(policy, unlabelled("a"), {0})])
    moved.append(max_difference(learn.whole(learn.state.params), policy.params))
  # float32 of parameters near 1 rounds at 6e-8; the first step's rate is 1e-4 / 8.
  assert moved[1] == pytest.approx(0.1 * moved[0], abs=1.3e-7)


def test_what_disagreed_is_read_again_beside_what_is_new(policy, learner, monkeypatch):
  """Not what was unanimous, nor what may not teach; what is measured is of the new ones."""
  task, other = unlabelled("a"), unlabelled("b", seed=1)
  split = experience(policy, task, {0, 1}, id="split")
  agreed = experience(policy, other, {0, 1, 2, 3}, id="agreed")
  again = experience(policy, task, {0}, id="again")  # The second visit to one question.
  new = experience(policy, unlabelled("c", seed=2), {0, 1, 2}, id="new")
  asked, read = [], []

  def recall(ids):
    asked.append(list(ids))
    return [e for e in (split, agreed, again) if e.id in ids]

  pushing = lambda taken, earned, pushes, fresh: read.append(([e.id for e in taken], list(fresh)))
  learn = learner(recall=recall, learn__replay__experiences=4, learn__per_question=1)
  learn.update([split, agreed, again])
  assert asked == []  # Nothing had been read before.
  assert learn.replay.to_list() == [("split", 0.5)]
  monkeypatch.setattr(learn, "_pushing", lambda *given: pushing(*given) or [])
  measured = learn.update([new])
  assert asked == [["split"]] and read == [(["new", "split"], [True, True])]
  assert (measured["majority_voting_reward"], measured["replayed"]) == (0.75, 1.0)
  learn.recall = lambda ids: []  # Evicted meanwhile: the update does without.
  assert learn.update([dataclasses.replace(new, id="newer")])["replayed"] == 0.0


def test_updates_wait_their_turn(policy, learner):
  learn, now, slept = learner(), [0.0], []

  def sleep(seconds):
    slept.append(seconds)
    now[0] += seconds

  learn.throttle = Throttle(1, clock=lambda: now[0], sleep=sleep)
  inbox = Inbox()
  for i in range(6):  # Three updates of two, all of which agree: nothing is computed.
    inbox.put(experience(policy, unlabelled("a"), {0, 1, 2, 3}, id=str(i)))
  inbox.close()
  learn.c.learn.publish_every = 100
  learn.publish = lambda: {}
  learn.run(inbox)
  assert slept == [60.0, 60.0] and learn.refused == 3


def test_a_group_that_agrees_teaches_nothing(policy, learner):
  learn = learner()
  learn.update([experience(policy, unlabelled("a"), {0, 1, 2, 3})])
  assert (learn.applied, learn.refused) == (0, 1)
  assert max_difference(learn.whole(learn.state.params), policy.params) == 0.0


def test_the_kl_guard_refuses_and_the_old_state_stands(policy, learner):
  learn = learner(kl__limit=0.0)
  before, step = learn.state, learn.step

  def far(state, *rest):
    """As at a much higher rate: the programs are those of the others."""
    proposed, measured = step(state, *rest)
    further = lambda old, new: old + 1e3 * (new - old)
    params = jax.jit(lambda *both: jax.tree.map(further, *both))(state.params, proposed.params)
    return proposed.replace(params=params), measured

  learn.step = far
  measured = learn.update([experience(policy, unlabelled("a"), {0})])
  assert measured["actor/kl"] > 0.0 and (learn.applied, learn.refused) == (0, 1)
  assert learn.state is before


def test_the_canary_rolls_back_what_hurts(policy, probe, learner):
  """Expected answers that no policy gives: agreement 0, so every publication is undone."""
  tough = dataclasses.replace(probe, expected=("never",) * len(probe.expected))
  learn = learner(tough)
  coef = learn.kl.coef
  learn.update([experience(policy, unlabelled("a"), {0})])
  assert learn.applied == 1
  assert learn.publish()["canary"] == 0.0
  assert (learn.applied, learn.refused) == (0, 1)
  assert max_difference(learn.published.latest()[1], policy.params) == 0.0
  assert learn.kl.coef > 1.5 * coef  # Held harder from now on.


def test_a_restarted_learner_serves_what_was_last_published(policy, learner):
  learn = learner()
  learn.update([experience(policy, unlabelled("a"), {0})])
  learn.learned, learn.lessons["q"] = "a", 3
  learn.publish()
  learn.update([experience(policy, unlabelled("b", seed=1), {0}, id="b")])  # Never published.
  learn.checkpoints.close()
  again = learner()
  version, served = again.published.latest()
  assert (version, again.learned, again.applied, again.lessons) == (1, "a", 1, {"q": 3})
  assert again.replay.to_list() == [("e", 0.75)]  # What was read since is waiting.
  assert max_difference(served, learn.published.latest()[1]) == 0.0
  assert max_difference(again.state.params, learn.stable["state"].params) == 0.0


def test_agreement_counts_only_what_the_reference_answered(probe):
  probe = dataclasses.replace(probe, expected=("1/2", None))
  # The same by meaning; the second has nothing to keep.
  assert probe.agreement(["0.5", "3"]) == 1.0


def test_an_update_also_teaches_to_see(policy, learner, monkeypatch):
  """As part of it: what is refused has not been seen; and a restart goes on with the same pairs."""
  one = seen(policy, "e", plain=1, clear=2)
  learn = learner(recall=lambda ids: [one for id in ids if id == one.id])
  before = learn.looks.state
  measured = learn.update([one])
  assert measured["actor/look_loss"] > 0.0 and learn.looks.ids == ["e"]
  assert learn.looks.state.step == before.step + learn.c.learn.look.updates
  learn.publish()
  learn.checkpoints.close()
  again = learner(recall=learn.recall, kl__limit=0.0)
  assert again.looks.ids == ["e"] and again.looks.state.step == learn.looks.state.step
  assert max_difference(again.looks.state.opt_state, learn.looks.state.opt_state) == 0.0
  stood, params = again.looks.state, again.state.params
  monkeypatch.setattr(ttrl, "_pushing_kl", lambda *_: np.float32(1e6))
  again.update([dataclasses.replace(one, id="f")])
  assert again.refused == 1 and again.looks.state is stood and again.state.params is params
