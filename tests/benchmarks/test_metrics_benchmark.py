import json
import sys

import numpy as np
import pytest

from benchmarks import metrics


def test_maps_are_the_same_each_time_and_as_told():
    batches, again = (list(metrics.batches_of(20, 64)) for _ in range(2))
    truth, maps = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    assert truth.shape == maps.shape == (20, 64, 64) and maps.dtype == np.float32
    np.testing.assert_array_equal(maps, np.concatenate([batch[1] for batch in again]))
    assert truth[::2].any(axis=(1, 2)).all() and not truth[1::2].any()
    assert 0.55 < (maps == 0).mean() < 0.65 and maps[truth].mean() > maps[(maps > 0) & ~truth].mean()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_ways_agree_and_are_measured(share, tmp_path):
    facts = metrics.measure(12 * 32**2, usual_share=share, folder=tmp_path, side=32)
    assert (facts["images"], facts["images_of_usual"]) == (12, 12 * share)
    assert facts["largest_difference"] < 1e-12 and facts["dice_above_grid"] >= -1e-12
    assert all(way["seconds"] > 0 and way["peak_mb"] > 0 for way in facts["ways"].values())
    assert set(facts["times_faster"]) == {"in memory", "with a folder"}
    assert not list(tmp_path.iterdir())
    table = metrics.table(facts)
    assert ("6 of 12 images" in table) == (share < 1)
    assert "| usual |" in table and "at most" in table


def test_numbers_are_printed_and_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "facts.json"
    command = ["metrics", "--pixels", "131072", "--json", file, "--folder", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    metrics.main()
    facts = json.loads(file.read_text())
    assert facts["pixels"] == 131072 and metrics.table(facts) in capsys.readouterr().out
