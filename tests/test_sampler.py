"""The sampler and the learner see the same tokens and give them the same probabilities."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from pixelis_jax import batch, learner, sampler
from pixelis_jax.model import lora, trainable
from pixelis_jax.model.load import load
from pixelis_jax.model.peft import save_adapter
from pixelis_jax.types import ToolResult
from tests import episodes, fakes
from tests.episodes import asked, continued, ended, max_difference, task, tilted, two_turns

# Two float32 evaluations of three layers, in other orders of summation: some 1e-6 of a log-prob.
CLOSE = 1e-5
FAILED = ToolResult(text="", error="bbox_2d is too small: 1 x 1 pixels, at least 2 x 2 needed")


def bind(policy, params=None, *, seed=0, temperature=1.0, version=0):
  key = jax.random.key(seed)
  params = policy.params if params is None else params
  return policy.sampler.bind(params, key=key, version=version, temperature=temperature)


@pytest.fixture(scope="module")
def reread(policy):
  """Trajectories under the learner: (packed batch, log-probabilities, entropies)."""
  program = jax.jit(lambda params, inputs: learner.logps(policy.model, params, inputs))

  def read(trajectories, params=None):
    rows = [batch.trajectory_row(t) for t in trajectories]
    packed = batch.pack_grpo(
      rows, np.zeros(len(rows), np.float32), policy.model.config, max_tokens=512
    )
    params = policy.params if params is None else params
    return packed, *map(np.asarray, program(params, packed.inputs))

  return read


@pytest.fixture
def reads(policy, monkeypatch):
  """Every block the sampler reads: a list that fills while the test plays."""
  seen, read = [], policy.sampler.read

  def spy(params, cache, block):
    seen.append(block)
    return read(params, cache, block)

  monkeypatch.setattr(policy.sampler, "read", spy)
  return seen


def real_rows(block) -> int:
  """Those that are no padding."""
  return int((block.segments > 0).any(axis=1).sum())


def sampled(trajectories, name="logps"):
  """All sampled tokens' values of a trajectory list, in the order of a packed batch."""
  return np.concatenate([getattr(s.completion, name) for t in trajectories for s in t.steps])


def assert_same(ours, theirs):
  """Equal tokens with equal log-probabilities."""
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logps, b.logps, rtol=0, atol=CLOSE)


def three_tasks():
  """Questions of different lengths: their rows end at different places, which leaves holes."""
  questions = ("what?", "what is the digit in the red frame, if there is one?", "is it odd?")
  return [task(f"q{i}", question, seed=i) for i, question in enumerate(questions)]


def test_log_probs_equal_the_learners_over_two_turns_with_pictures(policy, reread, reads):
  # Second contexts of three lengths: a square picture, none at all, one of another shape.
  results = [episodes.crop(7), FAILED, episodes.crop(8, height=16, width=48)]
  played = two_turns(bind(policy), three_tasks(), results)
  lengths = {len(s.completion.context.tokens) for t in played for s in t.steps}
  assert len(lengths) == 6 and len(reads) == 2
  # The second turn read only what was new.
  new = sum(len(policy.chat.result(result).tokens) for result in results)
  assert (reads[1].segments > 0).sum() == new
  packed, logps, entropies = reread(played)
  np.testing.assert_allclose(logps[packed.loss_mask], sampled(played), rtol=0, atol=CLOSE)
  np.testing.assert_allclose(
    entropies[packed.loss_mask], sampled(played, "entropies"), rtol=0, atol=CLOSE
  )
  assert np.ptp(sampled(played)) > 0.5  # Not all alike, or any pairing would do.


