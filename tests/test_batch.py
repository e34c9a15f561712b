"""Rows are what the policy saw, the loss is on what it sampled, padding is inert."""

import dataclasses

import jax
import numpy as np
import pytest

from pixelis_jax import batch, learner
from pixelis_jax.batch import pack_grpo, pack_images, pack_inputs, pack_sft
from pixelis_jax.data.demos import call_text
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.layout import feature_count, mrope_positions, vision_inputs
from pixelis_jax.model.policy import Model
from pixelis_jax.types import (
  Box,
  Demo,
  DemoTurn,
  Segment,
  Sight,
  Status,
  Step,
  ToolCall,
  ToolResult,
  Trajectory,
)
from tests import episodes, fakes
from tests.model import oracle


@pytest.fixture(scope="module")
def config(policy):
  return policy.model.config


def row_of(config, lengths: list[int], patches, *, seed: int = 0) -> batch.Row:
  """Text runs with an image's placeholders between two of them; the loss on every third token."""
  rng = np.random.default_rng(seed)
  parts = []
  for i, length in enumerate(lengths):
    parts.append(rng.integers(0, 256, length))
    if i < len(patches):
      parts.append(np.full(feature_count(patches[i], config.vision), config.image_token))
  tokens = np.concatenate(parts).astype(np.int32)
  mask = np.arange(len(tokens)) % 3 == 2
  logps = np.where(mask, -1.0 - np.arange(len(tokens)), 0.0).astype(np.float32)
  return batch.Row(tokens=tokens, images=tuple(patches), loss_mask=mask, logps=logps)


@pytest.fixture(scope="module")
def pictures(policy):
  """Three images, the second of another shape."""
  return [
    policy.images.process(fakes.image(h, w, seed=s))
    for h, w, s in ((40, 40, 0), (20, 60, 1), (40, 40, 2))
  ]


def scripted_trajectory() -> Trajectory:
  """Two turns; every token of the sequence differs, so an exchange would show."""
  one = fakes.completion("abc", context=Segment(tokens=np.arange(10, 14, dtype=np.int32)))
  two = fakes.completion("de", context=Segment(tokens=np.arange(20, 26, dtype=np.int32)))
  one = dataclasses.replace(one, logps=np.array([-1, -2, -3], np.float32))
  two = dataclasses.replace(two, logps=np.array([-4, -5], np.float32))
  steps = (Step(completion=one), Step(completion=two))
  return Trajectory(task=fakes.task("a"), steps=steps, status=Status.NO_ANSWER, answer=None)


def test_a_trajectory_is_its_contexts_and_tokens_in_order():
  row = batch.trajectory_row(scripted_trajectory())
  contexts, sampled = [list(range(10, 14)), list(range(20, 26))], [list(b"abc"), list(b"de")]
  assert row.tokens.tolist() == contexts[0] + sampled[0] + contexts[1] + sampled[1]
  assert row.tokens.dtype == np.int32
  assert row.loss_mask.tolist() == [False] * 4 + [True] * 3 + [False] * 6 + [True] * 2
  assert row.logps.tolist() == [0] * 4 + [-1, -2, -3] + [0] * 6 + [-4, -5]


def test_a_corrected_row_keeps_what_was_seen_and_trains_the_other_ending():
  row = batch.corrected_row(scripted_trajectory(), np.array([100, 120, 121], np.int32))
  contexts = [list(range(10, 14)), list(range(20, 26))]
  assert row.tokens.tolist() == contexts[0] + list(b"abc") + contexts[1] + [100, 120, 121]
  assert row.loss_mask.tolist() == [False] * 13 + [True] * 3
  assert np.isnan(row.logps[13:]).all() and not row.logps[:13].any()


