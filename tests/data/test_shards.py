import collections
import json

import pytest

from pixelis_jax.data import manifest, shards, sources
from pixelis_jax.data.examples import decode
from pixelis_jax.tools.sight import Mistake
from tests.data.datasets import built, fields, write
from tests.memory.experiences import plain


def planned(tmp_path, **changes):
  return [r for part in shards.plan(manifest.read(write(tmp_path, **changes))) for r in part]


def test_shares_hold_in_every_stretch():
  names = shards.spread({"a": 0.6, "b": 0.2, "c": 0.2}, 100)
  assert collections.Counter(names) == {"a": 60, "b": 20, "c": 20}
  # 10 in a row have 6, 2 and 2, or one more or less where a stretch begins and ends between.
  for start in range(90):
    counts = collections.Counter(names[start : start + 10])
    assert abs(counts["a"] - 6) <= 1 and abs(counts["b"] - 2) <= 1 and abs(counts["c"] - 2) <= 1
  assert shards.spread({"a": 1.0}, 2) == ["a", "a"]


@pytest.mark.parametrize("n, parts, largest", [(3, 3, 1), (100, 16, 7), (5000, 40, 125)])
def test_parts_are_even(tmp_path, n, parts, largest):
  plan = shards.plan(manifest.read(write(tmp_path, n=n)))
  assert len(plan) == parts and sum(map(len, plan)) == n
  assert max(map(len, plan)) == largest and min(map(len, plan)) >= largest - 1


def test_shares_are_kept_and_no_item_is_in_two_records(tmp_path):
  records = planned(tmp_path, n=80)
  cells = collections.Counter((r.kind, r.sort) for r in records)
  assert cells == {(k, s): 20 for k in ("framed", "parity") for s in ("golden", "corrected")}
  assert {r.number for r in records} == set(range(80)) and {r.stride for r in records} == {80}
  kinds = [r.kind for r in records]
  assert kinds != sorted(kinds) and kinds != [r.kind for r in planned(tmp_path, n=80, seed=1)]
  assert kinds == [r.kind for r in planned(tmp_path, n=80)]


def test_a_part_is_a_function_of_its_plan(tmp_path):
  plan = shards.plan(manifest.read(write(tmp_path)))
  one, again = shards.make(plan[2]), shards.make(plan[2])
  assert plain(one) == plain(again)  # The tools' times would differ.
  assert sum(one.tried.values()) == len(one.records) == len(one.lines) == 1 and one.reasons == {}


@pytest.fixture
def unsure(monkeypatch, tmp_path):
  """Records of sort trap, of digit scenes of which each n-th alone has a demonstration."""

  def records(every):
    def opened(*settings):
      scene = sources.digit_scenes("framed", *settings)
      return lambda index, sort: "nothing found" if index % every else scene(index, "golden")

    monkeypatch.setitem(sources.KINDS, "framed", opened)
    return planned(tmp_path, n=3, kinds={"framed": 1}, sorts={"trap": 1})

  shards._source.cache_clear()
  yield records
  shards._source.cache_clear()


def test_where_there_is_no_demonstration_the_next_item_is_tried(unsure):
  made = shards.make(unsure(every=4))
  # Items 0; 1, 4; 2, 5, 8: of each record the first that 4 divides.
  assert made.tried == {"framed": 6} and made.reasons == {"framed": {"nothing found": 3}}
  told = [json.loads(line) for line in made.lines]
  assert sorted(line["request_id"].split("-")[2] for line in told) == ["0", "4", "8"]
  assert {line["weight"] for line in told} == {1.5}  # The manifest's, of traps.


def test_a_kind_that_is_never_demonstrated_is_an_error(unsure, monkeypatch):
  monkeypatch.setattr(shards, "TRIES", 5)
  with pytest.raises(Mistake, match=r"none of 5 items of kind 'framed' .* nothing found \(5\)"):
    shards.make(unsure(every=10**9)[1:])


def test_a_fusion_takes_its_shares_of_each(tmp_path):
  whole = built(tmp_path, n=4)
  part = write(tmp_path, "part.json", n=500, seed=7)
  path = tmp_path / "fused.json"
  parts = [{"dataset": str(tmp_path / "few"), "share": 0.5}, {"manifest": str(part), "share": 0.5}]
  common = {k: fields()[k] for k in ("name", "seed", "split")}
  path.write_text(json.dumps(common | {"n": 6, "parts": parts}))
  records = [r for shard in shards.plan(manifest.read(path)) for r in shard]
  copied = [r for r in records if isinstance(r, shards.Copied)]
  made = [r for r in records if isinstance(r, shards.Made)]
  assert len(copied) == len(made) == 3
  assert len({r.number for r in copied}) == 3  # No record twice.
  assert {(r.manifest.seed, r.stride) for r in made} == {(7, 3)}
  shard = shards.make(copied[:1])
  assert plain(decode(shard.records[0])) == plain(whole[copied[0].number])
  assert shard.tried == {}


@pytest.mark.parametrize(
  "n, split, message",
  [(3, "dev", "few is of split 'train', the whole of 'dev'"), (5, "train", "has 4 records; .* 5")],
)
def test_a_dataset_that_cannot_be_a_part_is_refused(tmp_path, n, split, message):
  built(tmp_path, n=4)
  parts = [{"dataset": str(tmp_path / "few"), "share": 1}]
  fused = {"name": "fused", "seed": 0, "split": split, "n": n, "parts": parts}
  (tmp_path / "fused.json").write_text(json.dumps(fused))
  with pytest.raises(ValueError, match=message):
    shards.plan(manifest.read(tmp_path / "fused.json"))
