"""Votes without labels, a learner that may refuse, and nothing lost between the two."""

import contextlib
import dataclasses
import json
import threading

import jax
import numpy as np
import pytest

from configs import demo
from pixelis_jax import sampler, sharding, ttrl
from pixelis_jax.algo.calibration import Calibration
from pixelis_jax.algo.pace import Throttle
from pixelis_jax.memory.store import Memory
from pixelis_jax.tools.views import VIEWS
from pixelis_jax.types import Box, Experience, Status, Step, Trajectory, Vote
from tests import episodes, fakes
from tests.episodes import max_difference

START = ttrl.History.start(demo.get_config().vote)
SAMPLED = {}  # By image: the same samples whenever they are asked for.


@pytest.fixture(scope="module")
def config(model_config):
  c = demo.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed = model_config.path, 0
  c.limits.turns = 2
  c.memory.backend = "exact"
  return c.lock()


def experience(policy, task, odd, *, id="e") -> Experience:
  """Four samples of a task, voted "1"; those in `odd` answered it, so that advantages differ."""
  image = task.images[0].tobytes()
  if image not in SAMPLED:
    generate = policy.sampler.bind(policy.params, key=jax.random.key(3), version=0)
    SAMPLED[image] = generate([(task, ())] * 4)
  samples = []
  for i, completion in enumerate(SAMPLED[image]):
    answer = "1" if i in odd else "2"
    samples.append(
      Trajectory(
        task=task, steps=(Step(completion=completion),), status=Status.ANSWERED, answer=answer
      )
    )
  vote = Vote(answer="1", confidence=0.9, share=0.9, margin=0.8, counts={"1": 0.9}, ballots=())
  key = np.zeros(2 * policy.model.config.text.width, np.float32)
  key[0] = 1.0
  return Experience(id=id, key=key, trajectories=tuple(samples), vote=vote, policy_version=0)


def unlabelled(id, seed=0):
  return dataclasses.replace(episodes.task(id, seed=seed), answer=None)


def without_image(id):
  return dataclasses.replace(unlabelled(id), images=())


@contextlib.contextmanager
def answering(config, policy, folder):
  dim = 2 * policy.model.config.text.width
  with Memory(folder / "memory.sqlite", dim=dim, backend="exact") as memory:
    yield ttrl.Answerer(config, policy, ttrl.Published(7, policy.params), memory)


@pytest.fixture
def answerer(config, policy, tmp_path):
  with answering(config, policy, tmp_path) as made:
    yield made


@pytest.fixture(scope="module")
def first(config, policy, tmp_path_factory):
  """(experience, history) of the first request, answered with nothing in memory."""
  with answering(config, policy, tmp_path_factory.mktemp("first")) as made:
    (got,), history = made([unlabelled("a")], jax.random.key(0), START)
  return got, history


@pytest.mark.parametrize("label", [{"answer": "7"}, {"boxes": (Box(0.0, 0.0, 2.0, 2.0),)}])
def test_a_label_cannot_reach_the_loop(answerer, label):
  task = dataclasses.replace(unlabelled("a"), **label)
  with pytest.raises(ValueError, match="'a' carries a label"):
    answerer([task], jax.random.key(0), START)


def test_an_answer_is_samples_votes_and_a_unit_key(answerer, config):
  tasks = [unlabelled("a"), unlabelled("b", seed=1)]
  got, _ = answerer(tasks, jax.random.key(0), START)
  assert [e.id for e in got] == ["a", "b"]
  for e in got:
    assert len(e.trajectories) == config.samples
    assert [b.view for b in e.vote.ballots] == [v.name for v in VIEWS]
    assert e.policy_version == 7
    np.testing.assert_allclose(np.linalg.norm(e.key), 1.0, rtol=1e-5)


def test_samples_vote_where_there_is_nothing_to_look_at(answerer, config):
  """Views of no image would be one greedy answer 13 times, and unanimous about it."""
  tasks = [unlabelled("a"), without_image("b")]
  seen, read = answerer(tasks, jax.random.key(0), START)[0]
  assert [b.view for b in seen.vote.ballots] == [v.name for v in VIEWS]
  assert [b.view for b in read.vote.ballots] == ["identity"] * config.samples
  assert [b.answer for b in read.vote.ballots] == [t.answer for t in read.trajectories]


def voting_by(answerer, **changes):
  """The same answerer under another `vote` config."""
  c = answerer.c.copy_and_resolve_references().unlock()
  c.vote.update(changes)
  return dataclasses.replace(answerer, c=c.lock())


