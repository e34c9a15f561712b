"""Attention for Hopper GPUs in Pallas (Mosaic GPU), forward and backward; see attention.py.

A block has three warpgroups: two compute, on 64 rows each, with logits and sums in registers
(wgmma), and one copies tiles ahead of them (TMA). Tiles that nobody sees are neither computed nor
copied, and only those seen in part are masked. Logits are in base 2: the hardware has exp2.

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

from kernels.tiles import HIDDEN, bounds, incoming

TILE = 128  # Tokens of a block: 64 rows, those of a wgmma, for each warpgroup that computes.
WIDTHS = 64  # Head widths are padded to multiples of it: 128 bytes, the width of a swizzle.
DTYPES = (jnp.bfloat16, jnp.float16)
WIDEST = 128  # Of a head: its tiles, and those in flight, are what shared memory holds.

_GROUPS, _ROWS = 2, 64
_STREAMED = 64  # Tokens of a streamed tile, backward: four products share the registers.
_STAGES = 2  # Streamed tiles in shared memory at once.
_LOG2E = math.log2(math.e)
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


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


def _forward(q, k, v, q_segments, kv_segments, q_offset, causal):
  sizes = _Sizes(*q.shape, k.shape[1], causal)
  q_wide, k_wide, v_wide = (_widened(x) for x in (q, k, v))
  tile = _tiles(q_wide)
  out, sums = plgpu.kernel(
    functools.partial(_forward_kernel, sizes),
    out_type=[q_wide, jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)],
    scratch_types=[
      (tile(_GROUPS, _ROWS), plgpu.Barrier(num_barriers=_GROUPS)),
      plgpu.SMEM((_GROUPS, _ROWS), jnp.float32),
      _stream(tile(_STAGES, TILE)),
      _stream(tile(_STAGES, TILE)),
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
  n, i, b, group = _place()
  low, high = between[b, i, 0], between[b, i, 3]

  @pl.when(group == _GROUPS)
  def _():
    keys = lambda x: lambda step: x.at[b, _div(n, sizes.R), pl.ds((low + step) * TILE, TILE)]
    _copy(high - low, [(keys(k), k_stream), (keys(v), v_stream)])

  @pl.when(group < _GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    first = i * TILE + group * _ROWS
    mine = b, n, pl.ds(first, _ROWS)
    q_tile, sums_tile = own_q[0].at[group], own_sums.at[group]
    _fetch(q.at[mine], q_tile, own_q[1].at[group])
    numbers = _load(q_at.at[b, pl.ds(first, _ROWS)], _BY_ROW)

    def column(masked, j, carry):
      top, total, acc = carry
      logits = _taken(k_stream, j - low, lambda k_tile: _product(q_tile, k_tile, transposed=True))
      if masked:
        others = _load(kv_at.at[b, pl.ds(j * TILE, TILE)], _BY_COLUMN)
        seen = sizes.seen(numbers, others, first + offset[0] - j * TILE)
        logits = jnp.where(seen, logits, HIDDEN)
      new = jnp.maximum(top, logits.max(axis=1) * sizes.to_base_2)
      weights = jnp.exp2(logits * sizes.to_base_2 - _over(new, logits, 0))
      if masked:
        weights = jnp.where(seen, weights, 0.0)
      fade = jnp.exp2(top - new)
      total = total * fade + weights.sum(axis=1)
      acc = acc * _over(fade, acc, 0)
      weights = weights.astype(q.dtype)
      return new, total, _taken(v_stream, j - low, lambda v_tile: _product(weights, v_tile, acc))

    start = _full((_ROWS,), HIDDEN), _full((_ROWS,), 0.0), _full(q_tile.shape, 0.0)
    top, total, acc = _over_tiles(column, between, (b, i), start)
    safe = jnp.where(total == 0.0, 1.0, total)
    q_tile[...] = (acc / _over(safe, acc, 0)).astype(q.dtype)
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
      (tile(_GROUPS, _ROWS), plgpu.Barrier(num_barriers=_GROUPS)),
      (tile(_GROUPS, _ROWS), plgpu.Barrier(num_barriers=_GROUPS)),
      _stream(tile(_STAGES, _STREAMED)),
      _stream(tile(_STAGES, _STREAMED)),
    ],
    kernel_name="attention_backward_queries",
    **sizes.blocks(sizes.N, sizes.T),
  )(*heads, sums, own, *numbers, ranges(tiles=(TILE, _STREAMED)), q_offset[None])
  dk, dv = plgpu.kernel(
    functools.partial(_key_kernel, sizes),
    out_type=[heads[1], heads[2]],
    scratch_types=[
      (tile(_GROUPS, _ROWS), plgpu.Barrier(num_barriers=_GROUPS)),
      (tile(_GROUPS, _ROWS), plgpu.Barrier(num_barriers=_GROUPS)),
      _stream(tile(_STAGES, _STREAMED)),
      _stream(tile(_STAGES, _STREAMED)),
      _stream(plgpu.SMEM((_STAGES, _STREAMED), jnp.float32)),
      _stream(plgpu.SMEM((_STAGES, _STREAMED), jnp.float32)),
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
  n, i, b, group = _place()
  low, high = between[b, i, 0], between[b, i, 3]

  @pl.when(group == _GROUPS)
  def _():
    keys = lambda x: (
      lambda step: x.at[b, _div(n, sizes.R), pl.ds((low + step) * _STREAMED, _STREAMED)]
    )
    _copy(high - low, [(keys(k), k_stream), (keys(v), v_stream)])

  @pl.when(group < _GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    first = i * TILE + group * _ROWS
    mine = b, n, pl.ds(first, _ROWS)
    q_tile, grad_tile = own_q[0].at[group], own_grad[0].at[group]
    _fetch(q.at[mine], q_tile, own_q[1].at[group])
    _fetch(grad.at[mine], grad_tile, own_grad[1].at[group])
    numbers = _load(q_at.at[b, pl.ds(first, _ROWS)], _BY_ROW)
    own_sums, own_own = _load(sums.at[mine], _BY_ROW), _load(own.at[mine], _BY_ROW)

    def column(masked, j, acc):
      dweights = _taken(v_stream, j - low, lambda x: _product(grad_tile, x, transposed=True))

      def add(k_tile):
        logits = _product(q_tile, k_tile, transposed=True)
        weights = jnp.exp2(logits * sizes.to_base_2 - _over(own_sums, logits, 0))
        if masked:
          others = _load(kv_at.at[b, pl.ds(j * _STREAMED, _STREAMED)], _BY_COLUMN)
          seen = sizes.seen(numbers, others, first + offset[0] - j * _STREAMED)
          weights = jnp.where(seen, weights, 0.0)
        dlogits = weights * (dweights - _over(own_own, logits, 0))
        return _product(dlogits.astype(q.dtype), k_tile, acc)

      return _taken(k_stream, j - low, add)

    acc = _over_tiles(column, between, (b, i), _full(q_tile.shape, 0.0))
    q_tile[...] = (acc * sizes.scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, dq.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _key_kernel(
  sizes, q, k, v, grad, sums, own, q_at, kv_at, between, offset, dk, dv,
  own_k, own_v, q_stream, grad_stream, sums_stream, own_stream,
):  # fmt: skip
  n, j, b, group = _place()
  low, high = between[b, j, 0], between[b, j, 3]
  tiles = high - low  # Of each of the R query heads, one head after another.

  @pl.when(group == _GROUPS)
  def _():
    def queries(x):
      def at(step):
        head, i = n * sizes.R + _div(step, tiles), low + _rem(step, tiles)
        return x.at[b, head, pl.ds(i * _STREAMED, _STREAMED)]

      return at

    streams = (q, q_stream), (grad, grad_stream), (sums, sums_stream), (own, own_stream)
    _copy(sizes.R * tiles, [(queries(x), stream) for x, stream in streams])

  @pl.when(group < _GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    first = j * TILE + group * _ROWS
    mine = b, n, pl.ds(first, _ROWS)
    k_tile, v_tile = own_k[0].at[group], own_v[0].at[group]
    _fetch(k.at[mine], k_tile, own_k[1].at[group])
    _fetch(v.at[mine], v_tile, own_v[1].at[group])
    numbers = _load(kv_at.at[b, pl.ds(first, _ROWS)], _BY_ROW)

    def head(r, carry):
      def row(masked, i, carry):
        dk_acc, dv_acc = carry
        step = r * tiles + i - low
        shift = _taken(sums_stream, step, lambda x: _load(x, _BY_COLUMN))
        own_own = _taken(own_stream, step, lambda x: _load(x, _BY_COLUMN))
        logits = _product(k_tile, _here(q_stream, step), transposed=True)
        weights = jnp.exp2(logits * sizes.to_base_2 - _over(shift, logits, 1))
        if masked:
          others = _load(q_at.at[b, pl.ds(i * _STREAMED, _STREAMED)], _BY_COLUMN)
          lead = i * _STREAMED + offset[0] - first
          seen = sizes.seen(numbers, others, lead, keys_in_rows=True)
          weights = jnp.where(seen, weights, 0.0)

        def from_grad(x):
          dweights = _product(v_tile, x, transposed=True)
          return dweights, _product(weights.astype(q.dtype), x, dv_acc)

        dweights, dv_acc = _taken(grad_stream, step, from_grad)
        dlogits = (weights * (dweights - _over(own_own, logits, 1))).astype(q.dtype)
        dk_acc = _product(dlogits, q_stream[0].at[_rem(step, _STAGES)], dk_acc)
        plgpu.barrier_arrive(q_stream[2].at[_rem(step, _STAGES)])
        return dk_acc, dv_acc

      return _over_tiles(row, between, (b, j), carry)

    start = _full(k_tile.shape, 0.0), _full(k_tile.shape, 0.0)
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
    return {
      "grid": (heads, tokens // TILE, self.B),
      "grid_names": ("head", "tile", "row"),
      "num_threads": _GROUPS + 1,
      "thread_name": "group",
      "compiler_params": plgpu.CompilerParams(approx_math=True),
    }

  def seen(self, rows, columns, lead, *, keys_in_rows: bool = False):
    """The mask of a tile, of its segment numbers and how far its queries lead its keys."""
    shape = rows.shape[0], columns.shape[0]
    same = _over_shape(rows, shape, 0) == _over_shape(columns, shape, 1)
    if not self.causal:
      return same
    row, column = (
      plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    return same & ((row - column if keys_in_rows else column - row) <= lead)


def _div(x, y):
  """Of what is not negative: jnp's own, which round down, do not lower to Mosaic GPU."""
  return jax.lax.div(x, jnp.asarray(y, x.dtype))


