"""Affine registration of a brain to the MNI152 template, for any contrast."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from madad.mri.resampling import (
    check_brain_mask,
    check_volume,
    largest_part,
    resample_mask,
    resample_to,
    simpleitk_on_one_thread,
    to_isotropic,
)

TEMPLATE_SPACE = "MNI152NLin2009aSym"
"""What BIDS calls the space of `mni_template`."""
MIN_OVERLAP = 0.92
"""Least Dice overlap of a registered brain with the template's; good ones have 0.95 or more."""
MIN_SIMILARITY = 0.05
"""Least `AffineRegistration.similarity` to trust; good ones have 0.07 to 0.16, tilted ones 0.03 to 0.05."""


@dataclass(frozen=True, eq=False)
class Template:
    """A brain to register to.

    Attributes
    ----------
    values : ndarray of shape (X, Y, Z), float32
        Intensities in any unit; those outside the brain are not used.
    brain_mask : ndarray of shape (X, Y, Z), bool
        True = brain, with the fluid in and around it.
    affine : ndarray of shape (4, 4)
        Voxel indices to world mm (right, anterior, superior).
    """

    values: np.ndarray
    brain_mask: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class AffineRegistration:
    """Where a volume lies in the template.

    Attributes
    ----------
    matrix : ndarray of shape (4, 4)
        The volume's world mm to the template's world mm.
    similarity : float
        Normalised mutual information of volume and template inside the template's brain, in 0..1; the mean
        share of one's entropy that the other explains.
    overlap : float or None
        Dice overlap of the registered brain mask with the template's, in 0..1. None without a brain mask.
    """

    matrix: np.ndarray
    similarity: float
    overlap: float | None

    @property
    def is_poor(self):
        """Whether to look at it before use: a bool; overlap below 0.92 or similarity below 0.05."""
        return self.similarity < MIN_SIMILARITY or (self.overlap is not None and self.overlap < MIN_OVERLAP)


def read_template(part):
    """Read a part of the ICBM152 2009 template at 1 mm, which nilearn ships; nothing is downloaded.

    Parameters
    ----------
    part : {"t1", "grey", "white", "brain"}
        The T1-weighted brain, the probability of grey or of white matter, or the brain mask.

    Returns
    -------
    values : ndarray of shape (197, 233, 189), float32
        In 0..1; the axes point to the right, to the front and up.
    affine : ndarray of shape (4, 4)
        Voxel indices to MNI mm.

    Raises
    ------
    ImportError
        If nilearn is not installed.

    References
    ----------
    Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54 (2011).
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError(
            'The brain template must come from nilearn, got no nilearn. Install it: pip install "madad[mri]".'
        ) from error
    load = {
        "t1": datasets.load_mni152_template,
        "grey": datasets.load_mni152_gm_template,
        "white": datasets.load_mni152_wm_template,
        "brain": datasets.load_mni152_brain_mask,
    }[part]
    image = load(resolution=1)
    return image.get_fdata(dtype=np.float32), image.affine


@lru_cache(maxsize=1)
def mni_template():
    """Return the brain of `read_template` to register to.

    Returns
    -------
    Template
        A brain of shape (197, 233, 189). Its arrays are read-only; the same object at each call.

    Raises
    ------
    ImportError
        If nilearn is not installed.
    """
    values, affine = read_template("t1")
    brain_mask = read_template("brain")[0] > 0
    for array in (values, brain_mask):
        array.flags.writeable = False
    return Template(values, brain_mask, affine)


def register_affine(values, affine, brain_mask=None, *, template=None):
    """Find the affine map from a volume's world to the template's, for any contrast.

    Parameters
    ----------
    values : array-like of shape (X, Y, Z)
        Intensities in any unit.
    affine : array-like of shape (4, 4)
        Voxel indices to world mm (right, anterior, superior); may be oblique, sheared or left-handed.
    brain_mask : array-like of shape (X, Y, Z), default=None
        Non-zero inside the brain. None: the volume is a head, and only what comes to lie within 8 mm of the
        template's brain is compared, which is less exact.
    template : Template, default=None
        What to register to. None: `mni_template`.

    Returns
    -------
    AffineRegistration
        Where the volume lies in the template; the same at each call, on any number of threads.

    Raises
    ------
    ImportError
        If SimpleITK, or nilearn for the default template, is not installed.
    ValueError
        If `values`, `affine` or `brain_mask` is not of its shape, not finite, singular, constant or empty.

    Notes
    -----
    Mattes mutual information of all voxels, 32 bins. Translation from the centres of mass and nods of -30,
    0 and 30 degrees to start with; then rotation and one scale, then 12 parameters, on grids of 8 and 4 mm.
    The world must be roughly upright: a volume whose axes are named wrongly is not turned round. What cannot
    be registered raises nothing: it `is_poor`.
    """
    values, affine = check_volume(values, affine)
    template = mni_template() if template is None else template
    brain = _upper_head(values, affine) if brain_mask is None else check_brain_mask(brain_mask, values)
    scaled = _scale(values, brain, keep_outside=brain_mask is None)

    transform = None
    with simpleitk_on_one_thread() as itk:
        for spacing_mm in _LEVELS_MM:
            fixed = _level(template, spacing_mm)
            moving = _Grid(*to_isotropic(scaled, affine, brain, spacing_mm, margin_mm=_RING_MM))
            if transform is None:
                transform = _best_start(itk, fixed, moving, _center_mm(brain, affine))
            _improve(itk, transform, fixed, moving, step_mm=_AFFINE_STEP_MM)
    matrix = np.linalg.inv(_matrix_of(transform))

    registered = resample_to(moving.values, moving.affine, fixed.values.shape, fixed.affine, matrix)
    overlap = None
    if brain_mask is not None:
        overlap = _dice(resample_mask(brain, affine, fixed.brain.shape, fixed.affine, matrix), fixed.brain)
    return AffineRegistration(matrix, _shared_information(registered, fixed), overlap)


_LEVELS_MM = (8, 4)
_START_STEP_MM = 1.0
_AFFINE_STEP_MM = 0.5
_RING_MM = 8
_N_BINS = 32
_FLOOR = 0.2  # of the brain, so that its border shows where the darkest tissue lies there
_BRAIN_HEIGHT_MM = 170  # with the scalp above


@dataclass(frozen=True, eq=False)
class _Grid:
    """A volume on a grid along the world's axes, so that ITK's physical space can be our RAS world."""

    values: np.ndarray
    affine: np.ndarray

    def as_itk(self, itk, array=None):
        array = self.values if array is None else array
        image = itk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
        image.SetSpacing(np.diag(self.affine)[:3].tolist())
        image.SetOrigin(self.affine[:3, 3].tolist())
        return image


@dataclass(frozen=True, eq=False)
class _FixedGrid(_Grid):
    brain: np.ndarray
    near_brain: np.ndarray


@lru_cache(maxsize=4)
def _level(template, spacing_mm):
    scaled = _scale(template.values, template.brain_mask)
    values, affine = to_isotropic(
        scaled, template.affine, template.brain_mask, spacing_mm, margin_mm=_RING_MM + spacing_mm
    )
    brain = resample_mask(template.brain_mask, template.affine, values.shape, affine)
    distance_mm = ndimage.distance_transform_edt(~brain, sampling=spacing_mm)
    return _FixedGrid(values, affine, brain, distance_mm <= _RING_MM)


def _scale(values, brain, keep_outside=False):
    """Map the bulk of the brain's intensities to 0..1; the background becomes 0 unless it is kept."""
    low, high = np.percentile(values[brain], [0.5, 99.5])
    scaled = np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    return scaled if keep_outside else np.where(brain, _FLOOR + (1 - _FLOOR) * scaled, np.float32(0))


