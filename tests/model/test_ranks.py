"""Ranks from planted deltas: spectra, the rules in their order, and two whole checkpoints."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pixelis_jax.model import ranks
from pixelis_jax.model.load import INDEX, WEIGHTS
from tests.model import oracle

# The tiny model: 2 layers, width 64, 4 heads of 16 to 2, MLP 80. [out, in] in the files.
NAMES = {
  "attn/q": ("self_attn.q_proj", (64, 64)),
  "attn/k": ("self_attn.k_proj", (32, 64)),
  "attn/v": ("self_attn.v_proj", (32, 64)),
  "attn/o": ("self_attn.o_proj", (64, 64)),
  "mlp/gate": ("mlp.gate_proj", (80, 64)),
  "mlp/up": ("mlp.up_proj", (80, 64)),
  "mlp/down": ("mlp.down_proj", (64, 80)),
}
EXACT = ranks.Settings(energy=0.9, min=1, max=128, smooth=0.0)  # What each matrix needs, no more.


def theirs(module: str, layer: int) -> str:
  return f"model.layers.{layer}.{NAMES[module][0]}.weight"


def ours(module: str) -> str:
  return f"text/layers/{module}/kernel"


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def planted(shape: tuple[int, int], singular, seed: int = 0) -> np.ndarray:
  """A matrix with these singular values, float64."""
  k = len(singular)
  left, right = orthonormal(shape[0], k, seed), orthonormal(shape[1], k, seed + 1)
  return (left * np.asarray(singular)) @ right.T


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("base") / "base"
  oracle.hf_model(tied=True).save_pretrained(path)
  return path


def moved(base: Path, out: Path, change) -> Path:
  """A copy of `base` whose tensors went through `change(name, tensor)`; None leaves one out."""
  shutil.copytree(base, out)
  tensors = {k: change(k, v) for k, v in load_file(base / WEIGHTS).items()}
  kept = {k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}
  save_file(kept, out / WEIGHTS, metadata={"format": "pt"})
  return out


def plus(deltas: dict):
  return lambda name, w: (w + deltas[name]).astype(w.dtype) if name in deltas else w


# the mathematics


@pytest.mark.parametrize("shape", [(20, 2100), (2100, 20), (20, 20)])
def test_spectrum_of_a_planted_delta(shape):
  """2100 is more than two blocks: a block left out would lower every value."""
  singular = [5.0, 3.0, 1.0, 0.1]
  start = np.random.default_rng(9).normal(size=shape)
  got = ranks.spectrum(start, start + planted(shape, singular))
  expected = np.zeros(20)
  expected[:4] = np.square(singular)
  # 1e-16 of each number, over the matrix; squares below 1e-13 are not resolved, and need not be.
  np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_needed_rank_by_hand():
  squares = np.array([9.0, 4.0, 2.0, 1.0])  # Shares of 16: 0.5625, 0.8125, 0.9375, 1.
  wanted = {0.5: 1, 0.5625: 1, 0.57: 2, 0.9: 3, 0.95: 4, 1.0: 4}
  assert {energy: ranks.needed_rank(squares, energy) for energy in wanted} == wanted
  assert ranks.needed_rank(np.zeros(4), 0.9) == 0


def test_the_total_is_the_whole_norm():
  """45 and 55 ones are 100: 0.9 needs 46. Of the ten largest alone (54) it would need 5."""
  assert ranks.needed_rank(np.array([45.0] + [1.0] * 55), 0.9) == 46


def test_retained():
  squares = np.array([9.0, 4.0, 2.0, 1.0])
  assert [ranks.retained(squares, r) for r in (0, 1, 3, 9)] == [0, 0.5625, 0.9375, 1]
  assert ranks.retained(np.zeros(4), 0) == 1


@pytest.mark.parametrize(
  "needed, limits, largest, expected",
  [
    ([1, 4, 5, 200], (4, 128), 512, [4, 4, 5, 128]),
    # log2: 17 4.09, 22 4.46, 23 4.52, 90 6.49, 91 6.51. 16 and below stay as they are.
    ([15, 16, 17, 22, 23, 90, 91], (4, 128), 512, [15, 16, 16, 16, 32, 64, 128]),
    ([91], (4, 100), 512, [100]),  # 128 would be above max.
    ([30], (30, 100), 512, [32]),
    ([20], (20, 100), 512, [20]),  # 16 would be below min.
    ([200, 1], (4, 128), 24, [24, 4]),  # The matrix has 24 directions.
    ([1, 2], (4, 128), 2, [2, 2]),
    ([0, 3], (4, 128), 512, [0, 4]),  # No change, no adapter.
    ([0, 0], (4, 128), 512, [0, 0]),
  ],
)
def test_clip_and_powers_of_two(needed, limits, largest, expected):
  settings = ranks.Settings(energy=0.9, min=limits[0], max=limits[1], smooth=0.0)
  assert ranks.assign(needed, settings, largest=largest) == expected


def test_smoothing_by_hand():
  settings = ranks.Settings(energy=0.9, min=4, max=128, smooth=0.8)
  # Mean of 4, 8 and 32 is 44 / 3, 0.8 of it 11.73; and 0.8, 1.6, 6.4: 12.53, 13.33, 18.13.
  # With the unchanged layer in the mean it would be 10, 10, 15.
  assert ranks.assign([4, 8, 32, 0], settings, largest=512) == [13, 13, 18, 0]


def test_powers_of_two_come_before_smoothing():
  settings = ranks.Settings(energy=0.9, min=4, max=128, smooth=0.5)
  # 20 -> 16 and 40 -> 32, mean 24: 12 + 8 and 12 + 16. Smoothed first: 25 and 35, both then 32.
  assert ranks.assign([20, 40], settings, largest=512) == [20, 28]


@pytest.mark.parametrize(
  "field, value, said",
  [
    ("energy", 0.0, r"energy 0.0 must be in \(0, 1\]"),
    ("energy", 90.0, "energy 90.0 must be in"),
    ("min", 0, "min 0 and max 128 must satisfy 1 <= min <= max"),
    ("max", 3, "min 4 and max 3 must satisfy"),
    ("smooth", 1.5, r"smooth 1.5 must be in \[0, 1\]"),
  ],
)
def test_settings_out_of_range(field, value, said):
  with pytest.raises(ValueError, match=said):
    ranks.Settings(**{"energy": 0.9, "min": 4, "max": 128, "smooth": 0.8, field: value})


# whole checkpoints


def test_planted_ranks_are_recovered_layer_by_layer(base, tmp_path):
  """Equal singular values: k - 1 of k hold at most 0.8 for k <= 5, so that 0.9 needs all k."""
  wanted = {m: [1 + i % 5, 1 + (i + 3) % 5] for i, m in enumerate(NAMES)}
  deltas = {}
  for m, layers in wanted.items():
    for layer, k in enumerate(layers):
      shape, rng = NAMES[m][1], np.random.default_rng(k)
      noise = rng.normal(0, 1e-3, shape)  # Energy at most 80 * 64 * 1e-6 = 0.005, of 1 or more.
      deltas[theirs(m, layer)] = planted(shape, [1.0] * k, seed=layer) + noise
  tuned = moved(base, tmp_path / "tuned", plus(deltas))
  planned = ranks.plan(base, tuned, EXACT)
  assert planned["ranks"] == {ours(m): layers for m, layers in wanted.items()}
  assert (planned["base"], planned["tuned"]) == ("base", "tuned")
  assert planned["settings"] == {"energy": 0.9, "min": 1, "max": 128, "smooth": 0.0}
  sides = {m: sum(shape) for m, (_, shape) in NAMES.items()}
  parameters = sum(sum(layers) * sides[m] for m, layers in wanted.items())
  assert planned["parameters"] == parameters
  # 2 layers of 2 * 64 * 64 + 2 * 32 * 64 + 3 * 80 * 64 weights.
  assert planned["share"] == parameters / (2 * (8192 + 4096 + 15360))
  for layers in planned["energy"].values():
    assert all(0.99 < share < 1 for share in layers)  # All but the noise.
  assert json.loads(json.dumps(planned)) == planned


def test_known_singular_values_give_the_rank_by_hand(base, tmp_path):
  """Squares 16, 9, 4, 1, 1, 1 sum to 32: shares 0.5, 0.78, 0.906, ...; 0.9 needs 3, 0.8 too."""
  delta = planted((64, 64), [4, 3, 2, 1, 1, 1])
  tuned = moved(base, tmp_path / "tuned", plus({theirs("attn/q", 1): delta}))
  planned = ranks.plan(base, tuned, EXACT)
  assert planned["ranks"][ours("attn/q")] == [0, 3]
  # float32 holds weight + delta to 6e-8 of it.
  np.testing.assert_allclose(planned["energy"][ours("attn/q")], [1, 29 / 32], atol=1e-5)
  smoothed = ranks.plan(base, tuned, ranks.Settings(energy=0.9, min=4, max=8, smooth=0.8))
  assert smoothed["ranks"][ours("attn/q")] == [0, 4]
  np.testing.assert_allclose(smoothed["energy"][ours("attn/q")][1], 30 / 32, atol=1e-5)


def test_shards_and_the_other_spelling_of_names_are_read(base, tmp_path):
  sharded = tmp_path / "sharded"
  oracle.hf_model(tied=True).save_pretrained(sharded, max_shard_size="60KB")
  assert (sharded / INDEX).exists()
  tuned = moved(base, tmp_path / "tuned", plus({theirs("mlp/down", 0): planted((64, 80), [1, 1])}))
  tensors = load_file(tuned / WEIGHTS)
  respelt = {k.replace("model.", "model.language_model.", 1): v for k, v in tensors.items()}
  save_file(respelt, tuned / WEIGHTS, metadata={"format": "pt"})
  assert ranks.plan(sharded, tuned, EXACT)["ranks"][ours("mlp/down")] == [2, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_other_families(family, tmp_path):
  oracle.hf_model(tied=True, family=family).save_pretrained(tmp_path / "base")
  prefix = "model.language_model" if family == "qwen3_vl" else "model"
  name = f"{prefix}.layers.1.self_attn.o_proj.weight"
  # 4 heads of 24: o is [64, 96].
  delta = {name: planted((64, 96), [1, 1, 1])}
  tuned = moved(tmp_path / "base", tmp_path / "tuned", plus(delta))
  planned = ranks.plan(tmp_path / "base", tuned, EXACT)
  assert planned["ranks"][ours("attn/o")] == [0, 3]
  assert planned["parameters"] == 3 * (64 + 96)


def low(name: str, w: np.ndarray) -> np.ndarray:
  return w.astype(ml_dtypes.bfloat16)


def test_rounding_is_no_delta(base, tmp_path):
  """An unchanged weight saved in bfloat16 has not moved, whatever the base was saved in."""
  short = moved(base, tmp_path / "short", low)
  again = moved(base, tmp_path / "again", low)
  for start in (base, short):
    planned = ranks.plan(start, again, EXACT)
    assert set(planned["ranks"]) == set(ranks.MODULES)
    assert all(layers == [0, 0] for layers in planned["ranks"].values())
    assert all(layers == [1, 1] for layers in planned["energy"].values())
    assert planned["parameters"] == planned["share"] == 0
  assert "14 of 14 matrices did not change: rank 0, no adapter" in ranks.table(planned)


def test_a_small_step_from_a_bfloat16_base_is_seen(base, tmp_path):
  """Loaded from bfloat16, trained and saved in float32: a step far below bfloat16's spacing."""
  short = moved(base, tmp_path / "short", low)
  step = planted((80, 64), [1e-4, 1e-4])  # Numbers of about 2e-6 beside weights of about 0.1.
  deltas = plus({theirs("mlp/up", 1): step})
  tuned = moved(short, tmp_path / "tuned", lambda k, w: deltas(k, w.astype(np.float32)))
  assert ranks.plan(short, tuned, EXACT)["ranks"][ours("mlp/up")] == [0, 2]


