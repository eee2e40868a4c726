"""A volume through a detector of slices: its map in three dimensions, its score, its components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from madad.maps.pooling import pool_map
from madad.mri.nifti import check_same_grid
from madad.mri.slice_geometry import SliceGeometry
from madad.mri.volume_preprocessor import PreprocessedVolume
from madad.mri.volume_slicer import VolumeSlicer


class Component(NamedTuple):
    """Connected voxels at or above the threshold, joined also over edges and corners.

    Attributes
    ----------
    label : int
        Number of the component in `VolumePrediction.labels`; 1 has the highest peak.
    volume_ml : float
        Size in millilitres of the scan, not of the template.
    peak : float
        Largest value of the map, in 0..1.
    peak_mm, center_mm : tuple of 3 floats
        Where the peak and the centre of mass lie: world mm (right, front, up) of the grid that was mapped,
        which is the template's where the volume was brought there.
    """

    label: int
    volume_ml: float
    peak: float
    peak_mm: tuple[float, float, float]
    center_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class VolumePrediction:
    """What a detector says of a volume, on the grid of the preprocessed volume.

    Attributes
    ----------
    anomaly_map : ndarray of shape (X, Y, Z), float32 in 0..1
        0 outside the brain and where no slice was cut.
    labels : ndarray of shape (X, Y, Z), int32
        Number of the component that each voxel is of; 0 = none.
    components : list of Component
        From the highest peak down.
    score : float
        Higher = more normal, as `score_samples`: minus the mean of the largest 1 % of the map.
    preprocessed : PreprocessedVolume
        The volume that was mapped; of several contrasts the first.
    """

    anomaly_map: np.ndarray
    labels: np.ndarray
    components: list[Component]
    score: float
    preprocessed: PreprocessedVolume

    def on_source(self) -> tuple[np.ndarray, np.ndarray]:
        """Bring map and labels to the canonical grid of the scan, for `madad.mri.write_like`.

        Returns
        -------
        anomaly_map : ndarray of the shape of the scan, float32
            The map in 0..1; 0 outside the brain.
        labels : ndarray of the shape of the scan, int32
            Number of the component that each voxel is of; 0 = none.
        """
        return self.preprocessed.to_source(self.anomaly_map), self.preprocessed.to_source(self.labels)


def predict_volume(
    detector: Any,
    preprocessed: PreprocessedVolume | Sequence[PreprocessedVolume],
    slicer: VolumeSlicer,
    *,
    threshold: float | None = None,
    smoothing_mm: float = 0.0,
    median_slices: int = 1,
    min_volume_ml: float = 0.0,
) -> VolumePrediction:
    """Map a volume slice by slice and put the maps together.

    Parameters
    ----------
    detector : fitted detector
        With ``predict_maps`` and, unless a threshold is given, ``map_threshold_``.
    preprocessed : PreprocessedVolume or sequence of PreprocessedVolume
        A volume, or the contrasts that are the detector's channels, on one grid and in the order of training
        (`VolumePreprocessor.preprocess_contrasts`).
    slicer : VolumeSlicer
        Fitted; how the slices were cut that the detector was trained on.
    threshold : float or None, default=None
        Value of the map, in 0..1, at which a voxel is anomalous. None = the detector's, which was calibrated
        on the maps of single slices.
    smoothing_mm : float, default=0.0
        Standard deviation in mm, from 0, of a Gaussian across slices, along their axis alone: within the
        slice the detector smooths. 0 = none.
    median_slices : int, default=1
        Median over so many neighbouring slices, an odd number; 1 = none.
    min_volume_ml : float, default=0.0
        Components smaller than so many ml of the scan are left out of `labels` and `components`; from 0.

    Returns
    -------
    VolumePrediction
        Map, components and score on the grid of the preprocessed volume.

    Raises
    ------
    ValueError
        If a parameter is out of its range, or the slicer finds no brain or one that does not fit its slices.
    """
    check_aggregation(smoothing_mm, median_slices, min_volume_ml)
    channels = [preprocessed] if isinstance(preprocessed, PreprocessedVolume) else list(preprocessed)
    preprocessed = channels[0]
    images, masks, geometry = slices_of_contrasts(slicer, channels)
    maps = np.asarray(detector.predict_maps(images, brain_mask=masks), np.float32)
    if median_slices > 1:
        maps = ndimage.median_filter(maps, (median_slices, 1, 1), mode="nearest")
    if smoothing_mm > 0 and len(maps) > 1:
        distance_mm = geometry.positions_mm[1] - geometry.positions_mm[0]
        maps = ndimage.gaussian_filter1d(maps, smoothing_mm / distance_mm, axis=0, mode="nearest")
    maps = np.where(masks, maps, np.float32(0))
    threshold = float(detector.map_threshold_ if threshold is None else threshold)
    anomaly_map = np.where(preprocessed.brain_mask, geometry.to_volume(maps), np.float32(0))
    labels, components = find_components(
        anomaly_map, threshold, preprocessed.volume.affine, min_volume_ml, _scale_of(preprocessed)
    )
    flat = (1, -1, maps.shape[-1])
    score = -float(pool_map(maps.reshape(flat), masks.reshape(flat))[0])
    return VolumePrediction(anomaly_map, labels, components, score, preprocessed)


def check_aggregation(smoothing_mm: float = 0.0, median_slices: int = 1, min_volume_ml: float = 0.0) -> None:
    """Raise ValueError for parameters of `predict_volume` outside their ranges.

    Parameters
    ----------
    smoothing_mm : float, default=0.0
        Width of the smoothing across slices in mm, which must be finite and 0 or more.
    median_slices : int, default=1
        Slices that a median is taken over, which must be odd and 1 or more.
    min_volume_ml : float, default=0.0
        Volume of the smallest component in ml, which must be finite and 0 or more.
    """
    if median_slices < 1 or median_slices % 2 == 0:
        raise ValueError(
            f"median_slices must be an odd number above 0, got {median_slices!r}. 1 is no filter."
        )
    for name, value in (("smoothing_mm", smoothing_mm), ("min_volume_ml", min_volume_ml)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must be finite and 0 or more, got {value!r}. 0 switches it off.")


def slices_of_contrasts(
    slicer: VolumeSlicer, preprocessed: Sequence[PreprocessedVolume]
) -> tuple[np.ndarray, np.ndarray, SliceGeometry]:
    """Cut the contrasts of one subject into slices for a detector.

    Parameters
    ----------
    slicer : VolumeSlicer
        Fitted; how the slices are cut.
    preprocessed : sequence of PreprocessedVolume
        The contrasts in the order of the detector's channels, on one grid.

    Returns
    -------
    images : ndarray of shape (n, H, W), or (n, C, H, W) of several contrasts; float32
        The slices, in 0..1 with the background 0.
    brain_masks : ndarray of shape (n, H, W), bool
        True = brain of the first contrast.
    geometry : SliceGeometry
        Where the slices lie in the volume.

    Raises
    ------
    ValueError
        As `VolumeSlicer.slices_of`, or if the contrasts are not on one grid.
    """
    first = preprocessed[0]
    for other in preprocessed[1:]:
        check_same_grid(first.volume, other.volume)
    images, masks, geometry = slicer.slices_of(first.volume, first.brain_mask)
    if len(preprocessed) == 1:
        return images, masks, geometry
    others = [geometry.to_slices(other.volume.values, first.brain_mask) for other in preprocessed[1:]]
    return np.stack([images, *others], axis=1), masks, geometry


def find_components(
    anomaly_map: np.ndarray,
    threshold: float,
    affine: np.ndarray,
    min_volume_ml: float = 0.0,
    scale: float = 1.0,
) -> tuple[np.ndarray, list[Component]]:
    """Connected voxels of a map that reach a threshold.

    Parameters
    ----------
    anomaly_map : ndarray of shape (X, Y, Z), in 0..1
        The map; higher = more anomalous.
    threshold : float
        Voxels at or above it, and above 0, are connected; in 0..1.
    affine : ndarray of shape (4, 4)
        Voxel indices to world mm.
    min_volume_ml : float, default=0.0
        Components smaller than so many ml of the scan are left out; from 0.
    scale : float, default=1.0
        Millilitres of the scan per millilitre of this grid, above 0.

    Returns
    -------
    labels : ndarray of shape (X, Y, Z), int32
        Number of the component that each voxel is of; 0 = none.
    components : list of Component
        From the highest peak down.
    """
    found, n = ndimage.label((anomaly_map >= threshold) & (anomaly_map > 0), np.ones((3, 3, 3)))
    labels = np.zeros(anomaly_map.shape, np.int32)
    if n == 0:
        return labels, []
    places = np.nonzero(found)
    numbers, values = found[places] - 1, anomaly_map[places]
    sizes = np.bincount(numbers)
    millilitres = sizes * abs(np.linalg.det(affine[:3, :3])) / 1000 * scale
    first = np.cumsum(sizes) - sizes
    highest = np.lexsort((-values, numbers))[first]  # of equal ones the first
    peaks, peak_places = values[highest], np.stack(places, axis=1)[highest]
    centers = np.stack([np.bincount(numbers, along) / sizes for along in places], axis=1)
    kept = np.flatnonzero(millilitres >= min_volume_ml)
    kept = kept[np.argsort(-peaks[kept], kind="stable")]
    renumbered = np.zeros(n + 1, np.int32)
    renumbered[kept + 1] = np.arange(1, len(kept) + 1)
    components = [
        Component(
            int(renumbered[row + 1]),
            float(millilitres[row]),
            float(peaks[row]),
            _world(affine, peak_places[row]),
            _world(affine, centers[row]),
        )
        for row in kept
    ]
    return renumbered[found], components


def _world(affine: np.ndarray, place: np.ndarray) -> tuple[float, float, float]:
    x, y, z = affine[:3, :3] @ place + affine[:3, 3]
    return float(x), float(y), float(z)


def _scale_of(preprocessed: PreprocessedVolume) -> float:
    """Millilitres of the scan per millilitre of the grid that is mapped."""
    registration = preprocessed.registration
    return 1.0 if registration is None else 1 / abs(float(np.linalg.det(registration.matrix[:3, :3])))
