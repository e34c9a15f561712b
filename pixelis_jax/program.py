"""How sft, rft, online and evaluate are started: a config file, a workdir, nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags


def launch(main: Callable[[Any, Path], object]) -> None:
  """Runs main(config, workdir) with `--config=FILE[:arg]`, `--config.a.b=value`, `--workdir=DIR`.

  Never returns: absl ends the process when main has.
  """
  config = config_flags.DEFINE_config_file("config", lock_config=True)
  workdir = flags.DEFINE_string("workdir", None, "All that the run leaves.", required=True)

  def start(_: list[str]) -> None:
    main(config.value, Path(workdir.value))

  app.run(start)
