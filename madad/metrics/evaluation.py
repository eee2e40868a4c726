"""All metrics of one set of maps at once."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from madad.metrics.streaming import MapEvaluation


def evaluate_maps(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    brain_masks: ArrayLike | None = None,
    *,
    subjects: ArrayLike | None = None,
    threshold: float | None = None,
    random_state: int | np.random.RandomState | None = 0,
) -> dict[str, Any]:
    """All numbers that a results table needs, in plain floats ready for JSON; in parts: `MapEvaluation`.

    Parameters
    ----------
    lesion_masks, anomaly_maps, brain_masks : array-like of shape (n, H, W)
        See `madad.metrics`.
    subjects, random_state
        As for `bootstrap_ci`.
    threshold : float, default=None
        A threshold calibrated on healthy data, in units of the map.

    Returns
    -------
    dict
        `auprc`, `auprc_ci95`, `auroc`, `max_dice_per_image`, `max_dice_per_image_ci95`,
        `oracle_threshold_per_image`, `max_dice_pooled`, `max_dice_pooled_ci95`, `oracle_threshold_pooled`,
        and with `threshold` also `calibrated_dice` (per image), `calibrated_dice_ci95`,
        `calibrated_threshold`. Intervals are [low, high], 95 %, over subjects; None where no interval can be
        estimated, that is with fewer than two subjects (for the Dice: two with a lesion). Strict JSON has
        no NaN.

    Notes
    -----
    The intervals of the max Dice keep the oracle thresholds fixed. The interval of the AUPRC takes 200
    resamples of maps quantised by rank to at most 4096 levels, which lie at lesion pixels because average
    precision moves nowhere else: with up to 4096 distinct lesion values each resample is exact.
    """
    with MapEvaluation() as evaluation:
        evaluation.update(lesion_masks, anomaly_maps, brain_masks, subjects=subjects)
        return evaluation.result(threshold, random_state)
