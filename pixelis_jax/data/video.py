"""Video files and folders of frames to `Video`s, within a budget of frames and pixels.

PyAV decodes. It is imported where it is needed: most programs read no video.
"""

import array
import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int
from PIL import Image

from pixelis_jax.chat.images import read_image
from pixelis_jax.types import Pixels, Video

_log = logging.getLogger(__name__)

TIMES_FILE = "times.json"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # Of the frames in a folder.
# FPS_MIN_FRAMES, FRAME_FACTOR and the default `sample_fps` of a list of frames in qwen-vl-utils.
_MIN_FRAMES, _PAIR, _RATE = 4, 2, 2.0
_TOTAL_PIXELS = int(0.9 * 128_000 * 32 * 32) * _PAIR  # Of all frames: there MODEL_SEQ_LEN tokens.
# Where frames are this many seconds apart or more, a keyframe stands in for a frame that is no
# farther away than this part of the distance.
_SPARSE, _SLACK = 1.0, 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
  """How much of a clip is read; by default as much as qwen_vl_utils.fetch_video reads (0.0.14).

  At most `max_frames` frames; on average at most `fps` a second, but of a short clip 4 or all. A
  frame has at most `max_pixels` pixels: 768 visual tokens of Qwen3-VL. All frames together have at
  most what 90% of 128,000 tokens show: 236 million pixels, 708 MB.

  Raises:
    ValueError: a bound that is not positive.
  """

  fps: float = 2.0
  max_frames: int = 768
  max_pixels: int = 768 * 32 * 32

  def __post_init__(self):
    if not 0 < self.fps < math.inf:
      raise ValueError(f"fps {self.fps} must be a positive number")
    if self.max_frames < 1 or self.max_pixels < 1:
      raise ValueError(
        f"max_frames {self.max_frames} and max_pixels {self.max_pixels} must be 1 or more"
      )

  def count(self, frames: int, seconds: float) -> int:
    """Frames read of a clip: `smart_nframes` of qwen-vl-utils, but all of them if they fit."""
    # The millionth keeps 9.999999 seconds at 2 a second from being 19 frames.
    wanted = min(max(int(seconds * self.fps + 1e-6), _MIN_FRAMES), self.max_frames)
    return frames if frames <= wanted else max(1, wanted - wanted % _PAIR)

  def size(self, count: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of each of `count` frames: the source's, or smaller in the same shape."""
    shrink = min(1.0, math.sqrt(min(self.max_pixels, _TOTAL_PIXELS // count) / (height * width)))
    return max(1, int(height * shrink)), max(1, int(width * shrink))


DEFAULT = Budget()


def read_video(path: str | Path, budget: Budget = DEFAULT, *, rate: float | None = None) -> Video:
  """A file that PyAV decodes, or a folder of pictures in the order of their names' numbers.

  Frames are upright as the file's display matrix says, in RGB, and chosen as `choose` says; times
  are the file's own, from its first frame on. One frame is held at a time beside those that are
  returned. Of a file that is cut off or damaged, what can be decoded is returned and a warning
  logged, as ffmpeg and fetch_video's last resort (torchvision) do.

  Args:
    rate: frames a second of a folder. Without it, its times.json says every frame's seconds, or its
      name the rate ("walk_12.5fps"), or it is 2.

  Raises:
    FileNotFoundError: there is nothing at this path.
    ValueError: it is no video, or nothing of it can be decoded; frames of a folder differ in size.
  """
  path = Path(path)
  if path.is_dir():
    return _read_folder(path, budget, rate)
  if not path.is_file():
    raise FileNotFoundError(f"there is no video {path}")
  if rate is not None:
    raise ValueError(f"video {path} has its own times: rate {rate:g} is for a folder of frames")
  return _read_file(path, budget)


def choose(
  times: Float64[np.ndarray, " F"],
  seconds: float,
  budget: Budget,
  keyframes: Bool[np.ndarray, " F"] | None = None,
) -> Int[np.ndarray, " N"]:
  """Indices of the frames that are read: all, or those nearest to times evenly over the clip.

  The first time is the first frame's, the last is where the last frame of a clip at a constant rate
  begins: of such a clip they are the frames of qwen_vl_utils.fetch_video. A frame that stays longer
  is read once. Where the times are a second or more apart, a keyframe stands in that is at most a
  quarter of that away from one: it is decoded alone.

  Args:
    times: seconds, rising.
    seconds: how long all of the clip is shown.
    keyframes: frames that can be decoded without others; none by default.
  """
  count = budget.count(len(times), seconds)
  if count == len(times):
    return np.arange(count)
  wanted = times[0] + np.linspace(0, seconds * (1 - 1 / len(times)), count)
  chosen = _nearest(times, wanted)
  distance = wanted[1] - wanted[0] if count > 1 else 0.0
  if keyframes is not None and keyframes.any() and distance >= _SPARSE:
    keys = np.flatnonzero(keyframes)[_nearest(times[keyframes], wanted)]
    near = np.abs(times[keys] - wanted) <= _SLACK * distance
    chosen = np.where(near, keys, chosen)
  return np.unique(chosen)


def save_frames(folder: str | Path, video: Video) -> None:
  """A folder that `read_video` gives back bit for bit, as far as its budget goes."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for number, frame in enumerate(video.frames):
    Image.fromarray(frame).save(folder / f"{number:06d}.png", compress_level=1)
  (folder / TIMES_FILE).write_text(json.dumps(video.times.tolist()), encoding="utf-8")


def _nearest(
  times: Float64[np.ndarray, " F"], wanted: Float64[np.ndarray, " N"]
) -> Int[np.ndarray, " N"]:
  after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
  before = np.maximum(after - 1, 0)
  return np.where(np.abs(wanted - times[before]) <= np.abs(times[after] - wanted), before, after)


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Index:
  """Every frame of a file in the order shown: `ticks` of the stream's clock, rising.

  `end` is where the last frame ends, `told` where the file says that it does, in ticks; None if it
  doesn't say.
  """

  ticks: Int[np.ndarray, " F"]
  keyframes: Bool[np.ndarray, " F"]
  end: float
  told: float | None


def _read_file(path: Path, budget: Budget) -> Video:
  import av

  try:
    # Absolute, or FFmpeg would take a name with a colon for a protocol.
    with av.open(str(path.resolve())) as container:
      stream = container.streams.best("video")
      # A song's cover is no video.
      if stream is None or stream.disposition & stream.disposition.attached_pic:
        raise ValueError(f"{path} has no video stream")
      if stream.codec_context is None:
        raise ValueError(f"video {path} is in a format that PyAV {av.__version__} cannot decode")
      index = _scan(container, stream)
      if not len(index.ticks):
        raise ValueError(f"video {path} holds no frame with a time")
      return _decoded(path, container, stream, index, budget)
  except av.error.FFmpegError as error:
    raise ValueError(f"video {path} cannot be read: {error.strerror}") from error


def _scan(container: Any, stream: Any) -> _Index:
  """Reads all packets and decodes none: true times, whatever the header says."""
  ticks, keyframes, end = array.array("q"), bytearray(), -math.inf
  for packet in _demuxed(container, stream):
    if packet.pts is not None and not packet.is_corrupt and not packet.is_discard:
      ticks.append(packet.pts)
      keyframes.append(packet.is_keyframe)
      end = max(end, float(packet.pts + (packet.duration or 0)))
  found, first = np.unique(np.array(ticks, np.int64), return_index=True)
  if len(found) > 1 and end <= found[-1]:  # Nobody says how long the last frame stays.
    end = float(found[-1] + (found[-1] - found[0]) / (len(found) - 1))
  told = None
  if stream.duration is not None:
    told = float((stream.start_time or 0) + stream.duration)
  elif container.duration is not None:
    told = float(((container.start_time or 0) + container.duration) / 1e6 / stream.time_base)
  return _Index(ticks=found, keyframes=np.array(keyframes, bool)[first], end=end, told=told)


def _decoded(path: Path, container: Any, stream: Any, index: _Index, budget: Budget) -> Video:
  tick, origin = float(stream.time_base), index.ticks[0]
  seconds = (index.end - origin) * tick
  chosen = choose((index.ticks - origin) * tick, seconds, budget, index.keyframes)
  frames, times = None, []
  for frame in _wanted(container, stream, index, chosen):
    time = np.float32((frame.pts - origin) * tick)
    if times and time <= times[-1]:  # A broken file's clock may run back.
      continue
    pixels = _upright(frame)
    if frames is None:
      frames = np.empty((len(chosen), *budget.size(len(chosen), *pixels.shape[:2]), 3), np.uint8)
    frames[len(times)] = _resized(pixels, *frames.shape[1:3])
    times.append(time)
  if frames is None:
    raise ValueError(f"video {path}: none of its {len(index.ticks)} frames can be decoded")
  if len(times) < len(chosen):
    _log.warning("video %s is damaged: %d of %d frames can be read", path, len(times), len(chosen))
  if index.told is not None and (index.told - index.end) * tick > max(1.0, 0.02 * seconds):
    whole = (index.told - origin) * tick
    _log.warning("video %s is cut off: %.1f of %.1f seconds are there", path, seconds, whole)
  return Video(frames=frames[: len(times)], times=np.array(times, np.float32))


def _wanted(
  container: Any, stream: Any, index: _Index, chosen: Int[np.ndarray, " N"]
) -> Iterator[Any]:
  """The chosen frames, decoded from the keyframe before each, or on from the one before.

  In place of one that is missing comes the next that can be decoded.
  """
  keys = np.flatnonzero(index.keyframes)
  before = np.searchsorted(keys, chosen, side="right") - 1
  frames, at = iter(()), -math.inf
  for i, b in zip(chosen.tolist(), before.tolist(), strict=True):
    key = keys[b] if b >= 0 else 0
    if key > at + 1:  # The frames between are for nothing.
      frames = _frames(_packets(container, stream, int(index.ticks[0]), int(index.ticks[key])))
    for frame in frames:
      if frame.pts is not None and frame.pts >= index.ticks[i]:
        yield frame
        at = i
        break


def _packets(container: Any, stream: Any, first: int, tick: int) -> Iterator[Any]:
  """All packets from the keyframe at `tick` on; `first` is the first frame's.

  A file without an index, such as an MPEG stream, is searched by its clock and may be entered in
  the middle of a picture group or too late: then farther ahead.
  """
  back, second = 0, int(1 / stream.time_base)
  while True:
    container.seek(tick - back, stream=stream)
    packets = _demuxed(container, stream)
    keyframes = (p for p in packets if p.is_keyframe and p.pts is not None and p.pts >= tick)
    packet = next(keyframes, None)
    if back > tick - first or (packet is not None and packet.pts == tick):
      break
    back = 2 * back or second
  if packet is not None:
    yield packet
    yield from packets


def _demuxed(container: Any, stream: Any) -> Iterator[Any]:
  try:
    yield from container.demux(stream)
  except IndexError:  # PyAV 18.1 stops so where another stream begins late; what follows is lost.
    return


def _frames(packets: Iterator[Any]) -> Iterator[Any]:
  """Their frames, but those whose data is damaged beyond decoding."""
  import av

  for packet in packets:
    try:
      yield from packet.decode()
    except av.error.InvalidDataError:  # What follows may be whole: ffmpeg goes on too.
      continue


def _upright(frame: Any) -> Pixels:
  """RGB, turned and mirrored by quarters as the display matrix says (libavutil/display.h)."""
  from av.sidedata.sidedata import Type
  from av.video.reformatter import Interpolation

  # By default the processor's vector units decide on the last bit.
  exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
  pixels = frame.to_ndarray(format="rgb24", interpolation=exact)
  matrix = frame.side_data.get(Type.DISPLAYMATRIX)
  if matrix is None:
    return pixels
  a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
  if abs(a) < abs(b):  # (x, y) goes to (c y, b x), else to (a x, d y).
    pixels, a, d = pixels.transpose(1, 0, 2), c, b
  return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
  if pixels.shape[:2] == (height, width):
    return pixels
  image = Image.fromarray(pixels)
  return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))


def _read_folder(path: Path, budget: Budget, rate: float | None) -> Video:
  names = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
  if not names:
    raise ValueError(f"folder {path} holds no frames: files in {', '.join(SUFFIXES)}")
  names.sort(key=lambda p: [int(x) if x.isdigit() else x for x in re.split("([0-9]+)", p.name)])
  times = _folder_times(path, len(names), rate)
  gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
  chosen = choose(times, times[-1] - times[0] + gap, budget)
  height, width, _ = read_image(names[chosen[0]]).shape
  frames = np.empty((len(chosen), *budget.size(len(chosen), height, width), 3), np.uint8)
  for i, at in enumerate(chosen.tolist()):
    pixels = read_image(names[at])
    if pixels.shape[:2] != (height, width):
      raise ValueError(
        f"frame {names[at]} is {pixels.shape[0]} x {pixels.shape[1]} pixels, the folder's first"
        f" {height} x {width}"
      )
    frames[i] = _resized(pixels, *frames.shape[1:3])
  return Video(frames=frames, times=times[chosen].astype(np.float32))


def _folder_times(path: Path, count: int, rate: float | None) -> Float64[np.ndarray, " F"]:
  """Seconds of each of a folder's frames."""
  file = path / TIMES_FILE
  if rate is None and file.is_file():
    return _read_times(file, count)
  if rate is None:
    said = re.search(r"([0-9]+(?:\.[0-9]+)?) ?fps", path.resolve().name, re.IGNORECASE)
    rate = float(said[1]) if said else _RATE
  if not 0 < rate < math.inf:
    raise ValueError(f"folder {path}: rate {rate:g} must be a positive number of frames a second")
  return np.arange(count) / rate


def _read_times(file: Path, count: int) -> Float64[np.ndarray, " F"]:
  try:
    given = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  good = isinstance(given, list) and all(type(x) in (int, float) for x in given)
  times = np.array(given if good else [], np.float64)
  rising = len(times) == count and bool(np.all(np.diff(times) > 0))
  if not rising or not 0 <= times[0] <= times[-1] < math.inf:
    raise ValueError(f"{file} must be a list of {count} rising seconds, one for each frame")
  return times
