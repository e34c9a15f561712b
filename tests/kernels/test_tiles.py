"""Which tiles are computed, by hand."""

import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from kernels.tiles import bounds, even, meeting, span, visible


def segments(*rows):
  return jnp.asarray(rows, jnp.int32)


def test_mask_by_hand():
  """Offset 1, two queries, four keys; segment 2 starts at key 2 and key 3 is padding."""
  seen = visible(True, segments([1, 2]), segments([1, 1, 2, 0]), 1)
  assert_array_equal(seen[0], [[1, 1, 0, 0], [0, 0, 1, 0]])
  seen = visible(False, segments([1, 0]), segments([1, 1, 2, 0]))
  assert_array_equal(seen[0], [[1, 1, 0, 0], [0, 0, 0, 0]])


def test_tiles_between_segments_and_above_the_diagonal_are_left_out():
  at = segments([1, 1, 1, 2, 2, 2, 3, 0])
  meet = lambda q, causal, offset=0: meeting(
    q, at, jnp.asarray(offset, jnp.int32), causal=causal, tiles=(2, 2)
  )
  # Tiles hold the segments {1}, {1, 2}, {2}, {3}.
  expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
  assert_array_equal(meet(at, False)[0], expected)
  low, high = span(meet(at, False))
  assert_array_equal(low, [[0, 0, 1, 3]])
  assert_array_equal(high, [[2, 3, 3, 4]])
  assert_array_equal(span(meet(at, True))[1], [[1, 2, 3, 4]])
  # The last four as queries begin at key 4: they see what the last two rows of tiles saw.
  assert_array_equal(meet(at[:, 4:], True, 4)[0], [[0, 1, 1, 0], [0, 0, 0, 1]])
  # Rows by themselves; what nobody needs is an empty span.
  rows = jnp.concatenate([segments([3, 3, 0, 0, 0, 0, 0, 0]), at])
  assert_array_equal(
    meeting(rows, jnp.concatenate([at, at]), jnp.int32(0), causal=False, tiles=(2, 2))[:, 0],
    [[0, 0, 0, 1], [1, 1, 0, 0]],
  )
  low, high = span(meet(segments([0, 0, 9, 9]), False))
  assert_array_equal(low, high)


@pytest.mark.parametrize(
  "tokens, most, side", [(96, 64, 48), (64, 64, 64), (65, 64, 33), (5, 64, 5)]
)
def test_even_tiles(tokens, most, side):
  assert even(tokens, most) == side


def test_between_the_tiles_at_both_ends_there_is_nothing_to_mask():
  at = segments([1, 2, 2, 2, 2, 2, 2, 2, 0, 0])
  found = lambda causal, q=at, offset=0, columns=False: bounds(
    q, at, jnp.asarray(offset, jnp.int32), causal=causal, tiles=(2, 2), columns=columns
  )[0].tolist()
  # Tiles {1, 2}, {2}, {2}, {2}, padding: the first holds two segments, so it is masked wherever it
  # is met. In order [first, first whole, past the last whole, past the last].
  assert found(False) == [[0, 4, 4, 4], [0, 1, 4, 4], [0, 1, 4, 4], [0, 1, 4, 4], [0, 0, 0, 0]]
  # Causal, and the diagonal is masked too.
  assert found(True) == [[0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 2, 3], [0, 1, 3, 4], [0, 0, 0, 0]]
  # By columns, tiles of queries: those behind the diagonal are whole.
  by_column = [[0, 4, 4, 4], [1, 2, 4, 4], [2, 3, 4, 4], [3, 4, 4, 4], [0, 0, 0, 0]]
  assert found(True, columns=True) == by_column
  # Queries that begin at key 4 sit on the diagonal of tile 2.
  assert found(True, at[:, 4:6], 4) == [[0, 1, 2, 3]]
