import time

import pytest

from pixelis_jax.chat.parse import parse_answer, parse_call, parse_number

ZOOM = '<tool_call>\n{"name": "zoom_in", "arguments": {"bbox_2d": [34, 56, 44, 66]}}\n</tool_call>'


def test_a_call_as_the_policy_writes_it():
  call = parse_call(f"I look closer.\n{ZOOM}")
  assert (call.name, call.arguments) == ("zoom_in", {"bbox_2d": [34, 56, 44, 66]})


def test_the_last_of_several_calls_counts():
  assert parse_call(f"{ZOOM} no, {ZOOM.replace('zoom_in', 'read_text')} so").name == "read_text"


@pytest.mark.parametrize(
  "text", ["", "The digit is \\boxed{7}.", "<toolcall>{}</toolcall>", "<tool_call"]
)
def test_text_without_a_call(text):
  assert parse_call(text) is None


@pytest.mark.parametrize(
  "text, wrong",
  [
    ('<tool_call>{"name": "zoom_in", "arguments": {}}', "not closed"),
    (
      f"{ZOOM} and <tool_call>",
      "not closed",
    ),  # The last one counts, though an earlier one is whole.
    ('{"name": "zoom_in"}</tool_call>', "without <tool_call>"),
    ("<tool_call></tool_call>", "not valid JSON: Expecting value at character 0"),
    ("<tool_call>zoom_in(3, 4)</tool_call>", "not valid JSON"),
    ("<tool_call>{'name': 'zoom_in'}</tool_call>", "double quotes at character 1"),
    ('<tool_call>{"name": "a", "arguments": {}} {}</tool_call>', "Extra data"),
    ('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN is not a number"),
    ('<tool_call>{"name": "a", "arguments": {"x": %s}}</tool_call>' % ("9" * 5000), "5000 digits"),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", "nested too deeply"),
    ("<tool_call>[1, 2]</tool_call>", "must be a JSON object, not an array"),
    ("<tool_call>null</tool_call>", "must be a JSON object, not null"),
    ('<tool_call>{"arguments": {}}</tool_call>', 'no "name"; it must be a string'),
    (
      '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
      '"name" .* must be a string, not a number',
    ),
    ('<tool_call>{"name": "zoom_in"}</tool_call>', 'no "arguments"; it must be an object'),
    ('<tool_call>{"name": "a", "arguments": "{}"}</tool_call>', "must be an object, not a string"),
    ('<tool_call>{"name": "a", "arguments": true}</tool_call>', "must be an object, not a boolean"),
  ],
)
def test_a_malformed_call_is_told_what_is_wrong(text, wrong):
  with pytest.raises(ValueError, match=wrong):
    parse_call(text)


@pytest.mark.parametrize(
  "text, answer",
  [
    (r"The digit is \boxed{7}.", "7"),
    (r"\boxed{7} wait, \boxed{ 8 }", "8"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed {7}", "7"),
    (r"\boxed{\text{A}} and \boxed{B", r"\text{A}"),  # The last balanced one.
    (r"\boxed{ open \boxed{7}", "7"),
    (r"{ { \boxed{7}", "7"),
    (r"} \boxed{7} }", "7"),
    (r"\boxed{a \boxed{b} c}", "b"),  # The one that starts last.
    (r"\boxed{\}}", r"\}"),  # An escaped brace closes nothing.
    (r"\boxed{7} in \boxed{}", "7"),  # A blank box answers nothing.
    (r"\boxed{}", None),
    (r"\boxed{", None),
    (r"boxed{7}", None),
    (r"\boxed 7", None),
    ("", None),
    ("\\boxed{two\nlines}", "two\nlines"),
  ],
)
def test_the_answer_is_in_the_last_balanced_box(text, answer):
  assert parse_answer(text) == answer


def test_a_long_text_of_open_boxes_costs_linear_time():
  """140 kB. Looking for the end of each box anew would read 1.4 GB, minutes in Python."""
  started = time.perf_counter()
  assert parse_answer("\\boxed{" * 20_000) is None
  assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
  "text, number",
  [
    ("Tom has 8 + 8 = 16 apples now.", "16"),
    ("#### 24\nThe answer is 24.", "24"),
    ("so 1,200 in all", "1,200"),
    ("It fell to -3.5 degrees.", "-3.5"),
    ("10-7", "7"),  # A difference, not a negative number.
    ("1, 2", "2"),
    ("$5", "5"),
    ("It is \\boxed{12}", "12"),
    ("the 2nd of room B12, by version 1.2.3, is 1.5x", None),  # In words, or no single number.
    ("twelve", None),
    ("", None),
  ],
)
def test_the_last_number_of_a_text(text, number):
  assert parse_number(text) == number
