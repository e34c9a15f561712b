import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pixelis_jax.data import digits, tasks


def test_splits_partition_all_images_and_keep_their_labels():
  splits = [digits.load(name) for name in digits.SPLITS]
  assert [len(s.labels) for s in splits] == [1077, 360, 360]
  # Disjoint and complete: together exactly the rows 0 to 1,796.
  everything = np.sort(np.concatenate([s.indices for s in splits]))
  np.testing.assert_array_equal(everything, np.arange(1797))
  truth = load_digits()
  for split in splits:
    np.testing.assert_array_equal(split.labels, truth.target[split.indices])
    np.testing.assert_array_equal(split.images, truth.images[split.indices])


def test_each_class_is_divided_in_fifths():
  of_class = np.bincount(load_digits().target)
  for name, fifths in (("train", 3), ("stream", 1), ("held_out", 1)):
    counts = np.bincount(digits.load(name).labels, minlength=10)
    # Every run of five images gives `fifths` here, so a class is off by less than one run.
    assert (np.abs(counts - of_class * fifths / 5) <= 1.5).all(), counts


def test_images_are_8_bit_ink_and_read_only():
  split = digits.load("train")
  assert split.images.dtype == np.uint8 and split.images.max() == digits.INK_MAX
  with pytest.raises(ValueError, match="read-only"):
    split.labels[0] = 3


def test_unknown_split():
  with pytest.raises(ValueError, match="split 'test' must be one of .*held_out"):
    digits.load("test")


@pytest.fixture
def sheet(tmp_path, monkeypatch):
  """Cell `m` of class `c` is a frame whose ink says which it is; it lies off the middle."""
  cells = np.zeros((5000, 20, 20), np.uint8)
  for number, cell in enumerate(cells):
    # At most 7 of 16: with the frame at full ink, all are darker than half of it.
    (c, m), bits = divmod(number, 500), np.zeros(64, np.uint8)
    for at, value in enumerate((c, m // 64, m // 8 % 8, m % 8)):
      bits[9 + at] = 16 * value if value < 8 else 16 * 7
    shown = bits.reshape(8, 8)
    shown[[0, 7]] = shown[:, [0, 7]] = 255
    cell[3:19, 2:18] = shown.repeat(2, 0).repeat(2, 1)
  path = tmp_path / "digits.png"
  Image.fromarray(cells.reshape(50, 100, 20, 20).swapaxes(1, 2).reshape(1000, 2000)).save(path)
  monkeypatch.setattr(digits, "SHEET", path)
  digits.load.cache_clear()
  yield path
  digits.load.cache_clear()


def test_another_hand_has_an_image_of_the_class_in_the_place_of_each(sheet):
  seen = set()
  for name in digits.SPLITS:
    usual, other = digits.load(name), digits.load(name, "opencv")
    np.testing.assert_array_equal(other.labels, usual.labels)
    np.testing.assert_array_equal(other.indices, usual.indices)
    # The frame fills all of 8x8; without the cut each cell would be blurred over 2.5 of them.
    assert (other.images[:, [0, 7]] == 16).all() and (other.images[:, :, [0, 7]] == 16).all()
    c, *rank = other.images.reshape(-1, 64)[:, 9:13].T.astype(int)
    np.testing.assert_array_equal(c, np.minimum(usual.labels, 7))
    ranks = 64 * rank[0] + 8 * rank[1] + rank[2]
    seen |= set(zip(usual.labels.tolist(), ranks.tolist(), strict=True))
  # No image stands in two places, so splits share no handwriting; and they are the first of each.
  assert len(seen) == 1797
  counts = np.bincount(load_digits().target)
  assert seen == {(label, m) for label, count in enumerate(counts) for m in range(count)}


def test_a_scene_by_another_hand_is_that_scene(sheet):
  usual = tasks.TaskSource(split="stream", seed=3)[5]
  other = tasks.TaskSource(split="stream", seed=3, shift="writers")[5]
  assert (other.images[0] != usual.images[0]).any()
  same = ("question", "answer", "kind", "boxes")
  assert all(getattr(other, name) == getattr(usual, name) for name in same)
  assert other.id == f"{usual.id}-writers"


def test_what_is_no_sheet(sheet):
  Image.new("L", (2000, 980)).save(sheet)
  with pytest.raises(ValueError, match=r"digits.png has shape \(980, 2000\): no 50 lines of 100"):
    digits.load("train", "opencv")
  sheet.unlink()
  with pytest.raises(FileNotFoundError, match="fetch_pictures.py pictures` fetches it"):
    tasks.TaskSource(split="train", shift="writers")
  with pytest.raises(ValueError, match="hand 'left' one of .*opencv"):
    digits.load("train", "left")
