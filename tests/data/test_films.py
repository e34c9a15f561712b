import dataclasses

import numpy as np
import pytest

from pixelis_jax.data import composites, films, pictures
from pixelis_jax.data.composites import Occlusion
from pixelis_jax.data.films import Course
from pixelis_jax.data.pictures import Photo
from tests.data.cutouts import BLACK, corner, disc, thing

HEIGHT, WIDTH = composites.SIZE


def film(seed, cutouts, courses, background=BLACK, **kwargs):
  rng = np.random.default_rng(seed)
  return films.film(rng, background, cutouts, courses, jitter=0.0, **kwargs)


def whole(mask):
  """A track's mask on the canvas."""
  canvas = np.zeros(composites.SIZE, bool)
  if mask is not None:
    box = [int(edge) for edge in dataclasses.astuple(mask.box)]
    canvas[box[1] : box[3], box[0] : box[2]] = mask.inside
  return canvas


def still(x, y, height=0.3):
  return Course(start=(x, y), bend=(x, y), end=(x, y), heights=(height, height))


def test_a_film_knows_every_frames_pixels():
  rng = np.random.default_rng(1)
  courses = [
    films.wander(rng, travel=0.4, heights=(0.2, 0.35)),
    films.wander(rng, travel=0.3, heights=(0.3, 0.3), curved=True),
  ]
  played = film(0, [disc(90, 0), corner(90, 1)], courses, frames=24, rate=8.0)
  assert played.video.frames.shape == (24, HEIGHT, WIDTH, 3)
  np.testing.assert_allclose(played.video.times, np.arange(24) / 8)
  for f, frame in enumerate(played.video.frames):
    under, over = (whole(track.masks[f]) for track in played.tracks)
    np.testing.assert_array_equal(over, frame[:, :, 1] >= 128)
    np.testing.assert_array_equal((under & ~over)[~over], (frame[:, :, 0] >= 128)[~over])
    for track, course in zip(played.tracks, courses, strict=True):
      mask = track.masks[f]
      x, y, height = course.at(f / 23)
      assert (mask.source, mask.frame) == (0, f)
      # Whole pixels: the corner and the side are each rounded.
      assert mask.box.center == pytest.approx((x * WIDTH, y * HEIGHT), abs=1.5)
      assert mask.box.height == pytest.approx(height * HEIGHT, abs=1.5)
    seen = (under & ~over).sum() / under.sum()
    assert played.tracks[0].shares[f] == pytest.approx(seen) and played.tracks[1].shares[f] == 1


def test_a_film_hides_the_stated_share_in_the_stated_frames():
  occlusion = Occlusion(number=1, start=5, stop=9, share=0.75)
  played = film(
    0,
    [disc(90, 0), disc(90, 1)],
    [still(0.2, 0.5), still(0.7, 0.5)],
    frames=12,
    occlusions=[occlusion],
  )
  expected = np.where((np.arange(12) >= 5) & (np.arange(12) < 9), 0.25, 1.0)
  np.testing.assert_allclose(played.tracks[1].shares, expected, atol=0.01)  # As for one post.
  np.testing.assert_array_equal(played.tracks[0].shares, np.ones(12))
  for f, frame in enumerate(played.video.frames):
    shown = (frame[:, :, 1] == 255).sum() / (played.video.frames[0][:, :, 1] == 255).sum()
    assert shown == pytest.approx(expected[f], abs=0.02)  # Full pixels only, without the rim.


def test_an_object_can_leave_the_screen_and_a_post_with_it():
  leaving = Course(start=(0.5, 0.5), bend=(1.0, 0.5), end=(1.5, 0.5), heights=(0.3, 0.3))
  played = film(
    0,
    [thing(50, 50)],
    [leaving],
    frames=11,
    occlusions=[Occlusion(number=0, start=10, stop=11, share=0.5)],
  )
  (track,) = played.tracks
  # 72 pixels wide, 32 further right each frame, from 160 of 320: half of it is out in the sixth.
  np.testing.assert_allclose(track.shares[[0, 3, 5, 10]], [1, 1, 0.5, 0], atol=0.02)
  assert track.masks[10] is None and track.masks[5].box.x1 == WIDTH


