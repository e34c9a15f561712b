"""Experiences with every field filled, and a stand-in for the processors; both from a seed."""

import numpy as np

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


def process(shown: Pixels | Video) -> Patches:
  """Depends on every pixel, on the size and on a video's times, as the real ones do."""
  interval = None
  pixels = shown
  if isinstance(shown, Video):
    pixels, interval = shown.frames.reshape(-1, *shown.frames.shape[2:]), float(shown.times[-1])
  height, width = pixels.shape[:2]
  flat = pixels.reshape(-1).astype(np.float32) / np.float32(255)
  return Patches(
    patches=np.stack([flat, flat[::-1]]),
    grid=(1, 1, 2),
    size=(height, width),
    key=content_key(repr(pixels.shape), pixels.tobytes()),
    interval=interval,
  )


def pixels(height: int, width: int, seed: int) -> Pixels:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def video(height: int, width: int, seed: int) -> Video:
  """Of its four frames the third is the first again."""
  frames = np.stack([pixels(height, width, seed + i) for i in (0, 1, 0, 2)])
  return Video(frames=frames, times=np.array([0, 0.1, 1 / 3, 7], np.float32))


def unit(dim: int, seed: int) -> np.ndarray:
  vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
  return vector / np.linalg.norm(vector)


def completion(shown: tuple[Pixels | Video, ...], text: str, seed: int) -> Completion:
  rng = np.random.default_rng(seed)
  return Completion(
    context=Segment(
      tokens=rng.integers(0, 1000, 9).astype(np.int32), images=tuple(process(p) for p in shown)
    ),
    tokens=rng.integers(0, 1000, 5).astype(np.int32),
    logps=-rng.random(5).astype(np.float32),
    entropies=rng.random(5).astype(np.float32),
    text=text,
    finished=True,
    policy_version=4,
  )


def trajectory(task: Task, answer: str | None, seed: int) -> Trajectory:
  """Looks twice, the second time with an error, and answers."""
  crop = Picture(pixels=pixels(6, 7, seed), source=0, box=Box(1.5, 2.0, 8.0, 9.25))
  # A whole frame: its pixels are stored already.
  frame = Picture(pixels=task.videos[0].frames[3], source=0, box=Box(0.0, 0.0, 5.0, 4.0), frame=3)
  rng = np.random.default_rng(seed)
  # 15 pixels: no whole number of bytes.
  mask = Mask(inside=rng.random((3, 5)) < 0.5, source=1, box=Box(2.0, 4.0, 7.0, 7.0))
  moved = Mask(inside=rng.random((2, 4)) < 0.5, source=0, box=Box(0.0, 1.0, 4.0, 3.0), frame=2)
  call = ToolCall(name="zoom_in", arguments={"bbox_2d": [1, 2.5, 8, 9], "image": 1})
  result = ToolResult(text="shown", images=(crop, frame), masks=(mask, moved), seconds=0.25)
  steps = (
    Step(
      completion=completion((*task.images, *task.videos), "look é", seed), call=call, result=result
    ),
    Step(
      completion=completion((crop.pixels, frame.pixels), "look again", seed + 1),
      call=call,
      result=ToolResult(text="", error="box outside"),
    ),
    Step(completion=completion((), f"\\boxed{{{answer}}}", seed + 2)),
  )
  return Trajectory(task=task, steps=steps, status=Status.ANSWERED, answer=answer)


def experience(
  id: str = "r1", *, dim: int = 8, seed: int = 0, answer: str | None = "7", confidence: float = 0.75
) -> Experience:
  task = Task(
    id=id,
    images=(pixels(12, 10, seed), pixels(12, 10, seed + 1)),
    question="which digit?",
    answer=None,
    kind="read",
    boxes=(Box(0.0, 0.0, 4.0, 4.0),),
    videos=(video(4, 5, seed),),
  )
  counts = {"3": 1 / 3, **({} if answer is None else {answer: 2 / 3})}
  ballots = (
    Ballot(answer=answer, weight=1.0, view="identity"),
    Ballot(answer=None, weight=0.1, view="rotate+10", source="r0"),
  )
  vote = Vote(
    answer=answer,
    confidence=confidence,
    share=2 / 3,
    margin=1 / 3,
    counts=counts,
    ballots=ballots,
    uncalibrated=0.625 if seed % 2 else None,
  )
  return Experience(
    id=id,
    key=unit(dim, seed),
    trajectories=(trajectory(task, answer, seed), trajectory(task, "3", seed + 10)),
    vote=vote,
    policy_version=4,
  )


def plain(value: object) -> object:
  """A value as nested tuples that compare by content, arrays with their dtype."""
  if isinstance(value, np.ndarray):
    return str(value.dtype), value.shape, value.tobytes()
  if isinstance(value, tuple | list):
    return tuple(plain(v) for v in value)
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if hasattr(value, "__dataclass_fields__"):
    return type(value).__name__, {f: plain(getattr(value, f)) for f in value.__dataclass_fields__}
  return type(value).__name__, value
