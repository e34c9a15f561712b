"""Calls from a shell: how they are written, what is printed, which files are left."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelis_jax import cli
from pixelis_jax.serve.tools import parse, run, table
from pixelis_jax.tools import TOOLS, Tool, places, zoom
from pixelis_jax.types import Box, Mask, ToolResult
from tests import fakes

TINY = Path(__file__).parents[2] / "assets" / "tiny-vl"


def picture(path: Path, height: int = 96, width: int = 128, *, seed: int = 0) -> Path:
  Image.fromarray(fakes.image(height, width, seed=seed)).save(path)
  return path


def refused(capsys, *argv) -> str:
  """The one line that a mistake prints; nothing else is printed, and the exit code is 2."""
  assert cli.main(["tools", *map(str, argv)]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("pixelis tools: ")
  return err


def written(*words: str) -> list[tuple[str, dict]]:
  return [(call.name, dict(call.arguments)) for call in parse(words)]


def test_arguments_are_json_and_bare_words_strings():
  words = ["look", "a=[1, 2.5]", "b=3", "c=true", "d=cat", 'e="7"', "f=", "g=x=y", "h=[1,"]
  values = {"a": [1, 2.5], "b": 3, "c": True, "d": "cat", "e": "7", "f": "", "g": "x=y", "h": "[1,"}
  assert written(*words) == [("look", values)]


def test_a_plus_begins_another_call():
  words = ["look", "a=1", "+", "look", "+", "count", "a=+"]
  assert written(*words) == [("look", {"a": 1}), ("look", {}), ("count", {"a": "+"})]


@pytest.mark.parametrize(
  "words, said",
  [
    ((), "a call must begin with a tool's name, not '+'"),
    (("+",), "must begin with a tool's name, not '+'"),
    (("look", "+"), "must begin with a tool's name, not '+'"),
    (("a=1", "look"), "must begin with a tool's name, not 'a=1'"),
    (("look", "count"), "argument 'count' of look must be NAME=JSON, or come behind a +"),
    (("look", "a=1", "a=2"), "argument 'a=2' of look is given twice"),
  ],
)
def test_what_is_no_call_is_named(words, said):
  with pytest.raises(ValueError, match=said.replace("+", r"\+")):
    parse(words)


@pytest.mark.parametrize("preset", TOOLS)
def test_the_table_has_every_tool_and_argument(preset):
  lines = table(preset).splitlines()
  for tool in TOOLS[preset].values():
    function = tool.schema["function"]
    at = lines.index(f"{tool.name}: {function['description']}")
    arguments = function["parameters"]["properties"]
    told = [line.split()[0] for line in lines[at + 1 : at + 1 + len(arguments)]]
    assert told == list(arguments)


def schema(**properties: dict) -> dict:
  parameters = {"type": "object", "properties": properties, "required": ["point"]}
  function = {"name": "zoom_in", "description": "Looks.", "parameters": parameters}
  return {"type": "function", "function": function}


def test_the_table_tells_types_in_words(monkeypatch):
  properties = {
    "point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "frames": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 8},
    "boxes": {"type": "array", "items": places.BOX},
    "how": {"type": "string", "enum": ["a", "b"], "description": "Which way."},
  }
  looks = Tool(schema=schema(**properties), function=zoom.zoom_in)
  monkeypatch.setitem(TOOLS, "qwen", {"zoom_in": looks})
  assert [line.split(maxsplit=1) for line in table("qwen").splitlines()[1:]] == [
    ["point", "2 numbers"],
    ["frames", "1 to 8 integers, optional"],
    ["boxes", "lists of 4 numbers, optional"],
    ["how", '"a" or "b", optional  Which way.'],
  ]


@pytest.fixture
def image(tmp_path) -> Path:
  return picture(tmp_path / "a.png", 30, 40)


def lines(image: Path, *words: str, out: Path | None = None) -> list[str]:
  return list(run(parse(words), images=[image, image], model=None, preset="qwen", out=out))


def test_later_calls_refer_to_earlier_pictures(image, tmp_path):
  """Image 3 is the first crop: two were given. Its (5, 5) is the source's (15, 10)."""
  words = ["zoom_in", "bbox_2d=[10,5,30,25]", "image=2", "+"]
  words += ["zoom_in", "bbox_2d=[5,5,9,8]", "image=3"]
  assert lines(image, *words) == [
    "Here is the zoomed image.",
    "image 3: 20 x 20, pixels [10, 5, 30, 25] of image 2",
    "Here is the zoomed image.",
    "image 4: 4 x 3, pixels [15, 10, 19, 13] of image 2",
  ]
  assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_mistake_is_raised_and_named_among_several(image):
  with pytest.raises(ValueError, match="^missing argument 'bbox_2d'$"):
    lines(image, "zoom_in")
  with pytest.raises(ValueError, match="^call 2: missing argument 'bbox_2d'$"):
    lines(image, "zoom_in", "bbox_2d=[10,5,30,25]", "+", "zoom_in")
  with pytest.raises(ValueError, match="nothing to look at: give an --image or a --video"):
    list(run(parse(["zoom_in"]), images=[], model=None, preset="qwen", out=None))


