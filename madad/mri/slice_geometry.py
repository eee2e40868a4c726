"""Where slices lie on a volume's grid, and the resampling between the two."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

AXES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
"""Axes of a canonical volume (0 right, 1 front, 2 up) that become slice, row and column; rows are flipped."""


@dataclass(frozen=True)
class SliceGeometry:
    """Where the slices of one volume lie on its canonical grid.

    Attributes
    ----------
    plane : {"axial", "coronal", "sagittal"}
        In which direction the volume is cut.
    volume_shape : tuple of int (X, Y, Z)
        Number of voxels of the canonical grid.
    shape : tuple of int (n, H, W)
        Number of slices, rows and columns.
    starts, steps : tuple of 3 floats
        Place of the first and distance of neighbouring slices, rows and columns, counted in voxels of the
        volume seen in this plane (slices inferior, posterior or left first; rows from the top).
    positions_mm : tuple of n floats
        Where each slice lies in mm along the plane's axis; see `VolumeSlicer`.
    """

    plane: str
    volume_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    starts: tuple[float, float, float]
    steps: tuple[float, float, float]
    positions_mm: tuple[float, ...]

    @property
    def n_slices(self):
        """How many slices there are."""
        return self.shape[0]

    @property
    def is_copy(self):
        """Whether each pixel is a voxel, so that nothing is interpolated."""
        return all(step == 1 for step in self.steps) and all(start % 1 == 0 for start in self.starts)

    def to_slices(self, values, brain_mask=None):
        """Cut an array on the volume's canonical grid into slices.

        Parameters
        ----------
        values : ndarray of shape (X, Y, Z)
            An image (floats), or masks and labels (bool, integers).
        brain_mask : ndarray of shape (X, Y, Z), bool, default=None
            For images: pixels inside are means of voxels inside, pixels outside of voxels outside, so that
            resampling makes no rim. None: all voxels count alike.

        Returns
        -------
        slices : ndarray of shape (n, H, W)
            float32 for images; masks and labels, which take the nearest voxel, keep their dtype. 0 outside
            the volume.

        Raises
        ------
        ValueError
            If an array does not have the volume's shape.

        Notes
        -----
        Resampled images are linear between slices. Within the slice they are linear when pixels are smaller
        than voxels, and averaged under a triangle one pixel wide to each side when they are larger.
        """
        frame = self._frame(values, "values")
        positions = [
            start + step * np.arange(n)
            for start, step, n in zip(self.starts, self.steps, self.shape, strict=True)
        ]
        if frame.dtype.kind in "biu":
            return _pick(frame, positions)
        frame = frame.astype(np.float32, copy=False)
        if self.is_copy:
            return _pick(frame, positions)
        widths = (1, *np.maximum(self.steps[1:], 1))  # slices stay thin
        weights = [_weights(*axis) for axis in zip(positions, frame.shape, widths, strict=True)]
        if brain_mask is None:
            return _combine(frame, weights)
        brain = self._frame(brain_mask, "brain_mask").astype(bool)
        inside = _mean_over(brain, frame, weights)
        return np.where(_pick(brain, positions), inside, _mean_over(~brain, frame, weights))

    def to_volume(self, maps):
        """Put slices back to where they were cut.

        Parameters
        ----------
        maps : ndarray of shape (n, H, W)
            Maps (floats), or masks and labels (bool, integers).

        Returns
        -------
        values : ndarray of shape (X, Y, Z)
            On the volume's canonical grid: float32 for maps, linear between pixels and slices; masks and
            labels take the nearest pixel and keep their dtype. Exact if `is_copy`. 0 where no pixel is, which
            for slices is more than half their distance from the nearest.

        Raises
        ------
        ValueError
            If `maps` has another shape.
        """
        maps = np.asarray(maps)
        if maps.shape != self.shape:
            raise ValueError(
                f"maps must have the shape of the slices, got {maps.shape} and {self.shape}. "
                "Give one map for each slice."
            )
        sizes = [self.volume_shape[axis] for axis in AXES[self.plane]]
        positions = [
            (np.arange(n) - start) / step
            for start, step, n in zip(self.starts, self.steps, sizes, strict=True)
        ]
        if maps.dtype.kind in "biu":
            frame = _pick(maps, positions)
        elif self.is_copy:
            frame = _pick(maps.astype(np.float32, copy=False), positions)
        else:
            widths = np.maximum(1 / np.asarray(self.steps), 1)
            weights = [_weights(*axis) for axis in zip(positions, maps.shape, widths, strict=True)]
            frame = _combine(maps.astype(np.float32, copy=False), weights)
        return np.ascontiguousarray(frame[:, ::-1].transpose(np.argsort(AXES[self.plane])))

    def _frame(self, values, name):
        values = np.asarray(values)
        if values.shape != self.volume_shape:
            raise ValueError(
                f"{name} must have the shape of the volume, got {values.shape} and {self.volume_shape}. "
                "Give it on the volume's canonical grid."
            )
        return as_frame(values, self.plane)


def as_frame(values, plane):
    """View a volume as a stack of slices.

    Parameters
    ----------
    values : ndarray of shape (X, Y, Z)
        An array on the canonical grid.
    plane : {"axial", "coronal", "sagittal"}
        In which direction to cut it.

    Returns
    -------
    ndarray of shape (n, h, w)
        A view: slices, rows from the top, columns.
    """
    return values.transpose(AXES[plane])[:, ::-1]


def _pick(values, positions):
    """Elements of (n, h, w) nearest to positions along the three axes; 0 outside."""
    nearest = [np.floor(along + 0.5).astype(int) for along in positions]
    inside = [(index >= 0) & (index < n) for index, n in zip(nearest, values.shape, strict=True)]
    picked = np.zeros([len(index) for index in nearest], dtype=values.dtype)
    kept = [index[where] for index, where in zip(nearest, inside, strict=True)]
    picked[np.ix_(*inside)] = values[np.ix_(*kept)]
    return picked


def _weights(positions, n, width):
    """Sparse weights (len(positions), n): a triangle `width` elements to each side, 0 outside the grid."""
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(n)) / width)
    nearest = np.floor(positions + 0.5)
    weights[(nearest < 0) | (nearest >= n)] = 0
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-6)
    return csr_array(weights.astype(np.float32))


def _combine(values, weights):
    """Weighted means of (n, h, w) along the three axes; sparse products do not depend on threads."""
    for axis, along in enumerate(weights):
        moved = np.moveaxis(values, axis, 0)
        product = along @ moved.reshape(len(moved), -1)
        values = np.moveaxis(product.reshape(-1, *moved.shape[1:]), 0, axis)
    return values


def _mean_over(chosen, values, weights):
    """Weighted means of the chosen elements alone; 0 where there are none."""
    total = _combine(np.where(chosen, values, 0), weights)
    return total / np.maximum(_combine(chosen.astype(np.float32), weights), 1e-6)
