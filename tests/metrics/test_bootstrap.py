import numpy as np
import pytest

from madad import metrics
from madad.metrics.bootstrap import auprc_interval, ratio_interval


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


def test_auprc_interval_equals_a_loop_over_the_same_draws():
    rng = np.random.default_rng(4)
    lesion_pixels = np.cumsum(rng.integers(0, 5, (6, 20)), axis=1)
    pixels = lesion_pixels + np.cumsum(rng.integers(0, 9, (6, 20)), axis=1)
    codes = np.array([0, 1, 1, 2, 2, 2])
    areas = []
    for draw in np.random.RandomState(3).multinomial(3, np.full(3, 1 / 3), size=50):
        true, predicted = draw[codes] @ lesion_pixels, draw[codes] @ pixels
        areas.append(np.diff(true, prepend=0) @ (true / np.maximum(predicted, 1)) / true[-1])
    blocks = [(codes[rows], lesion_pixels[rows], pixels[rows]) for rows in (slice(0, 2), slice(2, 6))]
    interval = auprc_interval(iter(blocks), 3, 3, n_resamples=50)
    np.testing.assert_allclose(interval, np.quantile(areas, [0.025, 0.975]))
    assert np.isnan(auprc_interval(iter(blocks), 1, 3)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.bootstrap_ci([[1.0]]),
            "values must be a 1-d finite array, got shape (1, 1)",
        ),
        (
            lambda lesions, maps: metrics.bootstrap_ci([np.inf, 1]),
            "values must be a 1-d finite array, got inf",
        ),
        (lambda lesions, maps: metrics.bootstrap_ci([1, 2], [1]), "subjects must have shape (2,), got (1,)"),
        (
            lambda lesions, maps: metrics.bootstrap_ci([1, 2], n_resamples=0),
            "n_resamples must be at least 1, got 0",
        ),
        (
            lambda lesions, maps: metrics.bootstrap_ci([1, 2], confidence=95),
            "confidence must lie between ... got 95",
        ),
    ],
)
def test_wrong_values_raise_value_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(ValueError, match=as_pattern(message)):
        call(lesions, maps)


def test_ratio_interval_equals_a_loop_over_the_same_draws():
    rng = np.random.default_rng(5)
    numerators, denominators = rng.random(7), 1 + rng.random(7)
    codes = np.array([0, 0, 1, 2, 2, 2, 3])
    ratios = []
    for draw in np.random.RandomState(11).multinomial(4, np.full(4, 1 / 4), size=60):
        rows = np.concatenate([np.repeat(np.flatnonzero(codes == s), k) for s, k in enumerate(draw)])
        ratios.append(numerators[rows].sum() / denominators[rows].sum())
    assert ratio_interval(numerators, denominators, codes, 11, n_resamples=60) == pytest.approx(
        tuple(np.quantile(ratios, [0.025, 0.975]))
    )


def test_the_pooled_interval_holds_the_pooled_dice():
    rng = np.random.default_rng(6)
    truth = rng.random((20, 8, 8)) < 0.3
    maps = truth + rng.normal(size=truth.shape)
    result = metrics.evaluate_maps(truth, maps)
    low, high = result["max_dice_pooled_ci95"]
    assert low < result["max_dice_pooled"] < high
