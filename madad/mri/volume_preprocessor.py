"""A volume as it came from the scanner to one that a detector can be given, and maps back to its grid."""

from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from madad.mri.brain import find_brain
from madad.mri.intensity import correct_bias, normalize_intensity
from madad.mri.nifti import Volume, check_same_grid, read_volume, same_grid
from madad.mri.registration import AffineRegistration, Template, mni_template, register_affine
from madad.mri.resampling import resample_mask, resample_to

MIN_COVERED = 0.8
"""Least share of the first contrast's brain that each other contrast must show."""
MAX_STRETCH = 1.2
"""Most that one person's brain may differ in length between contrasts; more is a failed registration."""
_LEAST_SHARE = 0.05  # of brain in what is interpolated between, to be its mean


@dataclass(frozen=True, eq=False)
class PreprocessedVolume:
    """A brain on the template's grid, or on its own, and the way back.

    Attributes
    ----------
    volume : Volume
        Intensities in 0..1, 0 outside the brain; ``volume.values > 0`` is the brain mask.
    source : Volume
        The volume that it was made from.
    brain_made_by : str
        "given", or how `find_brain` found the brain.
    registration : AffineRegistration or None
        The way from ``source`` to the grid of ``volume``. None: they are on one grid.
    """

    volume: Volume
    source: Volume
    brain_made_by: str
    registration: AffineRegistration | None

    @property
    def brain_mask(self):
        """Where the brain is: (X, Y, Z), bool, on the grid of ``volume``."""
        return self.volume.values > 0

    def from_source(self, values):
        """Bring an array on the source's canonical grid, such as a lesion mask, to the grid of ``volume``.

        Parameters
        ----------
        values : array-like of shape (X, Y, Z)
            Floats are interpolated linearly; bool and integers take the nearest voxel.

        Returns
        -------
        ndarray of the shape of ``volume``
            The array there; 0 where ``source`` does not reach.
        """
        values = np.asarray(values)
        if self.registration is None:
            return values
        source, target = self.source, self.volume
        return _resampled(values, source.affine, target, self.registration.matrix)

    def to_source(self, values):
        """Bring an array on the grid of ``volume``, such as an anomaly map, to the source's canonical grid.

        Parameters
        ----------
        values : array-like of shape (X, Y, Z)
            Floats are interpolated linearly; bool and integers take the nearest voxel.

        Returns
        -------
        ndarray of the shape of ``source``
            The array there, 0 where ``volume`` does not reach; for `madad.mri.nifti.write_like`.
        """
        values = np.asarray(values)
        if self.registration is None:
            return values
        back = np.linalg.inv(self.registration.matrix)
        return _resampled(values, self.volume.affine, self.source, back)


