"""Adapters in the tree: what they compute, what is trained, and what never moves."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from pixelis_jax import sharding
from pixelis_jax.model import layers, lora
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.model.policy import Model
from tests.model import oracle

flatten = nnx.traversals.flatten_mapping
EVERYWHERE = (".*",)
# Four layers of tower and decoder have ranks of their own, and one has no adapter.
RANKS = (("text/layers/attn/q", (3, 1)), ("text/layers/mlp/down", (0, 2)))


@pytest.fixture(scope="module")
def base():
  """(model, params) without adapters, and a batch with images."""
  model = Model(ModelConfig.from_hf(oracle.hf_config(tied=True).to_dict()))
  return model, oracle.weights(model, 0), oracle.two_rows(model.config)


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


def adapted(base, *, trained: bool = True, **settings):
  """(model, params) with adapters; `trained` ones have a B that is not zero."""
  model, params, _ = base
  settings = {"rank": 4, "alpha": 8.0, "targets": EVERYWHERE, "ranks": RANKS} | settings
  model = dataclasses.replace(model, lora=LoraConfig(**settings))
  params = model.adapt(params, jax.random.key(1))
  return model, (noisy(model, params) if trained else params)


def noisy(model, params):
  """B drawn at random where it is not padding: as padding has no rows of A either."""
  flat = flatten(params)
  rng = np.random.default_rng(2)
  for path, a in flat.items():
    if path[-1] == "lora_a":
      at = (*path[:-1], "lora_b")
      used = np.abs(np.asarray(a)).max(axis=-2) > 0
      b = rng.normal(0, 0.3, flat[at].shape).astype(np.float32)
      flat[at] = jnp.asarray(b * used.reshape(*used.shape, *[1] * (b.ndim - used.ndim)))
  return nnx.traversals.unflatten_mapping(flat)


def test_a_linear_layer_by_hand():
  """y = x W + b + alpha / r x A B. The scale forgotten gives 3, its inverse 3.75."""
  linear = layers.Linear((2, 1), ("embed", "mlp"), bias=True, rngs=nnx.Rngs(0))
  root = nnx.Module()
  root.one = linear
  lora.attach(root, LoraConfig(rank=1, alpha=3.0, targets=("one",)), rngs=nnx.Rngs(1))
  linear.kernel[...] = jnp.asarray([[1.0], [0.0]])
  linear.bias[...] = jnp.asarray([0.5])
  linear.lora_a[...] = jnp.asarray([[1.0], [-1.0]])
  linear.lora_b[...] = jnp.asarray([[0.25]])
  # x W = 3, b = 0.5, x A = 3 - 1 = 2, times B 0.5, times 3: 5.
  assert_allclose(linear(jnp.asarray([[3.0, 1.0]])), [[5.0]], rtol=1e-6)


def test_fresh_adapters_change_nothing_and_start_as_peft_does(base):
  model, params = adapted(base, trained=False)
  plain, expected = base[0], base[1]
  assert_array_equal(oracle.logits(model, params, base[2]), oracle.logits(plain, expected, base[2]))
  for path, leaf in flatten(params).items():
    if path[-1] == "lora_b":
      assert not np.asarray(leaf).any()
    if path[-1] == "lora_a":
      # Uniform within I^-0.5, peft's kaiming_uniform_ with a = sqrt 5: the largest of hundreds of
      # draws is near that bound. LeCun's normal would pass it three times in ten.
      bound = leaf.shape[-2] ** -0.5
      assert 0.9 * bound < np.abs(np.asarray(leaf)).max() <= bound
  first, second = np.asarray(params["text"]["layers"]["attn"]["v"]["lora_a"])
  assert np.abs(first - second).max() > 0.01  # Layers are drawn apart.


def test_the_tree_holds_adapters_beside_kernels(base):
  model, params = adapted(base)
  text = params["text"]["layers"]
  shapes = lambda module: {k: module[k].shape for k in module if k.startswith("lora")}
  assert shapes(text["attn"]["q"]) == {
    "lora_a": (2, 64, 3),
    "lora_b": (2, 3, 64),
    "lora_scale": (2,),
  }
  qkv = params["visual"]["blocks"]["attn"]["qkv"]
  assert shapes(qkv) == {"lora_a": (3, 40, 4), "lora_b": (3, 4, 3, 40), "lora_scale": (3,)}
  assert shapes(params["visual"]["patch"])["lora_scale"] == ()
  # 8 / 3 and 8 / 1; no adapter in the first layer, 8 / 2 in the second.
  assert_allclose(text["attn"]["q"]["lora_scale"], [8 / 3, 8], rtol=1e-6)
  assert_allclose(text["mlp"]["down"]["lora_scale"], [0, 4], rtol=1e-6)
  axes = model.axes()
  assert axes["text"]["layers"]["mlp"]["down"]["lora_a"] == ("layers", "mlp", None)
  assert axes["text"]["layers"]["mlp"]["down"]["lora_b"] == ("layers", None, "embed")
  assert axes["visual"]["blocks"]["attn"]["qkv"]["lora_b"] == ("layers", None, None, "heads")
  low = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), low) == jax.tree.map(
    lambda x: (x.shape, x.dtype), model.shapes(jnp.bfloat16)
  )
  dtypes = {str(x.dtype) for x in jax.tree.leaves(lora.adapters(low))}
  assert dtypes == {"float32"} and low["text"]["embedding"].dtype == jnp.bfloat16


def test_the_default_targets_are_the_decoders_linear_layers(base):
  model, params = adapted(base, targets=lora.TARGETS, ranks=())
  modules = {path[:-1] for path in flatten(lora.adapters(params))}
  assert {"/".join(m[2:]) for m in modules} == {
    "attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down",
  }  # fmt: skip
  assert all(m[:2] == ("text", "layers") for m in modules)


def test_base_and_adapters_come_apart_without_copies(base):
  model, params = adapted(base)
  whole = flatten(params)
  trained, frozen = (flatten(part) for part in lora.split(params))
  assert {path[-1] for path in trained} == {"lora_a", "lora_b"}
  assert frozen.keys() == whole.keys() - trained.keys()
  assert all(x is whole[path] for path, x in (trained | frozen).items())
  again = lora.join(*lora.split(params))
  assert jax.tree.structure(again) == jax.tree.structure(params)
  plain = flatten(lora.plain(params))
  assert plain.keys() == flatten(base[1]).keys()
  assert all(x is whole[path] for path, x in plain.items())
  with pytest.raises(AssertionError, match="are in both trees"):
    lora.join(params, lora.split(params)[0])


def test_merged_weights_give_the_same_logits(base):
  """Products are summed in another order: 1e-4 as against transformers (it left 1.4e-5)."""
  model, params = adapted(base)
  unmerged = oracle.logits(model, params, base[2])
  merged = oracle.logits(base[0], lora.merge(params), base[2])
  plain = oracle.logits(base[0], base[1], base[2])
  assert np.abs(merged - plain).max() > 0.1  # The adapters do something.
  assert_allclose(merged, unmerged, atol=1e-4)


def test_merging_is_float32_and_keeps_the_dtype(base):
  """W = 1 and scale A B = 2^-8 + 2^-9: bfloat16's sum of the rounded parts would lose the second.

  1 + 3 * 2^-9 rounds to 1 + 2^-7 (ties and halves up), where 1 + 2^-8 would round to 1 (to even).
  """
  w = jnp.ones((1, 1, 1), jnp.bfloat16)
  a, b = jnp.full((1, 1, 1), 2.0**-9), jnp.full((1, 1, 1), 3.0)
  tree = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": jnp.ones(1)}
  merged = lora.merge({"one": tree})["one"]["kernel"]
  assert merged.dtype == jnp.bfloat16 and float(merged[0, 0, 0]) == 1 + 2.0**-7


@functools.cache
def gradient_of(model):
  """(trained, frozen, batch's arguments) -> the gradient of the first channel's sum, in float32."""

  def loss(trained, frozen, arguments):
    hidden = model.hidden(lora.join(trained, frozen), *arguments)
    return hidden[:, :, 0].astype(jnp.float32).sum()

  return jax.jit(jax.grad(loss))


def without_images(base):
  model, _, batch = base
  return batch.arguments(np.zeros((0, model.config.text.width), np.float32))


def test_padding_stays_zero_through_training(base):
  """Its gradients are zero, not small; so are Adam's steps and the decay of what is zero."""
  model, params = adapted(base)
  trained, frozen = lora.split(params)
  gradient, tx = gradient_of(model), optax.adamw(1e-2, weight_decay=0.1)

  @jax.jit
  def step(gradients, trained, state):
    with jax.numpy_dtype_promotion("standard"):
      updates, state = tx.update(gradients, state, trained)
      return optax.apply_updates(trained, updates), state

  state, start = jax.jit(tx.init)(trained), trained
  for _ in range(3):
    trained, state = step(gradient(trained, frozen, without_images(base)), trained, state)
  q, down = trained["text"]["layers"]["attn"]["q"], trained["text"]["layers"]["mlp"]["down"]
  for module, layer, rank in ((q, 1, 1), (down, 0, 0)):
    assert not np.asarray(module["lora_a"])[layer, :, rank:].any()
    assert not np.asarray(module["lora_b"])[layer, rank:].any()
  moved = flatten(
    jax.tree.map(lambda new, old: np.abs(np.subtract(new, old)).max(), trained, start)
  )
  assert all(moved[path] > 1e-3 for path in moved if path[0] == "text")


def test_remat_and_sharding_compute_the_same(base):
  model, params = adapted(base)
  expected = oracle.logits(model, params, base[2])
  again = oracle.logits(dataclasses.replace(model, remat="layers"), params, base[2])
  assert_allclose(again, expected, atol=1e-5)
  on_two = dataclasses.replace(model, mesh=sharding.make_mesh(data=1, tensor=2))
  sharded = jax.device_put(params, on_two.shardings())
  b = sharded["text"]["layers"]["attn"]["q"]["lora_b"]
  halves = {shard.data.shape for shard in b.addressable_shards}
  assert halves == {(*b.shape[:-1], b.shape[-1] // 2)}  # Outputs are split, as the kernel's.
  assert_allclose(oracle.logits(on_two, sharded, base[2]), expected, atol=1e-4)
  merge = jax.jit(lambda params: lora.merge(params)["text"]["layers"]["attn"]["q"]["kernel"])
  assert_allclose(merge(sharded), merge(params), atol=1e-6)


def test_decoding_has_adapters_too(base):
  """A cached step equals the whole row, as without adapters."""
  model, params = adapted(base)
  _, _, batch = base
  features = oracle.encoded(model, params, batch.vision)
  cache = model.init_cache(2, 320, jnp.float32)
  states, _ = jax.jit(model.extend)(params, cache, *batch.arguments(features))
  whole = oracle.hidden(model, params, batch, features)
  assert_allclose(np.asarray(states)[batch.valid], whole, atol=1e-5)


def test_bfloat16_stays_close_and_has_float32_gradients(base):
  model, params = adapted(base)
  low = {
    path: x if path[-1].startswith("lora_") else np.asarray(x).astype(jnp.bfloat16)
    for path, x in flatten(params).items()
  }
  low = nnx.traversals.unflatten_mapping(low)
  got, expected = oracle.logits(model, low, base[2]), oracle.logits(model, params, base[2])
  assert got.dtype == jnp.bfloat16
  # As for the plain model: some 20 roundings of 0.4 % add up to 2 % of the signal.
  assert np.abs(got.astype(np.float32) - expected).mean() < 0.03 * expected.std()

  def gradients(params):
    found = gradient_of(model)(*lora.split(params), without_images(base))
    return {path: np.asarray(x) for path, x in flatten(found).items()}

  one, other = gradients(low), gradients(params)
  for path, exact in other.items():
    if path[0] == "text":
      assert one[path].dtype == np.float32
      # The forward's 2 % and as much backward, in each number of a sum: 10 % of the whole is far
      # from both a lost factor and noise.
      assert np.linalg.norm(one[path] - exact) < 0.1 * np.linalg.norm(exact), path


def dropping(x, *, seed: int, dropout: float = 0.25, layers_count: int = 2):
  """x A B of two stacked one-layer modules whose A and B are the identity: the masks, scaled."""
  width = x.shape[-1]
  build = lambda rngs: layers.Linear((width, width), ("embed", "mlp"), bias=False, rngs=rngs)
  root = nnx.Module()
  root.one = layers.stack(layers_count, build, nnx.Rngs(0))
  root.two = layers.stack(layers_count, build, nnx.Rngs(0))
  settings = LoraConfig(rank=width, alpha=float(width), dropout=dropout, targets=("one", "two"))
  lora.attach(root, settings, rngs=nnx.Rngs(1), keys=True)
  graphdef, state = nnx.split(root)
  eye = jnp.broadcast_to(jnp.eye(width), (layers_count, width, width))
  params = nnx.to_pure_dict(state)
  for name in ("one", "two"):
    module = params[name]
    module.update(kernel=jnp.zeros_like(module["kernel"]), lora_a=eye, lora_b=eye)
    del module["lora_key"]
  params = lora.keyed(params, jax.random.key(seed))
  run = lambda name: jax.lax.map(
    lambda leaves: nnx.merge(nnx.split(getattr(nnx.merge(graphdef, params), name))[0], leaves)(x),
    params[name],
  )
  return {(name, layer): y for name in ("one", "two") for layer, y in enumerate(run(name))}


def test_dropout_keeps_the_mean_and_differs_by_layer_module_and_step():
  x = jnp.ones((500, 8))
  masks = {
    (*key, seed): np.asarray(y) for seed in (0, 1) for key, y in dropping(x, seed=seed).items()
  }
  for mask in masks.values():
    values = np.unique(mask.round(5))
    assert_allclose(values, [0, 4 / 3], atol=1e-5)  # Dropped, or divided by 0.75.
    # 4,000 draws of deviation sqrt(0.25 / 0.75) = 0.58: their mean's is 0.009.
    assert abs(mask.mean() - 1) < 0.04
  names = list(masks)
  for i, one in enumerate(names):
    for other in names[i + 1 :]:
      # Independent masks differ in 2 * 0.25 * 0.75 = 37.5 % of places, and equal ones in none.
      assert 0.3 < (masks[one] != masks[other]).mean() < 0.45, (one, other)


def test_dropout_is_on_where_parameters_hold_keys(base):
  model, params = adapted(base, dropout=0.5)
  _, _, batch = base
  assert not lora.is_keyed(params)
  quiet = oracle.logits(
    dataclasses.replace(model, lora=dataclasses.replace(model.lora, dropout=0.0)), params, batch
  )
  assert_array_equal(oracle.logits(model, params, batch), quiet)
  keyed = lora.keyed(params, jax.random.key(3))
  assert lora.is_keyed(keyed)
  one, same = oracle.logits(model, keyed, batch), oracle.logits(model, keyed, batch)
  assert_array_equal(one, same)
  remat = oracle.logits(dataclasses.replace(model, remat="layers"), keyed, batch)
  assert_allclose(remat, one, atol=1e-5)  # Recomputed with the same masks.
  other = oracle.logits(model, lora.keyed(params, jax.random.key(4)), batch)
  assert np.abs(one - quiet).max() > 0.1 and np.abs(one - other).max() > 0.1


def test_a_model_with_adapters_is_a_value(base):
  model, _ = adapted(base)
  same = Model(model.config, lora=LoraConfig(rank=4, alpha=8.0, targets=EVERYWHERE, ranks=RANKS))
  assert model == same and hash(model) == hash(same)
  assert model != base[0]


@pytest.mark.parametrize(
  "settings, match",
  [
    ({"targets": ("text/layers/attn/z",)}, r"'text/layers/attn/z' matches none of \['text/layers/"),
    ({"targets": ("attn/q",)}, "'attn/q' matches none"),  # The whole path, not a part.
    ({"ranks": (("text/layers/attn/q", (1, 2, 3)),)}, "names 3 layers of 'text/layers/attn/q'"),
    ({"ranks": (("text/attn/q", (1, 2)),)}, "names 2 layers of 'text/attn/q'"),
    ({"alphas": (("text/layers/attn/q", (1.0,)),)}, "names 1 layers of 'text/layers/attn/q'"),
    ({"rank": 0, "ranks": ()}, "rank 0 .*adapts nothing"),
    ({"rank": -1}, "rank -1 .*must not be negative"),
    ({"ranks": (("text/layers/attn/q", (1, -2)),)}, "must not be negative"),
    ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and less than 1"),
  ],
)
def test_wrong_settings_are_named(base, settings, match):
  with pytest.raises(ValueError, match=match):
    adapted(base, **settings)


def test_a_rank_file_gives_layers_their_ranks(base, tmp_path):
  file = tmp_path / "ranks.json"
  file.write_text(
    json.dumps({"ranks": {"text/layers/attn/q/kernel": [2, 5]}, "made_by": "pixelis ranks"})
  )
  assert lora.read_ranks(file) == (("text/layers/attn/q", (2, 5)),)
  # Rank 0 elsewhere: only what the file lists is adapted.
  _, params = adapted(base, rank=0, ranks=lora.read_ranks(file))
  ranks = {path: x.shape for path, x in flatten(params).items() if path[-1] == "lora_a"}
  assert ranks == {("text", "layers", "attn", "q", "lora_a"): (2, 64, 5)}


@pytest.mark.parametrize(
  "content, match",
  [
    ("{", "must be JSON like"),
    ("[]", "must be JSON like"),
    ('{"rank": {}}', "must be JSON like"),
    ('{"ranks": {"text/layers/attn/q": [1, 2]}}', "must be a kernel's path and whole ranks"),
    ('{"ranks": {"text/layers/attn/q/kernel": [1, 2.5]}}', "'text/layers/attn/q/kernel': .*2.5"),
  ],
)
def test_a_damaged_rank_file_is_named(tmp_path, content, match):
  file = tmp_path / "ranks.json"
  with pytest.raises(FileNotFoundError, match="there is no rank file .*ranks.json"):
    lora.read_ranks(file)
  file.write_text(content)
  with pytest.raises(ValueError, match=rf"ranks\.json.*{match}"):
    lora.read_ranks(file)
