"""Confidence intervals by resampling subjects."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state

DRAWS_PER_BLOCK = 100


def bootstrap_ci(
    values: ArrayLike,
    subjects: ArrayLike | None = None,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    random_state: int | np.random.RandomState | None = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean, resampling subjects.

    Parameters
    ----------
    values : array-like of shape (n,)
        One number per slice; NaN (a slice without a lesion, see `dice_per_image`) is left out.
    subjects : array-like of shape (n,), default=None
        Subject of each slice; slices of one subject resemble each other and are drawn together. None: each
        slice is a subject.
    n_resamples : int >= 1, default=2000
        Number of bootstrap samples.
    confidence : float in (0, 1), default=0.95
        Coverage of the interval.
    random_state : int, RandomState instance or None, default=0
        Seed of the draws.

    Returns
    -------
    (low, high) : tuple of float
        (NaN, NaN) with fewer than two subjects, whose spread nobody can know.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or np.isinf(numbers).any():
        got = f"shape {numbers.shape}" if numbers.ndim != 1 else f"{numbers[np.isinf(numbers)][0]}"
        raise ValueError(f"values must be a 1-d finite array, got {got}. Pass one number per slice.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}. 2000 is a usual choice.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}. Use 0.95 for 95 %.")
    known = ~np.isnan(numbers)
    # Numbered a second time, because a subject may have no known value left.
    codes = np.unique(subject_codes(subjects, len(numbers))[known], return_inverse=True)[1]
    sums = np.stack([np.bincount(codes, weights=numbers[known]), np.bincount(codes)])
    totals = _resampled_sums(sums, n_resamples, random_state)
    return _percentile_interval(totals[0] / totals[1], confidence)


def ratio_interval(
    numerators: NDArray, denominators: NDArray, codes: NDArray, random_state: Any, n_resamples: int = 2000
) -> tuple[float, float]:
    """Bootstrap interval, 95 %, of the ratio of two sums over slices, such as a pooled Dice.

    Parameters
    ----------
    numerators, denominators : ndarray of shape (n,)
        What each slice adds to the two sums.
    codes : ndarray of shape (n,), int
        Subject of each slice, from `subject_codes`; only the subjects given are drawn from.
    random_state : int, RandomState instance or None
        Seed of the draws.
    n_resamples : int, default=2000
        Number of bootstrap samples, at least 1.

    Returns
    -------
    (low, high) : tuple of float
        (NaN, NaN) with fewer than two subjects.
    """
    codes = np.unique(codes, return_inverse=True)[1]
    sums = np.stack([np.bincount(codes, weights=values) for values in (numerators, denominators)])
    totals = _resampled_sums(sums, n_resamples, random_state)
    totals = totals[:, totals[1] > 0]
    return _percentile_interval(totals[0] / totals[1])


def auprc_interval(
    counts: Iterable[tuple[NDArray, NDArray, NDArray]],
    n_subjects: int,
    random_state: Any,
    n_resamples: int = 200,
) -> tuple[float, float]:
    """Bootstrap interval, 95 %, of the AUPRC.

    Parameters
    ----------
    counts : iterable of (ndarray (m,), ndarray (m, n_levels), ndarray (m, n_levels))
        For one block of images after the other their `subject_codes`, and how many lesion pixels and how many
        pixels of all reach each of the thresholds, which descend. A resample is the sum of its subjects'
        counts.
    n_subjects : int
        Number of subjects in all images.
    random_state : int, RandomState instance or None
        Seed of the draws.
    n_resamples : int, default=200
        Number of bootstrap samples, at least 1.

    Returns
    -------
    (low, high) : tuple of float
        (NaN, NaN) with fewer than two subjects.
    """
    if n_subjects < 2:
        return float("nan"), float("nan")
    draws = _subject_draws(n_subjects, n_resamples, check_random_state(random_state))
    n_overlap = n_predicted = np.zeros((n_resamples, 1))
    for codes, lesion_pixels, pixels in counts:
        n_overlap = n_overlap + draws[:, codes] @ lesion_pixels
        n_predicted = n_predicted + draws[:, codes] @ pixels
    precision = n_overlap / np.maximum(n_predicted, 1)
    summed = (np.diff(n_overlap, axis=1, prepend=0.0) * precision).sum(axis=1)
    has_lesion = n_overlap[:, -1] > 0  # AUPRC is undefined for a resample without
    return _percentile_interval(summed[has_lesion] / n_overlap[has_lesion, -1])


def subject_codes(subjects: ArrayLike | None, n: int) -> NDArray:
    """Number the subjects 0, 1, ...

    Parameters
    ----------
    subjects : array-like of shape (n,) or None
        Subject of each slice. None: each slice is a subject.
    n : int
        Number of slices.

    Returns
    -------
    ndarray of shape (n,), int
        Number of each slice's subject.

    Raises
    ------
    ValueError
        If there are not n labels.
    """
    labels = np.arange(n) if subjects is None else np.asarray(subjects)
    if labels.shape != (n,):
        raise ValueError(f"subjects must have shape ({n},), got {labels.shape}. Pass one label per slice.")
    return np.unique(labels, return_inverse=True)[1]


def _resampled_sums(sums: NDArray, n_resamples: int, random_state: Any) -> NDArray:
    """Sums (k, n_subjects) over the subjects of each bootstrap sample, (k, n_resamples or 0)."""
    if sums.shape[1] < 2:
        return np.zeros((len(sums), 0))
    random = check_random_state(random_state)
    totals = np.empty((len(sums), n_resamples))
    for start in range(0, n_resamples, DRAWS_PER_BLOCK):  # all at once they outgrow thousands of maps
        block = totals[:, start : start + DRAWS_PER_BLOCK]
        block[:] = sums @ _subject_draws(sums.shape[1], block.shape[1], random).T
    return totals


def _subject_draws(n_subjects: int, n_resamples: int, random: np.random.RandomState) -> NDArray:
    """How often each bootstrap sample holds each subject, (n_resamples, n_subjects)."""
    share = np.full(n_subjects, 1 / n_subjects)
    return random.multinomial(n_subjects, share, size=n_resamples).astype(float)


def _percentile_interval(estimates: NDArray, confidence: float = 0.95) -> tuple[float, float]:
    if len(estimates) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
