"""The ICBM152 2009 template, as nilearn ships it: nothing is downloaded."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class BrainTemplate:
    """Axial slices of the average brain at 1 mm, anterior at the top, the subject's left on the left.

    Attributes
    ----------
    t1, grey, white : ndarray of shape (n_slices, height, width), float32
        T1-weighted intensity and tissue probabilities, in 0..1.
    brain_masks : ndarray of shape (n_slices, height, width), bool
        True = brain, including the fluid around it.
    z_mm : ndarray of shape (n_slices,)
        MNI height of each slice, ascending, 1 mm apart.
    origin_px : tuple of float
        Row and column of MNI x = y = 0.
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
        Its arrays are read-only: they are shared by all callers in the process.

    Raises
    ------
    ImportError
        If nilearn is not installed.

    References
    ----------
    Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54 (2011).
    """
    datasets = _import_nilearn_datasets()
    t1 = datasets.load_mni152_template(resolution=1)
    grey = datasets.load_mni152_gm_template(resolution=1)
    white = datasets.load_mni152_wm_template(resolution=1)
    brain = datasets.load_mni152_brain_mask(resolution=1)

    x_mm, y_mm, z_mm = t1.affine[:3, 3]  # of the first voxel; the axes are R, A, S at 1 mm
    n_rows = t1.shape[1]
    return BrainTemplate(
        t1=_axial_slices(t1, np.float32),
        grey=_axial_slices(grey, np.float32),
        white=_axial_slices(white, np.float32),
        brain_masks=_axial_slices(brain, bool),
        z_mm=z_mm + np.arange(t1.shape[2]),
        origin_px=(n_rows - 1 + y_mm, -x_mm),
    )


def _axial_slices(volume, dtype):
    slices = np.ascontiguousarray(np.asarray(volume.dataobj).astype(dtype)[:, ::-1].transpose(2, 1, 0))
    slices.flags.writeable = False
    return slices


def _import_nilearn_datasets():
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            'The brain template must come from nilearn, got no nilearn. Install it: pip install "madad[mri]".'
        ) from error
    return datasets
