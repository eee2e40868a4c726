"""How well anomaly maps find lesions: Dice, ranking metrics, lesion counts, confidence intervals, scorers.

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
"""

from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.utils import check_random_state


class MaxDice(NamedTuple):
    """Largest Dice (0..1) and the threshold, in units of the map, that reaches it."""

    dice: float
    oracle_threshold: float


class LesionDetection(NamedTuple):
    """Lesion-wise recall and precision (0..1, NaN where there was nothing to count), and their totals."""

    recall: float
    precision: float
    n_lesions: int
    n_detections: int


class _Pixels(NamedTuple):
    """Validated arrays, each (n, n_pixels); `lesion` is False outside the brain."""

    lesion: NDArray
    score: NDArray
    brain: NDArray


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
    lesion_masks, anomaly_maps, brain_masks : array-like of shape (n, H, W)
        See the module's docstring. Slices without a lesion pixel are left out.
    n_thresholds : int >= 2, default=None
        None tries every distinct value of the maps, which is exact. A number tries that many equally spaced
        values from the largest to the smallest, as evaluation scripts with a fixed grid do.

    Returns
    -------
    MaxDice
        Of equally good thresholds the highest.

    Notes
    -----
    The Dice of one slice is a step function of the threshold that changes only at the slice's own values. The
    steps of all slices, sorted once by threshold and summed up, are the mean Dice at every threshold.
    """
    pixels = _validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    with_lesion = np.flatnonzero(pixels.lesion.any(axis=1))
    curves = [_dice_curve(*(array[i] for array in pixels)) for i in with_lesion]
    thresholds = np.concatenate([values for values, _ in curves])
    steps = np.concatenate([np.diff(dice, prepend=0.0) for _, dice in curves])

    order = np.argsort(-thresholds, kind="stable")
    last_of_ties = _last_of_ties(thresholds[order])
    mean_dice = np.cumsum(steps[order])[last_of_ties] / len(curves)
    best = _highest(thresholds[order][last_of_ties], mean_dice, n_thresholds)
    # Recounted, so that the rounding of millions of summed steps does not show.
    return best._replace(dice=_mean_dice(pixels, best.oracle_threshold))


def max_dice_pooled(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    brain_masks: ArrayLike | None = None,
    *,
    n_thresholds: int | None = None,
) -> MaxDice:
    """Largest Dice over the pixels of all slices together; otherwise as `max_dice_per_image`."""
    pixels = _validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    return _highest(*_dice_curve(*pixels), n_thresholds)


def dice_per_image(
    lesion_masks: ArrayLike, anomaly_maps: ArrayLike, threshold: float, brain_masks: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Dice (n,) of each slice at a threshold on the maps' scale; 0..1, NaN without a lesion pixel."""
    return _dice_per_image(_validated(lesion_masks, anomaly_maps, brain_masks), threshold)


def dice_at_threshold(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    threshold: float,
    brain_masks: ArrayLike | None = None,
    *,
    average: Literal["image", "pooled"] = "image",
) -> float:
    """Dice (0..1) at a threshold: mean over slices with a lesion ("image") or over all pixels ("pooled")."""
    if average not in ("image", "pooled"):
        raise ValueError(f'average must be "image" or "pooled", got {average!r}. Choose one of the two.')
    pixels = _validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    if average == "pooled":  # one image that holds all pixels
        lesion, score, brain = (array.reshape(1, -1) for array in pixels)
        pixels = _Pixels(lesion, score, brain)
    return _mean_dice(pixels, threshold)


def auprc(lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None = None) -> float:
    """Average precision (0..1) over the pixels of all slices; there must be lesion and healthy pixels."""
    pixels = _validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    return float(average_precision_score(*_two_classes(pixels)))


def auroc(lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None = None) -> float:
    """Area under the ROC curve (0..1) over the pixels of all slices; otherwise as `auprc`."""
    pixels = _validated(lesion_masks, anomaly_maps, brain_masks, needs_lesion=True)
    return float(roc_auc_score(*_two_classes(pixels)))


