"""How sft, rft, online and evaluate are started: a config file, a workdir, nothing else."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from pixelis_jax import cluster


def launch(main: Callable[[Any, Path], object]) -> None:
  """Runs main(config, workdir) with `--config=FILE[:arg]`, `--config.a.b=value`, `--workdir=DIR`.

  With `--distributed` the process is one of several that find each other (TPU pods, Slurm,
  Kubernetes); where nothing says so, `--coordinator=HOST:PORT --processes=N --process=I` do.
  Never returns: absl ends the process when main has.
  """
  config = config_flags.DEFINE_config_file("config", lock_config=True)
  workdir = flags.DEFINE_string("workdir", None, "All that the run leaves.", required=True)

  distributed = flags.DEFINE_bool("distributed", False, "One of several processes of this run.")
  coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT, at process 0.")
  processes = flags.DEFINE_integer("processes", None, "How many there are.")
  process = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")

  def start(_: list[str]) -> None:
    if distributed.value or coordinator.value:
      cluster.join(coordinator.value, processes.value, process.value)
    try:
      config.value.is_locked  # noqa: B018 - a config that was not found says so when it is used.
    except OSError as e:
      raise SystemExit(str(e)) from None
    main(config.value, Path(workdir.value))

  app.run(start, flags_parser=_parse)


class Preemption:
  """Whether a SIGTERM came: the host is about to be taken away. To be entered by the main thread.

  A program that sees it at the end of a step saves and returns: it exits with 0, and the same
  command goes on from there. Where there are several processes, what one was told all are.
  """

  def __init__(self):
    self._told = False
    self._before: Any = None

  def __enter__(self) -> "Preemption":
    self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *exc) -> None:
    signal.signal(signal.SIGTERM, self._before)

  def asked(self) -> bool:
    """To be asked once a step."""
    return any(cluster.agree(int(self._told)))

  def _ask(self, *_: object) -> None:
    self._told = True


def say(text: str) -> None:
  """Prints it, once for all processes."""
  if cluster.first():
    print(text, flush=True)


def read(arguments: Sequence[str]) -> Any:
  """The config of `--config=FILE[:arg] --config.a.b=value ...` for a command that is no program.

  What is wrong with it is said as `launch` does.
  """
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values, sys_argv=["pixelis", *arguments]
  )
  _parse(["pixelis", *arguments], values)
  try:
    return config.value.copy_and_resolve_references()
  except OSError as e:
    raise SystemExit(str(e)) from None


def _parse(arguments: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """absl's own parser; what it and ml_collections find wrong is said without a traceback."""
  try:
    return values(arguments)
  except (KeyError, AttributeError) as e:  # ml_collections quotes the message it passes on.
    field = str(e).replace("\\n", "\n").replace("\\'", "'").strip("\"'").replace("'\n", "\n")
    raise SystemExit(f"unknown config field {field}") from None
  except flags.Error as e:
    first, *others = str(e).strip().splitlines()
    reason = f" {others[-1]}" if "Traceback" in str(e) else "".join(f"\n{line}" for line in others)
    raise SystemExit(f"{first}{reason}\n--help lists the flags.") from None
