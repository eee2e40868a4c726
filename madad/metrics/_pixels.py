"""The arrays of `madad.metrics`, checked once and flattened."""

from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Pixels(NamedTuple):
    """Validated arrays, each (n, n_pixels).

    Attributes
    ----------
    lesion, brain : ndarray of bool
        True = lesion or brain; nothing outside the brain is a lesion.
    score : ndarray of float
        The anomaly maps; higher = more anomalous.
    """

    lesion: NDArray
    score: NDArray
    brain: NDArray


def validated(
    lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None, needs_lesion=False
) -> Pixels:
    """The arrays, checked and with one axis of pixels; errors as the docstring of `madad.metrics` says."""
    maps = np.asarray(anomaly_maps)
    if maps.dtype.kind not in "biuf":
        raise TypeError(f"anomaly_maps must hold real numbers, got dtype {maps.dtype}. Convert to float.")
    if maps.ndim < 2 or maps.size == 0:
        raise ValueError(f"anomaly_maps must have shape (n, H, W), n > 0, got {maps.shape}. Stack the maps.")
    if maps.dtype not in (np.float32, np.float64):
        maps = maps.astype(np.float64)
    lesion = as_bool("lesion_masks", lesion_masks)
    brain = np.ones(maps.shape, dtype=bool) if brain_masks is None else as_bool("brain_masks", brain_masks)
    for name, masks in (("lesion_masks", lesion), ("brain_masks", brain)):
        if masks.shape != maps.shape:
            expected = f"have the shape of anomaly_maps {maps.shape}"
            raise ValueError(f"{name} must {expected}, got {masks.shape}. Pass one mask per map.")
    unusable = maps[brain & ~np.isfinite(maps)]
    if unusable.size:
        got = f"{unusable[0]} in {unusable.size} pixels"
        raise ValueError(f"anomaly_maps must be finite in the brain, got {got}. Repair or mask them.")
    lesion &= brain
    flat = (len(maps), -1)
    if needs_lesion:
        check_lesions(lesion.reshape(flat).sum(axis=1))
    return Pixels(lesion.reshape(flat), maps.reshape(flat), brain.reshape(flat))


def as_bool(name: str, values: ArrayLike, advice: str = "Binarise it first, e.g. with > 0.") -> NDArray:
    """Booleans from booleans or any numbers that are 0 and 1."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold booleans or 0 and 1, got dtype {array.dtype}. {advice}")
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise ValueError(f"{name} must hold only 0 and 1, got the value {wrong[0]}. {advice}")
    return array.astype(bool)


def check_lesions(n_lesion: NDArray) -> None:
    """Raise unless one of the images, (n,), has lesion pixels."""
    if not n_lesion.any():
        got = f"none in {len(n_lesion)} slices"
        raise ValueError(f"lesion_masks must have lesion pixels in the brain, got {got}. Add lesions.")


def check_classes(n_lesion: NDArray, n_healthy: NDArray) -> None:
    """Raise unless there are lesion pixels, and other brain pixels too."""
    check_lesions(n_lesion)
    if not n_healthy.any():
        got = f"lesion in all {n_lesion.sum()} pixels"
        raise ValueError(f"lesion_masks must leave healthy pixels, got {got}. Check the masks' polarity.")


def predicted_masks(pixels: Pixels, threshold: float) -> NDArray:
    """Brain pixels at or above the threshold, (n, n_pixels)."""
    return (pixels.score >= as_threshold(threshold, pixels.score.dtype)) & pixels.brain


def as_threshold(threshold: float, dtype: np.dtype) -> np.floating:
    """The threshold in the maps' own precision: 0.1 is the float32 next to 0.1."""
    if not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number, got {threshold!r}. Pass a value on the maps' scale.")
    if np.isnan(threshold):
        raise ValueError(f"threshold must not be NaN, got {threshold}. Pass a value on the maps' scale.")
    with np.errstate(over="ignore"):
        return dtype.type(threshold)
