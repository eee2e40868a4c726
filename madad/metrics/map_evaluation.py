"""All metrics of maps that come in parts: each image is sorted once, and no part is needed again."""

import math
from collections.abc import Iterator
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from madad.metrics._pixels import as_threshold, check_classes, validated
from madad.metrics._sorted_images import Levels, SortedImages, between, n_reaching, runs
from madad.metrics.bootstrap import auprc_interval, bootstrap_ci, ratio_interval, subject_codes
from madad.metrics.dice import DECIMALS

PIXELS_PER_RANGE = 2**20
"""Lesion pixels looked at together, with about 100 bytes each: the memory that a result takes."""
INTERVAL_LEVELS = 4096
IMAGES_PER_BLOCK = 64


class MapEvaluation:
    """`evaluate_maps` for maps that come one batch, or one volume, after the other.

    Parameters
    ----------
    directory : path, default=None
        Folder for an unnamed temporary file that holds the pixels; memory then grows by a few kB for each
        image alone. None keeps the pixels in memory. Either way these are 4 bytes for each brain pixel of
        float32 maps, 8 of others.

    Examples
    --------
    >>> evaluation = MapEvaluation()
    >>> evaluation.update([[0, 1, 0, 0]], [[0.2, 0.9, 0.4, 0.1]], subjects=["a"])
    >>> evaluation.update([[1, 1, 0]], [[0.8, 0.3, 0.7]], subjects=["b"])
    >>> round(evaluation.result()["auroc"], 2)
    0.83

    Notes
    -----
    Nothing is binned but the AUPRC's interval, see `evaluate_maps`. That needs no sorting of all pixels
    together, because each metric moves at the values of lesion pixels alone: average precision has its terms
    there, the area under the ROC curve is the share of pairs of a lesion pixel and another in which the
    lesion pixel is higher (ties count half), and between two such values a lower threshold adds false
    positives only, so that a Dice falls. Each image, sorted when it came, is looked up at these values.
    """

    def __init__(self, directory: str | PathLike | None = None):
        self._images = SortedImages(directory)
        self._subjects: list = []
        self._has_subjects: bool | None = None

    def update(
        self,
        lesion_masks: ArrayLike,
        anomaly_maps: ArrayLike,
        brain_masks: ArrayLike | None = None,
        *,
        subjects: ArrayLike | None = None,
    ) -> None:
        """Add images; after an error none of them is in.

        Parameters
        ----------
        lesion_masks : array-like of shape (n, H, W), bool or 0/1
            True = lesion. The shape of an image may differ from call to call.
        anomaly_maps : array-like of shape (n, H, W)
            Maps; higher = more anomalous.
        brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
            True = brain; pixels outside are ignored. None counts every pixel.
        subjects : array-like of shape (n,), default=None
            Subject of each image, also across calls. None: each image is a subject; in all calls or in none.
        """
        pixels = validated(lesion_masks, anomaly_maps, brain_masks)
        n, has_subjects = len(pixels.score), subjects is not None
        subject_codes(subjects, n)
        if self._has_subjects not in (None, has_subjects):
            ways = ("None", "labels") if has_subjects else ("labels", "None")
            got = f"{ways[1]} after {ways[0]}"
            raise ValueError(f"subjects must be given in every update or in none, got {got}. Name them all.")
        self._images.add(
            (score[lesion], score[brain & ~lesion]) for lesion, score, brain in zip(*pixels, strict=True)
        )
        self._has_subjects = has_subjects
        self._subjects += np.asarray(subjects).tolist() if has_subjects else [None] * n

    def result(
        self, threshold: float | None = None, random_state: int | np.random.RandomState | None = 0
    ) -> dict[str, Any]:
        """Evaluate all images so far; more may follow.

        Parameters
        ----------
        threshold : float or None, default=None
            A threshold calibrated on healthy data, in units of the map. None: none is evaluated.
        random_state : int, RandomState instance or None, default=0
            Seed of the intervals' draws.

        Returns
        -------
        dict
            What `evaluate_maps` returns.

        Raises
        ------
        ValueError
            If there are no lesion pixels so far, or no others.
        """
        images = self._images
        check_classes(images.n_lesion, images.n_healthy)
        given = [] if threshold is None else [as_threshold(threshold, images.dtype)]
        codes = subject_codes(self._subjects if self._has_subjects else None, len(images))
        curves = summarise(images, PIXELS_PER_RANGE)
        dice, overlap, sizes = _dice_at(images, [curves.best_per_image, curves.best_pooled, *given])
        defined = images.n_lesion > 0

        def dice_interval(dice: NDArray) -> list[float] | None:
            return _plain(bootstrap_ci(dice, codes, random_state=random_state))

        pooled_interval = ratio_interval(2.0 * overlap[1], sizes[1].astype(float), codes, random_state)
        if len(np.unique(codes[defined])) < 2:
            pooled_interval = math.nan, math.nan  # as per image: the spread of one lesion is unknown
        results: dict[str, Any] = {
            "auprc": curves.auprc,
            "auprc_ci95": _plain(_auprc_interval(images, curves.n_levels, codes, random_state)),
            "auroc": curves.auroc,
            "max_dice_per_image": float(dice[0][defined].mean()),
            "max_dice_per_image_ci95": dice_interval(dice[0]),
            "oracle_threshold_per_image": float(curves.best_per_image),
            "max_dice_pooled": float(2.0 * overlap[1].sum() / sizes[1].sum()),
            "max_dice_pooled_ci95": _plain(pooled_interval),
            "oracle_threshold_pooled": float(curves.best_pooled),
        }
        if threshold is not None:
            results["calibrated_dice"] = float(dice[2][defined].mean())
            results["calibrated_dice_ci95"] = dice_interval(dice[2])
            results["calibrated_threshold"] = float(threshold)
        return results

    def close(self) -> None:
        """Forget the images and remove the file, as leaving a ``with`` block does."""
        self._images.close()
        self._subjects = []

    def __enter__(self) -> "MapEvaluation":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Curve(NamedTuple):
    """All images at a range of thresholds, which are lesion values, from high to low.

    Attributes
    ----------
    threshold : ndarray of shape (n_levels,)
        Distinct values of lesion pixels, descending.
    n_lesion, n_tied : ndarray of shape (n_levels,)
        How many lesion pixels and how many healthy ones have this very value.
    n_overlap, n_false : ndarray of shape (n_levels,)
        How many lesion pixels and how many healthy ones are at or above it.
    dice : ndarray of shape (n_levels,)
        Dice of each image with this threshold, summed over the images.
    """

    threshold: NDArray
    n_lesion: NDArray
    n_tied: NDArray
    n_overlap: NDArray
    n_false: NDArray
    dice: NDArray


