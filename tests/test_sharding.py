"""Shardings on eight virtual CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pixelis_jax import sharding
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.policy import Model


def test_mesh_takes_the_devices_the_other_axes_leave():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert dict(sharding.make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  # Explicit axes would change the types inside jit: the design is GSPMD.
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_may_use_fewer_devices_in_one_process():
  assert sharding.make_mesh(data=1).devices.size == 1
  assert list(sharding.make_mesh(devices=jax.devices()[1:]).devices.flat) == jax.devices()[1:]


@pytest.mark.parametrize(
  "sizes, match",
  [
    (dict(data=9), "needs 9 devices.* have 8"),
    (dict(tensor=16), "needs 16 devices.* have 8"),
    (dict(fsdp=0), "fsdp=0 tensor=1: sizes must be positive"),
    (dict(fsdp=-1), "data=-1 fsdp=-1 tensor=1: sizes must be positive .one may be -1"),
    (dict(data=-2), "data=-2 .*sizes must be positive"),
  ],
)
def test_mesh_refuses_sizes_that_do_not_fit(sizes, match):
  with pytest.raises(ValueError, match=match):
    sharding.make_mesh(**sizes)


def test_several_processes_must_use_every_device(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"needs 1 devices; 2 process\(es\) have 8"):
    sharding.make_mesh(data=1)


def test_every_rule_names_mesh_axes():
  for name, axes in sharding.RULES.items():
    named = (axes,) if isinstance(axes, str) else axes or ()
    assert set(named) <= set(sharding.MESH_AXES), name


def test_unknown_logical_axis_is_named():
  with pytest.raises(ValueError, match=r"\['embd'\] have no rule.*'embed'"):
    sharding.spec(("embd", "mlp"))


def test_shardings_keep_the_tree_and_split_the_right_dimension():
  axes = {"mlp": {"up": ("embed", "mlp"), "norm": ("embed",)}, "step": ()}
  arrays = {"mlp": {"up": jnp.zeros((4, 6)), "norm": jnp.zeros(4)}, "step": jnp.zeros(())}
  made = sharding.shardings(axes, arrays, sharding.make_mesh(data=1, tensor=2))
  # There is one device along fsdp: it splits nothing.
  assert made["mlp"]["up"].spec == PartitionSpec(None, "tensor")
  assert made["mlp"]["norm"].spec == made["step"].spec == PartitionSpec()
  up = jax.device_put(jnp.zeros((4, 6)), made["mlp"]["up"])
  # tensor=2 splits the six mlp columns in two; a swapped pair would give (2, 6).
  assert {shard.data.shape for shard in up.addressable_shards} == {(4, 3)}


def test_rows_are_split_over_data_and_fsdp_together():
  for mesh in (sharding.make_mesh(data=2), sharding.make_mesh(data=1, fsdp=2)):
    rows = jax.device_put(jnp.arange(8.0).reshape(4, 2), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2)}
    assert sharding.row_blocks(mesh) == 2
  assert sharding.row_blocks(sharding.make_mesh(data=1, tensor=2)) == 1
  assert sharding.row_blocks(None) == 1
  assert sharding.row_blocks(sharding.make_mesh(data=2, fsdp=2, tensor=2)) == 4


@pytest.mark.parametrize("sizes", [dict(), dict(fsdp=2), dict(tensor=2), dict(fsdp=2, tensor=2)])
def test_a_program_is_not_compiled_again_for_what_it_returned(sizes):
  """Its results must lie where it says its arguments do, by the same name: P(), not P("fsdp")."""
  axes = {"up": ("layers", "embed", "mlp"), "norm": ("layers", "embed"), "bias": ("mlp",)}
  shapes = {"up": (2, 4, 6), "norm": (2, 4), "bias": (3,)}
  weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  mesh = sharding.make_mesh(data=1, **sizes)
  weights = jax.device_put(weights, sharding.shardings(axes, weights, mesh))
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1.0, tree))
  step(step(weights))
  assert step._cache_size() == 1


def test_what_does_not_divide_stays_whole():
  """3 columns over 2 devices: whole, and the rows split all the same."""
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  [placed] = sharding.shardings([("embed", "mlp")], [jnp.zeros((4, 3))], mesh)
  assert placed.shard_shape((4, 3)) == (2, 3)


def test_devices_may_be_laid_out_anew_in_their_order():
  mesh = sharding.make_mesh(fsdp=8, data=1)
  other = sharding.relaid(mesh, data=-1, fsdp=1, tensor=2)
  assert dict(other.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
  assert list(other.devices.flat) == list(mesh.devices.flat)
  assert sharding.relaid(mesh, data=0, fsdp=1, tensor=1) is mesh
  with pytest.raises(ValueError, match=r"\(3, 1, 2\) must have the 8 devices"):
    sharding.relaid(mesh, data=3, fsdp=1, tensor=2)


def test_a_sharded_product_equals_the_whole_one():
  mesh = sharding.make_mesh(data=1, fsdp=2)
  x_BD = np.arange(8, dtype=np.float32).reshape(4, 2)
  w_DF = np.arange(6, dtype=np.float32).reshape(2, 3)
  axes = sharding.shardings({"w": ("embed", "mlp")}, {"w": w_DF}, mesh)
  out = jax.jit(jnp.matmul, out_shardings=sharding.replicated(mesh))(
    jax.device_put(x_BD, sharding.batch_sharding(mesh)), jax.device_put(w_DF, axes["w"])
  )
  # Small integers: every sum is exact in float32, so equality is exact.
  np.testing.assert_array_equal(np.asarray(out), x_BD @ w_DF)


TINY = {
  "model_type": "qwen2_5_vl",
  "vision_config": {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
  },
  "text_config": {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
  },
}


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(tensor=2)])
def test_every_matrix_of_the_model_is_halved_on_two_devices(sizes):
  model = Model(ModelConfig.from_hf(TINY), mesh=sharding.make_mesh(data=1, **sizes))
  placed = model.shardings()
  shapes = jax.tree.leaves_with_path(model.shapes())
  assert len(jax.tree.leaves(placed)) == len(shapes)
  for (path, array), place in zip(shapes, jax.tree.leaves(placed), strict=True):
    name = jax.tree_util.keystr(path)
    if name.endswith(("['bias']", "['scale']")) or ("patch" in name and "tensor" in sizes):
      continue  # Small: vectors, and the patch embedding's input, which no rule splits.
    part = np.prod(place.shard_shape(array.shape)) / np.prod(array.shape)
    assert part == 0.5, (name, place.spec)


@pytest.mark.parametrize(
  "learning, playing",
  [((1, 4, 1), (1, 1, 2)), ((1, 2, 2), (4, 1, 1)), ((1, 1, 1), (1, 2, 2)), ((2, 1, 1), (3, 1, 2))],
)
def test_weights_are_carried_to_other_devices_past_the_host(learning, playing, monkeypatch):
  """`device_put` fetches an array to the host where a part that is wanted lies on no device."""
  size = int(np.prod(learning))
  mesh = sharding.make_mesh(*learning, devices=jax.devices()[:size])
  there = sharding.make_mesh(*playing, devices=jax.devices()[size : size + int(np.prod(playing))])
  axes = {"up": ("embed", "mlp"), "odd": ("embed", "heads")}
  tree = {"up": np.arange(24.0).reshape(4, 6), "odd": np.arange(21.0).reshape(7, 3)}
  weights = jax.device_put(tree, sharding.shardings(axes, tree, mesh))
  places = sharding.shardings(axes, tree, there)
  carry = sharding.Carrier(places, mesh, lambda tree: jax.tree.map(lambda x: 2 * x, tree))
  put = jax.device_put
  parts = lambda x, place: {str(part) for part in place.devices_indices_map(x.shape).values()}

  def spied(tree, places):
    for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
      assert x.sharding.device_set == set(mesh.devices.flat)
      assert mesh.size == 1 or parts(x, place) <= parts(x, x.sharding)
    return put(tree, places)

  monkeypatch.setattr(jax, "device_put", spied)
  carried = carry(weights)
  for name, x in tree.items():
    np.testing.assert_array_equal(carried[name], 2 * x)
    assert carried[name].sharding == places[name]


def test_devices_that_cannot_hold_the_parts_are_refused():
  mesh = sharding.make_mesh(1, 3, 1, devices=jax.devices()[:3])
  places = {"up": sharding.replicated(sharding.make_mesh(1, 1, 2, devices=jax.devices()[4:6]))}
  with pytest.raises(ValueError, match="in 2 parts: the 3 devices .* must be 1 or a multiple"):
    sharding.Carrier(places, mesh)
