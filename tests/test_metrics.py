"""Metrics against slow, obviously right NumPy loops and against scikit-learn."""

import json
import pickle
import re

import numpy as np
import pytest
from scipy import ndimage
from sklearn.base import BaseEstimator
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.model_selection import GridSearchCV

from madad import metrics

SEEDS = range(6)


def random_case(seed, n=7, shape=(6, 5), n_levels=9, dtype=np.float32):
    """Few grey levels, so that ties abound; one slice without a lesion; a brain mask with holes."""
    rng = np.random.default_rng(seed)
    lesion_masks = rng.random((n, *shape)) < 0.2
    lesion_masks[rng.integers(n)] = False
    anomaly_maps = (rng.integers(0, n_levels, (n, *shape)) + 3 * lesion_masks).astype(dtype) / n_levels
    brain_masks = rng.random((n, *shape)) < 0.8
    return lesion_masks, anomaly_maps, brain_masks


def slow_dice_per_image(lesion_masks, anomaly_maps, brain_masks, threshold):
    dice = []
    for lesion, anomaly_map, brain in zip(lesion_masks, anomaly_maps, brain_masks, strict=True):
        truth, predicted = lesion[brain], anomaly_map[brain] >= threshold
        total = truth.sum() + predicted.sum()
        dice.append(2 * (truth & predicted).sum() / total if truth.any() else np.nan)
    return np.array(dice)


# Dice


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_max_dice_per_image_equals_brute_force_over_all_thresholds(seed, dtype):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed, dtype=dtype)
    slow = {
        t: np.nanmean(slow_dice_per_image(lesion_masks, anomaly_maps, brain_masks, t))
        for t in np.unique(anomaly_maps)
    }
    best = metrics.max_dice_per_image(lesion_masks, anomaly_maps, brain_masks)
    assert best.dice == pytest.approx(max(slow.values()), abs=1e-12)
    assert slow[dtype(best.oracle_threshold)] == pytest.approx(best.dice, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_max_dice_per_image_of_continuous_maps(seed):
    rng = np.random.default_rng(seed)
    lesion_masks = rng.random((5, 40)) < 0.3
    anomaly_maps = rng.normal(size=(5, 40)) + lesion_masks
    everywhere = np.ones_like(lesion_masks)
    arrays = (lesion_masks, anomaly_maps, everywhere)
    slow = max(np.nanmean(slow_dice_per_image(*arrays, t)) for t in anomaly_maps.ravel())
    assert metrics.max_dice_per_image(lesion_masks, anomaly_maps).dice == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_max_dice_pooled_equals_brute_force_f1(seed):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed)
    truth, score = lesion_masks[brain_masks], anomaly_maps[brain_masks]
    slow = {t: f1_score(truth, score >= t) for t in np.unique(score)}
    best = metrics.max_dice_pooled(lesion_masks, anomaly_maps, brain_masks)
    assert best.dice == pytest.approx(max(slow.values()), abs=1e-12)
    assert slow[np.float32(best.oracle_threshold)] == pytest.approx(best.dice, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_thresholds", [2, 7, 50])
def test_threshold_grid_equals_brute_force_on_that_grid(seed, n_thresholds):
    lesion_masks, anomaly_maps, brain_masks = arrays = random_case(seed)
    with_lesion = (lesion_masks & brain_masks).any(axis=(1, 2))
    for function, average, counted in [
        (metrics.max_dice_per_image, "image", brain_masks & with_lesion[:, None, None]),
        (metrics.max_dice_pooled, "pooled", brain_masks),
    ]:
        score = anomaly_maps[counted]
        grid = np.linspace(float(score.min()), float(score.max()), n_thresholds).astype(np.float32)
        slow = max(
            metrics.dice_at_threshold(lesion_masks, anomaly_maps, t, brain_masks, average=average)
            for t in grid
        )
        best = function(*arrays, n_thresholds=n_thresholds)
        assert best.dice == pytest.approx(slow, abs=1e-12)
        assert np.isclose(grid, best.oracle_threshold).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_dice_at_a_threshold(seed):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed)
    slow = slow_dice_per_image(lesion_masks, anomaly_maps, brain_masks, np.float32(5 / 9))
    dice = metrics.dice_per_image(lesion_masks, anomaly_maps, 5 / 9, brain_masks)
    np.testing.assert_allclose(dice, slow)
    assert np.isnan(dice).any()
    arguments = (lesion_masks, anomaly_maps, 5 / 9, brain_masks)
    assert metrics.dice_at_threshold(*arguments) == pytest.approx(np.nanmean(slow))
    pooled = f1_score(lesion_masks[brain_masks], anomaly_maps[brain_masks] >= np.float32(5 / 9))
    assert metrics.dice_at_threshold(*arguments, average="pooled") == pytest.approx(pooled)


