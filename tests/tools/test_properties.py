import math

import numpy as np
import pytest
from skimage.color import rgb2gray
from skimage.draw import polygon2mask
from skimage.feature import graycomatrix, graycoprops
from skimage.measure import regionprops

from pixelis_jax.tools import properties, schema
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.views import IDENTITY, VIEWS
from pixelis_jax.types import Box, Mask, Picture, Task, ToolResult, Video

RED, BLUE, WHITE = (220, 30, 30), (30, 60, 200), (250, 250, 250)
VIEW = {view.name: view for view in VIEWS}


def plain(height=120, width=160, color=BLUE):
  return np.full((height, width, 3), color, np.uint8)


def disc(radius, x=0.0, y=0.0):
  """A mask with the disc about its middle, moved by parts of a pixel."""
  reach = math.ceil(radius) + 2
  rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
  return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def polygon(corners, degrees=0.0, size=160):
  """(x, y) corners about the middle, turned counter-clockwise as seen: y points down."""
  turn = math.radians(degrees)
  x, y = np.array(corners, float).T
  seen = np.stack(
    [x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)]
  )
  return polygon2mask((size, size), seen[::-1].T + size / 2)


def bar(width, height):
  return [(-width / 2, -height / 2), (width / 2, -height / 2)] + [
    (width / 2, height / 2),
    (-width / 2, height / 2),
  ]


def regular(count, radius, inner=1.0):
  """With `inner`, a star: every other corner at that part of the radius."""
  count = count if inner == 1.0 else 2 * count
  return [
    (radius * r * math.cos(2 * math.pi * i / count), radius * r * math.sin(2 * math.pi * i / count))
    for i, r in zip(range(count), [1.0, inner] * count, strict=False)
  ]


def sight(pixels, *masks, view=IDENTITY, results=(), scale=(1, 1), videos=()):
  images = () if pixels is None else (pixels,)
  task = Task(id="a", images=images, question="?", answer=None, videos=videos)
  return Sight(
    task=task,
    results=[*results, ToolResult(text="", masks=masks)],
    shown_size=lambda h, w: (int(scale[0] * h), int(scale[1] * w)),
    view=view,
  )


def mask(inside, x=0, y=0, **where):
  height, width = inside.shape
  box = Box(float(x), float(y), float(x + width), float(y + height))
  return Mask(inside=inside, box=box, **{"source": 0, **where})


def lines(arguments, seen):
  schema.check(arguments, properties.GET_PROPERTIES["function"]["parameters"])
  result = properties.get_properties(arguments, seen)
  assert result.images == result.masks == () and result.error is None
  title, *rest = result.text.splitlines()
  return {"title": title, **dict(line.split(": ", 1) for line in rest)}


def test_a_mask_told_in_words_and_numbers():
  pixels = plain()
  inside = disc(20)  # 45 x 45 with 2 empty pixels a side.
  pixels[10:55, 99:144][inside] = RED
  told = lines({"mask": 1}, sight(pixels, mask(inside, 99, 10), scale=(2, 1.5)))
  assert told["title"] == "Mask 1:"
  assert told["Colour"] == "red 100%; mean RGB (220, 30, 30), standard deviation (0, 0, 0)."
  assert told["Texture"] == "smooth (contrast 0.00, homogeneity 1.00)."
  assert told["Shape"].startswith("circle; ") and told["Shape"].endswith("no long axis.")
  # 1257 lattice points lie within 20 of the origin (Gauss' circle problem: 400 pi = 1256.6);
  # of 120 x 160 that is 6.55%. A shown pixel is 2/3 of a pixel wide and half a pixel high.
  assert told["Size"] == "1,257 pixels, 6.55% of the image; 68 x 90 as shown."
  # The middle pixel is (121, 32), its centre at (121.5, 32.5) = 182.25 and 65 as shown.
  assert told["Position"] == "centre [182, 65], upper right."


