"""Coherence: whether the steps of an episode follow from each other.

Rules over neighbouring calls, and the cosine of neighbouring steps' embeddings. Rules and constants
are those of the torch project (Pixelis, reward_shaping_enhanced.py), but for two: cutting out a
second object after measuring a first is no fault, and a box can be measured without a mask.
"""

import numpy as np
from jaxtyping import Float32

from pixelis_jax.types import Status, ToolCall, Trajectory

REPEATED, FOLLOWED, DETOUR, AGAIN = -0.5, 0.2, -0.3, -0.3
# Of the mean cosine: what goes on from what was said, says it again, or leaves it.
GOES_ON, STANDS, LEAPS = 0.3, -0.2, -0.3

ANSWER = "answer"
OPERATIONS = {"crop_image_normalized": "zoom_in", "image_zoom_in_tool": "zoom_in"}
FOLLOWS = {
  ("segment_object_at", "get_properties"),
  ("segment_object_at", "track_object"),
  ("zoom_in", "read_text"),
  ("read_text", ANSWER),
  ("get_properties", ANSWER),
}
DETOURS = {("track_object", "track_object"), ("zoom_in", "zoom_in")}


def coherence(trajectory: Trajectory, embeddings: Float32[np.ndarray, "N D"] | None) -> float:
  """The mean of what the rules say, in [-1, 1]; 0 where they say nothing.

  A call that repeats the one before costs 1/2. A pair of `FOLLOWS` earns 0.2, one of `DETOURS`
  costs 0.3; each object that is cut out again later on costs 0.3. The mean cosine of neighbouring
  embeddings earns 0.3 between 0.3 and 0.7, costs 0.2 above 0.9 and 0.3 below 0.1.

  Args:
    trajectory: the episode.
    embeddings: of its steps, in order, of any length but 0; None to leave them out.
  """
  calls = [step.call for step in trajectory.steps if step.call is not None]
  said = [_pair(a, b) for a, b in zip(calls, calls[1:], strict=False)]
  if calls and trajectory.status is Status.ANSWERED:
    said.append(_earned(operation(calls[-1]), ANSWER))
  again = sum(
    operation(call) == "segment_object_at" and any(_same(call, c) for c in calls[: max(i - 1, 0)])
    for i, call in enumerate(calls)
  )
  if again:
    said.append(AGAIN * again)
  if embeddings is not None and len(embeddings) > 1:
    said.append(_flow(embeddings))
  told = [value for value in said if value]
  return float(np.clip(np.mean(told), -1, 1)) if told else 0.0


def operation(call: ToolCall) -> str:
  """What a tool is called here, whatever a released policy calls it."""
  return OPERATIONS.get(call.name, call.name)


def _same(a: ToolCall, b: ToolCall) -> bool:
  return a.name == b.name and dict(a.arguments) == dict(b.arguments)


def _pair(a: ToolCall, b: ToolCall) -> float:
  return REPEATED if _same(a, b) else _earned(operation(a), operation(b))


def _earned(first: str, then: str) -> float:
  if (first, then) in DETOURS:
    return DETOUR
  return FOLLOWED if (first, then) in FOLLOWS else 0.0


def _flow(embeddings: Float32[np.ndarray, "N D"]) -> float:
  units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  cosine = float((units[:-1] * units[1:]).sum(axis=1).mean())
  if cosine > 0.9:
    return STANDS
  if cosine < 0.1:
    return LEAPS
  return GOES_ON if 0.3 < cosine < 0.7 else 0.0
