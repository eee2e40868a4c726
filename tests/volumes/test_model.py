import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from madad import MaskedDiffusionAnomalyDetector
from madad.baselines import IntensityThreshold
from madad.datasets import Scan
from madad.mri import (
    AffineRegistration,
    HealthyIntensities,
    PreprocessedVolume,
    VolumePreprocessor,
    VolumeSlicer,
    read_volume,
)
from madad.saving.model_card import ModelCard
from madad.testing import tiny_detector
from madad.volumes.model import INTENSITY, VolumeModel, model_hash
from madad.volumes.prediction import predict_volume


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["one contrast", "two contrasts"])
def test_a_saved_model_predicts_the_same(cohort, kind, model, two_contrasts, tmp_path):
    found, its_read = (model, cohort.read) if kind == "one contrast" else (two_contrasts, cohort.read_two)
    found.save(tmp_path / "model")
    loaded = VolumeModel.load(tmp_path / "model", "cpu")
    assert loaded.detector.device == "cpu"
    assert (loaded.threshold, loaded.offset) == (found.threshold, found.offset)
    volumes = its_read(20).contrasts
    before, after = found.predict(volumes), loaded.predict(volumes)
    np.testing.assert_array_equal(before.anomaly_map, after.anomaly_map)
    assert before.score == after.score and before.components == after.components
    np.testing.assert_array_equal(loaded.predict(volumes, threshold=0.0).labels > 0, before.anomaly_map > 0)
    for name in INTENSITY:
        np.testing.assert_array_equal(
            loaded.predict_from_intensity(volumes, name).labels,
            found.predict_from_intensity(volumes, name).labels,
        )


def test_aggregation_and_threshold_are_the_cards(cohort, model):
    volume = cohort.prepared(20)
    expected = predict_volume(
        model.detector, volume, model.card.slicer, threshold=model.threshold, median_slices=3
    )
    found = model.predict([volume])
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    np.testing.assert_array_equal(found.labels, expected.labels)
    other = VolumeModel(model.detector, replace(model.card, aggregation={}))
    assert (other.predict([volume]).anomaly_map != expected.anomaly_map).any()


@pytest.mark.parametrize("name", INTENSITY)
def test_plain_intensity_learns_nothing_from_the_volume(cohort, name, model):
    volume, rest = cohort.prepared(20), cohort.prepared(21)
    images, masks, _ = model.card.slicer.slices_of(rest.volume)
    baseline = IntensityThreshold(**INTENSITY[name]).fit(images, brain_mask=masks)
    threshold = model.card.intensity_thresholds[name]
    expected = predict_volume(baseline, volume, model.card.slicer, threshold=threshold, median_slices=3)
    found = model.predict_from_intensity([volume], name)
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    assert found.components == expected.components


def test_a_single_slice_can_be_judged(cohort, model):
    cut = VolumeSlicer(range_mm=(-0.5, 0.5), shape=(32, 32)).fit([None])
    one = VolumeModel(model.detector, replace(model.card, slicer=cut))
    volume = cohort.prepared(20)
    for prediction in (one.predict([volume]), one.predict_from_intensity([volume], "intensity, bright")):
        assert np.flatnonzero(prediction.anomaly_map.any(axis=(0, 1))).tolist() == [7]


