import dataclasses

import numpy as np
import pytest

from pixelis_jax.data import composites, pictures
from pixelis_jax.data.composites import Occlusion
from pixelis_jax.data.pictures import Photo
from tests.data.cutouts import BLACK, corner, disc, thing

HEIGHT, WIDTH = composites.SIZE
GRAY = Photo(name="wall", pixels=np.full((400, 600, 3), 120, np.uint8), source="wall")


def compose(seed, cutouts, heights, background=BLACK, **kwargs):
  rng = np.random.default_rng(seed)
  return composites.compose(
    rng, background, cutouts, heights=heights, jitter=kwargs.pop("jitter", 0.0), **kwargs
  )


@pytest.mark.parametrize("turn", [0.0, 30.0])
def test_masks_are_the_pixels_that_are_at_least_half_covered(turn):
  for seed in range(5):
    scene = compose(seed, [disc(90, 0), corner(120, 1), disc(40, 2)], [0.3, 0.4, 0.2], turn=turn)
    for channel, placed in enumerate(scene.objects):
      # Nothing else is in this channel, so its level is the opacity that was blended.
      np.testing.assert_array_equal(placed.visible, scene.pixels[:, :, channel] >= 128)
      np.testing.assert_array_equal(placed.visible, placed.whole)
      box = placed.box
      rows = slice(int(box.y0), int(box.y1)), slice(int(box.x0), int(box.x1))
      assert placed.whole[rows].sum() == placed.whole.sum()
      assert all(placed.whole[rows].any(axis).all() for axis in (0, 1))  # Tight.


def test_edges_are_soft():
  levels = np.unique(compose(0, [disc(90)], [0.3]).pixels[:, :, 0])
  # Cut out hard and shrunk by 1.25: a dozen levels between black and full, not two.
  assert len(levels) > 12


def test_colours_do_not_bleed_in_from_what_is_transparent():
  cutout = disc(90)
  pixels = np.where(cutout.solid[:, :, None], cutout.pixels, np.array([0, 255, 0], np.uint8))
  green_around = dataclasses.replace(cutout, pixels=pixels)
  # Were alpha and colour resampled apart, the rim would be yellow: green of up to 60.
  assert compose(0, [green_around], [0.25]).pixels[:, :, 1].max() <= 3


def test_heights_are_shares_of_the_canvas_unless_too_wide():
  cutouts, heights = [disc(90), thing(50, 400)], [0.4, 0.3]
  tall, wide = (placed.box for placed in compose(0, cutouts, heights).objects)
  assert tall.height == pytest.approx(0.4 * HEIGHT, abs=1)
  # At 0.3 of 240 it would be 8 * 72 = 576 wide: 0.9 of 320 is the most.
  assert wide.width == pytest.approx(288, abs=1) and wide.height == pytest.approx(36, abs=1)


def test_objects_are_apart_and_off_the_border():
  gap = composites.MARGIN
  for seed in range(20):
    cutouts = [disc(90, i % 3) for i in range(6)]
    boxes = [p.box for p in compose(seed, cutouts, [0.3, 0.2, 0.2, 0.25, 0.1, 0.3]).objects]
    for i, a in enumerate(boxes):
      assert min(a.x0, a.y0) >= gap and a.x1 <= WIDTH - gap and a.y1 <= HEIGHT - gap
      for b in boxes[:i]:
        assert max(a.x0 - b.x1, b.x0 - a.x1, a.y0 - b.y1, b.y0 - a.y1) >= gap


@pytest.mark.parametrize("bounds", [(0.1, 0.3), (0.5, 0.7)])
def test_the_second_of_a_pair_hides_the_first(bounds):
  sides = set()
  for seed in range(10):
    cutouts = [disc(90, 0), corner(90, 1), disc(90, 2), disc(60, 1), disc(90, 0)]
    scene = compose(seed, cutouts, [0.25] * 5, overlap=bounds)
    assert [round(o.share, 9) for o in scene.objects[1::2]] == [1, 1]
    assert scene.objects[4].share == 1  # It has no partner.
    for under, over in (scene.objects[0:2], scene.objects[2:4]):
      assert bounds[0] <= 1 - under.share <= bounds[1]
      np.testing.assert_array_equal(under.visible, under.whole & ~over.whole)
      sides.add(under.box.center[0] < over.box.center[0])
      # What is drawn agrees: the lower object's pixels show only where it is visible.
      assert (scene.pixels[over.whole].argmax(1) == int(over.name[-1])).all()
  assert sides == {True, False}


def test_same_generator_same_picture():
  made = [list(pictures.cutouts("dev")[i] for i in (0, 7, 15))] * 2
  photo = pictures.photos("dev")[0]
  kwargs = {"turn": 20.0, "jitter": 0.2, "shadow": 0.5, "background": photo}
  one, two = (compose(3, cutouts, [0.3] * 3, **kwargs) for cutouts in made)
  np.testing.assert_array_equal(one.pixels, two.pixels)
  assert (compose(4, made[0], [0.3] * 3, **kwargs).pixels != one.pixels).any()
  assert one.background == photo.source
  assert [(o.name, o.color, o.source) for o in one.objects] == [
    (c.name, c.color, c.source) for c in made[0]
  ]


