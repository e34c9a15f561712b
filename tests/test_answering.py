"""Votes without labels: by views, samples and memory, weighed, calibrated and guarded."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import demo
from pixelis_jax import answering, cluster, exchange
from pixelis_jax.algo import voting
from pixelis_jax.algo.calibration import Calibration
from pixelis_jax.answering import Answerer, passes
from pixelis_jax.handover import Published
from pixelis_jax.history import History
from pixelis_jax.memory.store import Memory
from pixelis_jax.tools.views import VIEWS
from pixelis_jax.types import Ballot, Box
from tests import episodes
from tests.episodes import experience, look, unlabelled

START = History.start(demo.get_config().vote)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def config(model_config):
  return episodes.online_config(model_config.path)


def without_image(id):
  return dataclasses.replace(unlabelled(id), images=())


@contextlib.contextmanager
def opened(config, policy, folder):
  dim = 2 * policy.model.config.text.width
  with Memory(folder / "memory.sqlite", dim=dim, backend="exact") as memory:
    yield Answerer(config, policy, Published(7, policy.params), memory)


@pytest.fixture
def answerer(config, policy, tmp_path):
  with opened(config, policy, tmp_path) as made:
    yield made


@pytest.fixture(scope="module")
def first(config, policy, tmp_path_factory):
  """(experience, history) of the first request, answered with nothing in memory."""
  with opened(config, policy, tmp_path_factory.mktemp("first")) as made:
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


def test_an_experience_has_the_reference_s_plain_and_clearer_look(answerer, monkeypatch):
  """As the history says which; the task between has none."""
  tasks = [unlabelled(name, seed=i) for i, name in enumerate("abc")]

  names = iter(["wide", None, "wide"])
  monkeypatch.setattr(History, "clearer", lambda *_: next(names))
  got, history = answerer(tasks, jax.random.key(0), START)
  assert [e.looks is None for e in got] == [False, True, False]
  for e in (got[0], got[2]):
    assert [t.task.id for t in e.looks] == [e.id] * 2
    assert not {id(t) for t in e.looks} & {id(t) for t in e.trajectories}
  assert [(asked.id, asked.open) for asked in history.latest] == [
    ("a", False),
    ("b", True),
    ("c", False),
  ]
  for e, asked in zip(got, history.latest, strict=True):
    assert [s.view for s in asked.said] == [view.name for view in VIEWS]
    assert asked.voted == e.vote.answer


def test_looks_of_all_processes_come_in_the_order_of_the_tasks(answerer, policy, monkeypatch):
  """Two tasks here, of which the second has none, and two elsewhere, where the first has none."""
  played = [look(policy, unlabelled(name), seed=i) for i, name in enumerate("aadd")]
  monkeypatch.setattr(cluster, "everyone", lambda mine: [mine, [False, True]])
  monkeypatch.setattr(exchange, "trajectories", lambda mine, process: [*mine, *played[2:]])
  saw = [(VIEWS[1], played[3]), (VIEWS[2], played[1]), (VIEWS[0], played[0])]
  got = answerer._looks([saw, []], [VIEWS[2].name, None])
  assert got == [(played[0], played[1]), None, None, (played[2], played[3])]


def test_earlier_requests_are_judged_again_by_what_is_known_now(answerer, config, monkeypatch):
  """Of five one is not remembered, and of one the vote fails the gate by what neighbours say."""
  names = "abcdef"
  old, history = answerer([unlabelled(n, seed=i) for i, n in enumerate(names)], KEY, START)
  assert answerer.again(history) == ([], history)  # No view is clearer.
  answerer.memory.add_all([e for e in old if e.id != "e"])
  views = history.views
  for i in range(64):  # By what was heard since, other views weigh more than then.
    others = [(v.name, "1", 0.0) for v in VIEWS if v.name != "wide"]
    views = views.update("digit", [("wide", str(i % 8), 0.0), *others], None)
  history = dataclasses.replace(history, views=views)
  found = [asked for asked in reversed(history.latest) if asked.id != "f"]
  monkeypatch.setattr(History, "again", lambda self, c, passes: found)
  monkeypatch.setattr(History, "clearer", lambda *_: "wide")
  asked = iter([True, False, True])
  monkeypatch.setattr(answering, "passes", lambda vote, *, seen, c: seen and next(asked))
  c = config.copy_and_resolve_references().unlock()
  c.arrivals = 4  # The latest: e, d, c, b.
  got, after = dataclasses.replace(answerer, c=c.lock()).again(history)
  assert [e.id for e in got] == ["d", "b"]
  for e in got:
    before = old[names.index(e.id)]
    assert [t.answer for t in e.trajectories] == [t.answer for t in before.trajectories]
    np.testing.assert_array_equal(e.key, before.key)
    weighs = lambda vote: {b.view: b.weight for b in vote.ballots}
    assert weighs(e.vote)["wide"] > 2 * weighs(before.vote)["wide"]
    (voted,) = answerer.voters([unlabelled(e.id, seed=names.index(e.id))], [[]])
    then = {view.name: t for view, t in voted}
    for again, name in zip(e.looks, ("identity", "wide"), strict=True):
      assert again.task.id == e.id
      assert [s.completion.text for s in again.steps] == [
        s.completion.text for s in then[name].steps
      ]
  assert [(a.id, a.open) for a in after.latest] == [
    *(("a", True), ("b", False), ("c", False)),
    *(("d", False), ("e", False), ("f", True)),
  ]


def test_each_process_takes_its_share_of_what_is_judged_again(answerer, policy, monkeypatch):
  """The other one has the first of two, and what it saw comes first."""
  old, history = answerer([unlabelled("a"), unlabelled("b", seed=1)], KEY, START)
  answerer.memory.add_all(old)
  monkeypatch.setattr(History, "again", lambda self, c, passes: self.latest[::-1])
  monkeypatch.setattr(History, "clearer", lambda *_: "wide")
  monkeypatch.setattr(answering, "passes", lambda vote, *, seen, c: seen)
  theirs = [look(policy, unlabelled("b"), seed=seed) for seed in (1, 2)]
  monkeypatch.setattr(cluster, "split", lambda n: range(1, n))
  monkeypatch.setattr(cluster, "everyone", lambda mine: [mine, mine])
  monkeypatch.setattr(exchange, "trajectories", lambda mine, process: [*theirs, *mine])
  got, _ = answerer.again(history)
  assert [e.id for e in got] == ["b", "a"]
  assert got[0].looks == tuple(theirs)
  assert [t.task.id for t in got[1].looks] == ["a", "a"]


def test_nothing_is_kept_where_nothing_is_judged_again(answerer, config):
  for name, value in (("hindsight", 0), ("gate.clearer", False)):
    c = config.copy_and_resolve_references().unlock()
    c.update_from_flattened_dict({name: value})
    _, history = dataclasses.replace(answerer, c=c.lock())([unlabelled("a")], KEY, START)
    assert history.latest == ()


def test_only_votes_of_who_sees_better_teach(config):
  """As sure as can be, they would only confirm what the policy says itself."""
  c = config.copy_and_resolve_references().unlock().gate
  c.confidence = c.margin = 0.8
  heads = [Ballot(answer="1", weight=1.0, view="identity")] * 5
  sure = voting.majority(heads)
  assert (passes(sure, seen=False, c=c), passes(sure, seen=True, c=c)) == (False, True)
  unsure = voting.majority([*heads, *[Ballot(answer="2", weight=1.0, view="wide")] * 2])
  assert not passes(unsure, seen=True, c=c)  # 5 of 7.
  c.clearer = False
  assert (passes(sure, seen=False, c=c), passes(unsure, seen=True, c=c)) == (True, False)


def test_views_that_told_more_before_weigh_more(answerer, first):
  """The same ballots, but for what earlier requests say of their views."""
  views = START.views
  for i in range(64):
    others = [(v.name, "1", 0.0) for v in VIEWS if v.name != "stretch"]
    views = views.update("digit", [("stretch", str(i % 8), 0.0), *others], None)
  heard = dataclasses.replace(START, views=views)
  task = unlabelled("a")
  weights = []
  (informed,), heard = answerer([task], jax.random.key(0), heard)
  for got, after in (first, (informed, heard)):
    weights.append({b.view: b.weight for b in got.vote.ballots})
    heard = after.views.tallies["stretch"][task.kind].values()
    assert sum(tally.asked for tally in heard) >= 1.0  # It has heard this one, too.
  plain, informed = ({k: w[k] / w["identity"] for k in w} for w in weights)
  assert informed["stretch"] > 2 * plain["stretch"]
  np.testing.assert_allclose(informed["wide"], plain["wide"], rtol=1e-6)


def test_votes_of_voters_who_tell_nothing_are_not_believed(answerer):
  """Everything the views said so far was one answer: they may agree, and teach nothing."""
  views, seen = START.views, START.views
  for i in range(64):
    views = views.update("", [(v.name, "1", 0.0) for v in VIEWS], None)
    seen = seen.update("", [(v.name, str(i % 8), 0.0) for v in VIEWS], None)
  for history, believed in ((views, False), (seen, True)):
    got, _ = answerer(
      [unlabelled("a")], jax.random.key(0), dataclasses.replace(START, views=history)
    )
    vote = got[0].vote
    assert (vote.confidence > 0.0) == (believed and vote.share > 0.0)
    assert vote.confidence <= vote.share


def test_a_history_survives_json(first):
  _, history = first
  assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


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
