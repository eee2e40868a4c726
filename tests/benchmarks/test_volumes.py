import numpy as np
import pytest

from benchmarks import volumes


def row(**seconds):
    return {
        "scan": "a.nii.gz",
        "shape": [10, 20, 30],
        "brain_made_by": "given",
        "slices": [5, 16, 16],
        "seconds": dict.fromkeys(volumes.STAGES, 0.0) | seconds,
        "peak_mb": 900.0,
        "peak_mb_before": 400.0,
    }


def test_share_of_preprocessing_is_of_all_stages():
    table = volumes.table([row(read=1.0, registration=2.0, networks=9.0)])
    assert "| networks, s | 9.00 |" in table
    assert "| all, s | 12.0 |" in table
    assert "| share of preprocessing | 25% |" in table
    assert "| peak, MB | 900 |" in table and "| voxels | 10x20x30 |" in table


def test_stages_are_timed_by_name_and_memory_is_of_this_process():
    seconds = {}
    with volumes.timed(seconds, "read"):
        block = np.ones(2**24)
    assert set(seconds) == {"read"} and seconds["read"] > 0
    assert volumes.peak_mb() > block.nbytes / 2**20


def test_known_maps_are_given_back():
    maps = np.ones((2, 3, 4))
    known = volumes.KnownMaps(maps, 0.5)
    assert known.predict_maps(None, brain_mask=None) is maps and known.map_threshold_ == pytest.approx(0.5)