def test_tokens_in_are_tokens_out(policy, reads):
  results = [episodes.crop(7), FAILED, episodes.crop(8)]
  tasks = three_tasks()
  played = two_turns(bind(policy), tasks, results)
  packed = batch.pack_grpo(
    [batch.trajectory_row(t) for t in played],
    np.zeros(3, np.float32),
    policy.model.config,
    max_tokens=512,
  )
  first, second = reads
  for row, trajectory in enumerate(played):
    one, two = (step.completion for step in trajectory.steps)
    prompt, shown = first.tokens[row], second.tokens[row]
    saw = [prompt[first.segments[row] > 0], one.tokens, shown[second.segments[row] > 0], two.tokens]
    np.testing.assert_array_equal(
      packed.inputs.tokens[row][packed.inputs.segments[row] > 0], np.concatenate(saw)
    )
    np.testing.assert_array_equal(one.context.tokens, policy.chat.prompt(tasks[row]).tokens)
    np.testing.assert_array_equal(two.context.tokens, policy.chat.result(results[row]).tokens)
    marked = packed.inputs.tokens[row][packed.loss_mask[row]]
    np.testing.assert_array_equal(marked, np.concatenate([one.tokens, two.tokens]))
    assert one.text == policy.chat.decode(one.tokens)


def test_an_image_without_its_tokens_is_refused(policy):
  segment = policy.chat.prompt(task("a"))
  short = dataclasses.replace(segment, tokens=segment.tokens[segment.tokens != segment.tokens[-1]])
  kept = segment.tokens[segment.tokens != policy.model.config.image_token]
  bare = dataclasses.replace(segment, tokens=kept)
  assert policy.sampler.block([short], [0], 1, [0]).vision is not None
  with pytest.raises(ValueError, match="0 image tokens for 1 images with 16 features"):
    policy.sampler.block([bare], [0], 1, [0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_sampled(policy, reread, temperature):
  # Placeholders, turn starts and an embedding row that is no token are by far the likeliest.
  nowhere = policy.model.config.text.vocab_size - 1
  assert nowhere >= policy.chat.vocab_size
  banned = [*policy.chat.banned_ids, nowhere]
  assert policy.model.config.image_token in banned
  params = tilted(policy.params, dict.fromkeys(banned, 25.0))
  one = task("a")
  requests = asked([one, task("b", "is it odd?")])
  completions = bind(policy, params, temperature=temperature)(requests)
  tokens = np.concatenate([c.tokens for c in completions])
  assert len(tokens) == 12 and not np.isin(tokens, banned).any()
  # The ban had something to do: nearly all the probability lies on the banned tokens.
  assert sampled(ended(requests, completions)).max() < -12  # Uniform would be -6.2.
  # They are those of the whole vocabulary, as the learner computes them.
  packed, logps, _ = reread(ended(requests, completions), params)
  np.testing.assert_allclose(
    logps[packed.loss_mask], np.concatenate([c.logps for c in completions]), rtol=0, atol=1e-4
  )  # Logits near 16 instead of 1.


def test_samples_of_one_prompt_share_its_prefill(policy, reads):
  one = task("a")
  together = bind(policy)(asked([one] * 4))
  copies = [dataclasses.replace(one) for _ in range(4)]  # Equal, but not known to be.
  apart = bind(policy)(asked(copies))
  # One row was read for four samples, and it came to the same.
  assert [real_rows(block) for block in reads] == [1, 4]
  assert_same(together, apart)
  assert len({tuple(c.tokens) for c in together}) == 4  # Samples differ all the same.


def test_samples_that_share_a_prompt_go_on_by_themselves(policy, monkeypatch):
  """Two prompts of two samples each, three of which look at something and answer again."""
  monkeypatch.setattr(policy.sampler, "rows_multiple", 1)
  one, other = three_tasks()[:2]
  results = [episodes.crop(7), FAILED, episodes.crop(8)]

  def play(tasks):
    generate = bind(policy)
    first = generate(asked(tasks))
    caches = {id(prefix.cache): prefix.cache for _, prefix in generate.prefixes.values()}
    [cache] = caches.values()
    return cache, first, generate(continued(asked(tasks)[1:], first[1:], results))

  shared, *ours = play([one, one, other, other])
  assert shared.shared.segments.shape[0] == 2
  own, *theirs = play([dataclasses.replace(x) for x in (one, one, other, other)])
  assert own.shared is None  # Equal tasks, not known to be.
  for mine, copied in zip(ours, theirs, strict=True):
    assert_same(mine, copied)
  # In an order in which a prompt's samples do not follow each other, rows keep their own.
  assert play([one, other, one, other])[0].shared is None


def test_equal_greedy_requests_are_computed_once(policy, reads):
  one, other = task("a"), task("b", "is it odd?")
  completions = bind(policy, temperature=0.0)(asked([one, other, one]))
  assert completions[0] is completions[2] and completions[0] is not completions[1]
  assert real_rows(reads[0]) == 2
  # Samples of one prompt are draws, not copies.
  first, second = bind(policy)(asked([one, one]))
  assert first is not second


def test_greedy_takes_the_likeliest_token_whatever_the_key(policy, reread):
  requests = asked(three_tasks())
  completions = bind(policy, temperature=0.0, seed=1)(requests)
  assert_same(completions, bind(policy, temperature=0.0, seed=2)(requests))
  # Random weights: a token's probability is some 1/512, the best one's more than the mean.
  assert sampled(ended(requests, completions)).min() > -np.log(512)


def test_a_key_and_a_call_give_one_result(policy):
  requests = asked([task("a")] * 3)
  one, two, other = bind(policy, seed=5), bind(policy, seed=5), bind(policy, seed=6)
  first = one(requests)
  assert_same(first, two(requests))
  tokens = lambda completions: np.concatenate([c.tokens for c in completions]).tolist()
  assert tokens(other(requests)) != tokens(first)
  assert tokens(one(requests)) != tokens(first)  # The next call draws anew.


def test_a_forgotten_episode_is_read_again(policy, reads):
  requests, results = asked(three_tasks()), [episodes.crop(7), FAILED, episodes.crop(8)]
  remembers, forgets = bind(policy, temperature=0.0), bind(policy, temperature=0.0)
  later = continued(requests, remembers(requests), results)
  kept = remembers(later)
  assert [real_rows(block) for block in reads] == [3, 3]
  first = forgets(requests)
  forgets(asked([task("between")]))
  again = forgets(continued(requests, first, results))
  assert reads[-1].tokens.shape[1] > reads[1].tokens.shape[1]  # The whole episode, not its end.
  assert_same(kept, again)
  assert [len(c.context.tokens) for c in again] == [len(c.context.tokens) for c in kept]


def test_one_call_may_mix_new_kept_and_forgotten_episodes(policy):
  old, kept, new = three_tasks()
  generate = bind(policy, temperature=0.0)
  result = episodes.crop(7)
  before = continued(asked([old]), generate(asked([old])), [result])
  last = continued(asked([kept]), generate(asked([kept])), [result])
  mixed = generate([*asked([new]), *before, *last])
  alone = bind(policy, temperature=0.0)
  assert_same(mixed, [alone([request])[0] for request in (*asked([new]), *before, *last)])


def test_one_turn_may_be_continued_twice(policy):
  one, generate = asked([task("a")]), bind(policy, temperature=0.0)
  turn = generate(one)
  both = [*continued(one, turn, [episodes.crop(7)]), *continued(one, turn, [FAILED])]
  assert_same(generate(both), [bind(policy, temperature=0.0)([request])[0] for request in both])


def test_finished_and_unfinished_rows_live_together(policy, reread):
  stop = policy.chat.stop_ids[0]
  params = tilted(policy.params, {stop: 6.0})  # About one token in eight.
  one, limit = task("a"), policy.sampler.max_tokens
  requests = asked([one] * 6)
  generate = bind(policy, params, seed=3)
  turn = generate(requests)
  stopped = [c.finished for c in turn]
  assert len(set(len(c.tokens) for c in turn)) >= 3 and not all(stopped)
  for c in turn:
    # A turn is finished exactly if its last token stops, and no token before it does.
    assert c.finished == (c.tokens[-1] in policy.chat.stop_ids)
    assert not np.isin(c.tokens[:-1], policy.chat.stop_ids).any()
    assert c.finished or len(c.tokens) == limit
  # Rows of all lengths go on from the holes they left, with pictures or without.
  results = [episodes.crop(i) if i % 2 else FAILED for i in range(6)]
  later = continued(requests, turn, results)
  played = ended(later, generate(later))
  packed, logps, _ = reread(played, params)
  np.testing.assert_allclose(logps[packed.loss_mask], sampled(played), rtol=0, atol=CLOSE)


def test_more_requests_than_rows_are_served_in_parts(policy, reads, monkeypatch):
  tasks, results = three_tasks(), [episodes.crop(7), FAILED, episodes.crop(8)]
  whole = two_turns(bind(policy, temperature=0.0), tasks, results)
  assert len(reads) == 2
  generate = bind(policy, temperature=0.0)
  first = generate(asked(tasks))
  monkeypatch.setattr(policy.sampler, "max_rows", 2)
  reads.clear()
  later = continued(asked(tasks), first, results)
  continued_in_parts = generate(later)  # Two parts of one cache.
  assert len(reads) == 2
  assert_same([t.steps[1].completion for t in whole], continued_in_parts)
  parts = two_turns(bind(policy, temperature=0.0), tasks, results)
  for turn in range(2):
    assert_same(
      [t.steps[turn].completion for t in whole], [t.steps[turn].completion for t in parts]
    )


def test_serving_copies_only_what_differs(policy):
  """A frozen decoder in the dtype that answers is there once, however often a tower is served."""
  serves = sampler.Sampler(
    policy.model, policy.chat, max_tokens=1, max_rows=1, dtype=jnp.dtype(jnp.bfloat16)
  )
  params = trainable.held_in(jnp.bfloat16, policy.model, policy.params, ["text"])
  served = serves.serve(params)
  shared = lambda part: [x is y for x, y in zip(*map(jax.tree.leaves, part), strict=True)]
  assert all(shared((served["text"], params["text"])))
  assert not any(shared((served["visual"], params["visual"])))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy.params)
  assert max_difference(served, rounded) == 0.0
  assert all(shared((serves.serve(served), served)))


def test_padding_rows_and_images_change_nothing_but_the_shapes(policy, reads, monkeypatch):
  tasks, results = three_tasks(), [episodes.crop(7), FAILED, episodes.crop(8)]
  padded = two_turns(bind(policy, temperature=0.0), tasks, results)
  assert [len(block.tokens) for block in reads] == [8, 8]
  assert [len(block.vision.patches) for block in reads] == [8, 8]  # Of 3 and of 2 pictures.
  monkeypatch.setattr(policy.sampler, "rows_multiple", 1)
  reads.clear()
  plain = two_turns(bind(policy, temperature=0.0), tasks, results)
  assert [len(block.tokens) for block in reads] == [3, 3]
  assert [len(block.vision.patches) for block in reads] == [3, 2]
  for turn in range(2):
    assert_same(
      [t.steps[turn].completion for t in plain], [t.steps[turn].completion for t in padded]
    )


def test_a_text_only_episode_needs_no_image(policy, reread):
  blind = fakes.task("a", images=[])
  played = two_turns(bind(policy), [blind], [FAILED])
  packed, logps, _ = reread(played)
  np.testing.assert_allclose(logps[packed.loss_mask], sampled(played), rtol=0, atol=CLOSE)


def test_completions_carry_their_version(policy):
  (done,) = bind(policy, version=7)(asked([task("a")]))
  assert done.policy_version == 7 and done.logps.dtype == np.float32


def test_memory_keys_are_unit_and_tell_what_was_seen_and_asked(policy):
  one, same, other = task("a"), task("b"), task("c", "is it odd?", seed=3)
  keys = sampler.embed(policy, [one, same, other], [(), (), ()])
  assert keys.shape == (3, 2 * policy.model.config.text.width) and keys.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(keys[0], keys[1], atol=1e-6)
  assert keys[0] @ keys[2] < 0.999
  # After a look it is the crop that counts, not the task's image.
  ((_, steps),) = continued(asked([one]), [fakes.completion("look")], [FAILED])
  shown = policy.chat.result(episodes.crop(7))
  seen = dataclasses.replace(steps[0], completion=fakes.completion("so", context=shown))
  (looked,) = sampler.embed(policy, [one], [(*steps, seen)])
  half = len(looked) // 2
  assert np.abs(looked[:half] - keys[0][:half]).max() > 1e-3
  np.testing.assert_allclose(looked[half:], keys[0][half:], atol=1e-6)


def test_bfloat16_log_probs_are_near_the_learners(model_config):
  """One program samples, another reads whole rows: in bfloat16 their rounding differs.

  Steps of 2^-8 of each value. verl calls a mean difference of the probabilities under 0.005 fine
  and one over 0.01 a bug (docs/algo/rollout_corr.md).
  """
  c = model_config.copy_and_resolve_references().unlock()
  c.dtype = "bfloat16"
  policy = sampler.load_policy(c)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(policy.params)} == {"bfloat16"}
  results = [episodes.crop(i) for i in range(3)]
  played = two_turns(bind(policy), three_tasks(), results)
  rows = [batch.trajectory_row(t) for t in played]
  packed = batch.pack_grpo(rows, np.zeros(3, np.float32), policy.model.config, max_tokens=512)
  logps = learner.make_logps(policy.model)(policy.params, packed.inputs)
  ours, theirs = np.exp(sampled(played)), np.exp(np.asarray(logps)[packed.loss_mask])
  assert ours.dtype == np.float32 and len(ours) > 20
  assert 0.0 < np.abs(ours - theirs).mean() < 0.005