def test_half_are_mirrored_unless_forbidden():
  def fuller_left(seed, **kwargs):
    (placed,) = compose(seed, [corner(60)], [0.3], **kwargs).objects
    return np.nonzero(placed.whole)[1].mean() < placed.box.center[0]

  assert all(fuller_left(seed, flip=False) for seed in range(20))
  # Binomial(40, 1/2): 20 and 3.2, within 4 deviations.
  assert 7 < sum(fuller_left(seed) for seed in range(40)) < 33


def test_turns_are_within_their_bound():
  angles = []
  for seed in range(20):
    (placed,) = compose(seed, [thing(20, 200)], [0.05], turn=30.0).objects
    y, x = (c - c.mean() for c in np.nonzero(placed.whole))
    angles.append(np.degrees(0.5 * np.arctan2(2 * (x * y).mean(), (x * x).mean() - (y * y).mean())))
  # Drawn by the moments of a bar of 24 x 240: to a degree. Uniform in +-30: some on both sides.
  assert max(np.abs(angles)) < 31 and min(angles) < -10 and max(angles) > 10


def test_jitter_changes_brightness_and_colour_but_no_mask():
  # Gray, so that both directions show.
  cutout = dataclasses.replace(disc(90), pixels=np.full((90, 90, 3), 128, np.uint8))
  plain = compose(0, [cutout], [0.3])
  inside, seen = plain.objects[0].whole, []
  for seed in range(20):
    scene = compose(seed, [cutout], [0.3], jitter=0.2)
    seen.append(np.median(scene.pixels[scene.objects[0].whole], axis=0) / 128)
    assert scene.objects[0].whole.sum() == inside.sum()
  # Brightness by 0.2, each channel by 0.1: at most 0.3 together, and half a level of rounding.
  assert np.abs(np.array(seen) - 1).max() < 0.305
  assert np.ptp(np.mean(seen, axis=1)) > 0.1 and np.ptp(seen, axis=1).max() > 0.03


def test_shadows_darken_beside_the_object_and_are_in_no_mask():
  lit, shaded = (compose(1, [disc(90)], [0.3], GRAY, shadow=s) for s in (0.0, 0.6))
  placed = shaded.objects[0].whole
  np.testing.assert_array_equal(lit.objects[0].whole, placed)
  fall = lit.pixels[:, :, 1].astype(int) - shaded.pixels[:, :, 1]
  assert fall.min() >= 0 and 40 < fall[~placed].max() <= 72  # At most 0.6 of 120.
  y, x = np.nonzero(fall * ~placed)
  cx, cy = shaded.objects[0].box.center
  assert x.mean() > cx and y.mean() > cy  # To the right and below.


def test_a_backdrop_keeps_the_photos_proportions():
  y, x = np.mgrid[:400, :600]
  ramp = np.stack([x * 255 / 599, y * 255 / 399, 0 * x], axis=2).astype(np.uint8)
  for seed in range(10):
    shown = composites.backdrop(
      np.random.default_rng(seed), Photo(name="ramp", pixels=ramp, source="ramp")
    )
    across = (shown[0, -1, 0] - shown[0, 0, 0]) * 599 / 255  # Photo pixels shown, of 600 and 400.
    down = (shown[-1, 0, 1] - shown[0, 0, 1]) * 399 / 255
    # 320 x 240 fits at 400 rows: 533 columns; a crop is at least 0.6 of that. Levels are 2 pixels.
    assert 0.6 * 533 - 5 < across < 533 + 5 and across / down == pytest.approx(4 / 3, abs=0.05)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"heights": [0.3]}, r"heights \[0.3\] must be 2 shares between 0 and 1"),
    ({"heights": [0.3, 1.2]}, r"heights \[0.3, 1.2\] must be 2 shares"),
    ({"heights": [0.9, 0.9]}, r"objects of \[\(216, 216\), .* find no place"),
    ({"heights": [0.98, 0.1]}, "find no place on a canvas of"),
    # 24 of 120 pixels high: 1/25 of the other's area.
    ({"heights": [0.5, 0.1], "overlap": (0.2, 0.4)}, r"\(24, 24\) pixels cannot hide 0.2 to 0.4"),
  ],
)
def test_what_has_no_place_says_so(kwargs, message):
  with pytest.raises(ValueError, match=message):
    compose(0, [disc(90), disc(90, 1)], **kwargs)


