"""Reader of ``.npz`` files of real slices, and resampling that neither stretches nor grows lesions."""

import numbers
import os
import zipfile
import zlib

import numpy as np
from sklearn.utils import Bunch
from threadpoolctl import threadpool_limits

from madad.mri.intensity import (
    FOREGROUND_FLOOR,
    check_images_and_masks,
    group_by_subject,
    normalize_intensity,
)

_PER_SLICE = ("image", "brain_mask", "lesion_mask", "subject", "z_frac")


def load_slices(
    path, *, image="image", size=None, spacing_mm=None, z_range=None, center="median", target=0.4
):
    """Load slices from an ``.npz`` file: skull removed, intensities normalised, on a square grid if asked.

    Parameters
    ----------
    path : str or os.PathLike
        File with the arrays `image` (n, height, width), `brain_mask` of the same shape and `subject` (n,);
        optionally `lesion_mask` (any label above 0 is lesion), `z_frac` (n,), `modality` and `spacing_mm`
        (rows, columns, ...). Anterior at the top. Pickled arrays are refused.
    image : str, default="image"
        Name of the image array, for example "image_t1" in a file with several contrasts.
    size : int, default=None
        Height and width of the result in pixels. With `spacing_mm` the slice is padded or cropped to it at
        that spacing; without, it is padded to a square and resampled. None keeps the extent of the file.
    spacing_mm : float, default=None
        Pixel size of the result, the same in both directions.
    z_range : tuple of float, default=None
        Keep slices with ``low <= z_frac <= high`` (0 bottom, 1 top of the brain).
    center : {"median", "mode"} or None, default="median"
        Per-subject scale (see `madad.mri.intensity.normalize_intensity`), computed at full resolution from
        the slices that `z_range` keeps. None divides an 8-bit image by 255.
    target : float, default=0.4
        Where the centre goes, in 0..1.

    Returns
    -------
    sklearn.utils.Bunch
        `images` (n, H, W) float32 in 0..1, background 0, brain above 0; `brain_masks` and `lesion_masks` bool
        (no lesion anywhere if the file has no masks: see `has_lesion_masks`), lesions inside the brain only;
        `subjects` (n,) str; `z_frac` (n,) or None; `modality` str or None; `spacing_mm` (rows, columns) of
        the returned grid, or None if the file does not say.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no ``.npz`` file, lacks an array, holds pickled objects or arrays of other shapes; if an
        argument is out of its range; if no slice is left; or if `size` would cut the brain.

    Notes
    -----
    Images are averaged around each new pixel (a triangle filter; linear when enlarging) within the brain, so
    that no dark rim appears. Masks take the nearest pixel: the bicubic resize of the original code makes a
    lesion of 3 px radius 1.5 times as large.
    """
    arrays = _read(path, image)
    check_range_is_known(center, arrays["image"].dtype)
    keep = _select(arrays["z_frac"], z_range)
    arrays.update({key: arrays[key][keep] for key in _PER_SLICE if arrays[key] is not None})
    grid = Grid.choose(arrays["image"].shape[1:], arrays["spacing_mm"], size, spacing_mm)
    grid.check_holds(arrays["brain_mask"])

    images = np.empty((len(arrays["image"]), *grid.shape), dtype=np.float32)
    brain_masks, lesion_masks = np.empty(images.shape, dtype=bool), np.zeros(images.shape, dtype=bool)
    # One subject at a time: few full-resolution floats. One BLAS thread: the products are small.
    with threadpool_limits(limits=1, user_api="blas"):
        for subject, members in group_by_subject(arrays["subject"]):
            brain = arrays["brain_mask"][members]
            scaled = scale_slices(
                arrays["image"][members], brain, subject=subject, center=center, target=target
            )
            images[members], brain_masks[members] = grid.resample_brain(scaled, brain)
            if arrays["lesion_mask"] is not None:
                lesion_masks[members] = grid.resample_labels((arrays["lesion_mask"][members] > 0) & brain)
    return Bunch(
        images=images,
        brain_masks=brain_masks,
        lesion_masks=lesion_masks,
        has_lesion_masks=arrays["lesion_mask"] is not None,
        subjects=arrays["subject"],
        z_frac=arrays["z_frac"],
        modality=arrays["modality"],
        spacing_mm=grid.spacing_mm,
    )


