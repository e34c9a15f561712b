"""Experience <-> bytes without pickle: a JSON header, raw little-endian arrays and PNG images.

Patches are not stored (300 KB for a small image): a segment stores which picture or video each came
from, and `restore` runs the processor again, which gives the same bits; their keys are checked.
"""

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixelis_jax.memory import values
from pixelis_jax.types import (
  Ballot,
  Completion,
  Experience,
  Patches,
  Pixels,
  Segment,
  Status,
  Step,
  ToolCall,
  Trajectory,
  Video,
  Vote,
)

MAGIC = b"PXEX"
VERSION = 3
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
  about = {
    "id": experience.id,
    "policy_version": experience.policy_version,
    "key": writer.array(experience.key),
    "vote": _vote_to_json(experience.vote),
    "looks": [writer.trajectory(look) for look in experience.looks or ()],
  }
  return _framed(writer, about, experience.trajectories)


def encode_trajectories(trajectories: Sequence[Trajectory]) -> bytes:
  """`encode` of trajectories alone, as one process sends them to another."""
  return _framed(_Writer(), {}, trajectories)


def _framed(
  writer: "_Writer", about: Mapping[str, object], trajectories: Sequence[Trajectory]
) -> bytes:
  header = {
    **about,
    "trajectories": [writer.trajectory(t) for t in trajectories],
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
  header, reader = _opened(data, process)
  return Experience(
    id=header["id"],
    key=reader.array(header["key"]),
    trajectories=reader.played(header["trajectories"]),
    vote=_vote_from_json(header["vote"]),
    policy_version=header["policy_version"],
    looks=reader.played(header["looks"]) or None,
  )


def restore_trajectories(data: bytes, process: Process) -> list[Trajectory]:
  """What `encode_trajectories` was given, bit for bit; raises as `restore` does."""
  header, reader = _opened(data, process)
  return list(reader.played(header["trajectories"]))


def _opened(data: bytes, process: Process) -> tuple[Mapping, "_Reader"]:
  if len(data) < _PREFIX.size or data[:4] != MAGIC:
    raise ValueError(f"not an encoded experience: {len(data)} bytes starting {bytes(data[:8])!r}")
  _, version, checksum, text_bytes = _PREFIX.unpack_from(data)
  if version != VERSION:
    raise ValueError(f"experience format version {version}, this code reads version {VERSION}")
  body = memoryview(data)[_PREFIX.size :]
  if zlib.crc32(body) != checksum:
    raise ValueError(f"experience of {len(data)} bytes is truncated or garbled: checksum differs")
  header = json.loads(bytes(body[:text_bytes]))
  return header, _Reader(header, body[text_bytes:], process)


class _Writer(values.Writer):
  """Trajectories too."""

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


class _Reader(values.Reader):
  """Trajectories too; an image is processed once."""

  def __init__(self, header: Mapping, blobs: memoryview, process: Process):
    ends = np.cumsum([0, *header["blobs"]]).tolist()
    super().__init__(header, [blobs[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)])
    self._process = process
    self._patches: dict[tuple[str, int], Patches] = {}

  def played(self, entries: Sequence[Mapping]) -> tuple[Trajectory, ...]:
    return tuple(self._trajectory(entry) for entry in entries)

  def _trajectory(self, entry: Mapping) -> Trajectory:
    return Trajectory(
      task=self.tasks[entry["task"]],
      steps=tuple(self._step(s) for s in entry["steps"]),
      status=Status(entry["status"]),
      answer=entry["answer"],
    )

  def _rebuilt(self, entry: Mapping) -> Patches:
    at, kind = entry["at"], entry["from"]
    if (kind, at) not in self._patches:
      shown = self.videos[at] if kind == "video" else self.image(at)
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
      result=None if entry["result"] is None else self.result(entry["result"]),
    )


def _made(patches: Patches) -> dict:
  """What tells patches apart, as JSON gives it back."""
  return {
    "key": patches.key,
    "grid": list(patches.grid),
    "size": list(patches.size),
    "interval": patches.interval,
  }


def _vote_to_json(vote: Vote) -> dict:
  return {
    "answer": vote.answer,
    "confidence": float(vote.confidence),
    "share": float(vote.share),
    "margin": float(vote.margin),
    "uncalibrated": None if vote.uncalibrated is None else float(vote.uncalibrated),
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
    uncalibrated=entry.get("uncalibrated"),  # Not in records of votes before there were any.
  )
