"""The vocabulary: every host value that crosses a module boundary. numpy only.

Values are frozen, keyword-only and complete when built. `None` means "there is none", never "not
yet". What the policy gets wrong is data here (`Status`, `ToolResult.error`); what we get wrong
raises.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, dataclass_transform, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

# Anonymous sides: the images of one task may differ in size.
Pixels: TypeAlias = UInt8[np.ndarray, "_ _ 3"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def value(cls: type) -> type:
  """A frozen, slotted, keyword-only dataclass. Compared by identity: fields are arrays."""
  return dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)(cls)


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Box:
  """Half-open pixel rectangle [x0, x1) x [y0, y1); the frame (source or shown) is the holder's."""

  x0: float
  y0: float
  x1: float
  y1: float

  def __post_init__(self):
    if not (self.x0 < self.x1 and self.y0 < self.y1):
      raise ValueError(f"box {dataclasses.astuple(self)} must satisfy x0 < x1 and y0 < y1")

  @property
  def width(self) -> float:
    return self.x1 - self.x0

  @property
  def height(self) -> float:
    return self.y1 - self.y0

  @property
  def center(self) -> tuple[float, float]:
    return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

  def holds(self, other: "Box") -> bool:
    """Whether no part of the other is outside."""
    across = self.x0 <= other.x0 and other.x1 <= self.x1
    return across and self.y0 <= other.y0 and other.y1 <= self.y1

  def iou(self, other: "Box") -> float:
    """Intersection over union, 0 to 1."""
    w = min(self.x1, other.x1) - max(self.x0, other.x0)
    h = min(self.y1, other.y1) - max(self.y0, other.y0)
    inter = max(w, 0.0) * max(h, 0.0)
    return inter / (self.width * self.height + other.width * other.height - inter)


@value
class Video:
  """Frames of one size and when each is shown: seconds from the start, rising."""

  frames: UInt8[np.ndarray, "F height width 3"]
  times: Float32[np.ndarray, " F"]

  def __post_init__(self):
    count = len(self.frames)
    rising = bool(np.all(np.diff(self.times) > 0)) and bool(np.all(self.times >= 0))
    if count == 0 or len(self.times) != count or not rising:
      raise ValueError(f"times {self.times.tolist()} must be {count} >= 1 rising seconds from 0")


@value
class Task:
  """A question about images and videos. `answer` is None where nobody knows it (online).

  They are shown in this order, images first. `boxes` are the evidence in source pixels of
  `images[0]`, in the order one would look; empty if unknown.
  """

  id: str
  images: tuple[Pixels, ...]
  question: str
  answer: str | None
  kind: str = ""
  boxes: tuple[Box, ...] = ()
  videos: tuple[Video, ...] = ()


@value
class ToolCall:
  """A parsed, not yet executed call: the tool's name and its JSON arguments."""

  name: str
  arguments: Mapping[str, object]


@value
class Picture:
  """Pixels a tool returned, and where they lie: `box` in source pixels of `Task.images[source]`.

  With `frame`, of that frame of `Task.videos[source]`.
  """

  pixels: Pixels
  source: int
  box: Box
  frame: int | None = None


@value
class Mask:
  """An object's pixels: `inside` has the size of `box`, whole source pixels as in `Picture`."""

  inside: Bool[np.ndarray, "_ _"]
  source: int
  box: Box
  frame: int | None = None

  def __post_init__(self):
    if self.inside.shape != (self.box.height, self.box.width):
      raise ValueError(f"mask of {self.inside.shape} must have the size of its box {self.box}")


@value
class ToolResult:
  """What the policy is shown after a call. `error` is for the policy; then `images` is empty.

  `masks` are not shown: later calls refer to them by their number in the episode, from 1.
  """

  text: str
  images: tuple[Picture, ...] = ()
  masks: tuple[Mask, ...] = ()
  error: str | None = None
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Sight:
  """An object an image shows: its label's number, its box in parts of the image's sides."""

  label: int
  box: Box


@value
class DemoTurn:
  """One target turn: the assistant's text, what the tool showed, and whether it is trained on.

  `sights` describe the result's images, in their order; empty if nobody did.
  """

  text: str
  result: ToolResult | None
  supervised: bool = True
  sights: tuple[tuple[Sight, ...], ...] = ()


@value
class Demo:
  """An executed, verified demonstration: its last turn has no result and answers the task.

  `sights` describe the task's images, in their order; empty if nobody did.
  """

  task: Task
  turns: tuple[DemoTurn, ...]
  sights: tuple[tuple[Sight, ...], ...] = ()


