"""Brain-like slices of people who do not exist, with and without lesions."""

import numbers
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates
from sklearn.utils import Bunch, check_random_state
from threadpoolctl import threadpool_limits

from madad.datasets.painted_lesions import paint_lesion, smooth_noise
from madad.datasets.templates import load_template
from madad.mri.intensity import normalize_intensity

FIELD_OF_VIEW_MM = 210.0

TISSUE_LEVELS = {
    "T1": (0.12, 0.33, 0.48),
    "T2": (0.90, 0.48, 0.33),
    "FLAIR": (0.07, 0.46, 0.36),
}
"""Fluid, grey and white matter as in IXI (T1), BraTS (T2) and LGG (FLAIR), brain median at 0.4."""

TEMPLATE_T1_LEVELS = (0.27, 0.65, 0.87)
"""Fluid, grey and white matter in the template's own T1 image."""


def make_brain_slices(
    n_samples=100,
    *,
    size=64,
    lesions=0.0,
    contrast="T1",
    lesion_radius=(0.055, 0.095),
    mass_effect=False,
    slices_per_subject=1,
    z_range_mm=(2.0, 32.0),
    random_state=None,
):
    """Make axial slices of different synthetic brains, some with a lesion.

    Each subject bends the ICBM152 tissue probability maps (affine map, smooth displacements, ventricle size,
    cortical folds), and has its own tissue intensities, bias field and Rician noise. Lesions share their grey
    levels with healthy tissue (see `madad.datasets.painted_lesions.paint_lesion`): no threshold finds them.

    Parameters
    ----------
    n_samples : int, default=100
        Number of slices, at least 1.
    size : int, default=64
        Height and width in pixels, at least 16. The field of view is 210 mm at any size.
    lesions : float, default=0.0
        Fraction of the slices that carry one lesion, in 0..1; ``round(lesions * n_samples)`` of them do.
    contrast : {"T1", "T2", "FLAIR"}, default="T1"
        The weighting whose grey levels are imitated.
    lesion_radius : tuple of float, default=(0.055, 0.095)
        Smallest and largest mean radius as a fraction of `size`, in 0..0.15 (0.1 is 21 mm).
    mass_effect : bool, default=False
        Lesions push the tissue around them away.
    slices_per_subject : int, default=1
        Slices cut from the same brain, at different heights; the last subject may have fewer.
    z_range_mm : tuple of float, default=(2.0, 32.0)
        Lowest and highest MNI height of the slices in mm, in -30..60.
    random_state : int, numpy.random.RandomState, numpy.random.Generator or None, default=None
        Same value, same arrays, bit for bit. None draws fresh entropy.

    Returns
    -------
    sklearn.utils.Bunch
        `images` (n_samples, size, size) float32 in 0..1, background 0, brain above 0, brain median of a
        subject's healthy tissue 0.4; `healthy_images` of the same shape, before the lesions were painted;
        `brain_masks` and `lesion_masks`, bool; `has_lesion_masks`, True; `subjects` (n_samples,) str; `z_mm`
        (n_samples,); `modality`, the contrast; `spacing_mm`, two floats.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    ImportError
        If nilearn, which ships the template, is not installed.

    Notes
    -----
    A subject depends on `random_state` and its position alone: calls that differ in `lesions` return the same
    brains, healthy or lesioned, and a larger `n_samples` only adds subjects. Deformations are drawn in
    millimetres: another `size` shows the same people.
    """
    _check_arguments(n_samples, size, lesions, contrast, lesion_radius, slices_per_subject, z_range_mm)
    seed = _draw_seed(random_state)
    heights = _draw_heights(n_samples, slices_per_subject, z_range_mm, seed)
    subject_index = np.arange(n_samples) // slices_per_subject
    subjects = np.array([f"synthetic-{i:04d}" for i in subject_index])

    # The matrices are small: BLAS threads would only wait for each other on a busy machine.
    with threadpool_limits(limits=1, user_api="blas"):
        raw, brain_masks = _make_healthy(subject_index, heights, size, contrast, seed)
        # Scaled before a lesion is painted: `images` differs from its healthy twin near the lesion only.
        healthy_images = normalize_intensity(raw, brain_masks, subjects=subjects)
        images, lesion_masks = healthy_images.copy(), np.zeros_like(brain_masks)
        for sample in _draw_lesioned(n_samples, lesions, seed):
            rng = _generator(seed, "lesion", sample)
            images[sample], lesion_masks[sample] = paint_lesion(
                healthy_images[sample],
                brain_masks[sample],
                rng,
                radius_px=max(1.0, size * rng.uniform(*lesion_radius)),
                mass_effect=mass_effect,
            )
    return Bunch(
        images=images,
        healthy_images=healthy_images,
        brain_masks=brain_masks,
        lesion_masks=lesion_masks,
        has_lesion_masks=True,
        subjects=subjects,
        z_mm=heights,
        modality=contrast,
        spacing_mm=(FIELD_OF_VIEW_MM / size,) * 2,
    )


