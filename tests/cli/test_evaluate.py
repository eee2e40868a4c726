import errno
import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from madad.cli import evaluate
from madad.cli.evaluate import OURS
from madad.datasets import Scan
from madad.metrics import evaluate_maps
from madad.mri import read_volume
from madad.volumes.model import INTENSITY, VolumeModel


@pytest.fixture(scope="module")
def evaluation(run, model, patients, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    status, printed, errors = run("evaluate", model, patients, "--out", out, "--quiet")
    assert status == 0, errors
    return out, printed


def test_every_method_is_measured_on_the_same_voxels(evaluation, model, patients, rows_of):
    out, printed = evaluation
    results = json.loads((out / "evaluation.json").read_text())
    assert list(results["methods"]) == [OURS, *INTENSITY] and results["volumes"] == 3
    assert all(name in printed for name in results["methods"])
    loaded = VolumeModel.load(model, "cpu")
    rows = {(row["participant_id"], row["method"]): row for row in rows_of(out / "evaluation.tsv")}
    assert len(rows) == 3 * 5
    for subject in ("p0", "p2"):
        scan = Scan(subject, {"T1": patients.parent / f"{subject}.nii.gz"})
        lesion = read_volume(patients.parent / f"{subject}_lesion.nii.gz").values > 0
        prediction = loaded.predict(loaded.prepare(scan))
        seen = prediction.preprocessed.brain_mask | lesion
        expected = average_precision_score(lesion[seen], prediction.anomaly_map[seen])
        row = rows[(f"sub-{subject}", OURS)]
        assert float(row["auprc"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["lesion_ml"]) == pytest.approx(np.count_nonzero(lesion) * 0.064, rel=1e-5)
        dark = rows[(f"sub-{subject}", "intensity, dark")]
        assert float(dark["auprc"]) > 0.9  # the lesions are painted so
        assert float(dark["threshold"]) == pytest.approx(loaded.card.intensity_thresholds["intensity, dark"])


def test_all_scans_together_are_what_evaluate_maps_makes_of_them(evaluation, model, patients):
    out, _ = evaluation
    loaded = VolumeModel.load(model, "cpu")
    lesion_masks, maps, seen = [], [], []
    for subject in ("p0", "p1", "p2"):
        scan = Scan(subject, {"T1": patients.parent / f"{subject}.nii.gz"})
        prediction = loaded.predict(loaded.prepare(scan))
        lesion_masks.append(read_volume(patients.parent / f"{subject}_lesion.nii.gz").values > 0)
        maps.append(prediction.anomaly_map)
        seen.append(prediction.preprocessed.brain_mask | lesion_masks[-1])
    expected = evaluate_maps(
        lesion_masks, maps, seen, subjects=["p0", "p1", "p2"], threshold=loaded.threshold
    )
    together = json.loads((out / "evaluation.json").read_text())["methods"][OURS]
    assert list(together) == list(expected)
    for name, value in expected.items():
        assert together[name] == pytest.approx(value), name


def test_the_voxels_leave_no_file(evaluation, run, model, patients, tmp_path, monkeypatch):
    written = {"evaluation.json", "evaluation.tsv", "errors.tsv"}
    assert {path.name for path in evaluation[0].iterdir()} - {f"sub-p{i}.png" for i in range(3)} == written
    out, held = tmp_path / "out", []

    def full(*arguments, **options):
        held.append(list(out.glob("*.png")))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate.MapEvaluation, "update", full)
    assert run("evaluate", model, patients, "--out", out, "--quiet")[0] == 2
    assert len(held) == 1 and list(out.iterdir()) == held[0]  # the first scan's figure alone


def test_there_is_a_figure_of_each_scan(evaluation):
    out, _ = evaluation
    for subject in ("p0", "p1", "p2"):
        assert (out / f"sub-{subject}.png").read_bytes().startswith(b"\x89PNG")


def test_preprocessed_scans_are_measured_against_the_mask_as_it_came(
    run, evaluation, model, patients, tmp_path
):
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert run("preprocess", patients, prepared, "--no-template", "--quiet")[0] == 0
    assert run("evaluate", model, prepared, "--out", out, "--no-figures", "--quiet")[0] == 0
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(
        (evaluation[0] / "evaluation.json").read_text()
    )
    assert not list(out.glob("*.png"))


def test_the_result_can_be_noted_in_the_card(run, model, patients, tmp_path):
    noted = tmp_path / "model"
    shutil.copytree(model, noted)
    command = ("evaluate", noted, patients, "--out", tmp_path / "out", "--no-figures", "--json", "--card")
    results = json.loads(run(*command)[1])
    card = json.loads((noted / "card.json").read_text())
    (metrics,) = card["metrics"].values()
    assert metrics[OURS]["auprc"] == results["methods"][OURS]["auprc"]
    assert f"auprc: {metrics[OURS]['auprc']:.6g}" in (noted / "README.md").read_text()
    again = json.loads(run(*command)[1])
    assert again["model"] == results["model"]  # what is noted does not make it another model


def test_a_note_leaves_what_an_earlier_version_wrote(run, model, patients, tmp_path):
    noted = tmp_path / "model"
    shutil.copytree(model, noted)
    card = json.loads((noted / "card.json").read_text()) | {"version": "0.0.1"}
    (noted / "card.json").write_text(json.dumps(card))
    before = {path.name: path.read_bytes() for path in noted.iterdir()}
    command = ("evaluate", noted, patients, "--out", tmp_path / "out", "--no-figures", "--json", "--card")
    results = json.loads(run(*command)[1])
    changed = {path.name for path in noted.iterdir() if path.read_bytes() != before.get(path.name)}
    assert changed == {"card.json", "README.md"}
    assert json.loads((noted / "card.json").read_text())["version"] == "0.0.1"
    assert "A model of madad 0.0.1." in (noted / "README.md").read_text()
    assert json.loads(run(*command)[1])["model"] == results["model"]


def test_a_bad_mask_costs_a_row(run, brain, save, write_table, model, patients, tmp_path, rows_of):
    values, _, lesion = brain(80, lesion=True)
    rows = [
        {"subject": name, "contrast": "T1", "image": save(tmp_path / f"{name}.nii.gz", values)}
        for name in ("empty", "grid", "good", "none")
    ]
    for row, mask in zip(rows, (lesion * 0, lesion[1:], lesion), strict=False):
        row["lesion_mask"] = save(tmp_path / f"{row['subject']}_l.nii.gz", mask, dtype=np.uint8)
    out = tmp_path / "out"
    table = write_table(tmp_path / "t.tsv", rows)
    assert run("evaluate", model, table, "--out", out, "--no-figures", "--quiet")[0] == 1
    messages = {row["participant_id"]: row["message"] for row in rows_of(out / "errors.tsv")}
    assert set(messages) == {"sub-empty", "sub-grid"}  # and the scan without a mask is left out
    assert "a lesion" in messages["sub-empty"] and "one grid" in messages["sub-grid"]
    assert {row["participant_id"] for row in rows_of(out / "evaluation.tsv")} == {"sub-good"}


def test_without_any_mask_there_is_nothing_to_measure(run, model, healthy, tmp_path):
    status, _, errors = run("evaluate", model, healthy, "--out", tmp_path / "out")
    assert status == 2 and "lesion masks" in errors and str(healthy) in errors
    assert not (tmp_path / "out").exists()
