"""When two answers mean the same: the one comparison behind rewards, votes and evaluation.

Two answers are equal iff their canonical texts are, so equality is an equivalence and groups never
overlap. What that costs, on purpose: a number without its unit is not the number with it ("5" is
not "5 cm"), there is no numeric tolerance ("0.33" is not "1/3"), and an option is its letter ("B.
cat" is "B", whatever follows).
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

LONGEST = 1000  # Characters; beyond it an answer is compared as folded text only.
NESTING = 4  # Lists in lists that are still read; deeper ones are text.

_LATEX = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\\[dt]?frac\{\s*(-?[0-9]+)\s*\}\{\s*([0-9]+)\s*\}|\\[dt]?frac([0-9])([0-9])", r" \1\3/\2\4"),
    (
      r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}",
      r"\1",
    ),
    (
      r"\s*(?:\\times|\\cdot|×|\*|(?<=[0-9])\s*x)\s*10\s*\^\s*\{?([+-]?[0-9]{1,2})\}?(?![0-9])",
      r"e\1",
    ),
    (r"\^?\{?\\circ\}?|\\degree", "°"),
    (r"\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
    (r"\\([%{}#&_])", r"\1"),
    (r"\\[,;:! ]|\\quad", " "),
    # pandoc's rule for inline mathematics, so that "$5 or $6" keeps its currency.
    (r"(?<!\\)\$(?=\S)([^$]*[^$\s\\])\$(?![0-9])", r"\1"),
    (r"\\\((.*?)\\\)|\\\[(.*?)\\\]", r"\1\2"),
    (r"\\\$", "$"),
  )
)

# Each has one group: what is inside.
_WRAPPERS = tuple(
  re.compile(pattern)
  for pattern in (
    r"<answer>(.*)</answer>",
    r"\"([^\"]*)\"",
    r"'([^']*)'",
    r"`([^`]*)`",
    r"\*\*(.*)\*\*",
    r"(?:so )?(?:the |my )?(?:final |correct )?(?:answer|option|choice)(?: is:?|:) ?(.+)",
    r"(?:option|choice) (\(?[a-j]\)?(?:[.:] .*)?)",
    r"[a-z] ?= ?([^=].*)",
    r"(?:the|an?) (?!(?:and|or)\b)([^\W\d_]{2}.*)",
    r"(.*?)[ .,;:]+",
    r"(.*[^\W\d_])[!?]+",
  )
)

_YES_NO = re.compile(r"(yes|no)(?:,(?!.*\b(?:yes|no)\b).*)?")
# "(b)", "b)", "b." and the option's text; another option there would make it a list.
_OPTION = re.compile(
  r"(?:\(([a-j])\)[.:]? ?|([a-j])\) ?|([a-j])[.:] )"
  r"(?!(?:and|or)\b)(?![a-j]\b\W*$)(?:[\w\"'$€£].*|-?\.?[0-9].*)"
  r"|([a-j])\)"
)

_NUMBER = re.compile(
  r"(?P<sign>[+-]?) ?(?P<money>[$€£]?) ?(?P<inner>[+-]?)"
  r"(?:(?:(?P<mixed>[0-9]+) )?(?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+)"
  r"|(?=\.?[0-9])(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?P<part>\.[0-9]*)?(?:e(?P<power>[+-]?[0-9]{1,2}))?)"
  r"(?P<percent> ?%| ?percent\b)? ?(?P<unit>[^\W\d_].*|°.*|[$€£])?"
)
_WORDS = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
  "sixteen seventeen eighteen nineteen twenty"
).split()

# Unit spelling -> (factor, unit it is counted in). An unknown unit is kept as it is written.
_UNITS = {
  spelling: (Fraction(factor), unit)
  for unit, factor, spellings in (
    ("m", "1/1000", "mm millimeter millimeters millimetre millimetres"),
    ("m", "1/100", "cm centimeter centimeters centimetre centimetres"),
    ("m", "1", "m meter meters metre metres"),
    ("m", "1000", "km kilometer kilometers kilometre kilometres"),
    ("m", "0.0254", "in inch inches"),
    ("m", "0.3048", "ft foot feet"),
    ("g", "1/1000", "mg milligram milligrams"),
    ("g", "1", "g gram grams"),
    ("g", "1000", "kg kilogram kilograms"),
    ("s", "1/1000", "ms millisecond milliseconds"),
    ("s", "1", "s sec second seconds"),
    ("s", "60", "min mins minute minutes"),
    ("s", "3600", "h hr hrs hour hours"),
    ("px", "1", "px pixel pixels"),
    ("°", "1", "° deg degree degrees"),
    ("°c", "1", "°c celsius"),
    ("°f", "1", "°f fahrenheit"),
    ("$", "1", "$ dollar dollars usd"),
    ("€", "1", "€ euro euros eur"),
    ("£", "1", "£ gbp"),
  )
  for spelling in spellings.split()
}
# What `_number` writes.
_VALUE = re.compile(r"(-?[0-9]+(?:\.[0-9]+|/[0-9]+)?)(?: (.+))?")
_POWER = re.compile(r"(.*?[^\W\d_]) ?\^?\{?([23])\}?")
_PAIR_OF_PAIRS = re.compile(r"\[(-?[0-9./]+, -?[0-9./]+)\], \[(-?[0-9./]+, -?[0-9./]+)\]")
_THOUSANDS = re.compile(r"(?<=[0-9]),[0-9]{3}(?![0-9])")
_PUNCTUATION = str.maketrans("\u2010\u2011\u2012\u2013\u2212\u2044“”‘’", "-----/\"\"''")
_COMPOSED = re.compile(
  "[\u00bc-\u00be\u2150-\u215f\u2189]|[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+"
)
_OPEN = {"(": ")", "[": "]", "{": "}"}


@functools.lru_cache(maxsize=8192)
def canonical(text: str) -> str:
  """The one spelling of all answers that mean the same; its own canonical text.

  Case, width, spaces, LaTeX and Markdown wrappers, "the answer is", articles and a final full stop
  do not count. Options become their letter ("(B) cat": "b"), numbers exact values in the shortest
  spelling ("1/2", "50%", ".50": "0.5"; "1,200 cm": "12 m"; "seven": "7"), "yes, it is" becomes
  "yes". A list keeps its order, whatever its brackets: "[1,2]", "(1, 2)" and "1, 2" are one, two
  corner points are one box; braces make a set. Inside brackets, and beside a list's other commas,
  "1,200" without a space is two elements unless another comma has a space. Empty text means that
  there is no answer.
  """
  text = _fold(text)
  if len(text) > LONGEST:
    return text
  for _ in range(8):  # One pass nearly always settles; stray quotes can take another.
    before, text = text, _read(text, NESTING)
    if text == before:
      break
  return text


def equal(a: str | None, b: str | None) -> bool:
  """Whether two answers mean the same. None, an answer not given, equals nothing, not even None."""
  return a is not None and b is not None and canonical(a) == canonical(b)


def cluster(answers: Sequence[str | None]) -> dict[str, list[int]]:
  """Indices by canonical text, in order of appearance; None and empty answers are in none."""
  groups: dict[str, list[int]] = {}
  for i, answer in enumerate(answers):
    if answer is not None and canonical(answer):
      groups.setdefault(canonical(answer), []).append(i)
  return groups


def number(text: str) -> tuple[Fraction, str] | None:
  """The exact value of an answer that is a number, and its unit ("" for none); else None."""
  found = _VALUE.fullmatch(canonical(text))
  return None if found is None else (Fraction(found.group(1)), found.group(2) or "")


def elements(text: str) -> list[str]:
  """The canonical elements of a list or a set; an answer that is neither is its own only one."""
  inside = canonical(text)
  if _bracketed(inside):
    inside = inside[1:-1]
  return _split(inside) or [inside]


def _spread(found: re.Match[str]) -> str:
  """Sets off what NFKC would join to the digits before it: "1½" is not "11/2", "5²" is not "52"."""
  decomposed = unicodedata.normalize("NFKC", found.group())
  return f"^{decomposed}" if decomposed.isdigit() else f" {decomposed}"


def _fold(text: str) -> str:
  for _ in range(4):  # Compatibility forms may fold to forms that fold again.
    before, text = text, _COMPOSED.sub(_spread, text).translate(_PUNCTUATION).casefold()
    text = unicodedata.normalize("NFKC", text)
    text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    if text == before:
      break
  return text


def _unwrap(text: str) -> str:
  """What is left when nothing more can be taken off; every step shortens the text, so it ends."""
  before = None
  while text != before:
    before = text
    for pattern, replacement in _LATEX:
      text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    for pattern in _WRAPPERS:
      if found := pattern.fullmatch(text):
        text = found.group(1).strip()
    if _bracketed(text) and len(_split(text[1:-1]) or ()) == 1:
      text = text[1:-1].strip()
  return text


def _read(text: str, nesting: int) -> str:
  text = _unwrap(text)
  if found := _YES_NO.fullmatch(text):
    return found.group(1)
  if found := _OPTION.fullmatch(text):
    return next(letter for letter in found.groups() if letter)
  if text in _WORDS:
    return str(_WORDS.index(text))
  number = _number(text)
  if number is not None:
    return number
  return _sequence(text, nesting) if nesting else text


def _number(text: str) -> str | None:
  found = _NUMBER.fullmatch(text)
  if found is None or (found["sign"] and found["inner"]) or (found["money"] and found["unit"]):
    return None
  if found["under"] is not None:
    if int(found["under"]) == 0:
      return None
    value = Fraction(int(found["mixed"] or 0)) + Fraction(int(found["over"]), int(found["under"]))
  else:
    decimal = found["whole"].replace(",", "") + (found["part"] or "").rstrip(".")
    value = Fraction(decimal) * Fraction(10) ** int(found["power"] or 0)
  value = -value if "-" in (found["sign"], found["inner"]) else value
  value = value / 100 if found["percent"] else value
  factor, unit = _unit(found["money"] or found["unit"] or "")
  return f"{_spell(value * factor)} {unit}".strip()


def _unit(text: str) -> tuple[Fraction, str]:
  if text in _UNITS:
    return _UNITS[text]
  found = _POWER.fullmatch(text)
  if found and found.group(1) in _UNITS:
    factor, unit = _UNITS[found.group(1)]
    return factor ** int(found.group(2)), f"{unit}^{found.group(2)}"
  return Fraction(1), text


def _spell(value: Fraction) -> str:
  """A decimal where at most 30 places say it exactly, else "p/q"."""
  places = next((k for k in range(31) if 10**k % value.denominator == 0), None)
  if not places:
    return str(value)
  digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
  return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _sequence(text: str, nesting: int) -> str:
  """A list or set with its elements read, or the text itself if it is none."""
  braces = _bracketed(text) and text[0] == "{"
  parts = _split(text[1:-1] if _bracketed(text) else text)
  if parts is None or len(parts) < 2:
    return text
  parts[-1:] = parts[-1].removeprefix("and ").split(" and ")
  elements = [_read(part, nesting - 1) for part in parts]
  elements = [f"[{e}]" if len(_split(e) or ()) > 1 else e for e in elements]
  if braces:
    elements = sorted(set(elements))
    return "{" + ", ".join(elements) + "}" if len(elements) > 1 else elements[0]
  joined = ", ".join(elements)
  return ", ".join(found.groups()) if (found := _PAIR_OF_PAIRS.fullmatch(joined)) else joined


def _bracketed(text: str) -> bool:
  """Whether the first character opens what the last one closes."""
  if len(text) < 2 or _OPEN.get(text[0]) != text[-1]:
    return False
  return _split(text) is not None and _split(text[1:-1]) is not None


def _split(text: str) -> list[str] | None:
  """Parts between commas that are in no bracket; None where brackets do not match."""
  spaced = ", " in text
  parts, closers, start = [], [], 0
  for i, c in enumerate(text):
    if c in _OPEN:
      closers.append(_OPEN[c])
    elif c in ")]}":
      if not closers or closers.pop() != c:
        return None
    elif c == "," and not closers:
      if spaced and _THOUSANDS.match(text, i):
        continue
      parts.append(text[start:i].strip())
      start = i + 1
  return None if closers else [*parts, text[start:].strip()]