def crop_to_brain(data, shape):
    """Move each slice's brain to the middle of a smaller window: less background, nothing stretched.

    Parameters
    ----------
    data : Bunch
        What `load_slices` or `make_brain_slices` returned; arrays with the axes of `images` are cropped, the
        others kept.
    shape : tuple of int
        Height and width of the window in pixels. The middle of the brain's bounding box goes to its centre.

    Returns
    -------
    sklearn.utils.Bunch
        The same entries, the cropped arrays of shape (n, *shape).

    Raises
    ------
    ValueError
        If a brain is larger than the window.
    """
    n, *old_shape = data.images.shape
    corners = np.zeros((n, 2), dtype=int)
    for axis, (old, new) in enumerate(zip(old_shape, shape, strict=True)):
        used = data.brain_masks.any(axis=2 - axis)
        first, last = used.argmax(axis=1), old - 1 - used[:, ::-1].argmax(axis=1)
        largest = int((last - first + 1)[used.any(axis=1)].max(initial=0))
        if largest > new:
            raise ValueError(
                f"shape must hold every brain, got {tuple(shape)} where axis {axis} needs {largest} pixels. "
                "Choose a larger window."
            )
        corners[:, axis] = (first + last + 1 - new) // 2 + new  # of arrays padded by the window's size
    cropped = dict(data)
    for name, values in data.items():
        if isinstance(values, np.ndarray) and values.shape == data.images.shape:
            padded = np.pad(values, [(0, 0), *((new, new) for new in shape)])
            windows = [
                padded[i, top : top + shape[0], left : left + shape[1]]
                for i, (top, left) in enumerate(corners)
            ]
            cropped[name] = np.stack(windows)
    return Bunch(**cropped)