def test_a_demonstration_is_tokenised_as_it_would_be_played(policy):
  chat, result = policy.chat, episodes.crop(1)
  # The task's image is 40 x 40, shown as 80 x 80, and the crop its upper left 30 x 30.
  right = call_text(ToolCall(name="zoom_in", arguments={"bbox_2d": [0, 0, 60, 60]}))
  turns = (
    DemoTurn(text="wrong look", result=result, supervised=False),
    DemoTurn(text=right, result=result),
    DemoTurn(text=r"\boxed{7}", result=None),
  )
  task = episodes.task("a")
  row = batch.demo_row(Demo(task=task, turns=turns), chat)
  shown = chat.result(result)
  targets = [chat.target(turn.text) for turn in turns]
  pieces = [
    chat.prompt(task).tokens,
    targets[0],
    shown.tokens,
    targets[1],
    shown.tokens,
    targets[2],
  ]
  np.testing.assert_array_equal(row.tokens, np.concatenate(pieces))
  supervised = [False, False, False, True, False, True]
  expected = [on for on, piece in zip(supervised, pieces, strict=True) for _ in piece]
  assert row.loss_mask.tolist() == expected
  assert len(row.images) == 3
  # The aim stands from behind the last image before the supervised look up to that turn's token
  # before the last; at no other look. It is the middle of the box, in tenths, and its phase in a
  # patch.
  height, width = task.images[0].shape[:2]
  x, y = result.images[0].box.center
  start, end = sum(map(len, pieces[:2])), sum(map(len, pieces[:4]))
  after = np.flatnonzero(shown.tokens == policy.model.config.image_token)[-1] + 1
  places = range(start + after, end - 1)
  _, rows, columns = chat.prompt(task).images[0].grid
  turns = 2 * np.pi * x / width * columns, 2 * np.pi * y / height * rows
  phases = [3 * wave(turn) for turn in turns for wave in (np.cos, np.sin)]
  aim = (10 * (x / width - 0.5), 10 * (y / height - 0.5), *phases)
  assert list(row.aims) == list(places)
  np.testing.assert_allclose(list(row.aims.values()), [aim] * len(places), atol=1e-6)
  packed = batch.pack_sft([row], policy.model.config, max_tokens=512)
  np.testing.assert_allclose(packed.aims[0, end - 2], aim, rtol=1e-6, atol=1e-6)
  assert np.isnan(packed.aims).sum() == packed.aims.size - 6 * len(places)
  ends = [chat.target("")[-1]] * 2
  assert row.tokens[row.loss_mask & (row.tokens == ends[0])].tolist() == ends  # Ends are learned.


