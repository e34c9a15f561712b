"""TRACK_OBJECT: where an object goes in the frames after the one in which it is pointed out.

A method says where the object might be in the next frame. What the object looks like then says
whether and where exactly it is there; if it is nowhere near, it is lost and looked for ever farther
around. OpenCV is imported in the functions that need it: `import pixelis_jax.tools` stays fast.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw

from pixelis_jax.tools import places, views
from pixelis_jax.tools.frames import seconds, whole_frame
from pixelis_jax.tools.sight import Mistake, Shown, Sight
from pixelis_jax.types import Box, Picture, Pixels, ToolResult

POINTS, MOST_POINTS = 8, 16  # Times that are told: unless asked, and at most.

TRACK_OBJECT = {
  "type": "function",
  "function": {
    "name": "track_object",
    "description": "Follow an object through the frames of a video after the one in which you point"
    " it out. Give either mask or bbox_2d; the latter in an image that is a frame of the video.",
    "parameters": {
      "type": "object",
      "properties": {
        "bbox_2d": {
          **places.BOX,
          "description": "Box [x1, y1, x2, y2] around the object in pixels of the image as shown.",
        },
        "image": places.IMAGE,
        "mask": places.MASK,
        "frames": {
          "type": "integer",
          "description": f"At how many times to tell where it is. Default: {POINTS}.",
          "minimum": 1,
          "maximum": MOST_POINTS,
        },
      },
      "required": [],
    },
  },
}

# What bounds the cost of a call: frames that are followed, the others are stepped over evenly; and
# pixels of all of them together, to which they are reduced.
_MOST_FRAMES = 200
_MOST_PIXELS = 40_000_000
_LEAST_SIDE, _MOST_ASPECT = 4, 20  # Of a box in these pixels: what CSRT can take.

_AREA = 2048  # Pixels of an object, to which it is reduced to be compared.
_GROUND = 0.03  # Weight of a pixel beside the object, which has 1.
_EVEN = 100.0  # Variance of colour, in levels squared, that counts as nothing.
_STRANGE, _CHANGED = 0.5, 0.6  # Likeness below which it is lost: as such, and of the usual one.
_KNOWN, _SAME = 0.65, 0.75  # Likeness from which it is found again, likewise.
_LEARN = 0.7  # Of the usual likeness: from here on the look is learned.
_PACE = 0.2  # How far one frame moves the late look, and what is usual.
_LEAVING = 0.6  # Share of its box outside the frame from which it has left.
# Sizes, as shares of the last, and distances, in sides of the box, at which it is looked for: about
# where the method says; and when lost, where each frame adds to the distance.
_FINE, _NEAR = (0.95, 1.0, 1.05), 0.5
_STEADY = 0.3  # Likeness that a change of size must gain, a unit of its logarithm.
_COARSE, _FAR, _FARTHER = (0.7, 0.85, 1.0, 1.18, 1.4), 1.0, 0.5
_SOUGHT, _ABOUT = 16_000, 0.25  # Pixels that are looked over in one go, and how far about the best.

_RED, _WHITE = (230, 0, 0), (255, 255, 255)

Corners = Float32[np.ndarray, " 4"]  # x0, y0, x1, y1 in pixels.
Patch = Float32[np.ndarray, "_ _ 3"]
# Where it might be in a frame, from where it was in the one before; None: there is no telling.
Guess = Callable[[Pixels, Corners], Corners | None]


def track_object(
  arguments: Mapping[str, object], sight: Sight, *, tracker: str = "csrt"
) -> ToolResult:
  """Boxes up to the end of the video, and the last frame in which the object was seen.

  They are told in the frame of the image in which it was pointed out; for a mask, of the first
  image that shows its frame. The view's jitter moves the box that is followed, not what is told.

  Args:
    tracker: a key of `TRACKERS`.
  """
  number, shown, given, solid = _start(arguments, sight)
  video = sight.task.videos[shown.source]
  later = len(video.frames) - 1 - shown.frame
  if later < 1:
    raise Mistake(f"image {number} shows the last frame of its video: nothing comes after it")
  chosen = np.linspace(shown.frame, shown.frame + later, min(later, _MOST_FRAMES) + 1)
  indices = chosen.round().astype(int).tolist()
  boxes, seen = _followed(sight, shown.source, indices, given, solid, tracker)
  last = int(np.flatnonzero(seen)[-1])
  picture = whole_frame(sight, shown.source, indices[last])
  path = [box for box, known in zip(boxes, seen, strict=True) if known]
  told = [places.told(shown, box) for box in boxes]
  times = [seconds(video.times[i]) for i in indices]
  end = len(indices) - 1
  points = np.linspace(0, end, min(end, int(arguments.get("frames", POINTS))) + 1)[1:]
  lines = [
    f"{_course(times, seen)} Boxes are in the frame of image {number}.",
    *(
      f"{times[i]} s: {f'seen at {told[i]}' if seen[i] else 'lost'}"
      for i in points.round().astype(int).tolist()
    ),
    f"By {times[last]} s it had {_moved(told[0], told[last])}.",
    f"Image {len(sight.shown()) + 1}: the frame at {times[last]} s, with its box and its path.",
  ]
  return ToolResult(text="\n".join(lines), images=(_drawn(picture, sight.view.rotate, path),))


def follow(
  frames: UInt8[np.ndarray, "F height width 3"],
  box: Corners,
  tracker: str,
  solid: Bool[np.ndarray, "_ _"] | None = None,
) -> tuple[Float32[np.ndarray, "F 4"], Bool[np.ndarray, " F"]]:
  """Corners in every frame, and whether the object was seen there; where not, those of the last.

  Args:
    box: in the first frame, at least 4 pixels a side and at most 20 to 1.
    tracker: a key of `TRACKERS`.
    solid: which parts of the box are the object, at any resolution; None if nobody knows.

  Raises:
    ValueError: no such tracker, or OpenCV lacks it.
  """
  check_tracker(tracker)
  look, guess = _Look.of(frames[0], box, solid), TRACKERS[tracker](frames[0], box)
  boxes, seen, usual, missed = [box], [True], 1.0, 0
  for frame in frames[1:]:
    small = look.reduced(frame)
    place, likeness = None, -1.0
    if not missed:
      place, likeness = look.settled(small, guess(frame, boxes[-1]), boxes[-1])
    if likeness < max(_STRANGE, _CHANGED * usual) or _outside(place, frame) > _LEAVING:
      missed += 1
      place, likeness = look.sought(small, boxes[-1], _FAR + _FARTHER * missed, _COARSE)
      if likeness >= max(_KNOWN, _SAME * usual):
        guess, missed = TRACKERS[tracker](frame, place), 0
    if not missed:
      usual += _PACE * (likeness - usual)
      look = look.learned(small, place) if likeness >= _LEARN * usual else look
    boxes.append(boxes[-1] if missed else place)
    seen.append(not missed)
  return np.stack(boxes), np.array(seen)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
  """What the object looks like: at `first` and of `late`, as differences from the colour `mean`.

  It is compared in frames reduced by `scale`. `weights` have sum 1.
  """

  scale: float
  mean: Float32[np.ndarray, " 3"]
  weights: Float32[np.ndarray, "height width 1"]
  first: Float32[np.ndarray, "height width 3"]
  late: Float32[np.ndarray, "height width 3"]

  @classmethod
  def of(cls, frame: Pixels, box: Corners, solid: Bool[np.ndarray, "_ _"] | None) -> "_Look":
    import cv2

    width, height = (box[2:] - box[:2]).tolist()
    scale = min(1.0, math.sqrt(_AREA / (width * height)))
    size = max(_LEAST_SIDE, round(width * scale)), max(_LEAST_SIDE, round(height * scale))
    small = _resized(frame, scale)
    if solid is None:
      solid = _figure(small, box * np.float32(scale), size)
    part = cv2.resize(solid.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    weights = cv2.GaussianBlur(part, (0, 0), 1.0)[:, :, None] + np.float32(_GROUND)
    mean = small.mean((0, 1), dtype=np.float32)
    first = _patch(small.astype(np.float32) - mean, box * np.float32(scale), size)
    weights /= weights.sum()
    return cls(scale=scale, mean=mean, weights=weights, first=first, late=first)

  def reduced(self, frame: Pixels) -> Patch:
    return _resized(frame, self.scale) - self.mean

  def likeness(self, small: Patch, box: Corners) -> float:
    """-1 to 1: of what is in the box to the first or the late look, whichever is nearer."""
    seen = self._patch(small, box)
    return max(_likeness(seen, look, self.weights) for look in (self.first, self.late))

  def settled(
    self, small: Patch, guess: Corners | None, last: Corners
  ) -> tuple[Corners | None, float]:
    """The guess, or what is more like the object near it, of the last size or nearly so."""
    if guess is None:
      return None, -1.0
    half = (last[2:] - last[:2]) / 2
    center = (guess[:2] + guess[2:]) / 2
    near = self.sought(small, np.concatenate([center - half, center + half]), _NEAR, _FINE)
    return max((guess, self.likeness(small, guess)), near, key=lambda found: found[1])

  def sought(
    self,
    small: Patch,
    box: Corners,
    reach: float,
    sizes: Sequence[float],
    *,
    again: bool = True,
  ) -> tuple[Corners | None, float]:
    """What is most like the object, within `reach` sides of the box; None if nothing fits there.

    A large window is looked over at lower resolution, and `again` about the best place in it.
    """
    import cv2

    x0, y0, x1, y1 = (box * np.float32(self.scale)).tolist()
    right, down = reach * (x1 - x0), reach * (y1 - y0)
    left, top = max(math.floor(x0 - right), 0), max(math.floor(y0 - down), 0)
    window = small[top : max(math.ceil(y1 + down), 0), left : max(math.ceil(x1 + right), 0)]
    coarse = min(1.0, math.sqrt(_SOUGHT / max(window.shape[0] * window.shape[1], 1)))
    if coarse < 1:
      window = cv2.resize(window, None, fx=coarse, fy=coarse, interpolation=cv2.INTER_AREA)
    found: list[tuple[float, Corners, float]] = []
    for share in sizes:
      width = max(_LEAST_SIDE, round((x1 - x0) * share * coarse))
      height = max(_LEAST_SIDE, round((y1 - y0) * share * coarse))
      if width > window.shape[1] or height > window.shape[0]:
        continue
      mask = np.repeat(cv2.resize(self.weights, (width, height))[:, :, None], 3, axis=2)
      for look in (self.first, self.late):
        sample = cv2.resize(look, (width, height), interpolation=cv2.INTER_AREA)
        match = cv2.matchTemplate(window, sample, cv2.TM_CCORR_NORMED, mask=mask)
        match[~(match <= 1.001)] = -1  # Where all is of the mean colour it may divide by 0.
        y, x = np.unravel_index(np.argmax(match), match.shape)
        corners = np.array([x, y, x + width, y + height]) / coarse + [left, top, left, top]
        place = (corners / self.scale).astype(np.float32)
        likeness = self.likeness(small, place)
        found.append((likeness - _STEADY * abs(math.log(share)), place, likeness))
    if not found:
      return None, -1.0
    _, place, likeness = max(found, key=lambda f: f[0])
    if coarse == 1 or not again:
      return place, likeness
    return self.sought(small, place, _ABOUT, _FINE, again=False)

  def learned(self, small: Patch, box: Corners) -> "_Look":
    late = self.late + np.float32(_PACE) * (self._patch(small, box) - self.late)
    return dataclasses.replace(self, late=late)

  def _patch(self, small: Patch, box: Corners) -> Patch:
    return _patch(small, box * np.float32(self.scale), self.first.shape[1::-1])


def _likeness(a: Patch, b: Patch, weights: Float32[np.ndarray, "height width 1"]) -> float:
  """The lesser of two: of colours, against the scene's; and of texture, which two even ones share.

  The first is 2ab / (aa + bb), which falls with contrast too; the second a correlation.
  """
  dot = lambda x, y: float((weights * x * y).sum())
  colours = 2 * dot(a, b) / (dot(a, a) + dot(b, b) + 1e-3)
  a, b = (x - (weights * x).sum((0, 1)) for x in (a, b))
  return min(colours, (dot(a, b) + _EVEN) / math.sqrt((dot(a, a) + _EVEN) * (dot(b, b) + _EVEN)))


def _resized(frame: Pixels, scale: float) -> UInt8[np.ndarray, "_ _ 3"]:
  import cv2

  return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _patch(
  image: UInt8[np.ndarray, "_ _ 3"] | Patch, box: Corners, size: tuple[int, int]
) -> UInt8[np.ndarray, "_ _ 3"] | Patch:
  """The box's content at (width, height); the image's edges are replicated."""
  import cv2

  step = (box[2:] - box[:2]) / np.array(size, np.float32)
  origin = box[:2] + step / 2 - 0.5  # OpenCV has pixel centres at whole numbers.
  matrix = np.array([[step[0], 0, origin[0]], [0, step[1], origin[1]]], np.float64)
  flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
  return cv2.warpAffine(image, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _figure(
  small: UInt8[np.ndarray, "_ _ 3"], box: Corners, size: tuple[int, int]
) -> Bool[np.ndarray, "_ _"]:
  """Which of the box's pixels differ from what is around it, by GrabCut; all if hardly any do."""
  import cv2

  (width, height), step = size, (box[2:] - box[:2]) / np.array(size, np.float32)
  across, down = width // 4, height // 4
  wide = width + 2 * across, height + 2 * down
  origin = box[:2] - step * np.array([across, down], np.float32)
  far = origin + step * np.array(wide, np.float32)
  around = _patch(small, np.concatenate([origin, far]), wide)
  middle = slice(down, -down), slice(across, -across)
  labels = np.full(wide[::-1], cv2.GC_BGD, np.uint8)
  labels[middle] = cv2.GC_PR_FGD
  x, y = (o + s * (np.arange(n) + 0.5) for o, s, n in zip(origin, step, wide, strict=True))
  # What is replicated beyond the frame's edge may be the object.
  labels[(y < 0) | (y > small.shape[0])] = cv2.GC_PR_FGD
  labels[:, (x < 0) | (x > small.shape[1])] = cv2.GC_PR_FGD
  if (labels == cv2.GC_BGD).any():  # Else the box is the whole frame.
    cv2.setRNGSeed(0)  # It starts from k-means.
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(around, labels, None, *models, 5, cv2.GC_INIT_WITH_MASK)
  figure = labels[middle] == cv2.GC_PR_FGD
  return figure if figure.mean() > 0.1 else np.ones_like(figure)


