"""Stand-ins for the engines: a policy that says what it is told, tokens that are bytes, tiny tasks.

Independent of chat/: a scripted completion's tokens are the UTF-8 bytes of its text.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pixelis_jax.types import Box, Completion, Generate, Segment, Task, ToolResult, Turns


class Bytes:
  """A tokenizer whose ids are UTF-8 bytes, and a chat without markup around them."""

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens: np.ndarray) -> str:
    return bytes(tokens.tolist()).decode()

  def prompt(self, task: Task) -> Segment:
    return Segment(tokens=self.encode(task.question))

  def result(self, result: ToolResult) -> Segment:
    return Segment(tokens=self.encode(result.error or result.text))


def completion(
  text: str, *, context: Segment | None = None, finished: bool = True, policy_version: int = 0
) -> Completion:
  """A byte-token completion the policy was sure of: log-probs and entropies are zero."""
  tokens = Bytes().encode(text)
  return Completion(
    context=Segment(tokens=np.zeros(0, np.int32)) if context is None else context,
    tokens=tokens,
    logps=np.zeros(tokens.shape, np.float32),
    entropies=np.zeros(tokens.shape, np.float32),
    text=text,
    finished=finished,
    policy_version=policy_version,
  )


def scripted(
  chat: Bytes, texts: Mapping[str, Sequence[str]], *, policy_version: int = 0
) -> Generate:
  """A policy whose turn i on a task is `texts[task.id][i]`, whatever it is shown.

  `chat` needs `prompt(task)` and `result(tool_result)`. A turn beyond the script is an
  AssertionError: the loop should have stopped. So is a turn after one that showed nothing.
  """

  def generate(requests: Sequence[tuple[Task, Turns]], /) -> list[Completion]:
    return [reply(task, steps) for task, steps in requests]

  def reply(task: Task, steps: Turns) -> Completion:
    script = texts[task.id]
    assert len(steps) < len(script), f"task {task.id}: turn {len(steps)} of {len(script)} scripted"
    if not steps:
      context = chat.prompt(task)
    else:
      assert steps[-1].result is not None, f"task {task.id}: turn {len(steps)} follows no result"
      context = chat.result(steps[-1].result)
    return completion(script[len(steps)], context=context, policy_version=policy_version)

  return generate


def image(height: int = 8, width: int = 12, *, seed: int = 0) -> np.ndarray:
  """Noise: no two pixels are likely equal, so a wrong crop, flip or channel order shows."""
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def task(
  id: str,
  *,
  question: str = "what?",
  answer: str | None = "7",
  kind: str = "",
  images: Sequence[np.ndarray] | None = None,
  boxes: Sequence[Box] = (),
) -> Task:
  """A question about one 8 x 12 noise image."""
  return Task(
    id=id,
    images=(image(),) if images is None else tuple(images),
    question=question,
    answer=answer,
    kind=kind,
    boxes=tuple(boxes),
  )
