"""The part of JSON Schema our tools use: checking a call's arguments before anything runs."""

import math
import reprlib
from collections.abc import Mapping

from pixelis_jax.tools.sight import Mistake

_PYTHON = {"string": str, "boolean": bool, "array": list, "object": Mapping}


def check(arguments: Mapping[str, object], parameters: Mapping) -> None:
  """Names, presence, types, lengths and ranges, against a tool's `parameters` (type object).

  Knows type, properties, required, items, minItems, maxItems, minimum, maximum and enum.

  Raises:
    Mistake: the first thing that is wrong, in words for the policy.
  """
  properties = parameters["properties"]
  for name in parameters["required"]:
    if name not in arguments:
      raise Mistake(f"missing argument {name!r}")
  for name, value in arguments.items():
    if name not in properties:
      raise Mistake(f"unknown argument {reprlib.repr(name)}; known: {', '.join(properties)}")
    _check(name, value, properties[name])


def _check(name: str, value: object, schema: Mapping) -> None:
  if not _has_type(value, schema["type"]):
    raise Mistake(f"{name} must be of type {schema['type']}, not {reprlib.repr(value)}")
  if "enum" in schema and value not in schema["enum"]:
    raise Mistake(f"{name} must be one of {schema['enum']}, not {reprlib.repr(value)}")
  if isinstance(value, list):
    low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if not low <= len(value) <= high:
      wanted = low if low == high else f"{low} to {high}"
      raise Mistake(f"{name} must have {wanted} items, not {len(value)}")
    for i, item in enumerate(value):
      _check(f"{name}[{i}]", item, schema["items"])
  if schema["type"] in ("number", "integer"):
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if not low <= value <= high:
      raise Mistake(f"{name} must be in [{low}, {high}], not {reprlib.repr(value)}")


def _has_type(value: object, type_: str) -> bool:
  """JSON's types: a boolean is no number, an infinity is none either, and 2.0 is an integer."""
  if type_ in _PYTHON:
    return isinstance(value, _PYTHON[type_])
  if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
    return False
  return value == value and (type_ == "number" or value == int(value))
