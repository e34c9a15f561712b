"""The online stream as files: JSON lines or a JSON list in, tasks without labels out.

A request is a record (`records.py`), and may have
  embedding       its own key vector
`labels` and `answer` are not read, so a label in the file cannot reach learning.
What is wrong with one request is reported and the stream goes on.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from pixelis_jax.data import records
from pixelis_jax.data.video import DEFAULT, Budget
from pixelis_jax.types import Task, value

Report = Callable[[str], None]


@value
class Request:
  """A task with no answer and no boxes; `embedding` is the sender's key vector, not normalised."""

  task: Task
  embedding: Float32[np.ndarray, " D"] | None = None


def read_requests(
  path: str | Path,
  *,
  report: Report,
  counts: collections.Counter,
  sees: bool = True,
  decode: records.Decode | None = None,
  embedding_size: int | None = None,
  budget: Budget = DEFAULT,
) -> Iterator[Request]:
  """Requests in the order of the file, images and videos decoded one request at a time.

  Args:
    report: Called with one sentence a refused request: file, line (or item of a list) and reason.
    counts: Raised as the stream goes: "read", "malformed", "duplicate".
    sees, decode: As for `records.read`.
    embedding_size: What embeddings must have; None takes any length.
    budget: Of each video; a request may ask for more frames a second, not for more frames.

  Raises:
    FileNotFoundError: at the call, not at the first request.
    ValueError: at the call: the file is one JSON list, and broken.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"request stream {path} is not a file")
  items = records.items(path)

  def stream() -> Iterator[Request]:
    seen: dict[str, str] = {}
    for where, raw in items:
      try:
        record = records.read(raw, sees=sees, decode=decode)
        embedding = _embedding(record.fields.get("embedding"), embedding_size)
        request = Request(task=record.task(path.parent, budget=budget), embedding=embedding)
      except records.Malformed as e:
        counts["malformed"] += 1
        report(f"{path}, {where}: {e}; skipped")
        continue
      if (first := seen.setdefault(request.task.id, where)) != where:
        counts["duplicate"] += 1
        report(f"{path}, {where}: request_id {request.task.id!r} was given on {first}; skipped")
        continue
      counts["read"] += 1
      yield request

  return stream()


def write_requests(path: str | Path, tasks: Sequence[Task]) -> None:
  """`records.write` of tasks as whoever asks them knows them: answers and boxes stay out."""
  records.write(path, tasks)


def _embedding(given: object, size: int | None) -> Float32[np.ndarray, " D"] | None:
  if given is None:
    return None
  # The bound refuses NaN, infinities, and what float32 cannot square.
  if not isinstance(given, list) or not all(
    isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e18 for x in given
  ):
    raise records.Malformed("embedding must be a list of numbers below 1e18")
  if not given or (size is not None and len(given) != size):
    raise records.Malformed(f"embedding must have {size or 'some'} numbers, not {len(given)}")
  return np.array(given, np.float32)