def test_threshold_is_read_in_the_precision_of_the_maps():
    lesion_masks, anomaly_maps = np.eye(3, dtype=bool)[None], 0.1 * np.eye(3, dtype=np.float32)[None]
    assert metrics.dice_at_threshold(lesion_masks, anomaly_maps, 0.1) == 1
    assert metrics.dice_at_threshold(lesion_masks, anomaly_maps, np.float64(0.1)) == 1
    assert metrics.dice_at_threshold(lesion_masks, anomaly_maps, 1e300) == 0


# Properties


def test_perfect_map_scores_one_everywhere():
    lesion_masks, _, brain_masks = random_case(0)
    perfect = np.where(lesion_masks, 0.75, 0.25)
    results = metrics.evaluate_maps(lesion_masks, perfect, brain_masks, threshold=0.5)
    for key in ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice"):
        assert results[key] == 1
    assert results["oracle_threshold_per_image"] == results["oracle_threshold_pooled"] == 0.75


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", [metrics.max_dice_per_image, metrics.max_dice_pooled])
def test_increasing_transform_moves_the_threshold_but_not_the_dice(seed, function):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed, dtype=np.float64)
    before = function(lesion_masks, anomaly_maps, brain_masks)
    after = function(lesion_masks, np.exp(3 * anomaly_maps) - 7, brain_masks)
    assert after.dice == before.dice
    assert after.oracle_threshold == pytest.approx(np.exp(3 * before.oracle_threshold) - 7)


def test_pixels_outside_the_brain_change_nothing():
    lesion_masks, anomaly_maps, brain_masks = random_case(1)
    border = ((0, 0), (2, 1), (0, 3))
    padded_lesions = np.pad(lesion_masks, border, constant_values=True)
    padded_maps = np.pad(anomaly_maps, border, constant_values=99)
    padded_brain = np.pad(brain_masks, border, constant_values=False)
    padded_maps[:, -1] = np.nan

    def evaluate(lesion_masks, anomaly_maps, brain_masks):
        subjects = [0, 0, 1, 1, 2, 2, 2]
        results = metrics.evaluate_maps(
            lesion_masks, anomaly_maps, brain_masks, subjects=subjects, threshold=0.5
        )
        return results, metrics.lesion_detection(lesion_masks, anomaly_maps, 0.5, brain_masks)

    assert evaluate(padded_lesions, padded_maps, padded_brain) == evaluate(
        lesion_masks, anomaly_maps, brain_masks
    )


def test_slice_without_lesion_counts_in_the_pooled_dice_only():
    lesion_masks, anomaly_maps, _ = random_case(2)
    healthy = np.zeros((1, 6, 5), dtype=bool)
    false_alarm = np.full((1, 6, 5), 5, dtype=np.float32)
    more = np.concatenate([lesion_masks, healthy]), np.concatenate([anomaly_maps, false_alarm])
    assert metrics.max_dice_per_image(*more) == metrics.max_dice_per_image(lesion_masks, anomaly_maps)
    assert metrics.max_dice_pooled(*more).dice < metrics.max_dice_pooled(lesion_masks, anomaly_maps).dice


def test_order_of_the_slices_does_not_matter():
    arrays = random_case(3, n_levels=1000)
    backwards = metrics.max_dice_per_image(*(array[::-1] for array in arrays))
    assert backwards == pytest.approx(metrics.max_dice_per_image(*arrays), abs=1e-12)


@pytest.mark.parametrize("function", [metrics.max_dice_per_image, metrics.max_dice_pooled, metrics.auprc])
def test_volumes_integers_and_flat_arrays_give_the_same(function):
    arrays = random_case(4, shape=(3, 4, 5), dtype=np.float64)
    lesion_masks, anomaly_maps, brain_masks = (array.reshape(7, -1) for array in arrays)
    assert function(lesion_masks.astype(np.uint8), anomaly_maps, brain_masks.astype(int)) == function(*arrays)


