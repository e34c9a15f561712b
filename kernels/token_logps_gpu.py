"""Log-probabilities of tokens for Hopper GPUs in Pallas (Mosaic GPU); see token_logps.py.

A block has 128 tokens and goes through some of the words, 256 at a time, summing products over the
width, 64 of it at a time; see hopper.py. Forward, logits never leave the registers: of each token
and block four numbers do. Backward, logits are computed again, and the gradients of those of some
words are written at a time, for XLA to multiply with the head and with the hidden states.

Compiled for H100 and compared with the reference on a host; not timed on a GPU yet.

Axes: M tokens, D width, V vocabulary, W words whose gradients exist at once, P parts of the words.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Float32, Int

from kernels import hopper
from kernels.hopper import GROUPS, ROWS, TILE
from kernels.tiles import HIDDEN, even

WORDS = 256  # Of a tile: its logits take 128 registers of a thread.

_TOGETHER = 16  # Tiles of tokens that share a part of the words in the L2 cache.
_MOST = 8  # Tiles of words of a part.
_LOG2E, _LN2 = math.log2(math.e), math.log(2.0)
_STAGES, _STAGES_BACKWARD = 4, 3  # 48 KiB each; backward a tile of gradients takes 64.


def refusal(dtype: DTypeLike, D: int, V: int) -> str | None:
  """What these kernels cannot do of that; None if they can."""
  if dtype != jnp.bfloat16:
    return f"computes in bfloat16, not in {jnp.dtype(dtype)}"
  if D % hopper.WIDTHS or V < WORDS:
    return f"needs a width that is a multiple of {hopper.WIDTHS} and {WORDS} words, not {D} and {V}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def score(
  hidden: Float[Array, "M D"],
  head: Float[Array, "V D"],
  targets: Int[Array, " M"],
  temperature: float,
  chunk: int,
) -> tuple[Float32[Array, " M"], Float32[Array, " M"]]:
  """`token_logps` of M tokens; backward, gradients of as many logits as `chunk` tokens have."""
  return _forward(hidden, head, targets, temperature, chunk)[0]


def _forward(hidden, head, targets, temperature, chunk):
  M, V = len(hidden), len(head)
  walk = _Walk(-(-M // TILE), hidden.shape[1], -(-V // WORDS), _LOG2E / temperature)
  sums_P4M = plgpu.kernel(
    functools.partial(_forward_kernel, walk),
    out_type=jax.ShapeDtypeStruct((walk.parts, 4, walk.tokens * TILE), jnp.float32),
    scratch_types=[*walk.streams(_STAGES), plgpu.SMEM((GROUPS, 4, ROWS), jnp.float32)],
    kernel_name="token_logps_forward",
    **walk.launch(),
  )(_padded(hidden), head, _padded(targets))
  top_PM, total_PM, below_PM, target_PM = (sums_P4M[:, x, :M] for x in range(4))
  top_M = top_PM.max(axis=0)
  lead_PM = top_PM - top_M[None]
  fade_PM = jnp.exp2(lead_PM)
  total_M = (total_PM * fade_PM).sum(axis=0)
  below_M = ((below_PM + total_PM * lead_PM) * fade_PM).sum(axis=0)
  log_M = jnp.log2(total_M)
  logps = _LN2 * (target_PM.sum(axis=0) - top_M - log_M)
  entropies = _LN2 * (log_M - below_M / total_M)
  return (logps, entropies), (hidden, head, targets, top_M + log_M, entropies)


def _forward_kernel(walk, hidden, head, targets, out, hidden_stream, head_stream, own):
  """Of each part: largest logit, sum of weights, their sum times (logit - largest), target's."""
  i, part, group = walk.place()
  first, count = walk.words_of(part)
  V = head.shape[0]
  start = lambda n: jax.lax.min((first + n) * WORDS, V - WORDS)  # The last tile begins earlier.

  @pl.when((group == GROUPS) & (i < walk.tokens))
  def _():
    walk.copy(i, count, start, (hidden, hidden_stream), (head, head_stream))

  @pl.when((group < GROUPS) & (i < walk.tokens))
  def _():
    plgpu.set_max_registers(232, action="increase")
    mine = pl.ds(i * TILE + group * ROWS, ROWS)
    wanted = hopper.by_row(targets.at[mine])

    def tile(n, carry):
      top, total, below, target = carry
      logits = walk.logits(group, n, hidden_stream, head_stream)
      words = hopper.numbered(logits.shape, 1) + start(n)
      new_words = words >= (first + n) * WORDS
      is_target = new_words & (words == hopper.over(wanted, logits, 0))
      target += jnp.where(is_target, logits, 0.0).sum(axis=1)
      logits = jnp.where(new_words, logits, HIDDEN)
      new = jnp.maximum(top, logits.max(axis=1))
      logits -= hopper.over(new, logits, 0)
      weights = jnp.exp2(logits)
      lead = top - new
      fade = jnp.exp2(lead)
      below = (below + total * lead) * fade + (weights * logits).sum(axis=1)
      return new, total * fade + weights.sum(axis=1), below, target

    sums = (hopper.full((ROWS,), HIDDEN), *(hopper.full((ROWS,), 0.0) for _ in range(3)))
    for x, numbers in enumerate(jax.lax.fori_loop(0, count, tile, sums)):
      own.at[group, x][...] = numbers
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own.at[group], out.at[part, :, mine])
    plgpu.wait_smem_to_gmem(0)


