import numpy as np
import pytest

import madad.volumes.fitting
from madad.baselines import IntensityThreshold
from madad.mri import (
    AffineRegistration,
    HealthyIntensities,
    VolumeSlicer,
)
from madad.testing import tiny_detector
from madad.volumes.fitting import HealthyVolume
from madad.volumes.model import INTENSITY
from madad.volumes.prediction import predict_volume, slices_of_contrasts


@pytest.mark.parametrize("kind", ["one contrast", "two contrasts"])
def test_it_is_the_detector_fitted_to_the_slices_without_lesion(cohort, kind, model, two_contrasts):
    one = kind == "one contrast"
    found, its_read = (model, cohort.read) if one else (two_contrasts, cohort.read_two)
    cut = cohort.slicer().fit([None])
    X, masks, groups, n_left_out = [], [], [], 0
    for i, subject in enumerate(cohort.SUBJECTS):
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
    assert facts["held_out_volumes"] == len(held_out(cohort, found))
    assert facts.get("site") == (None if one else "here")


def held_out(cohort, found):
    """Which volumes the detector held out, from the slices that each has in the range."""
    counts = [
        len(cohort.slicer().fit([None]).slices_of(cohort.read(i).contrasts[0].volume)[0])
        for i in range(len(cohort.SUBJECTS))
    ]
    owners = []
    for i, count in enumerate(counts):
        lesion = cohort.lesion_of(i)
        lost = 0 if lesion is None else np.count_nonzero(lesion.any(axis=(0, 1)))
        owners += [i] * (count - lost)
    return sorted({owners[row] for row in found.detector.calibration_rows_})


