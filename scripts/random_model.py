"""A directory with a released model's shapes that runs without its weights, to time it.

    python scripts/random_model.py qwen2_5_vl_7b runs/random-7b
    python -m pixelis_jax.sft --config=configs/sft.py:qwen2_5_vl_7b-lora --workdir=runs/timed \
      --config.model.path=runs/random-7b --config.model.random_seed=0

config.json is that of assets/shapes, with the words of the embedded model, whose tokenizer and
image settings it has but for the size of a patch.
"""

import argparse
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPES, WORDS = ROOT / "assets" / "shapes", ROOT / "assets" / "tiny-vl"
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 896 * 896}  # Of an image, at least and at most.


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("shape", choices=sorted(p.name for p in SHAPES.iterdir()))
  parser.add_argument("out", type=Path)
  args = parser.parse_args()
  shape = json.loads((SHAPES / args.shape / "config.json").read_text())
  words = json.loads((WORDS / "config.json").read_text())
  vision = shape.get("vision_config")
  if vision is None:
    raise SystemExit(f"{args.shape} reads text only: it cannot have the embedded model's prompts")
  shape |= {k: v for k, v in words.items() if k.endswith("token_id")}
  text = shape.get("text_config", shape)
  text |= {k: v for k, v in words["text_config"].items() if k.endswith("token_id")}
  args.out.mkdir(parents=True)
  for file in WORDS.iterdir():
    if file.suffix in (".json", ".jinja") and file.name != "config.json":
      shutil.copy(file, args.out)
  images = json.loads((WORDS / "preprocessor_config.json").read_text())
  images |= {"patch_size": vision["patch_size"], "size": PIXELS}
  (args.out / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
  (args.out / "config.json").write_text(json.dumps(shape, indent=2) + "\n")


if __name__ == "__main__":
  main()