def lesion_detection(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    threshold: float,
    brain_masks: ArrayLike | None = None,
    *,
    min_size_px: int = 1,
    connectivity: int | None = None,
) -> LesionDetection:
    """Count lesions found and detections confirmed, by connected components of each slice.

    A lesion is found when one of its pixels lies in a detection; a detection is confirmed when one of its
    pixels is a lesion pixel (of a lesion of any size).

    Parameters
    ----------
    lesion_masks, anomaly_maps, threshold, brain_masks
        As for `dice_per_image`.
    min_size_px : int >= 1, default=1
        Smaller components are not counted, neither lesions nor detections.
    connectivity : int, default=None
        As for `scipy.ndimage.generate_binary_structure`: in 2-d, 1 joins 4 and 2 joins 8 neighbours. None
        joins all neighbours, diagonal ones included.

    Returns
    -------
    LesionDetection
        `recall` = found / `n_lesions` and `precision` = confirmed / `n_detections`.
    """
    if min_size_px < 1:
        raise ValueError(f"min_size_px must be at least 1, got {min_size_px!r}. Use 1 to count everything.")
    pixels, shape = _validated(lesion_masks, anomaly_maps, brain_masks), np.shape(anomaly_maps)
    is_lesion = pixels.lesion.reshape(shape)
    lesions = _components(is_lesion, min_size_px, connectivity)
    detections = _components(_predicted(pixels, threshold).reshape(shape), min_size_px, connectivity)

    def share(components: NDArray, hits: NDArray) -> tuple[float, int]:
        n_all = np.unique(components[components > 0]).size
        n_hit = np.unique(components[(components > 0) & hits]).size
        return (n_hit / n_all if n_all else float("nan")), n_all

    recall, n_lesions = share(lesions, detections > 0)
    precision, n_detections = share(detections, is_lesion)
    return LesionDetection(recall, precision, n_lesions, n_detections)


def size_strata(
    lesion_masks: ArrayLike, *, edges_px: tuple[float, float, float] = (3, 71, 570), reference_size: int = 128
) -> NDArray[np.str_]:
    """Lesion-size class of each slice: "none", "small", "medium" or "large"; (n,).

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W)
        True = lesion.
    edges_px : three increasing floats, default=(3, 71, 570)
        Largest areas of "none" (no lesion, or too small for the published bins), "small" and "medium", in
        pixels of a slice of `reference_size` squared; they scale with the area of the slices. The defaults
        are THOR's (Bercea et al., "Diffusion Models with Implicit Guidance for Medical Anomaly Detection",
        MICCAI 2024).
    reference_size : int, default=128
        Height and width in pixels to which the edges refer.
    """
    lesion = _as_bool("lesion_masks", lesion_masks)
    if lesion.ndim != 3 or lesion.size == 0:
        raise ValueError(f"lesion_masks must have shape (n, H, W), got {lesion.shape}. Pass 2-d slices.")
    edges = np.asarray(edges_px, dtype=float)
    if edges.shape != (3,) or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges_px must be three increasing numbers, got {edges_px}. Give areas in pixels.")
    if not reference_size > 0:
        raise ValueError(f"reference_size must be positive, got {reference_size}. Give a height in pixels.")
    scale = lesion[0].size / reference_size**2
    strata = np.digitize(lesion.sum(axis=(1, 2)), edges * scale, right=True)
    return np.array(["none", "small", "medium", "large"])[strata]


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
    codes = np.unique(_subject_codes(subjects, len(numbers))[known], return_inverse=True)[1]
    counts, sums = np.bincount(codes), np.bincount(codes, weights=numbers[known])
    draws = _subject_draws(len(counts), n_resamples, random_state)
    return _percentile_interval((draws @ sums) / (draws @ counts), confidence)