def test_the_camera_pans_over_the_photo():
  ramp = np.zeros((400, 1000, 3), np.uint8)
  ramp[:, :, 0], ramp[:, :, 1] = np.arange(1000) // 4, (np.arange(400) // 2)[:, None]
  photo = Photo(name="ramp", pixels=ramp, source="ramp")
  for seed, pan in enumerate([(0.5, 0.0), (-0.25, 0.2), (-1.5, 0.0), (0.0, -1.0), (-0.8, -0.5)]):
    frames = film(seed, [], [], photo, frames=5, pan=pan).video.frames.astype(float)
    scale = (frames[0][0, -1, 0] - frames[0][0, 0, 0]) / (WIDTH - 1)  # Levels a pixel.
    moved = (frames[-1] - frames[0]).mean((0, 1))
    # Brighter by what the camera moves to the right; the scale is known to a level in 320.
    assert moved[0] == pytest.approx(pan[0] * WIDTH * scale, abs=1 + abs(pan[0]))
    assert moved[1] == pytest.approx(pan[1] * HEIGHT * 2 * scale, abs=1 + 2 * abs(pan[1]))
    steps = np.diff(frames.mean((1, 2))[:, 0])
    np.testing.assert_allclose(steps, moved[0] / 4, atol=1)  # Evenly.


def test_same_generator_same_film():
  cutouts, photo = list(pictures.cutouts("dev")[:2]), pictures.photos("dev")[0]

  def make():
    rng = np.random.default_rng(5)
    courses = [films.wander(rng, travel=0.3, heights=(0.2, 0.3)) for _ in cutouts]
    return films.film(rng, photo, cutouts, courses, frames=4, shadow=0.5, pan=(0.1, 0.0))

  one, two = make(), make()
  np.testing.assert_array_equal(one.video.frames, two.video.frames)
  assert one.background == photo.source and one.tracks[0].name == cutouts[0].name


def test_courses_are_as_long_and_as_bent_as_asked():
  bends = []
  for seed in range(40):
    rng = np.random.default_rng(seed)
    course = films.wander(rng, travel=0.5, heights=(0.2, 0.4), curved=True)
    ends = np.array([course.start, course.end])
    assert (ends >= 0.2 - 1e-9).all() and (ends <= 0.8 + 1e-9).all()
    dx, dy = (ends[1] - ends[0]) * (WIDTH, HEIGHT)
    assert np.hypot(dx, dy) == pytest.approx(0.5 * WIDTH)
    middle = np.array(course.at(0.5)[:2]) - ends.mean(0)
    bends.append(np.hypot(*(middle * (WIDTH, HEIGHT))) / (0.5 * WIDTH))
    if 0 < min(course.bend) and max(course.bend) < 1:  # To the side: at right angles.
      assert middle @ ((ends[1] - ends[0]) * (WIDTH**2, HEIGHT**2)) == pytest.approx(0, abs=1e-6)
    assert course.at(0.0)[2] == 0.2 and course.at(1.0)[2] == 0.4
  # A quarter to a half of the travel, less where the canvas ends.
  assert max(bends) <= 0.5 + 1e-9 and np.median(bends) > 0.2
  straight = films.wander(np.random.default_rng(0), travel=0.5, heights=(0.2, 0.2))
  assert straight.at(0.5)[:2] == pytest.approx(np.mean([straight.start, straight.end], axis=0))


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"frames": 1}, "frames 1 must be >= 2"),
    ({"courses": []}, "0 courses 1"),
    ({"occlusions": [Occlusion(number=1, start=0, stop=2, share=0.5)]}, "must be of 1 objects"),
    ({"occlusions": [Occlusion(number=0, start=0, stop=99, share=0.5)]}, "and 48 frames"),
  ],
)
def test_a_film_whose_numbers_do_not_fit(kwargs, message):
  courses = kwargs.pop("courses", [still(0.5, 0.5)])
  with pytest.raises(ValueError, match=message):
    film(0, [disc(20)], courses, **kwargs)


def test_a_course_too_long_for_its_canvas():
  with pytest.raises(ValueError, match="travel 2.0 is too far for a canvas of"):
    films.wander(np.random.default_rng(0), travel=2.0, heights=(0.2, 0.2))
