import numpy as np
import pytest
from PIL import Image

from pixelis_jax.data import digits, scenes

SPLIT = "stream"


def compose(seed, **kwargs):
  return scenes.compose(np.random.default_rng(seed), digits.load(SPLIT), id=str(seed), **kwargs)


SCENES = [compose(seed) for seed in range(60)]


def asked(scene):
  (box,) = scene.task.boxes
  (plate,) = [plate for plate in scene.plates if plate.box == box]
  return plate


def test_same_generator_same_scene():
  again = compose(7)
  np.testing.assert_array_equal(again.task.images[0], SCENES[7].task.images[0])
  assert again.task.question == SCENES[7].task.question
  assert (compose(8).task.images[0] != again.task.images[0]).any()


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.task.id)
def test_answer_follows_from_the_question_and_the_asked_plate(scene):
  task, plate = scene.task, asked(scene)
  label = int(digits.load(SPLIT).labels[plate.digit])
  assert task.answer == (("even", "odd")[label % 2] if task.kind == "parity" else str(label))
  # The question names this plate and no other of the scene.
  named = [p for p in scene.plates if p.target in task.question]
  assert named == [plate]
  assert (plate.color == scenes.GRAY) == (task.kind == "beside")


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.task.id)
def test_plates_are_apart_and_off_the_border(scene):
  boxes = [plate.box for plate in scene.plates]
  assert 4 <= len(boxes) <= 3 + 3
  for i, a in enumerate(boxes):
    assert min(a.x0, a.y0) >= scenes.MARGIN
    assert max(a.x1, a.y1) <= scenes.CANVAS - scenes.MARGIN
    for b in boxes[:i]:
      apart = max(a.x0 - b.x1, b.x0 - a.x1, a.y0 - b.y1, b.y0 - a.y1)
      # Two neighbours around a corner of one shape: 76 - 64 = 12 apart, and so is all else.
      assert apart >= 12


def test_a_neighbour_is_where_the_question_says():
  for seed in range(20):
    scene = compose(seed, kind="beside")
    side, shape = scene.task.question.rstrip("?").split(" is ")[-1].rsplit(" the ", 1)
    side = side.removeprefix("the digit ")
    dx, dy = scenes.SIDES[side]
    x, y = (round(c) for c in scene.task.boxes[0].center)
    # The middle of every shape is covered by it: bright and gray, unlike background and frames.
    center = scene.task.images[0][y - dy * scenes.DISTANCE, x - dx * scenes.DISTANCE]
    assert center.min() >= 195 and np.ptp(center.astype(int)) == 0, (shape, center)


def test_frame_has_the_colour_in_the_question():
  for seed in range(20):
    scene = compose(seed, kind="framed")
    plate = asked(scene)
    corner = scene.task.images[0][plate.y, plate.x].astype(int)
    nearest = min(
      scenes.COLORS, key=lambda name: np.abs(corner - np.array(scenes.COLORS[name])).sum()
    )
    assert nearest == plate.target and f"{nearest} frame" in scene.task.question


def test_all_kinds_colours_sides_and_digits_occur():
  assert {scene.task.kind for scene in SCENES} == set(scenes.KINDS)
  targets = {plate.target for scene in SCENES for plate in scene.plates}
  assert targets >= set(scenes.COLORS)
  # 4 sides of 3 shapes.
  assert len(targets - set(scenes.COLORS)) == 12


def labels(n, **kwargs):
  source = digits.load(SPLIT)
  found = [asked(compose(10_000 + i, **kwargs)).digit for i in range(n)]
  return np.bincount(source.labels[found], minlength=10)


def test_digits_are_uniform_unless_skewed():
  counts = labels(400)
  # Binomial(400, 0.1) has mean 40 and deviation 6: within 4 deviations.
  assert (np.abs(counts - 40) < 24).all(), counts
  counts = labels(400, skew=3, kind="parity")
  # Binomial(400, 0.6): 240 and 9.8. The others share 160: 17.8 each and 4.1.
  assert abs(counts[3] - 240) < 40, counts
  assert (np.abs(np.delete(counts, 3) - 17.8) < 17).all(), counts


def test_the_digit_is_drawn_in_the_middle_and_shows_the_handwriting():
  half, middle = scenes.DIGIT // 2, scenes.PLATE // 2
  glyphs = digits.load(SPLIT).images
  side = (scenes.DIGIT, scenes.DIGIT)
  big = [np.asarray(Image.fromarray(g.astype(np.float32)).resize(side)).ravel() for g in glyphs]
  ranks = []
  for seed in range(20):
    scene = compose(seed, kind="framed")
    plate = asked(scene)
    area = scene.task.images[0][plate.y : plate.y + scenes.PLATE, plate.x : plate.x + scenes.PLATE]
    drawn = area[middle - half : middle + half, middle - half : middle + half, 0].astype(np.float64)
    likeness = np.array([np.corrcoef(drawn.ravel(), glyph)[0, 1] for glyph in big])
    ranks.append((likeness < likeness[plate.digit]).mean())
  # Only fine strokes are drawn, so likeness is not high; but the plate's own handwriting is among
  # the likest of 360. Drawn elsewhere, mirrored, or another digit: a rank of 1/2 on average.
  assert np.mean(ranks) > 0.95, ranks


def test_an_overview_hardly_changes_with_the_digit():
  images = digits.load(SPLIT).images
  changes, near = [], []
  for one, other in zip(images[:60:3], images[180:240:3], strict=True):
    plates = []
    for glyph in (one, other):
      canvas = np.full((100, 100), scenes._FACE, np.float32)
      ink = scenes._etching(glyph.tobytes(), "none")
      start = (100 - len(ink)) // 2 + 1  # Not on a boundary of shown pixels.
      canvas[start : start + len(ink), start : start + len(ink)] += scenes._INK * ink
      plates.append(Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8)))
    shown = [np.asarray(p.resize((20, 20), Image.Resampling.BICUBIC), float) for p in plates]
    changes.append((shown[0] - shown[1])[8:12, 8:12].std())
    near.append((np.asarray(plates[0], float) - np.asarray(plates[1], float))[45:57, 45:57].std())
  # Two digits differ by tens of levels at full size. At a fifth, less than the smudges that lie
  # over both: bicubic at 5:1 averages a smudge of 2 pixels' sigma down, but by no more than half.
  assert np.mean(near) > 40
  assert np.mean(changes) < scenes._SMUDGE / 2


def test_shape_masks_are_what_their_names_say():
  area = {name: scenes.shape_mask(name).mean() for name in scenes.SHAPES}
  # A disc covers pi / 4 of its square, less the pixel it is drawn short of.
  assert area["circle"] == pytest.approx(np.pi / 4, abs=0.01)
  # An equilateral triangle in a circle of radius r covers 3 sqrt(3) / 4 r^2 of (2 r)^2.
  assert area["triangle"] == pytest.approx(3 * 3**0.5 / 16, abs=0.01)
  # Ten triangles of r * 0.42 r * sin(36 degrees) / 2.
  assert area["star"] == pytest.approx(5 * 0.42 * np.sin(np.pi / 5) / 4, abs=0.01)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"kind": "count"}, "kind 'count' must be one of .*beside"),
    ({"shift": "fog"}, "shift 'fog' must be one of .*rotate"),
    ({"skew": 10}, "skew 10 must be a digit 0 to 9"),
  ],
)
def test_unknown_settings(kwargs, message):
  with pytest.raises(ValueError, match=message):
    compose(0, **kwargs)
