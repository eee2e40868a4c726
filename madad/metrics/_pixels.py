"""The arrays of `madad.metrics`, checked once and flattened."""

from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Pixels(NamedTuple):
    """Validated arrays.

    Attributes
    ----------
    lesion : ndarray of shape (n, n_pixels), bool
        True = lesion inside the brain.
    score : ndarray of shape (n, n_pixels), float32 or float64
        The maps; finite inside the brain.
    brain : ndarray of shape (n, n_pixels), bool
        True = brain.
    """

    lesion: NDArray
    score: NDArray
    brain: NDArray


def validated(
    lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None, needs_lesion=False
) -> Pixels:
    """Check the arrays and give them one axis of pixels.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion, on the grid of the maps.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None
        True = brain; pixels outside are ignored. None counts every pixel.
    needs_lesion : bool, default=False
        Whether data without a lesion pixel are an error.

    Returns
    -------
    Pixels
        The arrays in one axis of pixels.

    Raises
    ------
    TypeError, ValueError
        As the docstring of `madad.metrics` says.
    """
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
    """Turn booleans or any numbers that are 0 and 1 into booleans.

    Parameters
    ----------
    name : str
        What messages call the array.
    values : array-like
        Booleans, or the numbers 0 and 1.
    advice : str
        What messages tell the user to do; a sentence.

    Returns
    -------
    ndarray of the shape of `values`, bool
        The same as booleans, in new memory.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold booleans or 0 and 1, got dtype {array.dtype}. {advice}")
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise ValueError(f"{name} must hold only 0 and 1, got the value {wrong[0]}. {advice}")
    return array.astype(bool)


def check_lesions(n_lesion: NDArray) -> None:
    """Raise ValueError unless one of the images has lesion pixels.

    Parameters
    ----------
    n_lesion : ndarray of shape (n,), int
        Number of lesion pixels of each image.
    """
    if not n_lesion.any():
        got = f"none in {len(n_lesion)} slices"
        raise ValueError(f"lesion_masks must have lesion pixels in the brain, got {got}. Add lesions.")


def check_classes(n_lesion: NDArray, n_healthy: NDArray) -> None:
    """Raise ValueError unless there are lesion pixels, and other brain pixels too.

    Parameters
    ----------
    n_lesion, n_healthy : ndarray of shape (n,), int
        Number of lesion pixels and of other brain pixels of each image.
    """
    check_lesions(n_lesion)
    if not n_healthy.any():
        got = f"lesion in all {n_lesion.sum()} pixels"
        raise ValueError(f"lesion_masks must leave healthy pixels, got {got}. Check the masks' polarity.")


def predicted_masks(pixels: Pixels, threshold: float) -> NDArray:
    """Predict the brain pixels at or above a threshold.

    Parameters
    ----------
    pixels : Pixels
        The arrays that `validated` returned.
    threshold : float
        In the unit of the maps.

    Returns
    -------
    ndarray of shape (n, n_pixels), bool
        True = predicted.
    """
    return (pixels.score >= as_threshold(threshold, pixels.score.dtype)) & pixels.brain


def as_threshold(threshold: float, dtype: np.dtype) -> np.floating:
    """Round a threshold to the maps' own precision: 0.1 is the float32 next to 0.1.

    Parameters
    ----------
    threshold : float
        In the unit of the maps; not NaN.
    dtype : numpy.dtype
        Type of the maps.

    Returns
    -------
    floating
        The threshold as a scalar of that type.
    """
    if not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number, got {threshold!r}. Pass a value on the maps' scale.")
    if np.isnan(threshold):
        raise ValueError(f"threshold must not be NaN, got {threshold}. Pass a value on the maps' scale.")
    with np.errstate(over="ignore"):
        return dtype.type(threshold)