@pytest.fixture(scope="module")
def adapter(policy, tmp_path_factory):
  """(directory, model, params) of adapters that say something: B is drawn at random."""
  model = dataclasses.replace(policy.model, lora=lora.LoraConfig(rank=2, alpha=8.0, dropout=0.5))
  trained, base = lora.split(model.adapt(policy.params, jax.random.key(1)))
  trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), trained)
  params = lora.join(trained, base)
  path = tmp_path_factory.mktemp("adapter")
  save_adapter(path, model, params, "base")
  return path, model, params


def test_an_adapter_is_merged_or_kept_apart_for_training(model_config, policy, adapter):
  path, model, params = adapter
  c = common.trained(model_config.path)
  c.random_seed, c.adapter = model_config.random_seed, str(path)
  merged = sampler.load_policy(c)
  assert merged.model == policy.model
  assert max_difference(merged.params, lora.merge(params)) == 0.0
  assert max_difference(merged.params, policy.params) > 0.01
  apart = sampler.load_policy(c, adapters=jax.random.key(0))
  assert max_difference(apart.params, params) == 0.0
  # An adapter goes on with its own settings; new ones beside it would be two answers.
  assert apart.model.lora.dropout == 0.5
  c.lora.rank = 4
  with pytest.raises(ValueError, match="goes on as it is, model.lora makes new adapters"):
    sampler.load_policy(c, adapters=jax.random.key(0))


