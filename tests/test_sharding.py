"""Shardings on two virtual CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pixelis_jax import sharding
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.policy import Model


def test_mesh_takes_the_devices_the_other_axes_leave():
  assert dict(sharding.make_mesh().shape) == {"data": 2, "fsdp": 1, "tensor": 1}
  mesh = sharding.make_mesh(fsdp=2)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}
  # Explicit axes would change the types inside jit: the design is GSPMD.
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_may_use_fewer_devices_in_one_process():
  assert sharding.make_mesh(data=1).devices.size == 1
  assert list(sharding.make_mesh(devices=jax.devices()[1:]).devices.flat) == jax.devices()[1:]


@pytest.mark.parametrize(
  "sizes, match",
  [
    (dict(data=3), "needs 3 devices.* have 2"),
    (dict(tensor=4), "needs 4 devices.* have 2"),
    (dict(fsdp=0), "fsdp=0 tensor=1: sizes must be positive"),
    (dict(data=-2), "data=-2 .*sizes must be positive"),
  ],
)
def test_mesh_refuses_sizes_that_do_not_fit(sizes, match):
  with pytest.raises(ValueError, match=match):
    sharding.make_mesh(**sizes)


def test_several_processes_must_use_every_device(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"needs 1 devices; 2 process\(es\) have 2"):
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
  made = sharding.shardings(axes, sharding.make_mesh(tensor=2))
  assert made["mlp"]["up"].spec == PartitionSpec("fsdp", "tensor")
  assert made["mlp"]["norm"].spec == PartitionSpec("fsdp")
  assert made["step"].spec == PartitionSpec()
  up = jax.device_put(jnp.zeros((4, 6)), made["mlp"]["up"])
  # tensor=2 splits the six mlp columns in two; a swapped pair would give (2, 6).
  assert {shard.data.shape for shard in up.addressable_shards} == {(4, 3)}


def test_rows_are_split_over_data_and_fsdp_together():
  for mesh in (sharding.make_mesh(data=2), sharding.make_mesh(data=1, fsdp=2)):
    rows = jax.device_put(jnp.arange(8.0).reshape(4, 2), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 2)}
    assert sharding.rows_multiple(mesh) == 2
  assert sharding.rows_multiple(sharding.make_mesh(tensor=2)) == 1


def test_a_sharded_product_equals_the_whole_one():
  mesh = sharding.make_mesh(fsdp=2)
  x_BD = np.arange(8, dtype=np.float32).reshape(4, 2)
  w_DF = np.arange(6, dtype=np.float32).reshape(2, 3)
  axes = sharding.shardings({"w": ("embed", "mlp")}, mesh)
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
  model = Model(ModelConfig.from_hf(TINY))
  placed = sharding.shardings(model.axes(), sharding.make_mesh(data=1, **sizes))
  shapes = jax.tree.leaves_with_path(model.shapes())
  assert len(jax.tree.leaves(placed)) == len(shapes)
  for (path, array), place in zip(shapes, jax.tree.leaves(placed), strict=True):
    name = jax.tree_util.keystr(path)
    assert len(place.spec) == array.ndim, name  # An axis name for every dimension.
    if name.endswith(("['bias']", "['scale']")) or ("patch" in name and "tensor" in sizes):
      continue  # Small: vectors, and the patch embedding's input, which no rule splits.
    part = np.prod(place.shard_shape(array.shape)) / np.prod(array.shape)
    assert part == 0.5, (name, place.spec)
