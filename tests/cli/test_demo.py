import csv
import json

import numpy as np
import pytest
from matplotlib import pyplot as plt

from madad import MaskedDiffusionAnomalyDetector, cli

METHODS = ["mad-ad", "intensity-threshold", "autoencoder-residual"]
QUICK = ["--size", "32", "--max-time", "0.5", "--device", "cpu", "--quiet"]


def options_of(arguments):
    return cli._parser().parse_args(["demo", *arguments])


@pytest.fixture(scope="module")
def few_slices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.demo, "N_TRAIN", 16)
        patch.setattr(cli.demo, "N_TEST", 8)
        yield


@pytest.fixture(scope="module")
def demo(run, few_slices, tmp_path_factory):
    """Folder and output of one demo."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    status, printed, errors = run("demo", "--out", out, "--seed", 3, *QUICK)
    assert (status, errors) == (0, "")
    return out, printed


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
    options = options_of(["--size", "32", "--seed", "3"])
    _, test = cli.demo._generated(options)
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
        expected = [f"{report['methods'][name][column]:.3f}" for column in cli.demo.COLUMNS]
        assert lines[name] == expected
    assert "16 healthy slices of 8 subjects" in printed and str(out) in printed


def test_generated_test_subjects_are_nobody_of_the_training_set(few_slices):
    train, test = cli.demo._generated(options_of(["--size", "32"]))
    assert not set(train.subjects) & set(test.subjects)
    assert not train.lesion_masks.any() and test.lesion_masks.any(axis=(1, 2)).sum() == 4
    for image in test.healthy_images:
        assert np.abs(train.images - image).mean(axis=(1, 2)).min() > 0.005


def test_demo_shows_progress_unless_quiet(run, few_slices, tmp_path):
    loud = [argument for argument in QUICK if argument != "--quiet"]
    status, _, errors = run("demo", "--out", tmp_path, *loud)
    assert status == 0
    assert "autoencoder" in errors and "denoiser" in errors and "loss=" in errors


def test_demo_on_a_file(run, write_slices, tmp_path):
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


def test_a_file_is_split_by_subject(write_slices, tmp_path):
    data = write_slices(tmp_path / "slices.npz")
    options = options_of(["--size", "32", "--data", str(data)])
    train, test = cli.demo._from_file(options)
    assert not set(train.subjects) & set(test.subjects)
    assert not train.lesion_masks.any()
    subjects, counts = np.unique(test.subjects, return_counts=True)
    assert (counts == 2).all()
    for subject in subjects:
        with_lesion = test.lesion_masks[test.subjects == subject].any(axis=(1, 2))
        assert sorted(with_lesion.tolist()) == [False, True]


ERRORS = {
    "missing file": (
        lambda folder, write: ["--data", folder / "none.npz"],
        "path must name an existing file, .*none.npz",
    ),
    "no lesion masks": (
        lambda folder, write: ["--data", write(folder / "a.npz", without=["lesion_mask"])],
        "data must hold lesion masks .* got .*a.npz",
    ),
    "no lesion": (
        lambda folder, write: ["--data", write(folder / "a.npz", lesions=False)],
        "lesion",
    ),
    "no subjects": (
        lambda folder, write: ["--data", write(folder / "a.npz", without=["subject"])],
        "path must name a file with brain_mask and subject, got ",
    ),
    "another array": (
        lambda folder, write: ["--data", write(folder / "a.npz"), "--image", "image_t2"],
        "image must name an array of the file, got 'image_t2'",
    ),
    "too small": (lambda folder, write: ["--size", "8"], "size must .* got 8"),
    "no such device": (lambda folder, write: ["--device", "abacus"], "device must .* got 'abacus'"),
}


def test_time_must_be_positive(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--out", str(tmp_path / "out"), "--max-time", "0"])
    assert "--max-time: must be a positive number of seconds, got '0'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_go_to_stderr(name, run, write_slices, few_slices, tmp_path):
    arguments, message = ERRORS[name]
    out = tmp_path / "out"
    status, _, errors = run("demo", "--out", out, *QUICK, *arguments(tmp_path, write_slices))
    assert status == 2
    assert errors.startswith("madad: error: ") and errors.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors)
    assert not (out / "metrics.json").exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(run, tmp_path):
    (tmp_path / "out").write_text("mine")
    status, _, errors = run("demo", "--out", tmp_path / "out", *QUICK)
    assert status == 2 and str(tmp_path / "out") in errors
    assert (tmp_path / "out").read_text() == "mine"
