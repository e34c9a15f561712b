import numpy as np
import pytest
from sklearn.datasets import load_digits

from pixelis_jax.data import digits


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
