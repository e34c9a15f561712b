"""Nearest neighbours over unit vectors: ScaNN where it runs, and its exact twin everywhere.

Both keep the float32 vectors themselves and score the final candidates from them row by row, so
that the two return the same ids and similarities, equal similarities ordered by ascending id.
"""

import concurrent.futures
import threading
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

# Candidates this close below the k-th are scored again: above the float32 error of a dot product of
# unit vectors (about 1e-6 at 4096 dimensions), so no ordering depends on how BLAS sums.
SLACK = 1e-5


@runtime_checkable
class Index(Protocol):
  """Cosine neighbours over unit vectors named by unique int64 ids. Any thread may call."""

  dim: int

  def __len__(self) -> int: ...

  def add(self, ids: Int64[np.ndarray, " N"], vectors: Float32[np.ndarray, "N D"]) -> None: ...

  def remove(self, ids: Int64[np.ndarray, " N"]) -> None: ...

  def search(
    self, queries: Float32[np.ndarray, "Q D"], k: int
  ) -> tuple[Int64[np.ndarray, "Q M"], Float32[np.ndarray, "Q M"]]: ...

  def close(self) -> None: ...


def make_index(dim: int, backend: str = "auto") -> Index:
  """ScaNN for "auto" where its wheel exists (x86-64 Linux), else exact; naming one insists."""
  if backend == "exact":
    return ExactIndex(dim)
  if backend not in ("auto", "scann"):
    raise ValueError(f'index backend {backend!r} must be one of "auto", "scann", "exact"')
  try:
    return ScannIndex(dim)
  except ImportError as e:
    if backend == "scann":
      raise ImportError(f'backend "scann" needs the scann package, use "exact" here: {e}') from e
    return ExactIndex(dim)


