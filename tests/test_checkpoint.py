"""checkpoint.py: bit-exact, atomic, and clear about what doesn't fit."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixelis_jax.checkpoint import DIGESTS, Checkpoints


def train_state(seed=0):
  """A TrainState-like tree: every dtype a program stores."""
  rng = np.random.default_rng(seed)
  params = {
    "decoder": {"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)},
    "embed": jnp.asarray(rng.standard_normal((5, 4)), jnp.bfloat16),
  }
  tx = optax.adam(1e-3)
  grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.5, p.dtype), params)
  with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count.
    _, opt_state = tx.update(grads, tx.init(params), params)
  return {
    "step": jnp.asarray(3, jnp.int32),
    "params": params,
    "opt_state": opt_state,
    "rng": jax.random.key(seed),
    "raw_rng": jax.random.key_data(jax.random.key(seed + 1)),
  }


def bits(leaf):
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
  return str(leaf.dtype), np.asarray(leaf).tobytes()


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]


@pytest.mark.parametrize("background", [False, True])
def test_roundtrip_is_bit_exact(tmp_path, background):
  state = train_state()
  with Checkpoints(tmp_path / "c", keep=2, background=background) as checkpoints:
    checkpoints.save(3, state, {"cursor": 17, "name": "stream"})
    checkpoints.wait()
  with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
    restored, extra = checkpoints.restore(train_state(seed=1))
  assert_same(restored, state)
  assert extra == {"cursor": 17, "name": "stream"}
  # The restored key draws what the saved one draws: its implementation came back too.
  assert jax.random.bits(restored["rng"]) == jax.random.bits(state["rng"])


def test_what_happens_next_does_not_change_what_is_being_saved(tmp_path):
  """Large enough that the disk is still busy when the next step, which is donated the arrays,
  writes over them, and the data iterator moves on.
  """
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
  state = {str(k): jnp.full(2_000_000, float(k)) for k in range(1, 9)}
  like = jax.tree.map(jnp.zeros_like, state)
  with Checkpoints(tmp_path / "c", background=True) as checkpoints:
    cursor = {"files": [3]}
    checkpoints.save(1, state, {"data": cursor})
    cursor["files"][0] = 4
    jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    restored, extra = checkpoints.restore(like)
  assert extra == {"data": {"files": [3]}}
  for name, x in restored.items():
    np.testing.assert_array_equal(x, np.full(2_000_000, float(name), np.float32))


def test_what_was_saved_beside_a_state_is_read_alone(tmp_path):
  with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, train_state(), {"accuracy": step / 10})
    assert checkpoints.extra(1) == {"accuracy": 0.1}
    with pytest.raises(FileNotFoundError, match="has no step 3"):
      checkpoints.extra(3)


def test_restores_like_abstract_values(tmp_path):
  state = train_state()
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(0, state, {})
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: train_state()))
  assert_same(restored, state)


def test_nothing_saved_is_none_and_creates_nothing(tmp_path):
  with Checkpoints(tmp_path / "missing", keep=1) as checkpoints:
    assert checkpoints.latest_step() is None and checkpoints.steps() == []
    assert checkpoints.restore(train_state()) is None
    checkpoints.wait()
  assert not (tmp_path / "missing").exists()


def test_keeps_the_last_and_restores_the_latest(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 10):
      checkpoints.save(step, {"x": jnp.asarray([step], jnp.int32)}, {"step": step})
    assert checkpoints.steps() == [2, 10]
    assert checkpoints.latest_step() == 10  # Not 2: steps are numbers, not names.
    like = {"x": jnp.asarray([0], jnp.int32)}
    assert checkpoints.restore(like)[1] == {"step": 10}
    assert checkpoints.restore(like, step=2)[0]["x"].tolist() == [2]
    with pytest.raises(FileNotFoundError, match="no step 1"):
      checkpoints.restore(like, step=1)
    with pytest.raises(ValueError, match="already has step 10"):
      checkpoints.save(10, like, {})


def test_restore_keeps_the_sharding_asked_for(tmp_path):
  devices = np.array(jax.devices()[:2])
  mesh = jax.sharding.Mesh(devices, ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(0, {"x": jnp.arange(4, dtype=jnp.int32)}, {})
    like = {"x": jax.ShapeDtypeStruct((4,), jnp.int32, sharding=sharding)}
    restored, _ = checkpoints.restore(like)
  assert restored["x"].sharding == sharding
  assert restored["x"].tolist() == [0, 1, 2, 3]


def test_what_does_not_fit_is_named(tmp_path):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    saved = {"a": jnp.zeros((2,), jnp.float32), "b": jnp.zeros((3,), jnp.float32)}
    checkpoints.save(0, saved | {"c": jnp.zeros((1,), jnp.float32)}, {})
    wanted = {"a": jnp.zeros((4,), jnp.float32), "b": jnp.zeros((3,), jnp.bfloat16)}
    with pytest.raises(ValueError) as caught:
      checkpoints.restore(wanted | {"d": jnp.zeros((1,), jnp.float32)})
  message = str(caught.value)
  assert "['d'] is not in the checkpoint" in message
  assert "['c'] is only in the checkpoint" in message
  assert "['a'] is [[2], 'float32'] in the checkpoint, [[4], 'float32'] is wanted" in message
  assert "['b'] is [[3], 'float32'] in the checkpoint, [[3], 'bfloat16'] is wanted" in message


def test_a_part_is_restored_without_the_rest(tmp_path):
  """Under keys as under fields; the first place that is there counts; moments are not read."""
  state = train_state()
  with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
    checkpoints.save(3, state, {})
  like = jax.tree.map(jnp.zeros_like, state["params"])
  with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
    for places in ([("params",)], [("average",), ("params", "policy"), ("params",)]):
      assert_same(checkpoints.restore_part(places, like, step=3), state["params"])
    inner = checkpoints.restore_part([("params", "decoder")], like["decoder"], step=3)
    assert_same(inner, state["params"]["decoder"])
    with pytest.raises(ValueError, match=r"step 3 has none of \['average', 'a/b'\]"):
      checkpoints.restore_part([("average",), ("a", "b")], like, step=3)
    with pytest.raises(
      ValueError, match=r"params does not fit: head/embed is not in .*; embed is only"
    ):
      checkpoints.restore_part(
        [("params",)], {"decoder": like["decoder"], "head": {"embed": like["embed"]}}, step=3
      )
    with pytest.raises(FileNotFoundError, match="has no step 4"):
      checkpoints.restore_part([("params",)], like, step=4)


def test_a_reader_leaves_what_is_being_saved(tmp_path):
  with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, train_state(), {})
    half = tmp_path / "c" / "3.orbax-checkpoint-tmp"
    half.mkdir()
    with Checkpoints(tmp_path / "c", read_only=True) as reader:
      assert reader.latest_step() == 2
      reader.restore(train_state(), step=1)
    assert half.is_dir() and sorted(p.name for p in (tmp_path / "c").iterdir()) == [
      "1",
      "2",
      half.name,
    ]


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match="keep 0 must be at least 1"):
    Checkpoints(tmp_path, keep=0)


KILLED = textwrap.dedent("""
  import os, signal, sys
  import jax.numpy as jnp
  from pixelis_jax.checkpoint import Checkpoints
  checkpoints = Checkpoints(sys.argv[1], keep=3)
  checkpoints.save(1, {"x": jnp.ones((4,), jnp.float32)}, {"step": 1})
  rename = os.rename
  def die(source, *a, **k):  # Everything is written, only the commit is missing.
    if "tmp" in os.path.basename(str(source)):
      os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, *a, **k)
  os.rename = os.replace = die
  checkpoints.save(2, {"x": jnp.zeros((4,), jnp.float32)}, {"step": 2})
