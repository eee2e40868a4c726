"""How faithful reconstructions are: arrays in, numbers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from madad.metrics._pixels import as_bool

FINE_DETAIL_PX = 1.0
SSIM_WINDOW_PX = 7
SMALLEST_SIDE = 3  # pixels: the smallest window that has a variance


def reconstruction_errors(
    images: ArrayLike, reconstructions: ArrayLike, brain_masks: ArrayLike
) -> dict[str, float]:
    """Errors of reconstructions inside the brain.

    Parameters
    ----------
    images, reconstructions : array-like of float of shape (n, H, W) or (n, C, H, W), in 0..1
        Slices and what an autoencoder makes of them, with sides of at least 3 pixels.
    brain_masks : array-like of shape (n, H, W), bool or 0/1
        True = brain; errors are measured there.

    Returns
    -------
    dict
        ``mae``; ``psnr`` in decibels for a range of 1 (infinite for a perfect copy); ``ssim``, the mean over
        brain pixels of the structural similarity (Wang et al., IEEE TIP 2004; scikit-image, windows of 7 px,
        fewer for slices smaller than that); ``high_frequency_ratio``, the energy of what a Gaussian of 1 px
        takes away, in the reconstruction over that in the image: 1 = as sharp, below = blurred, above =
        detail that is not there (NaN or infinite where the image has none).

    Raises
    ------
    ImportError
        Without scikit-image (extra ``report``).
    TypeError
        If images are not of floats, or masks not of numbers.
    ValueError
        If shapes disagree, there is no brain or a value is not finite.

    Notes
    -----
    Windows and Gaussian of a pixel at the brain's edge reach beyond it.
    """
    structural_similarity = _require_skimage()
    x, x_hat, brain = _validated(images, reconstructions, brain_masks)
    inside = np.broadcast_to(brain, x.shape)
    error = (x_hat - x)[inside]
    window = min(SSIM_WINDOW_PX, *x.shape[2:])
    window -= window % 2 == 0
    similarity = [
        structural_similarity(*pair, win_size=window, data_range=1.0, full=True)[1]
        for pair in zip(x.reshape(-1, *x.shape[2:]), x_hat.reshape(-1, *x.shape[2:]), strict=True)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "mae": float(np.abs(error).mean()),
            "psnr": float(-10 * np.log10(np.mean(error**2))),
            "ssim": float(np.reshape(similarity, x.shape)[inside].mean()),
            "high_frequency_ratio": float(
                np.sum(_fine_detail(x_hat)[inside] ** 2) / np.sum(_fine_detail(x)[inside] ** 2)
            ),
        }


def _validated(
    images: ArrayLike, reconstructions: ArrayLike, brain_masks: ArrayLike
) -> tuple[NDArray, NDArray, NDArray]:
    """Images and reconstructions, float64 (n, C, H, W), and masks (n, 1, H, W)."""
    x, x_hat, brain = np.asarray(images), np.asarray(reconstructions), as_bool("brain_masks", brain_masks)
    if x.dtype.kind != "f" or x_hat.dtype.kind != "f":
        raise TypeError(
            f"images and reconstructions must hold floats, got dtypes {x.dtype} and {x_hat.dtype}. "
            f"Scale them to 0..1."
        )
    if x.shape != x_hat.shape or x.ndim not in (3, 4):
        raise ValueError(
            f"reconstructions must have the shape of images, (n, H, W) or (n, C, H, W), got {x_hat.shape} "
            f"and {x.shape}. Reconstruct the images that are compared."
        )
    if min(x.shape[-2:]) < SMALLEST_SIDE or 0 in x.shape:
        raise ValueError(
            f"images must hold slices with sides of at least {SMALLEST_SIDE}, got shape {x.shape}. "
            f"Leave smaller ones out."
        )
    expected = (len(x), *x.shape[-2:])
    if brain.shape != expected or not brain.any():
        raise ValueError(
            f"brain_masks must have shape {expected} and hold some brain, got {brain.shape} with "
            f"{int(brain.sum())} pixels of it. Pass the masks of the images."
        )
    for name, values in (("images", x), ("reconstructions", x_hat)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name} must be finite, got {(~np.isfinite(values)).sum()} pixels that are not. Repair them."
            )
    shape = (len(x), -1, *x.shape[-2:])
    return x.astype(np.float64).reshape(shape), x_hat.astype(np.float64).reshape(shape), brain[:, None]


def _fine_detail(images: NDArray) -> NDArray:
    detail = images - gaussian_filter(images, (0, 0, FINE_DETAIL_PX, FINE_DETAIL_PX))
    return detail.round(12)  # a flat image has none, whatever rounding leaves of it


def _require_skimage():
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError(
            "scikit-image must be installed for the structural similarity, got no such package. "
            'Run: pip install "madad[report]"'
        ) from error
    return structural_similarity