@value
class Patches:
  """One image or video as the tower takes it: Qwen's patch order, grid (t, h, w) in patches.

  `key` is the hash of content and size; equal keys have equal features. `size` is (height, width)
  in pixels as shown to the model. `interval` is the time between the t steps of a video, in
  seconds; None for a still image.
  """

  patches: Float32[np.ndarray, "P K"]
  grid: tuple[int, int, int]
  size: tuple[int, int]
  key: str
  interval: float | None = None


@value
class Segment:
  """Tokens that enter the sequence together with the images of their placeholders, in order."""

  tokens: Int32[np.ndarray, " C"]
  images: tuple[Patches, ...] = ()


@value
class Completion:
  """Tokens sampled in one turn, and the new tokens shown before them.

  `logps` are the sampler's log-probabilities at temperature 1 in float32; `entropies` in nats of
  the whole vocabulary at the same positions. `finished` is False when the token budget ended the
  turn.
  """

  context: Segment
  tokens: Int32[np.ndarray, " T"]
  logps: Float32[np.ndarray, " T"]
  entropies: Float32[np.ndarray, " T"]
  text: str
  finished: bool
  policy_version: int


class Status(enum.Enum):
  """How an episode ended."""

  ANSWERED = "answered"
  NO_ANSWER = "no_answer"  # The turn ended with neither a call nor an answer.
  BAD_CALL = "bad_call"  # Malformed calls, more often than the limits allow.
  OUT_OF_STEPS = "out_of_steps"
  OUT_OF_TOKENS = "out_of_tokens"
  TIMEOUT = "timeout"


@value
class Step:
  """One turn: what was sampled, the call in it, and what came back. The last turn has neither."""

  completion: Completion
  call: ToolCall | None = None
  result: ToolResult | None = None


@value
class Trajectory:
  """A finished episode. `answer` is what the last turn has as one (`agent.Limits`), or None."""

  task: Task
  steps: tuple[Step, ...]
  status: Status
  answer: str | None

  @property
  def calls(self) -> int:
    """Tool calls made, failed ones included."""
    return sum(s.call is not None or s.result is not None for s in self.steps)

  @property
  def errors(self) -> int:
    return sum(s.result is not None and s.result.error is not None for s in self.steps)

  @property
  def pictures(self) -> tuple[Picture, ...]:
    """All that tools showed, in order."""
    return tuple(p for s in self.steps if s.result is not None for p in s.result.images)


@value
class Reward:
  """Reward parts of one trajectory, each in its own units; weights are applied by `total`."""

  task: float = 0.0
  format: float = 0.0
  curiosity: float = 0.0
  dynamics: float = 0.0
  coherence: float = 0.0
  tool_cost: float = 0.0
  misuse: float = 0.0
  tool_bonus: float = 0.0
  call_target: float = 0.0
  overlong: float = 0.0

  def total(self, weights: Mapping[str, float]) -> float:
    """Weighted sum. Every part must have a weight."""
    return float(sum(weights[f.name] * getattr(self, f.name) for f in dataclasses.fields(self)))


@value
class Ballot:
  """One voter's answer: `weight` >= 0, `view` its operation, `source` "self" or a memory id."""

  answer: str | None
  weight: float
  view: str
  source: str = "self"


@value
class Vote:
  """The consensus; `counts` are the shares of weight of each canonical answer.

  `share` and `margin` of the winner, in [0, 1], say how far the voters agree; `confidence` how far
  they are to be believed: at most the share, or where that was calibrated how often such votes are
  right. `uncalibrated` is what it was before; None: it was not calibrated.
  """

  answer: str | None
  confidence: float
  share: float
  margin: float
  counts: Mapping[str, float]
  ballots: tuple[Ballot, ...]
  uncalibrated: float | None = None


@value
class Experience:
  """One answered request: `key` is a unit vector; `trajectories` are the policy's own samples.

  `looks` are two episodes of the reference: the plain one, and that in the view which had most
  weight among those that said what was voted. None where it tells no more than the plain look.
  """

  id: str
  key: Float32[np.ndarray, " D"]
  trajectories: tuple[Trajectory, ...]
  vote: Vote
  policy_version: int
  looks: tuple[Trajectory, Trajectory] | None = None


Turns: TypeAlias = tuple[Step, ...]


@runtime_checkable
class Generate(Protocol):
  """The policy to whoever uses it: one more turn for each (task, steps so far), in their order."""

  def __call__(self, requests: Sequence[tuple[Task, Turns]], /) -> list[Completion]: ...


def content_key(*parts: bytes | str) -> str:
  """First 32 hex digits of SHA-256 over length-prefixed parts: equal content, equal key."""
  digest = hashlib.sha256()
  for part in parts:
    raw = part.encode() if isinstance(part, str) else part
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)
  return digest.hexdigest()[:32]
