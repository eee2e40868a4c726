import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import label, median_filter
from sklearn.metrics import average_precision_score
from sklearn.utils import Bunch

from benchmarks import evidence, protocols
from benchmarks.methods import METHODS, QUICK_METHODS, Conditions
from benchmarks.protocols import load_protocol
from benchmarks.tables import OURS, PAPERS
from madad import MaskedDiffusionAnomalyDetector
from madad.baselines import IntensityThreshold

ROOT = Path(__file__).parents[2]
NAMES = ["intensity, both tails", "AE", "THOR", OURS]
TINY = ["--protocol", "s1", "--size", "tiny", "--precision", "float32", "--device", "cpu"]
FIGURES = ("precision-recall.png", "dice-by-size.png", "examples.png")


def run(*arguments):
    """Call the command in this process; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evidence.main([str(argument) for argument in arguments])
    return printed.getvalue()


def read(out, name="results.json"):
    return json.loads((out / name).read_text(), parse_constant=pytest.fail)  # strict JSON has no NaN


def untimed(report):
    """Methods without what differs between two machines."""
    return {
        name: {key: value for key, value in summary.items() if key != "seconds"}
        for name, summary in report["methods"].items()
    }


@pytest.fixture(scope="module")
def whole(write_two_cohorts, tmp_path_factory):
    """An uninterrupted run of four methods with two seeds each."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "data").mkdir()
    data, out = write_two_cohorts(folder / "data"), folder / "out"
    arguments = ["--data", data, *TINY, "--seeds", 2]
    printed = run(*arguments, "--methods", *NAMES, "--out", out)
    protocol = load_protocol("s1", data, size=64)
    return Bunch(data=data, out=out, arguments=arguments, printed=printed, protocol=protocol)


@pytest.fixture
def copied(whole, tmp_path):
    """The run's folder, to change things in."""
    return shutil.copytree(whole.out, tmp_path / "copy")


@pytest.fixture
def untrainable(monkeypatch):
    """Let every training fail."""

    def fit(*arguments, **parameters):
        raise AssertionError("something was trained")

    for name in [*NAMES, PAPERS]:
        monkeypatch.setattr(type(METHODS[name](Conditions(seed=0, size="tiny"))), "fit", fit)


def cells(out):
    return sorted(path.parent for path in out.glob("cells/*/*/cell.json"))


