"""The only place where parameters change: TrainState, and a loss made into a jitted step."""

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, DTypeLike, Float, Float32, Int, PRNGKeyArray
from optax.contrib import MuonDimensionNumbers

from pixelis_jax.algo import losses
from pixelis_jax.algo.correction import RolloutCorrection, correct
from pixelis_jax.algo.policy_losses import Objective, push
from pixelis_jax.batch import (
  AIMS,
  PLACES,
  GrpoBatch,
  Inputs,
  LookBatch,
  SftBatch,
  Share,
  masked_mean,
  whole_count,
)
from pixelis_jax.model import lora
from pixelis_jax.model.layout import VisionInputs
from pixelis_jax.model.policy import Model
from pixelis_jax.sharding import constrain, replicated, row_blocks, shardings

_TINY = 1e-9

Params = Any  # A nested dict of arrays, as `Model.init` returns it.
Metrics = dict[str, Array]
Loss = Callable[..., tuple[Array, Metrics]]  # (params, batch) -> (scalar, metrics)


@no_type_check  # JAX rebuilds pytrees around non-arrays.
@flax.struct.dataclass
class TrainState:
  """Everything a resumed run needs on the device."""

  step: Int[Array, ""]
  params: Params
  opt_state: optax.OptState
  rng: PRNGKeyArray


def init_state(params: Params, tx: optax.GradientTransformation, *, seed: int) -> TrainState:
  """A state at step 0 that owns `params`; on the mesh of `params`, all of it.

  Moments lie as their weights do. A checkpoint is restored to where each leaf was: one that had
  stayed on a single device could not enter a step with the others.
  """
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    rng=jax.random.key(seed),
  )
  sharding = jax.tree.leaves(params)[0].sharding
  if not isinstance(sharding, NamedSharding):
    return state
  whole = lambda leaf: _everywhere(leaf, sharding.mesh)
  beside = lambda leaf, weight: jax.device_put(leaf, weight.sharding)
  moments = map_moments(tx, state.opt_state, params, beside, whole)
  return state.replace(step=whole(state.step), rng=whole(state.rng), opt_state=moments)


def map_moments(
  tx: optax.GradientTransformation,
  opt_state: Any,
  params: Params,
  moment: Callable[[Any, Any], Any],
  other: Callable[[Any], Any],
) -> Any:
  """The optimizer's state with each moment, and its weight, taken by `moment`, the rest by `other`.

  A part of the optimizer has no moment of a weight that another part moves.
  """
  absent = lambda leaf: isinstance(leaf, optax.MaskedNode)
  taken = lambda leaf, weight: leaf if absent(leaf) else moment(leaf, weight)
  return optax.tree_map_params(
    tx, taken, opt_state, params, transform_non_params=other, is_leaf=absent
  )


def rewound(state: TrainState, then: TrainState, tx: optax.GradientTransformation) -> TrainState:
  """The state with the parameters and moments of an earlier one.

  Steps go on, those that the rate is a function of, too.
  """
  now, old = state.opt_state, then.opt_state
  moment = optax.tree_map_params(tx, lambda _: True, now, transform_non_params=lambda _: False)
  opt_state = jax.tree.map(lambda m, now, old: old if m else now, moment, now, old)
  return state.replace(params=then.params, opt_state=opt_state)


def _everywhere(x: Array, mesh: Mesh) -> Array:
  """A host's array or key whole on all devices, other processes' too."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_everywhere(jax.random.key_data(x), mesh))
  return jax.device_put(np.asarray(x), replicated(mesh))


def make_optimizer(c: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """`optimizer` with linear warm-up and cosine decay to `final_fraction` of the peak, and its rate.

  Args:
    c: fields lr, warmup, steps, final_fraction, muon_scale, and those of `adamw`.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0 if c.warmup else c.lr, c.lr, c.warmup, max(c.steps, c.warmup + 1), c.lr * c.final_fraction
  )
  return optimizer(c, schedule, c.muon_scale), schedule


