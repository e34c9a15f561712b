import numpy as np
import pytest

from pixelis_jax.data import words

GRAY = np.full((300, 400, 3), 128, np.uint8)


def write(seed, texts, sizes, **kwargs):
  return words.write(np.random.default_rng(seed), GRAY, texts, sizes=sizes, **kwargs)


def ink(pixels, line):
  """Where a picture is more like the text's colour than like its plate's, in the line's box."""
  box = line.box
  rows = slice(int(box.y0), int(np.ceil(box.y1))), slice(int(box.x0), int(np.ceil(box.x1)))
  near = lambda color: np.abs(pixels[rows].astype(int) - color).sum(2)
  found = np.zeros(pixels.shape[:2], bool)
  found[rows] = near(line.color) < near(line.ground)
  return found


@pytest.mark.parametrize("name", words.FONTS)
def test_boxes_hold_the_ink_and_no_more(name):
  (line,) = (written := write(0, ["Harbor 7Q"], [40.0], fonts=[name])).lines
  assert line.font == name and line.text == "Harbor 7Q" and line.size == 40
  y, x = np.nonzero(ink(written.pixels, line))
  box = line.box
  # Outermost pixels may be covered by less than half: up to 2 a side where strokes are thin.
  for edge, outermost in ((box.x0, x.min()), (box.y0, y.min())):
    assert 0 <= outermost - edge <= 2
  for edge, outermost in ((box.x1, x.max() + 1), (box.y1, y.max() + 1)):
    assert 0 <= edge - outermost <= 2
  # Round the box: only the plate, in its own colour.
  x0, y0, x1, y1 = (int(edge) for edge in (box.x0, box.y0, box.x1, box.y1))
  around = written.pixels[y0 - 4 : y1 + 4, x0 - 4 : x1 + 4].copy()
  around[4:-4, 4:-4] = line.ground
  assert (around == line.ground).all()
  # Capitals, and a Q that reaches below: about an em, 40, and no more than the font's line.
  assert 26 <= box.height <= 44


def test_corners_turn_with_the_sign():
  for seed in range(12):
    (line,) = (written := write(seed, ["lagoon HARVEST"], [24.0], turn=40.0)).lines
    upper_left, upper_right, lower_right, lower_left = line.corners.astype(float)
    along, down = upper_right - upper_left, lower_left - upper_left
    # A rectangle, read from left to right; x to the right and y down make down = along turned.
    assert along @ down == pytest.approx(0, abs=1e-2)
    assert along[0] * down[1] - along[1] * down[0] > 0
    np.testing.assert_allclose(upper_right + down, lower_right, atol=1e-3)
    assert abs(np.degrees(np.arctan2(along[1], along[0]))) <= 40
    # In the sign's own axes the ink fills the rectangle, to 1.5 pixels of resampling.
    y, x = np.nonzero(ink(written.pixels, line))
    points = np.stack([x + 0.5, y + 0.5], axis=1) - upper_left
    for axis in (along, down):
      length = np.linalg.norm(axis)
      inside = points @ axis / length
      inside = inside[(points @ along > 0) & (points @ down > 0)]  # Not the photo's corners.
      inside = inside[inside < length + 3]
      assert inside.min() < 2 and inside.max() > length - 2


def test_what_is_written_can_be_read_back():
  # Rendered again in its font and size, the ink correlates with its own text's above all others'.
  texts = ["copper", "cotton", "corner", "CORNER", "C0RNER"]
  for seed, text in enumerate(texts):
    (line,) = (written := write(seed, [text], [28.0], bounds=(7.0, 21.0))).lines
    shown = ink(written.pixels, line)
    box = [int(edge) for edge in (line.box.x0, line.box.y0, line.box.x1, line.box.y1)]
    crop = shown[box[1] : box[3], box[0] : box[2]]
    face, likeness = words.font(line.font, 28.0), {}
    for other in texts:
      mask = np.array(face.getmask(other)).reshape(face.getmask(other).size[::-1]) >= 128
      height, width = (max(a, b) for a, b in zip(mask.shape, crop.shape, strict=True))
      pad = lambda m, h=height, w=width: np.pad(m, ((0, h - m.shape[0]), (0, w - m.shape[1])))
      likeness[other] = (pad(mask) == pad(crop)).mean()
    assert max(likeness, key=likeness.get) == text