def _upper_head(values, affine):
    """Return where a head is, down to the height at which its brain ends."""
    low, high = np.percentile(values, [2, 99])
    head = largest_part(values > low + 0.15 * (high - low))
    if not head.any():
        head = values > values.min()
    z_mm = affine[2, 3] + sum(
        affine[2, axis] * np.arange(n).reshape([-1 if axis == k else 1 for k in range(3)])
        for axis, n in enumerate(values.shape)
    )
    return head & (z_mm > z_mm[head].max() - _BRAIN_HEIGHT_MM)


def _center_mm(region, affine):
    center = np.array([*ndimage.center_of_mass(region), 1])
    return (affine @ center)[:3]


def _best_start(itk, fixed, moving, moving_center_mm):
    center_mm = _center_mm(fixed.brain, fixed.affine)
    tries = []
    for degrees in (0, -30, 30):
        similar = itk.Similarity3DTransform()
        similar.SetCenter(center_mm.tolist())
        similar.SetTranslation((moving_center_mm - center_mm).tolist())
        similar.SetRotation((1.0, 0.0, 0.0), float(np.deg2rad(degrees)))
        tries.append((_improve(itk, similar, fixed, moving, step_mm=_START_STEP_MM), similar))
    _, similar = min(tries, key=lambda one: one[0])
    transform = itk.AffineTransform(3)
    transform.SetCenter(similar.GetCenter())
    transform.SetMatrix(similar.GetMatrix())
    transform.SetTranslation(similar.GetTranslation())
    return transform


def _improve(itk, transform, fixed, moving, *, step_mm):
    """Change a transform in place until mutual information is highest, and return what is minimised."""
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_N_BINS)
    method.SetMetricFixedMask(fixed.as_itk(itk, fixed.near_brain.astype(np.uint8)))
    method.SetInterpolator(itk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step_mm,
        minStep=0.01,
        numberOfIterations=100,
        relaxationFactor=0.7,
        gradientMagnitudeTolerance=1e-6,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed.as_itk(itk), moving.as_itk(itk))
    except RuntimeError:  # ITK's only error class: too little overlap, or nothing to see in one of the two
        return math.inf
    return method.GetMetricValue()


def _matrix_of(transform):
    linear, center = np.reshape(transform.GetMatrix(), (3, 3)), np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = center + transform.GetTranslation() - linear @ center
    return matrix


def _shared_information(registered, fixed):
    bins = [np.linspace(0, 1, _N_BINS + 1)] * 2
    joint, _, _ = np.histogram2d(registered[fixed.brain], fixed.values[fixed.brain], bins=bins)
    joint /= joint.sum()
    both, one, other = (_entropy(p) for p in (joint, joint.sum(axis=0), joint.sum(axis=1)))
    return float(2 * (one + other - both) / (one + other))


def _entropy(probability):
    positive = probability[probability > 0]
    return -float((positive * np.log(positive)).sum())


def _dice(one, other):
    return float(2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other)))
