"""Samples, resizes and patches a video as Qwen's two video processors do, without torch."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int
from PIL import Image

from pixelis_jax.chat import images
from pixelis_jax.chat.family import Family, Size, family_of
from pixelis_jax.types import Patches, Pixels, Video, content_key

UNKNOWN_FPS = 24.0  # What transformers takes where nobody says how fast the frames follow.
# transformers' reading order, and last what is left to the image processor's settings there too.
_FILES = (
  ("processor_config.json", "video_processor"),
  ("video_preprocessor_config.json", None),
  ("preprocessor_config.json", None),
)
# Class defaults of transformers' Qwen2VLVideoProcessor and Qwen3VLVideoProcessor.
_QWEN2 = images.DEFAULTS | {
  "do_sample_frames": False,
  "min_frames": 4,
  "max_frames": 768,
  "cap_pixels_per_frame": False,
  "max_video_tokens": 128_000,
}
_QWEN3 = _QWEN2 | {
  "do_sample_frames": True,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
  "patch_size": 16,
  "max_video_tokens": 768,
}
_CLASSES = {"Qwen2VLVideoProcessor": False, "Qwen3VLVideoProcessor": True}  # Name -> whole_clip.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VideoProcessor:
  """Qwen2-VL's rules, which Qwen2.5-VL has too; with `whole_clip` those of Qwen3-VL.

  `min_pixels` and `max_pixels` bound the area of a frame, or of all frames of the clip together, in
  pixels after resizing. `frames` is the number of frames in a patch. With `do_sample`, `fps` frames
  a second are shown, or `num_frames` of the clip. `cap` bounds a frame's area by `max_tokens`: the
  tokens of the whole clip, or with `whole_clip` of a frame. `table` maps [channel, byte] to
  normalised float32.
  """

  whole_clip: bool
  min_pixels: int
  max_pixels: int
  patch: int
  frames: int
  merge: int
  resample: int
  table: np.ndarray
  do_sample: bool
  fps: float | None
  num_frames: int | None
  min_frames: int
  max_frames: int
  cap: bool
  max_tokens: int

  @classmethod
  def from_directory(cls, path: str | Path) -> "VideoProcessor":
    """Reads the video_processor part of processor_config.json, or video_preprocessor_config.json.

    Where there is neither, the image processor's preprocessor_config.json, as transformers does,
    and without that the class defaults. Which class, the settings' video_processor_type says, or
    else the family of config.json.

    Raises:
      ValueError: a setting that this processor does not serve, or bounds that no size satisfies.
    """
    c = images.read_settings(Path(path), _FILES) or {}
    name = c.get("video_processor_type")
    if name is not None and name not in _CLASSES:
      raise ValueError(f"{path}: video_processor_type {name!r} must be one of {sorted(_CLASSES)}")
    whole_clip = family_of(path).timed if name is None else _CLASSES[name]
    values = images.with_defaults(c, _QWEN3 if whole_clip else _QWEN2, path)
    fps, count = c.get("fps", 2 if whole_clip else None), c.get("num_frames")
    if values["do_sample_frames"] and fps is not None and count is not None:
      raise ValueError(f"{path}: fps {fps} and num_frames {count} exclude each other")
    side = 32 if whole_clip else 28
    # Only the older class reads the older spelling.
    given = {"size": c.get("size")} if whole_clip else c
    low, high = images.pixel_bounds(given, 128 * side**2, 768 * side**2, path)
    # The processor folds the rescaling into mean and deviation, in float32.
    scale = np.float32(1 / values["rescale_factor"])
    mean = np.array(values["image_mean"], np.float32) * scale
    std = np.array(values["image_std"], np.float32) * scale
    return cls(
      whole_clip=whole_clip,
      min_pixels=low,
      max_pixels=high,
      patch=values["patch_size"],
      frames=values["temporal_patch_size"],
      merge=values["merge_size"],
      resample=values["resample"],
      table=(np.arange(256, dtype=np.float32)[None, :] - mean[:, None]) / std[:, None],
      do_sample=values["do_sample_frames"],
      fps=None if fps is None else float(fps),
      num_frames=count,
      min_frames=values["min_frames"],
      max_frames=values["max_frames"],
      cap=values["cap_pixels_per_frame"],
      max_tokens=values["max_video_tokens"],
    )

  def sample(self, count: int, fps: float) -> Int[np.ndarray, " N"]:
    """Indices of the frames shown of `count` that follow each other `fps` times a second.

    All of them unless the settings say to sample. Qwen2-VL takes whole patches of frames, evenly
    from the first on; Qwen3-VL takes any number, from the first to the last. A clip too short for
    the former's rule, on which transformers divides by zero, gives one patch of frames.

    Raises:
      ValueError: the settings ask for more frames than there are (Qwen2-VL; Qwen3-VL repeats some).
    """
    if not self.do_sample or (not self.whole_clip and self.fps is None and self.num_frames is None):
      return np.arange(count)
    if self.whole_clip:
      wanted = self.num_frames
      if wanted is None and self.fps is not None:
        wanted = min(int(count / fps * self.fps), count)
        wanted = min(max(wanted, self.min_frames), self.max_frames, count)
      elif wanted is None:
        wanted = min(max(count, self.min_frames), self.max_frames)
      return np.linspace(0, count - 1, wanted).round().astype(int)
    depth = self.frames
    if self.num_frames is not None:
      wanted = round(self.num_frames / depth) * depth
    else:
      high = min(self.max_frames, count) // depth * depth
      wanted = math.floor(min(max(count / fps * self.fps, self.min_frames), high) / depth) * depth
    wanted = max(wanted, min(depth, count))
    if wanted > count:
      raise ValueError(f"num_frames {self.num_frames} must be at most the video's {count} frames")
    step = count / wanted
    # Through float32, as torch.arange: what is all but a whole number becomes one.
    return (np.arange(wanted) * step).astype(np.float32).astype(int)

  def shown_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) at which each of `frames` sampled frames is shown, in pixels.

    One frame is counted as a whole patch of frames; transformers' Qwen3VLVideoProcessor refuses it.

    Raises:
      ValueError: one side is more than 200 times the other, or the frame is empty.
    """
    images.check_size(height, width)
    unit, low, high = self.patch * self.merge, self.min_pixels, self.max_pixels
    floor = int(low * 1.05)
    if not self.whole_clip:
      if self.cap:
        budget = int(self.max_tokens * unit * unit * 0.9) * self.frames
        high = max(min(high, budget // frames), floor)
      return images.fit(height, width, unit, low, high)
    frames = max(frames, self.frames)
    if self.cap:
      high = max(min(self.max_tokens * unit * unit, high // frames), floor) * frames
    if min(height, width) < unit:
      scale = max(unit / height, unit / width)
      height, width = int(height * scale), int(width * scale)
    counted = round(frames / self.frames) * self.frames
    return images.fit(height, width, unit, low, high, frames=frames, counted=counted)

  def chosen(self, video: Video) -> Int[np.ndarray, " N"]:
    """Indices of the frames of this video that are shown."""
    fps, times = clock(video)
    return self.sample(len(times), fps)

  def seconds(self, video: Video) -> Float64[np.ndarray, " T"]:
    """When each step of `process` is shown: the mean of its first and last frame's seconds."""
    _, times = clock(video)
    times = times[self.chosen(video)]
    times = np.append(times, [times[-1]] * (-len(times) % self.frames))
    return (times[:: self.frames] + times[self.frames - 1 :: self.frames]) / 2

  def process(self, video: Video) -> Patches:
    """One video as the vision tower takes it: sampled, the last frame repeated to fill its patch.

    `interval` is the time between steps at the mean rate of the frames shown. Sizes and grid are
    those of transformers' processors. Bytes differ from theirs by at most 2 of 255 where a frame is
    resized: torch's weights are 16-bit integers, Pillow's have 22 bits after the point, so each of
    the two passes may round otherwise by 1, and the second passes on the first's 1 times at most
    1.25, the sum of bicubic weights without their signs. Else values are equal bit for bit.
    """
    fps, times = clock(video)
    chosen = self.chosen(video)
    interval = self.frames * len(times) / (len(chosen) * fps)
    size = self.shown_size(len(chosen), *video.frames.shape[1:3])
    resized = np.stack([self._resize(frame, *size) for frame in video.frames[chosen]])
    filled = np.concatenate([resized, *[resized[-1:]] * (-len(chosen) % self.frames)])
    return Patches(
      patches=images.patch_order(filled, self.patch, self.merge, self.frames, self.table),
      grid=(len(filled) // self.frames, size[0] // self.patch, size[1] // self.patch),
      size=size,
      key=content_key(filled.tobytes(), f"{len(filled)} x {size[0]} x {size[1]}"),
      interval=interval,
    )

  def _resize(self, frame: Pixels, height: int, width: int) -> Pixels:
    """Across, then down, as torch does; Pillow by itself chooses the order, which changes bytes."""
    across = Image.fromarray(frame).resize((width, frame.shape[0]), resample=self.resample)
    return np.asarray(across.resize((width, height), resample=self.resample))


def clips_of(path: str | Path) -> Callable[[Video], tuple[Int[np.ndarray, " N"], Size]] | None:
  """A video to the indices of its frames that are shown and the frame its coordinates have.

  As `family.frame_of` does for images: (height, width) of the size shown, or of the family's own
  frame. None for a text-only model.
  """
  family = family_of(path)
  return partial(_clip, family, VideoProcessor.from_directory(path)) if family.sees else None


def _clip(
  family: Family, videos: VideoProcessor, video: Video
) -> tuple[Int[np.ndarray, " N"], Size]:
  chosen = videos.chosen(video)
  return chosen, family.coordinates or videos.shown_size(len(chosen), *video.frames.shape[1:3])


def clock(video: Video) -> tuple[float, Float64[np.ndarray, " F"]]:
  """Frames a second on average, and the times in float64: i / fps where they tell of such a clock.

  A rate is a whole number or a ratio such as 30000 / 1001, which float32 times reveal. Rounded to
  tenths of a second later, i / fps in float32 and in float64 would not always give the same text.
  """
  times = video.times.astype(np.float64)
  if len(times) == 1:
    return UNKNOWN_FPS, times
  mean = (len(times) - 1) / (times[-1] - times[0])
  fps = float(Fraction(mean).limit_denominator(1001))
  ticks = np.arange(len(times)) / fps if fps > 0 else times
  # Two float32 roundings: of the time, and of whoever made it in float32.
  return (fps, ticks) if np.allclose(ticks, times, rtol=2**-22, atol=0) else (float(mean), times)
