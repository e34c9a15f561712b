import string
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pixelis_jax.algo import answers

# Characters that the rules give a meaning to, so that random text meets them.
MARKED = st.text(
  alphabet=string.ascii_letters + string.digits + " .,;:()[]{}$%\\/+-'\"*^°½²=", max_size=24
)
PIECES = st.lists(
  st.sampled_from(
    [
      "(B)",
      "b.",
      "cat",
      "and",
      "1,234",
      "50%",
      "1/2",
      "-",
      "\\boxed{",
      "\\frac{1}{2}",
      "}",
      "{",
      "[",
      "]",
      ", ",
    ]
    + [
      "the",
      "answer is",
      "yes",
      "'",
      '"',
      "$",
      "cm",
      " ",
      "x =",
      "seven",
      "\\text{",
      "e5",
      "**",
      "<answer>",
    ]
  ),
  max_size=8,
).map("".join)
ANY = st.one_of(st.text(max_size=24), MARKED, PIECES)

SAME = {
  "option": ["(B)", "B", "b", "B.", "B. cat", "(b) a cat", "B) cat", "Option B", "\\text{(B)}",
    "The answer is (B)."],
  "half": ["1/2", "0.5", ".50", "50%", "50 %", "50\\%", "50 percent", "\\frac{1}{2}", "\\dfrac12",
    "½", "$0.5$", "2/4"],
  "integer": ["1234567", "1,234,567", "1{,}234{,}567", "1\\,234\\,567", "1234567.0", "+1234567",
    "１２３４５６７"],
  "negative": ["-3", "\u22123", "- 3", "(-3)", "-3.0", "-6/2", "x = -3"],
  "power": ["1200", "1.2e3", "1.2 \\times 10^{3}", "1.2 x 10^3", "1,200"],
  "mixed": ["3/2", "1 1/2", "1½", "1\\frac{1}{2}", "150%"],
  "word": ["seven", "Seven.", "7", " 7 ", "\\boxed{7}", "**7**", "'7'", "<answer>7</answer>",
    "Answer: 7", "[7]"],
  "length": ["12 m", "1,200 cm", "1200cm", "12000 millimetres", "0.012 km", "12 \\text{ meters}"],
  "area": ["0.0005 m^2", "5 cm^2", "5 cm²", "5cm2"],
  "angle": ["25°", "25 degrees", "25^\\circ", "25^{\\circ}"],
  "money": ["$5", "\\$5", "5 dollars", "$5.00", "5 USD"],
  "unknown unit": ["60 km/h", "60km/h", "60.0 KM/H"],
  "list": ["1, 2", "[1,2]", "(1, 2)", "1,2", "$[1, 2]$", "one, two"],
  "thousands": ["[1000, 2000]", "1,000, 2,000", "1000,2000"],
  "words": ["cat, dog, fox", "the cat, a dog and a fox", "Cat, dog, and fox"],
  "set": ["{1, 2}", "{2,1}", "\\{2, 1, 1\\}", "\\left\\{ 2, 1 \\right\\}"],
  "box": ["[10, 200, 30, 400]", "(10,200),(30,400)", "[[10, 200], [30, 400]]", "10, 200, 30, 400"],
  "boxes": ["[[1,2,3,4],[5,6,7,8]]", "[1, 2, 3, 4], [5, 6, 7, 8]"],
  "yes": ["yes", "Yes.", "YES!", "Yes, it is red.", "\\text{yes}"],
  "text": ["red circle", "the Red  circle.", "A red\ncircle", "“red circle”", "ｒｅｄ circle"],
}  # fmt: skip

# Each pair would be one under a plausible shortcut, named beside it.
DIFFERENT = [
  ("10", "1"),  # prefix or substring match
  ("100", "10.0"),  # dropping the point
  (".5", "5"),  # stripping punctuation on the left
  ("-3", "3"),  # dropping the sign
  ("(-3)", "3"),
  ("50", "50%"),  # dropping the percent sign
  ("1½", "11/2"),  # NFKC joins the fraction to the digit
  ("5²", "52"),  # NFKC drops the exponent
  ("5!", "5"),
  ("5 cm", "5 m"),  # dropping units
  ("5 cm", "5"),
  ("5 cm^2", "5 cm"),
  ("$5", "5"),
  ("0.33", "1/3"),  # tolerance
  ("1,234", "1, 234"),  # thousands and lists
  ("[100,200]", "100200"),
  ("[1, 2]", "[2, 1]"),  # lists keep their order
  ("{1, 2}", "{1, 2, 3}"),
  ("[1, 2], 3", "[1, 2, 3]"),  # flattening
  ("[1, 2], 3", "1, [2, 3]"),
  ("(A), (B)", "(A)"),  # several options are not the first one
  ("(A) (B)", "(A)"),
  ("A) and B)", "A"),
  ("A or B", "A"),
  ("yes, no", "yes"),  # hedging
  ("no", "No. 5"),
  ("not", "no"),
  ("\\frac{x+1}{2}", "x+\\frac{1}{2}"),  # losing the fraction's bracket
  ("1/0", "0"),
  ("1e99999", "1"),
  ("", "0"),
  ("", "none"),
  ("cat", "dog"),
]


