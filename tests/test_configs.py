"""Every config builds, is locked, refuses typos and unknown arguments, and says how to run it."""

import importlib
import inspect
import re
from pathlib import Path

import ml_collections
import pytest

from configs import common
from pixelis_jax.model.load import load_config

ROOT = Path(__file__).parents[1]
# A file without `get_config` holds parts that several configs share.
NAMES = sorted(
  p.stem for p in (ROOT / "configs").glob("*.py") if "def get_config(" in p.read_text()
)
LEAVES = (bool, int, float, str, type(None))


def load(name: str):
  return importlib.import_module(f"configs.{name}")


def leaves(value):
  """Every plain value in a config, through its dicts and sequences."""
  if isinstance(value, ml_collections.ConfigDict):
    for key in value:
      yield from leaves(value[key])
  elif isinstance(value, list | tuple):
    for item in value:
      yield from leaves(item)
  else:
    yield value


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_is_plain_data(name):
  config = load(name).get_config()
  assert isinstance(config, ml_collections.ConfigDict)
  odd = [value for value in leaves(config) if not isinstance(value, LEAVES)]
  assert not odd, f"configs/{name}.py holds {odd}: only numbers, text, None and their sequences"


@pytest.mark.parametrize("name", NAMES)
def test_config_is_locked_and_names_the_nearest_key(name):
  config = load(name).get_config()
  assert config.is_locked
  key = sorted(config)[0]
  with pytest.raises(AttributeError, match=f'Did you mean "{key}"'):
    setattr(config, key + "x", 1)


@pytest.mark.parametrize("name", NAMES)
def test_config_refuses_an_unknown_argument(name):
  get_config = load(name).get_config
  (argument,) = inspect.signature(get_config).parameters.values()
  assert argument.default is not inspect.Parameter.empty, "the argument has a default"
  with pytest.raises(ValueError, match="no-such-argument"):
    get_config("no-such-argument")


@pytest.mark.parametrize(
  ("name", "option"), [(n, o) for n in NAMES for o in getattr(load(n), "OPTIONS", ())]
)
def test_every_option_of_a_config_has_its_fields(name, option):
  """An option changes values; it neither adds fields nor takes any away."""
  config, usual = load(name).get_config(option), load(name).get_config()
  assert nested(config.to_dict()) == nested(usual.to_dict()) and config.is_locked


def nested(value: dict) -> dict:
  """The keys of a config, and those in them, without values."""
  return {k: nested(v) if isinstance(v, dict) else None for k, v in value.items()}


@pytest.mark.parametrize("name", NAMES)
def test_config_says_how_to_run_it(name):
  assert f"--config=configs/{name}.py" in inspect.getdoc(load(name))


@pytest.mark.parametrize("name", ["Makefile", "README.md", "BUILD.md"])
def test_named_configs_exist(name):
  named = re.findall(r"--config=configs/(\w+)\.py", (ROOT / name).read_text())
  assert set(named) <= set(NAMES), f"{name} names configs that do not exist"


@pytest.mark.parametrize("size", common.SIZES)
def test_a_released_models_heads_are_split_over_one_host(size):
  """Which must be of one process: a host of a TPU slice has 4 devices, one with GPUs mostly 8."""
  c = load("rft").get_config(size)
  heads = load_config(ROOT / c.model.path).text.kv_heads
  assert 4 % c.rollout_mesh.tensor == heads % c.rollout_mesh.tensor == 0