def _bgr(frame: Pixels) -> Pixels:
  """As OpenCV's tables of colours have it."""
  return np.ascontiguousarray(frame[:, :, ::-1])


def _csrt(frame: Pixels, box: Corners) -> Guess:
  """OpenCV's tracker of arxiv.org/abs/1611.08461. It never says that it has lost the object."""
  import cv2

  if not hasattr(cv2, "TrackerCSRT_create"):
    raise ValueError(
      f"this OpenCV {cv2.__version__} has no CSRT: the wheel of another OpenCV package lies over"
      " that of opencv-contrib-python-headless; to repair it, run `pip install --no-deps"
      " --force-reinstall opencv-contrib-python-headless`"
    )
  tracker = cv2.TrackerCSRT_create()
  x0, y0, x1, y1 = _whole(box, frame)
  tracker.init(_bgr(frame), (x0, y0, x1 - x0, y1 - y0))

  def guess(frame: Pixels, last: Corners) -> Corners | None:
    try:
      found, (x, y, width, height) = tracker.update(_bgr(frame))
    except cv2.error as e:
      if e.code != cv2.Error.StsAssert:  # Out of memory, for instance.
        raise
      return None  # Its box has shrunk to nothing.
    return np.array([x, y, x + width, y + height], np.float32) if found else None

  return guess