@pytest.mark.parametrize("spellings", SAME.values(), ids=SAME)
def test_spellings_of_one_answer_are_equal(spellings):
  assert {answers.canonical(s) for s in spellings} == {answers.canonical(spellings[0])}
  assert answers.canonical(spellings[0])


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_answers_are_not_equal(a, b):
  assert not answers.equal(a, b)


def test_kinds_of_answers_do_not_meet():
  canonical = [answers.canonical(spellings[0]) for spellings in SAME.values()]
  assert len(set(canonical)) == len(canonical)


def test_no_answer_equals_nothing():
  assert not answers.equal(None, None)
  assert not answers.equal(None, "")
  assert not answers.equal("", None)
  assert answers.canonical(" ... ") == answers.canonical("\\boxed{}") == ""


@settings(deadline=None, max_examples=400)
@given(ANY)
@example("''x', y'")
@example("[[[[[[1, 2], 3], 4], 5], 6], 7]")
@example("a), b")
@example("cat, ''")  # Unquoting the last element leaves a comma to take off.
@example("the the answer is: $$5$$")
def test_canonical_is_its_own_canonical(text):
  once = answers.canonical(text)
  assert answers.canonical(once) == once
  assert answers.equal(text, text)
  assert answers.equal(text, once)


@settings(deadline=None)
@given(ANY, ANY)
def test_equal_is_symmetric(a, b):
  assert answers.equal(a, b) == answers.equal(b, a)


@settings(deadline=None)
@given(st.text(alphabet=string.ascii_letters + string.digits + " .,()%", max_size=16))
def test_case_and_space_do_not_count(text):
  spellings = (text, text.upper(), text.lower(), f"  {text}\n", text.replace(" ", "\t "))
  assert len({answers.canonical(s) for s in spellings}) == 1


@settings(deadline=None)
@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000))
def test_a_fraction_equals_itself_as_latex_and_percent(value):
  sign = "-" if value < 0 else ""
  latex = f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
  assert answers.equal(str(value), latex)
  # percent of p/q is 100p/q; written as a fraction it stays exact.
  assert answers.equal(str(value), f"{value * 100}%")


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_equal_iff_they_are(a, b):
  assert answers.equal(f"{a:,}", str(a))
  assert answers.equal(str(a), f"{b:,}") == (a == b)


LONG = ("[", "\\text{", "\\frac{", ".", "'", "1,", "answer: ", "$a$", "9", "a ")


@pytest.mark.parametrize(
  "text",
  [piece * (1000 // len(piece)) for piece in LONG]
  + ["(" * 490 + ")" * 490, "[1, " * 200 + "]" * 200, "1/" + "9" * 990, "(" * 10**5 + ")" * 10**5],
  ids=lambda text: f"{text[:8]}*{len(text)}",
)
def test_a_policy_cannot_hang_or_break_the_verifier(text):
  """Deep nesting must not reach Python's recursion limit, nor long runs exponential regexes."""
  start = time.process_time()
  once = answers.canonical(text)
  # The slowest takes some tenths of a second here; an exponential pattern would take years.
  assert time.process_time() - start < 5
  assert isinstance(once, str)


def test_numbers_have_exact_values_and_units():
  assert answers.number("1,250 cm") == (Fraction(25, 2), "m")
  assert answers.number("-1/3") == (Fraction(-1, 3), "")
  assert answers.number("seven") == (Fraction(7), "")
  assert answers.number("50%") == (Fraction(1, 2), "")
  assert [answers.number(text) for text in ("cat", "", "1, 2", "(B)", "2 or 3")] == [None] * 4 + [
    (Fraction(2), "or 3")  # A unit is whatever follows.
  ]


def test_elements_are_read_whatever_their_brackets():
  assert answers.elements("{cat, 1/2}") == ["0.5", "cat"]  # A set has one order.
  assert answers.elements("(10, 20), (30, 40)") == ["10", "20", "30", "40"]
  assert answers.elements("[[1, 2, 3, 4], [5, 6, 7, 8]]") == ["[1, 2, 3, 4]", "[5, 6, 7, 8]"]
  assert answers.elements("the cat") == ["cat"]


def test_cluster_groups_by_meaning_in_order_of_appearance():
  groups = answers.cluster(["1/2", None, "cat", "0.5", "", "50%", "The cat"])
  # None (1) and the empty answer (4) are in no group.
  assert groups == {"0.5": [0, 3, 5], "cat": [2, 6]}
  assert list(groups) == ["0.5", "cat"]
  assert answers.cluster([]) == {}
