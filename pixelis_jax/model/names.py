"""Which Hugging Face tensor is which of our weights: one table a family, for both directions."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """One weight: our path, its Hugging Face name ("{}" is the layer), and how the two are laid out.

  "same" is the array as it is; "kernel" is [out, in] there and [in, out] here, any further axes of
  either flattened. Names are those that `save_pretrained` of transformers 5.24 writes.
  """

  path: str
  name: str
  layout: str


def _linear(path: str, name: str, *, bias: bool) -> list[Row]:
  rows = [Row(f"{path}/kernel", f"{name}.weight", "kernel")]
  return rows + [Row(f"{path}/bias", f"{name}.bias", "same")] if bias else rows


def _scale(path: str, name: str) -> list[Row]:
  return [Row(f"{path}/scale", f"{name}.weight", "same")]


def _norm(path: str, name: str) -> list[Row]:
  return [*_scale(path, name), Row(f"{path}/bias", f"{name}.bias", "same")]


def _decoder(prefix: str, *, qkv_bias: bool, qk_norm: bool) -> list[Row]:
  ours, theirs = "text/layers", f"{prefix}.layers.{{}}"
  attn, attn_hf = f"{ours}/attn", f"{theirs}.self_attn"
  rows = [
    Row("text/embedding", f"{prefix}.embed_tokens.weight", "same"),
    *_scale(f"{ours}/norm1", f"{theirs}.input_layernorm"),
    *(row for x in "qkv" for row in _linear(f"{attn}/{x}", f"{attn_hf}.{x}_proj", bias=qkv_bias)),
    *_linear(f"{attn}/o", f"{attn_hf}.o_proj", bias=False),
    *_scale(f"{ours}/norm2", f"{theirs}.post_attention_layernorm"),
    *_linear(f"{ours}/mlp/gate", f"{theirs}.mlp.gate_proj", bias=False),
    *_linear(f"{ours}/mlp/up", f"{theirs}.mlp.up_proj", bias=False),
    *_linear(f"{ours}/mlp/down", f"{theirs}.mlp.down_proj", bias=False),
    *_scale("text/norm", f"{prefix}.norm"),
    Row("head", "lm_head.weight", "same"),
  ]
  if qk_norm:
    rows += _scale(f"{attn}/q_norm", f"{attn_hf}.q_norm")
    rows += _scale(f"{attn}/k_norm", f"{attn_hf}.k_norm")
  return rows


def _attention(block: str, block_hf: str) -> list[Row]:
  return [
    *_linear(f"{block}/attn/qkv", f"{block_hf}.attn.qkv", bias=True),
    *_linear(f"{block}/attn/proj", f"{block_hf}.attn.proj", bias=True),
  ]


def _tower_2_5(prefix: str) -> list[Row]:
  block, block_hf = "visual/blocks", f"{prefix}.blocks.{{}}"
  return [
    *_linear("visual/patch", f"{prefix}.patch_embed.proj", bias=False),
    *_scale(f"{block}/norm1", f"{block_hf}.norm1"),
    *_attention(block, block_hf),
    *_scale(f"{block}/norm2", f"{block_hf}.norm2"),
    *_linear(f"{block}/mlp/gate", f"{block_hf}.mlp.gate_proj", bias=True),
    *_linear(f"{block}/mlp/up", f"{block_hf}.mlp.up_proj", bias=True),
    *_linear(f"{block}/mlp/down", f"{block_hf}.mlp.down_proj", bias=True),
    *_scale("visual/merger/norm", f"{prefix}.merger.ln_q"),
    *_linear("visual/merger/mlp/fc1", f"{prefix}.merger.mlp.0", bias=True),
    *_linear("visual/merger/mlp/fc2", f"{prefix}.merger.mlp.2", bias=True),
  ]


def _merger_3(path: str, name: str) -> list[Row]:
  return [
    *_norm(f"{path}/norm", f"{name}.norm"),
    *_linear(f"{path}/mlp/fc1", f"{name}.linear_fc1", bias=True),
    *_linear(f"{path}/mlp/fc2", f"{name}.linear_fc2", bias=True),
  ]


def _tower_3(prefix: str) -> list[Row]:
  block, block_hf = "visual/blocks", f"{prefix}.blocks.{{}}"
  return [
    *_linear("visual/patch", f"{prefix}.patch_embed.proj", bias=True),
    Row("visual/table", f"{prefix}.pos_embed.weight", "same"),
    *_norm(f"{block}/norm1", f"{block_hf}.norm1"),
    *_attention(block, block_hf),
    *_norm(f"{block}/norm2", f"{block_hf}.norm2"),
    *_linear(f"{block}/mlp/fc1", f"{block_hf}.mlp.linear_fc1", bias=True),
    *_linear(f"{block}/mlp/fc2", f"{block_hf}.mlp.linear_fc2", bias=True),
    *_merger_3("visual/merger", f"{prefix}.merger"),
    *_merger_3("visual/deep", f"{prefix}.deepstack_merger_list.{{}}"),
  ]


TABLES: dict[str, tuple[Row, ...]] = {
  "qwen2_5_vl": (*_decoder("model", qkv_bias=True, qk_norm=False), *_tower_2_5("visual")),
  "qwen3_vl": (
    *_decoder("model.language_model", qkv_bias=False, qk_norm=True),
    *_tower_3("model.visual"),
  ),
  "qwen3": (*_decoder("model", qkv_bias=False, qk_norm=True),),
  "llama": (*_decoder("model", qkv_bias=False, qk_norm=False),),
}
# The module paths of transformers >= 4.52 in memory, which some exporters write to disk.
_ALIASES = {"qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."}}


def canonical(name: str, family: str) -> str:
  """The table's spelling of a tensor's name."""
  for prefix, short in _ALIASES.get(family, {}).items():
    if name.startswith(prefix):
      return short + name.removeprefix(prefix)
  return name