def test_inputs_are_left_as_they_were():
    arrays = random_case(5)
    copies = [array.copy() for array in arrays]
    metrics.evaluate_maps(*arrays, threshold=0.5)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


# Ranking metrics


@pytest.mark.parametrize("seed", SEEDS)
def test_auprc_and_auroc_equal_scikit_learn_on_brain_pixels(seed):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed)
    truth, score = lesion_masks[brain_masks], anomaly_maps[brain_masks]
    assert metrics.auprc(lesion_masks, anomaly_maps, brain_masks) == average_precision_score(truth, score)
    assert metrics.auroc(lesion_masks, anomaly_maps, brain_masks) == roc_auc_score(truth, score)


# Lesion-wise counts


def slow_lesion_detection(lesion_masks, predicted_masks, min_size_px, structure):
    n_lesions = n_found = n_detections = n_confirmed = 0
    for lesion, predicted in zip(lesion_masks, predicted_masks, strict=True):
        lesion_labels, n_lesion_labels = ndimage.label(lesion, structure)
        detection_labels, n_detection_labels = ndimage.label(predicted, structure)
        detections = [detection_labels == i for i in range(1, n_detection_labels + 1)]
        detections = [detection for detection in detections if detection.sum() >= min_size_px]
        lesions = [lesion_labels == i for i in range(1, n_lesion_labels + 1)]
        lesions = [component for component in lesions if component.sum() >= min_size_px]
        n_lesions += len(lesions)
        n_detections += len(detections)
        detected = np.any([np.zeros_like(lesion), *detections], axis=0)
        n_found += sum((component & detected).any() for component in lesions)
        n_confirmed += sum((detection & lesion).any() for detection in detections)
    return n_found / n_lesions, n_confirmed / n_detections, n_lesions, n_detections


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("min_size_px", [1, 3])
@pytest.mark.parametrize(("connectivity", "corner"), [(1, 0), (2, 1), (None, 1)])
def test_lesion_detection_equals_a_loop_over_components(seed, min_size_px, connectivity, corner):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed, shape=(15, 15))
    structure = np.array([[corner, 1, corner], [1, 1, 1], [corner, 1, corner]])
    predicted = (anomaly_maps >= 0.8) & brain_masks
    expected = slow_lesion_detection(lesion_masks & brain_masks, predicted, min_size_px, structure)
    found = metrics.lesion_detection(
        lesion_masks, anomaly_maps, 0.8, brain_masks, min_size_px=min_size_px, connectivity=connectivity
    )
    assert found == pytest.approx(expected)


def test_lesion_detection_by_hand():
    lesion_masks, anomaly_maps = np.zeros((2, 8, 8), dtype=bool), np.zeros((2, 8, 8))
    lesion_masks[:, :2, :2] = True  # one lesion in each slice: slices are not joined
    lesion_masks[0, 6:, 6:] = True
    anomaly_maps[0, 1, 1] = anomaly_maps[0, 4, 4] = 1  # one hit, one false alarm, two lesions missed
    assert metrics.lesion_detection(lesion_masks, anomaly_maps, 0.5) == (1 / 3, 1 / 2, 3, 2)
    nothing = metrics.lesion_detection(np.zeros_like(lesion_masks), anomaly_maps, 2.0)
    assert np.isnan(nothing.recall) and np.isnan(nothing.precision)
    assert nothing.n_lesions == nothing.n_detections == 0


# Strata


def masks_of_area(areas, size):
    masks = np.zeros((len(areas), size * size), dtype=bool)
    for mask, area in zip(masks, areas, strict=True):
        mask[:area] = True
    return masks.reshape(-1, size, size)


@pytest.mark.parametrize(("size", "factor"), [(64, 0.25), (128, 1), (256, 4)])
def test_size_strata_scale_with_the_area(size, factor):
    areas = np.array([0, 3, 4, 71, 72, 570, 571]) * max(factor, 1)
    expected = ["none", "none", "small", "small", "medium", "medium", "large"]
    if factor < 1:  # 0.75, 17.75 and 142.5 pixels
        areas = np.array([0, 0, 1, 17, 18, 142, 143])
    np.testing.assert_array_equal(metrics.size_strata(masks_of_area(areas, size)), expected)


