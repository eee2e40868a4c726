import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

import madad
from madad import MaskedDiffusionAnomalyDetector, cli

METHODS = ["mad-ad", "intensity-threshold", "autoencoder-residual"]
QUICK = ["--size", "32", "--max-time", "0.5", "--device", "cpu", "--quiet"]


def run(*arguments):
    """Exit status, stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def few_slices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "N_TRAIN", 16)
        patch.setattr(cli, "N_TEST", 8)
        yield


@pytest.fixture(scope="module")
def demo(few_slices, tmp_path_factory):
    """Folder and output of one demo."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    status, printed, errors = run("demo", "--out", out, "--seed", 3, *QUICK)
    assert (status, errors) == (0, "")
    return out, printed


def write_slices(path, *, without=(), lesions=True):
    """Twelve subjects with four slices each in the layout of the real scans."""
    rng = np.random.default_rng(0)
    n, height, width = 48, 40, 32
    y, x = np.mgrid[:height, :width]
    brain = np.broadcast_to(((y - 19.5) / 17) ** 2 + ((x - 15.5) / 13) ** 2 < 1, (n, height, width))
    tissue = 90 + 30 * np.sin(x / 4 + rng.uniform(0, 6, (n, 1, 1))) + 8 * rng.standard_normal(brain.shape)
    lesion = np.zeros(brain.shape, np.uint8)
    if lesions:
        lesion[::2, 14:20, 12:17] = 4
    arrays = {
        "image": np.where(brain, np.where(lesion > 0, 230, tissue.clip(1, 200)), 0).astype(np.uint8),
        "brain_mask": brain.astype(np.uint8),
        "lesion_mask": lesion,
        "subject": np.repeat([f"s{i:02d}" for i in range(12)], 4),
        "z_frac": np.tile(np.linspace(0.4, 0.7, 4), 12),
        "modality": "FLAIR",
    }
    np.savez(path, **{name: values for name, values in arrays.items() if name not in without})
    return path


def test_demo_writes_metrics(demo):
    out, _ = demo
    report = json.loads((out / "metrics.json").read_text())
    assert list(report["methods"]) == METHODS
    for values in report["methods"].values():
        for name in ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice"):
            assert 0 <= values[name] <= 1
        assert values["calibrated_dice"] <= values["max_dice_per_image"]
    assert {"data", "fit", "predict", "evaluate", "write"} == set(report["seconds"])
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert (report["n_train"], report["n_test"], report["n_test_with_lesion"]) == (16, 8, 4)
    assert (report["size"], report["seed"], report["data"]) == (32, 3, "generated")


def test_demo_writes_scores_that_its_model_gives(demo):
    out, _ = demo
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    detector = MaskedDiffusionAnomalyDetector.load(out / "model")
    options = cli._parser().parse_args(["demo", "--size", "32", "--seed", "3"])
    _, test = cli._generated(options)
    scores = detector.score_samples(test.images, brain_mask=test.brain_masks)
    decisions = scores - detector.offset_
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores, atol=1e-6)
    np.testing.assert_allclose([float(row["decision"]) for row in rows], decisions, atol=1e-6)
    assert [int(row["prediction"]) for row in rows] == np.where(decisions < 0, -1, 1).tolist()
    assert [int(row["lesion_px"]) for row in rows] == test.lesion_masks.sum(axis=(1, 2)).tolist()
    assert [row["subject"] for row in rows] == test.subjects.tolist()


def test_demo_calibrates_on_healthy_and_reports_the_threshold_of_the_model(demo):
    out, _ = demo
    calibration = json.loads((out / "model" / "calibration.json").read_text())
    report = json.loads((out / "metrics.json").read_text())
    assert report["methods"]["mad-ad"]["calibrated_threshold"] == calibration["map_threshold_"]


def test_demo_draws_at_least_six_cases(demo):
    out, _ = demo
    height, width = plt.imread(out / "summary.png").shape[:2]
    assert width == round(8.4 * 110)
    assert height == pytest.approx(110 * (2.05 * 6 + 0.5), abs=2)  # four lesions, two without


def test_demo_leaves_nothing_but_its_results(demo):
    names = {path.name for path in demo[0].iterdir()}
    assert names == {"summary.png", "metrics.json", "scores.csv", "model"}


def test_demo_prints_a_table_of_three_methods(demo):
    out, printed = demo
    report = json.loads((out / "metrics.json").read_text())
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    for name in METHODS:
        expected = [f"{report['methods'][name][column]:.3f}" for column in cli.COLUMNS]
        assert lines[name] == expected
    assert "16 healthy slices of 8 subjects" in printed and str(out) in printed


def test_generated_test_subjects_are_nobody_of_the_training_set(few_slices):
    train, test = cli._generated(cli._parser().parse_args(["demo", "--size", "32"]))
    assert not set(train.subjects) & set(test.subjects)
    assert not train.lesion_masks.any() and test.lesion_masks.any(axis=(1, 2)).sum() == 4
    for image in test.healthy_images:
        assert np.abs(train.images - image).mean(axis=(1, 2)).min() > 0.005


def test_demo_shows_progress_unless_quiet(few_slices, tmp_path):
    loud = [argument for argument in QUICK if argument != "--quiet"]
    status, _, errors = run("demo", "--out", tmp_path, *loud)
    assert status == 0
    assert "autoencoder" in errors and "denoiser" in errors and "loss=" in errors


