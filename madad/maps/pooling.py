"""From a map to one number per slice, and from healthy maps to a threshold."""

from __future__ import annotations

import numpy as np

TOP_SHARE = 0.01


def pool_map(anomaly_map: np.ndarray, brain_mask: np.ndarray, top_share: float = TOP_SHARE) -> np.ndarray:
    """One number per slice: the mean of the map's largest values, at least one, ``top_share`` of the brain.

    The mean over the whole brain drowns a small lesion in the rest; the single maximum follows one noisy
    pixel.

    Parameters
    ----------
    anomaly_map : ndarray of shape (n, H, W), in 0..1
        Maps of slices; or (n, D, H, W) of volumes.
    brain_mask : ndarray of bool, shape of ``anomaly_map``
        Where a map counts.
    top_share : float
        Share of the brain's pixels that is averaged, above 0 and up to 1.

    Returns
    -------
    ndarray of shape (n,), float64
        Higher = more anomalous; 0 for slices without brain.
    """
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share must be above 0 and at most 1, got {top_share!r}. The default is 0.01.")
    scores = np.zeros(len(anomaly_map))
    for i, (values, brain) in enumerate(zip(anomaly_map, brain_mask, strict=True)):
        inside = values[brain]
        if inside.size:
            k = max(1, round(top_share * inside.size))
            scores[i] = np.partition(inside, -k)[-k:].mean(dtype=np.float64)
    return scores


def healthy_threshold(values: np.ndarray, specificity: float) -> float:
    """The smallest float32 above the ``specificity`` quantile of healthy pixels' maps.

    To be compared with ``>=``: where most healthy pixels are exactly 0, none of them is called anomalous.
    Without any pixel it is the smallest number above 0.

    Parameters
    ----------
    values : ndarray of any shape, in 0..1
        Maps of healthy brains, at the pixels inside them.
    specificity : float
        Share of these pixels that stays below the threshold, 0..1.
    """
    quantile = np.quantile(values, specificity) if values.size else 0.0
    return float(np.nextafter(np.float32(quantile), np.float32(np.inf)))