@pytest.mark.parametrize(
  ("voters", "heard"),
  [
    (("samples",), ["samples"]),
    (("views", "samples"), ["views", "samples"]),
    (("memory",), ["memory"]),
    (("samples", "memory"), ["samples", "memory"]),
  ],
)
def test_votes_are_of_views_samples_and_memory_as_asked(
  answerer, config, policy, first, voters, heard
):
  task, key = unlabelled("a"), first[0].key
  answerer.memory.add(dataclasses.replace(experience(policy, task, {0}, id="twin"), key=key))
  (got,), _ = voting_by(answerer, voters=voters)([task], jax.random.key(0), START)
  cast = {"views": [v.name for v in VIEWS], "samples": ["identity"] * config.samples}
  cast["memory"] = ["memory"]
  assert [b.view for b in got.vote.ballots] == [name for part in heard for name in cast[part]]
  if voters == ("memory",):  # It was believed 0.9, and there is nobody else to be believed.
    assert (got.vote.answer, got.vote.confidence) == ("1", 1.0)


def test_wrong_voters_are_named(answerer):
  tasks = [unlabelled("a")]
  for voters in ((), ("views", "neighbours")):
    with pytest.raises(ValueError, match="vote.voters .* must be some of"):
      voting_by(answerer, voters=voters)(tasks, jax.random.key(0), START)
  c = answerer.c.copy_and_resolve_references().unlock()
  c.memory.weight = 0.0
  with pytest.raises(ValueError, match="memory.weight 0.0 must be positive"):
    dataclasses.replace(answerer, c=c)._remembered(tasks[0], np.zeros(1))


def test_the_reference_casts_the_votes_not_the_policy_that_learns(answerer, policy, first):
  """Published weights that never stop writing change the samples, and no ballot."""
  tasks, before = [unlabelled("a")], first[0]
  token = int(policy.chat.target("a")[0])
  answerer.published.publish(8, episodes.tilted(policy.params, {token: 30.0}))
  after, _ = answerer(tasks, jax.random.key(0), START)
  assert before.vote.ballots[0].weight == after[0].vote.ballots[0].weight
  sampled = [t.steps[0].completion.tokens.tolist() for t in after[0].trajectories]
  assert all(set(tokens) == {token} for tokens in sampled)


def test_views_that_told_more_before_weigh_more(answerer, first):
  """The same ballots, but for what earlier requests say of their views."""
  views = START.views
  for i in range(64):
    others = [(v.name, "1", 0.0) for v in VIEWS if v.name != "stretch"]
    views = views.update("digit", [("stretch", str(i % 8), 0.0), *others])
  heard = dataclasses.replace(START, views=views)
  task = unlabelled("a")
  weights = []
  (informed,), heard = answerer([task], jax.random.key(0), heard)
  for got, after in (first, (informed, heard)):
    weights.append({b.view: b.weight for b in got.vote.ballots})
    assert after.views.tallies["stretch"][task.kind].asked >= 1.0  # It has heard this one, too.
  plain, informed = ({k: w[k] / w["identity"] for k in w} for w in weights)
  assert informed["stretch"] > 2 * plain["stretch"]
  np.testing.assert_allclose(informed["wide"], plain["wide"], rtol=1e-6)


def test_votes_of_voters_who_tell_nothing_are_not_believed(answerer):
  """Everything the views said so far was one answer: they may agree, and teach nothing."""
  views, seen = START.views, START.views
  for i in range(64):
    views = views.update("", [(v.name, "1", 0.0) for v in VIEWS])
    seen = seen.update("", [(v.name, str(i % 8), 0.0) for v in VIEWS])
  for history, believed in ((views, False), (seen, True)):
    got, _ = answerer(
      [unlabelled("a")], jax.random.key(0), dataclasses.replace(START, views=history)
    )
    vote = got[0].vote
    assert (vote.confidence > 0.0) == (believed and vote.share > 0.0)
    assert vote.confidence <= vote.share


def test_a_history_survives_json(first):
  _, history = first
  assert ttrl.History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def test_memory_neighbours_vote_and_their_weight_is_bounded(answerer, policy, config, first):
  task, (alone, _) = unlabelled("a"), first
  vote = dataclasses.replace(experience(policy, task, {0}).vote, confidence=0.5)
  twin = dataclasses.replace(alone, id="twin", vote=vote)
  answerer.memory.add(twin)
  ballots = answerer._remembered(task, alone.key)
  # The same key: similarity 1, so the weight is memory.weight times the neighbour's confidence.
  assert [b.source for b in ballots] == ["twin"] and ballots[0].answer == "1"
  np.testing.assert_allclose(ballots[0].weight, config.memory.weight * 0.5, rtol=1e-5)
  answerer.memory.add(dataclasses.replace(twin, id="a"))
  assert [b.source for b in answerer._remembered(task, alone.key)] == ["twin"]  # Not itself.


def test_a_calibrated_vote_says_how_often_such_votes_hold(answerer):
  (raw,), _ = voting_by(answerer, trust_half=0.0)([unlabelled("a")], jax.random.key(0), START)
  half = Calibration(confidence=(0.0, 1.0), right=(0.25, 0.75))
  calibrated = dataclasses.replace(voting_by(answerer, trust_half=0.0), calibration=half)
  (got,), _ = calibrated([unlabelled("a")], jax.random.key(0), START)
  assert raw.vote.uncalibrated is None and got.vote.uncalibrated == raw.vote.confidence
  assert got.vote.confidence == pytest.approx(0.25 + raw.vote.confidence / 2)
  assert (got.vote.share, got.vote.answer) == (raw.vote.share, raw.vote.answer)


