"""SFT of a model of your own on solved questions (data/questions.py) or a dataset (data/build.py).

    python -m pixelis_jax.sft --config=configs/sft.py --workdir=runs/sft --config.model.path=DIR \
      --config.data.file=train.jsonl --config.eval.file=held_out.jsonl

"text" for a model that only reads, "lora" and "text-lora" to train adapters only. The name of a
released model ("qwen2_5_vl_7b", and with "-lora" behind it) sets bfloat16, remat and a mesh over
all devices; until `model.path` names its weights it can only be planned (`pixelis plan`). BUILD.md
has the times of a 7B model with adapters on one GPU.
"""

from ml_collections import ConfigDict

from configs import common, tiny_sft

OPTIONS = common.TRAINED


def get_config(arg: str = "") -> ConfigDict:
  c = tiny_sft.get_config().unlock()
  common.own_training(c, arg, lr=1e-5, lora_lr=1e-4, steps=1000)
  c.data.file, c.data.made, c.data.kept, c.data.toured = "", 0.0, 0, ()
  c.see_steps, c.data.scenes, c.data.parts, c.data.direct = 0, 0, 0, 0.0
  c.aim_weight, c.sight_weight, c.batch = 0.0, 0.0, 32
  c.eval = common.evaluation(n=500, every=200)
  c.log_every, c.save_every = 10, 100
  c.lock()
  return c
