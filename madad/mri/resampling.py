"""Volumes as arrays with an affine: what they must be, and how they come onto other grids."""

import itertools
from contextlib import contextmanager

import numpy as np
from scipy import ndimage

MAX_EXTENT_MM = 1000
"""Longest box to resample."""


def check_volume(values, affine):
    """Return a volume as float32 and its affine as float64, or say what is wrong with them.

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities in any unit.
    affine : array-like of shape (4, 4)
        Voxel indices to world mm.

    Returns
    -------
    values : ndarray of shape (X, Y, Z), float32
        The intensities, finite and not constant.
    affine : ndarray of shape (4, 4)
        The affine in float64, finite and invertible.

    Raises
    ------
    ValueError
        If `values` is not 3-dimensional, not finite or constant, or `affine` no invertible (4, 4) matrix.
    """
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 3:
        raise ValueError(f"values must have shape (X, Y, Z), got {values.shape}. Give one volume at a time.")
    n_bad = values.size - np.count_nonzero(np.isfinite(values))
    if n_bad:
        raise ValueError(
            f"values must be finite, got NaN or infinity in {n_bad} voxels. "
            "Replace them, for example with numpy.nan_to_num."
        )
    if values.size == 0 or values.min() == values.max():
        got = "no voxel" if values.size == 0 else f"{values.flat[0]:g} everywhere"
        raise ValueError(f"values must show a brain, got {got}. Leave the file out.")
    return values, _check_affine(affine, "affine")


def check_brain_mask(brain_mask, values):
    """Return a mask as bool, or say what is wrong with it.

    Parameters
    ----------
    brain_mask : array-like of shape (X, Y, Z)
        Non-zero inside the brain.
    values : ndarray of shape (X, Y, Z)
        The volume it belongs to.

    Returns
    -------
    ndarray of shape (X, Y, Z), bool
        True = brain, in at least one voxel.

    Raises
    ------
    ValueError
        If the shapes differ or the mask is empty.
    """
    brain = np.asarray(brain_mask) > 0
    if brain.shape != values.shape:
        raise ValueError(
            f"brain_mask must have the shape of values, got {brain.shape} and {values.shape}. "
            "Resample it to the volume's grid."
        )
    if not brain.any():
        raise ValueError("brain_mask must have a brain voxel, got none. Repair it, or use find_brain.")
    return brain


def resample_to(values, affine, target_shape, target_affine, matrix=None, *, order=1):
    """Bring a volume onto another grid.

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities in any unit, or labels.
    affine : array-like of shape (4, 4)
        Voxel indices of `values` to its world mm.
    target_shape : tuple of int
        Shape of the result.
    target_affine : array-like of shape (4, 4)
        Voxel indices of the result to its world mm.
    matrix : array-like of shape (4, 4), default=None
        World of `values` to the world of the result: `AffineRegistration.matrix` from the volume's grid to
        the template's, its inverse for the way back. None: they are the same world.
    order : {1, 0}, default=1
        1: linear. 0: nearest voxel, for masks and labels.

    Returns
    -------
    ndarray of shape target_shape
        float32 for order 1, the dtype of `values` for order 0; 0 outside the grid of `values`. Nothing is
        smoothed first, so a much coarser grid aliases.

    Raises
    ------
    ValueError
        If `order` is neither, or an array is not of its shape or an affine is singular.
    """
    values = np.asarray(values)
    if order not in (0, 1):
        raise ValueError(f"order must be 0 or 1, got {order!r}. Use 1 for images and 0 for masks.")
    if values.ndim != 3 or len(target_shape) != 3:
        raise ValueError(
            f"values and target_shape must have 3 dimensions, got {values.shape} and {tuple(target_shape)}. "
            "Resample one volume at a time."
        )
    affine = _check_affine(affine, "affine")
    target_affine = _check_affine(target_affine, "target_affine")
    matrix = np.eye(4) if matrix is None else _check_affine(matrix, "matrix")
    pull = np.linalg.inv(affine) @ np.linalg.inv(matrix) @ target_affine
    if order == 1:
        values = values.astype(np.float32, copy=False)
    source = values.view(np.uint8) if values.dtype == bool else values
    resampled = ndimage.affine_transform(
        source, pull[:3, :3], pull[:3, 3], tuple(target_shape), order=order, mode="grid-constant"
    )
    return resampled.view(values.dtype)