def _make_healthy(subject_index, heights, size, contrast, seed):
    """Return raw slices (n, size, size) float32 and their brain masks."""
    raw = np.empty((len(heights), size, size), dtype=np.float32)
    brain_masks = np.empty(raw.shape, dtype=bool)
    for index in np.unique(subject_index):
        subject = _Subject(_generator(seed, "subject", index), contrast)
        for sample in np.flatnonzero(subject_index == index):
            rng = _generator(seed, "noise", sample)
            raw[sample], brain_masks[sample] = subject.slice(heights[sample], size, rng)
    return raw, brain_masks


class _Subject:
    """One brain: everything that its slices share, drawn once."""

    def __init__(self, rng, contrast):
        self.anatomy = _Anatomy.draw(rng)
        levels = np.array(TISSUE_LEVELS[contrast])
        self.levels = levels * rng.normal(1, (0.15, 0.04, 0.04)).clip(0.6, 1.4)
        # Deep nuclei and tracts: what the template shows beyond its three tissues, in units of this contrast.
        self.texture_gain = np.ptp(self.levels[1:]) / np.ptp(TEMPLATE_T1_LEVELS[1:])
        self.texture_gain *= np.sign(self.levels[2] - self.levels[1])
        self.noise_level = rng.uniform(0.006, 0.018)
        self.bias_state = rng.integers(2**32)

    def slice(self, z_mm, size, rng):
        """Return the raw slice and its brain mask, both of shape (size, size)."""
        # Computed on a grid of 1.7 mm or finer, then averaged: partial volume.
        factor = int(np.ceil(FIELD_OF_VIEW_MM / size / 1.7))
        n = size * factor
        spacing_mm = FIELD_OF_VIEW_MM / n
        tissues, residual, brain = self.anatomy.slice(z_mm, n)

        image = np.tensordot(self.levels, tissues, axes=1) + self.texture_gain * residual
        bias = smooth_noise(np.random.default_rng(self.bias_state), (n, n), 70 / spacing_mm)
        image = image.clip(0) * np.exp(0.05 * bias)
        real, imaginary = rng.normal(0, self.noise_level, (2, n, n))
        image = np.hypot(image + real, imaginary)

        share = _block_mean(brain.astype(np.float64), factor)
        brain_mask = share >= 0.5
        return _block_mean(image * brain, factor) / np.maximum(share, 0.5) * brain_mask, brain_mask