def _flow(frame: Pixels, box: Corners) -> Guess:
  """Corner points moved by Lucas and Kanade's flow, those that it moves back to where they were."""
  import cv2

  before = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

  def guess(frame: Pixels, last: Corners) -> Corners | None:
    nonlocal before
    earlier, before = before, cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    x0, y0, x1, y1 = _whole(last, frame)
    points = cv2.goodFeaturesToTrack(earlier[y0:y1, x0:x1], 80, 0.01, 3)
    if points is None:
      return None
    points = points + np.array([x0, y0], np.float32)
    moved, there, _ = cv2.calcOpticalFlowPyrLK(earlier, before, points, None)
    back, again, _ = cv2.calcOpticalFlowPyrLK(before, earlier, moved, None)
    good = (there & again).astype(bool).ravel() & (np.abs(back - points).max((1, 2)) < 1)
    if good.sum() < 4:
      return None
    matrix, _ = cv2.estimateAffinePartial2D(points[good], moved[good], ransacReprojThreshold=2)
    if matrix is None:
      return None
    center = matrix @ np.append((last[:2] + last[2:]) / 2, 1)
    half = (last[2:] - last[:2]) / 2 * np.clip(math.hypot(*matrix[:, 0]), 0.9, 1.1)
    return np.concatenate([center - half, center + half]).astype(np.float32)

  return guess


