import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from madad.maps.smoothing import smoothing_width

GOLDEN = Path(__file__).parent / "golden"


def load_script():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_script()


@pytest.fixture(scope="module")
def stored():
    return make.load_stored(GOLDEN)


@pytest.fixture(scope="module")
def detector():
    return make.load_detector(GOLDEN)


def measure(detector, stored, **overrides):
    return make.measure(detector, stored["images"], stored["brain_masks"], **overrides)


def names_in(error):
    """What a failed comparison lists, with by how much it moved."""
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    return {name: float(by) for name, by in (line.split(": ") for line in lines)}


def test_maps_scores_and_thresholds_are_those_that_are_stored(detector, stored):
    measured = measure(detector, stored)
    assert set(stored) == {"images", "brain_masks", *measured}
    make.check_same(measured, stored)


def test_stored_maps_are_worth_comparing(detector, stored):
    make.check_worth(detector, stored)


def test_a_percent_of_gamma_is_noticed_in_the_image_maps_only(detector, stored):
    with pytest.raises(AssertionError, match="Numerics in CHANGELOG.md") as error:
        make.check_same(measure(detector, stored, gamma=1.01 * make.WAYS["published"]["gamma"]), stored)
    moved = names_in(error)
    assert {"published_image_maps", "published_image_scores", "published_image_thresholds"} <= set(moved)
    assert all("_image_" in name for name in moved)
    assert 1e-4 < moved["published_image_maps"] < 0.01


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"smoothing_px": 1.01 * smoothing_width(None, make.SIZE, make.SIZE)}, ["preset", "published"]),
        ({"eta": 0.49}, ["published"]),
        ({"mask_threshold": 0.2}, ["preset", "published"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_small_changes_are_noticed(changed, expected, detector, stored):
    with pytest.raises(AssertionError, match="golden maps") as error:
        make.check_same(measure(detector, stored, **changed), stored)
    moved = names_in(error)
    for way in expected:
        assert f"{way}_image_maps" in moved
        assert f"{way}_latent_maps" in moved


def test_other_weights_are_noticed(stored):
    detector = make.load_detector(GOLDEN)
    with torch.no_grad():
        next(detector.denoiser_.parameters()).mul_(1.01)
    with pytest.raises(AssertionError, match="published_mask_maps"):
        make.check_same(measure(detector, stored), stored)


def test_a_new_shape_a_missing_array_and_nan_are_noticed(stored):
    maps = stored["preset_mask_maps"]
    for other in (maps[:1], np.full_like(maps, np.nan)):
        with pytest.raises(AssertionError, match="preset_mask_maps"):
            make.check_same({"preset_mask_maps": other}, stored)
    with pytest.raises(AssertionError, match="new_maps: inf"):
        make.check_same({"new_maps": maps}, stored)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_does_not_matter(batch_size, detector, stored):
    make.check_same(measure(detector, stored, batch_size=batch_size), stored)


def test_threads_do_not_matter(detector, stored):
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))  # two where the other tests have one, else one
    try:
        make.check_same(measure(detector, stored), stored)
    finally:
        torch.set_num_threads(before)


def test_make_refuses_to_overwrite_unless_the_change_is_declared(tmp_path, capsys, stored, monkeypatch):
    worth = []
    monkeypatch.setattr(make, "check_worth", lambda detector, stored: worth.append(sorted(stored)))
    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    different = {name: values + 0.25 if "_maps" in name else values for name, values in stored.items()}
    np.savez_compressed(tmp_path / "maps.npz", **different)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    for arguments in ([], ["--declare", " "], ["--retrain"]):
        with pytest.raises(SystemExit):
            make.main(arguments, tmp_path)
        assert "--declare" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    make.main(["--declare", "Maps are lower"], tmp_path)
    assert worth == [sorted(stored)]
    printed = capsys.readouterr().out
    assert "preset_mask_maps: moved by up to 0.25" in printed
    assert "*Numerics* in CHANGELOG.md" in printed
    assert "- Maps are lower" in printed
    make.check_same(make.load_stored(tmp_path), stored)
    changed = [path for path, content in files.items() if path.read_bytes() != content]
    assert changed == [tmp_path / "maps.npz"]  # the model stays


def test_the_files_are_small_and_hold_no_pickles(stored):
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 1.5e6
    assert all(values.dtype.kind in "fb" for values in stored.values())
    assert stored["images"].dtype == np.float32
