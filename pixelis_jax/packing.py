"""Where sequences lie in a batch: in which of its blocks, in which row, at which tokens.

Sizes are rounded up to a few, so that a run compiles a handful of programs. Rows are equal blocks,
see `sharding.row_blocks`, of which all processes have as many.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pixelis_jax.cluster import agree

LENGTHS = 32  # Rows are padded to 1, 2, 3, 4, 6, 8, 12, ... times this: few lengths, few programs.


def round_up(n: int, *, multiple_of: int = 1) -> int:
  """The least of 2^k and 3*2^(k-1) times `multiple_of` not below n: at most a third is padding.

  That bound holds for n of at least `multiple_of`.
  """
  size = 1
  while size * multiple_of < n:
    size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else 1 << (size).bit_length()
  return size * multiple_of


def spread(n: int, blocks: int) -> list[int]:
  """The block of each of n things in order, as evenly as can be."""
  return [i * blocks // n for i in range(n)]


def seats(of: Sequence[int], blocks: int, *, multiple_of: int = 1) -> tuple[int, list[int]]:
  """(rows of a batch, the row of each thing), where thing i belongs in block `of[i]`.

  In its block each follows those before it. All blocks have as many rows, in other processes too:
  one of the sizes of `round_up`. Together they are a multiple of `multiple_of`, where that is one
  of `blocks`.
  """
  taken = [0] * blocks
  ranks = []
  for block in of:
    ranks.append(taken[block])
    taken[block] += 1
  (most,) = agree(max(1, *taken))
  size = round_up(most, multiple_of=max(multiple_of // blocks, 1))
  return size * blocks, [block * size + rank for block, rank in zip(of, ranks, strict=True)]


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where each sequence lies in a [B, T] batch: (row, first token, number of tokens, segment).

  Rows are `blocks` equal blocks, see `sharding.row_blocks`.
  """

  shape: tuple[int, int]
  places: tuple[tuple[int, int, int, int], ...]
  blocks: int = 1

  def block(self, row: int) -> int:
    """The block that a row is in."""
    return row * self.blocks // self.shape[0]

  def fill(
    self, values: Sequence[np.ndarray | float | int], empty: float | int, dtype: type
  ) -> np.ndarray:
    """[B, T] with each sequence's values, one a token or one for all, and `empty` elsewhere."""
    out = np.full(self.shape, empty, dtype)
    for (b, start, count, _), mine in zip(self.places, values, strict=True):
      out[b, start : start + count] = mine
    return out


def place(
  lengths: Sequence[int],
  *,
  max_tokens: int,
  multiple_of: int = 1,
  packed: bool = False,
  blocks: int = 1,
) -> Placement:
  """A row each, right-padded; `packed`, as few rows as best-fit decreasing finds.

  Where these are no more than there are blocks, each block gets one, and rows are as short as can
  be. Rows stay in order, and each block gets the same number of them or one more. `multiple_of`
  is one of the number of blocks too. Raises ValueError for a sequence longer than `max_tokens`,
  naming its length.
  """
  longest = max(lengths, default=0)
  if longest > max_tokens:
    raise ValueError(f"a row of {longest} tokens exceeds max_tokens={max_tokens}")
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if packed else range(len(lengths))
  # Sequences by row.
  rows = _fewest(order, lengths, max_tokens) if packed else [[i] for i in order]
  if packed and 0 < len(rows) <= blocks:
    evened = _evened(order, lengths, min(blocks, len(lengths)))
    rows = min(evened, rows, key=lambda rows: max(sum(lengths[i] for i in row) for row in rows))
  count, at = seats(spread(len(rows), blocks), blocks, multiple_of=multiple_of)
  places, fullest = {}, 1
  for row, held in zip(at, rows, strict=True):
    used = 0
    for segment, i in enumerate(held, start=1):
      places[i] = (row, used, lengths[i], segment)
      used += lengths[i]
    fullest = max(fullest, used)
  (fullest,) = agree(fullest)
  tokens = min(round_up(fullest, multiple_of=LENGTHS), max_tokens)
  return Placement((count, tokens), tuple(places[i] for i in range(len(lengths))), blocks)


def _fewest(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
  """Each sequence in the fullest row that has room."""
  rows: list[list[int]] = []
  used: list[int] = []
  for i in order:
    room = [b for b, taken in enumerate(used) if taken + lengths[i] <= max_tokens]
    if room:
      b = max(room, key=lambda b: used[b])
    else:
      b = len(rows)
      rows.append([])
      used.append(0)
    rows[b].append(i)
    used[b] += lengths[i]
  return rows


def _evened(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
  """Each sequence in the emptiest of so many rows."""
  rows: list[list[int]] = [[] for _ in range(count)]
  used = [0] * count
  for i in order:
    b = used.index(min(used))
    rows[b].append(i)
    used[b] += lengths[i]
  return rows
