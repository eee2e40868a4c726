"""From what was restored to where the anomaly is: arrays in, maps in 0..1 out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d, zoom

PAPER_SMOOTHING = 5 / 256  # the original's 5 px at 256 x 256, as a share of the slice's larger side
ANOMALY_MAPS = ("image", "latent", "mask")
DIFFERENCES = ("absolute", "squared", "relative")
SMOOTHINGS = ("gaussian", "guided")
REFERENCES = ("reconstruction", "input")
TOP_SHARE = 0.01
SPREAD_WIDTH = 2.5 / 256  # of the window that "relative" takes a spread from, as a share of the larger side
SPREAD_UNIT = 0.06  # a local spread, on the network's scale, that halves a relative difference
GUIDE_WIDTH = 1.5  # of the guided filter's window, in widths of the Gaussian
GUIDE_VARIANCE = 1e-3  # of the slice in 0..1: weaker contrast is no edge to the guided filter


def image_map(
    restored: np.ndarray,
    reference: np.ndarray,
    *,
    gamma: float | None,
    difference: str = "absolute",
    brain_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Difference between restored and reference image, clipped: ``min(d, gamma) / gamma``.

    Parameters
    ----------
    restored, reference : ndarray of shape (n, C, H, W), in -1..1
        On the network's scale, as in the paper and the original code.
    gamma : float or None
        Clip, on that scale. None or infinity = no clipping: divided by the largest difference there can be.
    difference : {"absolute", "squared", "relative"}
        ``"squared"`` is the paper's, ``"absolute"`` the original code's (METHOD, section 2, row 9).
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
    _check_choice("map_difference", difference, DIFFERENCES)
    if gamma is not None and not gamma > 0:
        raise ValueError(f"gamma must be positive or None, got {gamma!r}. The paper's is 0.2.")
    distance = np.abs(restored - reference)
    largest = 2.0
    if difference == "squared":
        distance, largest = distance**2, 4.0
    elif difference == "relative":
        inside = np.ones(restored[:, 0].shape, bool) if brain_mask is None else brain_mask
        distance = distance / (1 + _local_spread(restored, inside[:, None]) / SPREAD_UNIT)
    limit = largest if gamma is None or np.isinf(gamma) else gamma
    return (np.minimum(distance, limit) / limit).mean(axis=1).astype(np.float32)


def latent_map(z_restored: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``d / (1 + d)`` of ``d = ||z_restored - z_T||``, the root mean square over channels.

    The squashing brings distances (0 to infinity, unit variance latents) to 0..1 and keeps their order.

    Parameters
    ----------
    z_restored, z : ndarray of shape (n, c, h, w)

    Returns
    -------
    ndarray of shape (n, h, w), float32 in 0..1
    """
    distance = np.sqrt(((z_restored - z) ** 2).mean(axis=1))
    return (distance / (1 + distance)).astype(np.float32)


def mask_map(noise_probability: np.ndarray) -> np.ndarray:
    """Mean over the sampler's steps of f_M: (n_steps, n, 1, h, w) -> (n, h, w), float32 in 0..1."""
    return noise_probability.mean(axis=0)[:, 0].astype(np.float32)


def upsample_map(latent_grid: np.ndarray, factor: int, height: int, width: int) -> np.ndarray:
    """Bring maps (n, h, w) on the latent grid to pixels (n, height, width), linearly, centres aligned."""
    pixels = zoom(latent_grid, (1, factor, factor), order=1, mode="nearest", grid_mode=True)
    return np.clip(pixels[:, :height, :width], 0.0, 1.0)


def finish_map(
    anomaly_map: np.ndarray,
    brain_mask: np.ndarray,
    smoothing_px: float | None,
    guides: np.ndarray | None = None,
) -> np.ndarray:
    """Smooth a map, then set everything outside the brain to 0.

    Parameters
    ----------
    anomaly_map : ndarray of shape (n, H, W)
    brain_mask : ndarray of shape (n, H, W), bool
    smoothing_px : float or None
        Standard deviation of a Gaussian in pixels; None = the original's 5 px at 256, scaled to the size;
        0 = none.
    guides : ndarray of shape (n, C, H, W), in 0..1, optional
        Slices whose edges the map is to follow: of the Gaussian's map and of `guided_filter`'s, with a window
        1.5 times as wide and the largest over channels, the smaller. The Gaussian alone carries a lesion
        over its edge; the guided filter alone lets single bright pixels stand.
    """
    sigma = smoothing_width(smoothing_px, *anomaly_map.shape[1:])
    masked = np.where(brain_mask, anomaly_map, np.float32(0))
    smooth = masked
    if sigma > 0:
        smooth = blur(masked, sigma)
    if sigma > 0 and guides is not None:
        channels = (np.where(brain_mask, guide, np.float32(0)) for guide in guides.swapaxes(0, 1))
        guided = [guided_filter(masked, channel, GUIDE_WIDTH * sigma) for channel in channels]
        smooth = np.minimum(smooth, np.max(guided, axis=0))
    return np.where(brain_mask, np.clip(smooth, 0.0, 1.0), np.float32(0)).astype(np.float32)


