import pytest


def test_results_of_other_settings_are_not_mixed(load_benchmark, tmp_path):
  record = load_benchmark("record")
  record.begin(tmp_path / "0", {"lr": "1e-05", "steps": "1"})
  record.begin(tmp_path / "0", {"lr": "1e-05", "steps": "1"})
  with pytest.raises(ValueError, match="was begun with {'lr': '1e-05'}: remove it"):
    record.begin(tmp_path / "0", {"lr": "2e-05", "steps": "1"})


def test_known_tables_are_of_the_same_settings_and_the_later_one_stands(load_benchmark, tmp_path):
  record = load_benchmark("record")
  first = [{"row": "views", "seed": 0, "end": 1}, {"row": "views", "seed": 1, "end": 2}]
  again = [{"row": "views", "seed": 0, "end": 3}]
  record.record(tmp_path / "0", "rules", {"n": 8, "cells": first})
  record.record(tmp_path / "1", "rules", {"n": 8, "cells": again})
  files = [tmp_path / name / "rules.json" for name in ("0", "1")]
  known = lambda files, n: record.known(files, "cells", {"n": n}, by=("row", "seed"))
  assert known([], 8) == []
  # The first file's would be known where it stands before the later one's as well.
  assert known(files, 8) == [*again, first[1]]
  assert known(files[::-1], 8) == first
  with pytest.raises(ValueError, match="was made with {'n': 8}, asked is {'n': 9}"):
    known(files, 9)