class _Table:
  """The ids and vectors, dense, in rows that move when one is removed."""

  def __init__(self, dim: int):
    if dim < 1:
      raise ValueError(f"index dim {dim} must be at least 1")
    self.dim = dim
    self.row_of: dict[int, int] = {}
    self._ids = np.zeros(64, np.int64)
    self._vectors = np.zeros((64, dim), np.float32)

  def __len__(self) -> int:
    return len(self.row_of)

  @property
  def ids(self) -> Int64[np.ndarray, " N"]:
    return self._ids[: len(self)]

  @property
  def vectors(self) -> Float32[np.ndarray, "N D"]:
    return self._vectors[: len(self)]

  def check_vectors(self, what: str, vectors: Float32[np.ndarray, "N D"]) -> None:
    if vectors.shape[1] != self.dim:
      raise ValueError(f"{what} have {vectors.shape[1]} dimensions, this index has {self.dim}")
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1.0) < 1e-3))  # The negation catches NaN too.
    if bad.size:
      raise ValueError(f"{what}[{bad[0]}] has norm {norms[bad[0]]:.6g}, it must be a unit vector")

  def add(self, ids: Int64[np.ndarray, " N"], vectors: Float32[np.ndarray, "N D"]) -> None:
    """All or nothing: every id and vector is checked before the first is stored."""
    if len(ids) != len(vectors):
      raise ValueError(f"{len(ids)} ids for {len(vectors)} vectors, they must be as many")
    self.check_vectors("vectors", vectors)
    seen: set[int] = set()
    for i in ids.tolist():
      if i in self.row_of or i in seen:
        raise ValueError(f"id {i} is already in the index, ids must be unique")
      seen.add(i)
    start, stop = len(self), len(self) + len(ids)
    if stop > len(self._ids):
      room = max(2 * len(self._ids), stop)
      grown_ids, grown = np.zeros(room, np.int64), np.zeros((room, self.dim), np.float32)
      grown_ids[:start], grown[:start] = self.ids, self.vectors
      self._ids, self._vectors = grown_ids, grown
    self._ids[start:stop], self._vectors[start:stop] = ids, vectors
    self.row_of.update(zip(ids.tolist(), range(start, stop), strict=True))

  def remove(self, ids: Int64[np.ndarray, " N"]) -> None:
    wanted = ids.tolist()
    missing = [i for i in wanted if i not in self.row_of]
    if missing or len(set(wanted)) != len(wanted):
      raise ValueError(f"cannot remove ids {wanted}: not in the index {missing}, or named twice")
    for i in wanted:
      last = len(self) - 1
      row = self.row_of.pop(i)
      if row != last:  # The last row moves into the hole.
        moved = int(self._ids[last])
        self._ids[row], self._vectors[row] = moved, self._vectors[last]
        self.row_of[moved] = row

  def nearest_rows(self, query: Float32[np.ndarray, " D"], k: int) -> Int64[np.ndarray, " C"]:
    """Every row that may be among the k most similar, ties included."""
    similarities = self.vectors @ query
    kth = np.partition(similarities, len(self) - k)[len(self) - k]
    return np.flatnonzero(similarities >= kth - np.float32(SLACK))

  def rank(
    self, query: Float32[np.ndarray, " D"], rows: Int64[np.ndarray, " C"], k: int
  ) -> tuple[Int64[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
    """The k most similar of these rows, equal similarities by ascending id."""
    # A row's sum doesn't depend on where the row lies, a matmul's does: equal vectors stay equal.
    similarities = (self._vectors[rows] * query[None, :]).sum(axis=1)
    order = np.lexsort((self._ids[rows], -similarities))[:k]
    return self._ids[rows][order], similarities[order]


def _stacked(
  table: _Table, queries: Float32[np.ndarray, "Q D"], k: int, rows_for
) -> tuple[Int64[np.ndarray, "Q M"], Float32[np.ndarray, "Q M"]]:
  """Ranks `rows_for(query, m)` for each query into [Q, m] arrays, m = min(k, entries)."""
  table.check_vectors("queries", queries)
  if k < 1:
    raise ValueError(f"k {k} must be at least 1")
  m = min(k, len(table))
  ids = np.zeros((len(queries), m), np.int64)
  similarities = np.zeros((len(queries), m), np.float32)
  if m:
    for i, query in enumerate(queries):
      ids[i], similarities[i] = table.rank(query, rows_for(query, m), m)
  return ids, similarities


class ExactIndex:
  """A matmul over all vectors: runs everywhere, and defines what the others must return."""

  def __init__(self, dim: int):
    self.dim = dim
    self._table = _Table(dim)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._table)

  def add(self, ids: Int64[np.ndarray, " N"], vectors: Float32[np.ndarray, "N D"]) -> None:
    """Raises ValueError for an id already there, another dimension, or a norm that is not 1."""
    with self._lock:
      self._table.add(ids, vectors)

  def remove(self, ids: Int64[np.ndarray, " N"]) -> None:
    """Raises ValueError if an id is not there; then none is removed."""
    with self._lock:
      self._table.remove(ids)

  def search(
    self, queries: Float32[np.ndarray, "Q D"], k: int
  ) -> tuple[Int64[np.ndarray, "Q M"], Float32[np.ndarray, "Q M"]]:
    """Ids and cosine similarities, most similar first; M = min(k, entries)."""
    with self._lock:
      return _stacked(self._table, queries, k, self._table.nearest_rows)

  def close(self) -> None:
    """Nothing to release."""


class ScannIndex:
  """ScaNN's brute force with upsert and delete; above `tree_threshold` entries also a tree.

  Brute force is exact. The tree (squared_l2 + asymmetric hashing) is built in a background thread
  over a snapshot and never mutated: entries added since stay in the brute-force searcher, removed
  ones are filtered from its answers, and when either are more than `tree_threshold` and a tenth of
  the tree, a new tree is built and swapped in. squared_l2 because a tree partitioned by dot_product
  loses most new points unlike its training data; on unit vectors both rank alike.
  """

  def __init__(self, dim: int, *, tree_threshold: int = 100_000):
    import scann  # Only here: there are wheels for x86-64 Linux alone.

    self.dim = dim
    self.tree_threshold = tree_threshold
    self._builder = scann.scann_ops_pybind.builder
    self._table = _Table(dim)
    self._lock = threading.Lock()
    self._fresh = self._brute_force([], np.zeros((0, dim), np.float32))
    self._tree = None
    self._building: concurrent.futures.Future | None = None
    self._since: set[int] = set()  # Ids added since the snapshot under construction.
    self._executor = concurrent.futures.ThreadPoolExecutor(1, "memory-tree")

  def __len__(self) -> int:
    return len(self._table)

  @property
  def has_tree(self) -> bool:
    """Whether a tree serves now; False until the first background build has been swapped in."""
    return self._tree is not None

  def add(self, ids: Int64[np.ndarray, " N"], vectors: Float32[np.ndarray, "N D"]) -> None:
    """Raises ValueError for an id already there, another dimension, or a norm that is not 1."""
    with self._lock:
      self._swap_if_built()
      self._table.add(
        ids, vectors
      )  # Refuses before ScaNN sees it: a failed upsert there shifts its ids.
      if len(ids):
        self._fresh.upsert([str(i) for i in ids.tolist()], np.ascontiguousarray(vectors), len(ids))
        self._since.update(ids.tolist())
      self._build_if_due()

  def remove(self, ids: Int64[np.ndarray, " N"]) -> None:
    """Raises ValueError if an id is not there; then none is removed."""
    with self._lock:
      self._swap_if_built()
      self._table.remove(ids)
      fresh = [str(i) for i in ids.tolist() if str(i) in self._fresh.docid_to_id]
      for docid in fresh:  # One at a time: a batch of deletes would name rows that moved meanwhile.
        self._fresh.delete([docid])
      self._build_if_due()

  def search(
    self, queries: Float32[np.ndarray, "Q D"], k: int
  ) -> tuple[Int64[np.ndarray, "Q M"], Float32[np.ndarray, "Q M"]]:
    """As the exact one; with a tree a few of the farther neighbours may be missed for others."""
    with self._lock:
      self._swap_if_built()
      return _stacked(self._table, queries, k, self._rows)

  def wait(self) -> None:
    """Blocks until a tree under construction serves. Raises what its construction raised."""
    building = self._building
    if building is not None:
      concurrent.futures.wait([building])
    with self._lock:
      self._swap_if_built()

  def close(self) -> None:
    """Drops a build that has not begun and waits for one that has."""
    self._executor.shutdown(wait=True, cancel_futures=True)

  def _rows(self, query: Float32[np.ndarray, " D"], k: int) -> Int64[np.ndarray, " C"]:
    found = {
      i for s in (self._fresh, self._tree) if s is not None for i in self._alive(s, query, k)
    }
    if len(found) < k:  # The tree searched too few leaves to fill k.
      return self._table.nearest_rows(query, k)
    return np.fromiter((self._table.row_of[i] for i in found), np.int64, len(found))

  def _alive(self, searcher, query: Float32[np.ndarray, " D"], k: int) -> list[int]:
    """Ids from one searcher that may be among the k most similar; removed ones are left out."""
    size = len(searcher.docids)
    ask, alive = k + 8, []
    while size:
      ask = min(ask, size)
      docids, scores = searcher.search_batched(query[None, :], ask, max(100, 4 * ask))
      found = ~np.isnan(scores[0])  # NaN pads an answer that is short of `ask`.
      scores = 1.0 - scores[0] / 2.0 if searcher is self._tree else scores[0]
      pairs = [(int(d), s) for d, s, f in zip(docids[0], scores, found, strict=True) if f]
      alive = [(i, s) for i, s in pairs if i in self._table.row_of]
      # Enough only when the last one asked for lies clearly below the k-th: no tie was cut.
      if ask == size or (len(alive) > k and alive[-1][1] < alive[k - 1][1] - SLACK):
        break
      if len(pairs) < ask:  # A tree that has no more in the leaves it searched.
        break
      ask *= 2
    return [i for i, _ in alive]

  def _build_if_due(self) -> None:
    if self._building is not None:
      return
    size = 0 if self._tree is None else len(self._tree.docids)
    stale = size - (len(self._table) - len(self._fresh.docids))
    if max(len(self._fresh.docids), stale) > max(self.tree_threshold, size // 10):
      snapshot = self._table.ids.copy(), self._table.vectors.copy()
      self._building = self._executor.submit(self._build_tree, *snapshot)
      self._since = set()

  def _swap_if_built(self) -> None:
    if self._building is None or not self._building.done():
      return
    self._tree = self._building.result()
    self._building = None
    since = [i for i in sorted(self._since) if i in self._table.row_of]
    rows = [self._table.row_of[i] for i in since]
    self._fresh = self._brute_force([str(i) for i in since], self._table.vectors[rows])

  def _brute_force(self, docids: list[str], vectors: Float32[np.ndarray, "N D"]):
    return self._builder(vectors, 10, "dot_product").score_brute_force().build(docids=docids)

  def _build_tree(self, ids: Int64[np.ndarray, " N"], vectors: Float32[np.ndarray, "N D"]):
    leaves = max(2, int(len(ids) ** 0.5))
    # A quarter of them are searched. In small trees (20 to 30 leaves) fewer than 5 lost up to half
    # of the stored points when asked for themselves one query at a time (tried, ScaNN 1.4.2).
    builder = self._builder(vectors, 10, "squared_l2")
    builder.tree(
      leaves, min(leaves, max(8, leaves // 4)), training_sample_size=min(len(ids), 100_000)
    )
    builder.score_ah(2).reorder(100).set_n_training_threads(1)  # One: the others are answering.
    return builder.build(docids=[str(i) for i in ids.tolist()])