def optimizer(c: Any, rate: optax.Schedule, muon_scale: float) -> optax.GradientTransformation:
  """`adamw`; with `muon_scale` above 0 Muon (https://arxiv.org/abs/2502.16982) moves the matrices
  of layers, at so many times the rate: by steps with singular values alike, as large as Adam's.
  """
  if not muon_scale:
    return adamw(c, rate)
  muon = optax.contrib.muon(
    lambda step: muon_scale * rate(step),
    weight_decay=c.weight_decay,
    mu_dtype=c.mu_dtype,
    adam_b1=c.b1,
    adam_b2=c.b2,
    adam_weight_decay=c.weight_decay,
    adam_learning_rate=rate,
    muon_weight_dimension_numbers=_matrices,
    consistent_rms=0.2,
  )
  return _bounded(c, muon)


def adamw(c: Any, rate: float | optax.Schedule) -> optax.GradientTransformation:
  """AdamW, clipped by global norm.

  Adam moves each weight by about the rate, whatever its gradient. The pixels of a patch move
  together, so the same rate moves the patch embedding's output by far more than other layers': its
  rate is `patch_scale` times theirs (muP would say width / inputs; Yang et al., Tensor Programs V).

  Args:
    c: fields b1, b2, weight_decay, clip_norm, mu_dtype, patch_scale.
    rate: Of learning.
  """
  adam = optax.adamw(rate, c.b1, c.b2, weight_decay=c.weight_decay, mu_dtype=c.mu_dtype)
  return _bounded(c, adam)


def warmed(rate: float, warmup: int) -> optax.Schedule:
  """The rate, after so many steps that rise to it from a part of it, the first included.

  Adam's first steps are all of full size, whatever the gradients say: they start small.
  """
  return optax.linear_schedule(rate / warmup, rate, warmup - 1)


def _bounded(c: Any, moves: optax.GradientTransformation) -> optax.GradientTransformation:
  """With gradients clipped before it, and patches slowed after it."""
  scale = lambda path, update: c.patch_scale * update if _is_patch(path) else update
  scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
  return optax.chain(optax.clip_by_global_norm(c.clip_norm), moves, scaled)


