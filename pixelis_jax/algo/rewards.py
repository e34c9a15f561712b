"""What a trajectory earned: the parts of `Reward`, each in its own units, before any weight."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from pixelis_jax.algo import answers
from pixelis_jax.algo.curiosity import OFF, PRESETS, curiosity_bonus
from pixelis_jax.types import Reward, Status, Trajectory


def task_reward(trajectory: Trajectory) -> float:
  """1 if the answer means what `Task.answer` means, else 0; ValueError without a label."""
  return agreement(trajectory, trajectory.task.answer)


def agreement(trajectory: Trajectory, target: str | None) -> float:
  """1 if the trajectory's answer means `target` (a label, or a vote's answer), else 0.

  No answer earns 0. Raises ValueError where `target` is None or empty: nothing can be scored
  against it.
  """
  if target is None or not answers.canonical(target):
    raise ValueError(
      f"task {trajectory.task.id!r} cannot be scored against {target!r}: "
      "give a labelled task or a vote's answer"
    )
  return float(answers.equal(trajectory.answer, target))


def format_reward(trajectory: Trajectory) -> float:
  """1 if it ended with a non-empty answer and no call was malformed or failed, else 0."""
  answered = trajectory.status is Status.ANSWERED and answers.cluster([trajectory.answer])
  return float(bool(answered) and trajectory.errors == 0)


def tool_cost(trajectory: Trajectory) -> float:
  """Tool calls made, failed and malformed ones included; a cost, so its weight is negative."""
  return float(trajectory.calls)


def score(group: Sequence[Trajectory], *, curiosity: str, target: str | None) -> list[Reward]:
  """Rewards of samples of one task; `coherence` stays 0.

  Args:
    group: samples of the same task; anything else raises ValueError.
    curiosity: a name in `curiosity.PRESETS`, or "off".
    target: what a right answer means: `Task.answer` when training on labels, a vote's answer
      online. The label is read from nowhere else, so it cannot reach online learning. None raises
      ValueError.
  """
  if len({trajectory.task.id for trajectory in group}) != 1:
    ids = sorted({trajectory.task.id for trajectory in group})
    raise ValueError(
      f"a group is the samples of one task, got {len(group)} trajectories of tasks {ids}"
    )
  if curiosity != OFF and curiosity not in PRESETS:
    raise ValueError(f"curiosity {curiosity!r} must be one of {[OFF, *PRESETS]}")
  bonus = [0.0] * len(group) if curiosity == OFF else curiosity_bonus(group, PRESETS[curiosity])
  return [
    Reward(
      task=agreement(trajectory, target),
      format=format_reward(trajectory),
      curiosity=extra,
      tool_cost=tool_cost(trajectory),
    )
    for trajectory, extra in zip(group, bonus, strict=True)
  ]


def totals(
  rewards: Sequence[Reward], *, weights: Mapping[str, float], group: int
) -> Float32[np.ndarray, "Q G"]:
  """Weighted sums, a row a question; `rewards` holds each question's `group` samples together."""
  if group < 1 or len(rewards) % group:
    raise ValueError(f"{len(rewards)} rewards do not fill groups of {group}")
  return np.asarray([r.total(weights) for r in rewards], np.float32).reshape(-1, group)
