"""Where sequences lie in a batch, by hand."""

import pytest

from pixelis_jax.packing import place, round_up


def test_round_up_has_few_sizes_and_little_padding():
  sizes = [round_up(n) for n in range(1, 200)]
  assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
  for n, size in enumerate(sizes, 1):
    assert n <= size and 3 * (size - n) <= size
  # 33 = 5 units of 8; the next size is 6 units.
  assert [round_up(n, multiple_of=8) for n in (1, 8, 9, 33)] == [8, 8, 16, 48]


def test_best_fit_decreasing_by_hand():
  """Longest first into 10: 7 | 6, then 4 fits behind 6 exactly, 3 behind 7, and 2 opens a third."""
  placed = place([4, 3, 7, 6, 2], max_tokens=10, packed=True)
  assert placed.shape == (3, 10)
  assert placed.places == ((1, 6, 4, 2), (0, 7, 3, 2), (0, 0, 7, 1), (1, 0, 6, 1), (2, 0, 2, 1))
  alone = place([4, 3], max_tokens=10)
  assert alone.places == ((0, 0, 4, 1), (1, 0, 3, 1)) and alone.shape == (2, 10)


def test_no_block_computes_padding_alone():
  """Two rows of 320 would do: 160, 128 and 32, and 96, 96 and 64. Four devices that share the work
  have rows of 160 at most instead, each sequence in the emptiest row, which pad to 6 units of 32.
  """
  lengths = [160, 128, 96, 96, 64, 32]
  assert place(lengths, max_tokens=320, packed=True, blocks=2).shape == (2, 320)
  placed = place(lengths, max_tokens=320, packed=True, blocks=4)
  assert placed.shape == (4, 192)
  assert placed.places == (
    (0, 0, 160, 1),
    (1, 0, 128, 1),
    (2, 0, 96, 1),
    (3, 0, 96, 1),
    (2, 96, 64, 2),
    (3, 96, 32, 2),
  )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_sequences_than_blocks(count):
  placed = place([7] * count, max_tokens=32, packed=True, blocks=4)
  assert placed.shape == (4, 32) and len({placed.block(b) for b, *_ in placed.places}) == count


def test_a_sequence_too_long_is_named():
  with pytest.raises(ValueError, match="a row of 11 tokens exceeds max_tokens=10"):
    place([4, 11], max_tokens=10, packed=True, blocks=4)
