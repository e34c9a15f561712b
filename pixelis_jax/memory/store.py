"""Experiences and their vectors in SQLite; the neighbour index is rebuilt from it on opening."""

import dataclasses
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from pixelis_jax.memory import codec
from pixelis_jax.memory.index import make_index
from pixelis_jax.types import Experience, value

APPLICATION_ID = 0x50584D45  # "PXME", in the file's header: tells our database from another one.
SCHEMA_VERSION = 1
# `record` comes last: reading the other columns then never touches its overflow pages.
_SCHEMA = f"""
CREATE TABLE experiences (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL,
  answer TEXT,
  confidence REAL NOT NULL,
  policy_version INTEGER NOT NULL,
  priority REAL NOT NULL,
  created REAL NOT NULL,
  key BLOB NOT NULL,
  record BLOB NOT NULL
);
CREATE INDEX by_priority ON experiences (priority, seq);
CREATE TABLE vectors (dim INTEGER NOT NULL);
CREATE TABLE state (name TEXT PRIMARY KEY, json TEXT NOT NULL);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


@value
class Neighbour:
  """A remembered request near a key: `similarity` is the cosine, `answer` what was voted then."""

  id: str
  similarity: float
  answer: str | None
  confidence: float
  policy_version: int
  kind: str


@value
class _Entry:
  neighbour: Neighbour  # With similarity 1: its own.
  priority: float


class Memory:
  """Durable when `add` returns, searchable at once, at most `capacity` entries. One process only.

  Writing and reading records take one lock, searching another: a search waits for no disk. Every
  method may be called from any thread.
  """

  def __init__(
    self, path: str | os.PathLike, *, dim: int, backend: str = "auto", capacity: int = 100_000
  ):
    """Opens or creates the database file; its directory must exist. `backend`: see `make_index`.

    Raises ValueError if the file is not ours, is damaged, holds keys of another dimension, or is
    open elsewhere; FileNotFoundError without the directory.
    """
    if capacity < 1:
      raise ValueError(f"memory capacity {capacity} must be at least 1")
    self.path = Path(path)
    if not self.path.parent.is_dir():
      raise FileNotFoundError(f"memory {self.path}: directory {self.path.parent} does not exist")
    self.dim = dim
    self.capacity = capacity
    self._db_lock = threading.Lock()
    self._lock = threading.Lock()
    self._entries: dict[int, _Entry] = {}
    self._seq_of: dict[str, int] = {}
    self._index = make_index(dim, backend)
    self._lock_file = self._take_file()
    self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
    try:
      self._open_schema()
      self._load()
    except sqlite3.DatabaseError as e:
      self.close()
      raise ValueError(f"memory {self.path} is damaged or not a memory database: {e}") from e
    except ValueError:
      self.close()
      raise

  def __len__(self) -> int:
    return len(self._entries)

  def __contains__(self, id: str) -> bool:
    return id in self._seq_of

  def ids(self) -> list[str]:
    """Ids of all entries, oldest first."""
    with self._lock:
      return list(self._seq_of)

  def in_order(self, ids: Collection[str]) -> list[str]:
    """Those of these ids that are here, oldest first."""
    with self._lock:
      return sorted((id for id in ids if id in self._seq_of), key=self._seq_of.__getitem__)

  def __enter__(self) -> "Memory":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def close(self) -> None:
    """Releases the file for the next opener."""
    self._db.close()
    self._index.close()
    self._lock_file.close()

  def add(
    self,
    experience: Experience,
    *,
    priority: float = 1.0,
    state: Mapping[str, object] | None = None,
  ) -> bool:
    """`add_all` of one; whether it was new."""
    return self.add_all([experience], priorities=[priority], state=state) == 1

  def add_all(
    self,
    experiences: Sequence[Experience],
    *,
    priorities: Sequence[float] | None = None,
    state: Mapping[str, object] | None = None,
    anew: Collection[str] = (),
  ) -> int:
    """Stores all of them and the state in one transaction, durable on return; how many were stored.

    An id already stored is skipped: the first record stands, but where it is in `anew`. Then it
    gives way, and the new one comes last. Over capacity, entries of lowest
    priority go first, the oldest of these first, be they new or old. Raises ValueError for a key of
    another dimension or not of unit norm, or a priority not positive; then nothing is stored.
    """
    weights = [1.0] * len(experiences) if priorities is None else [float(p) for p in priorities]
    if len(weights) != len(experiences):
      raise ValueError(f"{len(weights)} priorities for {len(experiences)} experiences")
    for experience, weight in zip(experiences, weights, strict=True):
      self._check(experience, weight)
    records = [codec.encode(e) for e in experiences]
    with self._db_lock:
      added: dict[int, tuple[Experience, float]] = {}
      with _transaction(self._db):
        replaced = [self._seq_of[id] for id in anew if id in self._seq_of]
        self._delete(replaced)
        for experience, weight, record in zip(experiences, weights, records, strict=True):
          seq = self._insert(experience, weight, record)
          if seq is not None:
            added[seq] = experience, weight
        evicted = [*replaced, *self._evict()]
        for name, data in (state or {}).items():
          self._write_state(name, data)
      self._publish(added, evicted)
    return len(added)

  def search(
    self, key: Float32[np.ndarray, " D"], k: int, *, exclude: Collection[str] = ()
  ) -> list[Neighbour]:
    """The at most k most similar entries, nearest first, without those whose id is in `exclude`."""
    with self._lock:
      ids, similarities = self._index.search(key[None, :], k + len(exclude))
      found = []
      for seq, similarity in zip(ids[0].tolist(), similarities[0].tolist(), strict=True):
        neighbour = self._entries[seq].neighbour
        if neighbour.id not in exclude:
          found.append(dataclasses.replace(neighbour, similarity=similarity))
    return found[:k]

  def recall(self, ids: Sequence[str], process: codec.Process) -> list[Experience]:
    """Those of these experiences that were not evicted, in the order of `ids`."""
    with self._db_lock:
      found = [
        self._db.execute("SELECT record FROM experiences WHERE id = ?", (id,)).fetchone()
        for id in ids
      ]
    return [codec.restore(row[0], process) for row in found if row is not None]

  def sample(
    self,
    n: int,
    rng: np.random.Generator,
    *,
    process: codec.Process,
    min_confidence: float = 0.0,
    exclude: Collection[str] = (),
  ) -> list[Experience]:
    """At most n different entries, drawn with probability proportional to priority, for rehearsal.

    The draw depends on `rng` and the entries alone: weights as in Efraimidis and Spirakis, Weighted
    random sampling with a reservoir, 2006.
    """
    with self._lock:
      pool = [
        (seq, e.priority)
        for seq, e in sorted(self._entries.items())
        if e.neighbour.confidence >= min_confidence and e.neighbour.id not in exclude
      ]
    if not pool or n < 1:
      return []
    seqs, weights = np.array([s for s, _ in pool]), np.array([w for _, w in pool])
    order = np.argsort(rng.exponential(size=len(seqs)) / weights, kind="stable")
    with self._db_lock:
      records = [self._record(int(seq)) for seq in seqs[order[:n]]]
    return [codec.restore(r, process) for r in records if r is not None]

  def set_priorities(self, priorities: Mapping[str, float]) -> None:
    """Replaces these ids' priorities, durably. KeyError if one isn't there; then none changes."""
    for id, priority in priorities.items():
      _check_priority(id, priority)
    with self._db_lock:
      seqs = {id: self._seq_of[id] for id in priorities}
      with _transaction(self._db):
        self._db.executemany(
          "UPDATE experiences SET priority = ? WHERE seq = ?",
          [(float(p), seqs[id]) for id, p in priorities.items()],
        )
      with self._lock:
        for id, priority in priorities.items():
          entry = self._entries[seqs[id]]
          self._entries[seqs[id]] = _Entry(neighbour=entry.neighbour, priority=float(priority))

  def get_state(self, name: str) -> object | None:
    """The JSON value last set under this name, None if never set."""
    with self._db_lock:
      row = self._db.execute("SELECT json FROM state WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row[0])

  def set_state(self, name: str, data: object) -> None:
    """Durable on return. To commit it together with experiences give `add_all` a state."""
    with self._db_lock, _transaction(self._db):
      self._write_state(name, data)

  def _check(self, experience: Experience, priority: float) -> None:
    _check_priority(experience.id, priority)
    if experience.key.shape != (self.dim,):
      raise ValueError(
        f"key of experience {experience.id!r} has {len(experience.key)} dimensions, "
        f"this memory has {self.dim}"
      )
    norm = float(np.linalg.norm(experience.key))
    if not abs(norm - 1.0) < 1e-3:
      raise ValueError(f"key of experience {experience.id!r} has norm {norm:.6g}, it must be 1")

  def _take_file(self):
    """An advisory lock held while open: two indexes over one table would drift apart."""
    lock_file = open(f"{self.path}.lock", "w")
    try:
      fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      lock_file.close()
      raise ValueError(f"memory {self.path} is open elsewhere, close that process first") from e
    return lock_file

  def _open_schema(self) -> None:
    db = self._db
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if tables and application != APPLICATION_ID:
      raise ValueError(f"memory {self.path} is an SQLite file of another application")
    if tables and version != SCHEMA_VERSION:
      raise ValueError(f"memory {self.path} has schema {version}, this code reads {SCHEMA_VERSION}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")  # A commit has reached the disk when it returns.
    if not tables:
      db.executescript(f"BEGIN; {_SCHEMA} INSERT INTO vectors VALUES ({self.dim}); COMMIT;")
    (stored,) = db.execute("SELECT dim FROM vectors").fetchone()
    if stored != self.dim:
      raise ValueError(
        f"memory {self.path} holds keys of {stored} dimensions, {self.dim} were asked for"
      )

  def _load(self) -> None:
    rows = self._db.execute(
      "SELECT seq, id, kind, answer, confidence, policy_version, priority, key"
      " FROM experiences ORDER BY seq"
    ).fetchall()
    keys = np.zeros((len(rows), self.dim), np.float32)
    for i, (seq, id, kind, answer, confidence, policy_version, priority, key) in enumerate(rows):
      if len(key) != 4 * self.dim:
        raise ValueError(f"memory {self.path} is damaged: key of {id!r} has {len(key)} bytes")
      keys[i] = np.frombuffer(key, "<f4")
      neighbour = Neighbour(
        id=id,
        similarity=1.0,
        answer=answer,
        confidence=confidence,
        policy_version=policy_version,
        kind=kind,
      )
      self._entries[seq] = _Entry(neighbour=neighbour, priority=priority)
      self._seq_of[id] = seq
    self._index.add(np.array([r[0] for r in rows], np.int64), keys)

  def _insert(self, experience: Experience, priority: float, record: bytes) -> int | None:
    cursor = self._db.execute(
      "INSERT INTO experiences"
      " (id, kind, answer, confidence, policy_version, priority, created, key, record)"
      " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
      (
        experience.id,
        _kind(experience),
        experience.vote.answer,
        float(experience.vote.confidence),
        experience.policy_version,
        priority,
        time.time(),
        experience.key.astype("<f4").tobytes(),
        record,
      ),
    )
    return cursor.lastrowid if cursor.rowcount else None

  def _evict(self) -> list[int]:
    (count,) = self._db.execute("SELECT count(*) FROM experiences").fetchone()
    rows = self._db.execute(
      "SELECT seq FROM experiences ORDER BY priority, seq LIMIT ?", (max(0, count - self.capacity),)
    ).fetchall()
    seqs = [seq for (seq,) in rows]
    self._delete(seqs)
    return seqs

  def _delete(self, seqs: Sequence[int]) -> None:
    self._db.executemany("DELETE FROM experiences WHERE seq = ?", [(seq,) for seq in seqs])

  def _publish(self, added: Mapping[int, tuple[Experience, float]], evicted: list[int]) -> None:
    """Brings index and entries to what was just committed."""
    kept = {seq: a for seq, a in added.items() if seq not in set(evicted)}
    gone = [seq for seq in evicted if seq not in added]
    with self._lock:
      self._index.remove(np.array(gone, np.int64))
      for seq in gone:  # Before what is new: that may have the id of what it replaces.
        del self._seq_of[self._entries.pop(seq).neighbour.id]
      if kept:
        keys = np.stack([e.key for e, _ in kept.values()])
        self._index.add(np.array(list(kept), np.int64), keys)
      for seq, (experience, priority) in kept.items():
        neighbour = _as_neighbour(experience)
        self._entries[seq] = _Entry(neighbour=neighbour, priority=priority)
        self._seq_of[experience.id] = seq

  def _record(self, seq: int) -> bytes | None:
    """None if it was evicted since it was drawn."""
    row = self._db.execute("SELECT record FROM experiences WHERE seq = ?", (seq,)).fetchone()
    return None if row is None else row[0]

  def _write_state(self, name: str, data: object) -> None:
    self._db.execute(
      "INSERT INTO state VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET json = excluded.json",
      (name, json.dumps(data)),
    )


class _transaction:
  """BEGIN IMMEDIATE, then COMMIT or, if anything was raised, ROLLBACK."""

  def __init__(self, db: sqlite3.Connection):
    self._db = db

  def __enter__(self) -> None:
    self._db.execute("BEGIN IMMEDIATE")

  def __exit__(self, kind, *_) -> None:
    self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _check_priority(id: str, priority: float) -> None:
  if not (0.0 < priority < float("inf")):
    raise ValueError(f"priority {priority} of experience {id!r} must be positive and finite")


def _kind(experience: Experience) -> str:
  return experience.trajectories[0].task.kind if experience.trajectories else ""


def _as_neighbour(experience: Experience) -> Neighbour:
  return Neighbour(
    id=experience.id,
    similarity=1.0,
    answer=experience.vote.answer,
    confidence=float(experience.vote.confidence),
    policy_version=experience.policy_version,
    kind=_kind(experience),
  )
