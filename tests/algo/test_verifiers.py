import numpy as np
import pytest

from pixelis_jax.algo.verifiers import VERIFIERS, alike, cluster, verify


@pytest.mark.parametrize(
  ("verifier", "answer", "target", "expected"),
  [
    ("equal", "0.5", "1/2", 1.0),
    ("equal", "5 cm", "50 mm", 1.0),
    ("equal", "0.49", "1/2", 0.0),
    # The option's letter or its text; a prefix of the text is not it.
    ("choice", "b", "(B) red circle", 1.0),
    ("choice", "The red circle.", "(B) red circle", 1.0),
    ("choice", "B) blue", "(B) red circle", 1.0),  # An option is its letter.
    ("choice", "red", "(B) red circle", 0.0),
    ("choice", "(A)", "(B) red circle", 0.0),
    ("choice", "3.5 m", "C. 350 cm", 1.0),
    ("choice", "a", "A", 1.0),
    # 4% is within 5%; 12.5% is half way from 5% to 20%: (cos(pi / 2) + 1) / 2.
    ("tolerance", "104", "100", 1.0),
    ("tolerance", "112.5", "100", 0.5),
    ("tolerance", "87.5", "100", 0.5),
    # 10% is a third of the way: (cos 60 + 1) / 2. Falling straight it would be 2/3.
    ("tolerance", "1.1 m", "100 cm", 0.75),
    ("tolerance", "121", "100", 0.0),
    ("tolerance", "-100", "100", 0.0),
    ("tolerance", "100 cm", "100", 0.0),
    ("tolerance", "0.0", "0", 1.0),  # The published rule gives 0 here.
    ("tolerance", "0.01", "0", 0.0),
    ("relaxed", "105", "100", 1.0),
    ("relaxed", "105.1", "100", 0.0),
    ("relaxed", "5%", "5", 0.0),  # The published rule says so, too.
    ("relaxed", "Blue.", "blue", 1.0),
    ("relaxed", "0.01", "0", 0.0),
    # One edit in 6: 5/6. Two edits in 4: 1/2 counts, three in 4 do not.
    ("anls", "kitten", "Mitten", 5 / 6),
    ("anls", "ab  CD", "ab cd", 1.0),
    ("anls", "abxy", "abcd", 0.5),
    ("anls", "axyz", "abcd", 0.0),
    ("anls", "abc", "abcdefg", 0.0),
    # Half of each covered: 2 / (4 + 4 - 2).
    ("iou", "[1, 0, 3, 2]", "(0, 0), (2, 2)", 1 / 3),
    ("iou", "[0, 0, 2, 2]", "[0, 0, 2, 2]", 1.0),
    ("iou", "[2, 2, 0, 0]", "[0, 0, 2, 2]", 0.0),
    ("iou", "here", "[0, 0, 2, 2]", 0.0),
    ("iou_50", "[0, 0, 1, 2]", "[0, 0, 2, 2]", 1.0),
    ("iou_50", "[0, 0, 0.9, 2]", "[0, 0, 2, 2]", 0.0),
    # Two of three named, of two true: 2 * 2 / 5; Jaccard's would be 2/3.
    ("set_f1", "the cat, dog, a fox", "{fox, cat}", 0.8),
    ("set_f1", "1/2", "0.5", 1.0),
    ("set_f1", "owl", "{fox, cat}", 0.0),
  ],
)
def test_rules(verifier, answer, target, expected):
  assert verify(answer, target, verifier=verifier) == pytest.approx(expected, abs=1e-9)


