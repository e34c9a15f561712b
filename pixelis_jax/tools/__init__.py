"""What the policy may do to pixels: one pure function a tool, one table, one door."""

import dataclasses
import operator
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pixelis_jax.tools import frames, places, properties, read, segment, track, zoom
from pixelis_jax.tools import schema as schemas
from pixelis_jax.tools.sight import Mistake, ShownFrames, Sight, Size
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.tools.workers import Stopped
from pixelis_jax.types import Box, Task, ToolCall, ToolResult


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
  """What tools work with where there is a choice.

  Args:
    tracker: of TRACK_OBJECT: a key of `track.TRACKERS`.
    segmenter: of SEGMENT_OBJECT_AT: "grabcut", or the folder of a SAM-family model's ONNX files.
    reader: of READ_TEXT: one of `read.READERS`.
    language: that READ_TEXT reads where a call names none: a key of `read.LANGUAGES`, or "".

  Raises:
    ValueError: there is no such choice, or it is not installed; the known ones are named.
  """

  tracker: str = "csrt"
  segmenter: str = segment.GRABCUT
  reader: str = "rapidocr"
  language: str = ""

  def __post_init__(self):
    track.check_tracker(self.tracker)
    segment.check_segmenter(self.segmenter)
    read.check_reader(self.reader, self.language)


USUAL = Options()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
  """`schema` is what the policy reads (OpenAI's function format); `error` frames a mistake.

  `options` are fields of `Options` that the function takes as keywords. `frame` gives (height,
  width) of what a call's coordinates are in. `look`, of a tool that only shows what is there, gives
  the arguments for a source box of the first image.
  """

  schema: Mapping
  function: Callable[..., ToolResult]
  error: str = "Error: {}"
  options: tuple[str, ...] = ()
  frame: Callable[[Mapping[str, object], Sight], Size] = places.frame
  look: Callable[[Sight, Box], dict[str, object]] | None = None

  @property
  def name(self) -> str:
    """Under which its policies know it."""
    return self.schema["function"]["name"]


# Wire format -> operation -> tool; the policy's whole world.
TOOLS: dict[str, dict[str, Tool]] = {
  "qwen": {
    "zoom_in": Tool(schema=zoom.ZOOM_IN, function=zoom.zoom_in, look=places.pointed),
    "segment_object_at": Tool(
      schema=segment.SEGMENT_OBJECT_AT,
      function=segment.segment_object_at,
      options=("segmenter",),
    ),
    "get_properties": Tool(schema=properties.GET_PROPERTIES, function=properties.get_properties),
    "read_text": Tool(
      schema=read.READ_TEXT, function=read.read_text, options=("reader", "language")
    ),
    "track_object": Tool(
      schema=track.TRACK_OBJECT, function=track.track_object, options=("tracker",)
    ),
    "select_frames": Tool(schema=frames.SELECT_FRAMES, function=frames.select_frames),
  },
  "pixel_reasoner": {
    "zoom_in": Tool(
      schema=zoom.CROP_IMAGE_NORMALIZED,
      function=zoom.crop_image_normalized,
      frame=zoom.normalized_frame,
      look=zoom.crop_image_normalized_at,
      error="\nExecution error:\n{}\n",
    ),
    "select_frames": Tool(
      schema=frames.SELECT_TARGET_FRAMES,
      function=frames.select_target_frames,
      error="\nExecution error:\n{}\n",
    ),
  },
  "deepeyes": {
    "zoom_in": Tool(
      schema=zoom.IMAGE_ZOOM_IN_TOOL,
      function=zoom.image_zoom_in_tool,
      frame=zoom.original_frame,
      look=zoom.image_zoom_in_tool_at,
    )
  },
}


