"""What learns and what stays: which leaves, and in which dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pixelis_jax.model import lora, trainable
from pixelis_jax.model.lora import LoraConfig
from pixelis_jax.model.policy import Model


def test_what_is_frozen_is_no_part_of_what_is_trained(policy):
  """It neither moves nor decays and has no moments; together both are the parameters."""
  parts = functools.partial(trainable.parts, policy.model, policy.params)
  trained, base = parts(["text", "visual/merger"])
  names = lambda tree: {"/".join(path) for path in nnx.traversals.flatten_mapping(tree)}
  assert all(name.startswith("visual/") for name in names(trained))
  assert names(base) == names(policy.params) - names(trained)
  assert {name for name in names(base) if "visual" in name} == {
    name for name in names(policy.params) if name.startswith("visual/merger/")
  }
  joined = lora.join(trained, base)
  same = jax.tree.map(lambda x, y: x is y, joined, policy.params)
  assert jax.tree.all(same)
  there = r"\['text', 'visual'\]"
  with pytest.raises(ValueError, match=rf"cannot freeze 'tower': the parameters have {there}"):
    parts(["tower"])
  # "visual/merge" begins a name, and names nothing.
  with pytest.raises(ValueError, match=r"cannot freeze 'visual/merge': .*'visual/merger'"):
    parts(["visual/merge"])
  with pytest.raises(ValueError, match=r"freezing \('text', 'visual'\) leaves nothing to learn"):
    parts(["text", "visual"])


def test_a_head_beside_the_decoder_is_frozen_with_it(policy):
  """Whose words are whose is not what a tower learns, whether head and embedding are one or two."""
  config = policy.model.config
  untied = dataclasses.replace(config, text=dataclasses.replace(config.text, tied=False))
  model = Model(untied)
  trained, base = trainable.parts(model, model.shapes(), ["text"])
  assert trained.keys() == {"visual"} and base.keys() == {"text", "head"}


def test_frozen_adapters_are_not_trained(policy):
  targets = (*LoraConfig(rank=2, alpha=4.0).targets, "visual/blocks/attn/qkv")
  model = dataclasses.replace(policy.model, lora=LoraConfig(rank=2, alpha=4.0, targets=targets))
  params = model.adapt(policy.params, jax.random.key(0))
  trained, _ = trainable.parts(model, params, ["text"])
  assert trained.keys() == {"visual"} and trained["visual"].keys() == {"blocks"}
  assert trained["visual"]["blocks"]["attn"]["qkv"].keys() == {"lora_a", "lora_b"}


def test_what_stays_is_held_as_it_answers(policy):
  """What learns keeps its bits, what does not is rounded; what has the dtype is not copied."""
  held = trainable.held_in(jnp.bfloat16, policy.model, policy.params, ["text"])
  dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
  assert dtypes(held["text"]) == {"bfloat16"}
  same = lambda tree, other: jax.tree.all(jax.tree.map(lambda x, y: x is y, tree, other))
  assert same(held["visual"], policy.params["visual"])
  assert same(trainable.held_in(jnp.float32, policy.model, policy.params, ["text"]), policy.params)
  assert same(trainable.held_in(jnp.bfloat16, policy.model, policy.params), policy.params)
