"""What devices send one another while a compiled program runs, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_KIND = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def moved(text: str, *, unknown: int = 1) -> dict[str, int]:
  """Bytes that each device receives in a run of a compiled program, by kind of collective.

  Loops count as often as their condition compares with, others `unknown` times: decoding is one.
  An all-reduce moves its array twice, in and out.
  """
  bodies = dict(_computations(text))
  known: dict[str, dict[str, tuple[str, int]]] = {}

  def inside(name: str) -> dict[str, tuple[str, int]]:
    """Channel -> (kind, bytes): a collective that is cut into steps stands there several times."""
    if name not in known:
      known[name] = {}
      for number, line in enumerate(bodies[name]):
        if found := _received(line):
          channel = re.search(r"channel_id=(\d+)", line)
          known[name][channel[1] if channel else f"{name} {number}"] = found
        for called, times in _calls(line, bodies):
          often = times or unknown
          many = {at: (kind, often * size) for at, (kind, size) in inside(called).items()}
          known[name] = many | known[name]
    return known[name]

  total: Counter = Counter()
  for kind, size in inside(next(name for name in bodies if name.startswith("ENTRY "))).values():
    total[kind] += size
  return dict(total)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  """(name, lines) of each; the entry's name begins with "ENTRY "."""
  name, lines = None, []
  for line in text.splitlines():
    start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if start and not line.startswith(" "):
      name, lines = f"{start[1] or ''}{start[2]}", []
    elif line.startswith("}") and name:
      yield name, lines
      name = None
    else:
      lines.append(line)


def _calls(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
  """(computation, how often) that an operation runs; 0 where nobody knows."""
  if " while(" in line:
    body = re.search(r"body=%?([\w.\-]+)", line)[1]
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    counts = re.findall(r'known_trip_count":\{"n":"(\d+)"', line)
    # A counter from 0 is compared with a constant, or the condition depends on the data.
    counts = counts or re.findall(r"constant\((\d+)\)", "\n".join(bodies[condition]))
    yield body, int(counts[0]) if len(counts) == 1 else 0
    return
  for names in re.findall(r"(?:calls|to_apply|branch_computations)=\{?([%\w.\-, ]+)", line):
    for name in names.split(","):
      if (called := name.strip().lstrip("%")) in bodies:
        yield called, 1


def _received(line: str) -> tuple[str, int] | None:
  """(kind, bytes) of an operation, if it is a collective of several devices."""
  kind = _KIND.search(line)
  if not kind or "=" not in line[: kind.start()]:
    return None
  arrays = re.findall(r"(\w+)\[([\d,]*)\]", line[line.index("=") : kind.start()])
  sizes = [_SIZES.get(t, 4) * math.prod(int(n) for n in s.split(",") if n) for t, s in arrays]
  if kind[2]:  # (operands, results)
    sizes = sizes[len(sizes) // 2 :]
  members = _members(line)
  if members == 1:
    return None
  factor = {"all-reduce": 2, "reduce-scatter": members}.get(kind[1], 1)
  return kind[1], factor * sum(sizes)


def _members(line: str) -> int:
  """How many devices a collective joins, in any of the spellings of its groups; 0: not said."""
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(found[1])
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line):
    axes = dict(axis.split("=") for axis in found[1].split(","))
    return math.prod(int(axes[name]) for name in found[2].split(","))
  return 0
