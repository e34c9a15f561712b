"""Experience <-> bytes without pickle: a JSON header, raw little-endian arrays and PNG images.

Patches are not stored (300 KB for a small image): a segment stores which picture or video each came
from, and `restore` runs the processor again, which gives the same bits; their keys are checked.
"""

import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from pixelis_jax.types import (
  Ballot,
  Box,
  Completion,
  Experience,
  Mask,
  Patches,
  Picture,
  Pixels,
  Segment,
  Status,
  Step,
  Task,
  ToolCall,
  ToolResult,
  Trajectory,
  Video,
  Vote,
  content_key,
)

MAGIC = b"PXEX"
VERSION = 2
_PREFIX = struct.Struct(
  "<4sBIQ"
)  # magic, version, CRC-32 of what follows, bytes of the JSON header

Process = Callable[[Pixels | Video], Patches]


def encode(experience: Experience) -> bytes:
  """Everything `restore` needs but the patches' floats.

  Equal images, frames and videos, and a task that trajectories share, are stored once. A mask takes
  a bit a pixel.

  Raises ValueError when a segment's images are not as many as its position says: the task's images
  and videos in the first one, the pictures of the result just before in the others.
  """
  writer = _Writer()
  header = {
    "id": experience.id,
    "policy_version": experience.policy_version,
    "key": writer.array(experience.key),
    "vote": _vote_to_json(experience.vote),
    "trajectories": [writer.trajectory(t) for t in experience.trajectories],
    "tasks": writer.tasks,
    "videos": writer.videos,
    "blobs": [len(b) for b in writer.blobs],
  }
  text = json.dumps(header, separators=(",", ":")).encode()
  body = b"".join([text, *writer.blobs])
  return _PREFIX.pack(MAGIC, VERSION, zlib.crc32(body), len(text)) + body


def restore(data: bytes, process: Process) -> Experience:
  """The experience that was encoded, bit for bit; `process` must be what `Chat.patches` was then.

  Raises ValueError for truncated or garbled bytes, another version, or patches whose key differs.
  """
  if len(data) < _PREFIX.size or data[:4] != MAGIC:
    raise ValueError(f"not an encoded experience: {len(data)} bytes starting {bytes(data[:8])!r}")
  _, version, checksum, text_bytes = _PREFIX.unpack_from(data)
  if version != VERSION:
    raise ValueError(f"experience format version {version}, this code reads version {VERSION}")
  body = memoryview(data)[_PREFIX.size :]
  if zlib.crc32(body) != checksum:
    raise ValueError(f"experience of {len(data)} bytes is truncated or garbled: checksum differs")
  header = json.loads(bytes(body[:text_bytes]))
  reader = _Reader(header, body[text_bytes:], process)
  return Experience(
    id=header["id"],
    key=reader.array(header["key"]),
    trajectories=tuple(reader.trajectory(t) for t in header["trajectories"]),
    vote=_vote_from_json(header["vote"]),
    policy_version=header["policy_version"],
  )


class _Writer:
  """Collects blobs and task entries; returns the JSON that refers to them by position."""

  def __init__(self):
    self.blobs: list[bytes] = []
    self.tasks: list[dict] = []
    self.videos: list[dict] = []
    self._task_at: dict[int, int] = {}
    self._image_at: dict[str, int] = {}
    self._video_at: dict[tuple, int] = {}

  def array(self, array: np.ndarray) -> dict:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    self.blobs.append(little.tobytes())
    return {"at": len(self.blobs) - 1, "dtype": little.dtype.str, "shape": list(array.shape)}

  def image(self, pixels: Pixels) -> int:
    raw = np.ascontiguousarray(pixels).tobytes()
    key = content_key(repr(pixels.shape), raw)
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
        "boxes": [_box_to_json(b) for b in task.boxes],
        "videos": [self.video(v) for v in task.videos],
      }
      self._task_at[id(task)] = len(self.tasks)
      self.tasks.append(entry)
    return self._task_at[id(task)]

  def trajectory(self, trajectory: Trajectory) -> dict:
    shown, steps = (*trajectory.task.images, *trajectory.task.videos), []
    for i, step in enumerate(trajectory.steps):
      where = f"step {i} of a trajectory of task {trajectory.task.id!r}"
      steps.append(self.step(step, shown, where))
      shown = tuple(p.pixels for p in step.result.images) if step.result else ()
    return {
      "task": self.task(trajectory.task),
      "steps": steps,
      "status": trajectory.status.value,
      "answer": trajectory.answer,
    }

  def step(self, step: Step, shown: Sequence[Pixels | Video], where: str) -> dict:
    completion, call, result = step.completion, step.call, step.result
    images = completion.context.images
    if len(images) != len(shown):
      raise ValueError(f"{where}: its segment has {len(images)} images, {len(shown)} were shown")
    return {
      "context": self.array(completion.context.tokens),
      "images": [self.patches(*pair) for pair in zip(shown, images, strict=True)],
      "tokens": self.array(completion.tokens),
      "logps": self.array(completion.logps),
      "entropies": self.array(completion.entropies),
      "text": completion.text,
      "finished": completion.finished,
      "policy_version": completion.policy_version,
      "call": None if call is None else {"name": call.name, "arguments": dict(call.arguments)},
      "result": None if result is None else self.result(result),
    }

  def patches(self, shown: Pixels | Video, patches: Patches) -> dict:
    """What they were made from, and what is checked when they are made again."""
    from_video = isinstance(shown, Video)
    return {
      "at": self.video(shown) if from_video else self.image(shown),
      "from": "video" if from_video else "image",
      "made": _made(patches),
    }

  def result(self, result: ToolResult) -> dict:
    return {
      "text": result.text,
      "images": [{"at": self.image(p.pixels), **_place(p)} for p in result.images],
      "masks": [{"inside": self.array(np.packbits(m.inside)), **_place(m)} for m in result.masks],
      "error": result.error,
      "seconds": float(result.seconds),
    }