def test_a_box_has_no_shape_and_is_told_as_shown():
  pixels = plain()
  pixels[:, 80:] = WHITE
  told = lines({"bbox_2d": [40, 0, 480, 120]}, sight(pixels, scale=(2, 3)))
  # x 40 / 3 = 13.3 to 160, y 0 to 60: widened to 147 x 60 pixels, 67 of 147 columns are blue.
  assert told["title"] == "Region [39, 0, 480, 120]:"
  assert told["Colour"].startswith("white 54%, blue 46%; mean")
  assert told["Size"] == "8,820 pixels, 45.94% of the image; 441 x 120 as shown."
  assert "Shape" not in told
  # (13 + 160) / 2 * 3 = 259.5 of 480 across, 30 * 2 of 240 down.
  assert told["Position"] == "centre [260, 60], upper middle."


def test_a_mask_is_told_in_the_image_that_is_asked_for():
  pixels, inside = plain(), np.ones((10, 20), bool)
  crop = Picture(pixels=pixels[30:90, 40:120], source=0, box=Box(40.0, 30.0, 120.0, 90.0))
  seen = sight(pixels, mask(inside, 60, 50), results=[ToolResult(text="", images=(crop,))])
  told = lines({"mask": 1, "image": 2}, seen)
  # In the crop the mask is at 20 to 40 of 80 and 20 to 30 of 60: 200 of its 4800 pixels.
  assert told["Size"] == "200 pixels, 4.17% of the image; 20 x 10 as shown."
  assert told["Position"] == "centre [30, 25], centre."
  assert lines({"mask": 1}, seen)["Position"] == "centre [70, 55], centre."


def test_a_mask_on_a_frame_is_measured_there():
  frames = np.stack([plain(), plain(color=RED)])
  video = Video(frames=frames, times=np.float32([0, 1]))
  frame = Picture(pixels=frames[1], source=0, box=Box(0.0, 0.0, 160.0, 120.0), frame=1)
  shown = [ToolResult(text="", images=(frame,))]
  on_frame = mask(np.ones((9, 9), bool), 5, 5, frame=1)
  seen = sight(plain(), on_frame, results=shown, videos=(video,))
  assert lines({"mask": 1}, seen)["Colour"].startswith("red 100%")
  with pytest.raises(Mistake, match="mask 1 does not lie in image 1"):
    properties.get_properties({"mask": 1, "image": 1}, seen)
  with pytest.raises(Mistake, match="mask 1 lies in a frame that no image shows"):
    properties.get_properties({"mask": 1}, sight(plain(), on_frame, videos=(video,)))


@pytest.mark.parametrize("arguments", [{}, {"mask": 1, "bbox_2d": [0, 0, 9, 9]}])
def test_one_place_is_needed(arguments):
  with pytest.raises(Mistake, match="give either mask or bbox_2d"):
    properties.get_properties(arguments, sight(plain(), mask(np.ones((9, 9), bool))))


def test_a_view_moves_the_box_and_changes_no_colour():
  pixels = plain()
  pixels[:, 80:] = WHITE
  box = {"bbox_2d": [80, 40, 100, 60]}
  assert lines(box, sight(pixels, view=VIEW["stretch_invert"]))["Colour"].startswith("white 100%")
  # A tenth of its width to the left: 2 of 20 columns are blue.
  moved = lines(box, sight(pixels, view=VIEW["up_left"]))
  assert moved["title"] == "Region [78, 38, 98, 58]:"
  assert moved["Colour"].startswith("white 90%, blue 10%;")


def test_a_long_axis_is_told_as_seen():
  """A bar at 20 degrees, in a picture that the view turned by 10, is seen at 30."""
  pixels, inside = plain(160, 160), polygon(bar(80, 20), 20)
  crop = Picture(pixels=pixels, source=0, box=Box(0.0, 0.0, 160.0, 160.0))
  shown = [ToolResult(text="", images=(crop,))]
  seen = sight(pixels, mask(inside), view=VIEW["rotate+10"], results=shown)
  assert lines({"mask": 1}, seen)["Shape"].endswith("long axis at 20 degrees.")
  assert lines({"mask": 1, "image": 2}, seen)["Shape"].endswith("long axis at 30 degrees.")


