"""The four-arm ablation of the embedded model: is it right, and are its tools why?

    python -m pixelis_jax.evaluate --config=configs/evaluate.py --workdir=runs/evaluate

The argument is a shift of the digit scenes, none by default; or "tools" for all kinds of questions,
with every tool; or "own" for a model and questions of your own (--config.model.path,
--config.eval.file), "text" for such that have no images.
"""

from ml_collections import ConfigDict

from configs import common

OWN = ("own", "text")
SHIFTS = ("rotate", "dim", "invert", "noise", "blur", "writers", "static")
OPTIONS = ("", "debug", "tools", *OWN, *SHIFTS)


def get_config(arg: str = "") -> ConfigDict:
  if arg not in OPTIONS:
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}")
  c = ConfigDict()
  c.model = common.model()
  c.limits = common.limits()
  c.eval = common.questions(shift=arg if arg in SHIFTS else "none", n=1000, seed=5000)
  if arg == "debug":
    c.eval.n = 4
  if arg == "tools":
    common.all_tools(c, c.eval)
  if arg in OWN:
    common.own(c, tools=arg == "own")
  c.lock()
  return c