def evaluate_maps(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    brain_masks: ArrayLike | None = None,
    *,
    subjects: ArrayLike | None = None,
    threshold: float | None = None,
    random_state: int | np.random.RandomState | None = 0,
) -> dict[str, Any]:
    """All numbers that a results table needs, in plain floats ready for JSON.

    Parameters
    ----------
    lesion_masks, anomaly_maps, brain_masks : array-like of shape (n, H, W)
        See the module's docstring.
    subjects, random_state
        As for `bootstrap_ci`.
    threshold : float, default=None
        A threshold calibrated on healthy data, in units of the map.

    Returns
    -------
    dict
        `auprc`, `auprc_ci95`, `auroc`, `max_dice_per_image`, `max_dice_per_image_ci95`,
        `oracle_threshold_per_image`, `max_dice_pooled`, `oracle_threshold_pooled`, and with `threshold` also
        `calibrated_dice` (per image), `calibrated_dice_ci95`, `calibrated_threshold`. Intervals are
        [low, high], 95 %, over subjects; [NaN, NaN] with fewer than two subjects.

    Notes
    -----
    The interval of the max Dice keeps the oracle threshold fixed. The interval of the AUPRC takes 200
    resamples of maps quantised by rank to at most 4096 levels, which lie at lesion pixels because average
    precision moves nowhere else: with up to 4096 distinct lesion values each resample is exact.
    """
    arrays = (lesion_masks, anomaly_maps, brain_masks)
    pixels = _validated(*arrays, needs_lesion=True)
    codes = _subject_codes(subjects, len(pixels.score))
    per_image, pooled = max_dice_per_image(*arrays), max_dice_pooled(*arrays)

    def dice_interval(at: float) -> list[float]:
        return list(bootstrap_ci(_dice_per_image(pixels, at), codes, random_state=random_state))

    results: dict[str, Any] = {
        "auprc": auprc(*arrays),
        "auprc_ci95": list(_auprc_interval(pixels, codes, random_state)),
        "auroc": auroc(*arrays),
        "max_dice_per_image": per_image.dice,
        "max_dice_per_image_ci95": dice_interval(per_image.oracle_threshold),
        "oracle_threshold_per_image": per_image.oracle_threshold,
        "max_dice_pooled": pooled.dice,
        "oracle_threshold_pooled": pooled.oracle_threshold,
    }
    if threshold is not None:
        results["calibrated_dice"] = _mean_dice(pixels, threshold)
        results["calibrated_dice_ci95"] = dice_interval(threshold)
        results["calibrated_threshold"] = float(threshold)
    return results


def max_dice_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Per-image max Dice of `estimator.predict_maps(X)`: a scikit-learn scorer.

    `y` holds lesion masks, (n, H, W) or flattened to (n, H * W). No brain mask is applied: the maps of this
    library's detectors are already zero outside the brain.
    """
    return max_dice_per_image(*_truth_and_maps(estimator, X, y)).dice


def pooled_max_dice_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Pooled max Dice; otherwise `max_dice_scorer`."""
    return max_dice_pooled(*_truth_and_maps(estimator, X, y)).dice