def test_size_strata_takes_other_edges_and_reference():
    masks = masks_of_area([1, 2, 5, 9], size=8)
    strata = metrics.size_strata(masks, edges_px=(1, 4, 8), reference_size=8)
    assert strata.tolist() == ["none", "small", "medium", "large"]


# Bootstrap


def test_bootstrap_interval_contains_the_mean_and_follows_the_seed():
    values = np.random.default_rng(0).random(40)
    low, high = metrics.bootstrap_ci(values)
    assert low < values.mean() < high
    assert metrics.bootstrap_ci(values) == (low, high)
    assert metrics.bootstrap_ci(values, random_state=1) != (low, high)
    narrow = metrics.bootstrap_ci(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_of_independent_values_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=400)
    low, high = metrics.bootstrap_ci(values, n_resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.06)


def test_slices_of_one_subject_make_the_interval_wider():
    rng = np.random.default_rng(2)
    subjects = np.repeat([f"sub-{i:02d}" for i in range(10)], 12)
    values = np.repeat(rng.normal(size=10), 12) + 0.1 * rng.normal(size=120)
    low, high = metrics.bootstrap_ci(values)
    low_by_subject, high_by_subject = metrics.bootstrap_ci(values, subjects)
    assert high_by_subject - low_by_subject > 2 * (high - low)
    assert low_by_subject < values.mean() < high_by_subject


def test_bootstrap_by_subject_equals_a_loop_over_the_same_draws():
    rng = np.random.default_rng(3)
    values, subjects = rng.random(9), np.array([5, 5, 5, 2, 2, 9, 9, 9, 9])
    draws = np.random.RandomState(7).multinomial(3, np.full(3, 1 / 3), size=50)
    means = []
    for draw in draws:
        chosen = np.repeat([2, 5, 9], draw)
        means.append(np.concatenate([values[subjects == subject] for subject in chosen]).mean())
    expected = np.quantile(means, [0.05, 0.95])
    interval = metrics.bootstrap_ci(values, subjects, n_resamples=50, confidence=0.9, random_state=7)
    np.testing.assert_allclose(interval, expected)


def test_bootstrap_leaves_out_nan_and_is_undefined_for_one_subject():
    values, subjects = [0.1, np.nan, 0.3, np.nan, 0.7], ["a", "a", "b", "c", "d"]
    assert metrics.bootstrap_ci(values, subjects) == metrics.bootstrap_ci([0.1, 0.3, 0.7])
    assert np.isnan(metrics.bootstrap_ci([0.1, 0.2], ["a", "a"])).all()
    assert np.isnan(metrics.bootstrap_ci([np.nan])).all()


# All together


def test_evaluate_maps_is_plain_and_agrees_with_the_single_functions():
    lesion_masks, anomaly_maps, brain_masks = arrays = random_case(0, n=12)
    subjects = np.repeat(np.arange(6), 2)
    results = metrics.evaluate_maps(*arrays, subjects=subjects, threshold=np.float32(0.5))
    assert json.loads(json.dumps(results)) == results
    assert results["auprc"] == metrics.auprc(*arrays)
    assert results["auroc"] == metrics.auroc(*arrays)
    for kind, best in [
        ("per_image", metrics.max_dice_per_image(*arrays)),
        ("pooled", metrics.max_dice_pooled(*arrays)),
    ]:
        assert (results[f"max_dice_{kind}"], results[f"oracle_threshold_{kind}"]) == best
    dice = metrics.dice_per_image(lesion_masks, anomaly_maps, 0.5, brain_masks)
    assert results["calibrated_dice"] == pytest.approx(np.nanmean(dice))
    assert results["calibrated_dice_ci95"] == list(metrics.bootstrap_ci(dice, subjects))
    assert results["calibrated_threshold"] == 0.5
    for key in ("auprc", "max_dice_per_image", "calibrated_dice"):
        low, high = results[f"{key}_ci95"]
        assert low < results[key] < high
    assert "calibrated_dice" not in metrics.evaluate_maps(*arrays)


