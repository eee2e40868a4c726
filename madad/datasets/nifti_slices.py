"""Axial slices of a cohort's volumes, on one grid."""

import numbers

import numpy as np
from sklearn.utils import Bunch
from threadpoolctl import threadpool_limits

from madad.datasets.npz_slices import Grid, check_range_is_known, scale_slices
from madad.mri.brain import is_stripped
from madad.mri.nifti import check_same_grid, read_volume


def load_scans(
    scans,
    *,
    contrast,
    z_range=None,
    every=1,
    size=None,
    spacing_mm=None,
    center="median",
    target=0.4,
    largest_lesion_only=False,
):
    """Load axial slices of volumes: skull removed, intensities normalised, on one grid.

    Parameters
    ----------
    scans : iterable of Scan
        What `find_ixi`, `find_atlas`, `find_brats`, `find_bids` or `find_scans` returned; all with a lesion
        mask or all without.
    contrast : str
        The image of each scan that is read, for example "T1"; upper and lower case are the same.
    z_range : tuple of float, default=None
        Keep slices with ``low <= z_frac <= high`` (0 lowest, 1 highest slice with brain). None keeps all
        that have brain.
    every : int, default=1
        Keep every so many of these slices, counted from the lowest; at least 1.
    size : int, default=None
        Height and width of the result in pixels, as in `load_slices`.
    spacing_mm : float, default=None
        Pixel size of the result in mm, as in `load_slices`.
    center : {"median", "mode"} or None, default="median"
        Per-scan scale, as in `load_slices`, computed from the slices that `z_range` and `every` keep. None
        needs volumes stored as unscaled 8-bit numbers.
    target : float, default=0.4
        Where the centre goes, in 0..1.
    largest_lesion_only : bool, default=False
        Keep of each scan the one slice, of those above, with the most lesion pixels inside the brain. Scans
        without any are left out.

    Returns
    -------
    sklearn.utils.Bunch
        The arrays of `load_slices`: `images`, `brain_masks`, `lesion_masks` (n, H, W), `has_lesion_masks`,
        `subjects` (n,), `z_frac` (n,) float32, `modality` (the contrast in upper case), `spacing_mm` (rows,
        columns), None where `size` alone leads to pixels that differ between scans; and `z_index` (n,) int,
        the slice's place in the RAS-oriented volume, 0 the lowest.

    Raises
    ------
    FileNotFoundError
        If a file of a scan is missing.
    ValueError
        If there is no scan, or one lacks the contrast; only some have lesion masks; a file is no NIfTI image
        of 3 dimensions or a mask is not on the image's grid; a volume has neither brain mask nor its skull
        removed; an argument is out of its range; the scans' grids differ and `size` and `spacing_mm` do not
        bring them together; no slice is left; or `size` would cut a brain.

    Warns
    -----
    UserWarning
        If voxels are NaN or infinite, as `madad.mri.read_volume`.

    Notes
    -----
    Axes are swapped and flipped to the closest of right-anterior-superior; nothing is rotated, so slices of
    an oblique volume are those of its own axes. Anterior is at the top and the subject's left on the left of
    the slice, as in the project's ``.npz`` files.

    Without a brain mask the brain is where the image is above 0, if that can be a brain alone: at least 40 %
    of the voxels are not above 0, and the others fill at most 2.5 litres. The share alone does not tell: raw
    T1 volumes of IXI have 0 in up to 38 % of their voxels.

    One volume at a time is in memory. Resampling as in `load_slices`.
    """
    scans = list(scans)
    _check_scans(scans, contrast, largest_lesion_only)
    if not (isinstance(every, numbers.Integral) and every > 0):
        raise ValueError(f"every must be a positive integer, got {every!r}. 1 keeps all slices.")
    parts, grids = [], []
    with threadpool_limits(limits=1, user_api="blas"):  # the products are small
        for scan in scans:
            part, pixel_mm = _read_slices(scan, contrast, z_range, every, center, target)
            if largest_lesion_only:
                area = (part["lesion_masks"] & part["brain_masks"]).sum(axis=(1, 2))
                if not area.any():
                    continue
                part = {key: values[[area.argmax()]] for key, values in part.items()}
            grid = Grid.choose(part["images"].shape[1:], pixel_mm, size, spacing_mm)
            _check_grid(grid, grids, scan, size, spacing_mm)
            parts.append(_resample(part, grid, scan))
            grids.append(grid)
    if not parts:
        raise ValueError(
            f"scans must have a lesion in a slice that is kept, got none in {len(scans)} scans and z_range "
            f"{z_range!r}. Widen z_range or set largest_lesion_only=False."
        )
    arrays = {key: np.concatenate([part.pop(key) for part in parts]) for key in list(parts[0])}
    one_spacing = np.allclose([grid.spacing_mm for grid in grids], grids[0].spacing_mm, rtol=1e-3)
    return Bunch(
        **arrays,
        has_lesion_masks=scans[0].lesion_mask is not None,
        modality=contrast.upper(),
        spacing_mm=grids[0].spacing_mm if one_spacing else None,
    )


