import numpy as np
import pytest
from sklearn.metrics import f1_score

from madad import metrics


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_max_dice_per_image_equals_brute_force_over_all_thresholds(
    seed, dtype, random_case, slow_dice_per_image
):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed, dtype=dtype)
    slow = {
        t: np.nanmean(slow_dice_per_image(lesion_masks, anomaly_maps, brain_masks, t))
        for t in np.unique(anomaly_maps)
    }
    best = metrics.max_dice_per_image(lesion_masks, anomaly_maps, brain_masks)
    assert best.dice == pytest.approx(max(slow.values()), abs=1e-12)
    assert slow[dtype(best.oracle_threshold)] == pytest.approx(best.dice, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_max_dice_per_image_of_continuous_maps(seed, slow_dice_per_image):
    rng = np.random.default_rng(seed)
    lesion_masks = rng.random((5, 40)) < 0.3
    anomaly_maps = rng.normal(size=(5, 40)) + lesion_masks
    everywhere = np.ones_like(lesion_masks)
    arrays = (lesion_masks, anomaly_maps, everywhere)
    slow = max(np.nanmean(slow_dice_per_image(*arrays, t)) for t in anomaly_maps.ravel())
    assert metrics.max_dice_per_image(lesion_masks, anomaly_maps).dice == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_max_dice_pooled_equals_brute_force_f1(seed, random_case):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed)
    truth, score = lesion_masks[brain_masks], anomaly_maps[brain_masks]
    slow = {t: f1_score(truth, score >= t) for t in np.unique(score)}
    best = metrics.max_dice_pooled(lesion_masks, anomaly_maps, brain_masks)
    assert best.dice == pytest.approx(max(slow.values()), abs=1e-12)
    assert slow[np.float32(best.oracle_threshold)] == pytest.approx(best.dice, abs=1e-12)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n_thresholds", [2, 7, 50])
def test_threshold_grid_equals_brute_force_on_that_grid(seed, n_thresholds, random_case):
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


@pytest.mark.parametrize("seed", range(2))
def test_dice_at_a_threshold(seed, random_case, slow_dice_per_image):
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


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("function", [metrics.max_dice_per_image, metrics.max_dice_pooled])
def test_increasing_transform_moves_the_threshold_but_not_the_dice(seed, function, random_case):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed, dtype=np.float64)
    before = function(lesion_masks, anomaly_maps, brain_masks)
    after = function(lesion_masks, np.exp(3 * anomaly_maps) - 7, brain_masks)
    assert after.dice == before.dice
    assert after.oracle_threshold == pytest.approx(np.exp(3 * before.oracle_threshold) - 7)


def test_slice_without_lesion_counts_in_the_pooled_dice_only(random_case):
    lesion_masks, anomaly_maps, _ = random_case(2)
    healthy = np.zeros((1, 6, 5), dtype=bool)
    false_alarm = np.full((1, 6, 5), 5, dtype=np.float32)
    more = np.concatenate([lesion_masks, healthy]), np.concatenate([anomaly_maps, false_alarm])
    assert metrics.max_dice_per_image(*more) == metrics.max_dice_per_image(lesion_masks, anomaly_maps)
    assert metrics.max_dice_pooled(*more).dice < metrics.max_dice_pooled(lesion_masks, anomaly_maps).dice


def test_order_of_the_slices_does_not_matter(random_case):
    arrays = random_case(3, n_levels=1000)
    backwards = metrics.max_dice_per_image(*(array[::-1] for array in arrays))
    assert backwards == pytest.approx(metrics.max_dice_per_image(*arrays), abs=1e-12)


@pytest.mark.parametrize("function", [metrics.max_dice_per_image, metrics.max_dice_pooled, metrics.auprc])
def test_volumes_integers_and_flat_arrays_give_the_same(function, random_case):
    arrays = random_case(4, shape=(3, 4, 5), dtype=np.float64)
    lesion_masks, anomaly_maps, brain_masks = (array.reshape(7, -1) for array in arrays)
    assert function(lesion_masks.astype(np.uint8), anomaly_maps, brain_masks.astype(int)) == function(*arrays)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.max_dice_per_image(lesions & False, maps),
            "lesion_masks must have ... got none in 7",
        ),
        (
            lambda lesions, maps: metrics.max_dice_per_image(lesions, maps, n_thresholds=0),
            "n_thresholds must ... got 0",
        ),
        (
            lambda lesions, maps: metrics.max_dice_pooled(lesions, maps, n_thresholds=1),
            "n_thresholds must be ... got 1",
        ),
        (
            lambda lesions, maps: metrics.dice_per_image(lesions, maps, np.nan),
            "threshold must not be NaN, got nan",
        ),
        (
            lambda lesions, maps: metrics.dice_at_threshold(lesions, maps, 0, average="x"),
            "average must be ... got 'x'",
        ),
        (
            lambda lesions, maps: metrics.dice_at_threshold(lesions & False, maps, 0),
            "lesion_masks must have ... got none in 7",
        ),
    ],
)
def test_wrong_values_raise_value_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(ValueError, match=as_pattern(message)):
        call(lesions, maps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.dice_per_image(lesions, maps, None),
            "threshold must be a number, got None",
        ),
    ],
)
def test_wrong_types_raise_type_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(TypeError, match=as_pattern(message)):
        call(lesions, maps)
