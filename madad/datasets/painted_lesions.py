"""Lesions painted into slices: seen by their surroundings and shape, not by their grey level."""

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates, uniform_filter

from madad.mri.intensity import FOREGROUND_FLOOR

MIN_CONTRAST = 0.13
MAX_CONTRAST = 0.25
"""Difference between a lesion and its surroundings, where healthy tissue has its median at 0.4."""


def paint_lesion(image, brain_mask, rng, *, radius_px, mass_effect=False):
    """Paint one lesion whose grey level occurs in the healthy tissue of the same slice.

    Parameters
    ----------
    image : ndarray of shape (height, width)
        Healthy slice in 0..1 with background 0 and brain median near 0.4.
    brain_mask : ndarray of shape (height, width), bool
        True = brain, of the same slice.
    rng : numpy.random.Generator
        Draws place, shape, grey level and texture.
    radius_px : float
        Mean radius, at least 1.
    mass_effect : bool, default=False
        Push the surrounding tissue away from the centre before painting.

    Returns
    -------
    lesioned : ndarray of shape (height, width), float32
        In 0..1, equal to `image` far from the lesion and outside the brain.
    lesion_mask : ndarray of shape (height, width), bool
        Where the lesion's blending weight is above 0.5, inside the brain.

    Raises
    ------
    ValueError
        If shapes differ, the brain is empty, or `radius_px` is below 1 or too large for the brain.

    Notes
    -----
    ``w * lesion + (1 - w) * image`` with a weight ``w`` that falls softly from 1 to 0 across an irregular
    rim. The lesion is `MIN_CONTRAST` to `MAX_CONTRAST` darker or brighter than the tissue around it and, if
    the slice has room, within the 1st to 99th percentile of the healthy brain: fluid-like in white matter,
    white-matter-like in the cortex, and so on. So no threshold on intensity separates it.
    """
    if image.ndim != 2 or image.shape != brain_mask.shape:
        raise ValueError(
            f"brain_mask must have the 2-dimensional shape of image, got {brain_mask.shape} and "
            f"{image.shape}. Pass one slice and its mask."
        )
    depth_px = distance_transform_edt(brain_mask)
    if not 1 <= radius_px < depth_px.max():
        raise ValueError(
            f"radius_px must be at least 1 and below the brain's inner radius of {depth_px.max():.1f}, "
            f"got {radius_px:.3g}. Choose another lesion size or a slice with more brain."
        )
    center, weight, level = _place(image, brain_mask, depth_px, rng, radius_px)
    base = _push_away(image, brain_mask, depth_px, center, radius_px) if mass_effect else image

    inside = weight > 0.5
    texture = 0.03 * smooth_noise(rng, image.shape, max(radius_px / 3, 1.0))
    remains = 0.25 * (base - base[inside].mean())  # anatomy shines through
    lesioned = weight * np.clip(level + remains + texture, FOREGROUND_FLOOR, 1) + (1 - weight) * base
    return lesioned.astype(np.float32), inside


def smooth_noise(rng, shape, length_px):
    """Draw a random field of zero mean and unit variance, smooth over a length.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws one value per knot. The number of knots depends on ``shape / length_px`` only: drawn at twice
        the resolution and twice the length, the field is the same.
    shape : tuple of int
        Height and width of the field in pixels.
    length_px : float
        Standard deviation in pixels, above 0, of the Gaussian bumps that the field is a sum of.

    Returns
    -------
    ndarray of shape (height, width), float64
        The field, of mean 0 and variance 1 over many draws.
    """
    rows, columns = (_bump_basis(n, length_px) for n in shape)
    return rows @ rng.standard_normal((rows.shape[1], columns.shape[1])) @ columns.T


def _bump_basis(n_pixels, length_px):
    # Gaussian bumps one length apart reach three lengths beyond the border; unit rows give unit variance.
    n_knots = int(np.ceil(n_pixels / length_px)) + 7
    knots = (np.arange(n_knots) - 3) * length_px
    pixels = np.arange(n_pixels) + 0.5
    bumps = np.exp(-0.5 * ((pixels[:, None] - knots) / length_px) ** 2)
    return bumps / np.linalg.norm(bumps, axis=1, keepdims=True)


def _place(image, brain_mask, depth_px, rng, radius_px):
    """Draw centre, blending weight and grey level, where a healthy level contrasts with the surroundings."""
    low, high = np.percentile(image[brain_mask], (1, 99))
    around = _ring_mean(image, brain_mask, radius_px)
    room = np.stack([around - low, high - around])  # for a darker and for a brighter lesion
    room[:, depth_px <= 0.85 * radius_px] = -np.inf
    enough = room >= min(MIN_CONTRAST, room.max())
    sign = rng.choice([s for s in (0, 1) if enough[s].any()])
    center = rng.choice(np.argwhere(enough[sign]))

    distance = _irregular_distance(image.shape, center, radius_px, rng)
    contrast = rng.uniform(MIN_CONTRAST, np.clip(room[sign][tuple(center)], MIN_CONTRAST, MAX_CONTRAST))
    surroundings = brain_mask & (distance > 1.3) & (distance < 2.2)
    level = image[surroundings].mean() + (2 * sign - 1) * contrast
    weight = brain_mask / (1 + np.exp(np.clip((distance - 1) / 0.08, -50, 50)))
    return center, np.where(weight < 1e-3, 0, weight), level


def _ring_mean(image, brain_mask, radius_px):
    """Mean of the brain around each pixel, in a square ring of 1.2 to 2.2 radii."""
    outer, inner = (2 * round(factor * radius_px) + 1 for factor in (2.2, 1.2))

    def box_sum(values, width):
        return width**2 * uniform_filter(values, width, mode="constant")

    def ring_sum(values):
        return box_sum(values, outer) - box_sum(values, inner)

    brain = brain_mask.astype(np.float64)
    return ring_sum(image * brain) / np.maximum(ring_sum(brain), 0.5)


def _irregular_distance(shape, center, radius_px, rng):
    """Distance from the centre in radii: an ellipse bent by noise, 1 at the rim."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.35)
    y, x = np.ogrid[: shape[0], : shape[1]]
    y, x = (y - center[0]) / radius_px, (x - center[1]) / radius_px
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(along / stretch, across * stretch)
    # The noise grows from nothing at the centre and stops beyond the rim: one piece, no satellites.
    bend = 0.33 * smooth_noise(rng, shape, 0.45 * radius_px)
    return distance + bend * distance * np.exp(-((distance / 1.5) ** 4))


def _push_away(image, brain_mask, depth_px, center, radius_px):
    """Move tissue away from the centre, by half a radius near the rim and less and less beyond."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float64)
    y, x = y - center[0], x - center[1]
    distance = np.hypot(y, x) / radius_px + 1e-6
    shift = 0.5 * np.exp(-((distance / 2) ** 2)) * np.minimum(depth_px / radius_px, 1)
    shrink = 1 - np.minimum(shift / distance, 0.9)
    source = center[0] + y * shrink, center[1] + x * shrink
    pushed = map_coordinates(image, source, order=1, mode="nearest")
    return np.where(brain_mask & (distance < 4), np.maximum(pushed, FOREGROUND_FLOOR), image)