@pytest.mark.parametrize("degrees", [-60, -20, 0, 30, 75, 90])
def test_shape_numbers_are_scikit_images(degrees):
  inside = polygon(bar(90, 40), degrees)
  found = properties.outline(inside)
  (region,) = regionprops(inside.astype(np.uint8))
  assert found.area == region.area
  for name in ("solidity", "eccentricity", "extent"):
    assert getattr(found, name) == pytest.approx(getattr(region, name), rel=1e-9)
  assert found.perimeter == pytest.approx(region.perimeter_crofton, rel=1e-9)
  assert found.circularity == pytest.approx(4 * math.pi * region.area / found.perimeter**2)
  # Known: a side may gain or lose a pixel, 2.5% of 40. 90 and -90 degrees are one axis.
  assert found.aspect == pytest.approx(90 / 40, rel=0.03)
  assert abs((found.angle - degrees + 90) % 180 - 90) < 1
  assert found.area == pytest.approx(3600, rel=0.04)


@pytest.mark.parametrize("radius", [8.3, 20.4, 60.7])
def test_a_disc_is_round_and_a_square_is_not(radius):
  # Crofton's formula has no bias for a disc; its 4 directions see a square's upright sides as 2 of
  # 4 w and 2 of 4 w sqrt(1/2), mean pi / 2 * (2 w (1 + sqrt(1/2)) / 2) / w = 0.948 of the truth.
  round_ = properties.outline(disc(radius, 0.3, 0.2))
  assert round_.circularity == pytest.approx(1.0, abs=0.02)
  assert round_.perimeter == pytest.approx(2 * math.pi * radius, rel=0.02)
  square = properties.outline(np.ones((60, 60), bool))
  assert square.circularity == pytest.approx(math.pi / 4 / 0.948**2, abs=0.02)


def test_what_is_large_is_measured_smaller_and_told_in_its_own_pixels():
  inside = disc(700)
  found = properties.outline(inside)
  assert found.area == inside.sum()
  assert found.perimeter == pytest.approx(2 * math.pi * 700, rel=0.01)
  assert found.circularity == pytest.approx(1.0, abs=0.01)


SHAPES = {
  "square": bar(40, 40),
  "rectangle": bar(60, 30),
  "triangle": [(-40, 25), (35, 25), (-10, -35)],
  "diamond": [(-20, 0), (0, -35), (20, 0), (0, 35)],
  "pentagon": regular(5, 35),
  "hexagon": regular(6, 35),
  "star": regular(5, 40, 0.4),
  "cross": [(10, 30), (10, 10), (30, 10), (30, -10), (10, -10), (10, -30)]
  + [(-10, -30), (-10, -10), (-30, -10), (-30, 10), (-10, 10), (-10, 30)],
  "semicircle": [(40 * math.cos(t), 40 * math.sin(t)) for t in np.linspace(0, math.pi, 40)],
  "irregular": [(-40, -40), (-12, -40), (-12, 12), (40, 12), (40, 40), (-40, 40)],  # An L.
}


@pytest.mark.parametrize("degrees", [0, 17, 45, 110])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_words_at_every_angle(name, degrees):
  assert properties.word(polygon(SHAPES[name], degrees)) == name


def test_round_shapes_have_words():
  y, x = np.mgrid[-40:41, -40:41]
  assert properties.word(disc(15)) == "circle"
  assert properties.word(x**2 / 35**2 + y**2 / 20**2 < 1) == "ellipse"
  assert properties.word((np.hypot(x, y) < 35) & (np.hypot(x, y) > 20)) == "ring"
  assert properties.word((np.hypot(x, y) < 35) & (np.hypot(x - 15, y) > 30)) == "crescent"