def resample_mask(mask, affine, target_shape, target_affine, matrix=None):
    """Bring a mask onto another grid with smoother borders than the nearest voxel's.

    Parameters
    ----------
    mask : array-like of shape (X, Y, Z)
        Values above 0 are inside.
    affine : array-like of shape (4, 4)
        Voxel indices of `mask` to its world mm.
    target_shape : tuple of int
        Shape of the result.
    target_affine : array-like of shape (4, 4)
        Voxel indices of the result to its world mm.
    matrix : array-like of shape (4, 4), default=None
        World of `mask` to the world of the result, as in `resample_to`. None: they are the same world.

    Returns
    -------
    ndarray of shape target_shape, bool
        Where linear interpolation of the mask gives more than half.
    """
    share = (np.asarray(mask) > 0).astype(np.float32)
    return resample_to(share, affine, target_shape, target_affine, matrix) > 0.5


def to_isotropic(values, affine, region, spacing_mm, *, margin_mm=0):
    """Resample the box around a region to cubes along the world's axes.

    Parameters
    ----------
    values : ndarray of shape (X, Y, Z), float32
        Intensities in any unit.
    affine : ndarray of shape (4, 4)
        Voxel indices to world mm.
    region : ndarray of shape (X, Y, Z), bool
        What to keep; not empty.
    spacing_mm : float
        Edge of a cube in mm, above 0. Finer volumes are smoothed to it first.
    margin_mm : float, default=0
        Added in mm on all sides of the box, from 0; the result is 0 outside `values`.

    Returns
    -------
    cubes : ndarray of shape (X', Y', Z'), float32
        The resampled volume.
    cube_affine : ndarray of shape (4, 4)
        Voxel indices of `cubes` to world mm: positive multiples of the axes, no rotation.

    Raises
    ------
    ValueError
        If the box is longer than a metre, as after a mistake in the unit.
    """
    indices = [np.flatnonzero(region.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    corners = itertools.product(*[(index[0] - 0.5, index[-1] + 0.5) for index in indices])
    corners_mm = np.array([(*corner, 1) for corner in corners]) @ affine[:3].T
    low, high = corners_mm.min(axis=0) - margin_mm, corners_mm.max(axis=0) + margin_mm
    if (high - low).max() > MAX_EXTENT_MM:
        raise ValueError(
            f"affine must give the region at most {MAX_EXTENT_MM} mm, got {(high - low).max():.0f} mm. "
            "Repair the header's unit or voxel size."
        )
    cube_affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    cube_affine[:3, 3] = low
    shape = tuple(np.ceil((high - low) / spacing_mm).astype(int) + 1)

    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    fwhm_mm = np.sqrt(np.maximum(spacing_mm**2 - voxel_mm**2, 0))
    smooth = ndimage.gaussian_filter(values, fwhm_mm / 2.355 / voxel_mm)
    return resample_to(smooth, affine, shape, cube_affine), cube_affine


def largest_part(mask):
    """Return the largest component of a mask, voxels being connected by faces.

    Parameters
    ----------
    mask : ndarray of shape (X, Y, Z), bool
        Any number of components, also none.

    Returns
    -------
    ndarray of shape (X, Y, Z), bool
        At most one component.
    """
    labels, n = ndimage.label(mask)
    if n < 2:
        return mask
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


@contextmanager
def simpleitk_on_one_thread():
    """Lend the module SimpleITK; its sums come in another order on other numbers of threads.

    Yields
    ------
    module
        SimpleITK, whose default number of threads is 1 until the block ends.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise ImportError(
            "Registration and bias correction must use SimpleITK, got no SimpleITK. "
            'Install it: pip install "madad[mri]".'
        ) from error
    n_threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield SimpleITK
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(n_threads)


def _check_affine(affine, name):
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"{name} must have shape (4, 4), got {affine.shape}. Take it from the NIfTI header.")
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-9):
        raise ValueError(f"{name} must be finite and invertible, got {affine.tolist()}. Repair the header.")
    return affine
