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
    try:
      config.value.is_locked  # noqa: B018 - a config that was not found says so when it is used.
    except OSError as e:
      raise SystemExit(str(e)) from None
    main(config.value, Path(workdir.value))

  app.run(start, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  """absl's own parser; what it and ml_collections find wrong is said without a traceback."""
  try:
    return flags.FLAGS(arguments)
  except (KeyError, AttributeError) as e:  # ml_collections quotes the message it passes on.
    field = str(e).replace("\\n", "\n").replace("\\'", "'").strip("\"'").replace("'\n", "\n")
    raise SystemExit(f"unknown config field {field}") from None
  except flags.Error as e:
    first, *others = str(e).strip().splitlines()
    reason = f" {others[-1]}" if "Traceback" in str(e) else "".join(f"\n{line}" for line in others)
    raise SystemExit(f"{first}{reason}\n--help lists the flags.") from None
