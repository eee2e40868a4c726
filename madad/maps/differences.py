"""From what was restored to where the anomaly is: arrays in, maps in 0..1 out."""

from __future__ import annotations

from numbers import Real

import numpy as np
from scipy.ndimage import zoom

from madad.maps.smoothing import blur

ANOMALY_MAPS = ("image", "latent", "mask")
DIFFERENCES = ("absolute", "squared", "relative")
REFERENCES = ("reconstruction", "input")
SPREAD_WIDTH = 2.5 / 256  # of the window that "relative" takes a spread from, as a share of the larger side
SPREAD_UNIT = 0.06  # a local spread, on the network's scale, that halves a relative difference


def image_map(
    restored: np.ndarray,
    reference: np.ndarray,
    *,
    gamma: float,
    difference: str = "absolute",
    brain_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Difference between restored and reference image, clipped: ``min(d, gamma) / gamma``.

    Parameters
    ----------
    restored, reference : ndarray of shape (n, C, H, W), in -1..1
        On the network's scale, as in the paper and the original code.
    gamma : float
        Largest difference that counts, on that scale; infinity = no clipping: divided by the largest one
        there can be.
    difference : {"absolute", "squared", "relative"}
        ``"squared"`` is the paper's, ``"absolute"`` the original code's (docs/method.md, "Where the code
        differs", row 9).
        ``"relative"``, ours, is the absolute one divided by ``1 + s / 0.06``, with ``s`` the local standard
        deviation of the restored image: where healthy anatomy has much contrast, as in the cortex, a
        restoration is less certain than in the white matter, and the same difference means less.
    brain_mask : ndarray of shape (n, H, W), bool, optional
        Where ``s`` is taken from; None = everywhere.

    Returns
    -------
    ndarray of shape (n, H, W), float32 in 0..1
        The mean over channels of the clipped differences.
    """
    check_choice("map_difference", difference, DIFFERENCES)
    check_gamma(gamma)
    distance = np.abs(restored - reference)
    largest = 2.0
    if difference == "squared":
        distance, largest = distance**2, 4.0
    elif difference == "relative":
        inside = np.ones(restored[:, 0].shape, bool) if brain_mask is None else brain_mask
        distance = distance / (1 + _local_spread(restored, inside[:, None]) / SPREAD_UNIT)
    limit = largest if np.isinf(gamma) else gamma
    return (np.minimum(distance, limit) / limit).mean(axis=1).astype(np.float32)


def latent_map(z_restored: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``d / (1 + d)`` of ``d = ||z_restored - z_T||``, the root mean square over channels.

    The squashing brings distances (0 to infinity, unit variance latents) to 0..1 and keeps their order.

    Parameters
    ----------
    z_restored, z : ndarray of shape (n, c, h, w)
        Repaired latents, and those of the slices as they are.

    Returns
    -------
    ndarray of shape (n, h, w), float32 in 0..1
        A map on the latent grid; see `upsample_map`.
    """
    distance = np.sqrt(((z_restored - z) ** 2).mean(axis=1))
    return (distance / (1 + distance)).astype(np.float32)


def mask_map(noise_probability: np.ndarray) -> np.ndarray:
    """Mean over the sampler's steps of f_M, a map on the latent grid; see `upsample_map`.

    Parameters
    ----------
    noise_probability : ndarray of shape (n_steps, n, 1, h, w), in 0..1
        f_M at each step: how likely each position is noised.

    Returns
    -------
    ndarray of shape (n, h, w), float32 in 0..1
        Higher = flagged more often, or with more certainty.
    """
    return noise_probability.mean(axis=0)[:, 0].astype(np.float32)


def upsample_map(latent_grid: np.ndarray, factor: int, height: int, width: int) -> np.ndarray:
    """Bring maps on the latent grid to pixels, linearly, centres aligned.

    Parameters
    ----------
    latent_grid : ndarray of shape (n, h, w), in 0..1
        Maps with one value for each latent position.
    factor : int
        Pixels per latent position, along each axis.
    height, width : int
        Size of the slice; what its padding added is cut off.

    Returns
    -------
    ndarray of shape (n, height, width), in 0..1
        Maps with one value for each pixel.
    """
    pixels = zoom(latent_grid, (1, factor, factor), order=1, mode="nearest", grid_mode=True)
    return np.clip(pixels[:, :height, :width], 0.0, 1.0)


def _local_spread(images: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Standard deviation around each pixel of (n, C, H, W), over what is inside (n, 1, H, W)."""
    width = SPREAD_WIDTH * max(images.shape[2:])
    weights = np.broadcast_to(inside, images.shape).astype(np.float32)
    share = np.maximum(blur(weights, width), 1e-3)
    mean = blur(images * weights, width) / share
    return np.sqrt(np.maximum(blur(images**2 * weights, width) / share - mean**2, 0))


def check_choice(name: str, value, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for a choice that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}. Use {allowed[0]!r}.")


def check_gamma(gamma: float) -> None:
    """Raise ValueError for a clip that is not positive."""
    if not (isinstance(gamma, Real) and float(gamma) > 0):
        raise ValueError(f"gamma must be positive, got {gamma!r}. math.inf switches clipping off.")
