"""Intensity itself as an anomaly map: what every method has to beat."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from madad._runtime.tensors import to_images
from madad.baselines.base import Baseline

TAILS = ("bright", "dark", "both")


class IntensityThreshold(Baseline):
    """Intensity as the anomaly map: bright, dark or unusual pixels are anomalous, and nothing is learnt.

    Parameters
    ----------
    tail : {"bright", "dark", "both"}
        Which intensities are anomalous; see Notes. ``"bright"`` suits FLAIR.
    equalize : bool
        Replace the intensities by their ranks inside the brain of the slice first.
    smoothing_px : float or None
        Standard deviation of the Gaussian over the map; None = 5 px at 256, scaled to the slice's size.
    contamination, image_specificity, pixel_specificity, calibration_fraction :
        See `madad.MaskedDiffusionAnomalyDetector`.
    image_shape, intensity_range, batch_size, device, random_state, verbose :
        See `madad.MaskedDiffusionAnomalyDetector`. ``random_state`` draws the held-out share, which the
        thresholds come from.

    Attributes
    ----------
    offset_, map_threshold_, calibration_rows_, image_shape_, intensity_range_, n_features_in_ :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Notes
    -----
    With the intensity ``x`` in 0..1 of a slice and its median ``m`` inside the brain, ::

        bright: a = x        dark: a = 1 - x        both: a = |x - m|

    averaged over channels. Equalised, ``x`` becomes ``(rank - 1/2) / n`` among the ``n`` pixels of the brain,
    ties averaged: the slice's own distribution function. On FLAIR such a threshold found lesions better than
    the published methods of its time, so it belongs beside every other number there.

    Differs from the paper: slices are equalised one by one, by ranks and not by bins; ``"dark"`` and
    ``"both"`` are ours; the threshold comes from healthy slices and not from annotated ones; the map is
    smoothed, and no small components are removed.

    References
    ----------
    Meissen, Kaissis, Rueckert: Challenging Current Semi-Supervised Anomaly Segmentation Methods for Brain
    MRI, BrainLes 2021, arXiv 2109.06023.

    Examples
    --------
    >>> from madad.datasets import make_brain_slices
    >>> healthy = make_brain_slices(40, size=32, random_state=0)
    >>> baseline = IntensityThreshold(tail="both", random_state=0)
    >>> baseline.fit(healthy.images, groups=healthy.subjects).predict_maps(healthy.images[:2]).shape
    (2, 32, 32)
    """

    _map_parameters = ("tail", "equalize")

    def __init__(
        self,
        *,
        tail: str = "bright",
        equalize: bool = False,
        smoothing_px: float | None = 1.0,
        contamination="auto",
        image_specificity: float = 0.95,
        pixel_specificity: float = 0.99,
        calibration_fraction: float = 0.15,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        batch_size: int | None = None,
        device="auto",
        random_state=None,
        verbose: bool = False,
    ):
        self.tail = tail
        self.equalize = equalize
        self.smoothing_px = smoothing_px
        self.contamination = contamination
        self.image_specificity = image_specificity
        self.pixel_specificity = pixel_specificity
        self.calibration_fraction = calibration_fraction
        self.image_shape = image_shape
        self.intensity_range = intensity_range
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {TAILS}, got {self.tail!r}. Use 'both'.")

    def _raw_maps(self, x: Tensor, brain: np.ndarray) -> np.ndarray:
        channels = list(to_images(x).swapaxes(0, 1))  # each (n, H, W)
        if self.equalize:
            channels = [_equalized(images, brain) for images in channels]
        return np.mean([_unusual(images, brain, self.tail) for images in channels], axis=0)


def _unusual(images: np.ndarray, brain_masks: np.ndarray, tail: str) -> np.ndarray:
    """How far images (n, H, W) are out in the tail: (n, H, W) in 0..1."""
    if tail == "bright":
        return images
    if tail == "dark":
        return 1.0 - images
    pairs = zip(images, brain_masks, strict=True)
    centres = [np.median(x[brain]) if brain.any() else 0.0 for x, brain in pairs]
    return np.abs(images - np.asarray(centres, np.float32)[:, None, None])


def _equalized(images: np.ndarray, brain_masks: np.ndarray) -> np.ndarray:
    """Ranks in 0..1 inside each slice's brain, 0 outside: (n, H, W), float32."""
    ranks = np.zeros(images.shape, np.float32)
    for x, brain, rank in zip(images, brain_masks, ranks, strict=True):
        if brain.any():
            rank[brain] = (rankdata(x[brain]) - 0.5) / np.count_nonzero(brain)
    return ranks
