"""Samples of five axes: volumes, (n, C, D, H, W)."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import PredefinedSplit, cross_val_score

from madad import LatentAutoencoder
from madad._runtime.random import hold_out
from madad.base.slice_stack import SliceStack
from madad.baselines import IntensityThreshold
from madad.datasets import make_brain_slices
from madad.maps.pooling import pool_map
from madad.metrics import max_dice_scorer
from madad.testing import tiny_autoencoder, tiny_detector

DEPTH = 4


@pytest.fixture(scope="module")
def slices():
    """24 slices of 6 volumes."""
    return make_brain_slices(24, size=32, random_state=0).images


@pytest.fixture(scope="module")
def volumes(slices):
    return slices.reshape(6, 1, DEPTH, 32, 32)


@pytest.fixture(scope="module")
def fitted(volumes):
    return tiny_detector(random_state=0).fit(volumes)


def test_they_are_learnt_from_and_mapped_as_their_slices(fitted, volumes, slices):
    same = tiny_detector(random_state=0).fit(slices[:, None], groups=np.repeat(np.arange(6), DEPTH))
    maps = fitted.predict_maps(volumes)
    assert maps.shape == (6, DEPTH, 32, 32)
    np.testing.assert_array_equal(maps.reshape(24, 32, 32), same.predict_maps(slices[:, None]))
    np.testing.assert_array_equal(
        fitted.restore(volumes), same.restore(slices[:, None]).reshape(6, 1, DEPTH, 32, 32)
    )
    assert fitted.map_threshold_ == same.map_threshold_
    np.testing.assert_array_equal(np.repeat(fitted.calibration_rows_, DEPTH), same.calibration_rows_ // DEPTH)


def test_one_score_and_one_decision_for_each(fitted, volumes):
    maps, scores = fitted.predict_maps(volumes), fitted.score_samples(volumes)
    whole = (maps.reshape(6, -1, 32), (volumes[:, 0] > 0).reshape(6, -1, 32))
    np.testing.assert_allclose(scores, -pool_map(*whole), rtol=1e-6)
    assert fitted.predict(volumes).shape == (6,)
    np.testing.assert_array_equal(fitted.score_samples(volumes[[4]]), scores[[4]])
    healthy = fitted.calibration_rows_
    assert fitted.offset_ == pytest.approx(np.quantile(scores[healthy], 1 - fitted.image_specificity))


def test_channels_stay_channels(slices):
    X = np.stack([slices, slices[:, :, ::-1]], axis=1).reshape(6, DEPTH, 2, 32, 32).swapaxes(1, 2)
    detector = tiny_detector(random_state=0).fit(X)
    assert detector.image_shape_ == (2, 32, 32)
    assert detector.restore(X).shape == X.shape
    seen = detector.predict_maps(np.ascontiguousarray(X[:, :, :2]))  # any depth
    np.testing.assert_array_equal(seen, detector.predict_maps(X)[:, :2])


def test_memory_maps_and_brain_masks(fitted, volumes, tmp_path):
    np.save(tmp_path / "X.npy", volumes)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    np.testing.assert_array_equal(fitted.predict_maps(mapped), fitted.predict_maps(volumes))
    mask = np.zeros((6, DEPTH, 32, 32), bool)
    mask[:, :, 8:24, 8:24] = True
    maps = fitted.predict_maps(volumes, brain_mask=mask)
    assert not maps[~mask].any() and maps[mask].any()
    np.testing.assert_array_equal(fitted.predict_maps(volumes, brain_mask=mask[:, None]), maps)


def test_slices_without_brain_are_not_trained_on(slices, volumes):
    padded = np.concatenate([np.zeros_like(volumes), volumes], axis=2)
    one = tiny_autoencoder(random_state=0).fit(padded)
    other = tiny_autoencoder(random_state=0).fit(volumes)
    np.testing.assert_array_equal(one.transform(slices), other.transform(slices))
    with_empty = tiny_detector(random_state=0).fit(padded)
    without = tiny_detector(random_state=0).fit(volumes)
    np.testing.assert_array_equal(with_empty.predict_maps(slices), without.predict_maps(slices))


def test_groups_are_of_volumes(volumes):
    groups = np.array([0, 0, 0, 1, 1, 1])
    detector = tiny_detector(random_state=0).fit(volumes, groups=groups)
    assert len(set(groups[detector.calibration_rows_])) == 1 and len(detector.calibration_rows_) == 3
    with pytest.raises(ValueError, match=r"groups must have one entry for each of 6 volumes, got 24"):
        tiny_detector().fit(volumes, groups=np.repeat(groups, DEPTH))


def test_volumes_of_one_person_stay_whole():
    """One group alone cannot be split by: volumes are."""
    stack = SliceStack(np.ones((4, 1, 6, 8, 8)), (1, 8, 8), (0.0, 1.0))
    groups = stack.spread(["one"] * 4)
    np.testing.assert_array_equal(groups, np.repeat(np.arange(4), 6))
    train, held_out = hold_out(len(stack), groups, 0.25, 0)
    assert len(held_out) == 6 and not set(stack.samples[train]) & set(stack.samples[held_out])


def test_baselines_take_them_too(volumes):
    baseline = IntensityThreshold(random_state=0).fit(volumes)
    assert baseline.predict_maps(volumes).shape == (6, DEPTH, 32, 32)
    assert baseline.score_samples(volumes).shape == (6,)


def test_cross_validation_by_volume(volumes):
    truth = np.zeros((6, DEPTH, 32, 32), bool)
    truth[4:, 1:3, 12:20, 12:20] = True
    split = PredefinedSplit([-1, -1, -1, -1, 0, 0])
    scores = cross_val_score(
        IntensityThreshold(random_state=0), volumes, truth, cv=split, scoring=max_dice_scorer
    )
    assert scores.shape == (1,) and 0 < scores[0] < 1


def test_what_does_not_fit_is_named(fitted, volumes):
    with pytest.raises(ValueError, match=r"X must have at least 2 samples .* n_samples = 1"):
        clone(fitted).fit(volumes[:1])
    with pytest.raises(ValueError, match=r"brain_mask must have shape \(6, 4, 32, 32\) .*got \(6, 32, 32\)"):
        fitted.predict_maps(volumes, brain_mask=np.ones((6, 32, 32), bool))
    with pytest.raises(ValueError, match=r"X must have slices of shape \(1, 32, 32\)"):
        fitted.predict_maps(volumes[..., :16])
    with pytest.raises(ValueError, match="X must have shape .*depth"):
        fitted.predict_maps(volumes[None])


def test_latents_are_of_slices(volumes, slices):
    autoencoder = LatentAutoencoder("tiny", trainer=tiny_autoencoder().trainer, random_state=0).fit(volumes)
    np.testing.assert_array_equal(autoencoder.transform(volumes), autoencoder.transform(slices[:, None]))
