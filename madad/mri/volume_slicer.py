"""Volumes to slices for a network and maps of slices back to volumes: padded, never stretched."""

import numbers
import os
from typing import NamedTuple

import numpy as np
from nibabel.spatialimages import SpatialImage
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from madad.mri.nifti import Volume, check_same_grid, read_volume
from madad.mri.slice_geometry import AXES, SliceGeometry, as_frame

SHAPE_MULTIPLE = 16
"""Learnt heights and widths are multiples of it, as the networks' down-sampling wants."""
TOLERANCE = 1e-3
"""Lengths that differ by less than this share count as equal: headers round."""


class VolumeSlicer(TransformerMixin, BaseEstimator):
    """Cut volumes into slices of one size, and put maps of the slices back into volumes.

    Parameters
    ----------
    plane : {"axial", "coronal", "sagittal"}, default="axial"
        Axial slices have anterior at the top, coronal and sagittal ones superior. The subject's left is on
        the left of axial and coronal slices; anterior is on the right of sagittal ones.
    spacing_mm : float or None, default=1.0
        Edge of a pixel in mm, above 0. None: that of the volumes in `fit`, which must agree.
    slice_mm : float or None, default=None
        Distance in mm between slices, above 0; slices stay thin, however far apart. None: each
        volume's own slices.
    range_mm : tuple of float (low, high) or None, default=None
        First and last place of a slice, in world mm along the plane's axis; for volumes in a template space,
        those of the template. None keeps all that have brain.
    shape : tuple of int (H, W) or None, default=None
        Size of a slice in pixels. None: the smallest multiples of 16 that hold every brain in `fit`.

    Attributes
    ----------
    shape_ : tuple of int (H, W)
        Height and width of a slice in pixels.
    spacing_mm_ : tuple of float (row, column)
        Edges of a pixel in mm.
    geometry_ : list of SliceGeometry
        Where the slices of each volume lie; from the last `transform`.
    brain_masks_ : ndarray of shape (n, H, W), bool
        True = brain; the slices of the last `transform`.
    groups_ : ndarray of shape (n,), int
        Index of the volume that each slice was cut from; from the last `transform`.

    Notes
    -----
    A volume is a path, a nibabel image or a `Volume`; a brain mask is any of these on the same grid, or an
    array on the canonical grid. Values above 0 are brain. Without a mask, voxels other than 0 are.

    Slices run from the first to the last one with brain inside `range_mm`, from inferior, posterior or left.
    The middle of the brain's bounding box in them goes to the middle of the slice, the same for all slices of
    a volume. Images keep their intensities, inside the brain and outside.

    Slices are those of the canonical voxel axes, also in volumes that are rotated against the world's. The
    position of a slice is then the world coordinate, along the axis closest to the plane's normal, in the
    middle of the volume, and distances are along the voxel axis. With `slice_mm`, slices are counted from
    the low end of `range_mm`, or else from the volume's first; they are interpolated linearly where they
    fall between the volume's own.

    Examples
    --------
    >>> slicer = VolumeSlicer(range_mm=(-20, 40)).fit(paths)  # doctest: +SKIP
    >>> images = slicer.transform(paths)  # doctest: +SKIP
    >>> values = slicer.inverse_transform(detector.predict_maps(images))  # doctest: +SKIP
    """

    def __init__(self, plane="axial", *, spacing_mm=1.0, slice_mm=None, range_mm=None, shape=None):
        self.plane = plane
        self.spacing_mm = spacing_mm
        self.slice_mm = slice_mm
        self.range_mm = range_mm
        self.shape = shape

    def fit(self, volumes, y=None, *, brain_masks=None):
        """Learn size and spacing of the slices.

        Parameters
        ----------
        volumes : list of str, os.PathLike, nibabel image or Volume
            Read one at a time, and not at all if `shape` and `spacing_mm` are given.
        y : None
            Ignored, for scikit-learn's sake.
        brain_masks : list of the same or ndarray (X, Y, Z) or None, default=None
            One for each volume; None for the voxels other than 0.

        Returns
        -------
        self
            The slicer itself, fitted.

        Raises
        ------
        ValueError
            If a parameter is out of its range, there is no volume, one has no brain in `range_mm`, a mask is
            not on its grid, or with ``spacing_mm=None`` pixels differ.
        """
        self._check_parameters()
        pairs = _pairs(volumes, brain_masks)
        needed, spacing = np.zeros(2, dtype=int), None
        if self.spacing_mm is not None:
            spacing = (float(self.spacing_mm), float(self.spacing_mm))
        if self.shape is None or spacing is None:
            for volume, mask in pairs:
                volume = read_volume(volume)
                own = tuple(volume.spacing_mm[axis] for axis in AXES[self.plane][1:])
                spacing = own if spacing is None else spacing
                if self.spacing_mm is None and not np.allclose(own, spacing, rtol=TOLERANCE):
                    raise ValueError(
                        f"spacing_mm must be given where volumes differ, got None for {_mm(spacing)} pixels "
                        f"and, in {volume.name}, {_mm(own)}. Set spacing_mm=1.0."
                    )
                layout = self._layout(volume, _brain_of(volume, mask), spacing)
                needed = np.maximum(needed, layout.needed)
        learnt = -(-needed // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
        self.spacing_mm_ = spacing
        self.shape_ = tuple(int(n) for n in (learnt if self.shape is None else self.shape))
        return self

    def transform(self, volumes, *, brain_masks=None):
        """Cut volumes into slices; remembers their geometry for `inverse_transform`.

        Parameters
        ----------
        volumes : list of str, os.PathLike, nibabel image or Volume
            Read one at a time, but all slices are in memory in the end: for a large cohort call `slices_of`
            for each.
        brain_masks : list of the same or ndarray (X, Y, Z) or None, default=None
            One for each volume; None for the voxels other than 0.

        Returns
        -------
        images : ndarray of shape (n, H, W), float32
            Slices of all volumes, one after the other.

        Raises
        ------
        ValueError
            As `slices_of`.
        """
        check_is_fitted(self)
        parts = [self.slices_of(volume, mask) for volume, mask in _pairs(volumes, brain_masks)]
        images, masks, geometry = zip(*parts, strict=True)
        self.geometry_ = list(geometry)
        self.groups_ = np.repeat(np.arange(len(parts)), [part.n_slices for part in geometry])
        self.brain_masks_ = np.concatenate(masks)
        return np.concatenate(images)

    def fit_transform(self, volumes, y=None, *, brain_masks=None):
        """Call `fit`, then `transform`, on the same volumes and masks.

        Parameters
        ----------
        volumes : list of str, os.PathLike, nibabel image or Volume
            What to learn from and to cut.
        y : None
            Ignored, for scikit-learn's sake.
        brain_masks : list of the same or ndarray (X, Y, Z) or None, default=None
            One for each volume; None for the voxels other than 0.

        Returns
        -------
        images : ndarray of shape (n, H, W), float32
            Slices of all volumes, one after the other.
        """
        return self.fit(volumes, brain_masks=brain_masks).transform(volumes, brain_masks=brain_masks)

    def slices_of(self, volume, brain_mask=None):
        """Cut one volume into slices; remembers nothing.

        Parameters
        ----------
        volume : str, os.PathLike, nibabel image or Volume
            What `madad.mri.read_volume` reads.
        brain_mask : the same, or ndarray of shape (X, Y, Z), default=None
            Values above 0 are brain. None for the voxels other than 0.

        Returns
        -------
        images : ndarray of shape (n, H, W), float32
            The slices, in the unit of the volume.
        brain_masks : ndarray of shape (n, H, W), bool
            True = brain, on the grid of the slices.
        geometry : SliceGeometry
            Takes maps back to the volume, and cuts other arrays on its grid, such as lesion masks.

        Raises
        ------
        ValueError
            If the brain is larger than ``shape_``, there is none in `range_mm`, or the mask is not on the
            volume's grid.
        """
        check_is_fitted(self)
        volume = read_volume(volume)
        brain = _brain_of(volume, brain_mask)
        layout = self._layout(volume, brain, self.spacing_mm_)
        if np.any(layout.needed > self.shape_):
            rows, columns = (int(n) for n in layout.needed)
            raise ValueError(
                f"shape must hold the brain, got {self.shape_} where {volume.name} needs ({rows}, {columns}) "
                f"pixels of {_mm(self.spacing_mm_)}. Set a larger shape or check its brain mask."
            )
        starts = layout.middle - (np.array(self.shape_) - 1) / 2 * layout.steps[1:]
        # Half a pixel off the middle, but copied.
        starts = np.where(layout.steps[1:] == 1, np.floor(starts), starts)
        geometry = SliceGeometry(
            plane=self.plane,
            volume_shape=volume.shape,
            shape=(len(layout.positions_mm), *self.shape_),
            starts=(layout.first, *(float(start) for start in starts)),
            steps=tuple(float(step) for step in layout.steps),
            positions_mm=tuple(float(mm) for mm in layout.positions_mm),
        )
        return geometry.to_slices(volume.values, brain), geometry.to_slices(brain), geometry

    def inverse_transform(self, maps, geometry=None):
        """Put maps of slices back into volumes.

        Parameters
        ----------
        maps : ndarray of shape (n, H, W)
            One map for each slice, in the order of `transform`.
        geometry : SliceGeometry or list of SliceGeometry, default=None
            Where the slices of each volume lie. None: ``geometry_``.

        Returns
        -------
        volumes : list of ndarray of shape (X, Y, Z)
            Each on its volume's canonical grid, as from `SliceGeometry.to_volume`. To write them on the grid
            of the file: `madad.mri.nifti.write_like`.

        Raises
        ------
        ValueError
            If the number or the size of the maps differs from that of the slices.
        """
        if geometry is None:
            check_is_fitted(self, "geometry_")
            geometry = self.geometry_
        geometry = [geometry] if isinstance(geometry, SliceGeometry) else list(geometry)
        maps, counts = np.asarray(maps), [part.n_slices for part in geometry]
        if maps.ndim != 3 or len(maps) != sum(counts):
            raise ValueError(
                f"maps must have shape (n, H, W) with one map for each of {sum(counts)} slices, "
                f"got {maps.shape}. Give those of all volumes of the last transform, or their geometry."
            )
        parts = np.split(maps, np.cumsum(counts)[:-1])
        return [one.to_volume(part) for one, part in zip(geometry, parts, strict=True)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True  # samples are files or images, which fit and transform check themselves
        return tags

    def _check_parameters(self):
        if self.plane not in AXES:
            raise ValueError(f"plane must be one of {sorted(AXES)}, got {self.plane!r}. Use 'axial'.")
        for name in ("spacing_mm", "slice_mm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, numbers.Real) and 0 < value < np.inf):
                raise ValueError(
                    f"{name} must be a positive number or None, got {value!r}. None keeps the volumes' own."
                )
        if self.range_mm is not None:
            ends = np.asarray(self.range_mm, dtype=np.float64)
            if ends.shape != (2,) or not np.isfinite(ends).all() or ends[0] > ends[1]:
                raise ValueError(
                    f"range_mm must be (low, high) with finite low <= high, got {self.range_mm!r}. "
                    "None keeps all slices with brain."
                )
        if self.shape is not None and not (
            np.shape(self.shape) == (2,)
            and all(isinstance(n, numbers.Integral) and n > 0 for n in self.shape)
        ):
            raise ValueError(
                f"shape must be two positive integers (H, W), got {self.shape!r}. None learns it in fit."
            )

    def _layout(self, volume, brain, pixel_mm):
        axes = AXES[self.plane]
        voxel_mm = np.array(volume.spacing_mm)[list(axes)]
        brain = as_frame(brain, self.plane)
        middle = (np.array(volume.shape) - 1) / 2
        origin_mm = (volume.affine @ [*middle, 1])[axes[0]] - middle[axes[0]] * voxel_mm[0]
        places, step = self._slice_places(len(brain), origin_mm, voxel_mm[0])
        nearest = np.floor(places + 0.5).astype(int)
        filled = np.flatnonzero(brain[nearest].any(axis=(1, 2)))
        if filled.size == 0:
            found = origin_mm + np.flatnonzero(brain.any(axis=(1, 2)))[[0, -1]] * voxel_mm[0]
            raise ValueError(
                f"range_mm must hold a slice with brain, got {self.range_mm!r} where {volume.name} has brain "
                f"from {found[0]:.1f} to {found[1]:.1f} mm. Widen it, or bring the volume to the template."
            )
        kept = slice(filled[0], filled[-1] + 1)
        brain = brain[nearest[kept]]
        ends = np.array([np.flatnonzero(brain.any(axis=other))[[0, -1]] for other in ((0, 2), (0, 1))])
        scales = np.array(pixel_mm) / voxel_mm[1:]
        scales[np.abs(scales - 1) < TOLERANCE] = 1
        return _Layout(
            first=float(places[kept][0]),
            steps=np.array([step, *scales]),
            positions_mm=origin_mm + places[kept] * voxel_mm[0],
            middle=ends.mean(axis=1),
            needed=np.ceil((ends[:, 1] - ends[:, 0] + 1) / scales - TOLERANCE).astype(int),
        )

    def _slice_places(self, n_voxels, origin_mm, voxel_mm):
        """Where slices may be cut, counted in voxels along the plane's axis, and the step between them."""
        low, high = 0.0, n_voxels - 1.0
        if self.range_mm is not None:
            low, high = ((end - origin_mm) / voxel_mm for end in self.range_mm)
        if self.slice_mm is None:
            low, step = np.ceil(low - TOLERANCE), 1.0
        else:
            low, step = _snap(low), _snap(self.slice_mm / voxel_mm)
        first = max(0, np.ceil(-low / step - TOLERANCE))
        last = np.floor((min(high, n_voxels - 1) - low) / step + TOLERANCE)
        return low + step * np.arange(first, last + 1), step


class _Layout(NamedTuple):
    """Which slices of a volume to cut, and where the brain is in them; lengths in voxels of the frame."""

    first: float
    steps: np.ndarray  # slice, row, column
    positions_mm: np.ndarray
    middle: np.ndarray  # row, column
    needed: np.ndarray  # rows and columns of pixels


def _snap(value):
    """The nearest whole number if it is that but for rounding."""
    return float(round(value) if abs(value - round(value)) < TOLERANCE else value)


def _mm(spacing):
    return " x ".join(f"{mm:.3g}" for mm in spacing) + " mm"


def _pairs(volumes, brain_masks):
    """A list of (volume, brain mask or None), still unread."""
    if isinstance(volumes, str | os.PathLike | Volume | SpatialImage):
        raise TypeError(f"volumes must be a list of volumes, got {type(volumes).__name__}. Use [volume].")
    volumes = list(volumes)
    if not volumes:
        raise ValueError("volumes must hold a volume, got none. Check what was selected.")
    brain_masks = [None] * len(volumes) if brain_masks is None else list(brain_masks)
    if len(brain_masks) != len(volumes):
        raise ValueError(
            f"brain_masks must have one entry for each of {len(volumes)} volumes, got {len(brain_masks)}. "
            "Use None for a volume without."
        )
    return list(zip(volumes, brain_masks, strict=True))


def _brain_of(volume, mask):
    """Where the brain is, as bool on the volume's canonical grid."""
    if mask is None:
        brain = volume.values != 0
    elif isinstance(mask, np.ndarray):
        if mask.shape != volume.shape:
            raise ValueError(
                f"brain_masks must have the shapes of their volumes, got {mask.shape} and {volume.shape} for "
                f"{volume.name}. Give them on the canonical grid, or as images."
            )
        brain = mask > 0
    else:
        mask = read_volume(mask)
        check_same_grid(volume, mask)
        brain = mask.values > 0
    if not brain.any():
        raise ValueError(
            f"brain_masks must have a brain voxel in each volume, got none for {volume.name}. Leave it out."
        )
    return brain
