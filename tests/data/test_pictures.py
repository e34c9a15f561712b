import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from pixelis_jax.data import digits, pictures
from pixelis_jax.data.scenes import COLORS


def disc(side, color, *, opacity=255):
  """RGBA: a disc that touches the middle of each edge."""
  y, x = np.mgrid[:side, :side] + 0.5
  inside = (x - side / 2) ** 2 + (y - side / 2) ** 2 <= side**2 / 4
  return np.dstack([np.full((side, side, 3), color, np.uint8), inside * np.uint8(opacity)])


def stamp(folder, name, text, pixels=None):
  """Like the package's: a PNG, and a text whose first line is English."""
  file = folder / pictures.STAMPS / f"{name}.png"
  file.parent.mkdir(parents=True, exist_ok=True)
  # The colour tells the stamps apart.
  color = [len(name), *name.encode()[-2:].rjust(2)]
  Image.fromarray(disc(60, color) if pixels is None else pixels).save(file)
  if text is not None:
    file.with_suffix(".txt").write_text(f"{text}\nde.utf8=Etwas.\n", encoding="utf-8")
  return file


def forget():
  pictures.cutouts.cache_clear()
  pictures._every_stamp.cache_clear()


WORDS = [f"thing{letter}" for letter in "abcdefghijklmnopqrstuvwx"]


@pytest.fixture
def folder(tmp_path):
  """24 things, so that every split has some."""
  for word in WORDS:
    stamp(tmp_path, f"things/{word}", f"A {word}.")
  return tmp_path


def named(folder):
  return {split: [c.name for c in pictures.cutouts(split, folder)] for split in pictures.SPLITS}


@pytest.fixture(scope="module")
def made():
  return {split: pictures.cutouts(split) for split in pictures.SPLITS}


def test_no_photo_is_in_two_splits():
  shown = [p for split in pictures.SPLITS for p in pictures.photos(split)]
  assert len({p.source for p in shown}) == len({p.pixels.tobytes() for p in shown}) == len(shown)
  assert all(min(p.pixels.shape[:2]) >= 240 for p in shown)
  # Both tables: a file written into two splits, or twice into one.
  for splits in (*pictures.WHEELS.values(), pictures.FETCHED):
    files = [name for split in pictures.SPLITS for name in splits[split]]
    assert len(set(files)) == len(files)


def test_two_views_of_one_subject_are_one_file_or_one_split():
  # Numbered, left and right, A and B: the stem without such an ending is the subject.
  files = [
    (re.sub(r"(_?left|_?right|[LRAB]|\d+)$", "", name.rsplit("/", 1)[1].rsplit(".", 1)[0]), split)
    for splits in (*pictures.WHEELS.values(), pictures.FETCHED)
    for split, names in splits.items()
    for name in names
  ]
  subjects = dict(files)
  assert all(subjects[subject] == split for subject, split in files)


def test_made_cutouts_are_of_their_split_alone(made):
  sources = {}
  for split, cutouts in made.items():
    photos = {photo.source for photo in pictures.photos(split)}
    assert {c.source.split(" ")[0] for c in cutouts} <= photos
    sources[split] = {s for c in cutouts for s in c.source.split(" ")}
    rows = {int(s.removeprefix("digits/")) for s in sources[split] if s.startswith("digits/")}
    hand = dict(zip(pictures.SPLITS, digits.SPLITS, strict=True))[split]
    assert len(rows) > 30 and rows <= set(digits.load(hand).indices.tolist())
  assert not sources["train"] & sources["dev"] and not sources["train"] & sources["test"]
  assert not sources["dev"] & sources["test"]


def test_made_cutouts_are_what_they_are_called(made):
  for cutout in made["train"]:
    assert cutout.solid.any(0).all() and cutout.solid.any(1).all()  # Cropped to the solid part.
    shown = cutout.pixels[cutout.solid].mean(0)
    nearest = min(COLORS, key=lambda name: np.abs(shown - np.array(COLORS[name])).sum())
    assert cutout.color == nearest, cutout.name
  assert {(c.name, c.color) for c in made["train"]} == {
    (name, color)
    for name in (*pictures.SHAPES, *(f"digit {i}" for i in range(10)))
    for color in COLORS
  }