def _rem(x, y):
  return jax.lax.rem(x, jnp.asarray(y, x.dtype))


def _place():
  """(head, tile, row, warpgroup) of this thread."""
  return tuple(jax.lax.axis_index(axis) for axis in ("head", "tile", "row", "group"))


def _numbers(q_segments, kv_segments):
  """Segments of queries and keys, told apart where both are padding."""
  return jnp.where(q_segments == 0, -1, q_segments), kv_segments


def _widened(x):
  return jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[-1] % WIDTHS),))


def _tiles(x):
  """Of tiles of x in shared memory, laid out as wgmma reads them."""
  layout = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  return lambda count, rows: plgpu.SMEM((count, rows, x.shape[-1]), x.dtype, transforms=layout)


def _stream(tiles):
  """Tiles in stages, with barriers that say that one is there, and that it is free again."""
  free = plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=_STAGES)
  return tiles, plgpu.Barrier(num_barriers=_STAGES), free


def _copy(steps, sources):
  """The warpgroup that copies: each step's tile of each stream, as soon as its stage is free."""
  plgpu.set_max_registers(40, action="decrease")

  def wait(step, stream):
    plgpu.barrier_wait(stream[2].at[_rem(step, _STAGES)])

  @pl.loop(0, steps)
  def _(step):
    for source, stream in sources:
      pl.when(step >= _STAGES)(functools.partial(wait, step, stream))
      tiles, there, _ = stream
      stage = _rem(step, _STAGES)
      plgpu.copy_gmem_to_smem(source(step), tiles.at[stage], there.at[stage])

  @pl.loop(jax.lax.max(steps - _STAGES, 0), steps)
  def _(step):
    for _, stream in sources:
      wait(step, stream)


def _fetch(source, tile, there):
  plgpu.copy_gmem_to_smem(source, tile, there)
  plgpu.barrier_wait(there)


def _here(stream, step):
  """The stream's tile of a step, once it is there."""
  tiles, there, _ = stream
  plgpu.barrier_wait(there.at[_rem(step, _STAGES)])
  return tiles.at[_rem(step, _STAGES)]


def _taken(stream, step, use):
  """What is made of the stream's tile of a step, which is free then."""
  made = use(_here(stream, step))
  plgpu.barrier_arrive(stream[2].at[_rem(step, _STAGES)])
  return made


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


def _load(source, layout):
  index = [()] if jax.__version_info__ < (0, 11) else []  # Part of the source since.
  return plgpu.load(source, *index, layout=layout, optimized=False)


def _full(shape, value):
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else _BY_ROW
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over(x, like, axis):
  """x, one number a row (axis 0) or column (1), in the shape of `like`."""
  return _over_shape(x, like.shape, axis)


def _over_shape(x, shape, axis):
  return jax.lax.broadcast_in_dim(x, shape, [axis])