def test_results_have_the_numbers_of_each_method(whole):
    report = read(whole.out)
    assert set(report) == {"methods", "data", "conditions", "versions"}
    assert report["data"] == whole.protocol.description and report["data"]["n_test"] == 6
    assert {"madad", "torch", "numpy", "python"} <= set(report["versions"])
    assert report["conditions"]["seeds"] == [0, 1] and report["conditions"]["size"] == "tiny"
    assert list(report["methods"]) == NAMES
    for name, summary in report["methods"].items():
        for metric in ("max_dice_per_image", "max_dice_pooled", "calibrated_dice", "auprc"):
            values = summary[metric]
            low, high = values["ci95"]
            assert values["mean"] == pytest.approx(np.mean(values["seeds"])) and len(values["seeds"]) == 2
            assert 0 <= low <= high <= 1 and 0 <= values["mean"] <= 1
        assert summary["seeds"] == [0, 1] and len(summary["seconds"]) == 2
        assert all(seconds >= 0 for seconds in summary["seconds"])
        n_stages = {"intensity, both tails": 0, OURS: 2}.get(name, 1)
        for training in summary["training"]:
            assert [stage["steps"] for stage in training.values()] == [20] * n_stages
    assert report["methods"]["AE"]["auprc"]["seeds"][0] != report["methods"]["AE"]["auprc"]["seeds"][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_holds_what_its_model_finds(whole, name):
    test, summary = whole.protocol.test, read(whole.out)["methods"][name]
    brain, truth = test.brain_masks, test.lesion_masks
    for seed in (0, 1):
        folder = whole.out / "cells" / evidence.slug(name) / str(seed)
        result = read(folder, "cell.json")["result"]
        detector = type(METHODS[name](Conditions(seed=0, size="tiny"))).load(folder / "model")
        assert result["calibrated_threshold"] == detector.map_threshold_
        with np.load(folder / "maps.npz") as file:
            maps, restored = file["maps"], file["restored"]
        np.testing.assert_allclose(detector.predict_maps(test.images, brain_mask=brain), maps, atol=1e-5)
        assert result["auprc"] == pytest.approx(average_precision_score(truth[brain], maps[brain]))
        assert summary["auprc"]["seeds"][seed] == result["auprc"]

        def dice(threshold, maps=maps):
            found = (maps >= threshold) & brain
            sizes = found.sum(axis=(1, 2)) + truth.sum(axis=(1, 2))
            return 2 * (found & truth).sum(axis=(1, 2)) / sizes

        oracle = dice(np.float32(result["oracle_threshold_per_image"]))
        np.testing.assert_allclose(result["dice_per_image"], oracle)
        assert result["max_dice_per_image"] == pytest.approx(oracle.mean())
        others = np.quantile(maps[brain], np.linspace(0, 1, 101))
        assert max(dice(value).mean() for value in others) <= oracle.mean() + 1e-9
        assert result["calibrated_dice"] == pytest.approx(dice(np.float32(detector.map_threshold_)).mean())
        rows = evidence.shown_rows(test)
        shape = (0,) if name.startswith("intensity") else test.images[rows].shape
        assert restored.shape == shape


def test_the_table_is_what_was_printed(whole):
    table = (whole.out / "table.md").read_text()
    assert table in whole.printed and whole.printed.startswith('{"protocol": "s1"')
    head, rule, *rows = table.splitlines()
    columns = (
        "max Dice per image | max Dice pooled | calibrated Dice per image | AUPRC | MAD-AD's gain per image"
    )
    assert head == f"| method | {columns} |"
    assert head.count("|") == rule.count("|") == 7
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in NAMES]
    auprc = read(whole.out)["methods"]["AE"]["auprc"]
    low, high = auprc["ci95"]
    assert f"| {auprc['mean']:.3f} [{low:.3f}, {high:.3f}] |" in rows[1]
    methods = read(whole.out)["methods"]
    gains = np.array(methods["mad-ad"]["dice_of_each"]) - np.array(methods["AE"]["dice_of_each"])
    assert methods["AE"]["ours_gains"]["mean"] == pytest.approx(gains.mean())
    low, high = methods["AE"]["ours_gains"]["ci95"]
    assert low <= gains.mean() <= high and rows[1].endswith(f"| {gains.mean():.3f} [{low:.3f}, {high:.3f}] |")
    assert "ours_gains" not in methods["mad-ad"]
    for name in NAMES:
        for seed in (0, 1):
            assert f"{name}, seed {seed}: " in whole.printed


def test_figures_are_whole(whole):
    for name in FIGURES:
        content = (whole.out / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]
    assert not [path for path in whole.out.rglob("*") if "partial" in path.name]


def test_the_same_call_again_trains_nothing(whole, copied, untrainable):
    before = read(copied)
    for name in ("results.json", "table.md", *FIGURES):
        (copied / name).unlink()
    run(*whole.arguments, "--methods", *NAMES, "--out", copied)
    after = read(copied)
    assert after["methods"] == before["methods"] and after["data"] == before["data"]
    assert (copied / "table.md").read_bytes() == (whole.out / "table.md").read_bytes()
    assert all((copied / name).is_file() for name in FIGURES)
    run(*whole.arguments, "--methods", OURS, "--out", copied)  # some of them make another table
    assert list(read(copied)["methods"]) == [OURS]


@pytest.mark.parametrize("other", [["--budget", "5s"], ["--size", "small"], ["--median", "3"]])
def test_another_run_in_the_same_folder_is_refused(whole, copied, untrainable, other):
    arguments = [*whole.arguments, *other, "--methods", *NAMES, "--out", copied]
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    message = str(error.value)
    for words in ("--out must be new or hold cells of the same run", "got", str(copied), "Choose another"):
        assert words in message
    assert read(copied) == read(whole.out)


def test_a_cell_that_was_not_finished_is_done_again(whole, copied):
    unfinished = copied / "cells" / "ae" / "1"
    (unfinished / "cell.json").unlink()
    maps = (unfinished / "maps.npz").read_bytes()
    (unfinished / "maps.npz").write_bytes(maps[:100])
    (unfinished / "maps.npz.partial.npz").write_bytes(maps[:50])
    (unfinished / "cell.json.partial").write_text("{")
    shutil.rmtree(unfinished / "model")
    run(*whole.arguments, "--methods", *NAMES, "--out", copied)
    assert untimed(read(copied)) == untimed(read(whole.out))
    assert cells(copied) == [copied / cell.relative_to(whole.out) for cell in cells(whole.out)]
    assert not list(copied.rglob("*partial*"))


