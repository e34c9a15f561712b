import pytest


def test_results_of_other_settings_are_not_mixed(load_benchmark, tmp_path):
  record = load_benchmark("record")
  record.begin(tmp_path / "0", {"lr": "1e-05", "steps": "1"})
  record.begin(tmp_path / "0", {"lr": "1e-05", "steps": "1"})
  with pytest.raises(ValueError, match="was begun with {'lr': '1e-05'}: remove it"):
    record.begin(tmp_path / "0", {"lr": "2e-05", "steps": "1"})


def test_a_known_table_is_of_the_same_settings(load_benchmark, tmp_path):
  record = load_benchmark("record")
  record.record(tmp_path, "rules", {"n": 8, "cells": [{"row": "views"}]})
  assert record.known(tmp_path / "rules.json", "cells", {"n": 8}) == [{"row": "views"}]
  assert record.known(None, "cells", {"n": 8}) == []
  with pytest.raises(ValueError, match="was made with {'n': 8}, asked is {'n': 9}"):
    record.known(tmp_path / "rules.json", "cells", {"n": 9})
