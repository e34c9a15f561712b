"""The benchmark measures both sides, and leaves out what would not fit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import bench
from kernels.attention import attention


def test_a_table_of_both_sides(tmp_path, capsys):
  out = tmp_path / "bench.json"
  assert bench.main(["--specs", "tiny", "--repeats", "1", "--out", str(out)]) == 0
  told, found = capsys.readouterr().out, json.loads(out.read_text())
  assert len(told.splitlines()) == 2 + 5 and found["product"] > 0
  both = ("forward", "backward")
  passes = {"attention": both, "token_logps": both, "decode_attention": ("forward",)}
  assert [(r["op"], r["direction"]) for r in found["rows"]] == [
    (op, direction) for op in bench.OPS for direction in passes[op]
  ]
  for row in found["rows"]:
    assert set(row["seconds"]) == {"op", "reference"} and min(row["seconds"].values()) > 0
    assert row["roofline"] > 0
    # The keys of a few short rows lie in the cache, which is faster than the copy that bounds them.
    assert row["roofline"] < 1.5 or row["op"] == "decode_attention"


def test_a_reference_that_does_not_fit_is_not_run(capsys, monkeypatch):
  monkeypatch.setattr(bench, "machine", lambda repeats: (1.0, 1.0))
  arguments = ["--specs", "tiny", "--repeats", "1", "--most", "0", "--ops", "token_logps"]
  assert bench.main(arguments) == 0
  lines = capsys.readouterr().out.splitlines()[2:]
  assert len(lines) == 2 and all("reference: too large" in line for line in lines)


@pytest.mark.parametrize("causal", [True, False])
def test_splash_stands_beside_ours_with_the_same_result(causal):
  """Of two key heads with two query heads each: mixed up, or without segments, all would differ."""
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.standard_normal((2, 128, heads, 128)), jnp.float32)
  q, k, v = draw(4), draw(2), draw(2)
  at = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 0, 0]], 32, axis=1), jnp.int32)
  found = bench.splash_attention(q, k, v, at, at, causal=causal, interpret=True)
  ours = attention(q, k, v, causal=causal, q_segments=at, kv_segments=at, backend="reference")
  # Float32 products in another order.
  np.testing.assert_allclose(found[at > 0], ours[at > 0], atol=1e-5)


def test_no_such_spec(capsys):
  with pytest.raises(SystemExit):
    bench.main(["--specs", "none", "--repeats", "1"])
  assert "has a spec of ['none']" in capsys.readouterr().err
