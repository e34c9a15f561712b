"""Names of slices, and what they stand for."""

import pytest

from kernels import chips


@pytest.mark.parametrize(
  "name, match",
  [
    ("v5e-60", r"v5e-60 is no slice; there are \['v5e-4', 'v5e-8'"),
    ("v9-4", r"topology 'v9-4' must be one of \['a100', 'h100', 'h200', 'v5e', 'v5p', 'v6e'\]"),
    ("v5e", "a dash and a size"),
    ("h100-12", "12 GPUs are no machines of 8"),
    ("a100-0", "0 GPUs are no machines of 8"),
  ],
)
def test_other_names_are_refused(name, match):
  with pytest.raises(ValueError, match=match):
    chips.slice_of(name)


def test_a_slices_sides_have_its_chips():
  """v5p is sold by TensorCores, of which a chip has two; the others by chips."""
  for name, chip in chips.CHIPS.items():
    for size, sides in getattr(chip, "sizes", {}).items():
      count = 1
      for side in sides:
        count *= side
      assert count == (size // 2 if name == "v5p" else size), (name, size)