def test_new_adapters_come_from_the_config_and_the_key(model_config, policy, tmp_path):
  c = common.trained(model_config.path)
  c.random_seed = model_config.random_seed
  assert c.lora.targets == lora.TARGETS  # Configs import nothing of ours, so it stands twice.
  assert sampler.load_policy(c, adapters=jax.random.key(0)).model.lora is None  # Rank 0.
  layers = policy.model.config.text.layers
  ranks = list(range(1, layers + 1))
  (tmp_path / "ranks.json").write_text(json.dumps({"ranks": {"text/layers/attn/q/kernel": ranks}}))
  c.lora.rank, c.lora.alpha, c.lora.dropout = 3, 6.0, 0.25
  c.lora.ranks, c.lora.targets = str(tmp_path / "ranks.json"), ("text/layers/attn/[qv]",)
  one, other = (sampler.load_policy(c, adapters=jax.random.key(i)) for i in (0, 1))
  attn = one.params["text"]["layers"]["attn"]
  # alpha / rank: 6 / 1, 6 / 2, ... of the file, 6 / 3 elsewhere.
  np.testing.assert_allclose(attn["q"]["lora_scale"], [6 / r for r in ranks], rtol=1e-6)
  np.testing.assert_allclose(attn["v"]["lora_scale"], [2.0] * layers)
  assert "lora_a" not in attn["k"] and one.model.lora.dropout == 0.25
  assert max_difference(lora.plain(one.params), policy.params) == 0.0
  assert max_difference(one.params, other.params) > 0.01


