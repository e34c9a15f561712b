"""A run's directory: the config it was started with, and the policy in its checkpoints."""

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pixelis_jax import sampler
from pixelis_jax.checkpoint import BEST, FOLDER, Checkpoints
from pixelis_jax.cluster import first
from pixelis_jax.model import lora, trainable

CONFIG = "config.json"
# Where a checkpoint holds the policy: what online publishes, sft's beside its heads, rft's, and the
# latter beside a forward model.
_PLACES = (("average",), ("params", "policy"), ("params",), ("policy", "params"))


def keep_config(workdir: Path, c: Any, *, same: bool = False) -> None:
  """Writes config.json whole: who reads it never finds half of one.

  With `same` a workdir belongs to one config; ValueError says what differs. Whether W&B is told
  may: nothing that is computed depends on it.
  """
  path, now = workdir / CONFIG, json.loads(c.to_json())
  if same and path.exists():
    before = json.loads(path.read_text())
    fields = (before.keys() | now.keys()) - {"wandb"}
    differs = sorted(k for k in fields if before.get(k) != now.get(k))
    if differs:
      was = {k: before.get(k) for k in differs}
      raise ValueError(
        f"{path} was written with other values of {differs}: {was}; use a new workdir"
      )
  if not first():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  aside = path.with_suffix(".tmp")
  aside.write_text(json.dumps(now, indent=2))
  aside.replace(path)


def save_checkpoint(
  workdir: Path, out: Path, *, step: int | None = None, best: bool = False
) -> int:
  """`out`/model, and `out`/adapter where adapters are trained, from a run of sft, rft or online.

  Args:
    step: Of the checkpoint; None for the latest.
    best: The one that answered most held-out questions, of a run of sft or rft.

  Returns:
    The step that was saved.

  Raises:
    FileNotFoundError: the run has no config.json, no checkpoint, or none of this step.
    ValueError: the checkpoint does not fit the config's model; all weights that don't are named.
  """
  if not (workdir / CONFIG).is_file():
    raise FileNotFoundError(f"{workdir} is no run of sft, rft or online: it has no {CONFIG}")
  c = ConfigDict(json.loads((workdir / CONFIG).read_text())).model
  policy = sampler.load_policy(c, adapters=jax.random.key(0))
  like, base = trainable.parts(policy.model, policy.params, c.freeze)
  folder = workdir / (BEST if best else FOLDER)
  with Checkpoints(folder, read_only=True) as checkpoints:
    step = checkpoints.latest_step() if step is None else step
    if step is None:
      raise FileNotFoundError(f"{folder} has no checkpoint yet")
    trained = checkpoints.restore_part(_PLACES, like, step=step)
  sampler.save_policy(out, policy.settings, policy.model, lora.join(trained, base))
  return step
