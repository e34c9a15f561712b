"""The forward model of an intrinsic curiosity module (ICM): what an action will be seen to do.

Pathak et al. 2017, https://arxiv.org/abs/1705.05363, section 2.2. There an inverse model, from two
states to the action between them, teaches an encoder to keep what actions change. Here states are
the policy's own features, and frozen: an inverse model would teach nothing that an error is made
of, so there is none. Frozen features stay comparable as errors fall, which learned ones do not
(Burda et al. 2018, https://arxiv.org/abs/1808.04355, section 2.1).
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from pixelis_jax.model.layers import Mlp

Params: TypeAlias = dict


class _Forward(nnx.Module):
  """states + mlp(states, actions), where at first the MLP says 0."""

  def __init__(self, width: int, actions: int, hidden: int, *, rngs: nnx.Rngs):
    self.mlp = Mlp(width + actions, hidden, width, (None, None), "silu", rngs=rngs)
    last = self.mlp.fc2.kernel
    last[...] = jnp.zeros_like(last[...])
    self.size = width**0.5

  def __call__(
    self, states: Float[Array, "N E"], actions: Float[Array, "N A"]
  ) -> Float[Array, "N E"]:
    # A unit vector's entries are about 1 / size; layers are made for such of about 1.
    change = self.mlp(jnp.concatenate([self.size * states, actions], axis=-1))
    return states + change / self.size


@dataclasses.dataclass(frozen=True)
class ForwardModel:
  """phi(s), a -> phi(s'), as functions of a parameter tree: whole on every device, for it is small.

  `width` is that of states, unit vectors; `actions` that of actions, `hidden` of the layer between.
  """

  width: int
  actions: int
  hidden: int

  def init(self, key: PRNGKeyArray) -> Params:
    """Random weights with which an action is predicted to change nothing."""
    return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))

  def predict(
    self, params: Params, states: Float[Array, "N E"], actions: Float[Array, "N A"]
  ) -> Float[Array, "N E"]:
    """The states that the actions lead to."""
    return nnx.merge(_graphdef(self), params)(states, actions)

  def errors(
    self,
    params: Params,
    states: Float[Array, "N E"],
    actions: Float[Array, "N A"],
    following: Float[Array, "N E"],
  ) -> Float[Array, " N"]:
    """|predicted - following|^2 of each transition; nothing is learned through what followed."""
    missed = self.predict(params, states, actions) - jax.lax.stop_gradient(following)
    return jnp.square(missed).sum(axis=-1)

  def _build(self, rngs: nnx.Rngs) -> _Forward:
    return _Forward(self.width, self.actions, self.hidden, rngs=rngs)


@functools.lru_cache(maxsize=8)
def _graphdef(model: ForwardModel) -> Any:
  return nnx.split(nnx.eval_shape(lambda: model._build(nnx.Rngs(0))))[0]