def start(tmp_path, *arguments):
    """Start the command as a process of its own; what it says goes to a file."""
    command = [sys.executable, "-m", "benchmarks.evidence", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(tmp_path / "errors", "wb") as errors:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=errors, stderr=errors)


def wait_for(process, found, tmp_path, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, (tmp_path / "errors").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_can_be_run_again(whole, tmp_path):
    names = ["AE", OURS]
    arguments = [*whole.arguments, "--methods", *names, "--out", tmp_path / "out"]
    process = start(tmp_path, *arguments)
    wait_for(process, lambda: cells(tmp_path / "out"), tmp_path)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = cells(tmp_path / "out")
    assert 0 < len(done) < 2 * len(names) and not (tmp_path / "out" / "results.json").exists()
    written = [(folder / "cell.json").stat().st_mtime_ns for folder in done]
    run(*arguments)
    assert [(folder / "cell.json").stat().st_mtime_ns for folder in done] == written
    expected = untimed(read(whole.out))
    assert untimed(read(tmp_path / "out")) == {name: expected[name] for name in names}


def test_what_a_signal_cut_short_is_no_result(whole, tmp_path):
    out = tmp_path / "out"
    arguments = [*whole.arguments, "--methods", OURS, "--budget", "15s", "--out", out]
    process = start(tmp_path, *arguments)
    wait_for(process, lambda: list(out.glob("checkpoints/autoencoder-*")), tmp_path)  # the next stage runs
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=120) not in (0, None)
    assert not cells(out) and not (out / "results.json").exists()
    said = (tmp_path / "errors").read_text()
    assert "TrainingStoppedWarning" in said and "stopped by SIGTERM" in said
    assert list(out.glob("checkpoints/denoiser-*"))  # to go on from


def test_ablation_end_to_end(whole, copied, monkeypatch):
    rows = {
        "map: mean mask": {"anomaly_map": "mask"},
        "steps: 1": {"n_steps": 1},
        "repaint: 0.3": {"repaint": 0.3},
    }
    monkeypatch.setattr(evidence, "INFERENCE_ABLATIONS", rows)
    trained = "mask ratio: 0.2"
    arguments = [*whole.arguments, "--ablate", "--seeds", 1, "--methods", trained, "--out", copied]
    printed = run(*arguments)
    table = (copied / "ablation.md").read_text()
    assert table in printed
    report = read(copied, "ablation.json")
    assert list(report["rows"]) == ["defaults", *rows, trained]
    has_papers = [name for name, bases in report["rows"].items() if PAPERS in bases]
    assert has_papers == ["defaults", "map: mean mask", "steps: 1"]  # no repainting for the paper's
    assert all(OURS in bases for bases in report["rows"].values())
    of_run = read(whole.out)["methods"][OURS]
    defaults = report["rows"]["defaults"][OURS]
    assert defaults["auprc"]["seeds"] == of_run["auprc"]["seeds"][:1]  # the same training

    test, train = whole.protocol.test, whole.protocol.train
    detector = MaskedDiffusionAnomalyDetector.load(copied / "cells" / "mad-ad" / "0" / "model")
    detector.set_params(anomaly_map="mask", device="cpu")
    held_out = read(copied / "cells" / "mad-ad" / "0", "cell.json")["calibration_rows"]
    detector.calibrate(train.images[held_out], brain_mask=train.brain_masks[held_out])
    maps = detector.predict_maps(test.images, brain_mask=test.brain_masks)
    row = report["rows"]["map: mean mask"][OURS]
    expected = average_precision_score(test.lesion_masks[test.brain_masks], maps[test.brain_masks])
    assert row["auprc"]["mean"] == pytest.approx(expected, abs=1e-6)
    found = (maps >= np.float32(detector.map_threshold_)) & test.brain_masks
    both = (found & test.lesion_masks).sum(axis=(1, 2))
    dice = 2 * both / (found.sum(axis=(1, 2)) + test.lesion_masks.sum(axis=(1, 2)))
    assert row["calibrated_dice"]["mean"] == pytest.approx(dice.mean(), abs=1e-6)

    head, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    assert head[-1] == "published" and [line[0] for line in lines] == list(report["rows"])
    assert all(len(line) == len(head) for line in lines)
    published = {line[0]: line[-1] for line in lines if line[-1]}
    assert published == {"map: mean mask": "63.6"}  # docs/method.md, "Published numbers"
    assert lines[0][1] == f"{defaults['max_dice_per_image']['mean']:.3f}"
    assert lines[-1][4:] == [""] * 4  # trained in our way only

    def refuse(*arguments, **parameters):
        raise AssertionError("a map was made")

    monkeypatch.setattr(MaskedDiffusionAnomalyDetector, "fit", refuse)
    monkeypatch.setattr(MaskedDiffusionAnomalyDetector, "predict_maps", refuse)
    run(*arguments)
    assert read(copied, "ablation.json")["rows"] == report["rows"]
    monkeypatch.setattr(evidence, "INFERENCE_ABLATIONS", {"steps: 2": {"n_steps": 2}})
    with pytest.raises(AssertionError, match="a map was made"):  # other rows are not those that are there
        run(*arguments)