def _backward(temperature, chunk, saved, grads):
  hidden, head, targets, shift, entropies = saved
  of_logp, of_entropy = (grad / temperature for grad in grads)
  M, V = len(hidden), len(head)
  W = words_at_once(V, chunk * V // M)
  walk = _Walk(-(-M // TILE), hidden.shape[1], W // WORDS, _LOG2E / temperature)
  numbers = shift, of_logp + of_entropy * entropies, of_entropy * _LN2, of_logp
  given = _padded(hidden), head, _padded(targets), _padded(jnp.stack(numbers, axis=1)).T

  def some_words(carry, first):
    """The gradients through W words; the last W begin earlier, and words met before have none."""
    dhidden_MD, dhead_VD = carry
    start = jnp.minimum(first, V - W)
    dlogits_MW = _logit_gradients(walk, *given, start, first)
    words = lambda x: jax.lax.dynamic_slice_in_dim(x, start, W)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dhidden_MD += product("MW,WD->MD", dlogits_MW, words(head))
    dwords_WD = product("MW,MD->WD", dlogits_MW, given[0]).astype(head.dtype)
    more = words(dhead_VD) + dwords_WD
    return (dhidden_MD, jax.lax.dynamic_update_slice_in_dim(dhead_VD, more, start, axis=0)), None

  nothing = jnp.zeros(given[0].shape, jnp.float32), jnp.zeros(head.shape, head.dtype)
  (dhidden_MD, dhead_VD), _ = jax.lax.scan(some_words, nothing, jnp.arange(0, V, W, jnp.int32))
  return dhidden_MD[:M].astype(hidden.dtype), dhead_VD, None


score.defvjp(_forward, _backward)


def _logit_gradients(walk, hidden, head, targets, numbers, start, first):
  """Of the unscaled logits of the words from `start` on; zero for those before `first`."""
  shape = walk.tokens * TILE, walk.words * WORDS
  return plgpu.kernel(
    functools.partial(_backward_kernel, walk),
    out_type=jax.ShapeDtypeStruct(shape, hidden.dtype),
    scratch_types=[
      *walk.streams(_STAGES_BACKWARD),
      hopper.tiles(GROUPS, ROWS, WORDS, hidden.dtype),
    ],
    kernel_name="token_logps_backward",
    **walk.launch(),
  )(hidden, head, targets, numbers, jnp.stack([start, first]))


def _backward_kernel(
  walk, hidden, head, targets, numbers, place, out, hidden_stream, head_stream, own
):
  i, part, group = walk.place()
  first, count = walk.words_of(part)
  start = lambda n: place[0] + (first + n) * WORDS

  @pl.when((group == GROUPS) & (i < walk.tokens))
  def _():
    walk.copy(i, count, start, (hidden, hidden_stream), (head, head_stream))

  @pl.when((group < GROUPS) & (i < walk.tokens))
  def _():
    plgpu.set_max_registers(232, action="increase")
    mine = pl.ds(i * TILE + group * ROWS, ROWS)
    wanted = hopper.by_row(targets.at[mine])
    shift, alike, by_log, of_target = (hopper.by_row(numbers.at[x, mine]) for x in range(4))

    @pl.loop(0, count)
    def _(n):
      logits = walk.logits(group, n, hidden_stream, head_stream)
      over = lambda x: hopper.over(x, logits, 0)
      words = hopper.numbered(logits.shape, 1) + start(n)
      logs = logits - over(shift)  # Of probabilities, in base 2.
      grads = -jnp.exp2(logs) * (over(alike) + over(by_log) * logs)
      grads += jnp.where(words == over(wanted), over(of_target), 0.0)
      grads = jnp.where(words >= place[1], grads, 0.0)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      own.at[group][...] = grads.astype(out.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(own.at[group], out.at[mine, pl.ds((first + n) * WORDS, WORDS)])

    plgpu.wait_smem_to_gmem(0)


def words_at_once(V: int, most: int) -> int:
  """W: whole tiles, no more of them than V has, as even as pieces of about `most` words can be."""
  times = max(-(-V // max(most, WORDS)), 2 if V % WORDS else 1)
  return -(-V // (times * WORDS)) * WORDS


@dataclasses.dataclass(frozen=True)
class _Walk:
  """Through `words` tiles of words for each of `tokens` tiles of tokens, D wide."""

  tokens: int
  D: int
  words: int
  to_base_2: float

  @property
  def part(self) -> int:
    """Tiles of words of a part; the last may have fewer."""
    return even(self.words, _MOST)

  @property
  def parts(self) -> int:
    return -(-self.words // self.part)

  def launch(self) -> dict:
    near = min(self.tokens, _TOGETHER)
    return hopper.launch(far=-(-self.tokens // near), part=self.parts, near=near)

  def place(self):
    """Tile of tokens, none of them if not below `tokens`; part; warpgroup."""
    far, part, near, group = hopper.place("far", "part", "near")
    return far * min(self.tokens, _TOGETHER) + near, part, group

  def words_of(self, part):
    """The first tile of words of a part, and how many it has."""
    first = part * self.part
    return first, jax.lax.min(self.words - first, self.part)

  def streams(self, stages: int):
    """Of tiles of the hidden states and of the head."""
    return [
      hopper.stream(hopper.tiles(stages, rows, hopper.WIDTHS, jnp.bfloat16))
      for rows in (TILE, WORDS)
    ]

  @property
  def steps(self) -> int:
    return self.D // hopper.WIDTHS

  def copy(self, i, count, start, hidden, head):
    """What the products of `count` tiles of words take; the n-th begins at word start(n)."""
    width = lambda step: pl.ds(hopper.rem(step, self.steps) * hopper.WIDTHS, hopper.WIDTHS)
    tokens = lambda step: hidden[0].at[pl.ds(i * TILE, TILE), width(step)]
    words = lambda step: head[0].at[pl.ds(start(hopper.div(step, self.steps)), WORDS), width(step)]
    hopper.copy(count * self.steps, [(tokens, hidden[1]), (words, head[1])])

  def logits(self, group, n, hidden_stream, head_stream):
    """This warpgroup's of the n-th tile of words, in base 2."""
    streams = hidden_stream, head_stream
    at = lambda step: n * self.steps + step

    def operands(step):
      hidden, head = (hopper.here(stream, at(step)) for stream in streams)
      return hidden.at[pl.ds(group * ROWS, ROWS)], head

    def done(step):
      for stream in streams:
        hopper.release(stream, at(step))

    return hopper.summed(self.steps, (ROWS, WORDS), operands, done) * self.to_base_2


def _padded(x):
  """Whole tiles of tokens: zeros behind them."""
  return jnp.pad(x, ((0, -len(x) % TILE),) + ((0, 0),) * (x.ndim - 1))
