import json
from pathlib import Path

import pytest

from pixelis_jax.data import manifest
from pixelis_jax.tools import USUAL, Options
from tests.data.datasets import MODEL, fields, write

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "manifests"


def test_a_manifest_is_read_as_it_is_written(tmp_path):
  m = manifest.read(write(tmp_path, seed=3, pictures=str(tmp_path)))
  assert (m.name, m.seed, m.split, m.n) == ("few", 3, "train", 6)
  assert m.of.kinds == {"framed": 0.5, "parity": 0.5}
  assert m.of.sorts == {"golden": 0.5, "corrected": 0.5}
  assert (m.of.hard_negative_weight, m.of.pictures, m.of.model) == (1.5, tmp_path, MODEL)
  assert m.fields == fields(seed=3, pictures=str(tmp_path)) and m.of.options == USUAL
  quick = manifest.read(write(tmp_path, tool_options={"tracker": "flow"}))
  assert quick.of.options == Options(tracker="flow")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.json")), ids=lambda f: f.stem)
def test_the_examples_in_docs_are_good(file, monkeypatch):
  monkeypatch.chdir(ROOT)  # Their paths are relative to it.
  assert manifest.read(file).name == file.stem


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"kind": {"framed": 1.0}}, r"unknown keys \['kind'\] \(did you mean 'kinds'\?\)"),
    (
      {"hard_weight": 2},
      r"\['hard_weight'\] \(did you mean 'hard_negative_weight'\?\); it",
    ),
    ({"sorts": None, "n": None}, r"a manifest lacks \['n', 'sorts'\]; it has name, seed, split, n"),
    ({"name": "Few Things"}, "name 'Few Things' must be lower-case words"),
    ({"seed": -1}, "seed must be a whole number from 0, not -1"),
    ({"n": 0}, "n must be a whole number from 1, not 0"),
    ({"n": 2.5}, "n must be a whole number from 1, not 2.5"),
    (
      {"split": "tarin"},
      r"split 'tarin' \(did you mean 'train'\?\) must be one of \['train'",
    ),
    (
      {"kinds": {"frame": 1}},
      r"kinds 'frame' \(did you mean 'framed'\?\) must be .*'beside'",
    ),
    ({"sorts": {"gold": 1}}, r"sorts 'gold' \(did you mean 'golden'\?\) must be one of .*'trap'"),
    (
      {"sorts": {"golden": 0.6, "corrected": 0.3}},
      "shares of sorts sum to 0.9, they must",
    ),
    ({"kinds": {"framed": -1}}, "framed must be a number above 0, not -1"),
    ({"kinds": {}}, "kinds must be an object of shares, at least one"),
    ({"hard_negative_weight": True}, "hard_negative_weight must be a number above 0, not True"),
    (
      {"pictures": "nowhere"},
      "pictures 'nowhere' is no folder; scripts/fetch",
    ),
    ({"model": "nowhere"}, "model 'nowhere' must be a folder with a config.json"),
    ({"tool_options": "flow"}, r"tool_options must be an object of \['tracker', .*, not 'flow'"),
    (
      {"tool_options": {"traker": "flow"}},
      r"tool_options 'traker' \(did you mean 'tracker'\?\) must be one of",
    ),
    ({"tool_options": {"tracker": 1}}, "tracker of tool_options must be a string, not 1"),
    ({"tool_options": {"tracker": "sort"}}, "tracker 'sort' must be one of"),
  ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
  given = {k: v for k, v in (fields() | changes).items() if v is not None or k == "pictures"}
  path = tmp_path / "m.json"
  path.write_text(json.dumps(given))
  with pytest.raises(ValueError, match=rf"m\.json: .*{message}"):
    manifest.read(path)


def test_what_is_no_json_has_its_line(tmp_path):
  path = tmp_path / "m.json"
  path.write_text('{\n  "name": "few",\n  "n": 6\n  "seed": 0\n}')
  with pytest.raises(ValueError, match=r"m.json, line 4: Expecting ',' delimiter at column 3"):
    manifest.read(path)
  path.write_text('{"n": 6, "n": 7}')
  with pytest.raises(ValueError, match=r"m.json: keys \['n'\] are given twice"):
    manifest.read(path)
  path.write_text("[1]")
  with pytest.raises(ValueError, match="a manifest must be a JSON object, not list"):
    manifest.read(path)
  with pytest.raises(FileNotFoundError, match="none.json is not a file"):
    manifest.read(tmp_path / "none.json")


def fused(tmp_path, parts, split="train"):
  path = tmp_path / "fused.json"
  path.write_text(json.dumps({"name": "fused", "seed": 0, "split": split, "n": 4, "parts": parts}))
  return path


def test_a_fusion_holds_its_manifests_in_their_own_words(tmp_path):
  part = write(tmp_path, "part.json", seed=5)
  (tmp_path / "built").mkdir()
  (tmp_path / "built" / "manifest.json").write_text('{"manifest": {}}')
  dataset = {"dataset": str(tmp_path / "built"), "share": 0.5}
  path = fused(tmp_path, [{"manifest": str(part), "share": 0.5}, dataset])
  m = manifest.read(path)
  one, other = m.of
  assert one.manifest.seed == 5 and one.dataset is None
  assert other.manifest is None and other.dataset == tmp_path / "built"
  # printf '{"manifest": {}}' | sha256sum
  digest = "563a256fbcc8e80521d51d6d73a907f3dac54984bacfd3998c30eb14485e4787"
  assert m.fields["parts"][1] == dataset | {"sha256": digest}
  assert m.fields["parts"][0] == {"manifest": fields(seed=5), "share": 0.5}


@pytest.mark.parametrize(
  "parts, split, message",
  [
    ([], "train", "parts must be a list of objects, at least one"),
    ([{"manifest": "{part}", "share": 0.9}], "train", "shares of parts sum to 0.9"),
    ([{"manifest": "{part}", "share": 1}], "test", "part 'few' is of split 'train', the whole of"),
    ([{"manifest": "{self}", "share": 1}], "train", "fused.json is what it is a part of"),
    (
      [{"folder": "x", "share": 1}],
      "train",
      r"a part has unknown keys \['folder'\]; it has",
    ),
    (
      [{"manifest": "{part}", "dataset": "x", "share": 1}],
      "train",
      r"a part has unknown keys \['dataset'\]; it has manifest, share",
    ),
    ([{"dataset": 3, "share": 1}], "train", "dataset of a part must be a path, not 3"),
    ([{"dataset": "x", "share": 1}], "train", "x holds no dataset: it has no manifest.json"),
  ],
)
def test_what_is_wrong_with_parts_is_named(tmp_path, parts, split, message):
  names = {"{part}": str(write(tmp_path, "part.json")), "{self}": str(tmp_path / "fused.json")}
  parts = [{k: names.get(v, v) for k, v in part.items()} for part in parts]
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    manifest.read(fused(tmp_path, parts, split))