class Summary(NamedTuple):
    """What the curves come to.

    Attributes
    ----------
    auprc, auroc : float
        Areas under the curves over all pixels, in 0..1.
    best_per_image, best_pooled : floating
        Oracle thresholds in the unit of the maps, in the maps' own precision.
    n_levels : int
        Number of distinct values of lesion pixels.
    """

    auprc: float
    auroc: float
    best_per_image: np.floating
    best_pooled: np.floating
    n_levels: int


def summarise(images: SortedImages, size: int) -> Summary:
    """Sum up areas under curves and find oracle thresholds.

    Parameters
    ----------
    images : SortedImages
        Images with lesion pixels and others.
    size : int
        About how many lesion pixels to look at together at most.

    Returns
    -------
    Summary
        The areas and the thresholds.
    """
    n_lesion, n_healthy = int(images.n_lesion.sum()), int(images.n_healthy.sum())
    n_images = np.count_nonzero(images.n_lesion)
    precisions = pairs = 0.0
    n_levels = 0
    per_image, pooled = [], []
    for curve in curve_ranges(images, size):
        n_predicted = curve.n_overlap + curve.n_false
        precisions += float((curve.n_lesion * (curve.n_overlap / n_predicted)).sum())
        pairs += float((curve.n_lesion * (n_healthy - curve.n_false + curve.n_tied / 2)).sum())
        n_levels += len(curve.threshold)
        per_image.append(_best(curve.threshold, np.round(curve.dice / n_images, DECIMALS)))
        pooled.append(_best(curve.threshold, 2.0 * curve.n_overlap / (n_lesion + n_predicted)))
    return Summary(
        auprc=precisions / n_lesion,
        auroc=pairs / n_lesion / n_healthy,
        best_per_image=max(per_image)[1],  # the highest threshold where several are as good
        best_pooled=max(pooled)[1],
        n_levels=n_levels,
    )