def guided_filter(values: np.ndarray, guide: np.ndarray, width_px: float) -> np.ndarray:
    """Smooth ``values`` as a locally linear function of ``guide`` (He, Sun and Tang, TPAMI 2013).

    ``q = mean(a) guide + mean(b)``, ``a = cov(guide, values) / (var(guide) + 1e-3)``,
    ``b = mean(values) - a mean(guide)``; windows are Gaussians here.

    Parameters
    ----------
    values, guide : ndarray of shape (n, H, W)
    width_px : float
        Standard deviation of the window.
    """
    mean_guide, mean_values = blur(guide, width_px), blur(values, width_px)
    slope = blur(guide * values, width_px) - mean_guide * mean_values
    slope /= np.maximum(blur(guide * guide, width_px) - mean_guide**2, 0) + GUIDE_VARIANCE
    return blur(slope, width_px) * guide + blur(mean_values - slope * mean_guide, width_px)


def blur(images: np.ndarray, width_px: float) -> np.ndarray:
    """Gaussian over the last two axes, background 0 beyond the edges.

    ``scipy.ndimage.gaussian_filter`` by products with a banded matrix: it takes a fraction of the time.

    Parameters
    ----------
    images : ndarray of shape (..., H, W), float32
    width_px : float
        Standard deviation.
    """
    down, across = (_gaussian_matrix(side, width_px) for side in images.shape[-2:])
    return down @ images @ across.T


@lru_cache(maxsize=16)
def _gaussian_matrix(side: int, width_px: float) -> np.ndarray:
    """(side, side): times a column of pixels it is the column filtered."""
    return gaussian_filter1d(np.eye(side), width_px, axis=0, mode="constant").astype(np.float32)


def _local_spread(images: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Standard deviation around each pixel of (n, C, H, W), over what is inside (n, 1, H, W)."""
    width = SPREAD_WIDTH * max(images.shape[2:])
    weights = np.broadcast_to(inside, images.shape).astype(np.float32)
    share = np.maximum(blur(weights, width), 1e-3)
    mean = blur(images * weights, width) / share
    return np.sqrt(np.maximum(blur(images**2 * weights, width) / share - mean**2, 0))


def smoothing_width(smoothing_px: float | None, height: int, width: int) -> float:
    """The Gaussian's standard deviation in pixels for slices of one size."""
    if smoothing_px is None:
        return PAPER_SMOOTHING * max(height, width)
    if not 0 <= smoothing_px < np.inf:
        raise ValueError(f"smoothing_px must be finite and 0 or more, got {smoothing_px!r}. Use 0 for none.")
    return float(smoothing_px)


def pool_map(anomaly_map: np.ndarray, brain_mask: np.ndarray, top_share: float = TOP_SHARE) -> np.ndarray:
    """One number per slice: the mean of the map's largest values, at least one, ``top_share`` of the brain.

    The mean over the whole brain drowns a small lesion in the rest; the single maximum follows one noisy
    pixel.

    Parameters
    ----------
    anomaly_map, brain_mask : ndarray of shape (n, H, W)
    top_share : float
        In (0, 1].

    Returns
    -------
    ndarray of shape (n,), float64; 0 for slices without brain.
    """
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share must be above 0 and at most 1, got {top_share!r}. The default is 0.01.")
    scores = np.zeros(len(anomaly_map))
    for i, (values, brain) in enumerate(zip(anomaly_map, brain_mask, strict=True)):
        inside = values[brain]
        if inside.size:
            k = max(1, round(top_share * inside.size))
            scores[i] = np.partition(inside, -k)[-k:].mean(dtype=np.float64)
    return scores


def healthy_threshold(values: np.ndarray, specificity: float) -> float:
    """The smallest float32 above the ``specificity`` quantile of healthy pixels' maps.

    To be compared with ``>=``: where most healthy pixels are exactly 0, none of them is called anomalous.
    Without any pixel it is the smallest number above 0.
    """
    quantile = np.quantile(values, specificity) if values.size else 0.0
    return float(np.nextafter(np.float32(quantile), np.float32(np.inf)))


def _check_choice(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}. Use {allowed[0]!r}.")