def test_a_policy_with_adapters_samples_with_its_learners_log_probs(adapter, policy, model_config):
  """Where tokens are sampled, read again and read by the merged weights: no dropout anywhere."""
  _, model, params = adapter
  adapted = sampler.with_tools(model_config, model, params, model_config.tools)
  played = two_turns(bind(adapted), three_tasks(), [episodes.crop(i) for i in range(3)])
  rows = [batch.trajectory_row(t) for t in played]
  packed = batch.pack_grpo(rows, np.zeros(3, np.float32), model.config, max_tokens=512)
  read = lambda model, params: np.asarray(learner.make_logps(model)(params, packed.inputs))
  again = read(model, params)[packed.loss_mask]
  np.testing.assert_allclose(again, sampled(played), atol=CLOSE)
  # W + A B is rounded once more than x W + (x A) B.
  merged = read(policy.model, lora.merge(params))[packed.loss_mask]
  np.testing.assert_allclose(merged, sampled(played), atol=10 * CLOSE)
  plain = read(policy.model, policy.params)[packed.loss_mask]
  assert np.abs(plain - sampled(played)).max() > 100 * CLOSE


def load_model(c):
  """What a user's loader may return: objects with `save_pretrained`, as torch projects have."""
  import transformers

  directory = Path(__file__).parents[1] / "assets" / "tiny-vl"
  # The image processor without torch: the default one wants torchvision.
  return (
    transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory),
    transformers.AutoTokenizer.from_pretrained(directory),
    transformers.Qwen2VLImageProcessorPil.from_pretrained(directory),
  )


