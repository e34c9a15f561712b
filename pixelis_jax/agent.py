"""Episodes: ask, look, answer. One loop for rollouts, evaluation and online use.

The policy is the function `generate`; nothing here knows what computes it. Episodes of a batch
advance in lock-step, one turn a round, so that the policy is always asked for many turns at once.
The calls of a round run at the same time, in threads: costly tools wait there for other processes.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from pixelis_jax.chat.parse import ANSWERS, parse_call
from pixelis_jax.cluster import agree
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import (
  Completion,
  Generate,
  Status,
  Step,
  Task,
  ToolCall,
  ToolResult,
  Trajectory,
  Turns,
)

# As many as `tools.workers` has processes or more: some wait for another that asks the same.
THREADS = max(32, os.cpu_count() or 1)


@runtime_checkable
class Run(Protocol):
  """Executes a call: `Toolbox.run`, or an arm of the ablation that answers in its place.

  Several threads call it at once, in any order.
  """

  def __call__(
    self, call: ToolCall, task: Task, results: Sequence[ToolResult], view: View = IDENTITY
  ) -> ToolResult: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
  """When to stop, and where the answer is then, one of `parse.ANSWERS`.

  Turns an episode; tokens an episode, those the policy saw and those it wrote; malformed calls an
  episode; wall seconds a batch.
  """

  turns: int
  tokens: int
  bad_calls: int = 1
  seconds: float = float("inf")
  answer: str = "boxed"

  def __post_init__(self):
    if self.answer not in ANSWERS:
      raise ValueError(f"limits.answer {self.answer!r} must be one of {tuple(ANSWERS)}")


def play(
  tasks: Sequence[Task],
  *,
  generate: Generate,
  run: Run,
  limits: Limits,
  views: Sequence[View] | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> list[Trajectory]:
  """Plays every task to its end; a task may stand in `tasks` several times (samples of a prompt).

  Args:
    views: for each task the visual operation its tool results pass through; none by default.
  """
  views = [IDENTITY] * len(tasks) if views is None else list(views)
  if len(views) != len(tasks):
    raise ValueError(f"{len(views)} views for {len(tasks)} tasks")
  started = clock()
  turns: list[Turns] = [()] * len(tasks)
  ended: dict[int, Status] = {}

  def advance(played: tuple[int, Completion]) -> tuple[Step, Status | None]:
    i, completion = played
    return _advance(completion, tasks[i], turns[i], run, views[i], limits)

  with ThreadPoolExecutor(THREADS) as pool:
    while True:
      live = [i for i in range(len(tasks)) if i not in ended]
      if not any(agree(len(live))):  # Other processes may have some left, and need our devices.
        break
      completions = generate([(tasks[i], turns[i]) for i in live])
      advanced = list(pool.map(advance, zip(live, completions, strict=True)))
      for i, (step, status) in zip(live, advanced, strict=True):
        turns[i] = (*turns[i], step)
        if status is not None:
          ended[i] = status
      if len(ended) < len(tasks) and clock() - started > limits.seconds:
        ended = dict.fromkeys(range(len(tasks)), Status.TIMEOUT) | ended
  return [_finish(task, turns[i], ended[i], limits) for i, task in enumerate(tasks)]


def _advance(
  completion: Completion, task: Task, before: Turns, run: Run, view: View, limits: Limits
) -> tuple[Step, Status | None]:
  """One turn: what the policy wrote, executed; a status if that ends the episode."""
  if not completion.finished:
    return Step(completion=completion), Status.OUT_OF_TOKENS
  try:
    call = parse_call(completion.text)
  except ValueError as e:  # The policy wrote nonsense: that is data.
    step = Step(completion=completion, result=ToolResult(text="", error=str(e)))
    bad = 1 + sum(s.call is None for s in before)
    return step, _limit(
      before, completion, limits, Status.BAD_CALL if bad > limits.bad_calls else None
    )
  if call is None:
    answered = ANSWERS[limits.answer](completion.text) is not None
    return Step(completion=completion), Status.ANSWERED if answered else Status.NO_ANSWER
  if status := _limit(before, completion, limits, None):
    return Step(completion=completion, call=call), status
  results = [s.result for s in before if s.result is not None]
  result = run(call, task, results, view)
  return Step(completion=completion, call=call, result=result), None


def _limit(
  before: Turns, completion: Completion, limits: Limits, status: Status | None
) -> Status | None:
  if status is not None:
    return status
  if len(before) + 1 >= limits.turns:
    return Status.OUT_OF_STEPS
  read = [
    len(c.context.tokens) + len(c.tokens) for c in (*(s.completion for s in before), completion)
  ]
  return Status.OUT_OF_TOKENS if sum(read) >= limits.tokens else None


def _finish(task: Task, turns: Turns, status: Status, limits: Limits) -> Trajectory:
  said = turns[-1].completion.text
  answer = ANSWERS[limits.answer](said) if status is Status.ANSWERED else None
  return Trajectory(task=task, steps=turns, status=status, answer=answer)
