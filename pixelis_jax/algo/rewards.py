"""What a trajectory earned: the parts of `Reward`, each in its own units, before any weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from pixelis_jax.algo import answers
from pixelis_jax.algo.coherence import coherence
from pixelis_jax.algo.curiosity import OFF, PRESETS, curiosity_bonus
from pixelis_jax.algo.misuse import Frame, misuse
from pixelis_jax.algo.verifiers import verify
from pixelis_jax.types import Reward, Status, Trajectory

EVIDENCE = -1  # As a target of calls: as many as the task has boxes of evidence.


def agreement(trajectory: Trajectory, target: str | None, *, verifier: str = "equal") -> float:
  """How right the trajectory's answer is by a rule of `VERIFIERS`: 1 if it means `target`.

  `target` is a label, or a vote's answer. No answer earns 0. Raises ValueError where `target` is
  None or empty: nothing can be scored against it.
  """
  if target is None or not answers.canonical(target):
    raise ValueError(
      f"task {trajectory.task.id!r} cannot be scored against {target!r}: "
      "give a labelled task or a vote's answer"
    )
  return verify(trajectory.answer, target, verifier=verifier)


def format_reward(trajectory: Trajectory) -> float:
  """1 if it ended with a non-empty answer and no call was malformed or failed, else 0."""
  answered = trajectory.status is Status.ANSWERED and answers.cluster([trajectory.answer])
  return float(bool(answered) and trajectory.errors == 0)


def tool_cost(trajectory: Trajectory) -> float:
  """Tool calls made, failed and malformed ones included; a cost, so its weight is negative."""
  return float(trajectory.calls)


def tool_bonus(trajectory: Trajectory, task: float) -> float:
  """1 if the answer is right (task reward above 1/2) and a call succeeded, else 0.

  DeepEyes' (https://arxiv.org/abs/2505.14362, weight 1.2 beside 0.8 of the task): looking alone
  earns nothing.
  """
  return float(task > 0.5 and trajectory.calls > trajectory.errors)


def call_target(trajectory: Trajectory, target: int) -> float:
  """0 for `target` calls, down to -1 for as many too few or too many as the target is, or more.

  Qwen3-VL's reason for it (https://arxiv.org/abs/2511.21631): without one, policies end at exactly
  one call. `EVIDENCE` is the number of the task's boxes.
  """
  wanted = len(trajectory.task.boxes) if target == EVIDENCE else target
  return -min(abs(trajectory.calls - wanted) / max(wanted, 1), 1.0)


def overlong(trajectory: Trajectory, *, tokens: int, buffer: int) -> float:
  """0 down to -1 over the last `buffer` tokens of what an episode may have; 0 for no buffer.

  DAPO's soft punishment (https://arxiv.org/abs/2503.14476). Tokens are those of `agent.Limits`,
  seen and sampled, as it is they that cut an episode off.
  """
  if not 0 <= buffer <= tokens:
    raise ValueError(f"buffer {buffer} must lie in [0, tokens] = [0, {tokens}]")
  if not buffer:
    return 0.0
  read = [step.completion for step in trajectory.steps]
  over = sum(len(c.context.tokens) + len(c.tokens) for c in read) - (tokens - buffer)
  return -min(max(over / buffer, 0.0), 1.0)


def score(
  group: Sequence[Trajectory],
  c: Any,
  *,
  target: str | None,
  frame: Frame,
  embeddings: Sequence[Float32[np.ndarray, "N D"]] | None = None,
  surprises: Sequence[float] | None = None,
) -> list[Reward]:
  """Rewards of samples of one task.

  Args:
    group: samples of the same task; anything else raises ValueError.
    c: fields curiosity (a name in `curiosity.PRESETS`, or "off"), verifier (of `VERIFIERS`),
      call_target, and those of `overlong` in `overlong`.
    target: what a right answer means: `Task.answer` when training on labels, a vote's answer
      online. The label is read from nowhere else, so it cannot reach online learning. None raises
      ValueError.
    frame: as for `misuse`.
    embeddings: of each sample's steps, for `coherence`; None to leave them out.
    surprises: each sample's `dynamics.reward`; None to leave it out.
  """
  if len({trajectory.task.id for trajectory in group}) != 1:
    ids = sorted({trajectory.task.id for trajectory in group})
    raise ValueError(
      f"a group is the samples of one task, got {len(group)} trajectories of tasks {ids}"
    )
  if c.curiosity != OFF and c.curiosity not in PRESETS:
    raise ValueError(f"curiosity {c.curiosity!r} must be one of {[OFF, *PRESETS]}")
  off = c.curiosity == OFF
  bonus = [0.0] * len(group) if off else curiosity_bonus(group, PRESETS[c.curiosity])
  steps = [None] * len(group) if embeddings is None else embeddings
  surprises = [0.0] * len(group) if surprises is None else surprises
  right = [agreement(trajectory, target, verifier=c.verifier) for trajectory in group]
  return [
    Reward(
      task=task,
      format=format_reward(trajectory),
      curiosity=extra,
      dynamics=surprise,
      coherence=coherence(trajectory, embedded),
      tool_cost=tool_cost(trajectory),
      misuse=misuse(trajectory, frame),
      tool_bonus=tool_bonus(trajectory, task),
      call_target=call_target(trajectory, c.call_target),
      overlong=overlong(trajectory, **c.overlong),
    )
    for trajectory, task, extra, embedded, surprise in zip(
      group, right, bonus, steps, surprises, strict=True
    )
  ]


def totals(
  rewards: Sequence[Reward], *, weights: Mapping[str, float], group: int
) -> Float32[np.ndarray, "Q G"]:
  """Weighted sums, a row a question; `rewards` holds each question's `group` samples together."""
  if group < 1 or len(rewards) % group:
    raise ValueError(f"{len(rewards)} rewards do not fill groups of {group}")
  return np.asarray([r.total(weights) for r in rewards], np.float32).reshape(-1, group)