def test_a_loader_replaces_the_path(model_config, monkeypatch, tmp_path):
  """The user's module gives model, tokenizer and processor; the policy is that of the directory."""
  (tmp_path / "users_module.py").write_text("from tests.test_sampler import load_model")
  monkeypatch.syspath_prepend(tmp_path)
  c = model_config.copy_and_resolve_references().unlock()
  c.random_seed = -1
  direct = sampler.load_policy(c)
  c.path, c.loader = "no/such/model", "users_module:load_model"
  loaded = sampler.load_policy(c)
  assert max_difference(loaded.params, direct.params) == 0.0
  ours, theirs = (bind(p, temperature=0.0)(asked([task("a")])) for p in (loaded, direct))
  assert_same(ours, theirs)
  # What is made of it comes from the same place: another prompt, a directory of the model.
  blind = sampler.with_tools(loaded.settings, loaded.model, loaded.params, ())
  assert blind.chat.prompt(task("a")).tokens.size < loaded.chat.prompt(task("a")).tokens.size
  sampler.save_policy(tmp_path / "run", loaded.settings, loaded.model, loaded.params)
  _, saved = load(tmp_path / "run" / "model")
  assert max_difference(saved, direct.params) == 0.0


def test_int8_answers_with_the_probabilities_it_is_read_with(model_config):
  c = model_config.copy_and_resolve_references().unlock()
  c.random_seed, c.int8 = -1, True
  policy = sampler.load_policy(c)
  played = ended(requests := asked([task("a")]), bind(policy)(requests))
  rows = [batch.trajectory_row(t) for t in played]
  packed = batch.pack_grpo(rows, np.zeros(1, np.float32), policy.model.config, max_tokens=512)
  logps = np.asarray(learner.make_logps(policy.model)(policy.params, packed.inputs))
  np.testing.assert_allclose(logps[packed.loss_mask], sampled(played), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
  "settings", [{"random_seed": 0}, {"random_seed": -1, "adapter": "runs/lora/adapter"}]
)
def test_int8_is_refused_where_the_weights_are_not_the_directorys(model_config, settings):
  c = model_config.copy_and_resolve_references().unlock()
  c.update({**settings, "int8": True})
  with pytest.raises(ValueError, match="model.int8 only answers"):
    sampler.load_policy(c)


@pytest.mark.parametrize("loader", ["no_such_module:load", "json:no_such_function", "json"])
def test_a_loader_that_is_not_there_is_named(model_config, loader):
  c = model_config.copy_and_resolve_references().unlock()
  c.loader = loader
  with pytest.raises(ValueError, match=f"model.loader '{loader}' must be 'package.module:func"):
    sampler.load_policy(c)


def test_a_missing_model_is_named(model_config, tmp_path):
  c = model_config.copy_and_resolve_references()
  c.path = str(tmp_path / "no-such-model")
  with pytest.raises(FileNotFoundError, match="no-such-model"):
    sampler.load_policy(c)
  c.random_seed = -1
  with pytest.raises(FileNotFoundError, match="no-such-model"):
    sampler.load_policy(c)