@dataclass
class _Anatomy:
    """Deformation from the subject's slice to the template's, and folds of the cortex."""

    matrix: np.ndarray  # (2, 2), subject mm -> template mm
    shift_mm: np.ndarray  # (2,)
    ventricle: float  # above 0: larger than the template's
    atrophy: float  # above 0: wider sulci
    field_state: int

    @classmethod
    def draw(cls, rng):
        angle, shear = rng.normal(0, np.deg2rad(2.5)), rng.normal(0, 0.02)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        size = rng.normal((0.99, 0.98), 0.03).clip(0.9, 1.05)
        return cls(
            matrix=np.diag(1 / size) @ rotation @ np.array([[1, shear], [0, 1]]),
            shift_mm=rng.normal(0, 1.5, 2),
            ventricle=rng.uniform(-0.35, 0.4),
            atrophy=rng.normal(0.5, 0.4),
            field_state=int(rng.integers(2**32)),
        )

    def slice(self, z_mm, n):
        """Return tissues (3, n, n) that sum to 1, the template's residual (n, n) and the brain (n, n)."""
        template = load_template()
        k = template.at(z_mm)
        rng = np.random.default_rng(self.field_state)
        spacing_mm = FIELD_OF_VIEW_MM / n

        def noise(length_mm):
            return smooth_noise(rng, (n, n), length_mm / spacing_mm)

        coordinates = self._template_coordinates(template.origin_px, n, noise)
        maps = (template.grey, template.white, template.t1, template.brain_masks)
        grey, white, t1, brain = (
            map_coordinates(slices[k].astype(np.float32), coordinates, order=1) for slices in maps
        )
        brain = brain > 0.5
        average = np.stack([(1 - grey - white).clip(0), grey, white])
        residual = np.where(brain, t1 - np.tensordot(TEMPLATE_T1_LEVELS, average, axes=1), 0)

        # The template is an average of 152 people and its cortex is blurred. Noise on the log-probabilities
        # decides where it was undecided, which folds the cortex anew; a certain tissue stays what it is.
        logit = 1.6 * np.log(average + 0.02)
        logit += 0.9 * np.stack([noise(3.5) for _ in range(3)])
        logit[0] += self.atrophy
        tissues = np.exp(logit - logit.max(axis=0))
        return tissues / tissues.sum(axis=0), residual, brain

    def _template_coordinates(self, origin_px, n, noise):
        spacing_mm = FIELD_OF_VIEW_MM / n
        y, x = (np.mgrid[:n, :n] - (n - 1) / 2) * spacing_mm
        y_bent = y + 3.0 * noise(30.0) + 1.2 * noise(9.0)
        x_bent = x + 3.0 * noise(30.0) + 1.2 * noise(9.0)
        y, x = np.tensordot(self.matrix, np.stack([y_bent, x_bent]), axes=1) + self.shift_mm[:, None, None]

        # Reading nearer to the middle of the ventricles (which lies at the slice's centre) widens them.
        zoom = 1 - self.ventricle * np.exp(-(x**2 + y**2) / 26**2)
        center_row = origin_px[0] + 18  # 18 mm behind the anterior commissure
        return np.stack([center_row + y * zoom, origin_px[1] + x * zoom])


def _block_mean(image, factor):
    n = len(image) // factor
    return image.reshape(n, factor, n, factor).mean(axis=(1, 3))


def _generator(seed, purpose, index=0):
    # One stream per purpose and index: what is drawn for one sample cannot shift the draws for another.
    streams = {"subject": 0, "noise": 1, "lesion": 2, "height": 3, "choice": 4}
    return np.random.default_rng([seed, streams[purpose], int(index)])


def _draw_seed(random_state):
    if random_state is None:
        return int(np.random.SeedSequence().entropy % 2**63)
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63 - 1))
    return int(check_random_state(random_state).randint(2**31 - 1))


def _draw_heights(n_samples, slices_per_subject, z_range_mm, seed):
    """Draw heights, ascending within a subject."""
    heights = [
        np.sort(_generator(seed, "height", index).uniform(*z_range_mm, slices_per_subject))
        for index in range(-(-n_samples // slices_per_subject))
    ]
    return np.concatenate(heights)[:n_samples]


def _draw_lesioned(n_samples, lesions, seed):
    ranks = np.argsort(_generator(seed, "choice").random(n_samples), kind="stable")
    return np.sort(ranks[: round(lesions * n_samples)])


def _check_arguments(n_samples, size, lesions, contrast, lesion_radius, slices_per_subject, z_range_mm):
    for name, value, least in (
        ("n_samples", n_samples, 1),
        ("size", size, 16),
        ("slices_per_subject", slices_per_subject, 1),
    ):
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(
                f"{name} must be an integer of at least {least}, got {value!r}. Try {name}={4 * least}."
            )
    if not 0 <= lesions <= 1:
        raise ValueError(
            f"lesions must be a fraction in 0..1, got {lesions!r}. Use 0 for healthy, 1 for all."
        )
    if contrast not in TISSUE_LEVELS:
        raise ValueError(f"contrast must be one of {list(TISSUE_LEVELS)}, got {contrast!r}. Choose one.")
    for name, value, low, high in (
        ("lesion_radius", lesion_radius, 0, 0.15),
        ("z_range_mm", z_range_mm, -30, 60),
    ):
        if len(value) != 2 or not low <= value[0] <= value[1] <= high:
            raise ValueError(
                f"{name} must be (smallest, largest) within {low}..{high}, got {value!r}. Swap or clip them."
            )
