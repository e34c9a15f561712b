"""SELECT_FRAMES: frames of a video as images, which later calls can point at."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.types import Box, Picture, ToolResult, Video

MOST = 8  # Frames a call.

SELECT_FRAMES = {
  "type": "function",
  "function": {
    "name": "select_frames",
    "description": "Look closer at frames of a video: each becomes an image that later calls can"
    " point at. Give either frames or times.",
    "parameters": {
      "type": "object",
      "properties": {
        "frames": {
          "type": "array",
          "description": "Numbers of frames, counted from 1 in the order shown.",
          "items": {"type": "integer"},
          "minItems": 1,
          "maxItems": MOST,
        },
        "times": {
          "type": "array",
          "description": "Seconds from the start; also between the frames shown.",
          "items": {"type": "number"},
          "minItems": 1,
          "maxItems": MOST,
        },
        "video": {
          "type": "integer",
          "description": "Which video, counted from 1. Default: 1.",
          "minimum": 1,
        },
      },
      "required": [],
    },
  },
}

# Name, texts and key order as in the prompts of the released Pixel-Reasoner checkpoints.
SELECT_TARGET_FRAMES = {
  "type": "function",
  "function": {
    "name": "select_frames",
    "description": "Select frames from a video.",
    "parameters": {
      "type": "object",
      "properties": {
        "target_frames": {
          "type": "array",
          "description": "List of frame indices to select from the video (no more than 8 frames in"
          " total).",
          "items": {"type": "integer", "description": "Frame index from 1 to 16."},
        },
      },
      "required": ["target_frames"],
    },
  },
}


def select_frames(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """Whole frames in the order asked for; what is asked for twice is shown once.

  `frames` are numbers among those the policy was shown. `times` reach every frame of the video: the
  nearest is taken.
  """
  number = int(arguments.get("video", 1))
  video, shown = _pick(sight, number)
  if ("frames" in arguments) == ("times" in arguments):
    raise Mistake("give either frames or times")
  if "frames" in arguments:
    indices = [_numbered(shown, n) for n in arguments["frames"]]
  else:
    indices = [_nearest(video, t) for t in arguments["times"]]
  indices = list(dict.fromkeys(indices))
  before = len(sight.shown())
  lines = [
    f"Image {before + i}: {_which(shown, index)}at {seconds(video.times[index])} s"
    for i, index in enumerate(indices, start=1)
  ]
  pictures = tuple(whole_frame(sight, number - 1, index) for index in indices)
  return ToolResult(text="\n".join(lines), images=pictures)


def select_target_frames(arguments: Mapping[str, object], sight: Sight) -> ToolResult:
  """Pixel-Reasoner's selection from the first video, its texts kept; twice is shown twice.

  From execute_tool of experience_maker.py, github.com/TIGER-AI-Lab/Pixel-Reasoner. Unlike there, a
  number below 1 is refused instead of counted from the end. The numbers in the text count the video
  as 0, as there, so that they are those of the images.
  """
  if not sight.task.videos:
    raise Mistake(
      "Execution Error: You attempted to `select_frames` from **image** not **video**. You should"
      " use `crop_image_normalized` instead for inspecting **image**."
    )
  wanted = [int(n) for n in arguments["target_frames"]]
  _, shown = _pick(sight, 1)
  if len(wanted) > MOST:
    raise Mistake(
      f"Execution Error: You have selected {len(wanted)} frames in total. Think again which frames"
      f" you need to check in details (no more than {MOST} frames)"
    )
  if not wanted or not 1 <= min(wanted) <= max(wanted) <= len(shown):
    raise Mistake(
      f"Execution Error: There are {len(shown)} frames numbered in range [1,{len(shown)}]. Your"
      f" selection `target_frames={wanted}` is out of range."
    )
  pictures = tuple(whole_frame(sight, 0, int(shown[n - 1])) for n in wanted)
  height, width = sight.shown_size(*pictures[0].pixels.shape[:2])
  first = len(sight.shown()) + 1
  text = (
    f"\nHere are the selected frames (Frame Size: {width}x{height}, Numbered {first} to"
    f" {first + len(pictures) - 1}):"
  )
  return ToolResult(text=text, images=pictures)


def seconds(time: float | np.floating) -> str:
  """A time to a hundredth, as short as it goes: 2.5, 7200.04."""
  return f"{float(time):.2f}".rstrip("0").rstrip(".")


def whole_frame(sight: Sight, video: int, frame: int) -> Picture:
  """All of a frame, under the view."""
  height, width = sight.task.videos[video].frames.shape[1:3]
  return sight.crop(video, Box(0.0, 0.0, float(width), float(height)), frame)


def _pick(sight: Sight, number: int) -> tuple[Video, Int[np.ndarray, " N"]]:
  """The video with this number, counted from 1, and the indices of its frames that were shown."""
  videos = sight.task.videos
  if not videos or sight.shown_frames is None:
    raise Mistake("there is no video here, only images")
  if number > len(videos):
    raise Mistake(f"video {number} must be one of 1 to {len(videos)}")
  video = videos[number - 1]
  return video, sight.shown_frames(video)[0]


def _numbered(shown: Int[np.ndarray, " N"], number: float | int) -> int:
  if not 1 <= number <= len(shown):
    raise Mistake(f"frame {number:g} must be one of the frames 1 to {len(shown)}")
  return int(shown[int(number) - 1])


def _nearest(video: Video, time: float | int) -> int:
  """The frame nearest in time, the earlier of two."""
  end = video.times[-1]
  if not 0 <= time <= end + 0.01:  # Told rounded to a hundredth, the end may be a bit later.
    raise Mistake(f"time {time:g} must be between 0 and {seconds(end)} s")
  return int(np.abs(video.times - np.float32(time)).argmin())


def _which(shown: Int[np.ndarray, " N"], index: int) -> str:
  """The frame's number among those shown, or between which of them it lies."""
  number = int(np.searchsorted(shown, index))  # Of those shown that are earlier.
  if number < len(shown) and shown[number] == index:
    return f"frame {number + 1} "
  if 0 < number < len(shown):
    return f"between frames {number} and {number + 1}, "
  return "before frame 1, " if number == 0 else f"after frame {number}, "
