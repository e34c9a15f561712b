import pytest

from pixelis_jax.tools.schema import check
from pixelis_jax.tools.sight import Mistake

PARAMETERS = {
  "type": "object",
  "properties": {
    "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    "frames": {
      "type": "array",
      "items": {"type": "integer", "minimum": 1},
      "minItems": 1,
      "maxItems": 8,
    },
    "image": {"type": "integer", "minimum": 1, "maximum": 9},
    "mode": {"type": "string", "enum": ["fast", "good"]},
    "flag": {"type": "boolean"},
    "options": {"type": "object"},
  },
  "required": ["box"],
}
BOX = [1, 2.5, 3, 4]


@pytest.mark.parametrize(
  "more",
  [
    {},
    {"frames": [1, 8]},
    {"image": 2},
    {"image": 2.0},
    {"mode": "good"},
    {"flag": True},
    {"options": {}},
  ],
)
def test_what_fits_passes(more):
  check({"box": BOX, **more}, PARAMETERS)


@pytest.mark.parametrize(
  "arguments, wrong",
  [
    ({}, "missing argument 'box'"),
    ({"box": BOX, "bocks": 1}, "unknown argument 'bocks'; known: box, frames"),
    ({"box": "1, 2, 3, 4"}, "box must be of type array, not '1, 2, 3, 4'"),
    ({"box": None}, "box must be of type array, not None"),
    ({"box": [1, 2, 3]}, "box must have 4 items, not 3"),
    ({"box": [1, 2, 3, 4, 5]}, "box must have 4 items, not 5"),
    ({"box": [1, 2, "3", 4]}, r"box\[2\] must be of type number, not '3'"),
    ({"box": [1, 2, True, 4]}, r"box\[2\] must be of type number, not True"),
    ({"box": [1, 2, [3], 4]}, r"box\[2\] must be of type number"),
    ({"box": [1, 2, float("inf"), 4]}, r"box\[2\] must be of type number, not inf"),
    ({"box": [1, 2, float("nan"), 4]}, r"box\[2\] must be of type number, not nan"),
    ({"box": [1, 2, 10**400, 4]}, r"box\[2\] must be of type number"),
    ({"box": BOX, "frames": []}, "frames must have 1 to 8 items, not 0"),
    ({"box": BOX, "frames": [2, 0]}, r"frames\[1\] must be in \[1, inf\], not 0"),
    ({"box": BOX, "image": 1.5}, "image must be of type integer, not 1.5"),
    ({"box": BOX, "image": 10}, r"image must be in \[1, 9\], not 10"),
    ({"box": BOX, "mode": "slow"}, "mode must be one of .* not 'slow'"),
    ({"box": BOX, "flag": 1}, "flag must be of type boolean, not 1"),
    ({"box": BOX, "options": []}, "options must be of type object"),
  ],
)
def test_what_does_not_is_named(arguments, wrong):
  with pytest.raises(Mistake, match=wrong):
    check(arguments, PARAMETERS)


def test_messages_are_short_and_can_be_encoded():
  """They go back to the policy: no flood, and no lone surrogate, which no tokenizer takes."""
  for name, value in (
    ("x" * 9999, 1),
    ("\ud800", 1),
    ("mode", "\ud800" * 999),
    ("mode", [[1] * 99] * 99),
  ):
    with pytest.raises(Mistake) as caught:
      check({"box": BOX, name: value}, PARAMETERS)
    assert len(str(caught.value)) < 200
    str(caught.value).encode()