def _check_scans(scans, contrast, largest_lesion_only):
    if not scans:
        raise ValueError("scans must hold a Scan, got none. Find them with find_bids or its siblings.")
    for scan in scans:
        if contrast.upper() not in _by_contrast(scan):
            raise ValueError(
                f"contrast must be one that every scan has, got {contrast!r}, and {_name(scan)} has "
                f"{sorted(scan.images)}. Leave out the scans without it."
            )
    without = [scan for scan in scans if scan.lesion_mask is None]
    if without and largest_lesion_only:
        raise ValueError(
            f"largest_lesion_only must be False for scans without lesion masks, got True and none for "
            f"{_name(without[0])}. Leave out such scans."
        )
    if 0 < len(without) < len(scans):
        raise ValueError(
            f"scans must all have a lesion mask or none, got {len(without)} of {len(scans)} without, such as "
            f"{_name(without[0])}. Load the two kinds apart."
        )


def _by_contrast(scan):
    return {contrast.upper(): path for contrast, path in scan.images.items()}


def _name(scan):
    return f"{scan.subject!r}" if scan.session is None else f"{scan.subject!r}, session {scan.session!r}"


def _read_slices(scan, contrast, z_range, every, center, target):
    """Return the scan's kept slices on the grid of the file, images scaled, and that grid's spacing."""
    image = read_volume(_by_contrast(scan)[contrast.upper()])
    check_range_is_known(center, image.stored_dtype)
    if scan.brain_mask is None:
        brain = _brain_of_stripped(image, scan)
    else:
        brain = _read_mask(scan.brain_mask, image)
    z_index, z_frac = _select(brain, z_range, every, scan)
    slices = {"brain_masks": _axial_slices(brain, z_index)}
    if scan.lesion_mask is None:
        slices["lesion_masks"] = np.zeros_like(slices["brain_masks"])
    else:
        lesion = _read_mask(scan.lesion_mask, image)
        slices["lesion_masks"] = _axial_slices(lesion, z_index)
    values = _axial_slices(image.values, z_index)
    slices["images"] = scale_slices(
        values, slices["brain_masks"], subject=scan.subject, center=center, target=target
    )
    slices |= {
        "subjects": np.full(len(z_index), scan.subject),
        "z_frac": z_frac,
        "z_index": z_index,
    }
    columns_mm, rows_mm, _ = image.spacing_mm
    return slices, [rows_mm, columns_mm]


def _resample(part, grid, scan):
    try:
        grid.check_holds(part["brain_masks"])
    except ValueError as error:
        raise ValueError(f"{error} This is the scan of {_name(scan)}.") from error
    lesions = grid.resample_labels(part["lesion_masks"] & part["brain_masks"])
    images, brains = grid.resample_brain(part["images"], part["brain_masks"])
    return part | {"images": images, "brain_masks": brains, "lesion_masks": lesions}


def _read_mask(path, image):
    mask = read_volume(path)
    check_same_grid(image, mask)
    return mask.values > 0


def _brain_of_stripped(image, scan):
    brain, n_negative = image.values > 0, np.count_nonzero(image.values < 0)
    litres = np.count_nonzero(brain) * np.prod(image.spacing_mm) / 1e6
    background = 1 - brain.mean()
    if not is_stripped(image.values, image.affine):
        raise ValueError(
            f"brain_mask must be given unless the image is skull-stripped, got None for {_name(scan)}, whose "
            f"image is above 0 in {litres:.2f} litres, below 0 in {n_negative} voxels and has "
            f"{background:.0%} background. Give a brain mask, or strip the skull first and leave 0 around."
        )
    return brain


def _select(brain, z_range, every, scan):
    """Return index and relative height of the slices to keep."""
    z_index = np.flatnonzero(brain.any(axis=(0, 1)))
    if z_index.size == 0:
        raise ValueError(f"brain_mask must have a brain voxel, got none for {_name(scan)}. Leave it out.")
    z_frac = ((z_index - z_index[0]) / max(z_index[-1] - z_index[0], 1)).astype(np.float32)
    low, high = (0, 1) if z_range is None else z_range
    keep = np.flatnonzero((z_frac >= low) & (z_frac <= high))[::every]
    if keep.size == 0:
        raise ValueError(
            f"z_range must contain a slice of every scan, got {z_range!r}, and {_name(scan)} has "
            f"{z_index.size} slices between 0 and 1. Widen it."
        )
    return z_index[keep], z_frac[keep]


def _axial_slices(volume, z_index):
    """(x, y, z) to (n, rows from anterior to posterior, columns from left to right)."""
    return volume[:, ::-1, z_index].transpose(2, 1, 0)


def _check_grid(grid, grids, scan, size, spacing_mm):
    """Raise ValueError if a scan's slices do not fit those of the scans before."""
    if not grids:
        return
    first = grids[0]
    same_pixels = np.allclose(grid.spacing_mm, first.spacing_mm, rtol=1e-3)
    if grid.shape == first.shape and (same_pixels or size is not None):
        return

    def words(one):
        return f"{one.shape} with pixels of {' x '.join(f'{mm:.3g}' for mm in one.spacing_mm)} mm"

    raise ValueError(
        f"size and spacing_mm must bring all scans on one grid, got {size!r} and {spacing_mm!r} for slices "
        f"of {words(first)} and, for {_name(scan)}, {words(grid)}. Set both."
    )