def curve_ranges(images: SortedImages, size: int) -> Iterator[Curve]:
    """Compute the curves from the highest lesion value to the lowest, in ranges of values.

    Parameters
    ----------
    images : SortedImages
        Images with lesion pixels and others.
    size : int
        About how many lesion pixels to look at together at most.

    Yields
    ------
    Curve
        The next lower range.
    """
    totals = np.zeros(3)
    for levels in images.lesion_levels(size):
        n_false, n_tied, dice = np.zeros((3, len(levels.values)))
        for i, n_lesion in enumerate(images.n_lesion):
            healthy = images.healthy(i)
            values = between(healthy, levels.values[0], levels.high)
            reached = _levels_reached(levels, values)
            for counts, at in ((n_false, reached), (n_tied, reached[levels.values[reached] == values])):
                distinct, n_each = runs(at)
                counts[distinct] += n_each
            if n_lesion:
                _add_dice_steps(dice, levels, reached, images.lesion(i), healthy)
        downwards = slice(None, None, -1)
        steps = np.stack([levels.counts, n_false, dice])[:, downwards]
        curves = np.cumsum(steps, axis=1) + totals[:, None]
        totals = curves[:, -1]
        yield Curve(levels.values[downwards], steps[0], n_tied[downwards], *curves)


def _add_dice_steps(dice: NDArray, levels: Levels, reached: NDArray, lesion: NDArray, healthy: NDArray):
    """Add to each level by how much an image's Dice there is larger than at the level above."""
    also_reached = _levels_reached(levels, between(lesion, levels.values[0], levels.high))
    changes = runs(np.sort(np.concatenate([reached, also_reached])))[0]
    thresholds = np.append(levels.values[changes], levels.high)
    n_overlap = n_reaching(lesion, thresholds)
    of_image = 2.0 * n_overlap / (len(lesion) + n_overlap + n_reaching(healthy, thresholds))
    dice[changes] += of_image[:-1] - of_image[1:]


def _levels_reached(levels: Levels, values: NDArray) -> NDArray:
    """The highest level at or below each value."""
    return np.searchsorted(levels.values, values, side="right") - 1


def _best(thresholds: NDArray, dice: NDArray) -> tuple[float, np.floating]:
    """Largest Dice and the highest of its thresholds, which descend."""
    best = np.argmax(dice)
    return float(dice[best]), thresholds[best]


def _dice_at(images: SortedImages, thresholds: list) -> tuple[NDArray, NDArray, NDArray]:
    """Dice (NaN without a lesion), overlap, and sizes of truth and prediction; (n_thresholds, n_images)."""
    at = np.array(thresholds, dtype=images.dtype)
    counts = np.array([images.counts_at(i, at) for i in range(len(images))])
    n_lesion, (overlap, n_predicted) = images.n_lesion, counts.transpose(1, 2, 0)
    sizes = n_lesion + n_predicted
    dice = np.divide(2.0 * overlap, sizes, out=np.full(sizes.shape, np.nan), where=n_lesion > 0)
    return dice, overlap, sizes


def _auprc_interval(
    images: SortedImages, n_levels: int, codes: NDArray, random_state: Any
) -> tuple[float, float]:
    """`auprc_interval` at all `n_levels` lesion values, or at some that are equally common."""
    if n_levels <= INTERVAL_LEVELS:
        levels = np.concatenate([found.values[::-1] for found in images.lesion_levels(PIXELS_PER_RANGE)])
    else:
        levels = _lesion_quantiles(images, INTERVAL_LEVELS)

    def counts() -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        for start in range(0, len(images), IMAGES_PER_BLOCK):
            block = range(start, min(start + IMAGES_PER_BLOCK, len(images)))
            n_overlap, n_predicted = np.array([images.counts_at(i, levels) for i in block]).swapaxes(0, 1)
            yield codes[block], n_overlap, n_predicted

    return auprc_interval(counts(), codes.max() + 1, random_state)


def _lesion_quantiles(images: SortedImages, n: int) -> NDArray:
    """Lesion values at `n` equally spaced ranks, descending and without doubles."""
    n_below = images.n_lesion.sum()
    ranks = np.floor(np.linspace(0, 1, n) * (n_below - 1))
    chosen = []
    for levels in images.lesion_levels(PIXELS_PER_RANGE):
        first = n_below - np.cumsum(levels.counts[::-1])[::-1]  # rank of each level's first pixel
        inside = ranks[(first[0] <= ranks) & (ranks < n_below)]
        at = np.unique(np.searchsorted(first, inside, side="right") - 1)
        chosen.append(levels.values[at][::-1])
        n_below = first[0]
    return np.concatenate(chosen)


def _plain(interval: tuple[float, float]) -> list[float] | None:
    """The interval ready for strict JSON; None where it is unknown."""
    return None if any(math.isnan(end) for end in interval) else list(interval)


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
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion, on the grid of the maps.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.
    subjects : array-like of shape (n,), default=None
        Subject of each slice, whose slices are resampled together. None: each slice is a subject.
    threshold : float, default=None
        A threshold calibrated on healthy data, in units of the map. None: none is evaluated.
    random_state : int, RandomState instance or None, default=0
        Seed of the intervals' draws.

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