# Name -> how to begin at a box in a frame. "template" takes it to stay where it is.
TRACKERS: dict[str, Callable[[Pixels, Corners], Guess]] = {
  "csrt": _csrt,
  "flow": _flow,
  "template": lambda frame, box: lambda frame, last: last,
}


def check_tracker(name: str) -> None:
  """Raises ValueError where there is no such tracker."""
  if name not in TRACKERS:
    raise ValueError(f"tracker {name!r} must be one of {sorted(TRACKERS)}")


def _start(
  arguments: Mapping[str, object], sight: Sight
) -> tuple[int, Shown, Box, Bool[np.ndarray, "_ _"] | None]:
  """The image that was pointed in, its number, the box in the source, and a mask's pixels."""
  if ("bbox_2d" in arguments) == ("mask" in arguments):
    raise Mistake("give either bbox_2d or mask")
  if "bbox_2d" in arguments:
    number = int(arguments.get("image", 1))
    shown = places.pick(sight, number, "image")
    if shown.frame is None:
      raise Mistake(f"image {number} is not a frame of a video: get one by select_frames")
    return number, shown, places.box(arguments, shown), None
  mask = places.mask(sight, arguments["mask"])
  if mask.frame is None:
    raise Mistake(
      f"mask {arguments['mask']:g} is not in a frame of a video: get one by select_frames"
    )
  for number, shown in enumerate(sight.shown(), start=1):
    if (shown.source, shown.frame) == (mask.source, mask.frame):
      return number, shown, mask.box, mask.inside
  raise ValueError(f"mask {arguments['mask']:g} lies in frame {mask.frame}, which no image shows")


