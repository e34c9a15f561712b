"""What the kernels for Hopper GPUs share: warpgroups, tiles streamed to them, numbers by rows.

A block has three warpgroups: two compute, on 64 rows each, with products in registers (wgmma), and
one copies tiles ahead of them (TMA). A stream is (stages, there, free): tiles in shared memory, and
barriers that say that a stage's tile is there, and that it is free again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

GROUPS, ROWS = 2, 64
TILE = GROUPS * ROWS
WIDTHS = 64  # Of 16-bit numbers: 128 bytes, the width of a swizzle. Tiles are multiples of it wide.
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def launch(**grid: int) -> dict:
  """A block for each place of the grid; blocks along its last axis start together."""
  return {
    "grid": tuple(grid.values()),
    "grid_names": tuple(grid),
    "num_threads": GROUPS + 1,
    "thread_name": "group",
    "compiler_params": plgpu.CompilerParams(approx_math=True),
  }


def place(*axes: str):
  """Of this thread in the grid; its warpgroup, GROUPS for the one that copies, comes last."""
  return tuple(jax.lax.axis_index(axis) for axis in (*axes, "group"))


def tiles(count: int, rows: int, width: int, dtype):
  """In shared memory, laid out as wgmma reads them."""
  layout = plgpu.TilingTransform((8, WIDTHS)), plgpu.SwizzleTransform(128)
  return plgpu.SMEM((count, rows, width), dtype, transforms=layout)


def stream(stages):
  count = stages.shape[0]
  free = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=count)
  return stages, plgpu.Barrier(num_barriers=count), free


def copy(steps, sources):
  """The warpgroup that copies: each step's tile of each stream, as soon as its stage is free."""
  plgpu.set_max_registers(40, action="decrease")

  def wait(step, stages, free):
    plgpu.barrier_wait(free.at[rem(step, stages.shape[0])])

  @pl.loop(0, steps)
  def _(step):
    for source, (stages, there, free) in sources:
      pl.when(step >= stages.shape[0])(functools.partial(wait, step, stages, free))
      stage = rem(step, stages.shape[0])
      plgpu.copy_gmem_to_smem(source(step), stages.at[stage], there.at[stage])

  for _, (stages, _, free) in sources:

    @pl.loop(jax.lax.max(steps - stages.shape[0], 0), steps)
    def _(step, stages=stages, free=free):
      wait(step, stages, free)


def fetch(source, tile, there):
  plgpu.copy_gmem_to_smem(source, tile, there)
  plgpu.barrier_wait(there)


def here(stream, step):
  """The stream's tile of a step, once it is there."""
  stages, there, _ = stream
  stage = rem(step, stages.shape[0])
  plgpu.barrier_wait(there.at[stage])
  return stages.at[stage]


def release(stream, step):
  """Says that this warpgroup has done with the stream's tile of a step."""
  stages, _, free = stream
  plgpu.barrier_arrive(free.at[rem(step, stages.shape[0])])


def taken(stream, step, use):
  """What is made of the stream's tile of a step, which is free then."""
  made = use(here(stream, step))
  release(stream, step)
  return made


def summed(steps, shape, operands, done):
  """The sum over steps of a b^T in float32, where (a, b) is operands(step), both in shared memory.

  `done(step)` follows when a step's operands have been read: the next product is under way then.
  """

  def multiply(total, step):
    a, b = operands(step)
    plgpu.wgmma(total, a, b.transpose((1, 0)))

  def compute(total):
    multiply(total, 0)

    @pl.loop(1, steps)
    def _(step):
      multiply(total, step)
      plgpu.wgmma_wait(1)
      done(step - 1)

    made = total[...]  # Waits for the last one.
    done(steps - 1)
    return made

  return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def load(source, layout):
  index = [()] if jax.__version_info__ < (0, 11) else []  # Part of the source since.
  return plgpu.load(source, *index, layout=layout, optimized=False)


def by_row(source):
  """Numbers in memory, one for each row of a product."""
  return load(source, _BY_ROW)


def by_column(source):
  return load(source, _BY_COLUMN)


def full(shape, value):
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else _BY_ROW
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def over(x, like, axis):
  """x, one number a row (axis 0) or column (1), in the shape of `like`."""
  return over_shape(x, like.shape, axis)


def over_shape(x, shape, axis):
  return jax.lax.broadcast_in_dim(x, shape, [axis])


def numbered(shape, axis):
  """Rows (axis 0) or columns (1) of a tile by their numbers."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def div(x, y):
  """Of what is not negative: jnp's own, which round down, do not lower to Mosaic GPU."""
  return jax.lax.div(x, jnp.asarray(y, x.dtype))


def rem(x, y):
  return jax.lax.rem(x, jnp.asarray(y, x.dtype))