@pytest.mark.parametrize(
  "name, share",
  [
    ("circle", np.pi / 4),
    ("square", 1.0),
    ("triangle", 0.5),  # Of the rectangle around it.
    ("diamond", 0.5),
    ("cross", 5 / 9),  # Of nine squares.
    ("ring", np.pi / 4 * (1 - 0.56**2)),  # The hole's radius is 0.28 of 0.5.
    ("arrow", (0.5 * 0.28 + 0.5 * 0.76 / 2) / 0.76),  # Shaft and head, 0.76 high.
  ],
)
def test_shapes_cover_what_geometry_says(name, share):
  # Edges are anti-aliased and corners cropped at half: within a pixel of 160 along the outline.
  assert pictures.shape(name).mean() == pytest.approx(share, abs=0.02)


def test_a_heart_a_star_and_a_crescent_tell_their_sides_apart():
  heart, star, crescent = (pictures.shape(name) >= 0.5 for name in ("heart", "star", "crescent"))
  for mirrored in (heart, star):  # Two pixels of rasterisation.
    assert (mirrored != mirrored[:, ::-1]).mean() < 0.02
  # Two bows above with a notch between them, one tip below; one point of the star above.
  assert heart[: len(heart) // 4].sum() > 3 * heart[-len(heart) // 4 :].sum()
  assert not heart[0, heart.shape[1] // 2] and heart[-1, heart.shape[1] // 2 - 2 :][:4].any()
  assert star[0].sum() <= 6 and abs(np.flatnonzero(star[0]).mean() - star.shape[1] / 2) < 2
  # The moon's hollow is on the right.
  assert crescent[len(crescent) // 2, 0] and not crescent[len(crescent) // 2, -1]


def test_stamps_are_named_cropped_and_masked(tmp_path):
  pixels = np.zeros((100, 80, 4), np.uint8)
  pixels[20:80, 10:70] = disc(60, (200, 30, 40))
  pixels[:, :, 3][pixels[:, :, 3] == 0] = 20  # A faint haze all around is no part of it.
  stamp(tmp_path, "animals/a", "A very little sea lion!", pixels)
  split = pictures._split("lion")
  (cutout,) = pictures.cutouts(split, tmp_path)
  assert cutout.name == "sea lion" and cutout.color is None
  assert cutout.source == f"{pictures.STAMPS}/animals/a.png"
  np.testing.assert_array_equal(cutout.solid, disc(60, 0)[:, :, 3] > 0)
  np.testing.assert_array_equal(cutout.pixels[30, 30], [200, 30, 40])


@pytest.mark.parametrize(
  "name, text, pixels",
  [
    ("cartoon/a", "A thinga.", None),
    ("symbols/a", "A thinga.", None),
    ("a", None, None),
    ("a", "Boom!!!", None),
    ("a", "The moon.", None),
    ("a", "A thinga that stops when it is its turn.", None),
    ("a", "A thinga.", disc(39, 1)),  # Too small to be enlarged.
    ("a", "A thinga.", np.full((60, 60, 4), 255, np.uint8)),  # Not cut out.
    ("a", "A thinga.", disc(60, 1, opacity=255) // np.array([1, 1, 1, 2], np.uint8)),  # A ghost,
  ],
)
def test_what_is_no_clear_thing_with_a_name_is_left_out(folder, name, text, pixels):
  before = named(folder)
  if pixels is not None and name == "a" and pixels[30 % len(pixels), 30, 3] == 127:
    pixels[28:32, 28:32, 3] = 255  # with a solid spot.
  stamp(folder / "more", name, text, pixels)
  (folder / pictures.STAMPS).rename(folder / "more" / pictures.STAMPS / "old")
  assert named(folder / "more") == before


def test_words_are_divided_and_stay_when_files_are_added(folder):
  before = named(folder)
  assert sorted(sum(before.values(), [])) == sorted(WORDS)
  assert len(before["train"]) > len(before["dev"]) > 0 < len(before["test"])
  stamp(folder, "a/first", "A green first.")  # Before all others in the order of the paths.
  forget()
  after = named(folder)
  for split in pictures.SPLITS:
    assert [name for name in after[split] if name != "green first"] == before[split]


def test_variants_and_equal_pictures_are_not_divided(folder):
  # Kinds of one animal share their last word, which is all that counts.
  for i, kind in enumerate(("lion", "sea lion", "big eared lion", "Lion")):
    stamp(folder, f"lions/lion-{i}", f"A {kind}.")
  # And one picture has two names: the first by path is kept.
  twin = disc(60, (9, 99, 199))
  twins = [f"twin{letter}" for letter in "abcdefgh"]
  for word in twins:
    stamp(folder, f"twins/{word}", f"A {word}.", twin)
  found = named(folder)
  (split,) = [s for s, names in found.items() if "lion" in names]
  assert sum(name.endswith("lion") for name in found[split]) == 4
  assert sum(name in twins for names in found.values() for name in names) == 1


def test_a_folder_adds_photos_after_those_of_wheels(tmp_path):
  expected = {}
  for i, name in enumerate(pictures.FETCHED["dev"]):
    file = tmp_path / pictures.OPENCV / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((300, 400), i, np.uint8)).save(file)  # Gray becomes RGB.
    expected[f"{pictures.OPENCV}/{name}"] = (300, 400, 3)
  without, photos = pictures.photos("dev"), pictures.photos("dev", tmp_path)
  assert [p.source for p in photos[: len(without)]] == [p.source for p in without]
  assert {p.source: p.pixels.shape for p in photos[len(without) :]} == expected


def test_pictures_are_read_only(made):
  for array in (made["dev"][0].alpha, made["dev"][0].pixels, pictures.photos("dev")[0].pixels):
    with pytest.raises(ValueError, match="read-only"):
      array[0] = 0


def test_mistakes_name_what_is_wrong(tmp_path, folder):
  with pytest.raises(ValueError, match="shape 'blob' must be one of .*'star'"):
    pictures.shape("blob")
  with pytest.raises(ValueError, match="split 'held_out' must be one of .*'dev'"):
    pictures.cutouts("held_out")
  with pytest.raises(FileNotFoundError, match="run python scripts/fetch_pictures.py"):
    pictures.photos("train", tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"there is no picture .*data/aero1\.jpg"):
    (tmp_path / pictures.OPENCV).mkdir()
    pictures.photos("train", tmp_path)
  with pytest.raises(ModuleNotFoundError, match="no_such_package, which ships pictures"):
    pictures.wheel("no_such_package")
  with pytest.raises(ValueError, match="holds no stamp of the split 'train'"):
    (tmp_path / "empty" / pictures.STAMPS).mkdir(parents=True)
    pictures.cutouts("train", tmp_path / "empty")


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda raw: raw[:200], "cannot be read: .*truncated"),
    (lambda raw: b"GIF, it says", "cannot be read: cannot identify"),
  ],
)
def test_a_broken_stamp_is_named(folder, damage, message):
  file = stamp(
    folder, "broken", "A broken.", np.random.default_rng(0).integers(0, 256, (60, 60, 4), np.uint8)
  )
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(ValueError, match=rf"broken\.png {message}"):
    pictures.cutouts(pictures._split("broken"), folder)


def test_a_transparent_stamp_and_a_text_that_is_no_text(folder):
  stamp(folder, "clear", "A clear.", np.zeros((60, 60, 4), np.uint8))
  with pytest.raises(ValueError, match=r"clear\.png is transparent everywhere"):
    pictures.cutouts(pictures._split("clear"), folder)
  (folder / pictures.STAMPS / "clear.txt").write_bytes(b"A \xff.")
  with pytest.raises(ValueError, match=r"clear\.txt is not UTF-8"):
    pictures.cutouts(pictures._split("clear"), folder / ".")


def test_cutouts_are_complete_values(made):
  cutout = made["dev"][0]
  with pytest.raises(dataclasses.FrozenInstanceError):
    cutout.name = "other"
