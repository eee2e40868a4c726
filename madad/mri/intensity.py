"""Intensity scales that a lesion cannot bend."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from madad.mri.resampling import check_brain_mask, check_volume, simpleitk_on_one_thread

FOREGROUND_FLOOR = 1 / 255
"""Smallest value inside the brain, so that ``X > 0`` is the brain and stays so in an 8-bit file."""


def normalize_intensity(images, brain_masks, *, subjects=None, center="median", target=0.4):
    """Map the robust centre of each subject's brain to a constant and remove the background.

    Parameters
    ----------
    images : array-like of shape (n_samples, height, width)
        Slices in any unit in which air is near 0.
    brain_masks : array-like of shape (n_samples, height, width)
        Non-zero inside the brain.
    subjects : array-like of shape (n_samples,), default=None
        Slices that share a value share one scale. None: each slice has its own.
    center : {"median", "mode"}, default="median"
        The centre of the intensities inside the brain that is mapped to `target`. The mode (highest peak of a
        smoothed histogram) follows one tissue; the median follows how much there is of each.
    target : float, default=0.4
        Where the centre goes, above 0 and below 1. At 0.4 the brain's brightest healthy tissue is below 1.

    Returns
    -------
    normalized : ndarray of shape (n_samples, height, width), float32
        In 0..1. Background is exactly 0 and the brain at least `FOREGROUND_FLOOR` (1/255), so that
        ``normalized > 0`` is the brain mask.

    Raises
    ------
    ValueError
        If shapes disagree, `images` is not finite inside the brain, `center` or `target` is out of its range,
        or a subject has an empty brain mask or a centre that is not positive.

    Notes
    -----
    ``min(1, target * image / centre)``. The usual divisor is a percentile of 99 or so, and a bright lesion
    sets it: then the healthy tissue of exactly the patients gets darker. A lesion in 20 % of the brain moves
    the median only to another percentile of the healthy tissue, however bright it is.
    """
    images, brain_masks = check_images_and_masks(images, brain_masks)
    if not 0 < target < 1:
        raise ValueError(f"target must be above 0 and below 1, got {target!r}. 0.4 leaves room above.")
    subjects = np.arange(len(images)) if subjects is None else np.asarray(subjects)
    if subjects.shape != (len(images),):
        raise ValueError(
            f"subjects must have shape ({len(images)},), got {subjects.shape}. Give one name per slice."
        )
    normalized = np.zeros(images.shape, dtype=np.float32)
    for subject, members in group_by_subject(subjects):
        brain = brain_masks[members]
        values = images[members][brain].astype(np.float64)
        name = subject.item() if isinstance(subject, np.generic) else subject
        scale = target / robust_center(values, center=center, subject=name)
        block = np.zeros(brain.shape, dtype=np.float32)
        block[brain] = np.clip(values * scale, FOREGROUND_FLOOR, 1)
        normalized[members] = block
    return normalized


def robust_center(values, *, center="median", subject=None):
    """Return a centre of tissue intensities that a lesion moves little.

    Parameters
    ----------
    values : ndarray of shape (n_pixels,)
        Intensities inside one subject's brain.
    center : {"median", "mode"}, default="median"
        The middle of the values, or the highest peak of their smoothed histogram.
    subject : object, default=None
        Whose values these are, for error messages.

    Returns
    -------
    float
        The centre, above 0, in the unit of `values`.

    Raises
    ------
    ValueError
        As `normalize_intensity`.
    """
    if center not in ("median", "mode"):
        raise ValueError(f"center must be 'median' or 'mode', got {center!r}. Use 'median' unless unsure.")
    if values.size == 0:
        raise ValueError(
            f"brain_masks must have a brain pixel for each subject, got none for subject {subject!r}. "
            "Drop its slices or repair its mask."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"images must be finite inside the brain, got NaN or infinity for subject {subject!r}. "
            "Replace them, for example with numpy.nan_to_num."
        )
    middle = float(np.median(values))
    if middle > 0 and center == "mode":
        middle = _histogram_mode(values, middle)
    if middle <= 0:
        raise ValueError(
            f"images must have a positive {center} inside the brain, got {middle:g} for subject {subject!r}. "
            "Check its brain mask and that z-scored images are shifted first."
        )
    return middle


def group_by_subject(subjects):
    """Yield each subject's name and the ascending indices of its slices.

    Parameters
    ----------
    subjects : ndarray of shape (n_samples,)
        One name per slice; slices of a subject need not be neighbours.

    Yields
    ------
    subject : object
        An element of `subjects`.
    members : ndarray of shape (n_members,), int
        Where it occurs.
    """
    names, codes = np.unique(subjects, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    yield from zip(names, np.split(order, ends[:-1]), strict=True)


def correct_bias(values, affine, brain_mask, *, grid_mm=4.0):
    """Divide a volume by the smooth field that its coil laid over the brain (N4).

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities, positive in tissue: before any z-scoring.
    affine : array-like of shape (4, 4)
        Voxel indices to world mm; its voxel sizes are used.
    brain_mask : array-like of shape (X, Y, Z)
        Non-zero where the field is estimated. Voxels not above 0 are left out there.
    grid_mm : float, default=4
        The field is estimated from every so many voxels that are about this far apart, above 0.

    Returns
    -------
    corrected : ndarray of shape (X, Y, Z), float32
        `values` over the field, whose geometric mean in the brain is 1, so that the unit stays. Zeros and
        signs stay. Far from the brain the field is a guess.

    Raises
    ------
    ImportError
        If SimpleITK is not installed.
    ValueError
        If `values`, `affine` or `brain_mask` is not as in `register_affine`, less than half of the brain is
        above 0, or `grid_mm` is not above 0.

    Notes
    -----
    Four levels of 50 iterations at most, on one thread, so that the result is always the same.

    References
    ----------
    Tustison et al., "N4ITK: improved N3 bias correction", IEEE Trans. Medical Imaging 29 (2010).
    """
    values, affine = check_volume(values, affine)
    brain = check_brain_mask(brain_mask, values)
    if not grid_mm > 0:
        raise ValueError(f"grid_mm must be above 0, got {grid_mm!r}. 4 is enough for a smooth field.")
    seen = brain & (values > 0)
    share = np.count_nonzero(seen) / np.count_nonzero(brain)
    if share < 0.5:
        raise ValueError(
            f"values must be above 0 in most of the brain, got {share:.0%}. "
            "Correct before z-scoring, or check the brain mask."
        )
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    steps = [max(1, round(grid_mm / mm)) for mm in spacing_mm]
    with simpleitk_on_one_thread() as SimpleITK:
        scaled, seen_itk = (
            SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
            for array in (values / np.median(values[seen]), seen.astype(np.uint8))
        )
        for image in (scaled, seen_itk):
            image.SetSpacing(spacing_mm.tolist())
        n4 = SimpleITK.N4BiasFieldCorrectionImageFilter()
        n4.Execute(SimpleITK.Shrink(scaled, steps), SimpleITK.Shrink(seen_itk, steps))
        log_field = SimpleITK.GetArrayFromImage(n4.GetLogBiasFieldAsImage(scaled)).transpose(2, 1, 0)
    log_field = log_field - log_field[seen].mean()
    return (values / np.exp(log_field)).astype(np.float32)


def brain_deciles(values, brain_mask):
    """Return the nine deciles of the intensities inside a brain.

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities in any unit.
    brain_mask : array-like of shape (X, Y, Z)
        Non-zero inside the brain.

    Returns
    -------
    ndarray of shape (9,)
        The deciles from 10 % to 90 %, ascending, in the unit of `values`.

    Raises
    ------
    ValueError
        If the shapes differ, the mask is empty, or an intensity inside it is not finite.
    """
    values = np.asarray(values)
    inside = values[check_brain_mask(brain_mask, values)]
    if not np.isfinite(inside).all():
        raise ValueError(
            "values must be finite inside the brain, got NaN or infinity. "
            "Replace them, for example with numpy.nan_to_num."
        )
    return np.quantile(inside.astype(np.float64), np.linspace(0.1, 0.9, 9))


def check_images_and_masks(images, brain_masks):
    """Return both as arrays of shape (n_samples, height, width), the masks as bool.

    Parameters
    ----------
    images, brain_masks : array-like of shape (n_samples, height, width)
        Slices and where their brain is.

    Returns
    -------
    images : ndarray of shape (n_samples, height, width)
        In the dtype they came in.
    brain_masks : ndarray of shape (n_samples, height, width), bool
        True = brain.

    Raises
    ------
    ValueError
        If `images` is not 3-dimensional or the shapes differ.
    """
    images, brain_masks = np.asarray(images), np.asarray(brain_masks)
    if images.ndim != 3:
        raise ValueError(
            f"images must have shape (n_samples, height, width), got {images.shape}. "
            "Add the missing axis, for example image[None], or pass one channel at a time."
        )
    if brain_masks.shape != images.shape:
        raise ValueError(
            f"brain_masks must have the shape of images, got {brain_masks.shape} and {images.shape}. "
            "Give one mask per slice on the grid of the slice."
        )
    return images, brain_masks.astype(bool)


def _histogram_mode(values, median):
    # Bins are tied to the median, so that bright lesions cannot widen them. The smoothing (about an eighth of
    # the median) bridges the gaps between the grey levels of 8-bit images.
    counts, edges = np.histogram(values, bins=96, range=(0, 3 * median))
    peak = int(np.argmax(gaussian_filter1d(counts.astype(np.float64), sigma=4)))
    return float(edges[peak] + edges[peak + 1]) / 2
