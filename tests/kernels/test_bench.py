"""The benchmark measures both sides, and leaves out what would not fit."""

import json

import pytest

from kernels import bench


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


def test_no_such_spec(capsys):
  with pytest.raises(SystemExit):
    bench.main(["--specs", "none", "--repeats", "1"])
  assert "has a spec of ['none']" in capsys.readouterr().err