""")


def test_killed_while_saving_leaves_the_earlier_one(tmp_path):
  killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ)
  assert killed.returncode == -signal.SIGKILL
  assert any("tmp" in p.name for p in tmp_path.iterdir())  # It did die between writing and commit.
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.latest_step() == 1
    restored, extra = checkpoints.restore({"x": jnp.zeros((4,), jnp.float32)})
    assert restored["x"].tolist() == [1, 1, 1, 1]
    assert extra == {"step": 1}
    checkpoints.save(2, {"x": jnp.zeros((4,), jnp.float32)}, {"step": 2})
    assert checkpoints.latest_step() == 2
  assert not any("tmp" in p.name for p in tmp_path.iterdir())


def damage(directory, step, signature=False):
  """One byte of a step's largest file, or of that which holds the digests of all others."""
  files = [f for f in (directory / str(step)).rglob("*") if f.is_file()]
  files = [f for f in files if (f.name == DIGESTS) is signature]
  largest = max(files, key=lambda f: f.stat().st_size)
  raw = bytearray(largest.read_bytes())
  raw[len(raw) // 2] ^= 0xFF
  largest.write_bytes(bytes(raw))
  return largest.relative_to(directory / str(step)).as_posix()


@pytest.mark.parametrize("background, signature", [(False, False), (True, False), (True, True)])
def test_a_damaged_step_is_passed_over(tmp_path, caplog, background, signature):
  """Orbax alone would return other numbers, or none; the step before serves, and saving goes on."""
  directory = tmp_path / "c"
  with Checkpoints(directory, keep=3, background=background) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, train_state(seed=step), {"step": step})
  name = damage(directory, 2, signature)
  with Checkpoints(directory, keep=3) as checkpoints:
    with pytest.raises(ValueError, match=f"2 is damaged: {name} is not what was written"):
      checkpoints.restore(train_state(), step=2)
    restored, extra = checkpoints.restore(train_state())
    assert extra == {"step": 1}
    assert_same(restored, train_state(seed=1))
    assert f"{name} is not what was written; moved to {tmp_path / 'damaged' / '2'}" in caplog.text
    checkpoints.save(2, train_state(seed=5), {"step": 2})
  with Checkpoints(directory, read_only=True) as checkpoints:
    assert_same(checkpoints.restore(train_state())[0], train_state(seed=5))


def test_a_reader_moves_nothing_and_says_what_is_wrong(tmp_path):
  directory = tmp_path / "c"
  with Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(1, train_state(), {})
  lost = next(f for f in (directory / "1").rglob("*") if f.is_file() and f.name != "digests.json")
  lost.unlink()
  with (
    Checkpoints(directory, read_only=True) as checkpoints,
    pytest.raises(ValueError, match=f"1 is damaged: .*{lost.name} is missing"),
  ):
    checkpoints.restore(train_state())
  with (
    Checkpoints(directory) as checkpoints,
    pytest.raises(ValueError, match="is missing; there is no earlier checkpoint"),
  ):
    checkpoints.restore(train_state())
  assert (tmp_path / "damaged" / "1").is_dir()


def test_restored_onto_another_mesh(tmp_path):
  """Saved by 4 x 2 devices, read by 2 x 4 and by one."""

  def placed(x, *shape):
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("a", "b"))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))

  x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(0, {"x": placed(x, 4, 2)}, {})
    for shape in ((2, 4), (1, 1)):
      restored, _ = checkpoints.restore({"x": placed(jnp.zeros_like(x), *shape)})
      np.testing.assert_array_equal(restored["x"], x)
      assert restored["x"].sharding.mesh.devices.shape == shape