@pytest.mark.parametrize("bounds", [(4.5, 21.0), (1.5, 2.0)])
def test_contrast_is_within_its_bounds(bounds):
  rng = np.random.default_rng(0)
  ratios = [words.contrast(*words.colors(rng, bounds)) for _ in range(50)]
  assert bounds[0] <= min(ratios) and max(ratios) <= bounds[1]
  (line,) = write(0, ["a"], [20.0], bounds=bounds).lines
  assert bounds[0] <= line.contrast <= bounds[1]


def test_contrast_is_wcags():
  assert words.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
  assert words.contrast((9, 9, 9), (9, 9, 9)) == 1
  # Pure red is 0.2126 of white's luminance: (1.05) / (0.2626), whichever is the text.
  assert words.contrast((255, 0, 0), (255, 255, 255)) == pytest.approx(1.05 / 0.2626)
  assert words.contrast((255, 255, 255), (255, 0, 0)) == pytest.approx(1.05 / 0.2626)
  # Half of full in sRGB is about 0.2159 in light: https://www.w3.org/TR/WCAG22/.
  assert words.contrast((128, 128, 128), (0, 0, 0)) == pytest.approx(0.2659 / 0.05, rel=0.001)


def test_signs_are_apart_and_inside():
  for seed in range(8):
    texts = ["candle", "OCEAN", "school bus", "7A"]
    written = write(seed, texts, [12.0, 20.0, 16.0, 30.0], turn=20.0)
    boxes = [line.box for line in written.lines]
    assert [line.text for line in written.lines] == texts
    for i, a in enumerate(boxes):
      assert min(a.x0, a.y0) >= 4 and a.x1 <= 396 and a.y1 <= 296
      assert all(max(a.x0 - b.x1, b.x0 - a.x1, a.y0 - b.y1, b.y0 - a.y1) >= 4 for b in boxes[:i])


def test_same_generator_same_signs():
  one, two = (write(3, ["a b", "c"], [20.0, 30.0], turn=10.0) for _ in range(2))
  np.testing.assert_array_equal(one.pixels, two.pixels)
  assert (GRAY == 128).all()  # What was written on is left as it is.


def test_phrases_and_codes():
  rng = np.random.default_rng(0)
  phrases = [words.phrase(rng, 2) for _ in range(60)]
  assert all(set(p.lower().split()) <= set(words.WORDS) for p in phrases)
  assert all(len(set(p.lower().split())) == 2 for p in phrases)
  assert {(p.islower(), p.istitle(), p.isupper()) for p in phrases} == {
    (True, False, False),
    (False, True, False),
    (False, False, True),
  }
  assert set(words.phrase(rng, 3, ["one", "two", "six"]).lower().split()) == {"one", "two", "six"}
  codes = [words.code(rng, 8) for _ in range(60)]
  assert all(len(code) == 8 for code in codes)
  # What readers confuse in many fonts.
  assert not set("".join(codes)) & set("0O1I5S8B2Z")
  assert len(set(words.WORDS)) == len(words.WORDS) > 150


@pytest.mark.parametrize(
  "texts, sizes, kwargs, message",
  [
    (["a"], [20.0, 30.0], {}, r"1 texts, none empty, need as many sizes >= 4, not \[20.0, 30.0\]"),
    ([""], [20.0], {}, "none empty"),
    (["a"], [3.0], {}, "sizes >= 4"),
    (["a"], [20.0], {"fonts": ["Comic"]}, "font 'Comic' must be one of .*'DejaVu Sans'"),
    (["  "], [20.0], {"fonts": ["STIX"]}, "text '  ' has no ink in STIX"),
    (["a" * 99], [40.0], {}, "find no place on a canvas of"),
    (["a"], [20.0], {"bounds": (21.5, 30.0)}, "no two colours have a contrast of 21.5 to 30.0"),
  ],
)
def test_mistakes_say_what_is_wrong(texts, sizes, kwargs, message):
  with pytest.raises(ValueError, match=message):
    write(0, texts, sizes, **kwargs)
