import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils import Bunch

from madad.datasets import load_slices
from madad.metrics import auprc

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"
METHODS = ["intensity", "autoencoder residual", "mad-ad image", "mad-ad latent", "mad-ad mask"]
QUICK = "--autoencoder-steps 4 --denoiser-steps 4 --preset tiny --device cpu".split()


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("benchmarks_accuracy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_cohort(path, *, n_subjects=9, lesions=True, prefix="s", seed=0):
    """Subjects with two slices each, the second with a lesion."""
    rng = np.random.default_rng(seed)
    n, side = 2 * n_subjects, 32
    y, x = np.mgrid[:side, :side]
    brain = np.broadcast_to(((y - 15.5) / 12) ** 2 + ((x - 15.5) / 10) ** 2 < 1, (n, side, side))
    tissue = 90 + 30 * np.sin(x / 4 + rng.uniform(0, 6, (n, 1, 1))) + 8 * rng.standard_normal(brain.shape)
    lesion = np.zeros(brain.shape, np.uint8)
    if lesions:
        lesion[1::2, 12:18, 12:17] = 1
    np.savez(
        path,
        image=np.where(brain, np.where(lesion > 0, 20, tissue.clip(1, 200)), 0).astype(np.uint8),
        brain_mask=brain.astype(np.uint8),
        lesion_mask=lesion,
        subject=np.repeat([f"{prefix}{i}" for i in range(n_subjects)], 2),
        z_frac=np.tile([0.64, 0.66], n_subjects),
        spacing_mm=np.array([6.0, 6.0]),
    )
    return path


def run(accuracy, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, [*arguments, *QUICK])])
    accuracy.main()
    return capsys.readouterr().out


def test_split_keeps_subjects_together_and_the_test_subjects_apart(accuracy):
    subjects = np.repeat([f"s{i}" for i in range(79)], 3)
    train, test = accuracy.split(subjects, validation=False)
    assert sorted([*train, *test]) == list(range(len(subjects)))
    assert not set(subjects[train]) & set(subjects[test])
    assert len(set(subjects[test])) == 27
    chosen_on, validation = accuracy.split(subjects, validation=True)
    assert len(set(subjects[validation])) == 12
    assert set(chosen_on) | set(validation) == set(train)  # what is chosen never sees a test subject
    assert not set(subjects[chosen_on]) & set(subjects[validation])
    np.testing.assert_array_equal(accuracy.split(subjects, validation=False)[1], test)


def test_best_intensity_finds_the_tail_of_the_lesion(accuracy, tmp_path):
    data = load_slices(write_cohort(tmp_path / "dark.npz"))
    tail, smoothing = accuracy.best_intensity(data)
    assert tail == "dark"
    quality = {
        (t, s): auprc(
            data.lesion_masks,
            accuracy.intensity_maps(data.images, data.brain_masks, tail=t, smoothing_px=s),
            data.brain_masks,
        )
        for t in ("bright", "dark", "both")
        for s in (0.0, 1.0)
    }
    assert quality[tail, smoothing] == max(quality.values())


def a_result(value, per_image, interval):
    names = ("max_dice_per_image", "max_dice_pooled", "calibrated_dice", "auprc", "auroc")
    result = dict.fromkeys(names, value) | {"dice_per_image": per_image, "seconds": 60.0}
    return result | {"auprc_ci95": interval, "calibrated_dice_ci95": interval}


def test_summarise_takes_means_over_seeds_and_intervals_over_subjects(accuracy):
    subjects = np.array(["a", "b", "c", "d"])
    results = [a_result(0.2, [0, 0, 1, 1], [0.1, 0.3]), a_result(0.4, [1, 1, 0, 0], [0.2, 0.6])]
    summary = accuracy.summarise(results, subjects)
    assert summary["auprc"]["mean"] == pytest.approx(0.3) and summary["auprc"]["seeds"] == [0.2, 0.4]
    assert summary["auprc"]["ci95"] == pytest.approx([0.15, 0.45])
    assert summary["max_dice_per_image"]["ci95"] == pytest.approx([0.5, 0.5])  # every subject's mean
    assert summary["seconds"] == [60.0, 60.0]
    alone = accuracy.summarise([a_result(0.2, [0.2], None)], np.array(["a"]))
    assert alone["auprc"]["ci95"] is None


