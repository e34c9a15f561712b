"""Tiles on their way to two warpgroups, in more steps than there are stages to hold them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from numpy.testing import assert_array_equal

from kernels import hopper
from kernels.hopper import GROUPS, ROWS, TILE, WIDTHS

STEPS, STAGES = 3, 2


def product(x, y):
  """x y^T of [TILE, STEPS * WIDTHS] and [ROWS, STEPS * WIDTHS], a width at a time."""

  def kernel(x, y, out, x_stream, y_stream, own):
    _, group = hopper.place("tile")

    @pl.when(group == GROUPS)
    def _():
      width = lambda step: pl.ds(step * WIDTHS, WIDTHS)
      of = lambda z: lambda step: z.at[:, width(step)]
      hopper.copy(STEPS, [(of(x), x_stream), (of(y), y_stream)])

    @pl.when(group < GROUPS)
    def _():
      mine = pl.ds(group * ROWS, ROWS)

      def operands(step):
        return hopper.here(x_stream, step).at[mine], hopper.here(y_stream, step)

      def done(step):
        for stream in (x_stream, y_stream):
          hopper.release(stream, step)

      own.at[group][...] = hopper.summed(STEPS, (ROWS, ROWS), operands, done).astype(x.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(own.at[group], out.at[mine])
      plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((TILE, ROWS), x.dtype),
    scratch_types=[
      hopper.stream(hopper.tiles(STAGES, TILE, WIDTHS, x.dtype)),
      hopper.stream(hopper.tiles(STAGES, ROWS, WIDTHS, x.dtype)),
      hopper.tiles(GROUPS, ROWS, ROWS, x.dtype),
    ],
    **hopper.launch(tile=1),
  )(x, y)


def small(*shape):
  """Integers, whose products and sums float16 holds exactly."""
  return jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), jnp.float16)


def test_tiles_outnumber_stages(on_the_host):
  x, y = small(TILE, STEPS * WIDTHS), small(ROWS, STEPS * WIDTHS)
  assert_array_equal(product(x, y), x @ y.T)
