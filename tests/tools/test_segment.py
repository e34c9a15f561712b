import math
from functools import partial

import cv2
import numpy as np
import pytest
from scipy import ndimage

from pixelis_jax.data import composites
from pixelis_jax.tools import places, schema, segment
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.views import IDENTITY, VIEWS
from pixelis_jax.types import Box, Mask, Picture, Task, ToolResult, Video

VIEW = {view.name: view for view in VIEWS}


def scene(height=120, width=160, x=100.0, y=50.0, radius=24.0, sigma=6.0):
  """A reddish disc on a greenish ground, with noise; and its exact mask."""
  rows, columns = np.mgrid[:height, :width] + 0.5
  inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
  pixels = np.where(inside[..., None], (190, 60, 50), (60, 120, 70)).astype(np.float64)
  pixels += np.random.default_rng(0).normal(0, sigma, pixels.shape)
  return np.clip(pixels, 0, 255).astype(np.uint8), inside


PIXELS, INSIDE = scene()


def sight(pixels=PIXELS, *, results=(), view=IDENTITY, scale=1, videos=(), **kwargs):
  task = Task(id="a", images=(pixels,), question="?", answer=None, videos=videos)
  shown_size = lambda h, w: (scale * h, scale * w)
  return Sight(task=task, results=results, shown_size=shown_size, view=view, **kwargs)


def run(arguments, seen=None, **kwargs):
  schema.check(arguments, segment.SEGMENT_OBJECT_AT["function"]["parameters"])
  return segment.segment_object_at(arguments, seen or sight(), **kwargs)


def whole(mask, shape):
  """The mask in all of its image."""
  full = np.zeros(shape, bool)
  x, y = int(mask.box.x0), int(mask.box.y0)
  full[y : y + mask.inside.shape[0], x : x + mask.inside.shape[1]] = mask.inside
  return full


def iou(a, b):
  return (a & b).sum() / (a | b).sum()


def corners(box):
  return box.x0, box.y0, box.x1, box.y1


# The disc is 24 in radius: an outline that is off by a whole pixel has an overlap of
# (23 / 24)^2 = 0.92.
CLOSE = 0.92


@pytest.mark.parametrize(
  "where", [{"point_2d": [100, 50]}, {"point_2d": [90, 62]}, {"bbox_2d": [76, 26, 124, 74]}]
)
def test_the_object_is_found(where):
  result = run(where)
  (mask,) = result.masks
  assert (mask.source, mask.frame) == (0, None)
  assert iou(whole(mask, INSIDE.shape), INSIDE) > CLOSE
  assert mask.inside.any(0).all() and mask.inside.any(1).all()  # No empty side: the box is tight.
  area = int(mask.inside.sum())
  x0, y0, x1, y1 = (int(c) for c in corners(mask.box))
  told = f"Mask 1: {area:,} pixels, box [{x0}, {y0}, {x1}, {y1}], covers"
  # 24^2 pi = 1810 of 120 x 160 pixels are 9.4%.
  assert result.text.startswith(told) and 9.0 < float(result.text.split()[-4][:-1]) < 9.9
  assert result.text.endswith("% of the image.")


@pytest.mark.parametrize("where", [{"point_2d": [100, 50]}, {"bbox_2d": [76, 26, 124, 74]}])
@pytest.mark.parametrize(
  "change", [partial(composites.darkened, light=0.06), partial(composites.noisy, sigma=40.0)]
)
def test_an_object_is_found_in_noise_that_exceeds_its_contrast(where, change):
  """25 levels of red and 10 of green and blue apart. As it is, the point finds a seventh of it and
  the box nothing; cleared, the edge is off by less than a pixel: CLOSE, and nearly.
  """
  flat = np.where(INSIDE[..., None], (120, 100, 90), (95, 110, 100)).astype(np.uint8)
  (mask,) = run(where, sight(change(flat, np.random.default_rng(0)))).masks
  assert iou(whole(mask, INSIDE.shape), INSIDE) > CLOSE - 0.02


def test_masks_are_numbered_over_the_episode():
  first = run({"point_2d": [100, 50]})
  second = run({"point_2d": [100, 50]}, sight(results=[first]))
  assert second.text == first.text.replace("Mask 1", "Mask 2")
  assert places.mask(sight(results=[first, second]), 2) is second.masks[0]