@pytest.mark.parametrize("seed", SEEDS)
def test_auprc_interval_equals_scikit_learn_on_repeated_subjects(seed):
    lesion_masks, anomaly_maps, brain_masks = arrays = random_case(seed, n=9, n_levels=40)
    subjects = np.repeat(np.arange(3), 3)
    resampled = []
    for draw in np.random.RandomState(0).multinomial(3, np.full(3, 1 / 3), size=200):
        chosen = np.repeat(np.arange(9), np.repeat(draw, 3))
        kept = brain_masks[chosen]
        resampled.append(average_precision_score(lesion_masks[chosen][kept], anomaly_maps[chosen][kept]))
    expected = np.quantile(resampled, [0.025, 0.975])
    interval = metrics.evaluate_maps(*arrays, subjects=subjects)["auprc_ci95"]
    np.testing.assert_allclose(interval, expected, atol=1e-12)


def test_quantised_auprc_interval_stays_close_to_the_exact_one():
    rng = np.random.default_rng(0)
    lesion_masks = rng.random((10, 60, 60)) < 0.1
    anomaly_maps = rng.normal(size=lesion_masks.shape) + 1.5 * lesion_masks
    pixels = metrics._validated(lesion_masks, anomaly_maps, None)
    exact = metrics._auprc_interval(pixels, np.arange(10), 0)
    coarse = metrics._auprc_interval(pixels, np.arange(10), 0, n_levels=300)
    np.testing.assert_allclose(coarse, exact, atol=5e-3)


def test_one_subject_has_undefined_intervals():
    results = metrics.evaluate_maps(*random_case(0), subjects=["a"] * 7)
    assert np.isnan(results["auprc_ci95"] + results["max_dice_per_image_ci95"]).all()


# Scorers


class FixedMaps(BaseEstimator):
    """An estimator whose maps are powers of its input; higher mean = less normal."""

    def __init__(self, power=1):
        self.power = power

    def fit(self, X, y=None):
        return self

    def predict_maps(self, X):
        return np.asarray(X) ** self.power

    def score_samples(self, X):
        return -np.asarray(X).reshape(len(X), -1).mean(axis=1)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (metrics.max_dice_scorer, lambda y, maps: metrics.max_dice_per_image(y, maps).dice),
        (metrics.pooled_max_dice_scorer, lambda y, maps: metrics.max_dice_pooled(y, maps).dice),
        (metrics.auprc_scorer, metrics.auprc),
    ],
)
def test_map_scorers_take_masks_of_either_shape_and_can_be_pickled(scorer, expected):
    lesion_masks, anomaly_maps, _ = random_case(0)
    scorer = pickle.loads(pickle.dumps(scorer))
    score = expected(lesion_masks, anomaly_maps)
    assert isinstance(score, float)
    assert scorer(FixedMaps(), anomaly_maps, lesion_masks) == score
    assert scorer(FixedMaps(), anomaly_maps, lesion_masks.reshape(7, -1).astype(int)) == score


def test_scorers_drive_a_grid_search():
    lesion_masks, anomaly_maps, _ = random_case(0, n=8)
    scoring = {"dice": metrics.max_dice_scorer, "auprc": metrics.auprc_scorer}
    search = GridSearchCV(FixedMaps(), {"power": [-1, 1]}, scoring=scoring, refit="dice", cv=2)
    search.fit(anomaly_maps + 1, lesion_masks)
    assert search.best_params_ == {"power": 1}  # a falling transform turns the maps upside down


def test_image_auroc_scorer_takes_labels_or_masks():
    lesion_masks, anomaly_maps, _ = random_case(0)
    lesion_masks[:3] = False
    labels = lesion_masks.any(axis=(1, 2))
    expected = roc_auc_score(labels, anomaly_maps.mean(axis=(1, 2)))
    scorer = pickle.loads(pickle.dumps(metrics.image_auroc_scorer))
    for y in (labels, labels.astype(int), lesion_masks, lesion_masks.reshape(7, -1)):
        assert scorer(FixedMaps(), anomaly_maps, y) == pytest.approx(expected)


# Errors: each names the argument, the constraint and the value

LESIONS, MAPS, _ = random_case(0)
HEALTHY = np.zeros_like(LESIONS)
NOT_FINITE = np.where(np.arange(5) == 2, np.inf, MAPS)
MODEL = FixedMaps()


