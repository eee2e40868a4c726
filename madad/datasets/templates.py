"""The brain template as axial slices."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from madad.mri.registration import read_template


@dataclass(frozen=True)
class BrainTemplate:
    """Axial slices of the ICBM152 2009 brain at 1 mm, anterior at the top, the subject's left on the left.

    Attributes
    ----------
    t1, grey, white : ndarray of shape (n_slices, height, width), float32
        T1-weighted intensity and tissue probabilities, in 0..1.
    brain_masks : ndarray of shape (n_slices, height, width), bool
        True = brain, including the fluid around it.
    z_mm : ndarray of shape (n_slices,)
        MNI height of each slice in mm, ascending, 1 mm apart.
    origin_px : tuple of 2 floats
        Row and column of MNI x = y = 0, in pixels from the middle of the first.
    """

    t1: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    brain_masks: np.ndarray
    z_mm: np.ndarray
    origin_px: tuple[float, float]

    def at(self, z_mm):
        """Return the index of the slice nearest to a height.

        Parameters
        ----------
        z_mm : float
            MNI height, in mm.

        Returns
        -------
        int
            Index into the first axis of the arrays.
        """
        return int(np.argmin(np.abs(self.z_mm - z_mm)))


@lru_cache(maxsize=1)
def load_template():
    """Load the template; the first call takes a second or two, later ones return the same object.

    Returns
    -------
    BrainTemplate
        The slices of `madad.mri.registration.read_template`. Its arrays are read-only: they are shared by
        all callers in the process.

    Raises
    ------
    ImportError
        If nilearn is not installed.
    """
    t1, affine = read_template("t1")
    x_mm, y_mm, z_mm = affine[:3, 3]  # of the first voxel; the axes are R, A, S at 1 mm
    _, n_rows, n_slices = t1.shape
    return BrainTemplate(
        t1=_axial_slices(t1),
        grey=_axial_slices(read_template("grey")[0]),
        white=_axial_slices(read_template("white")[0]),
        brain_masks=_axial_slices(read_template("brain")[0] > 0),
        z_mm=z_mm + np.arange(n_slices),
        origin_px=(n_rows - 1 + y_mm, -x_mm),
    )


def _axial_slices(values):
    slices = np.ascontiguousarray(values[:, ::-1].transpose(2, 1, 0))
    slices.flags.writeable = False
    return slices