def test_frames_of_a_video_become_images(tmp_path):
  """A folder's frames are 0.5 s apart; the second call zooms into the one at 1 s."""
  folder = tmp_path / "clip"
  folder.mkdir()
  frames = [picture(folder / f"{i}.png", 30, 40, seed=i) for i in range(4)]
  words = ["select_frames", "times=[1]", "+", "zoom_in", "bbox_2d=[10,5,30,25]"]
  told = list(
    run(parse(words), images=[], videos=[folder], model=None, preset="qwen", out=tmp_path)
  )
  assert told == [
    "Image 1: frame 3 at 1 s",
    f"{tmp_path / 'image-1.png'}: 40 x 30, pixels [0, 0, 40, 30] of frame 3 of video 1",
    "Here is the zoomed image.",
    f"{tmp_path / 'image-2.png'}: 20 x 20, pixels [10, 5, 30, 25] of frame 3 of video 1",
  ]
  expected = np.array(Image.open(frames[2]))[5:25, 10:30]
  np.testing.assert_array_equal(np.array(Image.open(tmp_path / "image-2.png")), expected)


def test_masks_are_written_as_their_image_dark_around_them(image, tmp_path, monkeypatch):
  inside = np.array([[True, False, True], [False, True, True]])

  def mark(arguments, sight):
    masks = [Mask(inside=inside, source=1, box=Box(x, 4.0, x + 3, 6.0)) for x in (7.0, 20.0)]
    return ToolResult(text=f"{len(sight.masks())} before", masks=tuple(masks))

  parameters = {"type": "object", "properties": {}, "required": []}
  marks = {"type": "function", "function": {"name": "zoom_in", "parameters": parameters}}
  monkeypatch.setitem(TOOLS["qwen"], "zoom_in", Tool(schema=marks, function=mark))
  words = ["zoom_in", "+", "zoom_in"]
  assert lines(image, *words) == ["0 before", "2 before"]
  out = tmp_path / "out"
  name = lambda n: f"{out / f'mask-{n}.png'}: mask {n} of image 2"
  told = ["0 before", name(1), name(2), "2 before", name(3), name(4)]
  assert lines(image, *words, out=out) == told
  source = fakes.image(30, 40)
  expected = source // 4
  for y, x in [(4, 7), (4, 9), (5, 8), (5, 9)]:
    expected[y, x] = source[y, x]
  np.testing.assert_array_equal(np.array(Image.open(out / "mask-1.png")), expected)


