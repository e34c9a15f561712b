"""Objects of known pixels are found from a box and from a point, and what goes wrong is told."""

import re

import numpy as np
import pytest

from pixelis_jax.tools import segment
from pixelis_jax.tools.segment import segment_object_at
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import Box, Task, ToolResult, Video


def disc(height=120, width=160, centre=(90, 50), radius=25):
  """(A rough red disc on rough blue ground, its pixels)."""
  rng = np.random.default_rng(0)
  y, x = np.indices((height, width)) + 0.5
  inside = np.hypot(x - centre[0], y - centre[1]) < radius
  colours = np.where(inside[..., None], (200, 40, 30), (40, 70, 170))
  return np.clip(colours + rng.normal(0, 12, colours.shape), 0, 255).astype(np.uint8), inside


PIXELS, INSIDE = disc()


def sight(pixels=PIXELS, results=(), view=IDENTITY, videos=()):
  task = Task(id="a", images=(pixels,), question="?", answer=None, videos=videos)
  return Sight(task=task, results=results, shown_size=lambda h, w: (h, w), view=view)


def iou(mask, inside=INSIDE):
  whole = np.zeros(inside.shape, bool)
  box = mask.box
  whole[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = mask.inside
  return (whole & inside).sum() / (whole | inside).sum()


@pytest.mark.parametrize("given", [{"bbox_2d": [63, 23, 117, 77]}, {"point_2d": [95, 45]}])
def test_a_disc_is_found(given):
  """One ring of wrong pixels around a radius of 25 would be 8% of its area."""
  result = segment_object_at(given, sight())
  (mask,), (picture,) = result.masks, result.images
  assert iou(mask) > 0.92
  assert mask.inside.any(1).all() and mask.inside.any(0).all()  # The box is tight.
  assert (mask.source, mask.frame) == (0, None)
  assert picture.box.holds(mask.box) and picture.pixels.shape[0] >= 100
  text = re.sub(r"(\d),(\d{3})", r"\1\2", result.text)  # Thousands have a comma.
  told = re.match(r"Mask (\d+): (\d+) pixels, box \[(\d+), (\d+), (\d+), (\d+)\],", text)
  number, area, *corners = map(int, told.groups())
  assert number == 1 and area == mask.inside.sum()
  np.testing.assert_allclose(corners, (65, 25, 115, 75), atol=2)
  # 1,963 of 19,200 pixels are 10.2%.
  assert re.search(r"covers (9|10)\.\d% of the image\.$", result.text), result.text


def test_the_same_call_gives_the_same_mask():
  masks = [segment_object_at({"point_2d": [95, 45]}, sight()).masks[0] for _ in range(2)]
  np.testing.assert_array_equal(masks[0].inside, masks[1].inside)


def test_a_mask_of_a_crop_is_in_source_pixels_and_the_next_number():
  """The crop begins at (50, 10): (45, 35) in it is (95, 45)."""
  crop = sight().crop(0, Box(50.0, 10.0, 150.0, 110.0))
  first = segment_object_at({"point_2d": [95, 45]}, sight())
  see = sight(results=(ToolResult(text="", images=(crop,)), first))
  result = segment_object_at({"point_2d": [45, 35], "image": 2}, see)
  assert result.text.startswith("Mask 2: ") and iou(result.masks[0]) > 0.9


def test_a_frame_of_a_video_has_masks_too():
  blank = np.full_like(PIXELS, 90)
  video = Video(frames=np.stack([blank, PIXELS]), times=np.arange(2, dtype=np.float32))
  see = sight(blank, videos=(video,))
  frame = see.crop(0, Box(0.0, 0.0, 160.0, 120.0), 1)
  see = sight(blank, [ToolResult(text="", images=(frame,))], videos=(video,))
  result = segment_object_at({"bbox_2d": [63, 23, 117, 77], "image": 2}, see)
  assert result.masks[0].frame == result.images[0].frame == 1 and iou(result.masks[0]) > 0.92


def test_the_overlay_shows_outline_and_object():
  """Along the middle row: ground, outline, tinted red, outline, ground."""
  result = segment_object_at({"bbox_2d": [63, 23, 117, 77]}, sight())
  (picture,) = result.images
  row = picture.pixels[picture.pixels.shape[0] // 2].astype(int)
  at = lambda x: row[round((x - picture.box.x0) / picture.box.width * len(row))]
  np.testing.assert_allclose(at(60), (40, 70, 170), atol=45)
  # 3/4 red and 1/4 of the tint that is farther from red: green.
  np.testing.assert_allclose(at(90), (150, 94, 22), atol=40)
  assert any(tuple(p) == (0, 255, 0) for p in row)


def test_a_views_jitter_moves_the_prompt():
  """Half a box to the right, a point on the disc's edge is beside it."""
  there = View(name="there", dx=4.0)
  with_view = segment_object_at({"point_2d": [110, 50]}, sight(view=there))
  assert iou(with_view.masks[0]) < 0.3


@pytest.mark.parametrize(
  "given, message",
  [
    ({}, "give either point_2d or bbox_2d"),
    ({"point_2d": [1, 1], "bbox_2d": [0, 0, 9, 9]}, "give either point_2d or bbox_2d"),
    ({"point_2d": [160, 10]}, r"point_2d \[160, 10\] must satisfy 0 <= x < 160"),
    ({"bbox_2d": [0, 0, 1, 1]}, "bbox_2d is too small"),
    ({"point_2d": [5, 5], "image": 2}, "choose one of the images 1 to 1"),
  ],
)
def test_mistakes_are_told(given, message):
  with pytest.raises(Mistake, match=message):
    segment_object_at(given, sight())


def test_a_large_image_costs_no_more():
  """Of 40 megapixels a window is reduced to the size that small ones have."""
  big = np.kron(PIXELS, np.ones((40, 40, 1), np.uint8))
  result = segment_object_at({"point_2d": [95 * 40, 45 * 40]}, sight(big))
  assert iou(result.masks[0], np.kron(INSIDE, np.ones((40, 40), bool))) > 0.9


def test_a_folder_without_the_models_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"must hold encoder.onnx and decoder.onnx: there is no enc"):
    segment.with_segmenter(str(tmp_path))


def test_the_encoder_is_given_what_segment_anything_gives_it():
  """200 x 100 pixels become 1024 x 512; the lower half is padding. White is (255 - mean) / std."""
  image, size = segment.sam_image(np.full((100, 200, 3), 255, np.uint8))
  assert image.shape == (1, 3, 1024, 1024) and size == (512, 1024)
  white = [(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375]
  np.testing.assert_allclose(image[0, :, 0, 0], white, rtol=1e-5)
  assert not image[0, :, 512:].any()


def test_prompts_are_scaled_to_the_encoders_input():
  """A point has a padding point labelled -1 beside it; a box's corners are 2 and 3."""
  points, labels = segment.sam_prompt((50.0, 25.0), (100, 200), (512, 1024))
  np.testing.assert_allclose(points, [[[256, 128], [0, 0]]])
  assert labels.tolist() == [[1, -1]]
  points, labels = segment.sam_prompt((0.0, 10.0, 200.0, 100.0), (100, 200), (512, 1024))
  np.testing.assert_allclose(points, [[[0, 51.2], [1024, 512]]])
  assert labels.tolist() == [[2, 3]]


def test_logits_become_a_mask_of_the_images_size():
  logits = np.full((8, 8), -1.0, np.float32)
  logits[:, 4:] = 1.0
  mask = segment.sam_mask(logits, (16, 32))
  assert mask.shape == (16, 32) and mask[:, 17:].all() and not mask[:, :15].any()