def test_demo_on_a_file(tmp_path):
    data = write_slices(tmp_path / "slices.npz")
    status, printed, errors = run("demo", "--data", data, "--out", tmp_path / "out", *QUICK)
    assert (status, errors) == (0, "")
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["data"] == "slices.npz"
    # two lesion-free slices of each of 7 subjects; of each of 5 others one with and one without
    assert (report["n_train"], report["n_test"], report["n_test_with_lesion"]) == (14, 10, 5)
    assert report["methods"]["intensity-threshold"]["tail"] != "dark"
    assert report["methods"]["intensity-threshold"]["auprc"] > 0.9  # these lesions are bright
    assert all(name in printed for name in METHODS)


def test_a_file_is_split_by_subject(tmp_path):
    data = write_slices(tmp_path / "slices.npz")
    options = cli._parser().parse_args(["demo", "--size", "32", "--data", str(data)])
    train, test = cli._from_file(options)
    assert not set(train.subjects) & set(test.subjects)
    assert not train.lesion_masks.any()
    subjects, counts = np.unique(test.subjects, return_counts=True)
    assert (counts == 2).all()
    for subject in subjects:
        with_lesion = test.lesion_masks[test.subjects == subject].any(axis=(1, 2))
        assert sorted(with_lesion.tolist()) == [False, True]


ERRORS = {
    "missing file": (
        lambda folder: ["--data", folder / "none.npz"],
        "path must name an existing file, .*none.npz",
    ),
    "no lesion masks": (
        lambda folder: ["--data", write_slices(folder / "a.npz", without=["lesion_mask"])],
        "data must hold lesion masks .* got .*a.npz",
    ),
    "no lesion": (
        lambda folder: ["--data", write_slices(folder / "a.npz", lesions=False)],
        "lesion",
    ),
    "no subjects": (
        lambda folder: ["--data", write_slices(folder / "a.npz", without=["subject"])],
        "path must name a file with brain_mask and subject, got ",
    ),
    "another array": (
        lambda folder: ["--data", write_slices(folder / "a.npz"), "--image", "image_t2"],
        "image must name an array of the file, got 'image_t2'",
    ),
    "too small": (lambda folder: ["--size", "8"], "size must .* got 8"),
    "no such device": (lambda folder: ["--device", "abacus"], "device must .* got 'abacus'"),
    "no time": (lambda folder: ["--max-time", "-1"], r"max_time must be positive, got -1\.0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_go_to_stderr(name, few_slices, tmp_path):
    arguments, message = ERRORS[name]
    out = tmp_path / "out"
    status, _, errors = run("demo", "--out", out, *QUICK, *arguments(tmp_path))
    assert status == 2
    assert errors.startswith("madad: error: ") and errors.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors)
    assert not (out / "metrics.json").exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "out").write_text("mine")
    status, _, errors = run("demo", "--out", tmp_path / "out", *QUICK)
    assert status == 2 and str(tmp_path / "out") in errors
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("arguments", [[], ["dream"], ["demo", "--size", "large"], ["demo", "--wings"]])
def test_wrong_arguments_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: madad" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"madad {madad.__version__}\n"


def test_python_m_madad():
    package = str(Path(madad.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "madad"]
    options = {"env": os.environ | {"PYTHONPATH": path}, "capture_output": True, "text": True, "timeout": 120}
    shown = subprocess.run([*command, "--help"], **options)
    assert shown.returncode == 0 and shown.stderr == ""
    assert "usage: madad" in shown.stdout and "demo" in shown.stdout
    failed = subprocess.run([*command, "demo", "--data", "none.npz", "--out", os.devnull], **options)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr


def test_info_tells_what_a_model_is(demo):
    model = demo[0] / "model"
    detector = MaskedDiffusionAnomalyDetector.load(model)
    status, printed, errors = run("info", model, "--json")
    assert (status, errors) == (0, "")
    facts = json.loads(printed)
    assert facts["slices"] == "1 x 32 x 32" and facts["preset"] == "small"
    assert facts["map_threshold"] == detector.map_threshold_ and facts["offset"] == detector.offset_
    assert facts["denoiser"]["parameters"] == sum(p.numel() for p in detector.denoiser_.parameters())
    assert facts["denoiser"]["step"] == detector.history_[-1]["step"]
    assert facts["autoencoder"]["l1"] == detector.autoencoder_.history_[-1]["l1"]
    listed = run("info", model)[1].splitlines()
    assert "slices: 1 x 32 x 32" in listed and "autoencoder:" in listed


def test_info_reports_the_quality_on_the_healthy_slices_of_a_file(demo, tmp_path):
    data = write_slices(tmp_path / "slices.npz")
    facts = json.loads(run("info", demo[0] / "model", "--data", data, "--json")[1])
    quality = facts["quality"]
    assert quality["n_slices"] == 24  # every other slice has a lesion
    slices = cli.load_slices(data, size=32)
    healthy = ~slices.lesion_masks.any(axis=(1, 2))
    autoencoder = MaskedDiffusionAnomalyDetector.load(demo[0] / "model").autoencoder_
    report = autoencoder.score_report(slices.images[healthy], brain_mask=slices.brain_masks[healthy])
    assert quality == pytest.approx(report | {"n_slices": 24}, rel=1e-6)


def test_info_on_what_is_no_model(tmp_path):
    status, _, errors = run("info", tmp_path / "nothing")
    assert status == 2 and errors.startswith("madad: error: ")
