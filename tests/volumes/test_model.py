import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import madad.volumes.model
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
from madad.volumes.fitting import HealthyVolume, fit_volumes
from madad.volumes.model import INTENSITY, VolumeModel, model_hash
from madad.volumes.prediction import predict_volume, slices_of_contrasts

SHAPE = (22, 26, 14)
SUBJECTS = ("a", "b", "c", "d", "d", "e", "f", "g")
WITH_LESION = {1, 5}
PREPROCESSOR = VolumePreprocessor(template=False, center=None)


def prepared(seed, *, spacing_mm=(1.0, 1.0, 2.0), shape=SHAPE, registration=None):
    """A brain of noise around 0.4, a little larger or smaller than others."""
    rng = np.random.default_rng(seed)
    values = np.zeros(shape, np.float32)
    inside = tuple(slice(2 + seed % 2, n - 2) for n in shape)
    values[inside] = rng.uniform(0.2, 0.6, values[inside].shape)
    affine = np.diag([*spacing_mm, 1.0])
    affine[2, 3] = -14
    volume = read_volume(nib.Nifti1Image(values, affine))
    return PreprocessedVolume(volume, volume, "given", registration)


def lesion_of(seed):
    if seed not in WITH_LESION:
        return None
    lesion = np.zeros(SHAPE, bool)
    lesion[8:12, 8:12, 4 + seed % 3 : 7] = True
    return lesion


def read(i):
    return HealthyVolume([prepared(i)], lesion_of(i))


def read_two(i):
    return HealthyVolume([prepared(i), prepared(i + 100)], lesion_of(i))


def slicer():
    return VolumeSlicer(range_mm=(-4, 4), shape=(32, 32))


def fit(read=read, subjects=SUBJECTS, detector=None, **changed):
    defaults = {
        "contrasts": ("T1",),
        "preprocessor": PREPROCESSOR,
        "slicer": slicer(),
        "aggregation": {"median_slices": 3},
    }
    detector = tiny_detector(calibration_fraction=0.4) if detector is None else detector
    return fit_volumes(detector, subjects, read, **(defaults | changed))


@pytest.fixture(scope="module")
def model():
    return fit()


@pytest.fixture(scope="module")
def two_contrasts():
    return fit(read_two, contrasts=("T1", "FLAIR"), data={"site": "here"})


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


# Training


@pytest.mark.parametrize("kind", ["one contrast", "two contrasts"])
def test_it_is_the_detector_fitted_to_the_slices_without_lesion(kind, model, two_contrasts):
    one = kind == "one contrast"
    found, its_read = (model, read) if one else (two_contrasts, read_two)
    cut = slicer().fit([None])
    X, masks, groups, n_left_out = [], [], [], 0
    for i, subject in enumerate(SUBJECTS):
        volume = its_read(i)
        images, brains, geometry = slices_of_contrasts(cut, volume.contrasts)
        for k in range(len(images)):
            place = round((geometry.positions_mm[k] + 14) / 2)
            if volume.lesion_mask is not None and volume.lesion_mask[:, :, place].any():
                n_left_out += 1
                continue
            X.append(images[k])
            masks.append(brains[k])
            groups.append(subject)
    by_hand = tiny_detector(calibration_fraction=0.4).fit(
        np.stack(X), brain_mask=np.stack(masks), groups=groups
    )
    X, masks = np.stack(X[:5]), np.stack(masks[:5])
    np.testing.assert_array_equal(
        found.detector.predict_maps(X, brain_mask=masks), by_hand.predict_maps(X, brain_mask=masks)
    )
    assert found.detector.map_threshold_ == by_hand.map_threshold_
    assert found.detector.offset_ == by_hand.offset_
    assert n_left_out == 3
    facts = found.card.data
    assert facts["slices_with_lesion_left_out"] == n_left_out and facts["slices"] == len(groups)
    assert facts["subjects"] == 7 and facts["volumes"] == 8
    assert facts["held_out_volumes"] == len(held_out(found))
    assert facts.get("site") == (None if one else "here")


def held_out(found):
    """Which volumes the detector held out, from the slices that each has in the range."""
    counts = [
        len(slicer().fit([None]).slices_of(read(i).contrasts[0].volume)[0]) for i in range(len(SUBJECTS))
    ]
    owners = []
    for i, count in enumerate(counts):
        lesion = lesion_of(i)
        lost = 0 if lesion is None else np.count_nonzero(lesion.any(axis=(0, 1)))
        owners += [i] * (count - lost)
    return sorted({owners[row] for row in found.detector.calibration_rows_})


