"""What the policy may do to pixels: one pure function a tool, one table, one door."""

import dataclasses
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence

from pixelis_jax.tools import schema as schemas
from pixelis_jax.tools import zoom
from pixelis_jax.tools.sight import Mistake, ShownFrames, Sight, Size
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import Task, ToolCall, ToolResult


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
  """`schema` is what the policy reads (OpenAI's function format); `error` frames a mistake."""

  schema: Mapping
  function: Callable[[Mapping[str, object], Sight], ToolResult]
  error: str = "Error: {}"


TOOLS: dict[str, Tool] = {  # Wire name -> tool; the policy's whole world.
  "zoom_in": Tool(schema=zoom.ZOOM_IN, function=zoom.zoom_in),
  "crop_image_normalized": Tool(
    schema=zoom.CROP_IMAGE_NORMALIZED,
    function=zoom.crop_image_normalized,
    error="\nExecution error:\n{}\n",
  ),
  "image_zoom_in_tool": Tool(schema=zoom.IMAGE_ZOOM_IN_TOOL, function=zoom.image_zoom_in_tool),
}

# Wire format -> operation -> the name under which its policies know it.
PRESETS: dict[str, dict[str, str]] = {
  "qwen": {"zoom_in": "zoom_in"},
  "pixel_reasoner": {"zoom_in": "crop_image_normalized"},
  "deepeyes": {"zoom_in": "image_zoom_in_tool"},
}


class Toolbox:
  """The tools one policy has, and the only way to run them.

  Args:
    names: operations, such as "zoom_in"; none gives a box in which every call is a mistake.
    shown_size: (height, width) of an image to the frame in which the policy gives places in it:
      `chat.family.frame_of`.
    shown_frames: a video to the numbers of its frames that are shown, and that frame of theirs:
      `chat.family.clips_of`; None for a policy that is shown no videos.
    preset: whose names, coordinates and texts the tools have, a key of `PRESETS`.

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
  ):
    if preset not in PRESETS:
      raise ValueError(f"preset {preset!r} must be one of {sorted(PRESETS)}")
    known = PRESETS[preset]
    if unknown := [name for name in names if name not in known]:
      raise ValueError(f"tools {unknown} must be among {sorted(known)} for preset {preset!r}")
    self.tools = {known[name]: TOOLS[known[name]] for name in names}
    self.shown_size, self.shown_frames = shown_size, shown_frames

  @property
  def schemas(self) -> list[Mapping]:
    """The tools as the policy's prompt lists them."""
    return [tool.schema for tool in self.tools.values()]

  def run(
    self, call: ToolCall, task: Task, results: Sequence[ToolResult], view: View = IDENTITY
  ) -> ToolResult:
    """Executes a call on the source images; what the policy got wrong comes back as `error`.

    Args:
      results: all earlier results of this episode, in order: their pictures can be referred to.
      view: applied to every picture returned; one view for a whole episode.
    """
    started = time.perf_counter()
    sight = Sight(
      task=task,
      results=results,
      shown_size=self.shown_size,
      shown_frames=self.shown_frames,
      view=view,
    )
    tool = self.tools.get(call.name)
    try:
      if tool is None:
        known = ", ".join(self.tools) or "none"
        raise Mistake(f"unknown tool {reprlib.repr(call.name)}; known: {known}")
      schemas.check(call.arguments, tool.schema["function"]["parameters"])
      result = tool.function(call.arguments, sight)
    except Mistake as e:
      frame = tool.error if tool else "Error: {}"
      result = ToolResult(text=frame.format(e), error=str(e))
    return dataclasses.replace(result, seconds=time.perf_counter() - started)
