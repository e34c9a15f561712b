"""Attention for Hopper GPUs in Pallas (Mosaic GPU), forward and backward; see attention.py.

A block has 128 queries, or keys, in two warpgroups that keep logits and sums in registers; a third
streams tiles to them, see hopper.py. Tiles that nobody sees are neither computed nor copied, and
only those seen in part are masked. Logits are in base 2: the hardware has exp2.

Axes: B rows, N query heads, K key heads, R = N / K, T query tokens, S key tokens, H head width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, DTypeLike, Float, Int

from kernels import hopper
from kernels.hopper import GROUPS, ROWS, TILE
from kernels.tiles import HIDDEN, bounds, incoming

DTYPES = (jnp.bfloat16, jnp.float16)
WIDEST = 128  # Of a head: its tiles, and those in flight, are what shared memory holds.

_STREAMED = 64  # Tokens of a streamed tile, backward: four products share the registers.
_STAGES = 2  # Streamed tiles in shared memory at once.
_LOG2E = math.log2(math.e)


def serves(dtype: DTypeLike, head_width: int) -> bool:
  """Whether these kernels compute in the dtype, on heads of this width."""
  return dtype in DTYPES and head_width <= WIDEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend(
  q_BNTH: Float[Array, "B N T H"],
  k_BKSH: Float[Array, "B K S H"],
  v_BKSH: Float[Array, "B K S H"],
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""],
  causal: bool,
) -> Float[Array, "B N T H"]:
  """`attention.reference` on whole tiles, heads before tokens; padding must hold zeros."""
  return _forward(q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal)[0]


def part(
  q_BNTH: Float[Array, "B N T H"],
  k_BKSH: Float[Array, "B K S H"],
  v_BKSH: Float[Array, "B K S H"],
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
  """`attend` without an order, and the logarithm to base 2 of what each query's weights sum to.

  By these, softmaxes over parts of the keys are joined. Without gradients.
  """
  offset = jnp.zeros((), jnp.int32)
  out, saved = _forward(q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, offset, False)
  return out, saved[-1]


def _forward(q, k, v, q_segments, kv_segments, q_offset, causal):
  sizes = _Sizes(*q.shape, k.shape[1], causal)
  q_wide, k_wide, v_wide = (_widened(x) for x in (q, k, v))
  tile = _tiles(q_wide)
  out, sums = plgpu.kernel(
    functools.partial(_forward_kernel, sizes),
    out_type=[q_wide, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)],
    scratch_types=[
      (tile(GROUPS, ROWS), plgpu.Barrier(num_barriers=GROUPS)),
      plgpu.SMEM((GROUPS, ROWS), jnp.float32),
      hopper.stream(tile(_STAGES, TILE)),
      hopper.stream(tile(_STAGES, TILE)),
    ],
    kernel_name="attention_forward",
    **sizes.blocks(sizes.N, sizes.T),
  )(
    q_wide, k_wide, v_wide, *_numbers(q_segments, kv_segments),
    bounds(q_segments, kv_segments, q_offset, causal=causal, tiles=(TILE, TILE)), q_offset[None],
  )  # fmt: skip
  out = out[..., : sizes.H]
  return out, (q, k, v, q_segments, kv_segments, q_offset, out, sums)


def _forward_kernel(
  sizes, q, k, v, q_at, kv_at, between, offset, out, sums, own_q, own_sums, k_stream, v_stream
):
  n, i, b, group = hopper.place("head", "tile", "row")
  low, high = between[b, i, 0], between[b, i, 3]

  @pl.when(group == GROUPS)
  def _():
    keys = lambda x: lambda step: x.at[b, hopper.div(n, sizes.R), pl.ds((low + step) * TILE, TILE)]
    hopper.copy(high - low, [(keys(k), k_stream), (keys(v), v_stream)])

  @pl.when(group < GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    first = i * TILE + group * ROWS
    mine = b, n, pl.ds(first, ROWS)
    q_tile, sums_tile = own_q[0].at[group], own_sums.at[group]
    hopper.fetch(q.at[mine], q_tile, own_q[1].at[group])
    numbers = hopper.by_row(q_at.at[b, pl.ds(first, ROWS)])

    def column(masked, j, carry):
      top, total, acc = carry
      logits = hopper.taken(k_stream, j - low, lambda x: _product(q_tile, x, transposed=True))
      if masked:
        others = hopper.by_column(kv_at.at[b, pl.ds(j * TILE, TILE)])
        seen = sizes.seen(numbers, others, first + offset[0] - j * TILE)
        logits = jnp.where(seen, logits, HIDDEN)
      new = jnp.maximum(top, logits.max(axis=1) * sizes.to_base_2)
      weights = jnp.exp2(logits * sizes.to_base_2 - hopper.over(new, logits, 0))
      if masked:
        weights = jnp.where(seen, weights, 0.0)
      fade = jnp.exp2(top - new)
      total = total * fade + weights.sum(axis=1)
      acc = acc * hopper.over(fade, acc, 0)
      weights = weights.astype(q.dtype)
      return new, total, hopper.taken(v_stream, j - low, lambda x: _product(weights, x, acc))

    start = hopper.full((ROWS,), HIDDEN), hopper.full((ROWS,), 0.0), hopper.full(q_tile.shape, 0.0)
    top, total, acc = _over_tiles(column, between, (b, i), start)
    safe = jnp.where(total == 0.0, 1.0, total)
    q_tile[...] = (acc / hopper.over(safe, acc, 0)).astype(q.dtype)
    sums_tile[...] = top + jnp.log(safe) * _LOG2E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out.at[mine])
    plgpu.copy_smem_to_gmem(sums_tile, sums.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _backward(causal, saved, grad):
  q, k, v, q_segments, kv_segments, q_offset, out, sums = saved
  sizes = _Sizes(*q.shape, k.shape[1], causal)
  q_offset = jnp.asarray(q_offset)  # A constant comes back from JAX as one of numpy's.
  grad, own = incoming(grad, out, q_segments)
  heads = tuple(_widened(x) for x in (q, k, v, grad.astype(q.dtype)))
  numbers = _numbers(q_segments, kv_segments)
  ranges = functools.partial(bounds, q_segments, kv_segments, q_offset, causal=causal)
  tile = _tiles(heads[0])
  dq = plgpu.kernel(
    functools.partial(_query_kernel, sizes),
    out_type=heads[0],
    scratch_types=[
      (tile(GROUPS, ROWS), plgpu.Barrier(num_barriers=GROUPS)),
      (tile(GROUPS, ROWS), plgpu.Barrier(num_barriers=GROUPS)),
      hopper.stream(tile(_STAGES, _STREAMED)),
      hopper.stream(tile(_STAGES, _STREAMED)),
    ],
    kernel_name="attention_backward_queries",
    **sizes.blocks(sizes.N, sizes.T),
  )(*heads, sums, own, *numbers, ranges(tiles=(TILE, _STREAMED)), q_offset[None])
  dk, dv = plgpu.kernel(
    functools.partial(_key_kernel, sizes),
    out_type=[heads[1], heads[2]],
    scratch_types=[
      (tile(GROUPS, ROWS), plgpu.Barrier(num_barriers=GROUPS)),
      (tile(GROUPS, ROWS), plgpu.Barrier(num_barriers=GROUPS)),
      hopper.stream(tile(_STAGES, _STREAMED)),
      hopper.stream(tile(_STAGES, _STREAMED)),
      hopper.stream(plgpu.SMEM((_STAGES, _STREAMED), jnp.float32)),
      hopper.stream(plgpu.SMEM((_STAGES, _STREAMED), jnp.float32)),
    ],
    kernel_name="attention_backward_keys",
    **sizes.blocks(sizes.K, kv_segments.shape[1]),
  )(
    *heads, sums, own, *numbers, ranges(tiles=(_STREAMED, TILE), columns=True), q_offset[None]
  )  # fmt: skip
  return *(x[..., : sizes.H] for x in (dq, dk, dv)), None, None, None


attend.defvjp(_forward, _backward)


def _query_kernel(
  sizes, q, k, v, grad, sums, own, q_at, kv_at, between, offset, dq,
  own_q, own_grad, k_stream, v_stream,
):  # fmt: skip
  n, i, b, group = hopper.place("head", "tile", "row")
  low, high = between[b, i, 0], between[b, i, 3]

  @pl.when(group == GROUPS)
  def _():
    keys = lambda x: (
      lambda step: x.at[b, hopper.div(n, sizes.R), pl.ds((low + step) * _STREAMED, _STREAMED)]
    )
    hopper.copy(high - low, [(keys(k), k_stream), (keys(v), v_stream)])

  @pl.when(group < GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    first = i * TILE + group * ROWS
    mine = b, n, pl.ds(first, ROWS)
    q_tile, grad_tile = own_q[0].at[group], own_grad[0].at[group]
    hopper.fetch(q.at[mine], q_tile, own_q[1].at[group])
    hopper.fetch(grad.at[mine], grad_tile, own_grad[1].at[group])
    numbers = hopper.by_row(q_at.at[b, pl.ds(first, ROWS)])
    own_sums, own_own = hopper.by_row(sums.at[mine]), hopper.by_row(own.at[mine])

    def column(masked, j, acc):
      dweights = hopper.taken(v_stream, j - low, lambda x: _product(grad_tile, x, transposed=True))

      def add(k_tile):
        logits = _product(q_tile, k_tile, transposed=True)
        weights = jnp.exp2(logits * sizes.to_base_2 - hopper.over(own_sums, logits, 0))
        if masked:
          others = hopper.by_column(kv_at.at[b, pl.ds(j * _STREAMED, _STREAMED)])
          seen = sizes.seen(numbers, others, first + offset[0] - j * _STREAMED)
          weights = jnp.where(seen, weights, 0.0)
        dlogits = weights * (dweights - hopper.over(own_own, logits, 0))
        return _product(dlogits.astype(q.dtype), k_tile, acc)

      return hopper.taken(k_stream, j - low, add)

    acc = _over_tiles(column, between, (b, i), hopper.full(q_tile.shape, 0.0))
    q_tile[...] = (acc * sizes.scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, dq.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _key_kernel(
  sizes, q, k, v, grad, sums, own, q_at, kv_at, between, offset, dk, dv,
  own_k, own_v, q_stream, grad_stream, sums_stream, own_stream,
):  # fmt: skip
  n, j, b, group = hopper.place("head", "tile", "row")
  low, high = between[b, j, 0], between[b, j, 3]
  tiles = high - low  # Of each of the R query heads, one head after another.

  @pl.when(group == GROUPS)
  def _():
    def queries(x):
      def at(step):
        head, i = n * sizes.R + hopper.div(step, tiles), low + hopper.rem(step, tiles)
        return x.at[b, head, pl.ds(i * _STREAMED, _STREAMED)]

      return at

    streams = (q, q_stream), (grad, grad_stream), (sums, sums_stream), (own, own_stream)
    hopper.copy(sizes.R * tiles, [(queries(x), stream) for x, stream in streams])

  @pl.when(group < GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    first = j * TILE + group * ROWS
    mine = b, n, pl.ds(first, ROWS)
    k_tile, v_tile = own_k[0].at[group], own_v[0].at[group]
    hopper.fetch(k.at[mine], k_tile, own_k[1].at[group])
    hopper.fetch(v.at[mine], v_tile, own_v[1].at[group])
    numbers = hopper.by_row(kv_at.at[b, pl.ds(first, ROWS)])

    def head(r, carry):
      def row(masked, i, carry):
        dk_acc, dv_acc = carry
        step = r * tiles + i - low
        shift = hopper.taken(sums_stream, step, lambda x: hopper.by_column(x))
        own_own = hopper.taken(own_stream, step, lambda x: hopper.by_column(x))
        streamed = hopper.here(q_stream, step)
        logits = _product(k_tile, streamed, transposed=True)
        weights = jnp.exp2(logits * sizes.to_base_2 - hopper.over(shift, logits, 1))
        if masked:
          others = hopper.by_column(q_at.at[b, pl.ds(i * _STREAMED, _STREAMED)])
          lead = i * _STREAMED + offset[0] - first
          seen = sizes.seen(numbers, others, lead, keys_in_rows=True)
          weights = jnp.where(seen, weights, 0.0)

        def from_grad(x):
          dweights = _product(v_tile, x, transposed=True)
          return dweights, _product(weights.astype(q.dtype), x, dv_acc)

        dweights, dv_acc = hopper.taken(grad_stream, step, from_grad)
        dlogits = (weights * (dweights - hopper.over(own_own, logits, 1))).astype(q.dtype)
        dk_acc = _product(dlogits, streamed, dk_acc)
        hopper.release(q_stream, step)
        return dk_acc, dv_acc

      return _over_tiles(row, between, (b, j), carry)

    start = hopper.full(k_tile.shape, 0.0), hopper.full(k_tile.shape, 0.0)
    dk_acc, dv_acc = jax.lax.fori_loop(0, sizes.R, head, start)
    k_tile[...] = (dk_acc * sizes.scale).astype(k.dtype)
    v_tile[...] = dv_acc.astype(v.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_tile, dk.at[mine])
    plgpu.copy_smem_to_gmem(v_tile, dv.at[mine])
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Those of a call that its kernels need."""

  B: int
  N: int
  T: int
  H: int
  K: int
  causal: bool

  @property
  def R(self) -> int:
    return self.N // self.K

  @property
  def scale(self) -> float:
    return self.H**-0.5

  @property
  def to_base_2(self) -> float:
    return self.scale * _LOG2E

  def blocks(self, heads: int, tokens: int) -> dict:
    """How a kernel is launched: a block for each tile of each head of each row."""
    return hopper.launch(head=heads, tile=tokens // TILE, row=self.B)

  def seen(self, rows, columns, lead, *, keys_in_rows: bool = False):
    """The mask of a tile, of its segment numbers and how far its queries lead its keys."""
    shape = rows.shape[0], columns.shape[0]
    same = hopper.over_shape(rows, shape, 0) == hopper.over_shape(columns, shape, 1)
    if not self.causal:
      return same
    row, column = (hopper.numbered(shape, axis) for axis in (0, 1))
    return same & ((row - column if keys_in_rows else column - row) <= lead)


def _numbers(q_segments, kv_segments):
  """Segments of queries and keys, told apart where both are padding."""
  return jnp.where(q_segments == 0, -1, q_segments), kv_segments


def _widened(x):
  return jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[-1] % hopper.WIDTHS),))


def _tiles(x):
  """Of tiles of x in shared memory."""
  return lambda count, rows: hopper.tiles(count, rows, x.shape[-1], x.dtype)


def _over_tiles(body, between, at, carry):
  """`body(masked, tile, carry)` over the tiles that are seen, masked at both ends."""
  low, whole_low, whole_high, high = (between[*at, x] for x in range(4))
  for masked, first, last in (
    (True, low, whole_low), (False, whole_low, whole_high), (True, whole_high, high),
  ):  # fmt: skip
    carry = jax.lax.fori_loop(first, last, functools.partial(body, masked), carry)
  return carry


def _product(a, b, acc=None, *, transposed=False):
  """a b (or a b^T) in float32, added to `acc`; b, and a unless in registers, in shared memory."""
  if transposed:
    b = b.transpose((1, 0))
  if acc is not None:
    return pl.run_state(lambda sum_: plgpu.wgmma(sum_, a, b))(plgpu.ACC.init(acc))

  def compute(sum_):
    plgpu.wgmma(sum_, a, b)
    return sum_[...]

  return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