def test_no_lesion_falls_between_large_pixels():
    def read(i):
        lesion = np.zeros(SHAPE, bool)
        lesion[8 + i // 3, 8 + i % 3, 6] = i < 9
        return HealthyVolume([prepared(i)], lesion)

    found = fit(
        read,
        subjects=[str(i) for i in range(12)],
        slicer=VolumeSlicer(spacing_mm=3.0, range_mm=(-10, 8), shape=(16, 16)),
    )
    assert found.card.data["slices_with_lesion_left_out"] == 9


def test_thresholds_of_volumes_come_from_held_out_ones(model):
    rows, scores, pixels = held_out(model), [], []
    assert {SUBJECTS[i] for i in rows}.isdisjoint(SUBJECTS[i] for i in range(8) if i not in rows)
    for i in rows:
        if i in WITH_LESION:
            continue
        volume = prepared(i)
        prediction = predict_volume(model.detector, volume, model.card.slicer, threshold=0.5, median_slices=3)
        z_mm = volume.volume.affine[2, 2] * np.arange(SHAPE[2]) - 14
        in_range = (z_mm >= -4) & (z_mm <= 4)
        assert not prediction.anomaly_map[:, :, ~in_range].any()
        scores.append(prediction.score)
        pixels.append(prediction.anomaly_map[:, :, in_range][volume.brain_mask[:, :, in_range]])
    pixels = np.concatenate(pixels)
    expected = np.nextafter(np.float32(np.quantile(pixels, 0.99)), np.float32(np.inf))
    assert len(scores) >= 2
    assert model.threshold == model.card.volume_threshold == expected
    assert model.offset == model.card.volume_offset == pytest.approx(np.quantile(scores, 0.05), rel=1e-12)
    assert 0.005 < np.mean(pixels >= np.float32(model.threshold)) < 0.0105


def test_only_so_many_volumes_set_the_thresholds(model, monkeypatch):
    monkeypatch.setattr(madad.volumes.model, "MAX_CALIBRATION_VOLUMES", 1)
    assert held_out(model)[0] in WITH_LESION  # does not count
    first = next(i for i in held_out(model) if i not in WITH_LESION)
    fewer = fit()
    assert fewer.offset == model.predict([prepared(first)]).score
    assert fewer.detector.map_threshold_ == model.detector.map_threshold_


def test_without_a_healthy_volume_held_out_those_of_slices_are_used():
    def all_with_lesion(i):
        lesion = np.zeros(SHAPE, bool)
        lesion[8:12, 8:12, 5] = True
        return HealthyVolume([prepared(i)], lesion)

    found = fit(all_with_lesion)
    assert found.card.volume_threshold is None and found.card.volume_offset is None
    assert (found.threshold, found.offset) == (found.detector.map_threshold_, found.detector.offset_)
    assert found.card.healthy == {}


def test_intensity_has_thresholds_from_the_same_held_out_slices(model):
    cut, rows = model.card.slicer, held_out(model)
    parts = []
    for i in rows:
        images, masks, geometry = cut.slices_of(prepared(i).volume)
        lesion = lesion_of(i)
        kept = np.ones(len(images), bool)
        if lesion is not None:
            kept = ~geometry.to_slices(lesion).any(axis=(1, 2))
        parts.append((images[kept], masks[kept]))
    images, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert set(model.card.intensity_thresholds) == set(INTENSITY)
    for name, parameters in INTENSITY.items():
        baseline = IntensityThreshold(**parameters).fit(images, brain_mask=masks)
        expected = baseline.calibrate(images, brain_mask=masks).map_threshold_
        assert model.card.intensity_thresholds[name] == expected


def test_healthy_intensities_are_of_volumes_without_lesion(two_contrasts):
    for name, shift in (("T1", 0), ("FLAIR", 100)):
        expected = HealthyIntensities()
        for i in set(range(8)) - WITH_LESION:
            expected.add(prepared(i + shift))
        found = two_contrasts.card.healthy[name]
        assert found.n == 6 and found.total.size == 0
        np.testing.assert_allclose(found.deciles, expected.deciles)


def test_contrasts_on_own_grids_that_differ_between_subjects():
    """The second contrast knows its way to the first, which is not in the template."""
    to_first = AffineRegistration(np.eye(4), 0.2, 0.98)

    def read_other_sizes(i):
        shape = (22, 24 + 2 * (i % 2), 14)
        return HealthyVolume(
            [prepared(i, shape=shape), prepared(i + 100, shape=shape, registration=to_first)]
        )

    found = fit(read_other_sizes, contrasts=("T1", "FLAIR"))
    assert all(healthy.total.size == 0 for healthy in found.card.healthy.values())
    assert found.doubts(read_other_sizes(3).contrasts) == []


def test_the_slicer_learns_as_from_all_volumes_at_once():
    volumes = [prepared(i, shape=(22 + 8 * (i % 3), 26, 14 + 4 * i)) for i in range(4)]
    for one in (VolumeSlicer(), VolumeSlicer("coronal", spacing_mm=None), VolumeSlicer(spacing_mm=2.5)):
        expected = VolumeSlicer(**one.get_params()).fit([volume.volume for volume in volumes])
        found = madad.volumes.fitting._fitted(one, iter(volumes))
        assert (found.shape_, found.spacing_mm_) == (expected.shape_, expected.spacing_mm_)


def test_spacings_that_differ_by_rounding_are_the_same():
    spacings = [(1.0, 1.0 + 1e-6 * i, 2.0) for i in range(3)]
    volumes = (prepared(i, spacing_mm=spacing) for i, spacing in enumerate(spacings))
    found = madad.volumes.fitting._fitted(VolumeSlicer(spacing_mm=None), volumes)
    assert found.spacing_mm_ == pytest.approx((1.0, 1.0))


def test_volumes_are_seen_one_after_the_other_and_nothing_is_left(tmp_path):
    seen = []

    def progress(indices, what):
        for i in indices:
            seen.append((what, i))
            yield i

    found = fit(scratch=tmp_path, progress=progress)
    whats = [what for what, _ in seen]
    assert list(dict.fromkeys(whats)) == ["sizes", "slices", "thresholds"]
    assert [i for what, i in seen if what == "slices"] == list(range(8))
    assert [i for what, i in seen if what == "thresholds"] == [
        i for i in held_out(found) if i not in WITH_LESION
    ]
    assert list(tmp_path.iterdir()) == []


# Predicting


@pytest.mark.parametrize("kind", ["one contrast", "two contrasts"])
def test_a_saved_model_predicts_the_same(kind, model, two_contrasts, tmp_path):
    found, its_read = (model, read) if kind == "one contrast" else (two_contrasts, read_two)
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


def test_aggregation_and_threshold_are_the_cards(model):
    volume = prepared(20)
    expected = predict_volume(
        model.detector, volume, model.card.slicer, threshold=model.threshold, median_slices=3
    )
    found = model.predict([volume])
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    np.testing.assert_array_equal(found.labels, expected.labels)
    other = VolumeModel(model.detector, replace(model.card, aggregation={}))
    assert (other.predict([volume]).anomaly_map != expected.anomaly_map).any()


@pytest.mark.parametrize("name", INTENSITY)
def test_plain_intensity_learns_nothing_from_the_volume(name, model):
    volume, rest = prepared(20), prepared(21)
    images, masks, _ = model.card.slicer.slices_of(rest.volume)
    baseline = IntensityThreshold(**INTENSITY[name]).fit(images, brain_mask=masks)
    threshold = model.card.intensity_thresholds[name]
    expected = predict_volume(baseline, volume, model.card.slicer, threshold=threshold, median_slices=3)
    found = model.predict_from_intensity([volume], name)
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    assert found.components == expected.components


def test_a_single_slice_can_be_judged(model):
    cut = VolumeSlicer(range_mm=(-0.5, 0.5), shape=(32, 32)).fit([None])
    one = VolumeModel(model.detector, replace(model.card, slicer=cut))
    volume = prepared(20)
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


# Which model it was


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


# What cannot be used


def test_a_model_of_arrays_is_refused(tmp_path):
    X = np.random.default_rng(0).random((6, 16, 16), dtype=np.float32)
    tiny_detector().fit(X).save(tmp_path / "arrays")
    message = "MODEL must know how volumes become slices, got .*arrays, which was fitted to arrays"
    with pytest.raises(ValueError, match=message):
        VolumeModel.load(tmp_path / "arrays")
    MaskedDiffusionAnomalyDetector.load(tmp_path / "arrays")
    with pytest.raises(FileNotFoundError, match="path must be a model directory"):
        VolumeModel.load(tmp_path / "missing")


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_volumes(n):
    with pytest.raises(ValueError, match=f"DATA must hold at least 2 healthy volumes.*, got {n}. Add some"):
        fit(subjects=SUBJECTS[:n])


def test_lesions_in_all_slices(tmp_path):
    def read(i):
        return HealthyVolume([prepared(i)], np.ones(SHAPE, bool))

    with pytest.raises(ValueError, match="DATA must hold slices without lesion, got 40 with one"):
        fit(read, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pixels_that_differ():
    def read(i):
        return HealthyVolume([prepared(i, spacing_mm=(1.0, 1.0 + i % 2, 2.0))])

    message = (
        r"spacing_mm must be given where volumes differ, got pixels of \[\(1\.0, 1\.0\), \(2\.0, 1\.0\)\]"
    )
    with pytest.raises(ValueError, match=message):
        fit(read, slicer=VolumeSlicer(spacing_mm=None))


def test_volumes_with_an_empty_lesion_mask_are_healthy():
    def read_with_empty_masks(i):
        return HealthyVolume([prepared(i)], np.zeros(SHAPE, bool))

    assert fit(read_with_empty_masks).card.healthy["T1"].n == len(SUBJECTS)
    assert fit().card.healthy["T1"].n == len(SUBJECTS) - len(WITH_LESION)
