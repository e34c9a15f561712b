"""Device pytrees of a training step, and the one way from trajectories and demonstrations to them.

Sizes that vary from step to step (rows, tokens, images) are rounded up to a few geometric ones, so
that a run compiles a handful of programs. Padding has segment 0, loss mask False and advantage 0.
Each sequence has a row of its own, or (`packed`) several share one, each as a segment that sees
only itself and counts its own positions.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from pixelis_jax.algo.losses import first_tokens, token_mean
from pixelis_jax.chat.parse import parse_call
from pixelis_jax.chat.template import Chat
from pixelis_jax.cluster import agree
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.cost import Work
from pixelis_jax.model.layout import VisionInputs, feature_count, mrope_positions, vision_inputs
from pixelis_jax.packing import Placement, place, round_up, seats, spread
from pixelis_jax.tools import TOOLS
from pixelis_jax.types import Demo, Patches, Pixels, Segment, Sight, Trajectory, value

AIMS, PLACES = 6, 9  # Numbers of an aim and of a sight, see `SftBatch`.
_HELD = 0.2  # Of an object's box, in a cell that holds it.


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class Inputs:
  """What the policy reads: `sources` are flat feature rows, -1 off images; segment 0 is padding.

  Sequences that share a row have the segments 1, 2, ... there.
  `vision` is None for a model that reads text only.
  """

  tokens: Int[Array, "B T"]
  positions: Int[Array, "B 3 T"]
  sources: Int[Array, "B T"]
  segments: Int[Array, "B T"]
  vision: VisionInputs | None


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class Share:
  """Which part of a batch this is, and how much each mask of `masks` has in the whole batch."""

  part: Int[Array, ""]
  counts: dict[str, Float[Array, ""]]


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class SftBatch:
  """`loss_mask` is True on supervised assistant tokens.

  `aims` say where a supervised call points: the middle of its box, x and y in tenths of its
  image's sides from the centre; and where in a patch that is, as 3 times the cosine and sine of
  2 pi x in patches, then of y. They stand at each token from behind the last image (question,
  header, the call itself) but the turn's last; NaN at all other tokens.

  `sights` say what an image shows (`Row.sights`). For each feature and label, if the feature's
  cell holds an object: 1; its middle, x and y, in tenths of the cell's sides from its centre; and
  the six numbers of an aim there. These are NaN if there are several objects. (0, NaN, ...) if
  there is none; all NaN where nobody described the image.
  """

  inputs: Inputs
  loss_mask: Bool[Array, "B T"]
  aims: Float[Array, "B T 6"]
  sights: Float[Array, "N M O 9"]
  share: Share | None = None

  def masks(self) -> dict[str, Bool[Array, "..."]]:
    """What each mean of the losses is over: tokens, or features by what they show."""
    masks = {}
    if self.loss_mask is not None:
      known = ~jnp.isnan(self.aims[:, :, 0])
      calling = known & jnp.pad(self.loss_mask[:, 1:], ((0, 0), (0, 1)))
      masks = {"tokens": self.loss_mask, "known": known, "calling": calling}
    if self.sights is not None:
      described, held = ~jnp.isnan(self.sights[..., 0]), self.sights[..., 0] == 1.0
      some, nothing = described.any(-1), ~held.any(-1)
      placed = held & ~jnp.isnan(self.sights[..., 1])
      masks |= {"placed": placed, "labelled": some & ~nothing, "empty": some & nothing}
    return masks


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class GrpoBatch:
  """`loss_mask` is True on trained tokens; `old_logps` are the sampler's, 0 off the mask.

  NaN in `old_logps` is a token that nobody sampled: its ratio starts at 1. `kl_weights` scale each
  sequence's part in the KL term. Both it and the advantages are one for a row, or where rows are
  packed one for a token (T); padding has 0 in both. `ref_logps` are those of the KL's reference;
  None: `old_logps`.

  Where the policy has moved on since it sampled, `learner.make_correction` puts the log-probs of
  the weights that the update starts from in the place of the sampler's, and `is_weights` make up
  for it; None: all are 1.
  """

  inputs: Inputs
  loss_mask: Bool[Array, "B T"]
  old_logps: Float[Array, "B T"]
  advantages: Float[Array, "B 1"] | Float[Array, "B T"]
  kl_weights: Float[Array, "B 1"] | Float[Array, "B T"]
  ref_logps: Float[Array, "B T"] | None = None
  is_weights: Float[Array, "B T"] | None = None
  share: Share | None = None

  def masks(self) -> dict[str, Bool[Array, "B T"]]:
    """The trained tokens, the first of each sequence, and those of sampled rows with an advantage:
    on tokens that nobody sampled an estimate of the KL would say nothing.
    """
    firsts = first_tokens(self.loss_mask, self.inputs.segments)
    pushing = self.loss_mask & (self.advantages != 0.0) & (self.kl_weights != 0.0)
    return {"tokens": self.loss_mask, "sequences": firsts, "pushing": pushing}


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class LookBatch:
  """Images, one a row, and what is to be seen there: see `pack_looks`.

  `targets` are the reference's features of `clear`. `weights` are of features, 0 behind an image's
  last.
  """

  plain: VisionInputs
  clear: VisionInputs
  weights: Float[Array, "N M"]
  targets: Float[Array, "N M W"] | None = None
  share: Share | None = None

  def masks(self) -> dict[str, Float[Array, "N M"]]:
    """The weights."""
    return {"looks": self.weights}


@value
class Row:
  """One sequence exactly as the policy saw it; all arrays have the length of `tokens`.

  `aims` are those of `SftBatch` by token index, `sights` the described images by their key.
  """

  tokens: Int[np.ndarray, " T"]
  images: tuple[Patches, ...]
  loss_mask: Bool[np.ndarray, " T"]
  logps: Float32[np.ndarray, " T"]
  aims: Mapping[int, tuple[float, ...]] = dataclasses.field(default_factory=dict)
  sights: Mapping[str, tuple[Sight, ...]] = dataclasses.field(default_factory=dict)


def whole_count(batch: SftBatch | GrpoBatch | LookBatch, name: str) -> Float[Array, ""] | None:
  """How much one of the masks has in the batch that this is a part of; None: it is no part."""
  return None if batch.share is None else batch.share.counts[name]


def masked_mean(batch: SftBatch | GrpoBatch) -> Callable[[Array, str], Float[Array, ""]]:
  """mean(x, name): `losses.token_mean` over one of the batch's masks.

  Of a part of a batch it is the part's share: the shares of all parts add up to the batch's mean.
  """
  masks = batch.masks()
  return lambda x, name: token_mean(x, masks[name], count=whole_count(batch, name))


def trajectory_row(trajectory: Trajectory) -> Row:
  """The trajectory's tokens with the loss on what the policy sampled, and only there."""
  parts = []
  for step in trajectory.steps:
    completion = step.completion
    parts.append((completion.context.tokens, False, None, completion.context.images))
    parts.append((completion.tokens, True, completion.logps, ()))
  return _join(parts, {}, {})


