import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from madad import metrics


@pytest.mark.parametrize("seed", range(2))
def test_auprc_and_auroc_equal_scikit_learn_on_brain_pixels(seed, random_case):
    lesion_masks, anomaly_maps, brain_masks = random_case(seed)
    truth, score = lesion_masks[brain_masks], anomaly_maps[brain_masks]
    assert metrics.auprc(lesion_masks, anomaly_maps, brain_masks) == average_precision_score(truth, score)
    assert metrics.auroc(lesion_masks, anomaly_maps, brain_masks) == roc_auc_score(truth, score)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.auprc(lesions[:2], maps),
            "lesion_masks must have the shape ... got (2, 6, 5)",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions, maps, lesions[0]),
            "brain_masks must have the ... got (6, 5)",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions, maps[0, 0]),
            "anomaly_maps must have shape (n, H, W), ... got (5,)",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions[:0], maps[:0]),
            "anomaly_maps must have ... n > 0, got (0, 6, 5)",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions, np.where(np.arange(5) == 2, np.inf, maps)),
            "anomaly_maps must be finite ... got inf in 42 pixels",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions * 2, maps),
            "lesion_masks must hold only 0 and 1, got the value 2",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions, maps, maps),
            "brain_masks must hold only 0 and 1, got the value 0.",
        ),
        (
            lambda lesions, maps: metrics.auroc(lesions & False, maps),
            "lesion_masks must have lesion ... got none in 7 slices",
        ),
        (
            lambda lesions, maps: metrics.auroc(lesions, maps, lesions),
            "lesion_masks must leave ... got lesion in all 35",
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
            lambda lesions, maps: metrics.auprc(lesions, maps.astype(str)),
            "anomaly_maps must hold real ... got dtype <U32",
        ),
        (
            lambda lesions, maps: metrics.auprc(lesions * 1j, maps),
            "lesion_masks must hold bool... got dtype complex128",
        ),
    ],
)
def test_wrong_types_raise_type_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(TypeError, match=as_pattern(message)):
        call(lesions, maps)