def test_costly_functions_have_limits(image, monkeypatch):
  """A tool that crashes ends neither this process nor without a word."""
  crash = lambda arguments, sight: sight.compute(ctypes.string_at, 0)
  monkeypatch.setitem(TOOLS["qwen"], "zoom_in", Tool(schema=zoom.ZOOM_IN, function=crash))
  with pytest.raises(ValueError, match="^zoom_in crashed$"):
    lines(image, "zoom_in", "bbox_2d=[0,0,9,9]")


# the command


def test_tools_are_listed_without_a_call(capsys):
  assert cli.main(["tools"]) == 0
  assert "\nzoom_in: " in "\n" + capsys.readouterr().out
  assert cli.main(["tools", "--preset", "deepeyes"]) == 0
  assert capsys.readouterr().out.startswith("image_zoom_in_tool: ")
  assert "preset 'qwen9' must be one of" in refused(capsys, "--preset", "qwen9")


def test_a_call_may_stand_on_both_sides_of_options(tmp_path, capsys):
  image, out = picture(tmp_path / "a.png"), tmp_path / "made" / "out"
  argv = ["tools", "zoom_in", "--image", str(image), "bbox_2d=[10,20,50,40]", "--out", str(out)]
  assert cli.main([*argv, "+", "zoom_in", "bbox_2d=[0,0,8,8]"]) == 0
  told = capsys.readouterr().out.splitlines()
  assert told[1] == f"{out / 'image-2.png'}: 40 x 20, pixels [10, 20, 50, 40] of image 1"
  assert told[3] == f"{out / 'image-3.png'}: 8 x 8, pixels [0, 0, 8, 8] of image 1"
  crop = np.array(Image.open(out / "image-2.png"))
  np.testing.assert_array_equal(crop, fakes.image(96, 128)[20:40, 10:50])


def test_tools_points_in_the_frame_of_a_model(tmp_path, capsys):
  image = picture(tmp_path / "a.png", 400, 400)
  argv = [
    "tools",
    "--image",
    str(image),
    "--model",
    str(TINY),
    "zoom_in",
    "bbox_2d=[20,40,40,80]",
  ]
  assert cli.main(argv) == 0
  # As in `ask`: shown at 80 x 80, five source pixels each.
  assert "pixels [100, 200, 200, 400] of image 1" in capsys.readouterr().out


@pytest.mark.parametrize(
  "words, said",
  [
    (("zoom_in", "bbox_2d=[0,0,9,9]", "image=2"), "`image` 2: choose one of the images 1 to 1"),
    (("zoom_in", "bbox_2d=[0,0,9,9]", "size=2"), "unknown argument 'size'; known: bbox_2d, image"),
    (("zoom_in", "bbox_2d=[0,0,9"), "bbox_2d must be of type array, not '.0,0,9'"),
    (("zoom", "x=1"), "unknown tool 'zoom'; known: zoom_in"),
    (("bbox_2d=1",), "a call must begin with a tool's name, not 'bbox_2d=1'"),
    (("zoom_in", "x=1", "--image", "no.png"), "there is no image no.png"),
    (("zoom_in", "x=1", "--tracker", "sort"), "tracker 'sort' must be one of .'csrt', 'flow', "),
    (("zoom_in", "x=1", "--image", "{folder}/text.png"), "image .*text.png cannot be read"),
    (("zoom_in", "x=1", "--model", "{folder}/no"), "there is no directory .*no"),
    (("zoom_in", "x=1", "--out", "{folder}/a.png"), "a.png"),
  ],
)
def test_tools_says_what_is_wrong(tmp_path, capsys, words, said):
  image = picture(tmp_path / "a.png")
  (tmp_path / "text.png").write_text("no picture")
  words = [word.format(folder=tmp_path) for word in words]
  with pytest.raises(ValueError, match=said):
    raise ValueError(refused(capsys, "--image", image, *words))


def test_options_that_do_not_exist_are_no_words_of_a_call(capsys):
  with pytest.raises(SystemExit, match="2"):
    cli.main(["tools", "zoom_in", "--imgae", "a.png"])
  assert "unrecognized arguments: --imgae a.png" in capsys.readouterr().err
