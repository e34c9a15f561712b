"""The four-arm ablation of the embedded model: is it right, and are its tools why?

    python -m pixelis_jax.evaluate --config=configs/evaluate.py --workdir=runs/evaluate

The argument is a shift of the digit scenes; none by default.
"""

from ml_collections import ConfigDict

from configs import common

OPTIONS = ("", "debug", "rotate", "dim", "invert", "noise", "blur", "static")


def get_config(arg: str = "") -> ConfigDict:
  if arg not in OPTIONS:
    raise ValueError(f"config argument {arg!r} must be one of {OPTIONS}")
  c = ConfigDict()
  c.model = common.model()
  c.limits = common.limits()
  c.eval = common.evaluation(shift="none" if arg in ("", "debug") else arg, n=1000, seed=5000)
  if arg == "debug":
    c.eval.n = 4
  c.lock()
  return c
