import dataclasses
import functools
import inspect
import json
import time

import numpy as np
import pytest

from pixelis_jax.tools import TOOLS, Options, Tool, Toolbox
from pixelis_jax.types import Task, ToolCall, ToolResult

QWEN = TOOLS["qwen"]
TASK = Task(id="a", images=(np.zeros((8, 8, 3), np.uint8),), question="?", answer=None)


def as_it_is(height, width):
  return height, width


def call(name="zoom_in", **arguments):
  return ToolCall(name=name, arguments=arguments)


@pytest.mark.parametrize("preset, name", [(p, name) for p in TOOLS for name in TOOLS[p]])
def test_schemas_are_in_openai_form_and_json(preset, name):
  schema = TOOLS[preset][name].schema
  assert schema["type"] == "function" and schema["function"]["name"].isidentifier()
  assert schema["function"]["description"]
  assert json.loads(json.dumps(schema)) == schema
  parameters = schema["function"]["parameters"]
  assert set(parameters["required"]) <= set(parameters["properties"])


def test_a_box_lists_the_schemas_of_its_tools():
  names = {"qwen": "zoom_in", "pixel_reasoner": "crop_image_normalized"}
  names["deepeyes"] = "image_zoom_in_tool"
  for preset in TOOLS:
    (schema,) = Toolbox(["zoom_in"], shown_size=as_it_is, preset=preset).schemas
    assert schema["function"]["name"] == names[preset]
  assert Toolbox([], shown_size=as_it_is).schemas == []


def test_a_box_says_what_coordinates_are_in():
  box = Toolbox(["zoom_in"], shown_size=lambda height, width: (2 * height, 3 * width))
  where = lambda **arguments: box.frame(call(**arguments), TASK, ())
  assert where(bbox_2d=[0, 0, 9, 9]) == (16, 24)
  # Malformed, in no image, of no tool: nothing can be said.
  assert where(bbox_2d="all") is None and where(bbox_2d=[0, 0, 9, 9], image=2) is None
  assert box.frame(call("read_text"), TASK, ()) is None


def test_our_own_preset_has_every_tool_under_its_own_name():
  assert {name: tool.name for name, tool in TOOLS["qwen"].items()} == {
    name: name
    for name in (
      "zoom_in",
      "segment_object_at",
      "get_properties",
      "read_text",
      "track_object",
      "select_frames",
    )
  }


def test_descriptions_tell_the_unit_of_the_policys_coordinates():
  """Qwen3-VL's are thousandths; every place that one of our own tools takes says so."""
  of = lambda **unit: Toolbox(list(QWEN), shown_size=as_it_is, **unit).schemas
  assert of() == [tool.schema for tool in QWEN.values()]
  for schema in of(unit="thousandths"):
    for name, argument in schema["function"]["parameters"]["properties"].items():
      text = argument.get("description", "")
      assert "pixels" not in text and (not name.endswith("_2d") or "in thousandths" in text)


def test_an_unknown_tool_is_told_the_known_ones():
  result = Toolbox(["zoom_in"], shown_size=as_it_is).run(
    call("zoom", bbox_2d=[0, 0, 4, 4]), TASK, []
  )
  assert result.error == "unknown tool 'zoom'; known: zoom_in"
  assert result.text == "Error: unknown tool 'zoom'; known: zoom_in" and result.images == ()


def test_without_tools_every_call_is_a_mistake():
  result = Toolbox([], shown_size=as_it_is).run(call(bbox_2d=[0, 0, 4, 4]), TASK, [])
  assert result.error == "unknown tool 'zoom_in'; known: none"


def test_names_of_the_policy_do_not_flood_the_prompt():
  toolbox = Toolbox(["zoom_in"], shown_size=as_it_is)
  for name in ("x" * 10_000, "\ud800" * 50):
    error = toolbox.run(call(name), TASK, []).error
    assert len(error) < 200
    error.encode()  # A lone surrogate would not.


def test_seconds_are_measured(monkeypatch):
  def slow(arguments, sight):
    time.sleep(0.05)
    return ToolResult(text="done")

  monkeypatch.setitem(QWEN, "zoom_in", Tool(schema=QWEN["zoom_in"].schema, function=slow))
  result = Toolbox(["zoom_in"], shown_size=as_it_is).run(call(bbox_2d=[0, 0, 4, 4]), TASK, [])
  assert result.text == "done" and 0.05 <= result.seconds < 5
  assert 0 < Toolbox([], shown_size=as_it_is).run(call(), TASK, []).seconds < 5


def test_our_own_errors_are_not_swallowed(monkeypatch):
  def broken(arguments, sight):
    raise ValueError("our bug")

  monkeypatch.setitem(QWEN, "zoom_in", Tool(schema=QWEN["zoom_in"].schema, function=broken))
  with pytest.raises(ValueError, match="our bug"):
    Toolbox(["zoom_in"], shown_size=as_it_is).run(call(bbox_2d=[0, 0, 4, 4]), TASK, [])


def test_a_tool_gets_the_options_that_it_takes_and_no_others(monkeypatch):
  told = {}

  def keep(name, arguments, sight, **given):
    told[name] = given
    return ToolResult(text="")

  for name, tool in QWEN.items():
    kept = functools.partial(keep, name)
    monkeypatch.setitem(QWEN, name, dataclasses.replace(tool, function=kept))
  options = Options(tracker="flow", reader="rapidocr", language="de")
  toolbox = Toolbox(list(QWEN), shown_size=as_it_is, options=options)
  arguments = {"zoom_in": {"bbox_2d": [0, 0, 4, 4]}}
  for name in QWEN:
    assert toolbox.run(call(name, **arguments.get(name, {})), TASK, []).error is None
  assert told == {
    "zoom_in": {},
    "segment_object_at": {"segmenter": "grabcut"},
    "get_properties": {},
    "read_text": {"reader": "rapidocr", "language": "de"},
    "track_object": {"tracker": "flow"},
    "select_frames": {},
  }


def test_the_options_of_a_tool_are_keywords_of_its_function():
  for tool in QWEN.values():
    known = inspect.signature(tool.function).parameters
    usual = {name: getattr(Options(), name) for name in tool.options}
    assert {name: known[name].default for name in tool.options} == usual


def test_the_language_that_is_read_is_told():
  about = lambda **given: Toolbox(
    ["read_text"], shown_size=as_it_is, options=Options(**given)
  ).schemas[0]["function"]["parameters"]["properties"]["language"]["description"]
  assert about().endswith("Default: all known letters.")
  assert about(language="de").endswith("Default: those of 'de'.")


@pytest.mark.parametrize(
  "given, said",
  [
    ({"tracker": "sort"}, r"tracker 'sort' must be one of \['csrt', 'flow', 'template'\]"),
    ({"segmenter": "sam"}, "segmenter 'sam' must be 'grabcut' or a folder that holds encoder.onnx"),
    ({"reader": "easyocr"}, r"reader 'easyocr' must be one of \['rapidocr', 'tesseract'\]"),
    ({"language": "ru"}, r"language 'ru' must be empty or one of \['en', 'de', "),
  ],
)
def test_what_there_is_no_choice_of_is_refused(given, said):
  with pytest.raises(ValueError, match=said):
    Options(**given)


def test_refuses_tools_and_presets_that_do_not_exist():
  with pytest.raises(ValueError, match=r"tools \['zoom'\] must be among \['get_properties', "):
    Toolbox(["zoom"], shown_size=as_it_is)
  with pytest.raises(ValueError, match="preset 'gpt' must be one of"):
    Toolbox(["zoom_in"], shown_size=as_it_is, preset="gpt")
