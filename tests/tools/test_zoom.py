import numpy as np
import pytest

from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.tools.views import VIEWS
from pixelis_jax.types import Box, Picture, Task, ToolCall, ToolResult


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


SOURCE = noise(448, 448)
TASK = Task(id="a", images=(SOURCE,), question="?", answer=None)


def shown_at_112(height, width):
  return 112, 112


def as_it_is(height, width):
  return height, width


def run(arguments, *, preset="qwen", task=TASK, results=(), shown_size=shown_at_112, **kwargs):
  toolbox = Toolbox(["zoom_in"], shown_size=shown_size, preset=preset)
  (name,) = toolbox.tools
  return toolbox.run(ToolCall(name=name, arguments=arguments), task, results, **kwargs)


def box_of(result):
  assert result.error is None, result.error
  (picture,) = result.images
  return picture.box.x0, picture.box.y0, picture.box.x1, picture.box.y1


def test_coordinates_are_pixels_as_shown_and_the_crop_is_of_the_source():
  result = run({"bbox_2d": [34, 56, 44, 66]})
  # 448 / 112 = 4 source pixels a shown pixel.
  assert box_of(result) == (136, 224, 176, 264)
  np.testing.assert_array_equal(result.images[0].pixels, SOURCE[224:264, 136:176])
  assert result.text == "Here is the zoomed image."


def test_the_axes_scale_apart():
  task = Task(id="a", images=(noise(112, 896),), question="?", answer=None)
  # Width 8 source pixels a shown pixel, height 1.
  assert box_of(run({"bbox_2d": [10, 20, 30, 40]}, task=task)) == (80, 20, 240, 40)


def test_a_box_beyond_the_image_is_clipped():
  assert box_of(run({"bbox_2d": [-5, 100, 20, 500.5]})) == (0, 400, 80, 448)


def test_image_selects_task_images_then_earlier_pictures():
  task = Task(id="a", images=(SOURCE, noise(448, 448, 1)), question="?", answer=None)
  first = run({"bbox_2d": [0, 0, 56, 56], "image": 2}, task=task)
  assert first.images[0].source == 1
  np.testing.assert_array_equal(first.images[0].pixels, task.images[1][:224, :224])
  # Image 3 is that crop, shown at 112 x 112: 2 source pixels a shown pixel, from (0, 0) of image 2.
  second = run({"bbox_2d": [10, 20, 30, 40], "image": 3}, task=task, results=[first])
  assert (second.images[0].source, box_of(second)) == (1, (20, 40, 60, 80))
  np.testing.assert_array_equal(second.images[0].pixels, task.images[1][40:80, 20:60])


def test_zooming_thrice_resolves_to_the_source():
  a = run({"bbox_2d": [28, 28, 84, 84]})  # Source 112 to 336.
  b = run({"bbox_2d": [56, 0, 112, 56], "image": 2}, results=[a])  # Its upper right quarter.
  assert box_of(b) == (224, 112, 336, 224)
  c = run({"bbox_2d": [0, 56, 56, 112], "image": 3}, results=[a, b])  # That one's lower left.
  assert box_of(c) == (224, 168, 280, 224)
  failed = ToolResult(text="Error: x", error="x")  # Shows nothing, so it takes no number.
  assert box_of(run({"bbox_2d": [0, 56, 56, 112], "image": 3}, results=[a, failed, b])) == box_of(c)


@pytest.mark.parametrize(
  "arguments, wrong",
  [
    ({"bbox_2d": [44, 56, 34, 66]}, r"\[44, 56, 34, 66\] must satisfy 0 <= x1 < x2 <= 112"),
    ({"bbox_2d": [34, 66, 44, 66]}, "0 <= y1 < y2 <= 112"),
    ({"bbox_2d": [120, 0, 130, 10]}, "must satisfy"),
    ({"bbox_2d": [10, 10, 11.5, 20]}, "too small: 1.5 x 10 pixels, at least 2 x 2 needed"),
    ({"bbox_2d": [0, 0, 112, 1]}, "too thin: 112 x 1 pixels, at most 100 to 1"),
    ({"bbox_2d": [0, 0, 9, 9], "image": 2}, "`image` 2: choose one of the images 1 to 1"),
    ({"bbox_2d": [0, 0, 9, 9], "image": 0}, "image must be in"),
    ({"bbox_2d": [0, 0, 9]}, "bbox_2d must have 4 items, not 3"),
    ({"bbox_2d": [0, 0, 1e200, 1e200]}, None),
    ({}, "missing argument 'bbox_2d'"),
    ({"bbox_2d": [0, 0, 9, 9], "label": "x"}, "unknown argument 'label'"),
  ],
)
def test_mistakes_are_told(arguments, wrong):
  result = run(arguments)
  if wrong is None:  # Clipped: huge is not wrong.
    assert box_of(result) == (0, 0, 448, 448)
    return
  assert result.images == () and result.text == f"Error: {result.error}"
  with pytest.raises(AssertionError, match=wrong):
    raise AssertionError(result.error)


