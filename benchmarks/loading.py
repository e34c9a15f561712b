"""Memory and time of loading a sharded checkpoint of a large model's shapes.

    python benchmarks/loading.py --layers 36 --out runs/loading

Writes a bfloat16 checkpoint of Qwen2.5-VL-3B's shapes (random weights, shards of 2 GB, about 7.5 GB
in all; --layers 2 for a small one), loads it in a process of its own and samples that process'
anonymous memory every 10 ms: pages of the mapped files are the kernel's to drop and are not
counted. On a CPU the weights themselves are in that memory, so what loading needs beside them is
the peak less the weights. Allowed is the largest tensor plus 10% of all weights.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from record import record  # The file beside this one.
from safetensors.numpy import save_file

from pixelis_jax.model.load import INDEX, load

SHARD_BYTES = 2_000_000_000
CONFIG = {  # Qwen/Qwen2.5-VL-3B-Instruct.
  "model_type": "qwen2_5_vl",
  "hidden_size": 2048,
  "intermediate_size": 11008,
  "num_attention_heads": 16,
  "num_hidden_layers": 36,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
  "tie_word_embeddings": True,
  "vocab_size": 151936,
  "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2},
}


def write(path: Path, layers: int) -> None:
  """By transformers' own names and shapes."""
  import torch
  from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

  config = {**CONFIG, "num_hidden_layers": layers}
  with torch.device("meta"):
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config))
  draw = np.random.default_rng(0)
  shard, size, weight_map = {}, 0, {}

  def flush() -> None:
    nonlocal shard, size
    name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(shard, path / name)
    weight_map.update(dict.fromkeys(shard, name))
    shard, size = {}, 0

  for name, parameter in model.named_parameters():
    values = draw.standard_normal(tuple(parameter.shape), np.float32) * 0.02
    shard[name] = values.astype(ml_dtypes.bfloat16)
    size += shard[name].nbytes
    if size > SHARD_BYTES:
      flush()
  flush()
  (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def anonymous() -> int:
  """Bytes of this process' anonymous memory."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon"):
      return int(line.split()[1]) * 1024
  raise ValueError("/proc/self/status has no RssAnon: this needs Linux 4.5 or newer")


def measure(path: Path) -> dict[str, float]:
  """Loads and says what it took; sizes in bytes."""
  jnp.zeros(1).block_until_ready()
  start, peak, done = anonymous(), 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.is_set():
      peak = max(peak, anonymous())
      time.sleep(0.01)

  watcher = threading.Thread(target=watch)
  watcher.start()
  began = time.perf_counter()
  _, params = load(path, dtype=jnp.bfloat16)
  jax.block_until_ready(params)
  seconds = time.perf_counter() - began
  done.set()
  watcher.join()
  weights = jax.tree.leaves(params)
  total = sum(w.nbytes for w in weights)
  # The largest tensor of the files: one layer of what is stacked here.
  largest = max(w.nbytes // (w.shape[0] if w.ndim > 2 else 1) for w in weights)
  beside = peak - start - total
  return {
    "weights": total,
    "largest_tensor": largest,
    "peak": peak - start,
    "beside_weights": beside,
    "allowed": largest + total // 10,
    "seconds": seconds,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=36)
  parser.add_argument("--out", type=Path, default=Path("runs/loading"))
  parser.add_argument("--measure", type=Path, help="load this directory and print the numbers")
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(measure(args.measure)))
    return
  path = args.out / "checkpoint"
  if path.exists():
    shutil.rmtree(path)  # Of an earlier run that was stopped.
  write(path, args.layers)
  command = [sys.executable, __file__, "--measure", str(path)]
  run = subprocess.run(command, capture_output=True, text=True, check=True)
  result = json.loads(run.stdout.splitlines()[-1])
  shutil.rmtree(path)
  seconds = result["seconds"]
  sizes = {name: number for name, number in result.items() if name != "seconds"}
  print("\n".join(f"{name:16} {number / 1e9:6.2f} GB" for name, number in sizes.items()))
  print(f"{'seconds':16} {seconds:6.1f}")
  fits = result["beside_weights"] <= result["allowed"]
  print("fits" if fits else "needs more than is allowed")
  record(args.out, "loading", result)


if __name__ == "__main__":
  main()
