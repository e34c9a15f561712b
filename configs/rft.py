"""GRPO of a model of your own on a file of labelled questions (data/questions.py).

    python -m pixelis_jax.rft --config=configs/rft.py --workdir=runs/rft --config.model.path=DIR \
      --config.data.file=train.jsonl --config.eval.file=held_out.jsonl

"text" for a model that only reads, "lora" and "text-lora" to train adapters only; or a recipe of
configs/tiny_rft.py, such as "dapo". The name of a released model ("qwen2_5_vl_7b", and with "-lora"
behind it) sets bfloat16, remat and a mesh over all devices; until `model.path` names its weights it
can only be planned (`pixelis plan`). BUILD.md has the times of a 7B model with adapters on one GPU.
"""

from ml_collections import ConfigDict

from configs import common, tiny_rft

OPTIONS = (*common.TRAINED, *tiny_rft.RECIPES)


def get_config(arg: str = "") -> ConfigDict:
  if arg not in OPTIONS:
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}")
  recipe, way = (arg, "") if arg in tiny_rft.RECIPES else ("", arg)
  c = tiny_rft.get_config(recipe).unlock()
  common.own_training(c, way, lr=1e-6, lora_lr=1e-5, steps=500)
  if "text" in arg:
    c.reward.curiosity = "off"  # It pays for looking at pixels.
  c.rows_multiple = 1
  c.eval = common.evaluation(n=500, every=50)
  c.log_every, c.save_every = 1, 50
  c.lock()
  return c