def test_coordinates_are_those_shown():
  """Shown at thrice its size, the same place gives the same mask, told there."""
  (mask,) = run({"bbox_2d": [76, 26, 124, 74]}).masks
  result = run({"bbox_2d": [228, 78, 372, 222]}, sight(scale=3))
  np.testing.assert_array_equal(result.masks[0].inside, mask.inside)
  assert f"box {[3 * int(c) for c in corners(mask.box)]}," in result.text


@pytest.mark.parametrize("where", [{"point_2d": [60, 40]}, {"bbox_2d": [12, -8, 108, 88]}])
def test_a_mask_from_a_crop_lies_in_the_source(where):
  """The crop from (70, 30) on is shown at twice its size: there the centre is at (60, 40)."""
  box = Box(70.0, 30.0, 130.0, 90.0)
  crop = Picture(pixels=PIXELS[30:90, 70:130], source=0, box=box)
  seen = sight(results=[ToolResult(text="", images=(crop,))], scale=2)
  result = run({**where, "image": 2}, seen)
  (mask,) = result.masks
  overlap = iou(whole(mask, INSIDE.shape), INSIDE)
  if "point_2d" in where:
    assert overlap > CLOSE
  else:  # The box is cut at the crop's upper edge, y = 30: the object below is found.
    assert overlap > CLOSE - 16 * 4 / 1810  # A cap 4 high has less than 2 * 16 * 4 * 2 / 3 pixels.
  # The share is of the crop as shown: 1810 of 3600 pixels.
  assert 45 < float(result.text.split("covers ")[1].split("%")[0]) < 53


def test_a_frame_of_a_video_is_segmented_where_it_is():
  frames = np.stack([np.zeros_like(PIXELS), PIXELS])
  video = Video(frames=frames, times=np.float32([0, 1]))
  frame = Picture(pixels=PIXELS, source=0, box=Box(0.0, 0.0, 160.0, 120.0), frame=1)
  seen = sight(
    np.zeros_like(PIXELS), results=[ToolResult(text="", images=(frame,))], videos=(video,)
  )
  result = run({"point_2d": [100, 50], "image": 2}, seen)
  (mask,), (overlay,) = result.masks, result.images
  assert mask.frame == overlay.frame == 1
  assert iou(whole(mask, INSIDE.shape), INSIDE) > CLOSE


@pytest.mark.parametrize("arguments", [{}, {"point_2d": [1, 1], "bbox_2d": [0, 0, 9, 9]}])
def test_one_place_is_needed(arguments):
  with pytest.raises(Mistake, match="give either point_2d or bbox_2d"):
    run(arguments)


@pytest.mark.parametrize("where", [{"point_2d": [100, 50]}, {"bbox_2d": [76, 26, 124, 74]}])
def test_the_same_call_gives_the_same_mask(where):
  first = run(where).masks[0]
  cv2.setRNGSeed(77)
  np.random.default_rng(5).random()
  second = run(where).masks[0]
  np.testing.assert_array_equal(first.inside, second.inside)
  assert corners(first.box) == corners(second.box)


def prompts(arguments, view):
  """What is asked of the segmenter under a view: (function, the part's shape, the prompt)."""
  asked = []

  def compute(function, *given):
    asked.append((function, *given))
    return function(*given)

  run(arguments, sight(view=view, compute=compute))
  return asked[0]


def test_a_view_moves_the_prompt_by_its_jitter():
  function, part, box = prompts({"bbox_2d": [76, 26, 124, 74]}, VIEW["down_right"])
  # A tenth of 48 to (80.8, 30.8); the part reaches half the box further: 56.8 to 152.8 across.
  assert function is segment.grabcut and part.shape == (97, 97, 3)
  np.testing.assert_allclose(box, (24.8, 24.8, 72.8, 72.8))
  # A point counts as a tenth of the picture wide: a tenth of 16 and of 12.
  _, part, point = prompts({"point_2d": [100, 50]}, VIEW["up_left"])
  assert part.shape == PIXELS.shape
  np.testing.assert_allclose(point, (98.4, 48.8))


def test_the_picture_shows_the_object_with_a_margin_and_can_be_pointed_at():
  result = run({"bbox_2d": [76, 26, 124, 74]})
  (mask,), (overlay,) = result.masks, result.images
  assert overlay.box.holds(mask.box)
  # A quarter of the longer side and 2 pixels on each side, widened to whole pixels.
  side = max(mask.box.width, mask.box.height)
  assert overlay.box.x0 == math.floor(mask.box.x0 - side / 4 - 2)
  assert max(overlay.pixels.shape) == 224  # Enlarged, so that the outline can be seen.
  # A box in that picture is resolved to the source: its middle half.
  height, width = overlay.pixels.shape[:2]
  seen = sight(results=[result])
  again = places.box(
    {"bbox_2d": [width / 4, height / 4, width * 3 / 4, height * 3 / 4]}, seen.shown()[1]
  )
  np.testing.assert_allclose(again.center, overlay.box.center)
  np.testing.assert_allclose(again.width, overlay.box.width / 2)


