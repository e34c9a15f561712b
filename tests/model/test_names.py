"""The name tables hold each weight once, and nothing that a model does not have."""

import pytest
from flax import nnx

from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.names import TABLES, canonical
from pixelis_jax.model.policy import Model
from tests.model import oracle


@pytest.mark.parametrize("family", TABLES)
def test_a_table_is_its_model(family):
  rows = TABLES[family]
  paths, names = {row.path for row in rows}, {row.name for row in rows}
  assert len(paths) == len(names) == len(rows)
  for tied in (True, False):
    config = ModelConfig.from_hf(oracle.hf_config(tied=tied, family=family).to_dict())
    flat = nnx.traversals.flatten_mapping(Model(config).shapes(), sep="/")
    assert flat.keys() == paths - ({"head"} if tied else set())


def test_only_qwen2_5_vl_has_two_spellings():
  name = "model.language_model.norm.weight"
  assert canonical(name, "qwen2_5_vl") == "model.norm.weight"
  assert canonical(name, "qwen3_vl") == name