def test_no_lesion_falls_between_large_pixels(cohort):
    def read(i):
        lesion = np.zeros(cohort.SHAPE, bool)
        lesion[8 + i // 3, 8 + i % 3, 6] = i < 9
        return HealthyVolume([cohort.prepared(i)], lesion)

    found = cohort.fit(
        read,
        subjects=[str(i) for i in range(12)],
        slicer=VolumeSlicer(spacing_mm=3.0, range_mm=(-10, 8), shape=(16, 16)),
    )
    assert found.card.data["slices_with_lesion_left_out"] == 9


def test_thresholds_of_volumes_come_from_held_out_ones(cohort, model):
    rows, scores, pixels = held_out(cohort, model), [], []
    assert {cohort.SUBJECTS[i] for i in rows}.isdisjoint(
        cohort.SUBJECTS[i] for i in range(8) if i not in rows
    )
    for i in rows:
        if i in cohort.WITH_LESION:
            continue
        volume = cohort.prepared(i)
        prediction = predict_volume(model.detector, volume, model.card.slicer, threshold=0.5, median_slices=3)
        z_mm = volume.volume.affine[2, 2] * np.arange(cohort.SHAPE[2]) - 14
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


def test_only_so_many_volumes_set_the_thresholds(cohort, model, monkeypatch):
    monkeypatch.setattr(madad.volumes.fitting, "MAX_CALIBRATION_VOLUMES", 1)
    assert held_out(cohort, model)[0] in cohort.WITH_LESION  # does not count
    first = next(i for i in held_out(cohort, model) if i not in cohort.WITH_LESION)
    fewer = cohort.fit()
    assert fewer.offset == model.predict([cohort.prepared(first)]).score
    assert fewer.detector.map_threshold_ == model.detector.map_threshold_


def test_without_a_healthy_volume_held_out_those_of_slices_are_used(cohort):
    def all_with_lesion(i):
        lesion = np.zeros(cohort.SHAPE, bool)
        lesion[8:12, 8:12, 5] = True
        return HealthyVolume([cohort.prepared(i)], lesion)

    found = cohort.fit(all_with_lesion)
    assert found.card.volume_threshold is None and found.card.volume_offset is None
    assert (found.threshold, found.offset) == (found.detector.map_threshold_, found.detector.offset_)
    assert found.card.healthy == {}


def test_intensity_has_thresholds_from_the_same_held_out_slices(cohort, model):
    cut, rows = model.card.slicer, held_out(cohort, model)
    parts = []
    for i in rows:
        images, masks, geometry = cut.slices_of(cohort.prepared(i).volume)
        lesion = cohort.lesion_of(i)
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


def test_healthy_intensities_are_of_volumes_without_lesion(cohort, two_contrasts):
    for name, shift in (("T1", 0), ("FLAIR", 100)):
        expected = HealthyIntensities()
        for i in set(range(8)) - cohort.WITH_LESION:
            expected.add(cohort.prepared(i + shift))
        found = two_contrasts.card.healthy[name]
        assert found.n == 6 and found.total.size == 0
        np.testing.assert_allclose(found.deciles, expected.deciles)


def test_contrasts_on_own_grids_that_differ_between_subjects(cohort):
    """The second contrast knows its way to the first, which is not in the template."""
    to_first = AffineRegistration(np.eye(4), 0.2, 0.98)

    def read_other_sizes(i):
        shape = (22, 24 + 2 * (i % 2), 14)
        return HealthyVolume(
            [cohort.prepared(i, shape=shape), cohort.prepared(i + 100, shape=shape, registration=to_first)]
        )

    found = cohort.fit(read_other_sizes, contrasts=("T1", "FLAIR"))
    assert all(healthy.total.size == 0 for healthy in found.card.healthy.values())
    assert found.doubts(read_other_sizes(3).contrasts) == []


def test_the_slicer_learns_as_from_all_volumes_at_once(cohort):
    volumes = [cohort.prepared(i, shape=(22 + 8 * (i % 3), 26, 14 + 4 * i)) for i in range(4)]
    for one in (VolumeSlicer(), VolumeSlicer("coronal", spacing_mm=None), VolumeSlicer(spacing_mm=2.5)):
        expected = VolumeSlicer(**one.get_params()).fit([volume.volume for volume in volumes])
        found = madad.volumes.fitting._fitted(one, iter(volumes))
        assert (found.shape_, found.spacing_mm_) == (expected.shape_, expected.spacing_mm_)


def test_spacings_that_differ_by_rounding_are_the_same(cohort):
    spacings = [(1.0, 1.0 + 1e-6 * i, 2.0) for i in range(3)]
    volumes = (cohort.prepared(i, spacing_mm=spacing) for i, spacing in enumerate(spacings))
    found = madad.volumes.fitting._fitted(VolumeSlicer(spacing_mm=None), volumes)
    assert found.spacing_mm_ == pytest.approx((1.0, 1.0))


def test_volumes_are_seen_one_after_the_other_and_nothing_is_left(cohort, tmp_path):
    seen = []

    def progress(indices, what):
        for i in indices:
            seen.append((what, i))
            yield i

    found = cohort.fit(scratch=tmp_path, progress=progress)
    whats = [what for what, _ in seen]
    assert list(dict.fromkeys(whats)) == ["sizes", "slices", "thresholds"]
    assert [i for what, i in seen if what == "slices"] == list(range(8))
    assert [i for what, i in seen if what == "thresholds"] == [
        i for i in held_out(cohort, found) if i not in cohort.WITH_LESION
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_volumes(cohort, n):
    with pytest.raises(ValueError, match=f"DATA must hold at least 2 healthy volumes.*, got {n}. Add some"):
        cohort.fit(subjects=cohort.SUBJECTS[:n])


def test_lesions_in_all_slices(cohort, tmp_path):
    def read(i):
        return HealthyVolume([cohort.prepared(i)], np.ones(cohort.SHAPE, bool))

    with pytest.raises(ValueError, match="DATA must hold slices without lesion, got 40 with one"):
        cohort.fit(read, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pixels_that_differ(cohort):
    def read(i):
        return HealthyVolume([cohort.prepared(i, spacing_mm=(1.0, 1.0 + i % 2, 2.0))])

    message = (
        r"spacing_mm must be given where volumes differ, got pixels of \[\(1\.0, 1\.0\), \(2\.0, 1\.0\)\]"
    )
    with pytest.raises(ValueError, match=message):
        cohort.fit(read, slicer=VolumeSlicer(spacing_mm=None))


def test_volumes_with_an_empty_lesion_mask_are_healthy(cohort, model):
    def read_with_empty_masks(i):
        return HealthyVolume([cohort.prepared(i)], np.zeros(cohort.SHAPE, bool))

    assert cohort.fit(read_with_empty_masks).card.healthy["T1"].n == len(cohort.SUBJECTS)
    assert model.card.healthy["T1"].n == len(cohort.SUBJECTS) - len(cohort.WITH_LESION)
