"""Smooth a map and cut it to the brain."""

from __future__ import annotations

from functools import lru_cache
from numbers import Real

import numpy as np
from scipy.ndimage import gaussian_filter1d

SMOOTHINGS = ("gaussian", "guided")
PAPER_SMOOTHING = 5 / 256  # the original's 5 px at 256 x 256, as a share of the slice's larger side
GUIDE_WIDTH = 1.5  # of the guided filter's window, in widths of the Gaussian
GUIDE_VARIANCE = 1e-3  # of the slice in 0..1: weaker contrast is no edge to the guided filter


def finish_map(
    anomaly_map: np.ndarray,
    brain_mask: np.ndarray,
    smoothing_px: float | None,
    guides: np.ndarray | None = None,
) -> np.ndarray:
    """Smooth a map, then set everything outside the brain to 0.

    Parameters
    ----------
    anomaly_map : ndarray of shape (n, H, W), in 0..1
        Maps as the differences gave them.
    brain_mask : ndarray of shape (n, H, W), bool
        Where a map may differ from 0.
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
        What is smoothed, and the image in 0..1 at whose edges smoothing ends.
    width_px : float
        Standard deviation of the Gaussian window, in pixels.
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
        Images or maps of one size.
    width_px : float
        Standard deviation of the Gaussian, in pixels.
    """
    down, across = (_gaussian_matrix(side, width_px) for side in images.shape[-2:])
    return down @ images @ across.T


@lru_cache(maxsize=16)
def _gaussian_matrix(side: int, width_px: float) -> np.ndarray:
    """(side, side): times a column of pixels it is the column filtered."""
    return gaussian_filter1d(np.eye(side), width_px, axis=0, mode="constant").astype(np.float32)


def smoothing_width(smoothing_px: float | None, height: int, width: int) -> float:
    """The Gaussian's standard deviation in pixels for slices of one size.

    Parameters
    ----------
    smoothing_px : float or None
        What the user asked for, in pixels; None = 5 px at 256, in proportion to the slice's larger side.
    height, width : int
        Size of the slice, in pixels.
    """
    if smoothing_px is None:
        return PAPER_SMOOTHING * max(height, width)
    if not (isinstance(smoothing_px, Real) and 0 <= float(smoothing_px) < np.inf):
        raise ValueError(f"smoothing_px must be finite and 0 or more, got {smoothing_px!r}. Use 0 for none.")
    return float(smoothing_px)
