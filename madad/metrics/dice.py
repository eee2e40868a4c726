"""Dice per image and pooled: at a threshold, and at the best one."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from madad.metrics._pixels import Pixels, predicted_masks, validated

DECIMALS = 12
"""To which a mean Dice summed up from millions of steps is trusted: what agrees so far is equally good."""


class MaxDice(NamedTuple):
    """Largest Dice over all thresholds.

    Attributes
    ----------
    dice : float
        The largest Dice, in 0..1.
    oracle_threshold : float
        The threshold that reaches it, in the unit of the maps; chosen on the data it is evaluated on.
    """

    dice: float
    oracle_threshold: float


def max_dice_per_image(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    brain_masks: ArrayLike | None = None,
    *,
    n_thresholds: int | None = None,
) -> MaxDice:
    """Mean over slices of Dice at one common threshold, maximised over that threshold.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion. Slices without a lesion pixel are left out.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.
    n_thresholds : int >= 2, default=None
        None tries every distinct value of the maps, which is exact. A number tries that many equally spaced
        values from the largest to the smallest, as evaluation scripts with a fixed grid do.

    Returns
    -------
    MaxDice
        The Dice and its threshold; of equally good thresholds the highest.

    Notes
    -----
    The Dice of one slice is a step function of the threshold that changes only at the slice's own values. The
    steps of all slices, sorted once by threshold and summed up, are the mean Dice at every threshold.
    """
    pixels = validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    with_lesion = np.flatnonzero(pixels.lesion.any(axis=1))
    curves = [_dice_curve(*(array[i] for array in pixels)) for i in with_lesion]
    thresholds = np.concatenate([values for values, _ in curves])
    steps = np.concatenate([np.diff(dice, prepend=0.0) for _, dice in curves])

    order = np.argsort(-thresholds, kind="stable")
    last_of_ties = _last_of_ties(thresholds[order])
    mean_dice = np.cumsum(steps[order])[last_of_ties] / len(curves)
    best = _highest(thresholds[order][last_of_ties], np.round(mean_dice, DECIMALS), n_thresholds)
    # Recounted, so that the rounding of millions of summed steps does not show.
    return best._replace(dice=mean_dice_at(pixels, best.oracle_threshold))


def max_dice_pooled(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    brain_masks: ArrayLike | None = None,
    *,
    n_thresholds: int | None = None,
) -> MaxDice:
    """Largest Dice over the pixels of all slices together.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion; slices without a lesion pixel count too.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.
    n_thresholds : int >= 2, default=None
        How many thresholds to try, as in `max_dice_per_image`. None tries all.

    Returns
    -------
    MaxDice
        The Dice and its threshold; of equally good thresholds the highest.
    """
    pixels = validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    return _highest(*_dice_curve(*pixels), n_thresholds)


def dice_per_image(
    lesion_masks: ArrayLike, anomaly_maps: ArrayLike, threshold: float, brain_masks: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Dice of each slice at a threshold.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion, on the grid of the maps.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    threshold : float
        Pixels whose map reaches it are predicted; in the unit of the maps.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.

    Returns
    -------
    ndarray of shape (n,), float64
        In 0..1; NaN for a slice without a lesion pixel.
    """
    return dice_of_each(validated(lesion_masks, anomaly_maps, brain_masks), threshold)


def dice_at_threshold(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    threshold: float,
    brain_masks: ArrayLike | None = None,
    *,
    average: Literal["image", "pooled"] = "image",
) -> float:
    """Dice of all slices at a threshold.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion, on the grid of the maps.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    threshold : float
        Pixels whose map reaches it are predicted; in the unit of the maps.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.
    average : {"image", "pooled"}, default="image"
        The mean over slices with a lesion, or the Dice of the pixels of all slices together.

    Returns
    -------
    float
        In 0..1; higher = better.
    """
    if average not in ("image", "pooled"):
        raise ValueError(f'average must be "image" or "pooled", got {average!r}. Choose one of the two.')
    pixels = validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    if average == "pooled":  # one image that holds all pixels
        lesion, score, brain = (array.reshape(1, -1) for array in pixels)
        pixels = Pixels(lesion, score, brain)
    return mean_dice_at(pixels, threshold)


def dice_of_each(pixels: Pixels, threshold: float) -> NDArray:
    """Dice of each slice at a threshold, of validated arrays.

    Parameters
    ----------
    pixels : Pixels
        The arrays that `validated` returned.
    threshold : float
        Pixels whose map reaches it are predicted.

    Returns
    -------
    ndarray of shape (n,)
        In 0..1; NaN for a slice without a lesion pixel.
    """
    predicted = predicted_masks(pixels, threshold)
    n_lesion = pixels.lesion.sum(axis=1)
    n_overlap = (predicted & pixels.lesion).sum(axis=1)
    undefined = np.full(len(n_lesion), np.nan)
    return np.divide(2.0 * n_overlap, n_lesion + predicted.sum(axis=1), out=undefined, where=n_lesion > 0)


def mean_dice_at(pixels: Pixels, threshold: float) -> float:
    """Mean Dice over the slices with a lesion, of validated arrays.

    Parameters
    ----------
    pixels : Pixels
        The arrays that `validated` returned, with a lesion in one slice at least.
    threshold : float
        Pixels whose map reaches it are predicted.

    Returns
    -------
    float
        Mean of `dice_of_each`, in 0..1.
    """
    return float(dice_of_each(pixels, threshold)[pixels.lesion.any(axis=1)].mean())


def _dice_curve(lesion: NDArray, score: NDArray, brain: NDArray) -> tuple[NDArray, NDArray]:
    """Distinct values, descending, and the Dice of all pixels together with each as the threshold."""
    lesion, score = lesion[brain], score[brain]
    order = np.argsort(-score)
    last_of_ties = _last_of_ties(score[order])
    n_overlap = np.cumsum(lesion[order])[last_of_ties]
    n_predicted = last_of_ties + 1
    return score[order][last_of_ties], 2.0 * n_overlap / (lesion.sum() + n_predicted)


def _highest(thresholds: NDArray, dice: NDArray, n_thresholds: int | None) -> MaxDice:
    """Maximum of a step function given at `thresholds` (descending), everywhere or on a linear grid."""
    if n_thresholds is not None:
        if n_thresholds < 2:
            raise ValueError(f"n_thresholds must be at least 2, got {n_thresholds}. None tries all of them.")
        ends = float(thresholds[0]), float(thresholds[-1])
        grid = np.linspace(*ends, n_thresholds).astype(thresholds.dtype)
        dice = dice[np.searchsorted(-thresholds, -grid, side="right") - 1]
        thresholds = grid
    best = np.argmax(dice)
    return MaxDice(float(dice[best]), float(thresholds[best]))


def _last_of_ties(descending: NDArray) -> NDArray:
    return np.flatnonzero(np.append(descending[1:] != descending[:-1], True))