class Toolbox:
  """The tools one policy has, and the only way to run them. Any thread may.

  Args:
    names: operations, such as "zoom_in"; none gives a box in which every call is a mistake.
    shown_size: (height, width) of an image to the frame in which the policy gives places in it:
      `chat.family.frame_of`.
    shown_frames: a video to the numbers of its frames that are shown, and that frame of theirs:
      `chat.family.clips_of`; None for a policy that is shown no videos.
    preset: whose names, coordinates and texts the tools have, a key of `TOOLS`.
    unit: of the policy's coordinates, told in place of `places.PIXELS`.
    compute: how the tools call their costly functions: in this process, or by `Workers.compute` in
      others, with limits.
    options: what tools work with where there is a choice.

  Raises:
    ValueError: an operation or preset that does not exist.
  """

  def __init__(
    self,
    names: Sequence[str],
    *,
    shown_size: Callable[[int, int], Size],
    shown_frames: ShownFrames | None = None,
    preset: str = "qwen",
    unit: str = places.PIXELS,
    compute: Callable[..., Any] = operator.call,
    options: Options = USUAL,
  ):
    if preset not in TOOLS:
      raise ValueError(f"preset {preset!r} must be one of {sorted(TOOLS)}")
    known = TOOLS[preset]
    if unknown := [name for name in names if name not in known]:
      raise ValueError(f"tools {unknown} must be among {sorted(known)} for preset {preset!r}")
    self.tools = {known[name].name: known[name] for name in names}
    self.preset = preset
    self.shown_size, self.shown_frames = shown_size, shown_frames
    self.unit, self.compute, self.options = unit, compute, options

  @property
  def zoom(self) -> Tool | None:
    """The tool that shows a box, where the policy has one."""
    return next((tool for tool in self.tools.values() if tool.look is not None), None)

  @property
  def schemas(self) -> list[Mapping]:
    """The tools as the policy's prompt lists them."""
    said = {places.PIXELS: self.unit}
    if self.options.language:
      said[read.ANY] = f"those of {self.options.language!r}"
    return [_described(tool.schema, said) for tool in self.tools.values()]

  def sight(self, task: Task, results: Sequence[ToolResult], view: View = IDENTITY) -> Sight:
    """What a call after these results has to do with."""
    return Sight(
      task=task,
      results=results,
      shown_size=self.shown_size,
      shown_frames=self.shown_frames,
      view=view,
      compute=self.compute,
    )

  def frame(self, call: ToolCall, task: Task, results: Sequence[ToolResult]) -> Size | None:
    """(height, width) of what the call's coordinates are in.

    None for a call that its tool would refuse as malformed, or in an image that is not there.
    """
    tool = self.tools.get(call.name)
    if tool is None:
      return None
    try:
      schemas.check(call.arguments, tool.schema["function"]["parameters"])
      return tool.frame(call.arguments, self.sight(task, results))
    except Mistake:
      return None

  def run(
    self, call: ToolCall, task: Task, results: Sequence[ToolResult], view: View = IDENTITY
  ) -> ToolResult:
    """Executes a call on the source images; what the policy got wrong comes back as `error`.

    Args:
      results: all earlier results of this episode, in order: their pictures can be referred to.
      view: applied to every picture returned; one view for a whole episode.
    """
    started = time.perf_counter()
    sight = self.sight(task, results, view)
    tool = self.tools.get(call.name)
    try:
      if tool is None:
        known = ", ".join(self.tools) or "none"
        raise Mistake(f"unknown tool {reprlib.repr(call.name)}; known: {known}")
      schemas.check(call.arguments, tool.schema["function"]["parameters"])
      chosen = {name: getattr(self.options, name) for name in tool.options}
      result = tool.function(call.arguments, sight, **chosen)
    except Mistake as e:
      frame = tool.error if tool else "Error: {}"
      error = f"{call.name} {e}" if isinstance(e, Stopped) else str(e)
      result = ToolResult(text=frame.format(error), error=error)
    return dataclasses.replace(result, seconds=time.perf_counter() - started)


def _described(schema: Mapping, said: Mapping[str, str]) -> Mapping:
  """The schema with other words for some in its arguments' descriptions."""
  function = schema["function"]
  parameters = function["parameters"]
  properties = {}
  for name, p in parameters["properties"].items():
    about = p.get("description")
    for words, others in said.items():
      about = about and about.replace(words, others)
    properties[name] = {**p, "description": about} if about else p
  return {
    **schema,
    "function": {**function, "parameters": {**parameters, "properties": properties}},
  }
