"""How well anomaly maps find lesions: Dice, ranking metrics, lesion counts, confidence intervals, scorers.

`evaluate_maps` has all numbers of a results table, and `MapEvaluation` the same of maps that come one batch
after the other and need not fit into memory.

All functions share these arrays; the first axis counts slices, or volumes: any number of spatial axes works.

* `lesion_masks`, (n, H, W) bool or 0/1: True = lesion.
* `anomaly_maps`, (n, H, W) float: higher = more anomalous; a pixel is predicted where ``map >= threshold``.
* `brain_masks`, (n, H, W) bool or 0/1, or None: True = brain. Pixels outside are ignored, in the map (which
  may be NaN there) and in the truth. None counts every pixel.

Two Dice scores are in use and differ a lot, so each name says which it is: *per image* is the mean over
slices at ONE common threshold, *pooled* counts the pixels of all slices together. A slice without a lesion
pixel has no Dice: the mean leaves it out, the pooled score counts its false positives. "Oracle" thresholds
are chosen on the very data they are evaluated on; report the Dice at a threshold from healthy data as well.

Arrays that break these rules, data without a lesion where one is needed and numbers out of range raise
ValueError; a dtype or threshold that is no number raises TypeError.

`reconstruction_errors` stands apart: it compares images with their reconstructions.
"""

from madad.metrics.bootstrap import bootstrap_ci
from madad.metrics.curves import auprc, auroc
from madad.metrics.dice import (
    MaxDice,
    dice_at_threshold,
    dice_per_image,
    max_dice_per_image,
    max_dice_pooled,
)
from madad.metrics.image_quality import reconstruction_errors
from madad.metrics.lesion_detection import LesionDetection, lesion_detection, size_strata
from madad.metrics.map_evaluation import MapEvaluation, evaluate_maps
from madad.metrics.scorers import auprc_scorer, image_auroc_scorer, max_dice_scorer, pooled_max_dice_scorer

__all__ = [
    "LesionDetection",
    "MapEvaluation",
    "MaxDice",
    "auprc",
    "auprc_scorer",
    "auroc",
    "bootstrap_ci",
    "dice_at_threshold",
    "dice_per_image",
    "evaluate_maps",
    "image_auroc_scorer",
    "lesion_detection",
    "max_dice_per_image",
    "max_dice_pooled",
    "max_dice_scorer",
    "pooled_max_dice_scorer",
    "reconstruction_errors",
    "size_strata",
]