@pytest.mark.parametrize("by_volume", [True, False])
def test_filters_work_in_the_dimensions_of_an_image(by_volume):
    maps = np.random.default_rng(0).integers(0, 4, (5, 12, 10)).astype(np.float32)
    images = [[1, 3], [0, 2, 4]] if by_volume else [[row] for row in range(5)]
    subjects = np.array(list("babab")) if by_volume else None
    smoothed = evidence.filtered(maps, subjects, median=3, min_component=0)
    for rows in images:
        expected = median_filter(maps[rows], 3 if by_volume else (1, 3, 3))
        np.testing.assert_array_equal(smoothed[rows], expected)
    opened = evidence.filtered(maps, subjects, median=0, min_component=6)
    for rows in images:
        for threshold in (1, 2, 3):  # what is removed of each level set: components of fewer than 6 pixels
            labels, _ = label(maps[rows] >= threshold)
            large = np.bincount(labels.ravel()) >= 6
            large[0] = False
            np.testing.assert_array_equal(opened[rows] >= threshold, large[labels])
    assert (opened != maps).any() and (smoothed != maps).any()
    both = evidence.filtered(maps, subjects, median=3, min_component=6)
    one_by_one = evidence.filtered(smoothed, subjects, median=0, min_component=6)
    np.testing.assert_array_equal(both, one_by_one)


def test_volumes_end_to_end_with_filters(write_cohort, monkeypatch, tmp_path):
    path = write_cohort(tmp_path / protocols.NPZ["s2"][0])
    hashed = [sha256(f"s{i}".encode()).hexdigest()[:16] for i in range(9)]
    roles = {"train": hashed[:5], "validation": hashed[5:6], "test": hashed[6:]}
    (tmp_path / f"{path.stem}.json").write_text(json.dumps({"subjects": roles}))
    monkeypatch.setattr(protocols, "SPLITS", tmp_path)
    arguments = ["--data", tmp_path, "--protocol", "volume", "--size", "tiny", "--seeds", 1]
    arguments += ["--methods", "intensity, dark", "--out"]
    run(*arguments, tmp_path / "plain")
    run(*arguments, tmp_path / "filtered", "--median", 3, "--min-component", 20)
    maps = {}
    for name in ("plain", "filtered"):
        with np.load(tmp_path / name / "cells" / "intensity--dark" / "0" / "maps.npz") as file:
            maps[name] = file["maps"]
    protocol = load_protocol("volume", tmp_path, size=64)
    train, test = protocol.train, protocol.test
    assert maps["plain"].shape == test.images.shape and len(maps["plain"]) == 12
    from skimage.morphology import area_opening

    for subject in ("s6", "s7", "s8"):
        mine = test.subjects == subject
        expected = area_opening(median_filter(maps["plain"][mine], 3), 20)
        np.testing.assert_array_equal(maps["filtered"][mine], expected)
    for name in ("plain", "filtered"):
        summary = read(tmp_path / name)["methods"]["intensity, dark"]
        assert len(summary["dice_of_each"]) == 3 and "dice_by_lesion_size" not in summary
        assert not (tmp_path / name / "dice-by-size.png").exists()
        assert (tmp_path / name / "examples.png").is_file()
    assert (maps["plain"] != maps["filtered"]).any()

    # the threshold is that of healthy maps that went through the same filters
    cell = {name: read(tmp_path / name / "cells" / "intensity--dark" / "0", "cell.json") for name in maps}
    detector = IntensityThreshold.load(tmp_path / "filtered" / "cells" / "intensity--dark" / "0" / "model")
    assert cell["plain"]["result"]["calibrated_threshold"] == detector.map_threshold_
    rows = np.array(cell["filtered"]["calibration_rows"])
    healthy = detector.predict_maps(train.images[rows], brain_mask=train.brain_masks[rows])
    for subject in np.unique(train.subjects[rows]):
        own = train.subjects[rows] == subject
        padded = np.pad(median_filter(healthy[own], 3), ((1, 1), (0, 0), (0, 0)))
        healthy[own] = area_opening(padded, 20)[1:-1]
    threshold = cell["filtered"]["result"]["calibrated_threshold"]
    assert threshold == pytest.approx(np.quantile(healthy[train.brain_masks[rows]], 0.99), rel=1e-5)
    assert threshold != pytest.approx(detector.map_threshold_, rel=1e-3)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5m", 90)])