class _Reader:
  """Rebuilds values from a checked header; an image is decoded and processed once."""

  def __init__(self, header: Mapping, blobs: memoryview, process: Process):
    ends = np.cumsum([0, *header["blobs"]]).tolist()
    self._blobs = [blobs[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    self._process = process
    self._images: dict[int, Pixels] = {}
    self._patches: dict[tuple[str, int], Patches] = {}
    self._videos = [self._video(v) for v in header["videos"]]
    self._tasks = [self._task(t) for t in header["tasks"]]

  def array(self, entry: Mapping) -> np.ndarray:
    dtype = np.dtype(entry["dtype"])
    array = np.frombuffer(self._blobs[entry["at"]], dtype).reshape(entry["shape"])
    return array.astype(dtype.newbyteorder("="))  # A writable copy in this machine's order.

  def trajectory(self, entry: Mapping) -> Trajectory:
    return Trajectory(
      task=self._tasks[entry["task"]],
      steps=tuple(self._step(s) for s in entry["steps"]),
      status=Status(entry["status"]),
      answer=entry["answer"],
    )

  def _image(self, at: int) -> Pixels:
    if at not in self._images:
      self._images[at] = self._pixels(at)
    return self._images[at]

  def _pixels(self, at: int) -> Pixels:
    with Image.open(io.BytesIO(self._blobs[at])) as image:
      return np.array(image)

  def _video(self, entry: Mapping) -> Video:
    frames = np.stack([self._pixels(at) for at in entry["frames"]])
    return Video(frames=frames, times=self.array(entry["times"]))

  def _task(self, entry: Mapping) -> Task:
    return Task(
      id=entry["id"],
      images=tuple(self._image(at) for at in entry["images"]),
      question=entry["question"],
      answer=entry["answer"],
      kind=entry["kind"],
      boxes=tuple(Box(*b) for b in entry["boxes"]),
      videos=tuple(self._videos[at] for at in entry["videos"]),
    )

  def _rebuilt(self, entry: Mapping) -> Patches:
    at, kind = entry["at"], entry["from"]
    if (kind, at) not in self._patches:
      shown = self._videos[at] if kind == "video" else self._image(at)
      self._patches[kind, at] = self._process(shown)
    patches = self._patches[kind, at]
    if (now := _made(patches)) != entry["made"]:
      raise ValueError(
        f"the {kind} processor gives patches {now}, stored were {entry['made']}: "
        "restore with the processor settings the experience was recorded with"
      )
    return patches

  def _step(self, entry: Mapping) -> Step:
    completion = Completion(
      context=Segment(
        tokens=self.array(entry["context"]),
        images=tuple(self._rebuilt(i) for i in entry["images"]),
      ),
      tokens=self.array(entry["tokens"]),
      logps=self.array(entry["logps"]),
      entropies=self.array(entry["entropies"]),
      text=entry["text"],
      finished=entry["finished"],
      policy_version=entry["policy_version"],
    )
    call = entry["call"]
    return Step(
      completion=completion,
      call=None if call is None else ToolCall(name=call["name"], arguments=call["arguments"]),
      result=None if entry["result"] is None else self._result(entry["result"]),
    )

  def _result(self, entry: Mapping) -> ToolResult:
    return ToolResult(
      text=entry["text"],
      images=tuple(
        Picture(pixels=self._image(p["at"]), **_place_from_json(p)) for p in entry["images"]
      ),
      masks=tuple(self._mask(m) for m in entry["masks"]),
      error=entry["error"],
      seconds=entry["seconds"],
    )

  def _mask(self, entry: Mapping) -> Mask:
    place = _place_from_json(entry)
    height, width = int(place["box"].height), int(place["box"].width)
    bits = np.unpackbits(self.array(entry["inside"]), count=height * width)
    return Mask(inside=bits.reshape(height, width).astype(bool), **place)


def _made(patches: Patches) -> dict:
  """What tells patches apart, as JSON gives it back."""
  return {
    "key": patches.key,
    "grid": list(patches.grid),
    "size": list(patches.size),
    "interval": patches.interval,
  }


def _place(of: Picture | Mask) -> dict:
  return {"source": of.source, "box": _box_to_json(of.box), "frame": of.frame}


def _place_from_json(entry: Mapping) -> dict:
  return {"source": entry["source"], "box": Box(*entry["box"]), "frame": entry["frame"]}


def _box_to_json(box: Box) -> list[float]:
  return [float(c) for c in dataclasses.astuple(box)]


def _vote_to_json(vote: Vote) -> dict:
  return {
    "answer": vote.answer,
    "confidence": float(vote.confidence),
    "share": float(vote.share),
    "margin": float(vote.margin),
    "counts": {answer: float(share) for answer, share in vote.counts.items()},
    "ballots": [[b.answer, float(b.weight), b.view, b.source] for b in vote.ballots],
  }


def _vote_from_json(entry: Mapping) -> Vote:
  return Vote(
    answer=entry["answer"],
    confidence=entry["confidence"],
    share=entry["share"],
    margin=entry["margin"],
    counts=entry["counts"],
    ballots=tuple(
      Ballot(answer=a, weight=w, view=view, source=source)
      for a, w, view, source in entry["ballots"]
    ),
  )
