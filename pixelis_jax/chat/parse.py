"""What the policy wrote: the last tool call in it, and the answer, in the last box or elsewhere."""

import json
import re
from collections.abc import Callable

from pixelis_jax.types import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# One that stands alone: not in a word, and not the end of another such as 1.5.
_NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?!\w|\.[0-9])")
# The start of a box, a LaTeX escape (its brace is a character, not structure), or a brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)


def parse_call(text: str) -> ToolCall | None:
  """The last `<tool_call>` block; None if the text has neither tag.

  The Nous/Hermes format of Qwen2.5-VL: a JSON object with `name` (string) and `arguments` (object);
  other keys are ignored.

  Raises:
    ValueError: the block is not closed, not JSON, or lacks a key. The message is meant for the
      policy.
  """
  start = text.rfind(OPEN)
  if start < 0:
    if CLOSE in text:
      raise ValueError(f"{CLOSE} without {OPEN} before it")
    return None
  body, closed, _ = text[start + len(OPEN) :].partition(CLOSE)
  if not closed:
    raise ValueError(f"{OPEN} is not closed by {CLOSE}")
  try:
    call = json.loads(body, parse_constant=_refuse, parse_int=_integer)
  except json.JSONDecodeError as e:
    raise ValueError(
      f"tool call is not valid JSON: {e.msg} at character {e.pos} of the block"
    ) from None
  except RecursionError:
    raise ValueError("tool call is not valid JSON: nested too deeply") from None
  if not isinstance(call, dict):
    raise ValueError(f"tool call must be a JSON object, not {_json_type(call)}")
  for key, type_, wanted in (("name", str, "a string"), ("arguments", dict, "an object")):
    if key not in call:
      raise ValueError(f'tool call has no "{key}"; it must be {wanted}')
    if not isinstance(call[key], type_):
      raise ValueError(f'"{key}" in the tool call must be {wanted}, not {_json_type(call[key])}')
  return ToolCall(name=call["name"], arguments=call["arguments"])


def parse_answer(text: str) -> str | None:
  """Content, stripped, of the `\\boxed{...}` that starts last among those with balanced braces.

  Blank boxes answer nothing and are skipped. One pass: a long text of unclosed boxes costs linear
  time.
  """
  opened: list[re.Match] = []  # Braces not yet closed.
  best, answer = -1, None
  for brace in _BRACES.finditer(text):
    if brace.group() == "}":
      start = opened.pop() if opened else None
      if start is None or not start["box"] or start.start() < best:
        continue
      if content := text[start.end() : brace.start()].strip():
        best, answer = start.start(), content
    elif brace.group()[-1] == "{" and (brace["box"] or brace.group() == "{"):
      opened.append(brace)
  return answer


def parse_number(text: str) -> str | None:
  """The last number in digits, such as -3, 1,200 or 0.5: of a policy that was taught no box.

  As the "flexible-extract" of https://github.com/EleutherAI/lm-evaluation-harness reads GSM8K.
  """
  found = _NUMBER.findall(text)
  return found[-1] if found else None


# Where an answer is looked for.
ANSWERS: dict[str, Callable[[str], str | None]] = {"boxed": parse_answer, "number": parse_number}


def _refuse(name: str) -> None:
  raise ValueError(f"tool call is not valid JSON: {name} is not a number")


def _integer(digits: str) -> int:
  if len(digits) > 18:  # Beyond it Python refuses some conversions, and no argument needs it.
    raise ValueError(f"tool call has an integer of {len(digits)} digits")
  return int(digits)


def _json_type(value: object) -> str:
  names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
  return "null" if value is None else names.get(type(value), "a number")
