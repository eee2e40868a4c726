"""Scores, thresholds and decisions of a detector whose map is the slice itself."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from madad._runtime.tensors import to_network
from madad.base.map_detector import AnomalyMapDetector

RNG = np.random.default_rng(0)
HEALTHY = np.where(RNG.random((40, 12, 10)) < 0.8, RNG.uniform(0.01, 0.5, (40, 12, 10)), 0).astype(np.float32)
SICK = HEALTHY[:5].copy()
SICK[:, 4:8, 4:8] = 0.9


class Itself(AnomalyMapDetector):
    """Its map is ``gain`` times the first channel; ``shift`` matters only with a gain of 1."""

    def __init__(
        self,
        gain=1.0,
        shift=0.0,
        contamination="auto",
        image_specificity=0.95,
        pixel_specificity=0.99,
        calibration_fraction=0.25,
        image_shape=None,
        intensity_range=(0.0, 1.0),
    ):
        self.gain = gain
        self.shift = shift
        self.contamination = contamination
        self.image_specificity = image_specificity
        self.pixel_specificity = pixel_specificity
        self.calibration_fraction = calibration_fraction
        self.image_shape = image_shape
        self.intensity_range = intensity_range

    def fit(self, X, y=None, *, brain_mask=None, groups=None):
        stack = self._check_fit_slices(X, brain_mask)
        self._check_calibration(stack)
        self._calibrate(stack, np.arange(len(stack)))
        return self

    def _map_settings(self):
        return {"gain": self.gain, "shift": self.shift}

    def _without_effect(self, settings):
        return () if settings["gain"] == 1 else ("shift",)

    def _map_batches(self, stack):
        for start in range(0, len(stack), 7):
            rows = np.arange(start, min(start + 7, len(stack)))
            brain = stack.brain(rows)[:, 0]
            yield start, np.where(brain, self.gain * stack.images(rows)[:, 0], 0), brain


def pooled(images):
    """The mean of the largest hundredth of each brain, at least of one pixel."""
    inside = [np.sort(image[image > 0])[::-1] for image in images]
    return np.array([values[: max(1, round(len(values) / 100))].mean(dtype=np.float64) for values in inside])


def test_thresholds_are_quantiles_of_healthy_pixels_and_pooled_maps():
    detector = Itself(image_specificity=0.9, pixel_specificity=0.97).fit(HEALTHY)
    quantile = np.quantile(HEALTHY[HEALTHY > 0], 0.97)
    assert quantile < detector.map_threshold_ <= np.nextafter(np.float32(quantile), np.float32(2))
    assert detector.offset_ == pytest.approx(-np.quantile(pooled(HEALTHY), 0.9))


def test_scores_decisions_and_masks_follow_from_the_maps():
    detector = Itself().fit(HEALTHY)
    np.testing.assert_array_equal(detector.predict_maps(SICK), SICK)
    np.testing.assert_allclose(detector.score_samples(SICK), -pooled(SICK))
    np.testing.assert_allclose(detector.decision_function(SICK), -pooled(SICK) - detector.offset_)
    np.testing.assert_array_equal(detector.predict_masks(SICK), np.float32(detector.map_threshold_) <= SICK)
    assert (detector.predict(SICK) == -1).all()
    assert np.mean(detector.predict(HEALTHY) == 1) == pytest.approx(0.95)
    np.testing.assert_array_equal(Itself().fit_predict(HEALTHY), detector.predict(HEALTHY))


def test_a_pixel_at_the_threshold_is_in_the_mask():
    detector = Itself().fit(HEALTHY)
    at = np.float32(detector.map_threshold_)
    X = np.zeros((1, 12, 10), np.float32)
    X[0, 0, :3] = np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))
    np.testing.assert_array_equal(detector.predict_masks(X)[0, 0, :4], [False, True, True, False])


def test_contamination_is_the_share_of_the_given_slices_that_are_anomalous():
    detector = Itself(contamination=0.2).fit(HEALTHY)
    assert np.mean(detector.predict(HEALTHY) == -1) == pytest.approx(0.2)


def test_no_slice_is_mapped_twice_for_the_thresholds():
    mapped = []

    class Counting(Itself):
        def _map_batches(self, stack):
            mapped.extend(stack.samples)
            return super()._map_batches(stack)

    detector = Counting(contamination=0.2).fit(HEALTHY)
    assert sorted(mapped) == list(range(len(HEALTHY)))
    held_out = np.arange(3, 20)
    before, mapped[:] = (detector.offset_, detector.map_threshold_), []
    detector._calibrate(detector._check_slices(HEALTHY, None), held_out)
    assert sorted(mapped) == list(range(len(HEALTHY)))
    assert detector.offset_ == before[0]  # of all slices
    assert detector.map_threshold_ == Itself().fit(HEALTHY[held_out]).map_threshold_ != before[1]


@pytest.mark.parametrize(
    "parameters", [{"contamination": 0.9}, {"image_specificity": 2.0}, {"pixel_specificity": -1}]
)
def test_calibration_refuses_what_fit_refuses_and_leaves_the_thresholds(parameters):
    detector = Itself().fit(HEALTHY)
    before = detector.offset_, detector.map_threshold_
    (name,) = parameters
    with pytest.raises(ValueError, match=f"^{name} must "):
        detector.set_params(**parameters).calibrate(HEALTHY[:9])
    assert (detector.offset_, detector.map_threshold_) == before


def test_a_changed_map_is_warned_of_until_it_is_calibrated():
    detector = Itself().fit(HEALTHY).set_params(gain=0.5)
    for method in (detector.predict, detector.decision_function, detector.predict_masks):
        with pytest.warns(UserWarning, match=r"calibrated with \{'gain': 1.0\}, now \{'gain': 0.5\}"):
            method(SICK)
    detector.calibrate(HEALTHY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (detector.predict(SICK) == -1).all()
        detector.set_params(shift=3.0).predict(SICK)  # without effect as the gain is


def test_flat_rows_come_back_flat():
    detector = Itself(image_shape=(12, 10)).fit(HEALTHY.reshape(40, -1))
    assert detector.predict_maps(SICK.reshape(5, -1)).shape == (5, 120)
    stack = detector._check_slices(SICK.reshape(5, -1))
    images, brain = to_network(SICK[:, None], torch.device("cpu")).numpy(), SICK > 0
    parts = ((images[rows], brain[rows]) for rows in ([0, 1], [2, 3, 4]))
    joined = detector._joined(stack, np.arange(5), parts)
    np.testing.assert_allclose(joined, SICK.reshape(5, -1), atol=1e-6)


def test_joined_images_are_clipped_and_empty_outside_the_brain():
    detector = Itself().fit(HEALTHY)
    stack, shown = detector._check_slices(SICK), np.array([1, 2, 4])
    joined = detector._joined(stack, shown, [(np.full((3, 1, 12, 10), 3.0), SICK[shown] > 0)])
    np.testing.assert_array_equal(joined[shown], (SICK[shown] > 0).astype(np.float32))
    assert not joined[[0, 3]].any()  # rows that were not shown


def test_before_fit_nothing_is_predicted_and_a_pickle_decides_as_before():
    for method in ("predict", "predict_maps", "score_samples", "calibrate"):
        with pytest.raises(NotFittedError):
            getattr(Itself(), method)(SICK)
    detector = Itself().fit(HEALTHY)
    copied = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(copied.decision_function(SICK), detector.decision_function(SICK))


@pytest.mark.parametrize(
    ("parameters", "rows", "words"),
    [
        ({"contamination": 0.7}, 40, ["contamination must be 'auto' or in (0, 0.5]", "0.7", "Use 'auto'"]),
        ({"image_specificity": 1.0}, 40, ["image_specificity must lie between 0 and 1", "1.0", "Use 0.95"]),
        ({"pixel_specificity": 0}, 40, ["pixel_specificity must lie between 0 and 1", "got 0", "Use 0.99"]),
        ({"calibration_fraction": -1}, 40, ["calibration_fraction must lie", "-1", "Use 0.15"]),
        ({}, 1, ["X must have at least 2 samples", "n_samples = 1", "Add healthy ones"]),
    ],
)
def test_what_no_threshold_can_be_set_with_is_refused(parameters, rows, words):
    with pytest.raises(ValueError) as error:
        Itself(**parameters).fit(HEALTHY[:rows])
    for word in words:
        assert word in str(error.value)
