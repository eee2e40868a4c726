"""scikit-learn scorers, ``scorer(estimator, X, y)``, for detectors with ``predict_maps``."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score

from madad.metrics._pixels import as_bool
from madad.metrics.curves import auprc
from madad.metrics.dice import max_dice_per_image, max_dice_pooled


def max_dice_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Per-image max Dice of `estimator.predict_maps(X)`: a scikit-learn scorer.

    Parameters
    ----------
    estimator : fitted detector
        Any detector with ``predict_maps``.
    X : array-like
        Slices as the detector takes them.
    y : array-like of shape (n, H, W) or (n, H * W), bool or 0/1
        True = lesion, for each pixel of the maps.

    Returns
    -------
    float
        The score of `max_dice_per_image`, in 0..1.

    Notes
    -----
    No brain mask is applied: the maps of this library's detectors are already zero outside the brain.
    """
    return max_dice_per_image(*_truth_and_maps(estimator, X, y)).dice


def pooled_max_dice_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Pooled max Dice of `estimator.predict_maps(X)`; otherwise `max_dice_scorer`.

    Parameters
    ----------
    estimator : fitted detector
        Any detector with ``predict_maps``.
    X : array-like
        Slices as the detector takes them.
    y : array-like of shape (n, H, W) or (n, H * W), bool or 0/1
        True = lesion, for each pixel of the maps.

    Returns
    -------
    float
        The score of `max_dice_pooled`, in 0..1.
    """
    return max_dice_pooled(*_truth_and_maps(estimator, X, y)).dice


def auprc_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Average precision over pixels, background included; otherwise `max_dice_scorer`.

    Parameters
    ----------
    estimator : fitted detector
        Any detector with ``predict_maps``.
    X : array-like
        Slices as the detector takes them.
    y : array-like of shape (n, H, W) or (n, H * W), bool or 0/1
        True = lesion, for each pixel of the maps.

    Returns
    -------
    float
        The score of `auprc`, in 0..1.
    """
    return auprc(*_truth_and_maps(estimator, X, y))


def image_auroc_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Area under the ROC curve of `-estimator.score_samples(X)`: a scikit-learn scorer for whole images.

    Parameters
    ----------
    estimator : fitted detector
        Any detector with ``score_samples``.
    X : array-like
        Slices as the detector takes them.
    y : array-like of shape (n,), (n, H, W) or (n, H * W), bool or 0/1
        1 = anomaly and 0 = normal, or lesion masks: an image with any lesion pixel is an anomaly.

    Returns
    -------
    float
        In 0..1; 0.5 for scores that know nothing.
    """
    masks = as_bool("y", y, advice="Pass 1 for anomalies and 0 for normal images, e.g. y == -1.")
    labels = masks.reshape(len(masks), -1).max(axis=1)
    if labels.all() or not labels.any():
        counts = f"{labels.sum()} anomalies in {labels.size} images"
        raise ValueError(f"y must hold both classes, got {counts}. Add images of the other class.")
    return float(roc_auc_score(labels, -np.asarray(estimator.score_samples(X))))


def _truth_and_maps(estimator: Any, X: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    maps, masks = np.asarray(estimator.predict_maps(X)), np.asarray(y)
    if masks.ndim < 2 or len(masks) != len(maps) or masks.size != maps.size:
        got = f"shape {masks.shape} for maps {maps.shape}"
        raise ValueError(f"y must hold one lesion mask per map, got {got}. Pass (n, H, W) or (n, H * W).")
    return masks.reshape(maps.shape), maps
