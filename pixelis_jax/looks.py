"""What a clearer look teaches: to see at a plain one what the reference saw at the other.

A vote says which answer is right. Where one view tells more than the plain look does, it also says
what the answer was read off: the features of the same place as that view shows it. The tower learns
to give these where it is shown the place plainly (feature distillation, as FitNets have it,
https://arxiv.org/abs/1412.6550, from a frozen teacher that looks better instead of a larger one).
That is hundreds of numbers a picture, where an answer is a few tokens.

Where what the view does can be undone, as a turn can, a picture of the original domain comes to
look as the stream's do: shown so it is a plain look whose clearer one is known, however few the
stream's requests are and whatever is asked most.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from pixelis_jax import batch, cluster, learner, sampler, sharding
from pixelis_jax.algo import voting
from pixelis_jax.model import lora
from pixelis_jax.model.policy import Model
from pixelis_jax.tools import views
from pixelis_jax.tools.views import View
from pixelis_jax.types import Experience, Patches, ToolResult, Trajectory

Pair: TypeAlias = tuple[Patches, Patches]  # One place plainly, and as another view shows it.

_SEEN = 2  # Sets these draws apart from an update's others.


class Looks:
  """Pairs of looks, the latest of them, and the steps that the tower takes towards them.

  Held pictures, whose features are to stay as the reference has them, take part in every step. All
  processes have the same pairs, and each computes its share of a step.
  """

  def __init__(
    self, c: Any, policy: sampler.Policy, trained: learner.Params, held: Sequence[Trajectory]
  ):
    """Args:
    c: the config; fields seed, model.dtype, learn.
    policy: its parameters are the reference.
    trained: what learns; nothing is taught where none of the tower does.
    held: episodes of the original domain.
    """
    model, dtype = policy.model, c.model.dtype
    self._c, self._policy, self._seed = c.learn.look, policy, c.seed
    self._most = c.learn.max_patches  # Of an image: others are left out.
    self._parts = c.learn.accumulate
    self._encode = learner.make_encode(model, dtype)
    self._step, tx = make_step(model, FrozenConfigDict(c.learn), dtype)
    self._verifier = c.vote.verifier
    self._pairs: dict[str, tuple[Pair, View]] = {}
    # All they were shown is held: where to look was read off the overview. Copies are of details.
    self._details = [(t, image) for t in held for image in _shown(t)[-1:] if self._fits(image)]
    shown = [image for t in held for image in _shown(t) if self._fits(image)]
    self._held = [*{image.key: image for image in shown}.values()]
    self._teaches = "visual" in trained and self._c.updates > 0
    visual = {"visual": trained["visual"]} if self._teaches else {}
    self.state = learner.init_state(visual, tx, seed=c.seed).replace(params={}) if visual else None

  @property
  def ids(self) -> list[str]:
    """The experiences whose looks are kept, the oldest first."""
    return [*self._pairs]

  def add(self, experiences: Sequence[Experience]) -> None:
    """Keeps what the reference saw of these, where another view told more than the plain one."""
    for experience in experiences if self._teaches else ():
      pair = experience.looks and batch.shared_look(experience.looks)
      if pair and self._fits(pair[0]):
        self._pairs[experience.id] = pair, self._clearer(experience)
    for id in self.ids[: max(len(self._pairs) - self._c.capacity, 0)]:
      del self._pairs[id]

  def teach(
    self, trained: learner.Params, base: learner.Params, update: int
  ) -> tuple[learner.Params, learner.TrainState | None, dict[str, float]]:
    """(what learns, the optimizer's state, metrics) after `look.updates` steps.

    `state` is not changed by that: an update may be refused.
    """
    state, errors = self.state, []
    if state is None or not self._pairs or not self._details:
      return trained, state, {}
    others = {name: x for name, x in trained.items() if name != "visual"}
    state, still = state.replace(params={"visual": trained["visual"]}), lora.join(others, base)
    for i in range(self._c.updates):
      rng = np.random.default_rng((self._seed, update, i, _SEEN))
      dropout = jax.random.fold_in(state.rng, state.step)
      state, measured = self._step(state, self._packed(rng), still, dropout)
      errors.append(float(measured["loss"]))
    trained = {**others, **state.params}
    return trained, state.replace(params={}), {"look_loss": float(np.mean(errors))}

  def _packed(self, rng: np.random.Generator) -> batch.LookBatch:
    """One step's pairs and held pictures, drawn by chance, with targets."""
    c, model = self._c, self._policy.model
    pick = lambda pool, n: [pool[i] for i in rng.integers(len(pool), size=n).tolist()]
    found, held = pick([*self._pairs.values()], c.pairs), pick(self._held, c.held)
    others = pick(self._details, c.pairs)
    copied = [
      (i < c.copies and self._copy(*other, view)) or pair
      for i, (other, (pair, view)) in enumerate(zip(others, found, strict=True))
    ]
    pairs = [*copied, *((image, image) for image in held)]
    weights = np.repeat(np.float32([1.0, c.weight]), [c.pairs, c.held])
    own, blocks = cluster.split(len(pairs)), sharding.own_blocks(model.mesh) * self._parts
    mine = slice(own.start, own.stop)
    packed = batch.pack_looks(pairs[mine], weights[mine], model.config, blocks=blocks)
    packed = sharding.put_rows(packed, model.mesh)
    return packed.replace(targets=self._encode(self._policy.params, packed.clear))

  def _copy(self, trajectory: Trajectory, clear: Patches, view: View) -> Pair | None:
    """A held picture as one that this view sees clearly, where there is such a one."""
    back, policy = views.undone(view), self._policy
    if back is None or trajectory.task.kind in view.excluded_kinds:
      return None
    results: list[ToolResult] = []
    for step in trajectory.steps[:-1]:  # What the last one returned was not read: not `clear`.
      if step.call is not None:
        results.append(policy.tools.run(step.call, trajectory.task, results, back))
    pictures = [picture for result in results for picture in result.images]
    plain = policy.chat.patches(pictures[-1].pixels) if pictures else None
    return (plain, clear) if plain and plain.grid == clear.grid else None

  def _clearer(self, experience: Experience) -> View:
    """The view of the second of its looks: see `Experience`."""
    vote = experience.vote
    heard = voting.strongest(vote, verifier=self._verifier)
    assert heard is not None, f"experience {experience.id!r} has looks, but no ballot for its vote"
    return views.BY_NAME[vote.ballots[heard].view]

  def _fits(self, image: Patches) -> bool:
    return len(image.patches) <= self._most


@functools.cache  # A run learns twice from its stream, to compare: with one program.
def make_step(
  model: Model, c: FrozenConfigDict, dtype: str
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], optax.GradientTransformation]:
  """((state, batch, base, key) -> (state, metrics), its optimizer)."""
  tx = learner.optimizer(c, learner.warmed(c.look.lr, c.warmup), c.look.muon_scale)
  loss = learner.computed_in(learner.look_loss(model), dtype)
  how = {"parts": c.accumulate, "mesh": model.mesh, "donate": False}
  return learner.make_step(learner.adapted(model, loss), tx, **how), tx


def _shown(trajectory: Trajectory) -> list[Patches]:
  """The pictures that an episode was shown, in order."""
  return [image for step in trajectory.steps for image in step.completion.context.images]
