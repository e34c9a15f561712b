"""Tasks and tool results as JSON beside PNG images and raw arrays: what the codecs share."""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pixelis_jax.types import (
  Box,
  Mask,
  Picture,
  Pixels,
  Task,
  ToolResult,
  Video,
  content_key,
)


class Writer:
  """Collects blobs, videos and tasks; returns the JSON that refers to them by position.

  Equal images, frames and videos, and a task that is met again, are kept once. A mask takes a bit a
  pixel.
  """

  def __init__(self):
    self.blobs: list[bytes] = []
    self.tasks: list[dict] = []
    self.videos: list[dict] = []
    self._task_at: dict[int, int] = {}
    self._image_at: dict[str, int] = {}
    self._video_at: dict[tuple, int] = {}

  @property
  def images(self) -> dict[str, int]:
    """The position of each blob that is a PNG, by the key of its pixels; in their order."""
    return dict(self._image_at)

  def array(self, array: np.ndarray) -> dict:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    self.blobs.append(little.tobytes())
    return {"at": len(self.blobs) - 1, "dtype": little.dtype.str, "shape": list(array.shape)}

  def image(self, pixels: Pixels) -> int:
    key = pixels_key(pixels)
    if key not in self._image_at:
      png = io.BytesIO()
      Image.fromarray(pixels).save(png, "png", compress_level=1)
      self.blobs.append(png.getvalue())
      self._image_at[key] = len(self.blobs) - 1
    return self._image_at[key]

  def video(self, video: Video) -> int:
    frames = [self.image(frame) for frame in video.frames]
    key = (*frames, video.times.tobytes())
    if key not in self._video_at:
      self.videos.append({"frames": frames, "times": self.array(video.times)})
      self._video_at[key] = len(self.videos) - 1
    return self._video_at[key]

  def task(self, task: Task) -> int:
    if id(task) not in self._task_at:  # The samples of a request share one Task object.
      entry = {
        "id": task.id,
        "images": [self.image(p) for p in task.images],
        "question": task.question,
        "answer": task.answer,
        "kind": task.kind,
        "boxes": [box_to_json(b) for b in task.boxes],
        "videos": [self.video(v) for v in task.videos],
      }
      self._task_at[id(task)] = len(self.tasks)
      self.tasks.append(entry)
    return self._task_at[id(task)]

  def result(self, result: ToolResult) -> dict:
    return {
      "text": result.text,
      "images": [{"at": self.image(p.pixels), **_place(p)} for p in result.images],
      "masks": [{"inside": self.array(np.packbits(m.inside)), **_place(m)} for m in result.masks],
      "error": result.error,
      "seconds": float(result.seconds),
    }


class Reader:
  """What a `Writer` wrote; an image or a video that was kept once is one object.

  Args:
    header: with the writer's `tasks` and `videos`.
    blobs: the writer's, in their order.
  """

  def __init__(self, header: Mapping, blobs: Sequence[bytes | memoryview]):
    self._blobs = blobs
    self._images: dict[int, Pixels] = {}
    self.videos = [self._video(v) for v in header["videos"]]
    self.tasks = [self._task(t) for t in header["tasks"]]

  def array(self, entry: Mapping) -> np.ndarray:
    dtype = np.dtype(entry["dtype"])
    array = np.frombuffer(self._blobs[entry["at"]], dtype).reshape(entry["shape"])
    return array.astype(dtype.newbyteorder("="))  # A writable copy in this machine's order.

  def image(self, at: int) -> Pixels:
    if at not in self._images:
      self._images[at] = self._pixels(at)
    return self._images[at]

  def result(self, entry: Mapping) -> ToolResult:
    return ToolResult(
      text=entry["text"],
      images=tuple(
        Picture(pixels=self.image(p["at"]), **_place_from_json(p)) for p in entry["images"]
      ),
      masks=tuple(self._mask(m) for m in entry["masks"]),
      error=entry["error"],
      seconds=entry["seconds"],
    )

  def _pixels(self, at: int) -> Pixels:
    with Image.open(io.BytesIO(self._blobs[at])) as image:
      return np.array(image)

  def _video(self, entry: Mapping) -> Video:
    frames = np.stack([self._pixels(at) for at in entry["frames"]])
    return Video(frames=frames, times=self.array(entry["times"]))

  def _task(self, entry: Mapping) -> Task:
    return Task(
      id=entry["id"],
      images=tuple(self.image(at) for at in entry["images"]),
      question=entry["question"],
      answer=entry["answer"],
      kind=entry["kind"],
      boxes=tuple(Box(*b) for b in entry["boxes"]),
      videos=tuple(self.videos[at] for at in entry["videos"]),
    )

  def _mask(self, entry: Mapping) -> Mask:
    place = _place_from_json(entry)
    height, width = int(place["box"].height), int(place["box"].width)
    bits = np.unpackbits(self.array(entry["inside"]), count=height * width)
    return Mask(inside=bits.reshape(height, width).astype(bool), **place)


def pixels_key(pixels: Pixels) -> str:
  """Equal for equal pixels of equal size."""
  return content_key(repr(pixels.shape), np.ascontiguousarray(pixels).tobytes())


def box_to_json(box: Box) -> list[float]:
  return [float(c) for c in dataclasses.astuple(box)]


def _place(of: Picture | Mask) -> dict:
  return {"source": of.source, "box": box_to_json(of.box), "frame": of.frame}


def _place_from_json(entry: Mapping) -> dict:
  return {"source": entry["source"], "box": Box(*entry["box"]), "frame": entry["frame"]}
