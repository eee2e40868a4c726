"""The yardstick gives our maps, and the suite writes what other programs read. No time is asserted."""

import json

import numpy as np
import pytest
import torch

from benchmarks import speed, speed_tables
from benchmarks.published import published_maps, published_training
from madad.datasets import make_brain_slices
from madad.stages.denoiser import train_denoiser
from madad.testing import tiny_autoencoder, tiny_detector
from madad.training import Trainer

IMAGES = make_brain_slices(12, size=32, lesions=0.5, random_state=0).images.astype(np.float32)
OURS = {"intensity_range": (0.0, 1.0), "anomaly_map": "image"}
PUBLISHED = OURS | {
    "preset": "original",
    "autoencoder": tiny_autoencoder(),
    "denoiser": "tiny",
    "trainer": Trainer(max_steps=2),
}


@pytest.fixture(scope="module")
def ours():
    return tiny_detector(**OURS).fit(IMAGES)


@pytest.fixture(scope="module")
def published():
    return tiny_detector(**PUBLISHED).fit(IMAGES)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("which", ["ours", "published"])
def test_the_published_pipeline_gives_our_maps(which, batch_size, request):
    detector = request.getfixturevalue(which)
    images = speed.flagged(detector, IMAGES)
    maps = detector.predict_maps(images)
    assert 0 < np.count_nonzero(maps.max(axis=(1, 2))) < len(maps)  # some flagged, some not
    np.testing.assert_allclose(published_maps(detector, images, batch_size), maps, atol=1e-5)
    assert np.count_nonzero(maps[:-2].max(axis=(1, 2))) == 0  # flagged ones are neighbours


@pytest.mark.parametrize("knobs", [{"eta": 0.7}, {"n_steps": 4, "step_spacing": "trailing"}, {"gamma": 0.05}])
def test_so_it_does_with_other_knobs(knobs, published):
    detector = tiny_detector(**PUBLISHED, **knobs).fit(IMAGES)
    detector.set_params(mask_threshold=0.3)
    maps = detector.predict_maps(IMAGES)
    np.testing.assert_allclose(published_maps(detector, IMAGES, 3), maps, atol=1e-5)


def test_the_published_training_lowers_the_same_loss(ours):
    detector = tiny_detector(**OURS).fit(IMAGES)
    before = [parameter.clone() for parameter in detector.denoiser_.parameters()]
    losses = published_training(detector, IMAGES, batch_size=4, n_steps=3)
    assert len(losses) == 3 and all(np.isfinite(losses))
    assert not all(map(torch.equal, before, detector.denoiser_.parameters()))
    _, history = train_denoiser(
        detector.autoencoder_,
        detector._check_slices(IMAGES),
        denoiser="tiny",
        objective=detector._objective(),
        trainer=Trainer(1, batch_size=4),
        seed=0,
    )
    assert 0.2 < losses[0] / history[0]["loss"] < 5  # of the same kind


def test_documents_have_the_names_that_programs_read_and_tables_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "machine", lambda device: {**MACHINE})
    rows = [
        {**ROW, "size": "small", "ratio_batched": 1.5, "reference_slices_per_second_batched": 2.0},
        {**ROW, "size": "XS", "variants": {"bfloat16": VARIANT}},
    ]
    measured = speed.joined("cpu", rows, TRAINING, MEMORY) | {
        "stages": [STAGE],
        "profile": {"aten::mkldnn_convolution": 0.7},
        "curves": {name: {1: 0.1, 10: 0.5} for name in CURVES},
    }
    assert measured["ratios"] == {
        "inference_small_cpu": 3.0,
        "inference_small_cpu_batched_reference": 1.5,
        "inference_klf8_xs_cpu": 3.0,
        "denoiser_training_klf8_xs_cpu": 6.0,
        "memory_10k_over_100": 1.1,
    }
    assert measured["max_abs_map_difference"] == 1e-6
    for text in (speed_tables.brief(measured), speed_tables.report(measured)):
        assert '"inference_small_cpu": 3.0' in text and "1.0e-06" in text
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(measured))
    assert speed_tables.plot(path) == tmp_path / "speed.png"
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_peaks_of_memory_are_of_the_process(monkeypatch):
    monkeypatch.setitem(speed.SIDES, "small", 32)
    for use in ("predict", "fit"):
        peak = speed.peak_of(use, "tiny", 150)
        assert peak["peak_mb"] > 50 and (peak["cache_mb"] > 0) == (use == "fit")


def test_stages_count_operations(monkeypatch):
    monkeypatch.setitem(speed.SIDES, "small", 32)
    monkeypatch.setattr(speed, "machine", lambda device: {**MACHINE})
    rows = speed.stages_of("small", "cpu")
    assert [row["stage"] for row in rows] == ["encode", "U-Net, one step", "decode"]
    assert all(row["gflop_per_slice"] > 0 and row["share_of_matmul_rate"] > 0 for row in rows)


CURVES = ("seconds_by_slices", "seconds_per_slice_by_side", "seconds_per_slice_by_steps")
MACHINE = {
    "cpu": "a CPU",
    "gpu": None,
    "threads": 2,
    "date": "2026-11-23",
    "versions": {"torch": "2"},
    "matmul_gflops": {"float32": 100.0, "bfloat16": 200.0},
}
ROW = {
    "side": 128,
    "slices": 100,
    "flagged": 15,
    "slices_per_second": 6.0,
    "reference_slices_per_second": 2.0,
    "ratio": 3.0,
    "max_abs_map_difference": 1e-6,
    "peak_mb": 500.0,
}
VARIANT = {
    "slices_per_second": 9.0,
    "ratio": 4.5,
    "first_call_s": 1.0,
    "map_moves_at_most": 0.01,
    "map_moves_on_average": 0.001,
}
TRAINING = {
    "size": "XS",
    "batch_size": 8,
    "steps": 4,
    "slices_per_second": 6.0,
    "slices_per_second_bfloat16": 12.0,
    "reference_slices_per_second": 1.0,
    "ratio": 6.0,
    "ratio_bfloat16": 12.0,
}
PEAK = {"peak_mb": 400.0, "cache_mb": 0.0}
MEMORY = {
    "predict_ratio": 1.1,
    "fit_ratio": 1.2,
    "peaks": {f"{use}_{n}": PEAK for use in ("predict", "fit") for n in (100, 10_000)},
}
STAGE = {
    "size": "small",
    "stage": "encode",
    "ms_per_slice": 1.0,
    "gflop_per_slice": 0.1,
    "share_of_matmul_rate": 0.5,
}
