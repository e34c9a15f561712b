import json

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixelis_jax.chat.images import ImageProcessor, read_image

# (height, width): odd, one pixel high or wide, aspect exactly 200, around multiples of 28 and their
# halves, and big.
SIZES = [
  (1, 1), (1, 3), (3, 1), (2, 3), (3, 3), (1, 29), (1, 200), (200, 1), (7, 700), (5, 11), (13, 14),
  (14, 14), (14, 42), (27, 28), (28, 28), (28, 29), (41, 43), (42, 70), (55, 57), (56, 56),
  (97, 301), (111, 113), (112, 112), (113, 112), (126, 98), (140, 28), (224, 225), (255, 17),
  (301, 97), (333, 334), (448, 448), (449, 447), (480, 640), (37, 901), (999, 61), (768, 1023),
  (15, 16), (16, 48), (31, 32), (32, 32), (33, 32), (47, 49), (63, 65), (160, 32), (41, 8200),
]  # fmt: skip
BOUNDS = [(112 * 112, 112 * 112), (56 * 56, 64 * 28 * 28), (4 * 28 * 28, 1280 * 28 * 28)]


def noise(height: int, width: int) -> np.ndarray:
  return np.random.default_rng(height * 7919 + width).integers(0, 256, (height, width, 3), np.uint8)


def write(path, **settings):
  (path / "preprocessor_config.json").write_text(json.dumps(settings))
  return path


@pytest.mark.parametrize("low, high", BOUNDS)
def test_equals_the_reference_bit_for_bit(tmp_path, low, high):
  reference = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)
  reference.save_pretrained(tmp_path)  # What transformers writes is what we read.
  ours = ImageProcessor.from_directory(tmp_path)
  for height, width in SIZES:
    pixels = noise(height, width)
    # The layout is named: 3 x N x 3 could be read as channels first.
    want = reference(images=[pixels], return_tensors="np", input_data_format="channels_last")
    got = ours.process(pixels)
    assert got.grid == tuple(want["image_grid_thw"][0]), (height, width)
    assert got.size == (14 * got.grid[1], 14 * got.grid[2]) == ours.shown_size(height, width)
    # No tolerance: a byte has 256 values, and ours come from a table made with the reference's own
    # roundings.
    np.testing.assert_array_equal(got.patches, want["pixel_values"], f"{height} x {width}")


def test_equals_the_reference_for_qwen3_vl(qwen3_vl):
  """Patches of 16, mean and deviation 0.5, the published spelling of `size` and class name."""
  reference = Qwen2VLImageProcessorPil.from_pretrained(qwen3_vl)
  ours = ImageProcessor.from_directory(qwen3_vl)
  for height, width in SIZES:
    pixels = noise(height, width)
    want = reference(images=[pixels], return_tensors="np", input_data_format="channels_last")
    got = ours.process(pixels)
    assert got.grid == tuple(want["image_grid_thw"][0]), (height, width)
    assert got.size == (16 * got.grid[1], 16 * got.grid[2]) == ours.shown_size(height, width)
    np.testing.assert_array_equal(got.patches, want["pixel_values"], f"{height} x {width}")
  # 4 * 32 * 32 is the least: a byte v is v / 127.5 - 1.
  black = ours.process(np.zeros((64, 64, 3), np.uint8))
  assert black.grid == (1, 4, 4) and (black.patches == -1).all() and black.interval is None


def test_reads_both_spellings_and_the_older_one_wins(tmp_path):
  old = ImageProcessor.from_directory(write(tmp_path, min_pixels=3136, max_pixels=12845056))
  new = ImageProcessor.from_directory(
    write(tmp_path, size={"shortest_edge": 3136, "longest_edge": 12845056})
  )
  both = ImageProcessor.from_directory(
    write(
      tmp_path, min_pixels=3136, max_pixels=12845056, size={"shortest_edge": 1, "longest_edge": 9}
    )
  )
  bounds = {(p.min_pixels, p.max_pixels) for p in (old, new, both)}
  assert bounds == {(3136, 12845056)}


def test_an_empty_config_means_the_class_defaults(tmp_path):
  reference = Qwen2VLImageProcessorPil()
  ours = ImageProcessor.from_directory(write(tmp_path))
  assert ours.min_pixels == reference.size["shortest_edge"]
  assert ours.max_pixels == reference.size["longest_edge"]
  want = reference(images=[noise(50, 90)], return_tensors="np")["pixel_values"]
  np.testing.assert_array_equal(ours.process(noise(50, 90)).patches, want)