def test_times_are_read(text, seconds):
    assert evidence.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "90", "4 minutes", "0s", "-1m", "nans", "infh", "2d"])
def test_other_times_are_refused(text):
    with pytest.raises(ArgumentTypeError) as error:
        evidence.seconds_of(text)
    assert "must be a time such as 90s, 30m or 2h" in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--data must name the folder", "--quick"]),
        (
            ["--data", "d", "--methods", "AE", "GAN"],
            ["--methods must be all or among", "'AE'", "got ['GAN']"],
        ),
        (["--data", "d", "--ablate", "--methods", "AE"], ["lambda: 1", "got ['AE']"]),
        (["--quick", "--methods", "THOR"], ["'mad-ad'", "got ['THOR']"]),
        (["--quick", "--ablate"], ["--quick must go without --ablate", "--data"]),
        (["--data", "d", "--budget", "soon"], ["--budget", "must be a time", "'soon'"]),
        (["--data", "d", "--protocol", "s3"], ["--protocol", "'s3'"]),
        (["--data", "d", "--seeds", "0"], ["--seeds must be 1 or more, got 0"]),
    ],
)
def test_wrong_arguments_are_named(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        evidence.main([*arguments, "--out", str(tmp_path / "out")])
    assert error.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_examples_range_over_the_sizes_of_lesions():
    masks = np.zeros((30, 8, 8), bool)
    for row in range(25):
        masks[row].ravel()[: row + 1] = True
    rows = evidence.shown_rows(Bunch(lesion_masks=masks[::-1]))
    area = masks[::-1][rows].sum(axis=(1, 2))
    assert len(rows) == evidence.N_SHOWN and (np.diff(area) > 0).all() and area[0] >= 1 and area[-1] <= 25


# By how much ours must be above each baseline with each of the five seeds; the least ratios seen so far are
# 2.2 and 2.4 (AUPRC), 1.53 and 1.41 (Dice).
LEAST_FACTORS = {
    "auprc": {"intensity, both tails": 1.5, "AE": 1.5},
    "max_dice_per_image": {"intensity, both tails": 1.2, "AE": 1.15},
}


@pytest.mark.slow
@pytest.mark.evidence
def test_the_quick_form_puts_ours_first_with_every_seed(tmp_path):
    printed = run("--quick", "--out", tmp_path)
    methods = read(tmp_path)["methods"]
    assert list(methods) == list(QUICK_METHODS) and (tmp_path / "table.md").read_text() in printed
    for metric, factors in LEAST_FACTORS.items():
        ours = np.array(methods[OURS][metric]["seeds"])
        assert len(ours) == 5 and len(set(ours)) == 5
        for baseline, factor in factors.items():
            ratios = ours / methods[baseline][metric]["seeds"]
            assert ratios.min() > factor, f"{metric} of {OURS} over that of {baseline}: {ratios.round(3)}"