def test_views_reach_the_crop():
  wide = next(v for v in VIEWS if v.name == "wide")
  # 40 * 1.15 = 46 about (156, 244).
  assert box_of(run({"bbox_2d": [34, 56, 44, 66]}, view=wide)) == (133, 221, 179, 267)


class TestPixelReasoner:
  """Source 448 x 448, shown as it is unless said: 0.1 of a side is 44.8 pixels."""

  def run(self, box, target=1, **kwargs):
    arguments = {"bbox_2d": box, "target_image": target}
    return run(arguments, preset="pixel_reasoner", **{"shown_size": as_it_is, **kwargs})

  def test_all_below_one_are_fractions(self):
    # (0.25 - 0.1) * 448 = 67.2 -> 67, (0.5 + 0.1) * 448 = 268.8 -> 269; Pillow rounds.
    assert box_of(self.run([0.25, 0.25, 0.5, 0.5])) == (67, 67, 269, 269)

  def test_exactly_one_means_pixels(self):
    """[0, 0, 1, 1] is not the whole image but its first pixel, padded by 44.8: 45.8 -> 46."""
    assert box_of(self.run([0, 0, 1, 1.0])) == (0, 0, 46, 46)
    assert box_of(self.run([0, 0, 0.999, 0.999])) == (0, 0, 448, 448)

  def test_pixels_are_of_the_source_and_of_a_crop_as_shown(self):
    first = self.run([112, 112, 224, 224], shown_size=shown_at_112)
    # 112 - 44.8 = 67.2 -> 67; 224 + 44.8 = 268.8 -> 269: 202 x 202 source pixels.
    assert box_of(first) == (67, 67, 269, 269)
    second = self.run([28, 28, 56, 56], 2, results=[first], shown_size=shown_at_112)
    # Of 112 shown: 28 - 11.2 = 16.8 -> 17, 56 + 11.2 = 67.2 -> 67. Source: 67 + 17 * 202 / 112 =
    # 97.7, 67 + 67 * 202 / 112 = 187.8, widened to whole pixels.
    assert box_of(second) == (97, 97, 188, 188)

  def test_texts_are_those_the_policies_saw(self):
    result = self.run([0.25, 0.25, 0.5, 0.5], shown_size=lambda h, w: (56, 84))
    assert result.text == "\nHere is the cropped image (Image Size: 84x56):"
    failed = self.run([0.5, 0.5, 0.4, 0.4], target=3)
    assert failed.text == f"\nExecution error:\n{failed.error}\n"

  @pytest.mark.parametrize(
    "box, target, wrong",
    [
      ([0.5, 0.1, 0.2, 0.9], 1, "Coordinate 'right' is less than 'left'"),
      ([0.1, 0.5, 0.9, 0.2], 1, "Coordinate 'lower' is less than 'upper'"),
      # 0.5 - 0.1 to 0.33 + 0.1: 179 to 193.
      ([0.5, 0.1, 0.33, 0.5], 1, "Cropped image is too small: 14x269"),
      ([0.1, 0.1, 0.5, 0.5], 2, "`target_image` 2: choose one of the images 1 to 1"),
      ([0.1, 0.1, 0.5, 0.5], 0, "`target_image` 0"),  # There, the last image.
      ([0.1, 0.1, 0.5, 0.5], 1.5, "`target_image` 1.5"),
      ([0.1, 0.1, 0.5], 1, "must have 4 items, not 3"),
    ],
  )
  def test_mistakes(self, box, target, wrong):
    assert wrong in self.run(box, target).error

  def test_28_pixels_are_too_few_and_29_are_not(self):
    task = Task(id="a", images=(noise(100, 100),), question="?", answer=None)
    # Pixels a to b become a - 10 to b + 10.
    assert "28x30" in self.run([20, 20, 28, 30], task=task).error
    assert box_of(self.run([20, 20, 29, 29], task=task)) == (10, 10, 39, 39)

  def test_the_schema_is_the_one_in_their_prompts(self):
    function = TOOLS["pixel_reasoner"]["zoom_in"].schema["function"]
    assert list(function) == ["name", "description", "parameters"]
    assert list(function["parameters"]["properties"]["bbox_2d"]) == ["type", "description", "items"]
    assert function["parameters"]["required"] == ["bbox_2d", "target_image"]


