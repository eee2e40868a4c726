import argparse
import sys

import pytest

from benchmarks import readers


def test_the_first_number_of_readers_is_the_measure():
    table = readers.table({0: [9.0, 8.0, 30.0], 2: [6.0, 3.0, 4.5]}, n_scans=3)
    assert "| 0 | 9.0 | 3.00 | 1.00 |" in table and "| 2 | 4.5 | 1.50 | 0.50 |" in table


@pytest.mark.parametrize("same", [True, False])
def test_results_must_not_depend_on_the_readers(monkeypatch, tmp_path, capsys, same):
    def judge(options, n_readers, out):
        out.mkdir()
        (out / "sub-1_statmap.nii.gz").write_text("map" if same else f"map {n_readers}")
        return 2.0 - n_readers

    monkeypatch.setattr(readers, "timed", judge)
    monkeypatch.setattr(sys, "argv", ["readers", "model", "scans", "--json", str(tmp_path / "facts.json")])
    if same:
        readers.main()
        assert "| 1 | 1.0 | 1.00 | 0.50 |" in capsys.readouterr().out
        assert (tmp_path / "facts.json").is_file()
    else:
        with pytest.raises(SystemExit, match="differ"):
            readers.main()


def test_the_command_is_run_with_so_many_readers(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(readers.subprocess, "run", lambda command, **options: ran.append(command))
    options = argparse.Namespace(model="m", scans=["a", "b"], device="cpu")
    assert readers.timed(options, 3, tmp_path) >= 0
    assert ran[0][3:] == ["predict", "m", "a", "b", tmp_path, "--device", "cpu", "--readers", "3", "--quiet"]
