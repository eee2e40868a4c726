import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from madad import metrics


def test_perfect_map_scores_one_everywhere(random_case):
    lesion_masks, _, brain_masks = random_case(0)
    perfect = np.where(lesion_masks, 0.75, 0.25)
    results = metrics.evaluate_maps(lesion_masks, perfect, brain_masks, threshold=0.5)
    for key in ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice"):
        assert results[key] == 1
    assert results["oracle_threshold_per_image"] == results["oracle_threshold_pooled"] == 0.75


def test_pixels_outside_the_brain_change_nothing(random_case):
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


def test_inputs_are_left_as_they_were(random_case):
    arrays = random_case(5)
    copies = [array.copy() for array in arrays]
    metrics.evaluate_maps(*arrays, threshold=0.5)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_evaluate_maps_is_plain_and_agrees_with_the_single_functions(random_case):
    lesion_masks, anomaly_maps, brain_masks = arrays = random_case(0, n=12)
    subjects = np.repeat(np.arange(6), 2)
    results = metrics.evaluate_maps(*arrays, subjects=subjects, threshold=np.float32(0.5))
    assert json.loads(json.dumps(results)) == results
    assert results["auprc"] == pytest.approx(metrics.auprc(*arrays), abs=1e-12)
    assert results["auroc"] == pytest.approx(metrics.auroc(*arrays), abs=1e-12)
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


@pytest.mark.parametrize("seed", range(6))
def test_auprc_interval_equals_scikit_learn_on_repeated_subjects(seed, random_case):
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


def test_one_subject_has_undefined_intervals(random_case):
    results = metrics.evaluate_maps(*random_case(0), subjects=["a"] * 7, threshold=0.5)
    for key in ("auprc_ci95", "max_dice_per_image_ci95", "calibrated_dice_ci95"):
        assert results[key] is None
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_one_subject_with_a_lesion_has_no_dice_interval(random_case):
    lesion_masks, anomaly_maps, _ = random_case(0)
    lesion_masks[1:] = False
    results = metrics.evaluate_maps(lesion_masks, anomaly_maps)
    assert results["max_dice_per_image_ci95"] is None
    assert np.isfinite(results["auprc_ci95"]).all()
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.evaluate_maps(lesions, maps, subjects=[1]),
            "subjects must have ... (7,), got (1,)",
        ),
    ],
)
def test_wrong_values_raise_value_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(ValueError, match=as_pattern(message)):
        call(lesions, maps)
