import dataclasses
import json
import shutil

import pytest

from pixelis_jax.data import build, validate
from pixelis_jax.data.built import Dataset, records_of
from tests.data.datasets import built


def checked(folder, against=()):
  names = records_of(Dataset.open(folder).about)
  found = [one for name in names for one in validate.examine(folder / name)]
  return validate.report(folder, found, against)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return built(tmp_path_factory.mktemp("validated"), n=4).folder


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def test_a_good_dataset_has_no_problems(folder):
  report = checked(folder)
  assert report["problems"] == [] and (report["records"], report["decoded"]) == (4, 4)
  assert report["calls"] == 6 and report["duplicates"] == 0  # Two golden, two corrected.
  framed = report["kinds"]["framed"]
  assert framed.items() >= {"records": 2, "share": 0.5, "asked": 0.5, "yield": 1.0}.items()
  assert report["sorts"]["golden"] == {"records": 2, "share": 0.5, "asked": 0.5}
  assert json.loads(json.dumps(report)) == report
  table = validate.table(report).splitlines()
  assert table[0].split() == ["records", "share", "asked", "yield", "answers", "commonest"]
  assert table[1].split()[:5] == ["framed", "2", "50.0%", "50.0%", "100.0%"]
  assert table[-1] == "no problems"


def test_corruption_is_found(copy):
  first, other, *_ = records_of(Dataset.open(copy).about)
  data = bytearray((copy / first).read_bytes())
  data[1000] ^= 1
  (copy / first).write_bytes(data)
  report = checked(copy)
  assert report["decoded"] == 3
  changed, broken = report["problems"]
  assert changed == f"1 files are not as they were built: {first}"
  assert broken.startswith("1 records cannot be decoded: record 0: ") and "hash mismatch" in broken
  # A byte of the padding behind the records: all of them can be decoded.
  data = bytearray((copy / other).read_bytes())
  data[-1] ^= 1
  (copy / other).write_bytes(data)
  assert f"2 files are not as they were built: {first}; {other}" in checked(copy)["problems"]


def test_lost_pictures_are_found(copy):
  lost = min((copy / "images").iterdir())
  lost.unlink()
  (problem,) = checked(copy)["problems"]
  assert "another line or no picture" in problem and lost.name in problem


def test_leaks_are_found_across_datasets(folder, tmp_path):
  other = built(tmp_path, n=1, seed=1, split="dev").folder
  report = checked(other, [folder])
  assert report["leaks"] == {str(folder): 0} and not report["problems"]
  itself = checked(folder, [folder])
  assert itself["leaks"] == {str(folder): 4}
  assert f"4 records show what {folder} shows" in itself["problems"][0]


def test_duplicates_are_found(folder):
  names = records_of(Dataset.open(folder).about)
  seen = [one for name in names for one in validate.examine(folder / name)]
  report = validate.report(folder, [*seen[:3], seen[0]], [])
  assert report["duplicates"] == 1
  assert any(f"{seen[0].id} (record 3) is {seen[0].id} (record 0)" in p for p in report["problems"])


def test_what_deserves_a_look_is_remarked_on(folder):
  (first, *_) = validate.examine(folder / records_of(Dataset.open(folder).about)[0])
  assert first.taught
  answers = ["a"] * 8 + ["b", "c", "d", "e"]
  seen = [
    dataclasses.replace(first, kind="framed", key=str(i), answer=a) for i, a in enumerate(answers)
  ]
  seen[-1] = dataclasses.replace(seen[-1], taught=False)
  # 8 of 12 is 3.3 times an even fifth.
  idle, remark = validate.report(folder, seen, [])["remarks"]
  assert idle == "1 records have no supervised turn: SFT does not sample them"
  assert remark == "66.7% of the answers of kind 'framed' are the same: even would be 20.0%"


def test_parts_that_other_code_made_are_remarked_on(copy):
  about = json.loads((copy / "manifest.json").read_text())
  about["by"].append({"commit": "abc", "versions": {}})
  (copy / "manifest.json").write_text(json.dumps(about))
  (remark,) = checked(copy)["remarks"]
  assert remark.startswith("2 versions of the code made its parts: commits ") and "abc" in remark


@pytest.fixture
def record(folder):
  """Of a corrected demonstration: a wrong look, a right one and an answer."""
  dataset = Dataset.open(folder)
  return next(r for r in (dataset[i] for i in range(4)) if r.sort == "corrected")


def changed(record, number, **changes):
  turns = [*record.demo.turns]
  turns[number] = dataclasses.replace(turns[number], **changes)
  demo = dataclasses.replace(record.demo, turns=tuple(turns))
  return dataclasses.replace(record, demo=demo)


def test_a_good_record_has_no_faults(record):
  assert validate.faults(record) == []


@pytest.mark.parametrize(
  "number, changes, fault",
  [
    (1, {"text": "<tool_call>{"}, "turn 1: its call cannot be read: <tool_call> is not closed"),
    (1, {"text": "I see"}, "turn 1: it calls no tool, or has no result"),
    (
      1,
      {"text": '<tool_call>{"name": "zoom_out", "arguments": {}}</tool_call>'},
      "turn 1: there is no tool 'zoom_out'",
    ),
    (2, {"text": r"\boxed{no digit}"}, "a corrected demonstration answers 'no digit', where"),
    (0, {"supervised": True}, "of a corrected demonstration the turns +++ are supervised"),
    (2, {"supervised": False}, "of a corrected demonstration the turns -+- are supervised"),
  ],
)
def test_faults_are_named(record, number, changes, fault):
  (found,) = validate.faults(changed(record, number, **changes))
  assert found.startswith(fault)


def test_what_is_wrong_is_never_supervised(record):
  failed = dataclasses.replace(record.demo.turns[1].result, error="out of range", images=())
  (found,) = validate.faults(changed(record, 1, result=failed))
  assert found == "turn 1: it is supervised, and its call fails: out of range"
  (found,) = validate.faults(dataclasses.replace(record, sort="golden"))
  assert found == "of a golden demonstration the turns -++ are supervised"


def test_nothing_of_a_trap_is_supervised_from_its_error_on(record):
  wrong = changed(record, 2, text=r"\boxed{no digit}", supervised=False)
  trap = dataclasses.replace(changed(wrong, 1, supervised=False), sort="trap")
  assert validate.faults(trap) == []
  assert validate.faults(changed(trap, 0, supervised=True)) == []  # Wrong from the second look on.
  (found,) = validate.faults(changed(trap, 1, supervised=True))
  assert found == "of a trap demonstration the turns -+- are supervised"
  answer = record.demo.task.answer
  (found,) = validate.faults(changed(trap, 2, text=rf"\boxed{{{answer}}}"))
  assert found == f"a trap demonstration answers '{answer}', where '{answer}' is right"


def test_the_report_is_written(copy):
  report = build.check(copy, [], workers=None)
  assert json.loads((copy / "report.json").read_text()) == report