TRUE = "change_color(1, red) change_size(2, large) change_shape(3, cube)"


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    (TRUE, (1, 1, 1)),
    # In another order, with quotes: the same.
    ("change_shape(3,'cube'), change_size(2, large), change_color(1, red)", (1, 1, 1)),
    # One whole, one with the object (or the value), one function alone, over three.
    (
      "change_color(1, red) change_size(2, small) change_shape(5, ball)",
      ((1 + 0.5 + 0.25) / 3, 1 / 3, (1 - 0.25 - 0.5) / 3),
    ),
    ("change_color(1, red) change_size(5, large)", (1.5 / 3, 1 / 3, 0.75 / 3)),
    # Two of three said are one: 2/3 of what two whole matches give.
    (
      "change_color(1, red) change_color(1, red) change_size(2, large)",
      (2 / 3 * 2 / 3, 2 / 3 * 2 / 3, 2 / 3 * 2 / 3),
    ),
    # Over the longer sequence: more changes than there are earn less.
    (TRUE + " change_position(1, left)", (3 / 4, 3 / 4, 3 / 4)),
    ("nothing changed", (0, 0, 0)),
  ],
)
def test_changes_earn_partial_credit(answer, expected):
  found = [verify(answer, TRUE, verifier=v) for v in ("trance", "trance_full", "trance_penalty")]
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_whole_match_is_found_before_a_partial_one():
  # Taken in order, the first would use up the target's only change and earn 1/2 over 2.
  answer, target = "change_color(1, blue) change_color(1, red)", "change_color(1, red)"
  assert verify(answer, target, verifier="trance") == 0.5


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_no_answer_is_not_right(verifier):
  assert verify(None, "[0, 0, 1, 1]", verifier=verifier) == 0.0
  assert verify(" . ", "[0, 0, 1, 1]", verifier=verifier) == 0.0


def test_what_we_get_wrong_is_named():
  with pytest.raises(ValueError, match=r"verifier 'equals' must be one of \['equal', 'choice'"):
    verify("7", "7", verifier="equals")
  with pytest.raises(ValueError, match="target 'cat' must be a box: four numbers"):
    verify("[0, 0, 1, 1]", "cat", verifier="iou")
  with pytest.raises(ValueError, match="target 'cat' must be changes such as"):
    verify("cat", "cat", verifier="trance")


def test_clusters_are_led_by_what_weighs_most_whatever_the_order():
  """Each is within 5% of the next only: who leads decides who is gathered."""
  texts, weights = ["100", "104", "108", "104.0"], [1.0, 1.0, 1.5, 1.0]
  # 104 weighs 2 and is like both others. Led by the first text, or by 108, there would be two.
  assert cluster(texts, weights, verifier="relaxed") == {"104": [1, 3, 2, 0]}
  back = cluster(texts[::-1], weights[::-1], verifier="relaxed")
  assert {a: sorted(3 - i for i in members) for a, members in back.items()} == {"104": [0, 1, 2, 3]}
  # With equal weights 100 comes first, and 108 is more than 5% away.
  assert cluster(texts[:3], [1.0] * 3, verifier="relaxed") == {"100": [0, 1], "108": [2]}


def test_what_cannot_be_a_target_is_in_no_cluster():
  texts = ["0, 0, 10, 10", "a cat", None, "", "(0, 0, 10, 9)"]
  assert cluster(texts, [1.0] * 5, verifier="iou_50") == {"0, 0, 10, 10": [0, 4]}
  assert list(cluster(texts, [1.0] * 5, verifier="equal").values()) == [[0], [1], [4]]
  with pytest.raises(ValueError, match="'iou_51' must be one of"):
    cluster(texts, [1.0] * 5, verifier="iou_51")


@pytest.mark.parametrize(
  ("verifier", "a", "b", "same"),
  [
    ("equal", "0.5", "1/2", True),
    ("equal", "100", "103", False),
    ("relaxed", "100", "103", True),
    ("choice", "red circle", "(B) red circle", True),  # One way round only.
    ("choice", "(B) red circle", "red circle", True),
    ("iou_50", "a cat", "a dog", False),  # Neither is a box.
    ("iou_50", "cat", "Cat", True),  # But both mean the same.
    ("iou_50", "0, 0, 1, 1", "a cat", False),
    ("relaxed", None, "1", False),
    ("relaxed", None, None, False),
  ],
)
def test_alike_goes_either_way(verifier, a, b, same):
  assert alike(a, b, verifier=verifier) is same
