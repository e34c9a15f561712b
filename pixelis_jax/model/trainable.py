"""What of a model's parameters learns, and what does not.

With adapters these are trained, and the base, scales included, is not; without them all is. What
lies in a part that is frozen is not trained either: it has no gradient, no moments, and one copy.
"""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import DTypeLike

from pixelis_jax.model import lora
from pixelis_jax.model.policy import Model, Params


def parts(model: Model, params: Params, freeze: Sequence[str] = ()) -> tuple[Params, Params]:
  """(what is trained, what is not) of a model's parameters; both share the arrays.

  `freeze` names parts by paths such as "visual/merger"; "text" is the decoder with its head, which
  is a part of it in some models and beside it in others.

  Raises ValueError for a path that the parameters do not have, and where nothing is left to learn.
  """
  flat = nnx.traversals.flatten_mapping(params)
  under = lambda path, name: (
    f"{'/'.join(path)}/".startswith(f"{name}/") or (name == "text" and path[0] == "head")
  )
  for name in freeze:
    if not any(under(path, name) for path in flat):
      there = {"/".join(path[: name.count("/") + 1]) for path in flat}
      raise ValueError(f"cannot freeze {name!r}: the parameters have {sorted(there)}")
  trained, base = (params, {}) if model.lora is None else lora.split(params)
  if not freeze:
    return trained, base
  flat = nnx.traversals.flatten_mapping(trained)
  held = {path: x for path, x in flat.items() if any(under(path, name) for name in freeze)}
  if len(held) == len(flat):
    raise ValueError(f"freezing {tuple(freeze)} leaves nothing to learn")
  free = {path: x for path, x in flat.items() if path not in held}
  unflatten = nnx.traversals.unflatten_mapping
  return unflatten(free), lora.join(unflatten(held), base)


def held_in(dtype: DTypeLike, model: Model, params: Params, freeze: Sequence[str] = ()) -> Params:
  """The parameters, what does not learn in this dtype: it answers, and no step makes it differ."""
  trained, base = parts(model, params, freeze)
  _, wanted = parts(model, model.shapes(dtype), freeze)
  return lora.join(trained, jax.tree.map(lambda x, w: x.astype(w.dtype), base, wanted))