def _followed(
  sight: Sight,
  video: int,
  indices: Sequence[int],
  given: Box,
  solid: Bool[np.ndarray, "_ _"] | None,
  tracker: str,
) -> tuple[list[Box], Bool[np.ndarray, " F"]]:
  """Boxes in source pixels and whether it was seen, in these frames; `given` is of the first."""
  clip = _reduced([sight.pixels(video, i) for i in indices])
  height, width = sight.task.videos[video].frames.shape[1:3]
  scale = np.array([clip.shape[2] / width, clip.shape[1] / height] * 2, np.float32)
  jittered = given if solid is not None else views.jitter(sight.view, given)
  start, given = (_clipped(box, width, height) for box in (jittered, given))
  _check(start * scale)
  boxes, seen = sight.compute(follow, clip, start * scale, tracker, solid)
  boxes = boxes / scale
  # `given` moves and grows with the box that was followed.
  sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2) / np.tile(start[2:] - start[:2], 2)
  boxes = np.tile(boxes[:, :2], 2) + (given - np.tile(start[:2], 2)) * sides
  return [Box(*map(float, box)) for box in boxes], seen


def _reduced(frames: Sequence[Pixels]) -> UInt8[np.ndarray, "F height width 3"]:
  height, width = frames[0].shape[:2]
  scale = math.sqrt(_MOST_PIXELS / (len(frames) * height * width))
  if scale >= 1:
    return np.stack(frames)
  size = max(1, round(scale * width)), max(1, round(scale * height))
  return np.stack([Image.fromarray(f).resize(size, Image.Resampling.BOX) for f in frames])


