"""Operations counted from shapes, against hand counts and against XLA's count of a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelis_jax import batch
from pixelis_jax.model import cost
from pixelis_jax.model.config import ModelConfig
from pixelis_jax.model.policy import Model
from tests.model import oracle


@pytest.fixture(scope="module")
def config():
  return ModelConfig.from_hf(oracle.hf_config(tied=False).to_dict())


def test_a_decoders_products_by_hand(config):
  text = dataclasses.replace(
    config.text,
    layers=3,
    width=4,
    heads=2,
    kv_heads=1,
    head_width=6,
    mrope_section=(1, 1, 1),
    mlp_width=7,
    vocab_size=11,
  )
  # A layer: q and o 4 x 12 each, k and v 4 x 6 each, three of 4 x 7: 96 + 48 + 84 = 228 weights.
  # The head 44. A (query, key) pair: twice a product of 12 numbers over all heads.
  assert cost.decoding(text, cost.Work(tokens=10)) == 2 * 3 * 228 * 10
  assert cost.decoding(text, cost.Work(words=6)) == 2 * 44 * 6
  assert cost.decoding(text, cost.Work(pairs=8)) == 3 * 2 * 2 * 12 * 8


def test_xla_counts_the_same_products():
  """Of a model with one layer and one block, which no scan hides: within its norms and softmax."""
  hf = oracle.hf_config(tied=False).to_dict()
  hf["text_config"] |= {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 1024}
  hf["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
  hf["text_config"]["rope_parameters"] |= {"mrope_section": [8, 12, 12]}
  hf["vision_config"] |= {"depth": 1, "hidden_size": 256, "num_heads": 4, "out_hidden_size": 256}
  hf["vision_config"] |= {"intermediate_size": 512, "fullatt_block_indexes": [0]}
  config = ModelConfig.from_hf(hf)
  model = Model(config)
  side, T = 8, 64  # One tile of attention each: XLA counts a loop's body once.
  image = oracle.image((1, side, side), config, 0)
  tokens = np.full(T, 5, np.int32)
  tokens[1 : 1 + side * side // 4] = config.image_token
  zeros = np.zeros(T, np.float32)
  row = batch.Row(tokens=tokens, images=(image,), loss_mask=zeros == 0, logps=zeros)
  inputs = batch.pack_inputs([row], config, max_tokens=T)

  def run(params):
    features = model.encode(params, inputs.vision).reshape(1, -1, config.feature_width)
    tokens, *at = map(jnp.asarray, (inputs.tokens, inputs.positions))
    sources, segments = map(jnp.asarray, (inputs.sources, inputs.segments))
    hidden = model.hidden(params, tokens, *at, features, sources, segments)
    return hidden @ params["head"].T

  counted = jax.jit(run).lower(model.shapes(jnp.float32)).compile().cost_analysis()["flops"]
  # One tile of attention is computed whole: T^2 pairs in place of half of them.
  patches = side * side
  work = cost.Work(
    tokens=T, pairs=T * T, words=T, patches=patches, patch_pairs=patches**2, window_pairs=0
  )
  assert cost.forward(config, work) == pytest.approx(counted, rel=0.05)


def test_an_update_is_so_many_passes_of_each_part(config):
  work = cost.Work(tokens=5, pairs=15, words=2, patches=8, patch_pairs=64, window_pairs=32)
  text, tower = cost.decoding(config.text, work), cost.seeing(config.vision, work)
  assert cost.update(config, work) == 3 * cost.forward(config, work)
  assert cost.update(config, work, text=2, visual=1) == 2 * text + tower


def test_the_peak_is_that_of_the_chip_by_the_name_jax_gives_it():
  assert cost.peak("TPU v5 lite") == 197e12
  assert cost.peak("NVIDIA H200") == 989e12
  assert cost.peak(jax.devices("cpu")[0].device_kind) is None