def test_what_vanishes_says_so():
  comb = np.zeros((200, 200), np.uint8)
  comb[::10] = comb[-1] = 255  # Lines of 1 in 10 pixels: opacity 0.1 when shrunk.
  with pytest.raises(ValueError, match="nothing is left of an object at height 0.05"):
    compose(0, [thing(200, 200, 0, comb)], [0.05])


def test_an_empty_mask_has_no_box():
  with pytest.raises(ValueError, match="an empty mask has no box"):
    composites.tight(np.zeros((3, 3), bool))


def test_darkness_has_photon_noise():
  bright = np.full((200, 200, 3), 204, np.uint8)
  dark = composites.darkened(bright, np.random.default_rng(0), light=0.1).astype(float)
  # 0.8 of 1,000 photons, a tenth of them: Poisson(80) times 255 / 1000 a photon.
  assert dark.mean() == pytest.approx(20.4, abs=0.1)
  # Variance 80 * 0.255^2 and that of rounding to levels, 1/12; 120,000 samples.
  assert dark.std() == pytest.approx((80 * 0.255**2 + 1 / 12) ** 0.5, rel=0.02)


def test_blur_is_a_gaussian_of_its_sigma():
  spot = np.zeros((41, 41, 3), np.uint8)
  spot[20, 20] = 255
  blurred = composites.blurred(spot, sigma=1.5)
  # 255 / (2 pi sigma^2) in the middle.
  assert blurred[20, 20, 0] == pytest.approx(255 / (2 * np.pi * 1.5**2), abs=1)
  assert blurred[20, 19, 0] == pytest.approx(18.04 * np.exp(-1 / 4.5), abs=1)


def test_noise_has_its_sigma():
  flat = np.full((200, 200, 3), 128, np.uint8)
  changed = composites.noisy(flat, np.random.default_rng(0), sigma=20.0).astype(float) - 128
  # 120,000 samples: the deviation of the mean is 0.06; channels are independent.
  assert abs(changed.mean()) < 0.3 and changed.std() == pytest.approx(20, rel=0.02)
  assert abs(np.corrcoef(changed[:, :, 0].ravel(), changed[:, :, 1].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_a_post_hides_its_share_of_one_object(share):
  for seed in range(6):
    scene = compose(seed, [corner(90, 0), disc(90, 1)], [0.3, 0.3])
    covered = composites.occluded(scene, np.random.default_rng(seed), 0, share=share)
    first, other = covered.objects
    # The longest of 72 columns of a triangle is 2 / 72 of it, and the nearest is half of that off.
    # Counted from the wrong side, a quarter of the columns would hide 0.06 or 0.44 of it.
    assert 1 - first.share == pytest.approx(share, abs=0.015)
    np.testing.assert_array_equal(first.whole, scene.objects[0].whole)
    # The picture agrees: what is still visible is unchanged, what is hidden no longer shows.
    for channel, placed in ((0, first), (1, other)):
      assert (covered.pixels[placed.visible] == scene.pixels[placed.visible]).all()
      hidden = scene.objects[channel].visible & ~placed.visible
      assert not np.any(covered.pixels[hidden].max(1) == 255)


def test_a_post_before_no_object():
  with pytest.raises(ValueError, match="0 < share <= 1"):
    composites.occluded(compose(0, [disc(90)], [0.3]), np.random.default_rng(0), 0, share=1.5)


def test_masks_follow_what_is_seen_aslant():
  for seed in range(5):
    scene = compose(seed, [disc(90, 0), corner(90, 1)], [0.3, 0.35])
    tilted = composites.seen_aslant(scene, np.random.default_rng(seed), strength=0.4)
    for channel, placed in enumerate(tilted.objects):
      # The gray around the picture, 96, and no other object reach half of this channel.
      shown = tilted.pixels[:, :, channel] >= 128
      both, either = (shown & placed.whole).sum(), (shown | placed.whole).sum()
      # Sampled at centres, against interpolated: edges may differ by half a pixel of about 300
      # along a mask of 3,000 or more.
      assert both / either > 0.95
      assert placed.whole.sum() < scene.objects[channel].whole.sum()  # All corners move inward.
    assert (tilted.pixels[0, 0] == 96).all()


def test_seen_from_the_front_nothing_changes():
  scene = compose(0, [disc(90)], [0.3], pictures.photos("dev")[0])
  same = composites.seen_aslant(scene, np.random.default_rng(0), strength=0.0)
  # Corners stay; the homography is solved in float64, then 8 bits are interpolated.
  assert np.abs(same.pixels.astype(int) - scene.pixels).max() <= 1
  np.testing.assert_array_equal(same.objects[0].visible, scene.objects[0].visible)
  with pytest.raises(ValueError, match="strength 1.0 must satisfy 0 <= strength < 1"):
    composites.seen_aslant(scene, np.random.default_rng(0), strength=1.0)


def test_an_occlusion_that_never_stands():
  with pytest.raises(ValueError, match="0 <= start < stop"):
    Occlusion(number=0, start=5, stop=5, share=0.5)