def test_reads_the_combined_processor_file(tmp_path):
  (tmp_path / "processor_config.json").write_text(
    json.dumps({"image_processor": {"min_pixels": 784, "max_pixels": 1568}})
  )
  assert ImageProcessor.from_directory(tmp_path).max_pixels == 1568
  write(tmp_path, max_pixels=7840)  # Read second, as in transformers.
  assert ImageProcessor.from_directory(tmp_path).max_pixels == 1568


def test_order_of_patches(tmp_path):
  """Patch 1 is right of patch 0, 2 below it, 4 opens the next block: not raster order."""
  processor = ImageProcessor.from_directory(write(tmp_path, min_pixels=56 * 56, max_pixels=56 * 56))
  pixels = np.zeros((56, 56, 3), np.uint8)
  patch_rows, patch_columns = np.divmod(np.arange(16), 4)
  for i, (row, column) in enumerate(zip(patch_rows, patch_columns, strict=True)):
    pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 16 * i
  first = processor.process(pixels).patches[:, 0]
  # Raster numbers of the patches in the tower's order; a red byte v is normalised to (v / 255 -
  # mean) / std.
  raster = np.array([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])
  np.testing.assert_allclose(first, (16 * raster / 255 - 0.48145466) / 0.26862954, atol=1e-6)


def test_key_is_of_content_and_size(tmp_path):
  processor = ImageProcessor.from_directory(
    write(tmp_path, min_pixels=28 * 28, max_pixels=112 * 112)
  )
  a, b = noise(56, 56), noise(56, 56)
  b[50, 3, 2] ^= 64
  assert processor.process(a).key == processor.process(a.copy()).key
  assert processor.process(a).key != processor.process(b).key
  flat = [
    processor.process(np.zeros(s, np.uint8)).key for s in ((28, 112, 3), (112, 28, 3), (56, 56, 3))
  ]
  assert len(set(flat)) == 3  # Equal bytes, other sizes.


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_refuses_what_is_too_thin(tmp_path, size):
  processor = ImageProcessor.from_directory(write(tmp_path))
  with pytest.raises(
    ValueError, match=rf"{size[0]} x {size[1]} pixels: the longer side .* 200 times"
  ):
    processor.process(noise(*size))
  with pytest.raises(ValueError, match="0 x 5 pixels is empty"):
    processor.shown_size(0, 5)


def test_refuses_a_directory_it_cannot_serve(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
    ImageProcessor.from_directory(tmp_path)
  with pytest.raises(ValueError, match="do_rescale is false"):
    ImageProcessor.from_directory(write(tmp_path, do_rescale=False))
  with pytest.raises(ValueError, match=r"min_pixels 9 must be in \[1, max_pixels = 4\]"):
    ImageProcessor.from_directory(write(tmp_path, min_pixels=9, max_pixels=4))


@pytest.mark.parametrize(
  "bad", [noise(4, 4).astype(np.float32), noise(4, 4)[:, :, :2], noise(4, 4)[0]]
)
def test_takes_only_rgb_bytes(tmp_path, bad):
  with pytest.raises(Exception, match="pixels"):  # jaxtyping's check, on in tests.
    ImageProcessor.from_directory(write(tmp_path)).process(bad)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_read_image_equals_the_reference(tmp_path, mode, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(noise(20, 30)).convert(mode).save(tmp_path / "a.png", exif=exif)
  pixels = read_image(tmp_path / "a.png")
  np.testing.assert_array_equal(pixels, np.array(load_image(str(tmp_path / "a.png"))))
  assert pixels.shape == ((30, 20, 3) if orientation == 6 else (20, 30, 3))


def test_read_image_names_what_it_cannot_read(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  with pytest.raises(FileNotFoundError, match="there is no image .*a.png"):
    read_image(path)
  Image.fromarray(noise(90, 90)).save(path)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 90 // 2 - 1)
  with pytest.raises(ValueError, match="a.png cannot be read: .*decompression bomb"):
    read_image(path)
  monkeypatch.undo()
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(ValueError, match="a.png cannot be read"):
    read_image(path)


def test_damaged_settings_are_named(tmp_path):
  for content, said in (("{", "is not JSON"), ("[]", "must be a JSON object")):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"preprocessor_config.json {said}"):
      ImageProcessor.from_directory(tmp_path)
