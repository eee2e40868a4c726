"""Areas under curves over all thresholds, from the pixels of all slices."""

from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from madad.metrics._pixels import Pixels, check_classes, validated


def auprc(lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None = None) -> float:
    """Average precision over the pixels of all slices, the area under the precision-recall curve.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion; there must be lesion and healthy pixels.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.

    Returns
    -------
    float
        In 0..1; the share of lesion pixels for maps that know nothing.
    """
    pixels = validated(lesion_masks, anomaly_maps, brain_masks)
    return float(average_precision_score(*_two_classes(pixels)))


def auroc(lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None = None) -> float:
    """Area under the ROC curve over the pixels of all slices.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion; there must be lesion and healthy pixels.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.

    Returns
    -------
    float
        In 0..1; 0.5 for maps that know nothing.
    """
    pixels = validated(lesion_masks, anomaly_maps, brain_masks)
    return float(roc_auc_score(*_two_classes(pixels)))


def _two_classes(pixels: Pixels) -> tuple[NDArray, NDArray]:
    """Truth and score of all brain pixels, (n_brain_pixels,)."""
    n_lesion = pixels.lesion.sum(axis=1)
    check_classes(n_lesion, pixels.brain.sum(axis=1) - n_lesion)
    return pixels.lesion[pixels.brain], pixels.score[pixels.brain]
