"""What a sampler compiles: prompts read into a cache, and tokens sampled one after the other."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pixelis_jax.model.decoder import rows_of
from pixelis_jax.model.layers import used
from pixelis_jax.model.policy import Cache, Model
from pixelis_jax.sharding import constrain


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
  """The jitted functions of a sampler, each compiled once a shape."""

  encode: Callable
  extend: Callable  # Donates its cache.
  decode: Callable  # Donates its cache.
  empty: Callable
  gather: Callable
  share: Callable
  rows_of: Callable
  embedded: Callable


@functools.lru_cache(maxsize=8)
def programs(model: Model, banned: tuple[int, ...], stop: tuple[int, ...]) -> Programs:
  """Shared by all samplers of one model with these token ids: never sampled, and ending a turn."""
  V, mesh = model.config.text.vocab_size, model.mesh
  among = lambda ids: jnp.asarray(np.isin(np.arange(V), ids))
  return Programs(
    encode=jax.jit(lambda params, vision: model.encode(params, vision)),
    extend=jax.jit(partial(extend_rows, model), donate_argnums=(1,)),
    decode=jax.jit(
      partial(decode_rows, model, among(banned), among(stop)),
      static_argnames=("max_tokens", "greedy"),
      donate_argnums=(1,),
    ),
    empty=jax.jit(model.init_cache, static_argnums=(0, 1, 2)),
    gather=jax.jit(partial(Cache.gather, mesh=mesh), static_argnames=("capacity",)),
    share=jax.jit(partial(Cache.share, mesh=mesh), static_argnames=("copies", "capacity")),
    rows_of=jax.jit(partial(rows_of, axis=0, blocks=model.blocks)),
    embedded=jax.jit(partial(embedded_rows, model)),
  )


def embedded_rows(model, params, ids):
  """Rows of the embedding, where the rows of `ids` lie."""
  table = used(model.embedding(params), ("vocab", "embed"), model.mesh)
  return constrain(jnp.take(table, ids, axis=0), ("batch",), model.mesh)


def extend_rows(model, params, cache, features, tokens, positions, sources, segments, last):
  if features is None:
    features = jnp.zeros((model.blocks, 0, model.config.text.width))
  else:
    features = features.reshape(model.blocks, -1, features.shape[-1])
  hidden, cache = model.extend(params, cache, tokens, positions, features, sources, segments)
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


def decode_rows(
  model,
  banned,
  stop,
  params,
  cache,
  hidden,
  starts,
  active,
  draws,
  key,
  temperature,
  *,
  max_tokens: int,
  greedy: bool,
):
  """Samples until every active row has stopped or `max_tokens` are out.

  `draws` [B, 2] are each row's episode and turn, which its random numbers come from. Every sampled
  token is in the cache afterwards, the stop token too.
  """
  B = hidden.shape[0]
  head, apart = model.head(params), model.apart(params)
  nothing = jnp.zeros((model.blocks, 0, hidden.shape[-1]), hidden.dtype)
  nowhere = jnp.full((B, 1), -1, jnp.int32)
  fold = jax.vmap(jax.random.fold_in)
  keys = fold(fold(jnp.broadcast_to(key, (B,)), draws[:, 0]), draws[:, 1])

  def more(carry):
    i, active = carry[0], carry[3]
    return (i < max_tokens) & jnp.any(active)

  def one(carry):
    i, cache, hidden, active, tokens, logps, entropies, lengths = carry
    logits = jnp.einsum("BD,VD->BV", hidden, head, preferred_element_type=jnp.float32)
    allowed = jnp.where(banned[None, :], -jnp.inf, logits)
    if greedy:
      token = jnp.argmax(allowed, axis=-1)
    else:
      now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
      token = jax.vmap(jax.random.categorical)(now, allowed / temperature)
    token = token.astype(jnp.int32)
    log_softmax = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(log_softmax, token[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_softmax) * log_softmax, axis=-1)
    tokens = tokens.at[:, i].set(token)
    logps, entropies = logps.at[:, i].set(taken), entropies.at[:, i].set(entropy)
    lengths = lengths + active.astype(jnp.int32)
    positions = jnp.broadcast_to((starts + i)[:, None, None], (B, 3, 1))
    segments = active.astype(jnp.int32)[:, None]
    hidden, cache = model.extend(
      params, cache, token[:, None], positions, nothing, nowhere, segments, apart
    )
    active = active & ~stop[token]
    return i + 1, cache, hidden[:, 0], active, tokens, logps, entropies, lengths

  flat = jnp.zeros((B, max_tokens), jnp.float32)
  carry = (
    jnp.zeros((), jnp.int32),
    cache,
    hidden,
    active,
    flat.astype(jnp.int32),
    flat,
    flat,
    jnp.zeros(B, jnp.int32),
  )
  _, cache, _, still, tokens, logps, entropies, lengths = jax.lax.while_loop(more, one, carry)
  rows = tokens, logps, entropies, lengths, ~still
  return cache, tuple(constrain(x, ("batch",), model.mesh) for x in rows)