def auprc_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Average precision over pixels, background included; otherwise `max_dice_scorer`."""
    return auprc(*_truth_and_maps(estimator, X, y))


def image_auroc_scorer(estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
    """Area under the ROC curve of `-estimator.score_samples(X)`: a scikit-learn scorer for whole images.

    `y` is (n,), 1 = anomaly and 0 = normal, or lesion masks: an image with any lesion pixel is an anomaly.
    """
    masks = _as_bool("y", y, advice="Pass 1 for anomalies and 0 for normal images, e.g. y == -1.")
    labels = masks.reshape(len(masks), -1).max(axis=1)
    if labels.all() or not labels.any():
        counts = f"{labels.sum()} anomalies in {labels.size} images"
        raise ValueError(f"y must hold both classes, got {counts}. Add images of the other class.")
    return float(roc_auc_score(labels, -np.asarray(estimator.score_samples(X))))


def _truth_and_maps(estimator: Any, X: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    maps, masks = np.asarray(estimator.predict_maps(X)), np.asarray(y)
    if masks.ndim < 2 or len(masks) != len(maps) or masks.size != maps.size:
        got = f"shape {masks.shape} for maps {maps.shape}"
        raise ValueError(f"y must hold one lesion mask per map, got {got}. Pass (n, H, W) or (n, H * W).")
    return masks.reshape(maps.shape), maps


def _as_bool(name: str, values: ArrayLike, advice: str = "Binarise it first, e.g. with > 0.") -> NDArray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold booleans or 0 and 1, got dtype {array.dtype}. {advice}")
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise ValueError(f"{name} must hold only 0 and 1, got the value {wrong[0]}. {advice}")
    return array.astype(bool)


def _validated(
    lesion_masks: ArrayLike, anomaly_maps: ArrayLike, brain_masks: ArrayLike | None, needs_lesion=False
) -> _Pixels:
    maps = np.asarray(anomaly_maps)
    if maps.dtype.kind not in "biuf":
        raise TypeError(f"anomaly_maps must hold real numbers, got dtype {maps.dtype}. Convert to float.")
    if maps.ndim < 2 or maps.size == 0:
        raise ValueError(f"anomaly_maps must have shape (n, H, W), n > 0, got {maps.shape}. Stack the maps.")
    if maps.dtype not in (np.float32, np.float64):
        maps = maps.astype(np.float64)
    lesion = _as_bool("lesion_masks", lesion_masks)
    brain = np.ones(maps.shape, dtype=bool) if brain_masks is None else _as_bool("brain_masks", brain_masks)
    for name, masks in (("lesion_masks", lesion), ("brain_masks", brain)):
        if masks.shape != maps.shape:
            expected = f"have the shape of anomaly_maps {maps.shape}"
            raise ValueError(f"{name} must {expected}, got {masks.shape}. Pass one mask per map.")
    unusable = maps[brain & ~np.isfinite(maps)]
    if unusable.size:
        got = f"{unusable[0]} in {unusable.size} pixels"
        raise ValueError(f"anomaly_maps must be finite in the brain, got {got}. Repair or mask them.")
    lesion &= brain
    if needs_lesion and not lesion.any():
        got = f"none in {len(lesion)} slices"
        raise ValueError(f"lesion_masks must have lesion pixels in the brain, got {got}. Add lesions.")
    flat = (len(maps), -1)
    return _Pixels(lesion.reshape(flat), maps.reshape(flat), brain.reshape(flat))


def _two_classes(pixels: _Pixels) -> tuple[NDArray, NDArray]:
    """Truth and score of all brain pixels, (n_brain_pixels,)."""
    lesion = pixels.lesion[pixels.brain]
    if lesion.all():
        got = f"lesion in all {lesion.size} pixels"
        raise ValueError(f"lesion_masks must leave healthy pixels, got {got}. Check the masks' polarity.")
    return lesion, pixels.score[pixels.brain]


def _subject_codes(subjects: ArrayLike | None, n: int) -> NDArray:
    """Subjects numbered 0, 1, ...; (n,)."""
    labels = np.arange(n) if subjects is None else np.asarray(subjects)
    if labels.shape != (n,):
        raise ValueError(f"subjects must have shape ({n},), got {labels.shape}. Pass one label per slice.")
    return np.unique(labels, return_inverse=True)[1]


def _predicted(pixels: _Pixels, threshold: float) -> NDArray:
    if not isinstance(threshold, Real):
        raise TypeError(f"threshold must be a number, got {threshold!r}. Pass a value on the maps' scale.")
    if np.isnan(threshold):
        raise ValueError(f"threshold must not be NaN, got {threshold}. Pass a value on the maps' scale.")
    with np.errstate(over="ignore"):  # in the maps' own precision: 0.1 is the float32 next to 0.1
        return (pixels.score >= pixels.score.dtype.type(threshold)) & pixels.brain


def _dice_per_image(pixels: _Pixels, threshold: float) -> NDArray:
    predicted = _predicted(pixels, threshold)
    n_lesion = pixels.lesion.sum(axis=1)
    n_overlap = (predicted & pixels.lesion).sum(axis=1)
    undefined = np.full(len(n_lesion), np.nan)
    return np.divide(2.0 * n_overlap, n_lesion + predicted.sum(axis=1), out=undefined, where=n_lesion > 0)


def _mean_dice(pixels: _Pixels, threshold: float) -> float:
    return float(_dice_per_image(pixels, threshold)[pixels.lesion.any(axis=1)].mean())


def _last_of_ties(descending: NDArray) -> NDArray:
    return np.flatnonzero(np.append(descending[1:] != descending[:-1], True))


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


def _components(foreground: NDArray, min_size_px: int, connectivity: int | None) -> NDArray:
    """Label connected components within each slice; 0 where there is none or a small one."""
    n_axes = foreground.ndim - 1
    if connectivity is not None and not 1 <= connectivity <= n_axes:
        raise ValueError(f"connectivity must be in 1..{n_axes}, got {connectivity}. Leave it at None.")
    structure = np.zeros((3,) * foreground.ndim, dtype=bool)
    structure[1] = ndimage.generate_binary_structure(n_axes, connectivity or n_axes)  # no link between slices
    labels, _ = ndimage.label(foreground, structure)
    labels[np.bincount(labels.ravel())[labels] < min_size_px] = 0
    return labels


def _subject_draws(n_subjects: int, n_resamples: int, random_state: Any) -> NDArray:
    """How often each bootstrap sample holds each subject, (n_resamples or 0, n_subjects)."""
    if n_subjects < 2:
        return np.zeros((0, n_subjects))
    share = np.full(n_subjects, 1 / n_subjects)
    return check_random_state(random_state).multinomial(n_subjects, share, size=n_resamples).astype(float)


def _percentile_interval(estimates: NDArray, confidence: float = 0.95) -> tuple[float, float]:
    if len(estimates) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _auprc_interval(
    pixels: _Pixels, codes: NDArray, random_state: Any, n_levels: int = 4096, n_resamples: int = 200
) -> tuple[float, float]:
    """Bootstrap interval of the AUPRC; a resample is a weighted sum of the subjects' histograms."""
    levels = np.unique(pixels.score[pixels.lesion])
    if len(levels) > n_levels:
        ranks = np.linspace(0, 1, n_levels)
        levels = np.unique(np.quantile(pixels.score[pixels.lesion], ranks, method="lower"))
    reached = pixels.brain & (pixels.score >= levels[0])  # pixels below every lesion pixel change nothing
    bins = np.searchsorted(levels, pixels.score[reached], side="right") - 1
    bins += np.repeat(codes, reached.sum(axis=1)) * len(levels)
    n_subjects = codes.max() + 1

    def n_above(of_bins: NDArray) -> NDArray:
        """Count pixels at or above each level, from the top; (n_subjects, n_levels)."""
        histogram = np.bincount(of_bins, minlength=n_subjects * len(levels)).reshape(n_subjects, -1)
        return np.cumsum(histogram[:, ::-1], axis=1, dtype=float)

    draws = _subject_draws(n_subjects, n_resamples, random_state)
    n_predicted, n_overlap = draws @ n_above(bins), draws @ n_above(bins[pixels.lesion[reached]])
    precision = n_overlap / np.maximum(n_predicted, 1)
    summed = (np.diff(n_overlap, axis=1, prepend=0.0) * precision).sum(axis=1)
    has_lesion = n_overlap[:, -1] > 0  # AUPRC is undefined for a resample without
    return _percentile_interval(summed[has_lesion] / n_overlap[has_lesion, -1])