def test_a_scan_is_prepared_as_the_card_says(tmp_path):
    rng = np.random.default_rng(0)
    brain = np.zeros((20, 22, 18), np.uint8)
    brain[4:16, 4:18, 4:14] = 1
    for name in ("t1", "flair"):
        values = rng.uniform(50, 100, brain.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii")
    nib.save(nib.Nifti1Image(brain, np.eye(4)), tmp_path / "brain.nii")
    scan = Scan(
        "01",
        {"T1": tmp_path / "t1.nii", "FLAIR": tmp_path / "flair.nii"},
        brain_mask=tmp_path / "brain.nii",
    )
    preprocessor = VolumePreprocessor(template=False, target=0.3)
    model = VolumeModel(None, ModelCard(contrasts=("FLAIR", "T1"), preprocessor=preprocessor))
    flair, t1 = model.prepare(scan)
    for volume, name in ((flair, "FLAIR"), (t1, "T1")):
        assert volume.source.path == scan.images[name]
        np.testing.assert_array_equal(volume.brain_mask, brain > 0)
        assert np.median(volume.volume.values[volume.brain_mask]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"contrasts must be among those of sub-01, got \['FLAIR'\]"):
        model.prepare(replace(scan, images={"T1": scan.images["T1"]}))


def test_doubts():
    registered = AffineRegistration(np.eye(4), 0.1, 0.97)
    field = np.repeat(np.repeat(np.random.default_rng(0).random((10, 10, 10)), 4, 0), 4, 1).repeat(4, 2)

    def of(tissue, registration=registered):
        volume = read_volume(nib.Nifti1Image(tissue.astype(np.float32), np.eye(4)))
        return PreprocessedVolume(volume, volume, "given", registration)

    healthy = HealthyIntensities()
    for _ in range(3):
        healthy.add(of(0.35 + 0.1 * field))
    card = ModelCard(contrasts=("T1", "FLAIR"), healthy={"T1": healthy})
    model = VolumeModel(None, card)
    right, wrong = of(0.35 + 0.1 * field), of(0.45 - 0.1 * field)
    assert model.doubts([right, right]) == [] == model.doubts([right, wrong])  # nothing is known of FLAIR
    (doubt,) = model.doubts([wrong, right])
    assert doubt.startswith(
        "Intensities unlike those of healthy T1: light and dark tissue differ -1.00 times"
    )
    poor = of(0.35 + 0.1 * field, AffineRegistration(np.eye(4), 0.01, 0.5))
    assert [text[:18] for text in model.doubts([poor, poor])] == ["Poor registration:"] * 2
    assert model.doubts([of(0.45 - 0.1 * field, None), right]) == []


def test_the_hash_is_of_all_that_a_prediction_depends_on(saved, tmp_path):
    before = model_hash(saved)
    assert len(before) == 64 and int(before, 16)
    shutil.copytree(saved, tmp_path / "copy")
    assert model_hash(str(tmp_path / "copy")) == before
    for file in sorted(saved.glob("*.safetensors")):
        arrays = load_file(file)
        name = next(name for name in sorted(arrays) if arrays[name].size)
        content = file.read_bytes()
        save_file(arrays | {name: arrays[name] + np.ones_like(arrays[name])}, file)
        assert model_hash(saved) != before, file
        file.write_bytes(content)
    for name in ("config.json", "calibration.json"):
        text = (saved / name).read_text()
        (saved / name).write_text(text.replace("0.", "0.1", 1))
        assert model_hash(saved) != before, name
        (saved / name).write_text(text)
    card = json.loads((saved / "card.json").read_text())
    for name, value in {
        "preprocessing": card["preprocessing"] | {"target": 0.41},
        "slices": card["slices"] | {"plane": "coronal"},
        "aggregation": {},
        "volume_threshold": 0.5,
        "contrasts": ["T2"],
    }.items():
        (saved / "card.json").write_text(json.dumps(card | {name: value}))
        assert model_hash(saved) != before, name
    (saved / "card.json").write_text(json.dumps(card))
    assert model_hash(saved) == before


def test_metrics_and_readme_do_not_change_the_hash(saved):
    before = model_hash(saved)
    model = VolumeModel.load(saved)
    model.card.metrics["cohort"] = {"auprc": 0.5}
    model.save(saved)
    assert VolumeModel.load(saved).card.metrics == {"cohort": {"auprc": 0.5}}
    (saved / "README.md").write_text("mine")
    assert model_hash(saved) == before


def test_a_model_of_arrays_is_refused(tmp_path):
    X = np.random.default_rng(0).random((6, 16, 16), dtype=np.float32)
    tiny_detector().fit(X).save(tmp_path / "arrays")
    message = "MODEL must know how volumes become slices, got .*arrays, which was fitted to arrays"
    with pytest.raises(ValueError, match=message):
        VolumeModel.load(tmp_path / "arrays")
    MaskedDiffusionAnomalyDetector.load(tmp_path / "arrays")
    with pytest.raises(FileNotFoundError, match="path must be a model directory"):
        VolumeModel.load(tmp_path / "missing")