def _read(path, image):
    """Return the arrays of the file under the names of its layout, None where an optional one is absent."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"path must name an existing file, got {path!r}. Check spelling and folder.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"path must name an .npz file, got {path!r}. Write one with numpy.savez_compressed.")
    wanted = {
        key: key for key in ("brain_mask", "subject", "lesion_mask", "z_frac", "modality", "spacing_mm")
    }
    wanted["image"] = image
    with np.load(path, allow_pickle=False) as file:
        keys = sorted(file.files)
        if image not in keys:
            raise ValueError(f"image must name an array of the file, got {image!r}. It has {keys}.")
        if not {"brain_mask", "subject"} <= set(keys):
            raise ValueError(f"path must name a file with brain_mask and subject, got {keys}. Add them.")
        try:
            arrays = {name: file[key] if key in keys else None for name, key in wanted.items()}
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(
                f"path must name a file of plain arrays, got a pickled or broken one in {path!r} ({error}). "
                "Save numbers and fixed-width strings only."
            ) from error
    _check_shapes(arrays)
    arrays["subject"] = arrays["subject"].astype(str)
    if image.startswith("image_"):  # a file of several contrasts names each in its array: image_flair
        arrays["modality"] = image.removeprefix("image_").upper()
    elif arrays["modality"] is not None:
        arrays["modality"] = str(arrays["modality"])
    if arrays["spacing_mm"] is not None:
        # One number for both directions, or rows, columns and perhaps slices.
        arrays["spacing_mm"] = tuple(np.resize(arrays["spacing_mm"], 2).tolist())
    return arrays


def _check_shapes(arrays):
    arrays["image"], arrays["brain_mask"] = check_images_and_masks(arrays["image"], arrays["brain_mask"])
    n = len(arrays["image"])
    expected = {"lesion_mask": arrays["image"].shape, "subject": (n,), "z_frac": (n,)}
    for key, shape in expected.items():
        if arrays[key] is not None and arrays[key].shape != shape:
            raise ValueError(
                f"{key} must have shape {shape}, got {arrays[key].shape}. Save one entry per slice of image."
            )


def _select(z_frac, z_range):
    if z_range is None:
        return slice(None)
    if z_frac is None:
        raise ValueError(f"z_range must be None for a file without z_frac, got {z_range!r}. Add that array.")
    low, high = z_range
    keep = np.flatnonzero((z_frac >= low) & (z_frac <= high))
    if keep.size == 0:
        raise ValueError(
            f"z_range must contain a slice, got {z_range!r}. "
            f"The file has {z_frac.min():.2f} to {z_frac.max():.2f}."
        )
    return keep


def check_range_is_known(center, dtype):
    """Raise ValueError where ``center=None`` asks to divide by 255 what is not 8-bit.

    Parameters
    ----------
    center : {"median", "mode"} or None
        What scales a subject, as in `load_slices`.
    dtype : numpy.dtype
        Type of the numbers in the file.

    Raises
    ------
    ValueError
        If `center` is None and `dtype` is not uint8.
    """
    if center is None and dtype != np.uint8:
        raise ValueError(
            f"center must be 'median' or 'mode' unless images are uint8, got None with {dtype}. "
            "Only 8-bit images have a known range."
        )


def scale_slices(images, brain_masks, *, subject, center, target):
    """Bring slices of one subject to 0..1 at full resolution.

    Parameters
    ----------
    images : ndarray of shape (n, h, w)
        Slices in the unit of the file.
    brain_masks : ndarray of shape (n, h, w), bool
        True = brain, on the grid of the images.
    subject : str
        Whose slices they are, for error messages.
    center : {"median", "mode"} or None
        The centre of intensities that goes to `target`. None divides by 255.
    target : float
        Where the centre goes, above 0 and below 1.

    Returns
    -------
    ndarray of shape (n, h, w), float32
        In 0..1; 0 outside the brain.
    """
    if center is None:
        return np.where(brain_masks, images / np.float32(255), 0)
    subjects = np.full(len(images), subject)
    return normalize_intensity(images, brain_masks, subjects=subjects, center=center, target=target)


class Grid:
    """A centred output grid: where each new row and column lies on the grid of the file.

    Padding, cropping and resampling are one operation. New pixels are square in millimetres, or in pixels of
    the file where its spacing is unknown: nothing is stretched.

    Parameters
    ----------
    old_shape : tuple of int (h, w)
        Size of the file's slices in pixels.
    shape : tuple of int (H, W)
        Size of the new slices in pixels.
    scales : tuple of 2 floats
        Height and width of a new pixel in pixels of the file.
    spacing_mm : tuple of 2 floats or None
        Height and width of a new pixel in mm. None: not known.

    Attributes
    ----------
    old_shape, shape, scales, spacing_mm
        The parameters of the same names.
    positions : list of 2 ndarrays
        Where new rows and columns lie, counted in pixels of the file from the middle of the first.
    weights : list of 2 ndarrays
        Weights of the file's rows in new ones, (H, h), and of its columns, (W, w).
    """

    def __init__(self, old_shape, shape, scales, spacing_mm):
        self.old_shape, self.shape, self.scales = tuple(old_shape), tuple(shape), tuple(scales)
        self.spacing_mm = spacing_mm
        self.positions = [_positions(*axis) for axis in zip(old_shape, shape, scales, strict=True)]
        self.weights = [
            _triangle_weights(*axis) for axis in zip(old_shape, self.positions, scales, strict=True)
        ]

    @classmethod
    def choose(cls, old_shape, old_spacing_mm, size, spacing_mm):
        """Build the grid that `load_slices` describes.

        Parameters
        ----------
        old_shape : tuple of int (h, w)
            Size of the file's slices in pixels.
        old_spacing_mm : sequence of 2 floats or None
            Height and width of the file's pixels in mm. None: not known.
        size : int or None
            Height and width of the result in pixels, above 0. None keeps the extent of the file.
        spacing_mm : float or None
            Pixel size of the result in mm, above 0. None keeps the file's where there is no `size`.

        Returns
        -------
        Grid
            Centred on the middle of the file's slices.

        Raises
        ------
        ValueError
            If `size` or `spacing_mm` is out of its range, or `spacing_mm` is given and that of the file is
            not known.
        """
        if size is not None and not (isinstance(size, numbers.Integral) and size > 0):
            raise ValueError(f"size must be a positive integer, got {size!r}. None keeps the file's grid.")
        if spacing_mm is not None and not spacing_mm > 0:
            raise ValueError(
                f"spacing_mm must be positive, got {spacing_mm!r}. None keeps the file's spacing."
            )
        if spacing_mm is not None:
            if old_spacing_mm is None:
                raise ValueError(
                    f"spacing_mm must be None for a file that lacks it, got {spacing_mm!r}. Use size alone."
                )
            scales = [spacing_mm / mm for mm in old_spacing_mm]
        elif size is not None:
            pixel = old_spacing_mm or (1.0, 1.0)
            longest = max(n * length for n, length in zip(old_shape, pixel, strict=True))
            scales = [longest / size / length for length in pixel]
        else:
            scales = [1.0, 1.0]
        if old_spacing_mm is not None:
            spacing_mm = tuple(mm * scale for mm, scale in zip(old_spacing_mm, scales, strict=True))
        shape = [size or int(np.ceil(n / scale)) for n, scale in zip(old_shape, scales, strict=True)]
        return cls(old_shape, shape, scales, spacing_mm)

    def check_holds(self, brain_masks):
        """Raise ValueError if the grid leaves brain pixels outside.

        Parameters
        ----------
        brain_masks : ndarray of shape (n, h, w), bool
            True = brain, on the grid of the file.
        """
        lost, needed = False, 0
        axes = zip((2, 1), self.old_shape, self.positions, self.scales, strict=True)
        for other_axis, old, positions, scale in axes:
            used = np.flatnonzero(brain_masks.any(axis=(0, other_axis)))
            if used.size == 0:
                continue
            lost |= used[0] < positions[0] - scale / 2 or used[-1] > positions[-1] + scale / 2
            middle = (old - 1) / 2
            needed = max(needed, int(np.ceil(2 * max(middle - used[0], used[-1] - middle) / scale)) + 1)
        if lost:
            raise ValueError(
                f"size must hold the brain, got {self.shape[0]} where it needs {needed}. "
                "Choose a larger size or a larger spacing_mm."
            )

    def resample_brain(self, images, brain_masks):
        """Average images over the brain part of each new pixel.

        Parameters
        ----------
        images : ndarray of shape (n, h, w)
            Slices in 0..1 on the grid of the file.
        brain_masks : ndarray of shape (n, h, w), bool
            True = brain, on the grid of the file.

        Returns
        -------
        images : ndarray of shape (n, H, W), float32
            In 0..1; 0 outside the brain, `FOREGROUND_FLOOR` or more inside.
        brain_masks : ndarray of shape (n, H, W), bool
            The masks by `resample_labels`.
        """
        new_masks = self.resample_labels(brain_masks)
        share = self._average(brain_masks.astype(np.float32))
        averaged = self._average(images.astype(np.float32, copy=False)) / np.maximum(share, 1e-6)
        return np.where(new_masks, averaged.clip(FOREGROUND_FLOOR, 1), 0).astype(np.float32), new_masks

    def resample_labels(self, masks):
        """Take the nearest pixel of masks.

        Parameters
        ----------
        masks : ndarray of shape (n, h, w), bool
            Masks on the grid of the file.

        Returns
        -------
        ndarray of shape (n, H, W), bool
            The masks on the new grid; False outside that of the file.
        """
        nearest = [np.floor(positions + 0.5).astype(int) for positions in self.positions]
        rows, columns = (index.clip(0, n - 1) for index, n in zip(nearest, self.old_shape, strict=True))
        inside = (rows == nearest[0])[:, None] & (columns == nearest[1])
        return masks[:, rows[:, None], columns] & inside

    def _average(self, images):
        return self.weights[0] @ images @ self.weights[1].T


def _positions(n_old, n_new, scale):
    start = (n_old - 1) / 2 - (n_new - 1) / 2 * scale
    if scale == 1:
        start = np.floor(start)  # half a pixel off centre, but no blur
    return start + np.arange(n_new) * scale


def _triangle_weights(n_old, positions, scale):
    """Weights (n_new, n_old): a triangle one new pixel wide to each side, at least one old pixel."""
    distance = np.abs(positions[:, None] - np.arange(n_old)) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    return (weights / max(scale, 1)).astype(np.float32)