def test_all_that_cannot_be_compared_is_listed_at_once(base, tmp_path):
  def change(name, w):
    if name == theirs("attn/q", 0):
      return None
    if name == theirs("mlp/up", 1):
      return w[:-1]
    return w.astype(np.int32) if name == theirs("attn/o", 1) else w

  tuned = moved(base, tmp_path / "tuned", change)
  with pytest.raises(ValueError) as error:
    ranks.plan(base, tuned, EXACT)
  told = str(error.value)
  assert f"{theirs('attn/q', 0)} is not in {tuned}" in told
  assert f"{theirs('mlp/up', 1)} is [80, 64] in {base} and [79, 64] in {tuned}" in told
  assert f"{theirs('attn/o', 1)} in {tuned} is I32, must be one of" in told


def test_other_models_are_refused(base, tmp_path):
  oracle.hf_model(tied=True, family="qwen3").save_pretrained(tmp_path / "qwen3")
  with pytest.raises(ValueError, match="must be of one family: .*base is qwen2_5_vl, .* is qwen3"):
    ranks.plan(base, tmp_path / "qwen3", EXACT)
  oracle.hf_model(tied=False).save_pretrained(tmp_path / "deeper")
  with pytest.raises(ValueError, match="base has 2 layers, .*deeper has 3; .*k_proj.weight is"):
    ranks.plan(base, tmp_path / "deeper", EXACT)
  with pytest.raises(ValueError, match="base and tuned are both"):
    ranks.plan(base, base.parent / "base", EXACT)
  with pytest.raises(FileNotFoundError, match="config.json is missing"):
    ranks.plan(base, tmp_path / "nowhere", EXACT)


def test_numbers_that_are_not_finite_are_named(base, tmp_path):
  def change(name, w):
    return np.full_like(w, np.nan) if name == theirs("attn/v", 1) else w

  tuned = moved(base, tmp_path / "tuned", change)
  with pytest.raises(ValueError, match="layers.1.self_attn.v_proj.weight of .*not finite"):
    ranks.plan(base, tuned, EXACT)


def test_table_by_hand():
  path = ours("attn/q")
  planned = {
    "ranks": {path: [0, 4, 16]},
    "energy": {path: [1.0, 0.875, 0.9375]},
    "parameters": 2560,
    "share": 0.125,
  }
  head, row, total, unchanged = ranks.table(planned).splitlines()
  assert head.split() == ["module", "rank", "min", "median", "max", "energy", "min", "mean"]
  # (1 + 0.875 + 0.9375) / 3 = 0.9375.
  assert row.split() == ["attn/q", "0", "4", "16", "0.8750", "0.9375"]
  assert total == "2560 adapter parameters, 12.50% of these matrices"
  assert unchanged == "1 of 3 matrices did not change: rank 0, no adapter"