def _matrices(params: Params) -> Any:
  """Of each leaf how Muon reads it: [in, ..., out], behind its stack's axis; None is left to Adam.

  What is not a layer's is: tables of embeddings, patches, biases, norms, adapters, heads.
  """

  def read(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
    if path[-1].key != "kernel" or _is_patch(path):
      return None
    stacked = any(getattr(entry, "key", None) in ("layers", "blocks", "deep") for entry in path)
    return MuonDimensionNumbers(reduction_axis=int(stacked), output_axis=leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(read, params)


def _is_patch(path: tuple[Any, ...]) -> bool:
  return any(getattr(entry, "key", None) == "patch" for entry in path)


def hidden(model: Model, params: Params, inputs: Inputs) -> Float[Array, "B T D"]:
  """Final hidden states of whole rows, images included."""
  return decoded(model, params, inputs, encoded(model, params, inputs))


def encoded(model: Model, params: Params, inputs: Inputs) -> Float[Array, "N M W"]:
  """The features of all images; none (M is 0) where the model reads text only."""
  if inputs.vision is None:
    return jnp.zeros((model.blocks, 0, model.config.feature_width), jnp.float32)
  return model.encode(params, inputs.vision)


def decoded(
  model: Model, params: Params, inputs: Inputs, features: Float[Array, "N M W"]
) -> Float[Array, "B T D"]:
  """`hidden` where the images are encoded already."""
  features = features.reshape(model.blocks, -1, features.shape[-1])
  return model.hidden(
    params, inputs.tokens, inputs.positions, features, inputs.sources, inputs.segments
  )


def taken_logps(
  model: Model, params: Params, states: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Log-probability of each token given those before it, and the entropy there; 0 at the first."""
  taken, entropies = model.token_logps(params, states[:, :-1], tokens[:, 1:])
  first = ((0, 0), (1, 0))
  return jnp.pad(taken, first), jnp.pad(entropies, first)


def logps(
  model: Model, params: Params, inputs: Inputs
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """`taken_logps` of whole rows."""
  return taken_logps(model, params, hidden(model, params, inputs), inputs.tokens)


def with_heads(model: Model, params: Params, key: PRNGKeyArray, *, labels: int) -> Params:
  """The parameters of `sft_loss`: the policy's, and two linear heads that are dropped afterwards.

  `aim` reads where a look is to go, `sight` [D, labels, 9] what an image feature shows. The heads
  start random, not at zero: at zero nothing of their errors would reach the policy.
  """
  D, keys = model.config.text.width, jax.random.split(key)
  aim = 0.3 * jax.random.normal(keys[0], (D, AIMS), jnp.float32)
  sight = 0.3 * jax.random.normal(keys[1], (D, labels, PLACES), jnp.float32)
  bias = jnp.zeros((labels, PLACES), jnp.float32)
  heads = {"aim": aim, "sight": sight, "sight_bias": bias}
  if model.mesh is not None:
    heads = jax.device_put(heads, shardings(HEAD_AXES, heads, model.mesh))
  return {"policy": params, **heads}


HEAD_AXES = {"aim": ("embed", None), "sight": ("embed", None, None), "sight_bias": (None, None)}


def sft_loss(
  model: Model, *, entropy_weight: float, aim_weight: float, sight_weight: float
) -> Loss:
  """Cross-entropy of supervised tokens, and two auxiliary losses that teach a new model to see.

  Takes the parameters of `with_heads`. The entropy (nats a token) is rewarded with
  `entropy_weight`. Tokens alone teach where to look very slowly: the digits of coordinates that
  cannot be known yet drown the few that could.

  aim: the mean squared error of `SftBatch.aims` from the hidden states, over all tokens that have
    one and again over those of them that predict a call's tokens.
  sight: per image feature the cross-entropy of which label its cell holds, cells with and without
    any weighed equally, and the squared error of where the held objects are.
  """

  def loss(params: Params, batch: SftBatch) -> tuple[Array, Metrics]:
    inputs = batch.inputs
    mean = masked_mean(batch)
    features = encoded(model, params["policy"], inputs)
    states = decoded(model, params["policy"], inputs, features)
    taken, entropies = taken_logps(model, params["policy"], states, inputs.tokens)
    tokens = {"mask": batch.loss_mask, "count": whole_count(batch, "tokens")}
    value, aux = losses.cross_entropy(taken, entropies, entropy_weight=entropy_weight, **tokens)
    likely = (taken > -jnp.log(2.0)).astype(jnp.float32)
    measured = {**aux, "likely_tokens": mean(likely, "tokens")}
    if aim_weight:
      misses, missed = aim_loss(params, states, batch)
      value, measured = value + aim_weight * misses, {**measured, **missed}
    if sight_weight:
      entering = features[..., : states.shape[-1]]  # Without DeepStack levels.
      sight, measured["sight_error"] = sight_loss(params, entering, batch)
      value, measured["sight_loss"] = value + sight_weight * sight, sight
    return value, measured

  return loss


def aim_loss(
  params: Params, states: Float[Array, "B T D"], batch: SftBatch
) -> tuple[Array, Metrics]:
  """The `aim` part of `sft_loss`, and the mean square misses of the tokens of calls."""
  mean = masked_mean(batch)
  missed = jnp.square(states.astype(jnp.float32) @ params["aim"] - jnp.nan_to_num(batch.aims))
  aim, phase = (mean(m.mean(-1), "calling") for m in jnp.split(missed, [2], axis=-1))
  missed = missed.mean(-1)
  misses = mean(missed, "calling") + mean(missed, "known")
  return misses, {"aim_error": aim, "aim_phase_error": phase}


def see_loss(model: Model) -> Loss:
  """The `sight` part of `sft_loss` alone: the decoder, most of the work, is not run."""

  def loss(params: Params, batch: SftBatch) -> tuple[Array, Metrics]:
    features = encoded(model, params["policy"], batch.inputs)[..., : model.config.text.width]
    value, error = sight_loss(params, features, batch)
    return value, {"sight_loss": value, "sight_error": error}

  return loss


def sight_loss(
  params: Params, features: Float[Array, "N M D"], batch: SftBatch
) -> tuple[Array, Array]:
  """The `sight` part of `sft_loss`, and the mean square miss of the places."""
  mean, sights = masked_mean(batch), batch.sights
  normed = features.astype(jnp.float32)
  normed = normed * jax.lax.rsqrt(jnp.square(normed).mean(-1, keepdims=True) + 1e-6)
  seen = jnp.einsum("nmd,dok->nmok", normed, params["sight"]) + params["sight_bias"][None, None]
  logits, held = seen[..., 0], sights[..., 0] == 1.0
  # Softmax over the labels and, at logit 0, nothing; a cell that holds several has each equally.
  total = jax.nn.logsumexp(jnp.pad(logits, ((0, 0), (0, 0), (0, 1))), axis=-1)
  share = held.astype(jnp.float32) / jnp.maximum(held.sum(-1, keepdims=True), 1).astype(jnp.float32)
  surprise = total - (share * logits).sum(-1)
  missed = jnp.square(seen[..., 1:] - jnp.nan_to_num(sights[..., 1:])).mean(-1)
  place = mean(missed, "placed")
  return mean(surprise, "labelled") + mean(total, "empty") + place, place


def look_loss(model: Model) -> Loss:
  """The mean squared error of the features at plain looks, over the mean square of their targets.

  To see at once what another look showed says more than any answer: that is a few tokens, this
  hundreds of numbers a feature (cf. FitNets, https://arxiv.org/abs/1412.6550).
  """

  def loss(params: Params, batch: LookBatch) -> tuple[Array, Metrics]:
    weights, features = batch.weights, model.encode(params, batch.plain).astype(jnp.float32)
    missed = jnp.square(features - batch.targets).mean(-1)
    of_image = lambda x: (x * weights).sum(-1, keepdims=True)
    size = of_image(jnp.square(batch.targets).mean(-1)) / jnp.maximum(of_image(1.0), _TINY)
    count = whole_count(batch, "looks")
    count = weights.sum() if count is None else count
    value = (missed / jnp.maximum(size, _TINY) * weights).sum() / jnp.maximum(count, _TINY)
    return value, {}

  return loss


def grpo_loss(model: Model, c: Objective) -> Loss:
  """The policy's loss plus `kl_coef` times the KL to `ref_logps`, less `entropy_coeff` entropies.

  The loss takes (params, batch, kl_coef); with kl_coef 0 the reference term is zero. All three are
  made one number by `loss_agg_mode`, over the whole batch; the first two are measured as `pg_loss`
  and `kl_loss`. Rows weigh `batch.kl_weights` in the KL: rehearsed rows, whose advantage is 0, may
  be held harder than new ones. `kl` is measured over the rows that push, k3, in nats a token.
  """

  def loss(params: Params, batch: GrpoBatch, kl_coef: Float[Array, ""]) -> tuple[Array, Metrics]:
    mean, ref_logps = masked_mean(batch), _reference(batch)
    taken, entropies = logps(model, params, batch.inputs)
    unsampled, segments = jnp.isnan(batch.old_logps), batch.inputs.segments
    old = jnp.where(unsampled, jax.lax.stop_gradient(taken), batch.old_logps)
    pushed, aux = push(taken, old, batch.advantages, batch.loss_mask, segments, c)
    if batch.is_weights is not None:
      pushed = pushed * batch.is_weights
    counts = None if batch.share is None else batch.share.counts
    how = {"mode": c.loss_agg_mode, "scale": c.loss_scale_factor, "counts": counts}
    one = lambda x: losses.aggregate(x, batch.loss_mask, segments, **how)
    policy, held = one(pushed), one(losses.KL[c.kl_loss_type](taken, ref_logps) * batch.kl_weights)
    measured = {name: mean(x, "tokens") for name, x in aux.items()}
    measured |= {"pg_loss": policy, "kl_loss": held, "kl": pushing_kl(taken, batch)}
    measured["entropy"] = mean(entropies, "tokens")
    return policy + kl_coef * held - c.entropy_coeff * one(entropies), measured

  return loss


def passes(model: Model, trained: Params) -> dict[str, int]:
  """What an update of these takes of "text" and "visual", in passes forward; see `cost.update`.

  A tower that does not learn is only looked through. Adapters need the gradient of what a layer
  reads, and hardly anything for themselves.
  """
  text, visual = (name in trained for name in ("text", "visual"))
  whole = model.lora is None
  return {"text": 2 + (text and whole), "visual": 1 + visual * (1 + whole)}


def adapted(model: Model, loss: Loss) -> Loss:
  """The loss of whole parameters as one of (trained, batch, base, key, *rest); see `parts`.

  The base is an argument of the step: as a closure's constant it would be copied into the program.
  The key is that of the adapters' dropout; without dropout it is not used.
  """
  dropout = model.lora is not None and model.lora.dropout > 0

  def joined(
    trained: Params, batch: Any, base: Params, key: PRNGKeyArray, *rest: Any
  ) -> tuple[Array, Metrics]:
    params = lora.join(trained, base)
    if dropout:
      part = 0 if batch.share is None else batch.share.part
      params = lora.keyed(params, jax.random.fold_in(key, part))
    return loss(params, batch, *rest)

  return joined


def pushing_kl(taken: Float[Array, "B T"], batch: GrpoBatch) -> Float[Array, ""]:
  """k3 estimate of the KL from the reference, nats a token, over sampled rows with an advantage."""
  return masked_mean(batch)(losses.kl_k3(taken, _reference(batch)), "pushing")


def _reference(batch: GrpoBatch) -> Float[Array, "B T"]:
  return batch.old_logps if batch.ref_logps is None else batch.ref_logps


def make_training(
  model: Model, loss: Loss, c: Any, *, dtype: str, parts: int
) -> tuple[Callable[..., tuple[TrainState, Metrics]], optax.GradientTransformation, optax.Schedule]:
  """((state, batch, base, key, *rest) -> (state, metrics), its optimizer, the rate by step).

  Of a loss of whole parameters, `computed_in` the dtype and `adapted`; `c` as for `make_optimizer`.
  """
  tx, schedule = make_optimizer(c)
  loss = adapted(model, computed_in(loss, dtype))
  return make_step(loss, tx, parts=parts, mesh=model.mesh), tx, schedule


def make_correction(
  c: RolloutCorrection,
) -> Callable[[GrpoBatch, Float[Array, "B T"]], tuple[GrpoBatch, Metrics]]:
  """(batch as it is packed, log-probs by the weights that the update starts from) -> (batch,
  metrics), jitted: for samples of an older policy, or of one that computes otherwise.

  The ratio of the loss is then taken to these weights, and the sampler's log-probs go into
  `is_weights`. Sequences that are rejected leave `loss_mask`, and with it every mean. Tokens that
  nobody sampled stay as they are.
  """

  def corrected(batch: GrpoBatch, logps: Float[Array, "B T"]) -> tuple[GrpoBatch, Metrics]:
    sampler, mask = batch.old_logps, batch.loss_mask
    weights, keep, measured = correct(logps, sampler, mask, batch.inputs.segments, c)
    old = jnp.where(jnp.isnan(sampler) | ~mask, sampler, logps)
    return batch.replace(old_logps=old, is_weights=weights, loss_mask=keep), measured

  return jax.jit(corrected)


@functools.cache
def make_logps(
  model: Model, dtype: DTypeLike = jnp.float32, *, parts: int = 1
) -> Callable[[Params, Inputs], Float[Array, "B T"]]:
  """The log-probabilities of `logps`, `computed_in` a dtype, jitted: (params, inputs) -> them.

  A batch that is packed for `accumulated` in parts is read in these parts.
  """
  taken = computed_in(lambda params, inputs: logps(model, params, inputs)[0], dtype)

  def by_part(params: Params, inputs: Inputs) -> Float[Array, "B T"]:
    pieces = jax.tree.map(lambda x: _split(x, parts, model.mesh), inputs)
    return _merged(jax.lax.map(lambda part: taken(params, part), pieces), parts, model.mesh)

  return jax.jit(taken if parts == 1 else by_part)


@functools.cache
def make_encode(
  model: Model, dtype: DTypeLike = jnp.float32
) -> Callable[[Params, VisionInputs], Float32[Array, "N M W"]]:
  """`Model.encode`, `computed_in` a dtype, jitted."""
  encode = lambda params, vision: model.encode(params, vision).astype(jnp.float32)
  return jax.jit(computed_in(encode, dtype))


def computed_in(function: Callable, dtype: DTypeLike) -> Callable:
  """A function of (params, ...) with copies of the weights in this dtype; gradients stay float32.

  Adapters and the heads of `with_heads`, few numbers whose layers cast them, are left as they are.
  """

  def cast(path: tuple[Any, ...], x: Array) -> Array:
    name = path[-1].key
    as_is = x.dtype != jnp.float32 or name.startswith("lora_") or name in HEAD_AXES
    return x if as_is else x.astype(dtype)

  def computed(params: Params, *rest: Any) -> Any:
    return function(jax.tree_util.tree_map_with_path(cast, params), *rest)

  return computed


def accumulated(loss: Loss, parts: int, mesh: Mesh | None) -> Callable[..., tuple[Any, Params]]:
  """`jax.value_and_grad` of the loss, a batch's parts one after the other: memory for one.

  Equal to the whole batch at once, up to the order of float32 sums: all means are over the whole
  batch, whatever the parts hold. A batch for it is packed in `parts` blocks for each of the mesh's.
  """
  one = jax.value_and_grad(loss, has_aux=True)

  def summed(
    params: Params, batch: SftBatch | GrpoBatch | LookBatch, *rest: Any
  ) -> tuple[Any, Params]:
    counts = {name: mask.sum(dtype=jnp.float32) for name, mask in batch.masks().items()}

    def add(total, scanned):
      part, index = scanned
      share = Share(part=index, counts=counts)
      found = one(params, part.replace(share=share), *rest)
      return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found), None

    pieces = jax.tree.map(lambda x: _split(x, parts, mesh), batch)
    first = jax.tree.map(lambda x: x[0], pieces).replace(share=Share(jnp.int32(0), counts))
    shapes, _ = jax.eval_shape(one, params, first, *rest)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (shapes, params))
    total, _ = jax.lax.scan(add, start, (pieces, jnp.arange(parts, dtype=jnp.int32)))
    measured, grads = total
    return measured, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

  return one if parts == 1 else summed


def _split(x: Array, parts: int, mesh: Mesh | None) -> Array:
  """Rows as [parts, rows of a part, ...]: each part has its share of every block of the mesh."""
  blocks = row_blocks(mesh)
  size = x.shape[0] // (blocks * parts)  # Not -1: some arrays are empty.
  by_block = x.reshape(blocks, parts, size, *x.shape[1:]).swapaxes(0, 1)
  axes = (None, "batch", *(None,) * (x.ndim - 1))
  return constrain(by_block.reshape(parts, blocks * size, *x.shape[1:]), axes, mesh)


def _merged(x: Array, parts: int, mesh: Mesh | None) -> Array:
  """Rows in the order that `_split` found."""
  by_block = x.reshape(parts, row_blocks(mesh), -1, *x.shape[2:]).swapaxes(0, 1)
  axes = ("batch", *(None,) * (x.ndim - 2))
  return constrain(by_block.reshape(-1, *x.shape[2:]), axes, mesh)


def make_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  parts: int = 1,
  mesh: Mesh | None = None,
  donate: bool = True,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """(state, batch, *rest) -> (state, metrics), jitted; gradients as `accumulated` gives them.

  The batch is what the loss takes; to be accumulated in `parts`, one of batch.py. A step whose loss
  or gradient is not finite leaves parameters and optimizer as they were and says so in `skipped`;
  the step counter still advances. With `donate` the old state's buffers are reused: do not touch
  it.
  """

  gradients = accumulated(loss, parts, mesh)

  def step(state: TrainState, batch: Any, *rest: Any) -> tuple[TrainState, Metrics]:
    (value, measured), grads = gradients(state.params, batch, *rest)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    # Adam's bias correction raises a float to its integer count.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    proposed = state.replace(
      step=state.step + 1,
      params=keep(optax.apply_updates(state.params, updates), state.params),
      opt_state=keep(opt_state, state.opt_state),
    )
    skipped = 1.0 - finite.astype(jnp.float32)
    return proposed, {**measured, "loss": value, "grad_norm": norm, "skipped": skipped}

  return jax.jit(step, donate_argnums=(0,) if donate else ())


def ema(average: Params, params: Params, decay: float | Float[Array, ""]) -> Params:
  """decay * average + (1 - decay) * params, leaf by leaf."""
  return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p.astype(a.dtype), average, params)