def as_pattern(message):
    """Read "..." as anything in between and every other character as itself."""
    return ".*".join(re.escape(part) for part in message.split("..."))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auprc(LESIONS[:2], MAPS), "lesion_masks must have the shape ... got (2, 6, 5)"),
        (lambda: metrics.auprc(LESIONS, MAPS, LESIONS[0]), "brain_masks must have the ... got (6, 5)"),
        (lambda: metrics.auprc(LESIONS, MAPS[0, 0]), "anomaly_maps must have shape (n, H, W), ... got (5,)"),
        (lambda: metrics.auprc(LESIONS[:0], MAPS[:0]), "anomaly_maps must have ... n > 0, got (0, 6, 5)"),
        (lambda: metrics.auprc(LESIONS, NOT_FINITE), "anomaly_maps must be finite ... got inf in 42 pixels"),
        (lambda: metrics.auprc(LESIONS * 2, MAPS), "lesion_masks must hold only 0 and 1, got the value 2"),
        (lambda: metrics.auprc(LESIONS, MAPS, MAPS), "brain_masks must hold only 0 and 1, got the value 0."),
        (lambda: metrics.auroc(HEALTHY, MAPS), "lesion_masks must have lesion ... got none in 7 slices"),
        (lambda: metrics.auroc(LESIONS, MAPS, LESIONS), "lesion_masks must leave ... got lesion in all 35"),
        (lambda: metrics.max_dice_per_image(HEALTHY, MAPS), "lesion_masks must have ... got none in 7"),
        (lambda: metrics.max_dice_per_image(LESIONS, MAPS, n_thresholds=0), "n_thresholds must ... got 0"),
        (lambda: metrics.max_dice_pooled(LESIONS, MAPS, n_thresholds=1), "n_thresholds must be ... got 1"),
        (lambda: metrics.dice_per_image(LESIONS, MAPS, np.nan), "threshold must not be NaN, got nan"),
        (lambda: metrics.dice_at_threshold(LESIONS, MAPS, 0, average="x"), "average must be ... got 'x'"),
        (lambda: metrics.dice_at_threshold(HEALTHY, MAPS, 0), "lesion_masks must have ... got none in 7"),
        (lambda: metrics.lesion_detection(LESIONS, MAPS, 0, min_size_px=0), "min_size_px must ... got 0"),
        (lambda: metrics.lesion_detection(LESIONS, MAPS, 0, connectivity=3), "connectivity must ... got 3"),
        (lambda: metrics.size_strata(LESIONS[0]), "lesion_masks must have shape (n, H, W), got (6, 5)"),
        (lambda: metrics.size_strata(LESIONS, edges_px=(3, 2, 9)), "edges_px must ... got (3, 2, 9)"),
        (lambda: metrics.size_strata(LESIONS, reference_size=0), "reference_size must ... got 0"),
        (lambda: metrics.bootstrap_ci([[1.0]]), "values must be a 1-d finite array, got shape (1, 1)"),
        (lambda: metrics.bootstrap_ci([np.inf, 1]), "values must be a 1-d finite array, got inf"),
        (lambda: metrics.bootstrap_ci([1, 2], [1]), "subjects must have shape (2,), got (1,)"),
        (lambda: metrics.bootstrap_ci([1, 2], n_resamples=0), "n_resamples must be at least 1, got 0"),
        (lambda: metrics.bootstrap_ci([1, 2], confidence=95), "confidence must lie between ... got 95"),
        (lambda: metrics.evaluate_maps(LESIONS, MAPS, subjects=[1]), "subjects must have ... (7,), got (1,)"),
        (lambda: metrics.max_dice_scorer(MODEL, MAPS, LESIONS[0]), "y must hold one ... got shape (6, 5)"),
        (lambda: metrics.image_auroc_scorer(MODEL, MAPS, [1] * 7), "y must hold both ... got 7 anomalies"),
        (lambda: metrics.image_auroc_scorer(MODEL, MAPS, [-1, 1]), "y must hold only ... got the value -1"),
    ],
)
def test_wrong_values_raise_value_errors(call, message):
    with pytest.raises(ValueError, match=as_pattern(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auprc(LESIONS, MAPS.astype(str)), "anomaly_maps must hold real ... got dtype <U32"),
        (lambda: metrics.auprc(LESIONS * 1j, MAPS), "lesion_masks must hold bool... got dtype complex128"),
        (lambda: metrics.dice_per_image(LESIONS, MAPS, None), "threshold must be a number, got None"),
    ],
)
def test_wrong_types_raise_type_errors(call, message):
    with pytest.raises(TypeError, match=as_pattern(message)):
        call()
