"""What healthy brains look like in a contrast, so that another contrast can be told from it."""

from dataclasses import dataclass, field

import numpy as np

from madad.mri.intensity import brain_deciles
from madad.mri.volume_preprocessor import PreprocessedVolume

CUBE_VOXELS = 4
"""Edge of the cubes over which intensities are averaged, in voxels of the template."""
MIN_SEEN = 3
"""In how many healthy brains a cube must lie to be compared."""
MIN_TISSUE_CONTRAST = 0.25
"""Least `HealthyIntensities.tissue_contrast` to be taken for the same contrast.

Against 16 healthy T1, the T1 of three patients from two other scanners had 0.45 and more, their T2 and FLAIR
less than 0.1.
"""
_N_CUBES = 100


def _no_cubes():
    return np.zeros((0, 0, 0), np.float32)


@dataclass
class HealthyIntensities:
    """How bright healthy brains are, and where: what another contrast is recognised by.

    Attributes
    ----------
    n : int
        Number of volumes taken in.
    deciles : ndarray of shape (9,)
        Mean over volumes of the deciles inside the brain, in the unit of the volumes.
    total, count : ndarray of shape (x, y, z)
        Sum of the means of cubes of the template that are all brain, and in how many volumes they are. Empty
        where volumes stay on their own grids.
    """

    n: int = 0
    deciles: np.ndarray = field(default_factory=lambda: np.zeros(9))
    total: np.ndarray = field(default_factory=_no_cubes)
    count: np.ndarray = field(default_factory=_no_cubes)

    def add(self, volume: PreprocessedVolume, *, in_template: bool = True):
        """Take in a healthy volume.

        Parameters
        ----------
        volume : PreprocessedVolume
            A volume without lesion, of the contrast and on the scale of the others.
        in_template : bool, default=True
            False: its registration, if any, is to another contrast on a grid of its own.
        """
        values = volume.volume.values
        deciles = brain_deciles(values, volume.brain_mask)
        self.deciles = (self.deciles * self.n + deciles) / (self.n + 1)
        self.n += 1
        if in_template and volume.registration is not None:
            means, inside = _cubes(values, volume.brain_mask)
            if not self.total.size:
                self.total, self.count = np.zeros_like(means), np.zeros_like(means)
            self.total += np.where(inside, means, 0)
            self.count += inside

    def tissue_contrast(self, volume: PreprocessedVolume):
        """How well the tissue that is light in healthy brains stands out in this one.

        Parameters
        ----------
        volume : PreprocessedVolume
            The volume to judge, prepared as the healthy ones were.

        Returns
        -------
        float or None
            The difference between the medians of the third of the tissue that is lightest in healthy brains
            and the third that is darkest, as a share of the same difference in healthy brains: near 1 for the
            same sequence, near 0 or negative for others. Fluid, dark in either, does not count. None if it is
            not known, since volumes stay on their own grids or overlap too little.
        """
        if not self.total.size or volume.registration is None:
            return None
        means, inside = _cubes(volume.volume.values, volume.brain_mask)
        healthy = self.total / np.maximum(self.count, 1)
        typical = self.deciles[4]
        seen = inside & (self.count >= min(MIN_SEEN, self.n))
        tissue = seen & (healthy > 0.8 * typical) & (means > 0.5 * typical)
        if np.count_nonzero(tissue) < _N_CUBES:
            return None
        dark, light = np.quantile(healthy[tissue], [0.3, 0.7])
        is_dark, is_light = tissue & (healthy <= dark), tissue & (healthy >= light)

        def difference(values):
            return float(np.median(values[is_light]) - np.median(values[is_dark]))

        expected = difference(healthy)
        return difference(means) / expected if expected > 0 else None

    def to_arrays(self):
        """Return all of it for a tensor file.

        Returns
        -------
        dict of str to ndarray
            The attributes by name.
        """
        return {"n": np.asarray(self.n), "deciles": self.deciles, "total": self.total, "count": self.count}

    @classmethod
    def from_arrays(cls, arrays):
        """Rebuild it from what `to_arrays` gave.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            The attributes by name.

        Returns
        -------
        HealthyIntensities
            The same as the one whose `to_arrays` was called.
        """
        return cls(int(arrays["n"]), arrays["deciles"], arrays["total"], arrays["count"])


def _cubes(values, brain):
    """Means of cubes of voxels, and which of them are brain throughout."""
    n = CUBE_VOXELS
    size = tuple(length // n for length in values.shape)
    whole = tuple(slice(length * n) for length in size)
    split = [part for length in size for part in (length, n)]
    inside = brain[whole].reshape(split).all(axis=(1, 3, 5))
    return values[whole].reshape(split).mean(axis=(1, 3, 5)).astype(np.float32), inside