def test_sights_stand_at_the_cells_that_hold_them(config, pictures):
  square, wide, other = pictures  # `other` is not described.
  height, width = (side // config.vision.merge for side in square.grid[1:])
  assert (height, width) == (4, 4)
  inside = Sight(1, Box(0.3, 0.55, 0.4, 0.65))  # Row 2, column 1.
  across = Sight(0, Box(0.1, 0.85, 0.3, 0.95))  # Row 3: three quarters in column 0, one in 1.
  sliver = Sight(2, Box(0.74, 0.1, 0.94, 0.2))  # Row 0: 1/20 in column 2, the rest in 3.
  twins = (Sight(2, Box(0.0, 0.0, 0.1, 0.1)), Sight(2, Box(0.1, 0.1, 0.2, 0.2)))  # One cell.
  row = row_of(config, [3, 2, 4], [wide, square, other])
  row = dataclasses.replace(
    row, sights={square.key: (inside, across, sliver, *twins), wide.key: ()}
  )
  packed = pack_sft([row], config, max_tokens=512, labels=3)
  shown = packed.sights
  assert shown.shape == (*packed.inputs.vision.inverse.shape, 3, 9)
  described = shown[1, : height * width].reshape(height, width, 3, 9)
  expected = np.zeros((height, width, 3))
  expected[2, 1, 1] = expected[3, 0, 0] = expected[3, 1, 0] = expected[0, 3, 2] = 1.0
  expected[0, 0, 2] = 1.0
  np.testing.assert_array_equal(described[..., 0], expected)
  # Middles are (0.35, 0.6), (0.2, 0.9), (0.84, 0.15): in cells (1.4, 2.4), (0.8, 3.6), (3.36, 0.6).
  np.testing.assert_allclose(described[2, 1, 1, 1:5], (-1.0, -1.0, -1.5, 1.0), rtol=1e-5)
  np.testing.assert_allclose(described[3, 0, 0, 1:5], (3.0, 1.0, -3.0, 4.0), rtol=1e-5)
  np.testing.assert_allclose(described[3, 1, 0, 1:5], (-7.0, 1.0, -3.0, 4.0), rtol=1e-5)
  np.testing.assert_allclose(described[0, 3, 2, 1:5], (-1.4, 1.0, 3.4, -3.5), rtol=1e-5)
  # In patches, two to a cell: 2.8 and 4.8; cosine and sine of that many turns.
  turns = 2 * np.pi * np.array([2.8, 4.8])
  phases = 3 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
  np.testing.assert_allclose(described[2, 1, 1, 5:], phases.ravel(), atol=1e-5)
  known = expected.copy()
  known[0, 0, 2] = 0.0  # Two objects, one label: no one place.
  np.testing.assert_array_equal(~np.isnan(described[..., 1:]).any(-1), known == 1.0)
  n = feature_count(wide, config.vision)
  assert (shown[0, :n, :, 0] == 0.0).all()  # Described as empty,
  assert (
    np.isnan(shown[0, n:]).all() and np.isnan(shown[2:]).all()
  )  # beyond its end, or not at all.


def test_placeholders_point_at_their_own_features(config, pictures):
  square, wide, other = pictures
  packed, (first,) = pack_images([[square, wide, square, other]], config)
  assert list(first) == [square.key, wide.key, other.key]  # A repeated image is packed once.
  rows, patches = packed.patches.shape[:2]
  assert (rows, patches) == (3, 64)
  per_row = patches // 4
  assert [first[p.key] for p in pictures] == [0, per_row, 2 * per_row]
  row = row_of(config, [3, 2, 4, 1], [square, wide, square])
  sources = batch.image_sources(row.tokens, row.images, first, config)
  places = row.tokens == config.image_token
  assert (sources[~places] == -1).all()
  n, m = (feature_count(p, config.vision) for p in (square, wide))
  assert n != m
  assert sources[places].tolist() == [*range(n), *range(per_row, per_row + m), *range(n)]


@pytest.mark.parametrize("change", ["one image less", "one image more", "one token less"])
def test_placeholders_and_features_must_be_equally_many(config, pictures, change):
  square, wide, _ = pictures
  row = row_of(config, [3, 2, 4], [square, wide])
  _, (first,) = pack_images([pictures], config)
  tokens, images = row.tokens, row.images
  if change == "one image less":
    images = images[:1]
  elif change == "one image more":
    images = (*images, square)
  else:
    tokens = np.delete(tokens, 3)
  with pytest.raises(ValueError, match=r"\d+ image tokens for \d images with \d+ features"):
    batch.image_sources(tokens, images, first, config)


def test_packed_rows_are_the_rows(config, pictures):
  square, wide, _ = pictures
  rows = [row_of(config, [3, 9], [square]), row_of(config, [5, 2, 20], [wide, square], seed=1)]
  packed = pack_inputs(rows, config, max_tokens=100)
  assert packed.tokens.shape == (2, 64)  # 28 and 43 + tokens round up to 64.
  assert packed.vision.patches.shape[0] == 2  # The square image of both rows is there once.
  for b, row in enumerate(rows):
    t = len(row.tokens)
    np.testing.assert_array_equal(packed.tokens[b, :t], row.tokens)
    assert packed.segments[b].tolist() == [1] * t + [0] * (64 - t)
    positions, _ = mrope_positions(row.tokens, row.images, config)
    np.testing.assert_array_equal(packed.positions[b, :, :t], positions)
    assert (packed.sources[b, t:] == -1).all() and not packed.tokens[b, t:].any()
  firsts = [packed.sources[b][packed.tokens[b] == config.image_token][-1] for b in range(2)]
  assert firsts[0] == firsts[1]  # Both rows end their square image at the same feature.


def test_packing_changes_no_log_probability(policy, config, pictures):
  """Five sequences in two rows or in five: the same float32 sums in another order."""
  square, wide, _ = pictures
  rows = [
    row_of(config, [3, 9], [square]),
    row_of(config, [5, 2, 20], [wide, square], seed=1),
    *(row_of(config, [n], [], seed=n) for n in (30, 17, 8)),
  ]
  advantages = np.arange(1.0, 6.0, dtype=np.float32)
  read = learner.make_logps(policy.model)
  found = []
  for packed in (False, True):
    batched = pack_grpo(
      rows, advantages, config, max_tokens=128, packed=packed, kl_weights=advantages
    )
    logps = np.asarray(read(policy.params, batched.inputs))
    by_advantage = np.broadcast_to(batched.advantages, logps.shape)
    masks = [batched.loss_mask & (by_advantage == advantage) for advantage in advantages]
    found.append([(logps[mask], batched.old_logps[mask]) for mask in masks])
    assert batched.inputs.tokens.shape[0] == (2 if packed else 6)
    assert batched.loss_mask.sum() == sum(row.loss_mask.sum() for row in rows)
  for (alone, old), (together, same) in zip(*found, strict=True):
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_array_equal(same, old)
  # Without its segments the second sequence of a row would read the first.
  blind = batched.inputs.replace(segments=np.minimum(batched.inputs.segments, 1))
  assert np.abs(np.asarray(read(policy.params, blind)) - logps).max() > 1e-2


@pytest.mark.parametrize("image", [1, 2])
def test_a_call_aims_in_the_image_that_it_names(policy, image):
  """Its coordinates are that picture's: a place in the task's image is another one."""
  call = ToolCall(name="read_text", arguments={"bbox_2d": [10, 20, 30, 40], "image": image})
  first = DemoTurn(text="a look", result=episodes.crop(1), supervised=False)
  second = DemoTurn(text=call_text(call), result=ToolResult(text="No text found."))
  task = episodes.task("a")
  row = batch.demo_row(Demo(task=task, turns=(first, second)), policy.chat)
  pixels = (task.images[0], first.result.images[0].pixels)[image - 1]
  height, width = policy.chat.shown_size(*pixels.shape[:2])
  x, y = 10 * (20 / width - 0.5), 10 * (30 / height - 0.5)
  (aim,) = {aim[:2] for aim in row.aims.values()}
  assert aim == pytest.approx((x, y))


@pytest.mark.parametrize(
  "name, arguments",
  [("select_frames", {"times": [1.0]}), ("image_zoom_in_tool", {"bbox_2d": [10, 20, 30, 40]})],
)
def test_a_call_without_a_place_of_ours_has_no_aim(policy, name, arguments):
  text = call_text(ToolCall(name=name, arguments=arguments))
  turn = DemoTurn(text=text, result=episodes.crop(1))
  assert not batch.demo_row(Demo(task=episodes.task("a"), turns=(turn,)), policy.chat).aims


def test_packed_demonstrations_keep_their_aims(config):
  rows = [
    dataclasses.replace(row_of(config, [n], [], seed=n), aims={2: (float(n),) * batch.AIMS})
    for n in (8, 5)
  ]
  packed = pack_sft(rows, config, max_tokens=16, packed=True)
  assert packed.inputs.segments[0].tolist() == [1] * 8 + [2] * 5 + [0] * 3
  known = ~np.isnan(packed.aims[0, :, 0])
  assert np.flatnonzero(known).tolist() == [2, 10]
  assert packed.aims[0, known, 0].tolist() == [8.0, 5.0]


def test_the_width_never_exceeds_the_limit(config):
  row = row_of(config, [40], [])
  assert pack_inputs([row], config, max_tokens=40).tokens.shape == (1, 40)  # Not 64.
  with pytest.raises(ValueError, match="a row of 40 tokens exceeds max_tokens=39"):
    pack_inputs([row], config, max_tokens=39)


def test_rows_and_images_divide_among_devices(config, pictures):
  rows = [row_of(config, [3, 2], [picture], seed=i) for i, picture in enumerate(pictures)]
  packed = pack_inputs(rows, config, max_tokens=100, multiple_of=2)
  assert packed.tokens.shape[0] == packed.vision.patches.shape[0] == 4
  assert not packed.segments[3].any() and not packed.vision.frame_segments[3].any()


def test_a_batch_without_images_has_an_empty_one(config):
  packed = pack_inputs([row_of(config, [7], [])], config, max_tokens=32)
  assert packed.vision.patches.shape[:2] == (1, 4) and (packed.sources == -1).all()


def test_sft_batch_has_the_rows_masks(config):
  rows = [row_of(config, [n], [], seed=n) for n in (8, 5, 11)]
  packed = pack_sft(rows, config, max_tokens=32, multiple_of=4)
  assert packed.loss_mask.shape == (4, 32) and packed.loss_mask.dtype == bool
  for b, row in enumerate(rows):
    np.testing.assert_array_equal(packed.loss_mask[b, : len(row.tokens)], row.loss_mask)
  assert packed.loss_mask.sum() == sum(row.loss_mask.sum() for row in rows)


def test_grpo_batch_pads_with_nothing(config):
  trajectories = [scripted_trajectory()] * 3
  advantages = np.array([1.0, 0.0, -1.0], np.float32)
  packed = pack_grpo(
    [batch.trajectory_row(t) for t in trajectories],
    advantages,
    config,
    max_tokens=32,
    multiple_of=4,
  )
  row = batch.trajectory_row(trajectories[0])
  t = len(row.tokens)
  for b in range(3):
    np.testing.assert_array_equal(packed.inputs.tokens[b, :t], row.tokens)
    np.testing.assert_array_equal(packed.loss_mask[b, :t], row.loss_mask)
    np.testing.assert_array_equal(packed.old_logps[b, :t], row.logps)
  assert packed.advantages.tolist() == [[1.0], [0.0], [-1.0], [0.0]]
  assert packed.kl_weights.tolist() == [[1.0], [1.0], [1.0], [0.0]]
  assert not packed.loss_mask[3].any() and not packed.inputs.segments[3].any()
  assert not packed.old_logps[~packed.loss_mask].any()
  weights = np.array([10.0, 1.0, 0.5], np.float32)
  packed = pack_grpo(
    [batch.trajectory_row(t) for t in trajectories],
    advantages,
    config,
    max_tokens=32,
    kl_weights=weights,
  )
  assert packed.kl_weights.tolist() == [[10.0], [1.0], [0.5]]


def looked(*shown, said: tuple[str, ...] = ("zoom", "7")) -> Trajectory:
  """An episode that was shown these images turn by turn, and said this."""
  steps = []
  for image, text in zip(shown, said, strict=True):
    context = Segment(tokens=np.arange(3, dtype=np.int32), images=(image,) if image else ())
    steps.append(Step(completion=dataclasses.replace(fakes.completion(text), context=context)))
  task = fakes.task("t", answer=None)
  return Trajectory(task=task, steps=tuple(steps), status=Status.ANSWERED, answer="7")


def test_two_looks_share_what_the_same_calls_showed(policy, pictures):
  overview, other_shape, crop = pictures
  viewed = policy.images.process(fakes.image(40, 40, seed=9))
  plain = looked(overview, crop)
  assert batch.shared_look((plain, looked(overview, viewed))) == (crop, viewed)
  # Another place; another size; the same picture; and no picture at all.
  elsewhere = looked(overview, viewed, said=("zoom there", "7"))
  for look in (elsewhere, looked(overview, other_shape), plain, looked(overview, None)):
    assert batch.shared_look((plain, look)) is None
  # The last of several, up to the call that differs.
  longer = looked(overview, crop, pictures[0], said=("zoom", "again", "7"))
  other = looked(overview, viewed, crop, said=("zoom", "there", "7"))
  assert batch.shared_look((longer, other)) == (crop, viewed)


def test_a_look_weighs_the_same_whatever_its_size(config, pictures):
  """The images have 16 and 6 or so features; rows 2 and 5 are padding of their blocks."""
  square, wide, other = pictures
  pairs = [(square, other), (wide, wide), (other, square), (wide, wide)]
  packed = batch.pack_looks(pairs, np.float32([1.0, 2.0, 1.0, 0.5]), config, blocks=2)
  counts = [feature_count(image, config.vision) for image, _ in pairs]
  assert counts[0] != counts[1]
  np.testing.assert_allclose(packed.weights.sum(1), [1.0, 2.0, 1.0, 0.5], rtol=1e-6)
  assert [int((w > 0).sum()) for w in packed.weights] == counts
  for row, (plain, clear) in enumerate(pairs):
    for inputs, image in ((packed.plain, plain), (packed.clear, clear)):
      alone = vision_inputs([image], config.vision, rows=1, patches=inputs.patches.shape[1])
      np.testing.assert_array_equal(inputs.patches[row], alone.patches[0])


def test_every_row_has_an_advantage_and_a_weight(config):
  advantages = np.zeros(2, np.float32)
  with pytest.raises(ValueError, match="1 rows for 2 advantages and 1 KL weights"):
    pack_grpo([batch.trajectory_row(scripted_trajectory())], advantages, config, max_tokens=32)


def test_a_stream_of_sizes_compiles_one_program_a_bucket():
  """200 images of up to 20 x 20 merged units: 1 to 400 units fall into 18 buckets.

  2^k and 3 * 2^(k - 1) up to 512: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, ..., 384, 512.
  """
  config = ModelConfig.from_hf(oracle.hf_config(tied=True).to_dict())
  vision = dataclasses.replace(config.vision, depth=1, full_blocks=())
  model = Model(dataclasses.replace(config, vision=vision))
  traced, params = [], model.shapes()

  @jax.jit
  def encode(params, packed):
    traced.append(packed.patches.shape)  # Once for each program that would be compiled.
    return model.encode(params, packed)

  sides = np.random.default_rng(0).integers(1, 21, (200, 2)) * 2
  for seed, (height, width) in enumerate(sides.tolist()):
    image = oracle.image((1, height, width), config, seed)
    packed, _ = batch.pack_images([[image]], model.config)
    encode.eval_shape(params, packed)
  assert len({tuple(pair) for pair in sides.tolist()}) > 150
  assert 10 < len(traced) <= 18


@pytest.mark.parametrize("packed", [False, True])
def test_work_is_what_is_there_however_it_is_packed(config, pictures, packed):
  square, wide, _ = pictures
  rows = [row_of(config, [3, 9], [square]), row_of(config, [5, 2, 20], [wide, square], seed=1)]
  packed = pack_sft(rows, config, max_tokens=100, multiple_of=4, packed=packed)
  lengths = [len(row.tokens) for row in rows]
  found = batch.work(packed)
  assert found.tokens == sum(lengths)
  assert found.pairs == sum(sum(range(1, t + 1)) for t in lengths)  # Each token sees those so far.
  assert found.words == sum(row.loss_mask.sum() for row in rows)
  # Images once each; a tower's window is a square of patches, cut at an image's sides.
  side = config.vision.window // config.vision.patch
  sides = [image.grid[1:] for image in (square, wide)]
  cut = lambda n: [min(side, n - at) for at in range(0, n, side)]
  windows = [h * w for height, width in sides for h in cut(height) for w in cut(width)]
  assert found.patches == sum(h * w for h, w in sides) == sum(windows)
  assert found.patch_pairs == sum((h * w) ** 2 for h, w in sides)
  assert found.window_pairs == sum(n**2 for n in windows) < found.patch_pairs
  assert batch.filled(packed) == sum(lengths) / packed.loss_mask.size
