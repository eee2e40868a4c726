"""Lesions counted one by one, and slices classed by the size of theirs."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from madad.metrics._pixels import as_bool, predicted_masks, validated


class LesionDetection(NamedTuple):
    """Lesions found and detections confirmed.

    Attributes
    ----------
    recall : float
        Share of the lesions that were found, in 0..1; NaN without lesions.
    precision : float
        Share of the detections that were confirmed, in 0..1; NaN without detections.
    n_lesions : int
        Number of lesions.
    n_detections : int
        Number of detections.
    """

    recall: float
    precision: float
    n_lesions: int
    n_detections: int


def lesion_detection(
    lesion_masks: ArrayLike,
    anomaly_maps: ArrayLike,
    threshold: float,
    brain_masks: ArrayLike | None = None,
    *,
    min_size_px: int = 1,
    connectivity: int | None = None,
) -> LesionDetection:
    """Count lesions found and detections confirmed, by connected components of each slice.

    A lesion is found when one of its pixels lies in a detection; a detection is confirmed when one of its
    pixels is a lesion pixel (of a lesion of any size).

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W), bool or 0/1
        True = lesion, on the grid of the maps.
    anomaly_maps : array-like of shape (n, H, W)
        Maps; higher = more anomalous.
    threshold : float
        Pixels whose map reaches it are predicted; in the unit of the maps.
    brain_masks : array-like of shape (n, H, W), bool or 0/1, or None, default=None
        True = brain; pixels outside are ignored. None counts every pixel.
    min_size_px : int >= 1, default=1
        Components of fewer pixels are not counted, neither lesions nor detections.
    connectivity : int, default=None
        Which neighbours are joined, as for `scipy.ndimage.generate_binary_structure`: in 2-d, 1 joins 4 and 2
        joins 8 neighbours. None joins all neighbours, diagonal ones included.

    Returns
    -------
    LesionDetection
        `recall` = found / `n_lesions` and `precision` = confirmed / `n_detections`.
    """
    if min_size_px < 1:
        raise ValueError(f"min_size_px must be at least 1, got {min_size_px!r}. Use 1 to count everything.")
    pixels, shape = validated(lesion_masks, anomaly_maps, brain_masks), np.shape(anomaly_maps)
    is_lesion = pixels.lesion.reshape(shape)
    lesions = _components(is_lesion, min_size_px, connectivity)
    detections = _components(predicted_masks(pixels, threshold).reshape(shape), min_size_px, connectivity)

    def share(components: NDArray, hits: NDArray) -> tuple[float, int]:
        n_all = np.unique(components[components > 0]).size
        n_hit = np.unique(components[(components > 0) & hits]).size
        return (n_hit / n_all if n_all else float("nan")), n_all

    recall, n_lesions = share(lesions, detections > 0)
    precision, n_detections = share(detections, is_lesion)
    return LesionDetection(recall, precision, n_lesions, n_detections)


def size_strata(
    lesion_masks: ArrayLike, *, edges_px: tuple[float, float, float] = (3, 71, 570), reference_size: int = 128
) -> NDArray[np.str_]:
    """Class of each slice by the size of its lesion.

    Parameters
    ----------
    lesion_masks : array-like of shape (n, H, W)
        True = lesion, in slices of one size.
    edges_px : three increasing floats, default=(3, 71, 570)
        Largest areas of "none" (no lesion, or too small for the published bins), "small" and "medium", in
        pixels of a slice of `reference_size` squared; they scale with the area of the slices. The defaults
        are THOR's (Bercea et al., "Diffusion Models with Implicit Guidance for Medical Anomaly Detection",
        MICCAI 2024).
    reference_size : int, default=128
        Height and width in pixels to which the edges refer, above 0.

    Returns
    -------
    ndarray of shape (n,), str
        "none", "small", "medium" or "large".
    """
    lesion = as_bool("lesion_masks", lesion_masks)
    if lesion.ndim != 3 or lesion.size == 0:
        raise ValueError(f"lesion_masks must have shape (n, H, W), got {lesion.shape}. Pass 2-d slices.")
    edges = np.asarray(edges_px, dtype=float)
    if edges.shape != (3,) or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges_px must be three increasing numbers, got {edges_px}. Give areas in pixels.")
    if not reference_size > 0:
        raise ValueError(f"reference_size must be positive, got {reference_size}. Give a height in pixels.")
    scale = lesion[0].size / reference_size**2
    strata = np.digitize(lesion.sum(axis=(1, 2)), edges * scale, right=True)
    return np.array(["none", "small", "medium", "large"])[strata]


def _components(foreground: NDArray, min_size_px: int, connectivity: int | None) -> NDArray:
    """Label connected components within each slice; 0 where there is none or a small one."""
    n_axes = foreground.ndim - 1
    if connectivity is not None and not 1 <= connectivity <= n_axes:
        raise ValueError(f"connectivity must be in 1..{n_axes}, got {connectivity}. Leave it at None.")
    structure = np.zeros((3,) * foreground.ndim, dtype=bool)
    structure[1] = ndimage.generate_binary_structure(n_axes, connectivity or n_axes)  # no link between slices
    labels, _ = ndimage.label(foreground, structure)
    labels[np.bincount(labels.ravel())[labels] < min_size_px] = 0
    return labels