@pytest.mark.parametrize("name", ["identity", "rotate+30", "invert", "wide"])
def test_pointing_at_the_outline_is_pointing_at_the_objects_edge(name):
  """In a turned picture too. A triangle, as a turn the wrong way would leave a disc in place."""
  inside = np.tril(np.ones((50, 30), bool))
  mask = Mask(inside=inside, source=0, box=Box(90.0, 30.0, 120.0, 80.0))
  view = VIEW[name]
  overlay = segment.picture(mask, sight(view=view))
  shown = sight(view=view, results=[ToolResult(text="", images=(overlay,))]).shown()[1]
  is_line = (overlay.pixels == (255, 0, 255)).all(2) | (overlay.pixels == (0, 255, 0)).all(2)
  height, width = is_line.shape
  lines = np.argwhere(is_line)[::50] + 0.5
  assert len(lines) > 10
  around = np.pad(whole(mask, INSIDE.shape), 1)
  edges = ndimage.distance_transform_edt(around) + ndimage.distance_transform_edt(~around)
  for y, x in lines:
    source = shown.to_source(
      x / width - 0.01, y / height - 0.01, x / width + 0.01, y / height + 0.01
    )
    at, down = (math.floor(c) + 1 for c in source.center)
    assert edges[down, at] <= 2.5  # Half the line, half a pixel of the mask, and the turn's.


