import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from madad.datasets import load_slices

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("benchmarks_autoencoder", FOLDER / "autoencoder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROWS", {"L1": {"structure_weight": 0.0}, "L1 + structure": {}})
    yield module
    sys.modules.pop("accuracy", None)


def write_healthy(path, n_subjects=11):
    rng = np.random.default_rng(0)
    n, side = 2 * n_subjects, 32
    y, x = np.mgrid[:side, :side]
    brain = np.broadcast_to(((y - 15.5) / 12) ** 2 + ((x - 15.5) / 10) ** 2 < 1, (n, side, side))
    tissue = 90 + 30 * np.sin(x / 4 + rng.uniform(0, 6, (n, 1, 1))) + 8 * rng.standard_normal(brain.shape)
    np.savez(
        path,
        image=np.where(brain, tissue.clip(1, 200), 0).astype(np.uint8),
        brain_mask=brain.astype(np.uint8),
        subject=np.repeat([f"s{i}" for i in range(n_subjects)], 2),
        z_frac=np.tile([0.5, 0.9], n_subjects),
        spacing_mm=np.array([6.0, 6.0]),
    )
    return path


def test_painted_lesions_lie_in_the_brain_and_leave_the_rest_alone(benchmark, tmp_path):
    healthy = load_slices(write_healthy(tmp_path / "slices.npz"), spacing_mm=2.0)
    lesioned = benchmark.painted(healthy)
    assert 0 < len(lesioned.images) <= len(healthy.images)
    assert lesioned.lesion_masks.any(axis=(1, 2)).all()
    assert not (lesioned.lesion_masks & ~lesioned.brain_masks).any()
    assert not healthy.lesion_masks.any() and (lesioned.images != 0).any()


def test_t1_end_to_end_and_its_rerun(benchmark, monkeypatch, capsys, tmp_path):
    data = write_healthy(tmp_path / "slices.npz")
    arguments = ["--contrast", "t1", "--data", data, "--out", tmp_path / "runs", "--seeds", "3"]
    steps = ["--autoencoder-steps", "2", "--denoiser-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["autoencoder.py", *map(str, [*arguments, *steps])])
    benchmark.main()
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert list(report["rows"]) == list(benchmark.ROWS) and benchmark.table(report["rows"]) in printed
    for (cell,) in report["rows"].values():
        assert 0 < cell["mae"] < 0.5 and -1 <= cell["ssim"] <= 1
        assert 0 <= cell["max_dice_per_image"] <= 1 and 0 <= cell["auprc"] <= 1
    monkeypatch.setattr(benchmark, "measure", None)  # everything is there
    benchmark.main()
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == report


def test_the_subjects_held_out_are_not_trained_on(benchmark, tmp_path):
    data = write_healthy(tmp_path / "slices.npz")
    train, healthy, test = benchmark.t1(type("Options", (), {"data": data}))
    assert not set(train.subjects) & (set(healthy.subjects) | set(test.subjects))
    assert len(np.unique(train.subjects)) == 3