def test_a_pixel_and_a_line_have_properties_too():
  """Nothing divides by an area of one pixel, or by a width of none."""
  for inside in (np.ones((1, 1), bool), np.ones((1, 50), bool), np.eye(30, dtype=bool)):
    found = properties.measure(plain(*inside.shape), inside)
    assert found.shape.area == inside.sum() and found.contrast == 0.0
    assert all(math.isfinite(x) for x in found.shape[1:])


# Named by people in Munroe's survey (xkcd.com/color/rgb); none is a prototype.
@pytest.mark.parametrize(
  "rgb, term",
  [
    ((0, 0, 0), "black"),
    ((255, 255, 255), "white"),
    ((128, 128, 128), "grey"),
    ((0xEC, 0x2D, 0x01), "red"),  # Tomato red.
    ((0x39, 0xAD, 0x48), "green"),  # Medium green.
    ((0xFF, 0xDA, 0x03), "yellow"),  # Sunflower yellow.
    ((0x2C, 0x6F, 0xBB), "blue"),  # Medium blue.
    ((0x7F, 0x51, 0x12), "brown"),  # Medium brown.
    ((0x9E, 0x43, 0xA2), "purple"),  # Medium purple.
    ((0xF3, 0x61, 0x96), "pink"),  # Medium pink.
    ((0xFB, 0x7D, 0x07), "orange"),  # Pumpkin orange.
    ((50, 205, 220), "cyan"),
  ],
)
def test_colours_have_the_names_that_people_give(rgb, term):
  (index,) = properties.names(np.uint8([rgb]))
  assert properties.NAMES[index] == term


def test_every_prototype_has_its_own_name():
  """Quantised to 5 bits; one further from its own term than from another would never be met."""
  for term, prototypes in properties.PROTOTYPES.items():
    colours = np.uint8([list(bytes.fromhex(h)) for h in prototypes.split()])
    assert {properties.NAMES[i] for i in properties.names(colours)} == {term}


def test_texture_is_scikit_images_where_all_is_inside():
  pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  levels = (rgb2gray(pixels) * 32).astype(np.uint8)
  angles = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4]
  matrix = graycomatrix(levels, [1], angles, levels=32, symmetric=True).sum(3, keepdims=True)
  contrast, homogeneity = properties.texture(pixels, np.ones((40, 50), bool))
  assert contrast == pytest.approx(graycoprops(matrix, "contrast").item(), rel=1e-9)
  assert homogeneity == pytest.approx(graycoprops(matrix, "homogeneity").item(), rel=1e-9)


def test_texture_is_of_the_inside_alone():
  """Stripes of gray 0 and 128 (levels 0 and 16) outside; inside one level. An edge would count."""
  pixels = np.zeros((40, 40, 3), np.uint8)
  pixels[::2] = 128
  inside = np.zeros((40, 40), bool)
  inside[10:30, 10:30] = True
  pixels[inside] = 255
  assert properties.texture(pixels, inside) == (0.0, 1.0)
  # Of the 4 directions one is along the stripes: 16^2 weighed by the pairs of the other three.
  # 40 x 39 along, 39 x 40 across, 2 x 39 x 39 aslant: 256 * 4602 / 6162.
  contrast, _ = properties.texture(pixels * ~inside[..., None], np.ones((40, 40), bool) & ~inside)
  assert 0.9 * 256 * 4602 / 6162 < contrast < 256


def test_texture_words():
  rng = np.random.default_rng(0)
  noise = lambda sigma: np.clip(128 + rng.normal(0, sigma, (80, 80, 1)), 0, 255).repeat(3, 2)
  # Neighbours differ by sqrt(2) sigma: 2, 11 and 57 of 255.
  for sigma, word in ((1.5, "smooth"), (8, "textured"), (40, "rough")):
    told = lines({"bbox_2d": [0, 0, 80, 80]}, sight(noise(sigma).astype(np.uint8)))
    assert told["Texture"].startswith(word)
