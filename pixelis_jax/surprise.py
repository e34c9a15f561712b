"""Surprise: how far calls showed what a forward model did not expect, which learns from them.

The curiosity of ICM (`model/icm.py`) over episodes. A state is what the policy was shown last, a
picture and words, as the weights that the run was started with see them; an action is a call
(`algo/dynamics.py`). Each step's transitions are scored by the model that had not seen them, then
learned. What is looked at again and again is expected in the end, and no longer pays.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from pixelis_jax import cluster, learner, packing, sampler, sharding
from pixelis_jax.algo import dynamics
from pixelis_jax.model.icm import ForwardModel
from pixelis_jax.types import Task, Trajectory, Turns


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class Transitions:
  """phi(s), a, phi(s'), and 1 for rows that are one, 0 for padding."""

  states: Float[Array, "N E"]
  actions: Float[Array, "N A"]
  following: Float[Array, "N E"]
  weights: Float[Array, " N"]


def forward_loss(model: ForwardModel) -> learner.Loss:
  """The mean error of the transitions; `errors` are those of each.

  `change` is the mean error of a model by which calls change nothing.
  """

  def loss(params: learner.Params, rows: Transitions) -> tuple[Array, learner.Metrics]:
    weights = rows.weights
    count = jnp.maximum(weights.sum(), 1.0)
    errors = weights * model.errors(params, rows.states, rows.actions, rows.following)
    change = weights * jnp.square(rows.following - rows.states).sum(axis=-1)
    told = {"square": jnp.square(errors).sum(), "change": change.sum() / count}
    return errors.sum() / count, {"errors": errors, "count": weights.sum(), **told}

  return loss


class Surprise:
  """A run's forward model, and the reward `dynamics`; nothing at all where that weighs nothing.

  Several processes learn the same from the transitions of all.
  """

  def __init__(self, c: Any, policy: sampler.Policy, mesh: Mesh):
    """Args:
    c: of rft: fields seed, rows_multiple, and of `reward` dynamics (hidden, lr, passes, warmup,
      clip) and weights.
    mesh: where is learned.

    Raises ValueError for a policy without tools, and for settings that cannot be.
    """
    self._c, self._learned, self._scale = c.reward.dynamics, None, dynamics.Scale()
    if not c.reward.weights.dynamics:
      return
    self._tools = tuple(policy.tools.tools)
    _check(self._c, self._tools, c.reward.weights.dynamics)
    # Where is learned, for there the weights are, and rollouts may be played ahead elsewhere.
    self._policy = sampler.on_mesh(policy, mesh)
    self._multiple = c.rows_multiple
    width = 2 * policy.model.config.text.width
    model = ForwardModel(width, len(self._tools) + dynamics.WHERE, self._c.hidden)
    tx = optax.adam(self._c.lr)
    weights = jax.tree.map(np.asarray, model.init(jax.random.key(c.seed)))
    weights = jax.device_put(weights, sharding.replicated(mesh))
    self._learned = learner.init_state(weights, tx, seed=c.seed)
    self._step: Callable = learner.make_step(forward_loss(model), tx, mesh=mesh)

  def __call__(self, played: Sequence[Trajectory]) -> tuple[list[float] | None, dict[str, float]]:
    """(the reward of each episode, what was measured), before the model learns from them.

    None and nothing where the reward is off. Until `warmup` transitions have been seen it is 0: the
    unit is not known yet.
    """
    if self._learned is None:
      return None, {}
    errors, measured = self._learn(played)
    ends = np.cumsum([len(dynamics.transitions(t)) for t in played])
    unit = self._scale.unit if self._scale.count >= self._c.warmup else 0.0
    paid = [dynamics.reward(own, unit, clip=self._c.clip) for own in np.split(errors, ends[:-1])]
    return paid, {**measured, "dynamics_scale": unit}

  def beside(self, state: learner.TrainState) -> Any:
    """What a checkpoint holds: the policy's state, and the model's where there is one."""
    return state if self._learned is None else {"policy": state, "dynamics": self._learned}

  def extra(self) -> dict[str, Any]:
    """Plain values that belong beside it."""
    if self._learned is None:
      return {}
    return {"dynamics": {"count": self._scale.count, "square": self._scale.square}}

  def resumed(self, held: Any, extra: Mapping[str, Any]) -> learner.TrainState:
    """The policy's state of a checkpoint; the model goes on from its own."""
    if self._learned is None:
      return held
    self._learned, self._scale = held["dynamics"], dynamics.Scale(**extra["dynamics"])
    return held["policy"]

  def _learn(
    self, played: Sequence[Trajectory]
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, float]]:
    """The error of each transition in their order; after it all have been learned."""
    pairs = [(t, i) for t in played for i in dynamics.transitions(t)]
    if not any(cluster.agree(len(pairs))):
      return np.zeros(0, np.float32), {}
    seen = [(t.task, t.steps[: i + turns]) for turns in (1, 2) for t, i in pairs]
    states, following = np.split(self._states(seen), 2)
    frame = self._policy.tools.frame
    actions = np.zeros((len(pairs), len(self._tools) + dynamics.WHERE), np.float32)
    for n, (t, i) in enumerate(pairs):
      actions[n] = dynamics.action(t, i, self._tools, frame)
    rows, at = self._rows(states, actions, following)
    self._learned, first = self._step(self._learned, rows)
    for _ in range(self._c.passes - 1):
      self._learned, _ = self._step(self._learned, rows)
    sums = {name: float(first[name]) for name in ("count", "square")}
    self._scale = self._scale.after(**sums)
    measured = {"dynamics_error": float(first["loss"]), "dynamics_change": float(first["change"])}
    return sharding.own_rows(first["errors"])[at], measured

  def _states(self, seen: Sequence[tuple[Task, Turns]]) -> Float32[np.ndarray, "N E"]:
    """What each was shown last: the memory's key of it, of the last result's words for a question.

    No more at once than rollouts have.
    """
    tasks, turns, said = [t for t, _ in seen], [s for _, s in seen], [_said(*s) for s in seen]
    (most,) = cluster.agree(len(seen))
    size = self._policy.sampler.max_rows
    parts = [slice(at, at + size) for at in range(0, most, size)]
    return np.concatenate(
      [sampler.embed(self._policy, tasks[part], turns[part], said[part]) for part in parts]
    )

  def _rows(self, *columns: Float32[np.ndarray, "N _"]) -> tuple[Transitions, list[int]]:
    """The transitions on the devices, and the row of each."""
    blocks, count = self._policy.sampler.blocks, len(columns[0])
    size, at = packing.seats(packing.spread(count, blocks), blocks, multiple_of=self._multiple)
    padded = [np.zeros((size, *c.shape[1:]), np.float32) for c in (*columns, np.ones(count))]
    for rows, values in zip(padded, (*columns, np.ones(count)), strict=True):
      rows[at] = values
    return sharding.put_rows(Transitions(*padded), self._policy.model.mesh), at


def _said(task: Task, turns: Turns) -> str:
  """The words before the last of these turns: a tool's, at first the question."""
  result = turns[-2].result if len(turns) > 1 else None
  return task.question if result is None else result.text or result.error or ""


def _check(c: Any, tools: Sequence[str], weight: float) -> None:
  if not tools:
    raise ValueError(f"reward.weights.dynamics {weight} must be 0 for a policy without tools")
  wrong = [f"{name} {value}" for name, value in c.items() if not value > 0]
  if wrong:
    raise ValueError(f"reward.dynamics: {', '.join(wrong)} must be positive")
