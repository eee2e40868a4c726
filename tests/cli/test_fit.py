import json
import shutil

import numpy as np
import pytest

from madad.cli import fit
from madad.datasets import Scan
from madad.training import Trainer
from madad.volume_model import VolumeModel

TINY = ("--preset", "tiny", "--spacing-mm", "4", "--device", "cpu", "--quiet")


def maps_of(model, image):
    loaded = VolumeModel.load(model, "cpu")
    return loaded.predict(loaded.prepare(Scan("x", {"T1": image}))).anomaly_map


def test_card_tells_data_steps_thresholds_and_use(model, run):
    text = (model / "README.md").read_text()
    assert "For research use only" in text and "- contrasts: T1" in text and "- template: False" in text
    card = json.loads((model / "card.json").read_text())
    assert card["contrasts"] == ["T1"] and card["data"]["volumes"] == 5
    assert card["preprocessing"]["center"] == "median"
    assert card["slices"]["spacing_mm"] == [4.0, 4.0]
    assert card["volume_threshold"] > 0 and card["volume_offset"] < 0
    assert f"- threshold: {card['volume_threshold']:.6g}" in text
    status, printed, _ = run("info", model, "--json")
    assert status == 0 and json.loads(printed)["card"]["contrasts"] == ["T1"]


def test_data_must_be_preprocessed(run, healthy, tmp_path):
    status, _, errors = run("fit", healthy.parent, tmp_path / "model", *TINY)
    assert status == 2
    assert "madad preprocess" in errors and str(healthy.parent) in errors


def test_a_model_is_not_replaced_unasked(run, model, prepared, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    before = (copy / "denoiser.safetensors").read_bytes()
    status, _, errors = run("fit", prepared, copy, *TINY)
    assert status == 2 and "--overwrite" in errors
    assert (copy / "denoiser.safetensors").read_bytes() == before
    assert run("fit", prepared, copy, *TINY, "--overwrite", "--seed", "5")[0] == 0
    assert (copy / "denoiser.safetensors").read_bytes() != before


def test_the_same_seed_gives_the_same_model(run, model, prepared, tmp_path):
    assert run("fit", prepared, tmp_path / "again", *TINY)[0] == 0
    for name in ("autoencoder.safetensors", "denoiser.safetensors", "calibration.json", "card.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes(), name


def test_an_interrupted_run_goes_on_by_resume_alone(run, model, prepared, healthy, tmp_path, monkeypatch):
    path = tmp_path / "model"
    fit_once = Trainer.optimise

    def interrupted(trainer, *arguments, **options):
        if options["description"] == "denoiser":
            raise OSError(5, "the machine went away")
        return fit_once(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", interrupted)
        assert run("fit", prepared, path, *TINY)[0] == 2
    assert not path.exists()
    assert list((tmp_path / ".model-fit" / "checkpoints").iterdir())
    status, _, errors = run("fit", prepared, path, *TINY)
    assert status == 2 and "--resume" in errors
    assert run("fit", prepared, path, *TINY, "--resume")[0] == 0
    assert not (tmp_path / ".model-fit").exists()
    image = healthy.parent / "h0.nii.gz"
    np.testing.assert_array_equal(maps_of(path, image), maps_of(model, image))


def test_a_stopped_training_says_how_to_go_on(run, prepared, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise fit.TrainingStoppedWarning("stopped")

    monkeypatch.setattr(fit, "fit_volumes", stopped)
    status, _, errors = run("fit", prepared, tmp_path / "model", *TINY)
    assert status == 130 and "--resume" in errors


def test_slices_with_lesion_are_left_out_and_counted(run, patients, healthy, tmp_path):
    out = tmp_path / "prepared"
    joined = tmp_path / "all.tsv"
    rows = patients.read_text().splitlines() + healthy.read_text().splitlines()[1:]
    joined.write_text("\n".join(rows) + "\n")
    assert run("preprocess", joined, out, "--no-template", "--quiet")[0] == 0
    status, printed, _ = run("fit", out, tmp_path / "model", *TINY[:-1], "--json")
    assert status == 0
    facts = json.loads(printed)
    assert facts["slices_with_lesion_left_out"] == 3 * 6  # planes 15 to 20 of three patients
    assert facts["subjects"] == 8


def test_which_contrasts_must_be_said(run, brain, save, write_table, tmp_path):
    rows = [
        {"subject": f"s{i}", "contrast": name, "image": save(tmp_path / f"s{i}_{name}.nii.gz", values)}
        for i in range(3)
        for name, values in (("T1", brain(i)[0]), ("FLAIR", brain(i, contrast="FLAIR")[0]))
    ]
    out, model = tmp_path / "out", tmp_path / "model"
    table = write_table(tmp_path / "t.tsv", rows)
    assert run("preprocess", table, out, "--no-template", "--quiet")[0] == 0
    status, _, errors = run("fit", out, model, *TINY)
    assert status == 2 and "--contrasts" in errors and "['T1', 'FLAIR']" in errors
    status, _, errors = run("fit", out, model, *TINY, "--contrasts", "T1", "T2")
    assert status == 2 and "'T2'" in errors and "s0" in errors
    assert run("fit", out, model, *TINY, "--contrasts", "T1", "FLAIR")[0] == 0
    loaded = VolumeModel.load(model, "cpu")
    assert loaded.detector.image_shape_[0] == 2
    # as channels, from scans as they came and in their order in the card
    assert run("predict", model, table, tmp_path / "maps", "--quiet")[0] == 0
    assert len(list((tmp_path / "maps").rglob("*_statmap.nii.gz"))) == 3
    one_contrast = write_table(tmp_path / "one.tsv", rows[:1])
    assert run("predict", model, one_contrast, tmp_path / "fails", "--quiet")[0] == 1
    assert "FLAIR" in (tmp_path / "fails" / "errors.tsv").read_text()


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_other_planes(run, prepared, healthy, tmp_path, plane):
    model = tmp_path / "model"
    options = ("--plane", plane, "--median-slices", "3", "--min-volume-ml", "1")
    assert run("fit", prepared, model, *TINY, *options)[0] == 0
    card = json.loads((model / "card.json").read_text())
    assert card["slices"]["plane"] == plane
    assert card["aggregation"] == {"median_slices": 3, "smoothing_mm": 0.0, "min_volume_ml": 1.0}
    assert maps_of(model, healthy.parent / "h0.nii.gz").shape == (36, 44, 36)
