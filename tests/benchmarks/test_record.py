import pytest


def test_results_of_other_settings_are_not_mixed(load_benchmark, tmp_path):
  record = load_benchmark("record")
  record.begin(tmp_path / "0", {"lr": "1e-05", "steps": "1"})
  record.begin(tmp_path / "0", {"lr": "1e-05", "steps": "1"})
  with pytest.raises(ValueError, match="was begun with {'lr': '1e-05'}: remove it"):
    record.begin(tmp_path / "0", {"lr": "2e-05", "steps": "1"})
