"""Whether a built dataset is what it says: balance, duplicates, corruption, leakage, calls, turns.

Every record is decoded. What is found wrong is a sentence in the report's `problems`; what may be
as it should be but deserves a look is in `remarks`.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from pixelis_jax.algo.answers import equal
from pixelis_jax.chat.parse import parse_answer, parse_call
from pixelis_jax.data import built
from pixelis_jax.data.examples import Record, decode
from pixelis_jax.data.lines import shown
from pixelis_jax.data.sources import CORRECTED, GOLDEN, TRAP
from pixelis_jax.tools import TOOLS
from pixelis_jax.types import DemoTurn, ToolCall, content_key, value

SHOWN = 5  # Of what is wrong in one way, in the report.
SKEWED = 3.0  # Times an even share of its kind, above which an answer is remarked on.
# Which turns of each sort may be supervised: none from a trap's error on, and no error of others.
_TAUGHT = {GOLDEN: r"\++", TRAP: r"\+*-+", CORRECTED: r"\+*-+\++"}
_NAMES = {tool.name for tool in TOOLS["qwen"].values()}


@value
class Seen:
  """What the report needs of a record. `key` is of what is asked and shown, `images` name that."""

  id: str
  kind: str
  sort: str
  answer: str
  key: str
  images: tuple[str, ...]
  calls: int
  taught: bool
  faults: tuple[str, ...]


def examine(file: Path) -> list[Seen | str]:
  """Each record of a file; a text says why it could not be decoded. Pure, for `tools.workers`."""
  try:
    reader = ArrayRecordReader(str(file))
  except RuntimeError as e:
    return [str(e)]
  found = [_examined(reader, number) for number in range(reader.num_records())]
  reader.close()
  return found


def _examined(reader: ArrayRecordReader, number: int) -> Seen | str:
  try:
    (data,) = reader.read([number])
    record = decode(data)
  except (RuntimeError, ValueError) as e:  # RuntimeError: what array_record says.
    return str(e)
  task = record.demo.task
  images = tuple(name for names in shown(task) for name in names)
  return Seen(
    id=task.id,
    kind=task.kind,
    sort=record.sort,
    answer=task.answer,
    key=content_key(task.question, *images),
    images=images,
    calls=sum(turn.result is not None for turn in record.demo.turns),
    taught=any(turn.supervised for turn in record.demo.turns),
    faults=tuple(faults(record)),
  )


def faults(record: Record) -> list[str]:
  """What of a demonstration must not be taught, or is not what its sort says."""
  turns = record.demo.turns
  found = [
    f"turn {i}: {wrong}" for i, turn in enumerate(turns[:-1]) if (wrong := _wrong_look(turn))
  ]
  if turns[-1].result is not None or _call(turns[-1].text):
    found.append("the last turn calls a tool")
  said, answer = parse_answer(turns[-1].text), record.demo.task.answer
  if equal(said, answer) == (record.sort == TRAP):
    found.append(f"a {record.sort} demonstration answers {said!r}, where {answer!r} is right")
  taught = "".join("+" if turn.supervised else "-" for turn in turns)
  if not re.fullmatch(_TAUGHT[record.sort], taught):
    found.append(f"of a {record.sort} demonstration the turns {taught} are supervised")
  return found


def _wrong_look(turn: DemoTurn) -> str | None:
  """Of a turn before the last."""
  call = _call(turn.text)
  if isinstance(call, str):
    return call
  if call is None or turn.result is None:
    return "it calls no tool, or has no result"
  if call.name not in _NAMES:
    return f"there is no tool {call.name!r}"
  if turn.supervised and turn.result.error is not None:
    return f"it is supervised, and its call fails: {turn.result.error}"
  return None


def _call(text: str) -> ToolCall | str | None:
  """The call in a turn; why there is none that can be read; or None where there is none."""
  try:
    return parse_call(text)
  except ValueError as e:
    return f"its call cannot be read: {e}"


def report(folder: Path, examined: Sequence[Seen | str], against: Sequence[Path] = ()) -> dict:
  """What is right and wrong in a finished dataset, as JSON.

  Args:
    examined: what `examine` says of its files, in their order.
    against: other datasets: an image or film that is in both is a leak.

  Raises:
    FileNotFoundError, ValueError: a folder holds no dataset, or one that is not finished.
  """
  about, lines = built.Dataset.open(folder).about, built.lines(folder)
  seen = [one for one in examined if isinstance(one, Seen)]
  leaks = {str(other): _leaks(seen, other) for other in against}
  kinds, sorts = _kinds(seen, about), _shares([one.sort for one in seen], about, "sorts")
  problems = [
    *_told("files are not as they were built", _changed(folder, about)),
    *_told("records cannot be decoded", _broken(examined)),
    *_told(
      "records have another line or no picture in demos.jsonl", _unlike(examined, lines, folder)
    ),
    *_told("records ask and show what another does", (repeated := _repeated(seen))),
    *_told("records have faults", [f"{one.id}: {fault}" for one in seen for fault in one.faults]),
  ]
  for other, ids in leaks.items():
    problems += _told(f"records show what {other} shows", ids)
  return {
    "records": len(examined),
    "decoded": len(seen),
    "calls": sum(one.calls for one in seen),
    "duplicates": len(repeated),
    "leaks": {other: len(ids) for other, ids in leaks.items()},
    "kinds": kinds,
    "sorts": sorts,
    "problems": problems,
    "remarks": _remarks(seen, kinds, about),
  }


def table(report: Mapping) -> str:
  """The report for a terminal."""
  rows = [("", "records", "share", "asked", "yield", "answers", "commonest")]
  for name, row in (*report["kinds"].items(), *report["sorts"].items()):
    cells = [_percent(row[key]) if key in row else "" for key in ("share", "asked", "yield")]
    most = _percent(row["commonest"]) if "commonest" in row else ""
    rows.append((name, str(row["records"]), *cells, str(row.get("answers", "")), most))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(pairs))
    for pairs in ([*zip(row, widths, strict=True)] for row in rows)
  ]
  lines += [
    "",
    f"{report['decoded']} of {report['records']} records decoded, {report['calls']} calls",
  ]
  lines += [f"remark: {remark}" for remark in report["remarks"]]
  lines += [f"problem: {problem}" for problem in report["problems"]] or ["no problems"]
  return "\n".join(line.rstrip() for line in lines)


def _remarks(seen: Sequence[Seen], kinds: Mapping[str, Mapping], about: Mapping) -> list[str]:
  idle = sum(not one.taught for one in seen)
  remarks = [f"{idle} records have no supervised turn: SFT does not sample them"] if idle else []
  if len(about["by"]) > 1:
    commits = ", ".join(by["commit"] for by in about["by"])
    remarks.append(f"{len(about['by'])} versions of the code made its parts: commits {commits}")
  return remarks + [
    f"{_percent(row['commonest'])} of the answers of kind {kind!r} are the same: even would be "
    f"{_percent(1 / row['answers'])}"
    for kind, row in kinds.items()
    if row["commonest"] > SKEWED / row["answers"]
  ]


def _kinds(seen: Sequence[Seen], about: Mapping) -> dict[str, dict]:
  rows = _shares([one.kind for one in seen], about, "kinds")
  for kind, row in rows.items():
    answers = collections.Counter(one.answer for one in seen if one.kind == kind)
    row["answers"], row["commonest"] = len(answers), max(answers.values()) / row["records"]
    if kind in about["yield"]:
      row["yield"] = about["yield"][kind]["share"]
  return rows


def _shares(names: Sequence[str], about: Mapping, field: str) -> dict[str, dict]:
  """How often each is there, and what the manifest asks, where it says so."""
  asked = about["manifest"].get(field, {})
  rows = {}
  for name, count in sorted(collections.Counter(names).items()):
    rows[name] = {"records": count, "share": count / len(names)}
    if name in asked:
      rows[name]["asked"] = asked[name]
  return rows


def _changed(folder: Path, about: Mapping) -> list[str]:
  return [
    name for name, file in about["files"].items() if built.sha256(folder / name) != file["sha256"]
  ]


def _broken(examined: Sequence[Seen | str]) -> list[str]:
  return [f"record {i}: {one}" for i, one in enumerate(examined) if isinstance(one, str)]


def _unlike(examined: Sequence[Seen | str], lines: Sequence[Mapping], folder: Path) -> list[str]:
  if len(examined) != len(lines):
    return [f"{len(lines)} lines for {len(examined)} records"]
  wrong = []
  for one, line in zip(examined, lines, strict=True):
    names = [*line["images"], *(video["path"] for video in line["videos"])]
    told = [picture["path"] for turn in line["turns"] for picture in turn.get("images", ())]
    if isinstance(one, Seen) and (one.id != line["request_id"] or [*one.images] != names):
      wrong.append(one.id)
    elif missing := [name for name in (*names, *told) if not (folder / name).exists()]:
      wrong.append(f"{line['request_id']} without {missing[0]}")
  return wrong


def _repeated(seen: Sequence[Seen]) -> list[str]:
  first: dict[str, str] = {}
  again = []
  for number, one in enumerate(seen):
    where = f"{one.id} (record {number})"
    if (before := first.setdefault(one.key, where)) != where:
      again.append(f"{where} is {before}")
  return again


def _leaks(seen: Sequence[Seen], other: Path) -> list[str]:
  theirs = set()
  for line in built.lines(other):
    theirs |= {*line["images"], *(video["path"] for video in line["videos"])}
  return [one.id for one in seen if theirs & {*one.images}]


def _told(what: str, items: Sequence[str]) -> list[str]:
  """One sentence, or none where there are no items."""
  if not items:
    return []
  more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
  return [f"{len(items)} {what}: {'; '.join(items[:SHOWN])}{more}"]


def _percent(share: float) -> str:
  return f"{100 * share:.1f}%"
