"""Attention for TPUs in Pallas (Mosaic): tiles in VMEM, forward and backward; see attention.py.

Logits are held transposed, [keys, queries]: a query's maximum, sum and log-sum are then rows, which
broadcast over sublanes, and nothing is laid out anew between the kernels. Tiles that nobody sees
are neither computed nor fetched.

Axes: B rows, N query heads, K key heads, R = N / K, T query tokens, S key tokens, H head width, I
and J tiles of queries and of keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.tiles import HIDDEN, incoming, meeting, span

LANES = 128
TILE = 512  # Tokens: a tile's logits take 1 MiB of VMEM in float32.


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def attend(
  q_BNTH: Float[Array, "B N T H"],
  k_BKSH: Float[Array, "B K S H"],
  v_BKSH: Float[Array, "B K S H"],
  q_segments: Int[Array, "B T"],
  kv_segments: Int[Array, "B S"],
  q_offset: Int[Array, ""],
  causal: bool,
  tiles: tuple[int, int],
  interpret: bool,
) -> Float[Array, "B N T H"]:
  """`attention.reference` on whole tiles, heads before tokens; padding must hold zeros."""
  return _forward(
    q_BNTH, k_BKSH, v_BKSH, q_segments, kv_segments, q_offset, causal, tiles, interpret
  )[0]


def _forward(q, k, v, q_segments, kv_segments, q_offset, causal, tiles, interpret):
  grid = _Grid(*q.shape[:3], *k.shape[1:], tiles=tiles, causal=causal)
  out, sums = pl.pallas_call(
    functools.partial(_forward_kernel, grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(grid.B, grid.N, grid.I, grid.J),
      in_specs=grid.by_query(),
      out_specs=[grid.queries(_own), grid.sums(_own)],
      scratch_shapes=[grid.row(), grid.row(), pltpu.VMEM((grid.H, tiles[0]), jnp.float32)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((grid.B, grid.N, 1, grid.T), jnp.float32),
    ],
    compiler_params=_last_in_order(4),
    interpret=interpret,
    name="attention_forward",
  )(*grid.scalars(q_segments, kv_segments, q_offset), q, k, v, *_numbers(q_segments, kv_segments))
  return out, (q, k, v, q_segments, kv_segments, q_offset, out, sums)


def _forward_kernel(
  grid, low, high, offset, q, k, v, q_at, kv_at, out, sums, top, total, acc
):  # fmt: skip
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    top[...] = jnp.full_like(top, HIDDEN)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  @pl.when((low[i] <= j) & (j < high[i]))
  def _():
    logits, seen = grid.logits(q[...], k[...], q_at[...], kv_at[...], offset[0], i, j)
    new = jnp.maximum(top[...], logits.max(axis=0, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - new), 0.0)
    fade = jnp.exp(top[...] - new)
    total[...] = total[...] * fade + weights.sum(axis=0, keepdims=True)
    acc[...] = acc[...] * fade + _product(v[...], weights.astype(v.dtype), 0, 0)
    top[...] = new

  @pl.when(j == grid.J - 1)
  def _():
    safe = jnp.where(total[...] == 0.0, 1.0, total[...])
    out[...] = (acc[...] / safe).T.astype(out.dtype)
    sums[...] = top[...] + jnp.log(safe)


def _backward(causal, tiles, interpret, saved, grad):
  q, k, v, q_segments, kv_segments, q_offset, out, sums = saved
  grid = _Grid(*q.shape[:3], *k.shape[1:], tiles=tiles, causal=causal)
  grad, own = incoming(grad, out, q_segments)
  own = own[:, :, None, :]
  numbers = _numbers(q_segments, kv_segments)
  dq = pl.pallas_call(
    functools.partial(_query_kernel, grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(grid.B, grid.N, grid.I, grid.J),
      in_specs=[*grid.by_query(), grid.queries(_own), grid.sums(_own), grid.sums(_own)],
      out_specs=grid.queries(_own),
      scratch_shapes=[pltpu.VMEM((tiles[0], grid.H), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=_last_in_order(4),
    interpret=interpret,
    name="attention_backward_queries",
  )(*grid.scalars(q_segments, kv_segments, q_offset), q, k, v, *numbers, grad, sums, own)
  dk, dv = pl.pallas_call(
    functools.partial(_key_kernel, grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(grid.B, grid.K, grid.J, grid.R * grid.I),
      in_specs=grid.by_key(),
      out_specs=[grid.keys(_own), grid.keys(_own)],
      scratch_shapes=[pltpu.VMEM((tiles[1], grid.H), jnp.float32)] * 2,
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    compiler_params=_last_in_order(4),
    interpret=interpret,
    name="attention_backward_keys",
  )(
    *grid.scalars(q_segments, kv_segments, q_offset, columns=True),
    q, k, v, *numbers, grad, sums, own,
  )  # fmt: skip
  return dq, dk, dv, None, None, None


attend.defvjp(_forward, _backward)


def _query_kernel(
  grid, low, high, offset, q, k, v, q_at, kv_at, grad, sums, own, dq, acc
):  # fmt: skip
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)

  @pl.when((low[i] <= j) & (j < high[i]))
  def _():
    logits, seen = grid.logits(q[...], k[...], q_at[...], kv_at[...], offset[0], i, j)
    _, dlogits = grid.gradients(logits, seen, v[...], grad[...], sums[...], own[...])
    acc[...] += _product(dlogits.astype(k.dtype), k[...], 0, 0)

  @pl.when(j == grid.J - 1)
  def _():
    dq[...] = acc[...].astype(dq.dtype)


def _key_kernel(
  grid, low, high, offset, q, k, v, q_at, kv_at, grad, sums, own, dk, dv, k_acc, v_acc
):  # fmt: skip
  j, at = pl.program_id(2), pl.program_id(3)
  i = at % grid.I

  @pl.when(at == 0)
  def _():
    k_acc[...] = jnp.zeros_like(k_acc)
    v_acc[...] = jnp.zeros_like(v_acc)

  @pl.when((low[j] <= i) & (i < high[j]))
  def _():
    logits, seen = grid.logits(q[...], k[...], q_at[...], kv_at[...], offset[0], i, j)
    weights, dlogits = grid.gradients(logits, seen, v[...], grad[...], sums[...], own[...])
    v_acc[...] += _product(weights.astype(grad.dtype), grad[...], 1, 0)
    k_acc[...] += _product(dlogits.astype(q.dtype), q[...], 1, 0)

  @pl.when(at == grid.R * grid.I - 1)
  def _():
    dk[...] = k_acc[...].astype(dk.dtype)
    dv[...] = v_acc[...].astype(dv.dtype)


@dataclasses.dataclass(frozen=True)
class _Grid:
  """The sizes of a call and its blocks; index maps get the grid's indices, then the scalars."""

  B: int
  N: int
  T: int
  K: int
  S: int
  H: int
  tiles: tuple[int, int]
  causal: bool

  @property
  def I(self) -> int:  # noqa: E743 - the axis letter.
    return self.T // self.tiles[0]

  @property
  def J(self) -> int:
    return self.S // self.tiles[1]

  @property
  def R(self) -> int:
    return self.N // self.K

  def scalars(self, q_segments, kv_segments, q_offset, *, columns: bool = False):
    """First tile and one past the last of each row of tiles, or column; and the offset."""
    meet_IJ = meeting(q_segments, kv_segments, q_offset, causal=self.causal, tiles=self.tiles).any(
      axis=0
    )
    low, high = span(meet_IJ.T if columns else meet_IJ)
    return low, high, q_offset[None]

  def row(self):
    return pltpu.VMEM((1, self.tiles[0]), jnp.float32)

  def queries(self, at):
    """Of q, out and their gradients."""
    place = lambda *g: (*at(*g), 0)
    return pl.BlockSpec((None, None, self.tiles[0], self.H), place)

  def keys(self, at):
    """Of k, v and their gradients."""
    place = lambda *g: (*at(*g), 0)
    return pl.BlockSpec((None, None, self.tiles[1], self.H), place)

  def sums(self, at):
    """Of one number a query."""

    def place(*g):
      b, n, i = at(*g)
      return b, n, 0, i

    return pl.BlockSpec((None, None, 1, self.tiles[0]), place)

  def numbers(self, query_at, key_at):
    """Of the segments: queries in a row, keys in a column."""

    def q_place(*g):
      b, _, i = query_at(*g)
      return b, 0, i

    def kv_place(*g):
      b, _, j = key_at(*g)
      return b, j, 0

    return [
      pl.BlockSpec((None, 1, self.tiles[0]), q_place),
      pl.BlockSpec((None, self.tiles[1], LANES), kv_place),
    ]

  def by_query(self):
    """Blocks of q, k, v and the segments where rows of tiles are gone through."""

    def key_at(b, n, i, j, low, high, _):
      return b, n // self.R, _within(j, low[i], high[i])

    return [
      self.queries(_own), self.keys(key_at), self.keys(key_at), *self.numbers(_own, key_at)
    ]  # fmt: skip

  def by_key(self):
    """The same, and gradient, log-sums and own sums, where columns of tiles are gone through."""

    def query_at(b, k, j, at, low, high, _):
      return b, k * self.R + at // self.I, _within(at % self.I, low[j], high[j])

    queries, key, sums = self.queries(query_at), self.keys(_own), self.sums(query_at)
    return [queries, key, key, *self.numbers(query_at, _own), queries, sums, sums]

  def logits(self, q, k, q_at, kv_at, offset, i, j):
    """A tile's scaled logits [keys, queries], and what of it is seen."""
    shape = self.tiles[1], self.tiles[0]
    seen = (kv_at[:, :1] == q_at) & (q_at != 0)
    if self.causal:
      key = j * self.tiles[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
      query = offset + i * self.tiles[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
      seen &= key <= query
    logits = _product(k, q, 1, 1) * self.H**-0.5
    return jnp.where(seen, logits, HIDDEN), seen

  def gradients(self, logits, seen, v, grad, sums, own):
    """(weights, gradient of the unscaled logits), [keys, queries]."""
    weights = jnp.where(seen, jnp.exp(logits - sums), 0.0)
    dweights = _product(v, grad, 1, 1)
    return weights, weights * (dweights - own) * self.H**-0.5


def _own(b, n, i, *_):
  """The block of the first three grid indices."""
  return b, n, i


def _within(j, low, high):
  """j where its tile is computed, else the nearest such: a block that is there is not fetched."""
  return jnp.clip(j, low, jnp.maximum(high - 1, low))


def _numbers(q_segments, kv_segments):
  columns = jnp.broadcast_to(kv_segments[:, :, None], (*kv_segments.shape, LANES))
  return q_segments[:, None, :], columns


def _product(a, b, a_axis: int, b_axis: int):
  """a b summed over one axis of each, in float32."""
  axes = (((a_axis,), (b_axis,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _last_in_order(axes: int):
  """All grid axes but the last, over which a scratch sums, may run in any order."""
  return pltpu.CompilerParams(dimension_semantics=("parallel",) * (axes - 1) + ("arbitrary",))