def test_only_visits_to_the_same_question_can_flip_it(answerer, policy):
  """Stored 2, 1, 2 in that order; another question, kind or an unanswered visit is no visit."""
  task = unlabelled("a")
  e = experience(policy, task, {0})
  answered = lambda id, answer, e=e: dataclasses.replace(
    e, id=id, vote=dataclasses.replace(e.vote, answer=answer)
  )
  far = np.roll(e.key, 1)
  near = 0.9 * e.key + np.float32(np.sqrt(1 - 0.9**2)) * far
  other = experience(policy, dataclasses.replace(task, kind="other"), {0})
  for visit in (
    answered("z", "2"),
    dataclasses.replace(answered("near", "3"), key=near),
    answered("y", "1"),
    answered("other", "4", other),
    answered("none", None),
    answered("x", "2"),
  ):
    answerer.memory.add(visit)
  c = answerer.c.copy_and_resolve_references().unlock()
  c.guard.weight = 1.0
  guarding = dataclasses.replace(answerer, c=c)
  vote = dataclasses.replace(e.vote, answer="2")
  # 2, 1, 2, 2: two changes of three. By names, or nearest first, it would be another order.
  assert guarding._guarded(vote, task, e.key).confidence == pytest.approx(0.9 / 3)
  assert guarding._guarded(vote, dataclasses.replace(task, id="x"), e.key).confidence == (
    pytest.approx(0.9 * (1 - 2 / 2))  # Not itself: 2, 1, 2.
  )
  assert answerer._guarded(vote, task, e.key) == vote  # Off.


@pytest.fixture
def probe(config, policy):
  tasks = [unlabelled(f"p{i}", seed=10 + i) for i in range(6)]
  return ttrl.make_probe(config, policy, tasks)


@pytest.fixture
def learner(config, policy, probe, tmp_path):
  """Makes learners. Random weights move far in one step: the KL guard is open unless closed."""
  made = []

  def make(probe=probe, **changes):
    c = config.copy_and_resolve_references().unlock()
    for path, value in {"kl__limit": 1e9, **changes}.items():
      c.update_from_flattened_dict({path.replace("__", "."): value})
    made.append(ttrl.Learner(c, policy, ttrl.Published(0, policy.params), probe, tmp_path))
    return made[-1]

  yield make
  for each in made:
    each.close()


def test_an_update_moves_towards_the_vote_and_is_served_after_the_canary(config, policy, learner):
  task = unlabelled("a")
  e = experience(policy, task, {0})
  learn = learner()
  inbox = ttrl.Inbox()
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
  published = ttrl.Published(0, answering.params, answering.sampler.carrier(others))
  learn = ttrl.Learner(c, sampler.on_mesh(policy, others), published, probe, tmp_path)
  inbox = ttrl.Inbox()
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
  published = ttrl.Published(0, plays.params, plays.sampler.serve)
  learn = ttrl.Learner(c, learned, published, probe, tmp_path)
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
    moved.append(max_difference(learn.state.params, policy.params))
  # float32 of parameters near 1 rounds at 6e-8; the first step's rate is 1e-4 / 8.
  assert moved[1] == pytest.approx(0.1 * moved[0], abs=1.3e-7)


def test_updates_wait_their_turn(policy, learner):
  learn, now, slept = learner(), [0.0], []

  def sleep(seconds):
    slept.append(seconds)
    now[0] += seconds

  learn.throttle = Throttle(1, clock=lambda: now[0], sleep=sleep)
  inbox = ttrl.Inbox()
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
  assert max_difference(learn.state.params, policy.params) == 0.0


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
  assert max_difference(served, learn.published.latest()[1]) == 0.0
  assert max_difference(again.state.params, learn.stable[0].params) == 0.0


def test_the_inbox_hands_out_batches_and_what_is_left_after_closing(policy):
  inbox = ttrl.Inbox()
  waiting = [experience(policy, unlabelled("a"), {0}, id=str(i)) for i in range(3)]
  taken = []
  reader = threading.Thread(target=lambda: taken.append(inbox.take(2)))
  reader.start()
  inbox.put(waiting[0])
  reader.join(0.05)
  assert reader.is_alive()  # One is no batch of two.
  inbox.put(waiting[1])
  reader.join(5.0)
  assert [e.id for e in taken[0]] == ["0", "1"]
  inbox.put(waiting[2])
  inbox.close()
  assert [e.id for e in inbox.take(2)] == ["2"]
  assert inbox.take(2) is None


def test_agreement_counts_only_what_the_reference_answered(probe):
  probe = dataclasses.replace(probe, expected=("1/2", None))
  # The same by meaning; the second has nothing to keep.
  assert probe.agreement(["0.5", "3"]) == 1.0