def test_the_outline_stands_out_from_the_object():
  inside = np.ones((50, 50), bool)
  like_magenta = np.full((50, 50, 3), (230, 20, 220), np.uint8)
  for pixels, line in ((like_magenta, (0, 255, 0)), (like_magenta[..., ::-1] // 4, (255, 0, 255))):
    drawn = segment.overlay(np.ascontiguousarray(pixels), inside)
    assert (drawn == line).all(2).sum() >= 4 * 200  # Along the four sides of 224 pixels.


def test_a_large_object_is_shown_small():
  pixels = np.full((900, 1200, 3), 90, np.uint8)
  assert segment.overlay(pixels, pixels[..., 0] > 0).shape == (336, 448, 3)


def in_a_corner():
  """A bright square, 30 to 40 both ways."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(100, 112, (120, 160, 3), np.uint8)
  pixels[30:40, 30:40] = rng.integers(190, 202, (10, 10, 3), np.uint8)
  return pixels


def test_a_mask_that_leaves_most_of_its_box_is_doubtful():
  text = run({"bbox_2d": [30, 30, 70, 70]}, sight(in_a_corner())).text
  assert text.endswith(" It may be wrong: it fills only part of the box.")
  for where in ({"bbox_2d": [30, 30, 40, 40]}, {"bbox_2d": [28, 27, 41, 42]}):
    assert run(where, sight(in_a_corner())).text.endswith("% of the image.")


def test_a_point_where_guesses_differ_is_told_so():
  """Noise has no outlines."""
  pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
  assert "It may be wrong: " in run({"point_2d": [80, 60]}, sight(pixels)).text


def test_nothing_found_is_a_mistake():
  """What the box holds is in its surroundings too: the same bright square goes on."""
  with pytest.raises(Mistake, match="no object was found there: try a box around it, or a point"):
    run({"bbox_2d": [32, 32, 38, 38]}, sight(in_a_corner()))


def test_the_whole_picture_as_a_box_still_finds_what_is_in_it():
  (mask,) = run({"bbox_2d": [0, 0, 160, 120]}).masks
  assert iou(whole(mask, INSIDE.shape), INSIDE) > CLOSE


@pytest.mark.parametrize("shape", [(2, 2), (3, 200), (200, 3), (30, 3000)])
def test_pictures_of_any_shape_are_taken(shape):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  for where in ({"point_2d": [shape[1] - 1, 0]}, {"bbox_2d": [0, 0, 2, 2]}):
    try:
      (mask,) = run(where, sight(pixels)).masks
    except Mistake as e:
      assert "no object was found" in str(e)
    else:
      assert Box(0.0, 0.0, float(shape[1]), float(shape[0])).holds(mask.box)


def test_the_work_does_not_grow_with_the_picture(monkeypatch):
  """Of 2 megapixels GrabCut sees as little as of 20 thousand, and the mask is as good."""
  seen = []
  cut = cv2.grabCut
  monkeypatch.setattr(cv2, "grabCut", lambda *a: (seen.append(a[0].size), cut(*a))[1])
  pixels, inside = scene(1500, 1500, 750.0, 700.0, 300.0)
  for where in ({"point_2d": [750, 700]}, {"bbox_2d": [450, 400, 1050, 1000]}):
    (mask,) = run(where, sight(pixels)).masks
    assert iou(whole(mask, inside.shape), inside) > 0.97  # A pixel at 256 is 0.8% of the radius.
  # A box of 256 and 0.3 of it around: 410.
  assert len(seen) == 6 and max(seen) <= 410 * 410 * 3


def field(number, value):
  """A protobuf field: an integer, or text, bytes or an encoded message."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  raw = value.encode() if isinstance(value, str) else value
  return varint(number << 3 | 2) + varint(len(raw)) + raw


def varint(value):
  low, rest = value & 127, value >> 7
  return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def node(operation, inputs, output, **attributes):
  """NodeProto; attributes are lists of integers or one integer or text."""
  encoded = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, operation)
  for name, value in attributes.items():
    if isinstance(value, list):
      body, kind = b"".join(field(8, v) for v in value), 7
    else:
      body, kind = (field(4, value), 3) if isinstance(value, str) else (field(3, value), 2)
    encoded += field(5, field(1, name) + body + field(20, kind))
  return encoded


def graph(nodes, constants, inputs, outputs):
  """ModelProto of opset 13. Values are float32; a size that is text is any."""

  def tensor(name, array):
    kind = {"float32": 1, "int64": 7}[array.dtype.name]
    dims = b"".join(field(1, n) for n in array.shape)
    return dims + field(2, kind) + field(8, name) + field(9, array.tobytes())

  def value(name, shape):
    dims = b"".join(field(1, field(1 if isinstance(n, int) else 2, n)) for n in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

  body = b"".join(field(1, n) for n in nodes) + field(2, "graph")
  body += b"".join(field(5, tensor(*item)) for item in constants.items())
  body += b"".join(field(11, value(*item)) for item in inputs.items())
  body += b"".join(field(12, value(*item)) for item in outputs.items())
  return field(1, 8) + field(7, body) + field(8, field(1, "") + field(2, 13))


def an_encoder():
  """The embedding is the picture itself, in cells of 16 pixels."""
  pool = node("AveragePool", ["x"], "embedding", kernel_shape=[16, 16], strides=[16, 16])
  return graph([pool], {}, {"x": (1, 3, 1024, 1024)}, {"embedding": (1, 3, 64, 64)})


def a_decoder():
  """Two masks, what is bright and what is not; it is sure of the bright one right of x = 512."""
  nodes = [
    node("ReduceMean", ["image_embeddings"], "low_res_masks", axes=[1], keepdims=1),
    node("Resize", ["low_res_masks", "", "enlarge"], "large", mode="nearest"),
    node("Cast", ["orig_im_size"], "ends", to=7),
    node("Slice", ["large", "zeros", "ends", "axes"], "bright"),
    node("Neg", ["bright"], "dark"),
    node("Concat", ["bright", "dark"], "masks", axis=1),
    node("Slice", ["point_coords", "zeros", "ones", "axes12"], "first"),
    node("Reshape", ["first", "ones"], "x"),
    node("Sub", ["x", "middle"], "right"),
    node("Neg", ["right"], "left"),
    node("Concat", ["right", "left"], "iou_predictions", axis=1),
  ]
  constants = {
    "enlarge": np.float32([1, 1, 16, 16]),
    "zeros": np.int64([0, 0]),
    "ones": np.int64([1, 1]),
    "axes": np.int64([2, 3]),
    "axes12": np.int64([1, 2]),
    "middle": np.float32([[512]]),
  }
  inputs = {
    "image_embeddings": (1, 3, 64, 64),
    "point_coords": (1, "n", 2),
    "point_labels": (1, "n"),
    "mask_input": (1, 1, 256, 256),
    "has_mask_input": (1,),
    "orig_im_size": (2,),
  }
  outputs = {
    "masks": (1, 2, "height", "width"),
    "iou_predictions": (1, 2),
    "low_res_masks": (1, 1, 64, 64),
  }
  return graph(nodes, constants, inputs, outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sam")
  (folder / segment.ENCODER).write_bytes(an_encoder())
  (folder / segment.DECODER).write_bytes(a_decoder())
  return str(folder)


class TestSam:
  """A graph of a few operations with the inputs and outputs of the real ones, really run."""

  def test_the_picture_is_prepared_as_the_model_was_trained(self):
    pixels = np.zeros((50, 200, 3), np.uint8)
    pixels[..., 0] = 255
    image, resized = segment.sam_image(pixels)
    # 1024 / 200 = 5.12: 256 of 1024 rows; (255 - 123.675) / 58.395 and (0 - 116.28) / 57.12.
    assert resized == (256, 1024) and image.shape == (1, 3, 1024, 1024)
    np.testing.assert_allclose(image[0, :2, 255, 1023], (2.2489, -2.0357), atol=1e-4)
    assert not image[0, :, 256:].any()

  def test_prompts_are_in_the_models_pixels(self):
    # 50 x 200 becomes 256 x 1024, so 5.12 a pixel.
    at, labels = segment.sam_prompt((10.0, 20.0), (50, 200), (256, 1024))
    np.testing.assert_allclose(at, [[[51.2, 102.4], [0, 0]]], rtol=1e-6)
    np.testing.assert_array_equal(labels, [[1, -1]])
    at, labels = segment.sam_prompt((10.0, 20.0, 30.0, 40.0), (50, 200), (256, 1024))
    np.testing.assert_allclose(at, [[[51.2, 102.4], [153.6, 204.8]]], rtol=1e-6)
    np.testing.assert_array_equal(labels, [[2, 3]])
    assert at.dtype == labels.dtype == np.float32

  def test_a_mask_is_where_the_logits_are_above_0(self):
    logits = np.full((4, 8), -1.0, np.float32)
    logits[:, 4:] = 3.0
    # Between the centres of columns 3 and 4, at 3.5 and 4.5, zero is crossed a quarter of the way:
    # at 3.75 of 8, so at 37.5 of 80: the centre of pixel 37 is exactly there and not above.
    mask = segment.sam_mask(logits, (40, 80))
    assert mask.shape == (40, 80) and not mask[:, :38].any() and mask[:, 38:].all()

  def test_the_model_is_asked_and_its_surest_mask_is_taken(self, folder):
    pixels, inside = scene()  # 160 wide: 6.4 of the model's pixels each.
    grey = np.where(inside, 230, 20).astype(np.uint8)[..., None].repeat(3, 2)
    tool = partial(segment.segment_object_at, segmenter=folder)
    # At (100, 50), in the model's 640: bright. A cell is 2.5 pixels, of a radius of 24.
    (mask,) = tool({"point_2d": [100, 50]}, sight(grey)).masks
    assert iou(whole(mask, inside.shape), inside) > 0.9
    # At (70, 50), in its 448: what is dark.
    (mask,) = tool({"point_2d": [70, 50]}, sight(grey)).masks
    assert iou(whole(mask, inside.shape), ~inside) > 0.97

  def test_the_model_sees_what_is_around_a_box(self, folder):
    """The box 76 to 124 in a part from 52 on, 96 wide: its corner at 24 of 96, left of the middle.

    So the stand-in is sure of the dark mask, inside the part: 96 of 160 x 120 pixels, 98 high.
    """
    _, inside = scene()
    grey = np.where(inside, 230, 20).astype(np.uint8)[..., None].repeat(3, 2)
    result = segment.segment_object_at(
      {"bbox_2d": [76, 26, 124, 74]}, sight(grey), segmenter=folder
    )
    assert corners(result.masks[0].box) == (52, 2, 148, 98)

  def test_an_unsure_model_is_told(self, folder):
    grey = np.full((120, 160, 3), 230, np.uint8)
    asked = {"point_2d": [80.01, 50]}
    text = segment.segment_object_at(asked, sight(grey), segmenter=folder).text
    assert text.endswith("It may be wrong: the model itself is unsure.")  # 80.01 * 6.4 = 512.06.

  def test_a_folder_without_a_model_is_refused(self, folder, tmp_path):
    segment.check_segmenter(folder)
    with pytest.raises(ValueError, match="holds encoder.onnx and decoder.onnx: there is no "):
      segment.check_segmenter(str(tmp_path))