def _clipped(box: Box, width: int, height: int) -> Corners:
  x0, y0, x1, y1 = max(box.x0, 0), max(box.y0, 0), min(box.x1, width), min(box.y1, height)
  if x0 >= x1 or y0 >= y1:
    raise Mistake("the box lies outside the frame")
  return np.array([x0, y0, x1, y1], np.float32)


def _check(box: Corners) -> None:
  width, height = (box[2:] - box[:2]).tolist()
  if min(width, height) < _LEAST_SIDE:
    raise Mistake(
      f"the object is too small to be followed: {width:.1f} x {height:.1f} pixels of the video,"
      f" at least {_LEAST_SIDE} x {_LEAST_SIDE} needed"
    )
  if max(width, height) > _MOST_ASPECT * min(width, height):
    raise Mistake(
      f"the object is too thin to be followed: {width:.0f} x {height:.0f} pixels of the video, at"
      f" most {_MOST_ASPECT} to 1"
    )


def _whole(box: Corners, frame: Pixels) -> tuple[int, int, int, int]:
  """The box's part in the frame in whole pixels, at least `_LEAST_SIDE` a side."""
  height, width = frame.shape[:2]
  x0, y0 = np.clip(np.rint(box[:2]), 0, (width - _LEAST_SIDE, height - _LEAST_SIDE)).astype(int)
  x1 = min(max(round(float(box[2])), x0 + _LEAST_SIDE), width)
  y1 = min(max(round(float(box[3])), y0 + _LEAST_SIDE), height)
  return int(x0), int(y0), int(x1), int(y1)


def _outside(box: Corners, frame: Pixels) -> float:
  """Share of the box's area outside the frame."""
  limit = np.array(frame.shape[1::-1], np.float32)
  inside = np.clip(box, 0, np.tile(limit, 2))
  return float(1 - np.prod(inside[2:] - inside[:2]) / np.prod(box[2:] - box[:2]))


def _course(times: Sequence[str], seen: Bool[np.ndarray, " F"]) -> str:
  """From when to when it was followed; of many times that it was lost the first three."""
  lost, found = np.flatnonzero(seen[:-1] & ~seen[1:]), np.flatnonzero(~seen[:-1] & seen[1:]) + 1
  parts = [f"Followed forward from {times[0]} s"]
  parts += [
    f"lost after {times[a]} s, found again at {times[b]} s"
    for a, b in zip(lost[:3], found[:3], strict=False)
  ]
  if len(found) > 3:
    parts.append(f"and so {len(found) - 3} times more")
  if seen[-1]:
    parts.append(f"seen up to the end of the video at {times[-1]} s.")
  else:
    parts.append(f"lost after {times[lost[-1]]} s and not found again by the end at {times[-1]} s.")
  return ", ".join(parts)


def _moved(first: Sequence[int], last: Sequence[int]) -> str:
  """How far its middle went, in words."""
  across, down = ((last[i] + last[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1))
  parts = [
    f"{abs(far):.0f} {words[far > 0]}"
    for far, words in ((across, ("left", "right")), (down, ("up", "down")))
    if abs(far) >= 1
  ]
  if not parts:
    return "not moved"
  return f"moved {', '.join(parts)}: {math.hypot(across, down):.0f} in a straight line"


def _drawn(picture: Picture, rotate: float, path: Sequence[Box]) -> Picture:
  """With the last box, and the path of the boxes' middles, drawn in red with white edges."""
  height, width = picture.pixels.shape[:2]
  shown = Shown(source=picture.source, box=picture.box, size=(height, width), rotate=rotate)
  corners = np.array([shown.from_source(box) for box in path]) * (width, height, width, height)
  middles = [tuple(m) for m in (corners[:, :2] + corners[:, 2:]) / 2]
  image = Image.fromarray(picture.pixels)
  draw = ImageDraw.Draw(image)
  line = max(1, round(max(height, width) / 320))
  for color, thick in ((_WHITE, 3 * line), (_RED, line)):
    draw.line(middles, fill=color, width=thick, joint="curve")
    x, y = middles[0]
    draw.circle((x, y), 1.5 * line + thick / 2, fill=color)
    x0, y0, x1, y1 = corners[-1]
    around = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)]
    draw.line(around, fill=color, width=thick, joint="curve")
  return dataclasses.replace(picture, pixels=np.array(image))