class VolumePreprocessor(TransformerMixin, BaseEstimator):
    """Find the brain, correct its shading, bring it to the template, and scale its intensities.

    Parameters
    ----------
    brain : str, default="auto"
        How `madad.mri.brain.find_brain` finds the brain of a volume that comes without a mask.
    bias_field : bool, default=False
        Correct the shading by N4 (`madad.mri.intensity.correct_bias`).
    template : bool, default=True
        Bring the brain to the MNI152 1 mm grid by an affine registration. False: it stays on its own grid.
    center : {"median", "mode"} or None, default="median"
        The centre of the brain's intensities that is mapped to `target`, as in
        `madad.mri.normalize_intensity`. None: intensities stay as they are, the background 0.
    target : float, default=0.4
        Where the centre goes, above 0 and below 1.

    Notes
    -----
    Nothing is learnt: ``fit`` does nothing, and a volume's result does not depend on other volumes. What a
    model was trained on must be what it is given later: use the same parameters.

    Examples
    --------
    >>> prepared = VolumePreprocessor(bias_field=True).preprocess("sub-01_T1w.nii.gz")  # doctest: +SKIP
    >>> slicer = VolumeSlicer(spacing_mm=2.0).fit([prepared.volume])  # doctest: +SKIP
    """

    def __init__(self, *, brain="auto", bias_field=False, template=True, center="median", target=0.4):
        self.brain = brain
        self.bias_field = bias_field
        self.template = template
        self.center = center
        self.target = target

    def fit(self, volumes, y=None):
        """Do nothing: there is nothing to learn.

        Parameters
        ----------
        volumes : object
            Ignored, not even read.
        y : ignored

        Returns
        -------
        self
            The preprocessor itself.
        """
        return self

    def __sklearn_is_fitted__(self):
        return True

    def transform(self, volumes, *, brain_masks=None):
        """Preprocess volumes, one after the other.

        Parameters
        ----------
        volumes : list of str, os.PathLike, nibabel image or Volume
            What `madad.mri.read_volume` reads.
        brain_masks : list of the same, or of ndarray (X, Y, Z), or of None, default=None
            One for each volume, as in `preprocess`.

        Returns
        -------
        list of PreprocessedVolume
            One for each volume.

        Raises
        ------
        ImportError, ValueError
            As `preprocess`, or if there are not as many masks as volumes.
        """
        volumes = list(volumes)
        masks = [None] * len(volumes) if brain_masks is None else list(brain_masks)
        if len(masks) != len(volumes):
            raise ValueError(
                f"brain_masks must have one entry for each of {len(volumes)} volumes, got {len(masks)}. "
                "Use None for a volume without."
            )
        return [self.preprocess(volume, mask) for volume, mask in zip(volumes, masks, strict=True)]

    def preprocess(self, volume, brain_mask=None):
        """Preprocess one volume.

        Parameters
        ----------
        volume : str, os.PathLike, nibabel image or Volume
            What `madad.mri.read_volume` reads.
        brain_mask : the same, or ndarray of shape (X, Y, Z) on the canonical grid, default=None
            Values above 0 are brain. None: it is looked for.

        Returns
        -------
        PreprocessedVolume
            The brain on the template's grid, or on its own without `template`.

        Raises
        ------
        ImportError
            If a step needs a package that is not installed (extra ``mri``).
        ValueError
            If a file cannot be read, the mask is not on the volume's grid, or there is no brain.
        """
        return self.preprocess_contrasts([volume], brain_mask)[0]

    def preprocess_contrasts(self, volumes, brain_mask=None):
        """Preprocess the contrasts of one subject so that they can be the channels of one image.

        Parameters
        ----------
        volumes : list of str, os.PathLike, nibabel image or Volume
            T1, T2, FLAIR, ... of one person and visit.
        brain_mask : str, os.PathLike, nibabel image, Volume or ndarray of shape (X, Y, Z), default=None
            The brain of the first volume, as in `preprocess`. None: it is looked for.

        Returns
        -------
        list of PreprocessedVolume
            All on the grid and with the brain mask of the first.

        Raises
        ------
        ImportError, ValueError
            As `preprocess`, for any of them; or if a volume shows less than four fifths of the brain, or
            fits it only when stretched by more than a fifth, as one does that shows a part alone.

        Notes
        -----
        A volume on the grid of the first takes its brain mask and its place in the template. One on another
        grid, as scanners make them, is registered to the first, by an affine map and brain to brain.
        """
        first, *others = [read_volume(volume) for volume in volumes]
        given = None if brain_mask is None else _mask_on(first, brain_mask)
        brain, made_by = self._brain_of(first, given)
        values = self._corrected(first, brain)
        registration = register_affine(values, first.affine, brain) if self.template else None
        place = self._place(first, values, brain, made_by, registration)
        return [place, *(self._beside(place, first, brain, other) for other in others)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True  # samples are files or images, which are checked as they are read
        tags.requires_fit = False
        return tags

    def _brain_of(self, source, given=None):
        method = "auto" if given is not None else self.brain
        try:
            return find_brain(source.values, source.affine, brain_mask=given, method=method)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error

    def _corrected(self, source, brain):
        return correct_bias(source.values, source.affine, brain) if self.bias_field else source.values

    def _place(self, source, values, brain, made_by, registration):
        """A volume with its brain mask on the template's grid, or on its own without a registration."""
        if registration is None:
            scaled = self._scaled(values, brain, source.name)
            return PreprocessedVolume(replace(source, values=scaled), source, made_by, None)
        template = mni_template()
        shape, affine, matrix = template.values.shape, template.affine, registration.matrix
        moved, share = _mean_of_brain(values, brain, source.affine, shape, affine, matrix)
        image = nib.Nifti1Image(self._scaled(moved, share > 0.5, source.name), affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code="mni")
        image.set_qform(affine, code="mni")
        on_template = replace(read_volume(image), path=source.path)  # for messages
        return PreprocessedVolume(on_template, source, made_by, registration)

    def _beside(self, place, first, brain, other):
        """Another contrast of the subject, on the grid that the first was brought to."""
        if same_grid(first, other):
            values = self._corrected(other, brain)
            return self._place(other, values, brain, place.brain_made_by, place.registration)
        own_brain, made_by = self._brain_of(other)
        values = self._corrected(other, own_brain)
        to_first = register_affine(
            values, other.affine, own_brain, template=Template(first.values, brain, first.affine)
        )
        lengths = np.linalg.svd(to_first.matrix[:3, :3], compute_uv=False)
        stretch = max(lengths.max(), 1 / lengths.min())
        if stretch > MAX_STRETCH:
            raise ValueError(
                f"volumes must show the same brain, got {other.name}, which fits {first.name} only when "
                f"stretched {stretch:.2f} times. Leave this contrast out."
            )
        matrix = (
            to_first.matrix if place.registration is None else place.registration.matrix @ to_first.matrix
        )
        grid, inside = place.volume, place.brain_mask
        moved, share = _mean_of_brain(values, own_brain, other.affine, grid.shape, grid.affine, matrix)
        beyond = resample_to(values, other.affine, grid.shape, grid.affine, matrix)
        moved = np.where(share > _LEAST_SHARE, moved, beyond)
        seen = resample_mask(np.ones(other.shape, bool), other.affine, grid.shape, grid.affine, matrix)
        covered = np.count_nonzero(seen & inside) / np.count_nonzero(inside)
        if covered < MIN_COVERED:
            raise ValueError(
                f"volumes must show {MIN_COVERED:.0%} of the brain, got {covered:.0%} in {other.name}. "
                "Leave this contrast out."
            )
        scaled = self._scaled(moved, inside, other.name)
        return PreprocessedVolume(
            replace(grid, values=scaled), other, made_by, replace(to_first, matrix=matrix)
        )

    def _scaled(self, values, brain, name):
        if self.center is None:
            return np.where(brain, values, np.float32(0))
        one = np.full(len(values), name)  # all slices share a scale
        return normalize_intensity(values, brain, subjects=one, center=self.center, target=self.target)


def _mask_on(source, mask):
    """A brain mask as an array on the canonical grid of a volume."""
    if isinstance(mask, np.ndarray):
        return mask
    mask = read_volume(mask)
    check_same_grid(source, mask)
    return mask.values


def _mean_of_brain(values, brain, affine, shape, target_affine, matrix):
    """A volume on another grid, at the border a mean of brain alone, and the brain's share of each voxel."""
    total = resample_to(np.where(brain, values, 0), affine, shape, target_affine, matrix)
    share = resample_to(brain.astype(np.float32), affine, shape, target_affine, matrix)
    return total / np.maximum(share, _LEAST_SHARE), share


def _resampled(values, affine, target, matrix):
    order = 0 if values.dtype.kind in "biu" else 1
    return resample_to(values, affine, target.shape, target.affine, matrix, order=order)