def test_table_has_a_row_per_method_and_intervals_where_there_are_any(accuracy):
    summary = accuracy.summarise([a_result(0.25, [0.5, 0.5], [0.125, 0.375])], np.array(["a", "b"]))
    head, rule, *rows = accuracy.table({"intensity": summary, "mad-ad mask": summary}).splitlines()
    assert head.count("|") == rule.count("|") == 6
    assert [row.split(" | ")[0] for row in rows] == ["| intensity", "| mad-ad mask"]
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[1:] == ["0.250 [0.500, 0.500]", "0.250", "0.250 [0.125, 0.375]", "0.250 [0.125, 0.375]"]


def test_within_takes_the_largest_lesion_of_each_test_subject(accuracy, tmp_path):
    options = Bunch(data=write_cohort(tmp_path / "a.npz"), image="image", center="median", validation=False)
    train, test = accuracy.within(options)
    assert not train.lesion_masks.any()
    assert len(np.unique(test.subjects)) == len(test.subjects) and test.lesion_masks.any(axis=(1, 2)).all()
    assert not set(train.subjects) & set(test.subjects)
    assert train.images.shape[1:] == (112, 96)
    chosen, validation = accuracy.within(Bunch(**options | {"validation": True}))
    assert set(chosen.subjects) | set(validation.subjects) == set(train.subjects)
    assert not set(validation.subjects) & set(test.subjects)


def check_report(accuracy, folder, printed, protocol):
    report = json.loads((folder / "results.json").read_text())
    assert report["protocol"] == protocol and report["subset"] == "test"
    assert list(report["methods"]) == METHODS
    assert accuracy.table(report["methods"]) in printed
    for summary in report["methods"].values():
        assert len(summary["auprc"]["seeds"]) == len(report["seeds"])
        low, high = summary["max_dice_per_image"]["ci95"]
        assert 0 <= low <= summary["max_dice_per_image"]["mean"] + 1e-9 <= high + 2e-9 <= 1 + 1e-8
    assert (folder / "examples.png").read_bytes().startswith(b"\x89PNG")
    return report


def test_within_end_to_end_and_its_rerun(accuracy, monkeypatch, capsys, tmp_path):
    data = write_cohort(tmp_path / "slices.npz")
    arguments = ["--protocol", "within", "--data", data, "--out", tmp_path / "runs", "--seeds", "4"]
    printed = run(accuracy, monkeypatch, capsys, *arguments)
    report = check_report(accuracy, tmp_path / "runs", printed, "within")
    assert report["methods"]["intensity"]["auprc"]["mean"] > 0.9
    model = tmp_path / "runs" / "model-4" / "denoiser.safetensors"
    written = model.stat().st_mtime_ns
    run(accuracy, monkeypatch, capsys, *arguments)  # finds the model: evaluates only
    assert model.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == report


def test_cross_end_to_end_with_other_parameters(accuracy, monkeypatch, capsys, tmp_path):
    healthy = write_cohort(tmp_path / "healthy.npz", lesions=False)
    lesioned = write_cohort(tmp_path / "lesioned.npz", n_subjects=3, prefix="t", seed=1)
    arguments = ["--protocol", "cross", "--data", healthy, "--test", lesioned, "--out", tmp_path / "runs"]
    parameters = [
        "--seeds",
        "0",
        "1",
        "--levels",
        "0.65",
        "0.7",
        "--set",
        "mask_threshold=0.25",
        'mask_loss="mse"',
    ]
    printed = run(accuracy, monkeypatch, capsys, *arguments, *parameters)
    report = check_report(accuracy, tmp_path / "runs", printed, "cross")
    assert (report["n_train"], report["n_test"], report["seeds"]) == (9, 3, [0, 1])
    assert report["n_test_subjects"] == 3
    config = json.loads((tmp_path / "runs" / "model-1" / "config.json").read_text())
    assert config["parameters"]["mask_threshold"] == 0.25 and config["parameters"]["mask_loss"] == "mse"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "cross", "--data", "a.npz"], "--protocol cross needs --test"),
        (["--protocol", "between", "--data", "a.npz"], "invalid choice: 'between'"),
    ],
)
def test_wrong_arguments_exit(arguments, message, accuracy, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(accuracy, monkeypatch, capsys, *arguments, "--out", tmp_path)
    assert message in capsys.readouterr().err


def test_real_scans_give_the_cohorts_of_the_protocol(accuracy, data_dir):
    options = Bunch(data=data_dir / "lgg_flair.npz", image="image", center="median", validation=False)
    train, test = accuracy.within(options)
    assert len(np.unique(test.subjects)) == len(test.images)
    assert 25 <= len(test.images) <= 27  # of 27 subjects, those whose lesion is large enough
    assert not train.lesion_masks.any() and not set(train.subjects) & set(test.subjects)
    assert accuracy.best_intensity(test)[0] == "bright"  # FLAIR
