import pickle

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV

from madad import metrics


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
def test_map_scorers_take_masks_of_either_shape_and_can_be_pickled(scorer, expected, random_case):
    lesion_masks, anomaly_maps, _ = random_case(0)
    scorer = pickle.loads(pickle.dumps(scorer))
    score = expected(lesion_masks, anomaly_maps)
    assert isinstance(score, float)
    assert scorer(FixedMaps(), anomaly_maps, lesion_masks) == score
    assert scorer(FixedMaps(), anomaly_maps, lesion_masks.reshape(7, -1).astype(int)) == score


def test_scorers_drive_a_grid_search(random_case):
    lesion_masks, anomaly_maps, _ = random_case(0, n=8)
    scoring = {"dice": metrics.max_dice_scorer, "auprc": metrics.auprc_scorer}
    search = GridSearchCV(FixedMaps(), {"power": [-1, 1]}, scoring=scoring, refit="dice", cv=2)
    search.fit(anomaly_maps + 1, lesion_masks)
    assert search.best_params_ == {"power": 1}  # a falling transform turns the maps upside down


def test_image_auroc_scorer_takes_labels_or_masks(random_case):
    lesion_masks, anomaly_maps, _ = random_case(0)
    lesion_masks[:3] = False
    labels = lesion_masks.any(axis=(1, 2))
    expected = roc_auc_score(labels, anomaly_maps.mean(axis=(1, 2)))
    scorer = pickle.loads(pickle.dumps(metrics.image_auroc_scorer))
    for y in (labels, labels.astype(int), lesion_masks, lesion_masks.reshape(7, -1)):
        assert scorer(FixedMaps(), anomaly_maps, y) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.max_dice_scorer(FixedMaps(), maps, lesions[0]),
            "y must hold one ... got shape (6, 5)",
        ),
        (
            lambda lesions, maps: metrics.image_auroc_scorer(FixedMaps(), maps, [1] * 7),
            "y must hold both ... got 7 anomalies",
        ),
        (
            lambda lesions, maps: metrics.image_auroc_scorer(FixedMaps(), maps, [-1, 1]),
            "y must hold only ... got the value -1",
        ),
    ],
)
def test_wrong_values_raise_value_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(ValueError, match=as_pattern(message)):
        call(lesions, maps)