class TestDeepEyes:
  """Always source pixels of the first image, whatever it is shown at."""

  def run(self, box, **kwargs):
    return run({"bbox_2d": box, "label": "digit"}, preset="deepeyes", **kwargs)

  def test_pixels_of_the_original(self):
    assert box_of(self.run([100, 50, 140, 90])) == (100, 50, 140, 90)
    crop = Picture(pixels=noise(9, 9), source=0, box=Box(1.0, 1.0, 10.0, 10.0))
    again = self.run([100, 50, 140, 90], results=[ToolResult(text="", images=(crop,))])
    assert box_of(again) == (100, 50, 140, 90)

  @pytest.mark.parametrize(
    "box, wrong",
    [
      ([100, 50, 130, 90], "too small: 30 x 40 pixels, more than 30 x 30 needed"),
      ([430, 50, 500, 90], "too small: 18 x 40"),  # After clipping to 448.
      ([100, 90, 140, 50], "must satisfy"),
    ],
  )
  def test_mistakes(self, box, wrong):
    result = self.run(box)
    assert wrong in result.error and result.text.startswith("Error: ")

  def test_31_pixels_are_enough(self):
    assert box_of(self.run([100, 50, 131, 81])) == (100, 50, 131, 81)


def look(box: Box, preset: str, task: Task = TASK):
  """What its own tool shows of a source box."""
  toolbox = Toolbox(["zoom_in"], shown_size=shown_at_112, preset=preset)
  arguments = toolbox.zoom.look(toolbox.sight(task, ()), box)
  result = toolbox.run(ToolCall(name=toolbox.zoom.name, arguments=arguments), task, ())
  return arguments, Box(*box_of(result))


@pytest.mark.parametrize("preset", TOOLS)
@pytest.mark.parametrize("box", [Box(136.0, 224.0, 176.0, 264.0), Box(400.0, 0.0, 448.0, 40.0)])
def test_every_format_can_show_a_box(box, preset):
  arguments, shown = look(box, preset)
  assert shown.holds(box)
  # Pixel-Reasoner's tool adds a tenth of the image on each side, and rounds; the others nothing.
  padding = 45.0 if preset == "pixel_reasoner" else 0.0
  assert shown.width <= box.width + 2 * padding and shown.height <= box.height + 2 * padding
  assert ("target_image" in arguments) == (preset == "pixel_reasoner")


def test_a_small_box_is_widened_to_what_deepeyes_takes():
  # 31 whole pixels about it, of 10: 21 more, 10 of them before it; at an edge as near as it goes.
  _, shown = look(Box(100.5, 200.0, 110.0, 210.0), "deepeyes")
  assert shown == Box(90.0, 190.0, 121.0, 221.0)
  _, shown = look(Box(445.0, -3.0, 450.0, 2.0), "deepeyes")
  assert shown == Box(417.0, 0.0, 448.0, 31.0)
  # More than 30 stay as they are, and where the image has no 31 the tool says so.
  assert look(Box(10.2, 10.0, 41.0, 60.0), "deepeyes")[1] == Box(10.0, 10.0, 41.0, 60.0)
  small = Task(id="b", images=(noise(20, 90),), question="?", answer=None)
  with pytest.raises(AssertionError, match="too small: 31 x 20 pixels, more than 30 x 30"):
    look(Box(10.0, 5.0, 15.0, 10.0), "deepeyes", small)


def test_without_an_image_deepeyes_tool_has_nothing_to_zoom_in_on():
  bare = Task(id="v", images=(), question="?", answer=None)
  result = run({"bbox_2d": [0, 0, 50, 50]}, preset="deepeyes", task=bare)
  assert result.error == "there is no image here to zoom in on"


def test_a_box_on_the_edge_stays_fractions():
  """At exactly 1.0 Pixel-Reasoner's tool would read pixels: those of the first corner."""
  arguments, shown = look(Box(0.0, 0.0, 448.0, 448.0), "pixel_reasoner")
  assert arguments == {"bbox_2d": [0.0, 0.0, 0.999, 0.999], "target_image": 1}
  assert shown == Box(0.0, 0.0, 448.0, 448.0)
