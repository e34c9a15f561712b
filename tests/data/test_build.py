import errno
import json
import operator
import os

import pytest

from pixelis_jax.data import build, manifest, shards
from pixelis_jax.data.built import Dataset
from tests.data.datasets import fields, made, write


def files(folder):
  """Every file by its path. What a person typed and what was found are not of the data."""
  there = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  there.pop("report.json", None)
  about = json.loads(there.pop("manifest.json"))
  return there | {"about": {k: v for k, v in about.items() if k != "command"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(manifest, folder) of a dataset that this process made in one go."""
  folder = tmp_path_factory.mktemp("whole")
  m = manifest.read(write(folder))
  made(m, folder / "few")
  return m, folder / "few"


def test_what_is_built_is_what_was_asked(whole):
  m, out = whole
  dataset = Dataset.open(out)
  about = dataset.about
  assert about["manifest"] == m.fields and about["records"] == len(dataset) == 6
  assert about["kinds"] == {k: {"records": 3, "share": 0.5} for k in ("framed", "parity")}
  assert about["sorts"] == {s: {"records": 3, "share": 0.5} for s in ("golden", "corrected")}
  assert about["yield"]["framed"] == {"tried": 3, "made": 3, "share": 1.0, "reasons": {}}
  assert about["command"] == "built by a test" and set(about["by"][0]) == {"commit", "versions"}
  looks = [turn.result for i in range(6) for turn in dataset[i].demo.turns if turn.result]
  assert {result.seconds for result in looks} == {0.0} and len(looks) == 9  # A correction has two.
  assert not (out / "parts").exists() and not list(out.rglob("*.tmp"))


def test_two_processes_make_the_same_bytes(whole, tmp_path, capsys):
  m, out = whole
  path = write(tmp_path)
  asked = [f"--manifest={path}", "--processes=2", f"--out={tmp_path / 'o'}"]
  assert build.main(asked) == 0
  assert files(tmp_path / "o") == files(out)
  printed = capsys.readouterr()
  assert "6 of 6 records decoded, 9 calls\nno problems" in printed.out
  assert "6/6" in printed.err  # The bar.
  told = json.loads((tmp_path / "o" / "manifest.json").read_text())
  assert told["command"] == " ".join(["python -m pixelis_jax.data.build", *asked])


@pytest.fixture
def made_parts(monkeypatch):
  """Counts the parts that are made; [0] may be set to the number after which it is interrupted."""
  counts, make = [None, 0], shards.make

  def counted(part):
    if counts[1] == counts[0]:
      raise KeyboardInterrupt
    counts[1] += 1
    return make(part)

  monkeypatch.setattr(shards, "make", counted)
  return counts


def test_a_killed_build_goes_on_to_the_same_bytes(whole, tmp_path, made_parts):
  m, out = whole
  folder = tmp_path / "few"
  made_parts[0] = 4
  with pytest.raises(KeyboardInterrupt):
    made(m, folder)
  with pytest.raises(ValueError, match="few is not finished: the command that builds it goes on"):
    Dataset.open(folder)
  kept = sorted(folder.glob("*.array_record-*"))
  assert len(kept) == 4
  # As if it had been killed while it wrote, and the disk had lost some of what it had written.
  (folder / f"{kept[-1].name}.tmp").write_bytes(b"half")
  kept[0].write_bytes(kept[0].read_bytes()[:-1])
  (folder / "parts" / "00001.json").unlink()
  made_parts[:] = None, 0
  made(m, folder)
  assert made_parts[1] == 4  # Two that it had not begun, the torn one and the one not noted down.
  assert files(folder) == files(out)
  made(m, folder)
  assert made_parts[1] == 4 and files(folder) == files(out)  # Finished: nothing is made again.


def test_a_build_killed_before_its_last_step_is_finished(whole, tmp_path, monkeypatch, made_parts):
  m, out = whole
  with monkeypatch.context() as patch:
    patch.setattr(build, "_describe", operator.truediv)  # TypeError: too many arguments.
    with pytest.raises(TypeError):
      made(m, tmp_path / "few")
  made_parts[0] = 6
  made(m, tmp_path / "few")
  assert files(tmp_path / "few") == files(out)


def test_another_manifest_is_refused(whole, tmp_path):
  m, out = whole
  other = manifest.read(write(tmp_path, seed=1, n=5))
  said = r"few was built with other values of \['seed', 'n'\]: {'seed': 0, 'n': 6}; name another"
  with pytest.raises(ValueError, match=said):
    made(other, out)


def test_a_folder_that_is_not_ours_is_left_alone(whole, tmp_path):
  m, _ = whole
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(ValueError, match="is not empty, and holds no dataset: name another --out"):
    made(m, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
  with pytest.raises(ValueError, match="thesis.txt is a file: name a folder"):
    made(m, tmp_path / "thesis.txt")


def test_one_build_at_a_time(whole, tmp_path, monkeypatch):
  m, _ = whole
  monkeypatch.setattr(shards, "make", lambda part: made(m, tmp_path / "few"))
  with pytest.raises(ValueError, match="another process is building .*few"):
    made(m, tmp_path / "few")


def test_a_full_disk_leaves_what_is_whole(whole, tmp_path, monkeypatch):
  m, out = whole
  folder, left = tmp_path / "few", 3

  class Full(build.ArrayRecordWriter):
    def close(self):
      nonlocal left
      left -= 1
      if left < 0:  # In array_record's own words.
        raise RuntimeError("write() failed: No space left on device; writing few")
      super().close()

  with monkeypatch.context() as patch:
    patch.setattr(build, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="record-00003-of-00006 cannot be written: .* No space"):
      made(m, folder)
  assert len(list(folder.glob("*.array_record-*"))) == 3 and not list(folder.rglob("*.tmp"))

  def full(self, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(build.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
      made(m, folder)
  made(m, folder)
  assert files(folder) == files(out)


def test_datasets_and_manifests_are_fused(whole, tmp_path):
  _, out = whole
  part = write(tmp_path, "part.json", seed=8)
  parts = [{"dataset": str(out), "share": 0.5}, {"manifest": str(part), "share": 0.5}]
  fused = {k: fields()[k] for k in ("seed", "split")} | {"name": "fused", "n": 4, "parts": parts}
  (tmp_path / "fused.json").write_text(json.dumps(fused))
  made(manifest.read(tmp_path / "fused.json"), tmp_path / "fused")
  dataset = Dataset.open(tmp_path / "fused")
  seeds = sorted(dataset[i].demo.task.id.split("-")[1] for i in range(4))
  assert seeds == ["0", "0", "8", "8"]
  assert sum(row["tried"] for row in dataset.about["yield"].values()) == 2


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--manifest=none.json"], "manifest none.json is not a file"),
    (["--validate", "--out=nowhere"], "nowhere holds no dataset: it has no manifest.json"),
  ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
  assert build.main(arguments) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--validate"], ["--manifest=m.json", "--processes=-1"]])
def test_a_command_that_says_too_little_is_refused(arguments, capsys):
  with pytest.raises(SystemExit):
    build.main(arguments)
  assert "--processes -1" in (err := capsys.readouterr().err) or "--manifest is needed" in err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(shards, "plan", interrupted)
  assert build.main([f"--manifest={write(tmp_path)}", f"--out={tmp_path / 'few'}"]) == 130
  assert "finished parts are kept, the same command goes on" in capsys.readouterr().err