def shared_look(looks: tuple[Trajectory, Trajectory]) -> tuple[Patches, Patches] | None:
  """The last picture that both episodes were shown for the same calls, as each saw it.

  None where there is none, or their sizes differ.
  """
  found = None
  for a, b in zip(*(look.steps for look in looks), strict=False):
    seen = a.completion.context.images, b.completion.context.images
    if all(seen) and seen[0][-1].key != seen[1][-1].key:
      found = seen[0][-1], seen[1][-1]
    if a.completion.text != b.completion.text:
      break
  return found if found and found[0].grid == found[1].grid else None


def sampled_tokens(groups: Sequence[Sequence[Trajectory]]) -> Int[np.ndarray, "Q G"]:
  """How many tokens the policy sampled in each trajectory."""
  lengths = lambda t: sum(len(step.completion.tokens) for step in t.steps)
  return np.array([[lengths(t) for t in group] for group in groups])


def corrected_row(trajectory: Trajectory, tokens: Int[np.ndarray, " T"]) -> Row:
  """The trajectory with other tokens for its last turn, and the loss on these alone.

  Nobody sampled them: their log-probabilities are NaN, see `GrpoBatch`.
  """
  row, last = trajectory_row(trajectory), trajectory.steps[-1].completion
  start = len(row.tokens) - len(last.tokens)
  mask = np.arange(start + len(tokens)) >= start
  return Row(
    tokens=np.concatenate([row.tokens[:start], tokens]).astype(np.int32),
    images=row.images,
    loss_mask=mask,
    logps=np.where(mask, np.nan, 0.0).astype(np.float32),
  )


def demo_row(demo: Demo, chat: Chat) -> Row:
  """The demonstration's tokens with the loss on its supervised turns."""
  parts, aims, sights, length = [], {}, {}, 0
  context: Segment = chat.prompt(demo.task)
  looked = [*zip(demo.task.images, context.images, strict=False)]  # Videos come behind.
  shown = demo.sights[: len(demo.task.images)]
  for turn in demo.turns:
    target = chat.target(turn.text)
    aim = _aim(turn.text, looked, chat) if turn.supervised else None
    if aim is not None:
      asked = np.flatnonzero(context.tokens == chat.image_id).max(initial=-1) + 1
      aims |= {length + int(t): aim for t in range(asked, len(context.tokens) + len(target) - 1)}
    parts.append((context.tokens, False, None, context.images))
    parts.append((target, turn.supervised, None, ()))
    sights |= {image.key: seen for image, seen in zip(context.images, shown, strict=False)}
    length += len(context.tokens) + len(target)
    if turn.result is not None:
      context = chat.result(turn.result)
      pictures = [picture.pixels for picture in turn.result.images]
      looked += zip(pictures, context.images, strict=True)
      shown = turn.sights
  return _join(parts, aims, sights)


def _aim(
  text: str, looked: Sequence[tuple[Pixels, Patches]], chat: Chat
) -> tuple[float, ...] | None:
  """The middle of a call's box in the image that it names; None where it names no place.

  Nor has one a call in the coordinates of another preset than ours.
  """
  call = parse_call(text)
  if call is None or call.name not in TOOLS["qwen"] or "bbox_2d" not in call.arguments:
    return None
  x0, y0, x1, y1 = call.arguments["bbox_2d"]
  pixels, patches = looked[call.arguments.get("image", 1) - 1]
  height, width = chat.frame(*pixels.shape[:2])
  return _place((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, patches.grid)


def _place(x: float, y: float, grid: tuple[int, int, int]) -> tuple[float, ...]:
  """The `AIMS` numbers of a point in parts of an image of (1, height, width) patches."""
  turns = 2 * np.pi * x * grid[2], 2 * np.pi * y * grid[1]
  phases = (3 * wave(turn) for turn in turns for wave in (np.cos, np.sin))
  return 10 * (x - 0.5), 10 * (y - 0.5), *phases


def _join(
  parts: Sequence[tuple],
  aims: Mapping[int, tuple[float, ...]],
  sights: Mapping[str, tuple[Sight, ...]],
) -> Row:
  return Row(
    tokens=np.concatenate([tokens for tokens, _, _, _ in parts]).astype(np.int32),
    images=tuple(image for *_, images in parts for image in images),
    loss_mask=np.concatenate([np.full(len(tokens), on) for tokens, on, _, _ in parts]),
    logps=np.concatenate(
      [np.zeros(len(t), np.float32) if logps is None else logps for t, _, logps, _ in parts]
    ),
    aims=aims,
    sights=sights,
  )


def pack_images(
  shown: Sequence[Sequence[Patches]], config: ModelConfig, *, multiple_of: int = 1
) -> tuple[VisionInputs | None, list[dict[str, int]]]:
  """The images of each block of a batch, and for each block its images' first flat feature rows.

  Each distinct image of a block once, one a row; all blocks have as many rows, together a multiple
  of `multiple_of` where that is one of the number of blocks. Feature rows count from the start of
  the block's. None and no keys for a model that reads text only.
  """
  if config.vision is None:
    return None, [{} for _ in shown]
  distinct = [_distinct(images) for images in shown]
  merge = config.vision.merge**2
  (longest,) = agree(
    max((len(i.patches) for block in distinct for i in block.values()), default=merge)
  )
  patches = round_up(longest, multiple_of=merge)
  of = [b for b, block in enumerate(distinct) for _ in block]
  rows = seats(of, len(shown), multiple_of=multiple_of)[0] // len(shown)
  blocks = [
    vision_inputs(list(block.values()), config.vision, rows=rows, patches=patches)
    for block in distinct
  ]
  one = blocks[0] if len(blocks) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *blocks)
  first = [{key: row * (patches // merge) for row, key in enumerate(block)} for block in distinct]
  return one, first


def _distinct(images: Iterable[Patches]) -> dict[str, Patches]:
  """By key, in the order of first appearance: that of packed rows."""
  return {image.key: image for image in images}


def image_sources(
  tokens: Int[np.ndarray, " T"],
  images: Sequence[Patches],
  first: dict[str, int],
  config: ModelConfig,
) -> Int[np.ndarray, " T"]:
  """Flat feature rows at image placeholders, in order, -1 elsewhere.

  Raises ValueError where placeholders and features differ in number.
  """
  sources = np.full(len(tokens), -1, np.int32)
  if config.vision is None:
    return sources
  places = np.flatnonzero((tokens == config.image_token) | (tokens == config.video_token))
  rows = [first[i.key] + np.arange(feature_count(i, config.vision), dtype=np.int32) for i in images]
  expected = sum(map(len, rows))
  if len(places) != expected:
    raise ValueError(
      f"{len(places)} image tokens for {len(images)} images with {expected} features"
    )
  if rows:
    sources[places] = np.concatenate(rows)
  return sources


def pack_inputs(
  rows: Sequence[Row],
  config: ModelConfig,
  *,
  max_tokens: int,
  multiple_of: int = 1,
  packed: bool = False,
  blocks: int = 1,
) -> Inputs:
  """The rows as `place` places them; raises as it does."""
  placed = _placed(rows, max_tokens, multiple_of, packed, blocks)
  return _inputs(rows, config, placed, multiple_of)


def _placed(
  rows: Sequence[Row], max_tokens: int, multiple_of: int, packed: bool, blocks: int
) -> Placement:
  lengths = [len(row.tokens) for row in rows]
  at = {"max_tokens": max_tokens, "multiple_of": multiple_of}
  return place(lengths, packed=packed, blocks=blocks, **at)


def _shown(rows: Sequence[Row], placed: Placement) -> list[list[Patches]]:
  """The images of each block of the batch."""
  shown: list[list[Patches]] = [[] for _ in range(placed.blocks)]
  for row, (b, *_) in zip(rows, placed.places, strict=True):
    shown[placed.block(b)].extend(row.images)
  return shown


def _inputs(
  rows: Sequence[Row], config: ModelConfig, placed: Placement, multiple_of: int
) -> Inputs:
  B, T = placed.shape
  positions = np.zeros((B, 3, T), np.int32)
  vision, first = pack_images(_shown(rows, placed), config, multiple_of=multiple_of)
  for row, (b, start, count, _) in zip(rows, placed.places, strict=True):
    here, _ = mrope_positions(row.tokens, row.images, config)
    positions[b, :, start : start + count] = here
  sources = [
    image_sources(row.tokens, row.images, first[placed.block(b)], config)
    for row, (b, *_) in zip(rows, placed.places, strict=True)
  ]
  return Inputs(
    tokens=placed.fill([row.tokens for row in rows], 0, np.int32),
    positions=positions,
    sources=placed.fill(sources, -1, np.int32),
    segments=placed.fill([segment for *_, segment in placed.places], 0, np.int32),
    vision=vision,
  )


def work(batch: SftBatch | GrpoBatch) -> Work:
  """What the policy computes in a pass forward over a batch of host arrays."""
  inputs, vision, seen = batch.inputs, batch.inputs.vision, {}
  if vision is not None:
    seen = {
      "patches": int((vision.frame_segments > 0).sum()),
      "patch_pairs": _pairs(vision.frame_segments),
      "window_pairs": _pairs(vision.window_segments),
    }
  tokens = int((inputs.segments > 0).sum())
  causal = (_pairs(inputs.segments) + tokens) // 2
  return Work(tokens=tokens, pairs=causal, words=int(batch.loss_mask.sum()), **seen)


def filled(batch: SftBatch | GrpoBatch) -> float:
  """The share of a batch's token slots that hold one."""
  return float((batch.inputs.segments > 0).mean())


def _pairs(segments: Int[np.ndarray, "B T"]) -> int:
  """Pairs of positions of a row with the same segment; 0 is padding."""
  rows = np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)
  counts = np.bincount((rows + segments)[segments > 0])
  return int((counts**2).sum())


def pack_looks(
  pairs: Sequence[tuple[Patches, Patches]],
  weights: Float[np.ndarray, " N"],
  config: ModelConfig,
  *,
  blocks: int = 1,
) -> LookBatch:
  """Pairs of a plain and a clear image of one size. A large image weighs no more than a small one:
  each feature has its image's weight over their number.
  """
  vision = config.vision
  merge = vision.merge**2
  (longest,) = agree(max(len(plain.patches) for plain, _ in pairs))
  patches = round_up(longest, multiple_of=merge)
  rows, at = seats(spread(len(pairs), blocks), blocks)
  each, of = np.zeros((rows, patches // merge), np.float32), [0] * rows  # The first weighs nothing.
  for i, (row, (plain, _), weight) in enumerate(zip(at, pairs, weights, strict=True)):
    count = feature_count(plain, vision)
    each[row, :count], of[row] = weight / count, i
  pack = lambda which: vision_inputs(
    [pairs[i][which] for i in of], vision, rows=rows, patches=patches
  )
  return LookBatch(plain=pack(0), clear=pack(1), weights=each)


def pack_sft(
  rows: Sequence[Row],
  config: ModelConfig,
  *,
  max_tokens: int,
  multiple_of: int = 1,
  packed: bool = False,
  blocks: int = 1,
  labels: int = 0,
) -> SftBatch:
  """Rows of demonstrations as one batch; sights have labels 0 to `labels` - 1, with 0 none."""
  placed = _placed(rows, max_tokens, multiple_of, packed, blocks)
  inputs = _inputs(rows, config, placed, multiple_of)
  aims = np.full((*placed.shape, AIMS), np.nan, np.float32)
  for row, (b, start, *_) in zip(rows, placed.places, strict=True):
    for t, aim in row.aims.items():
      aims[b, start + t] = aim
  mask = placed.fill([row.loss_mask for row in rows], False, bool)
  features = (0, 0) if inputs.vision is None else inputs.vision.inverse.shape
  described = {key: seen for row in rows for key, seen in row.sights.items()}
  sights = pack_sights(described, _shown(rows, placed), config, features=features, labels=labels)
  return SftBatch(inputs=inputs, loss_mask=mask, aims=aims, sights=sights)


def pack_sights(
  sights: Mapping[str, tuple[Sight, ...]],
  shown: Sequence[Sequence[Patches]],
  config: ModelConfig,
  *,
  features: tuple[int, int],
  labels: int,
) -> Float32[np.ndarray, "N M O 9"]:
  """`SftBatch.sights` of described images, by key, as `pack_images` lays out what is shown.

  A cell holds an object if at least a fifth of the object's box lies in it: one to four cells do,
  but for objects much larger than a cell, which none holds.
  """
  packed = np.full((*features, labels, PLACES), np.nan, np.float32)
  blocks = np.split(packed, len(shown))
  places = [
    (target, image)
    for block, images in zip(blocks, shown, strict=True)
    for target, image in zip(block, _distinct(images).values(), strict=False)
  ]
  for target, image in places:
    if not labels or image.key not in sights:
      continue
    height, width = (side // config.vision.merge for side in image.grid[1:])
    target[: height * width, :, 0] = 0.0
    grid = target[: height * width].reshape(height, width, labels, PLACES)  # A view.
    for sight in sights[image.key]:
      box = sight.box
      columns = _shares(box.x0 * width, box.x1 * width, width)
      lines = _shares(box.y0 * height, box.y1 * height, height)
      x, y = box.center
      for row, column in np.argwhere(lines[:, None] * columns[None, :] >= _HELD):
        target_P = grid[row, column, sight.label]
        offset = 10 * (x * width - column - 0.5), 10 * (y * height - row - 0.5)
        several = target_P[0] == 1.0
        target_P[:] = (1.0, *offset, *_place(x, y, image.grid))
        if several:
          target_P[1:] = np.nan
  return packed


def _shares(start: float, end: float, cells: int) -> Float[np.ndarray, " cells"]:
  """Which part of [start, end) lies in each of [0, 1), [1, 2), ..."""
  edges = np.arange(cells + 1)
  return np.diff(np.clip(edges, start, end)) / (end - start)


def pack_grpo(
  rows: Sequence[Row],
  advantages: Float[np.ndarray, " B"],
  config: ModelConfig,
  *,
  max_tokens: int,
  multiple_of: int = 1,
  packed: bool = False,
  blocks: int = 1,
  kl_weights: Float[np.ndarray, " B"] | None = None,
) -> GrpoBatch:
  """Rows (`trajectory_row`, `corrected_row`) and their advantages as one batch.

  Rows with zero advantage still count in the token mean.
  """
  weights = np.ones(len(rows), np.float32) if kl_weights is None else kl_weights
  if not len(rows) == len(advantages) == len(weights):
    sizes = f"{len(advantages)} advantages and {len(weights)} KL weights"
    raise ValueError(f"{len(rows)} rows for {sizes}")
  placed = _placed(rows, max_tokens, multiple_of, packed, blocks)

  def column(x: np.ndarray) -> np.ndarray:
    """[B, 1], or [B, T] where a row holds several sequences."""
    each = placed.fill([float(one) for one in x], 0.0, np.float32)
    return each if packed else each[:, :1]

  return GrpoBatch(
    inputs=_inputs(rows, config, placed, multiple_of),
    loss_mask=placed.fill([row.loss_mask for row in rows], False, bool),
    old_logps=placed.fill([row.logps for row in rows], 0.0, np.float32),
    advantages=column(advantages),
    kl_weights=column(weights),
  )
