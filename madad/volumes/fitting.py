"""Fit a `VolumeModel` on healthy volumes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from madad._runtime.distributed import Team, join
from madad._runtime.tensors import resolve_device
from madad.baselines import IntensityThreshold
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.maps.pooling import healthy_threshold
from madad.mri import HealthyIntensities, PreprocessedVolume, VolumePreprocessor, VolumeSlicer
from madad.mri.volume_slicer import TOLERANCE
from madad.saving.model_card import ModelCard
from madad.volumes.model import INTENSITY, VolumeModel
from madad.volumes.prediction import check_aggregation, slices_of_contrasts

MAX_CALIBRATION_VOLUMES = 40
"""Of held-out volumes, so many set the thresholds of volumes: their maps are in memory together."""


class HealthyVolume(NamedTuple):
    """What a model is trained on.

    Attributes
    ----------
    contrasts : list of PreprocessedVolume
        The contrasts of one person, on one grid and in the order of the model's channels.
    lesion_mask : ndarray of shape (X, Y, Z) or None
        Values above 0 are lesion, on the grid of the contrasts. None: there is no lesion.
    """

    contrasts: list[PreprocessedVolume]
    lesion_mask: np.ndarray | None = None


Read = Callable[[int], HealthyVolume]
Progress = Callable[[Sequence[int], str], Any]


def fit_volumes(
    detector: MaskedDiffusionAnomalyDetector,
    subjects: Sequence[str],
    read: Read,
    *,
    contrasts: Sequence[str],
    preprocessor: VolumePreprocessor,
    slicer: VolumeSlicer,
    aggregation: dict | None = None,
    data: dict | None = None,
    scratch=None,
    progress: Progress | None = None,
) -> VolumeModel:
    """Train a detector on the slices of healthy volumes, and set thresholds for whole volumes.

    Parameters
    ----------
    detector : MaskedDiffusionAnomalyDetector
        The detector of slices; fitted in place.
    subjects : sequence of str
        Person of each volume, at least 2 volumes; those of one person are all held out for the thresholds, or
        none.
    read : callable
        ``read(i)`` is the ``HealthyVolume`` of ``subjects[i]``; called several times for each, so that only
        one volume is in memory.
    contrasts : sequence of str
        Names of the contrasts, in the order of the channels.
    preprocessor : VolumePreprocessor
        What prepared the volumes; kept in the model's card.
    slicer : VolumeSlicer
        How volumes are cut into slices; fitted here.
    aggregation : dict or None, default=None
        ``smoothing_mm``, ``median_slices``, ``min_volume_ml`` of `madad.volumes.predict_volume`.
    data : dict or None, default=None
        Further facts about the data for the card, ready for JSON.
    scratch : path-like or None, default=None
        Folder for the slices, which are on disk while the detector trains, where all processes of a
        ``torchrun`` see it. None = a temporary one.
    progress : callable or None, default=None
        ``progress(indices, what)`` wraps an iteration over volumes.

    Returns
    -------
    VolumeModel
        The fitted detector, with a card that says how its slices were made and what its thresholds are.

    Raises
    ------
    ValueError
        If there are fewer than two volumes, or none has a slice without lesion.

    Notes
    -----
    Slices with lesion voxels are not trained on. The thresholds of volumes are set as `fit` sets those of
    slices, from at most `MAX_CALIBRATION_VOLUMES` of the held-out volumes without any lesion; without such,
    those of slices are used.

    Under ``torchrun`` the first process cuts the slices, and all read them.
    """
    if len(subjects) < 2:
        raise ValueError(
            f"DATA must hold at least 2 healthy volumes, to train on some and calibrate on others, got "
            f"{len(subjects)}. Add some."
        )
    check_aggregation(**(aggregation or {}))
    team = join(resolve_device(detector.device))
    over = progress if progress and team.is_first else (lambda indices, what: indices)
    with _scratch_folder(scratch, team) as folder:
        slicer, slices = team.first(lambda: _cut(folder, slicer, read, len(subjects), contrasts, over))
        held_out, intensity_thresholds = _train(detector, slices, subjects)
    card = ModelCard(
        contrasts=tuple(contrasts),
        preprocessor=preprocessor,
        slicer=slicer,
        aggregation=aggregation or {},
        intensity_thresholds=intensity_thresholds,
        data=_counts(subjects, slices, held_out) | (data or {}),
        healthy={name: one for name, one in slices.healthy.items() if one.n},
    )
    healthy = [i for i in held_out if i not in slices.with_lesion][:MAX_CALIBRATION_VOLUMES]
    return _calibrated(VolumeModel(detector, card), healthy, read, over, team)


@contextmanager
def _scratch_folder(parent, team: Team) -> Iterator[Path]:
    """A folder that the first process makes and clears away, for all."""
    made = tempfile.TemporaryDirectory(dir=parent, prefix="slices-") if team.is_first else nullcontext("")
    with made as folder:
        yield Path(team.broadcast(folder))


class _Slices(NamedTuple):
    """All slices that a model is fitted to, on disk."""

    folder: Path
    shape: tuple[int, ...]  # of a slice: (H, W) or (C, H, W)
    owners: np.ndarray  # (n,): of which volume
    healthy: dict[str, HealthyIntensities]
    with_lesion: set[int]  # volumes
    n_with_lesion: int  # slices, which are left out

    def mapped(self) -> tuple[np.ndarray, np.ndarray]:
        """The slices (n, H, W) or (n, C, H, W), and their brain masks (n, H, W)."""
        images = np.memmap(self.folder / "images", np.float32, "r", shape=(len(self.owners), *self.shape))
        masks = np.memmap(self.folder / "masks", bool, "r", shape=(len(self.owners), *self.shape[-2:]))
        return images, masks


def _cut(
    folder: Path, slicer: VolumeSlicer, read: Read, n_volumes: int, contrasts: Sequence[str], over: Progress
) -> tuple[VolumeSlicer, _Slices]:
    """Learn how large slices must be, then cut all volumes into such slices."""
    volumes = range(n_volumes)
    slicer = _fitted(slicer, (read(i).contrasts[0] for i in over(volumes, "sizes")))
    return slicer, _slices_on_disk(folder, slicer, read, over(volumes, "slices"), contrasts)


def _slices_on_disk(
    folder: Path,
    slicer: VolumeSlicer,
    read: Read,
    order: Iterable[int],
    contrasts: Sequence[str],
) -> _Slices:
    """Cut one volume after the other, and take in what healthy ones look like."""
    healthy = {name: HealthyIntensities() for name in contrasts}
    owners: list[int] = []
    with_lesion: set[int] = set()
    n_with_lesion, shape = 0, (0, 0)
    with open(folder / "images", "wb") as images_file, open(folder / "masks", "wb") as masks_file:
        for i in order:
            volume = read(i)
            images, masks, geometry = slices_of_contrasts(slicer, volume.contrasts)
            kept = np.ones(len(images), bool)
            if volume.lesion_mask is not None:
                lesion = (volume.lesion_mask > 0).astype(np.float32)  # floats: no voxel falls between pixels
                kept = ~geometry.to_slices(lesion).any(axis=(1, 2))
                with_lesion |= {i} if lesion.any() else set()
            if i not in with_lesion:
                for name, one in zip(contrasts, volume.contrasts, strict=True):
                    healthy[name].add(one, in_template=volume.contrasts[0].registration is not None)
            n_with_lesion += int(np.count_nonzero(~kept))
            owners += [i] * np.count_nonzero(kept)
            images_file.write(np.ascontiguousarray(images[kept], np.float32).data)
            masks_file.write(np.ascontiguousarray(masks[kept], bool).data)
            shape = images.shape[1:]
    if not owners:
        raise ValueError(
            f"DATA must hold slices without lesion, got {n_with_lesion} with one and none without. "
            "Train on healthy volunteers."
        )
    return _Slices(folder, shape, np.array(owners), healthy, with_lesion, n_with_lesion)


def _fitted(slicer: VolumeSlicer, volumes: Iterator[PreprocessedVolume]) -> VolumeSlicer:
    """Fit a slicer to volumes that are read one at a time."""
    needed, spacings = np.zeros(2, int), []
    for volume in volumes:
        one = VolumeSlicer(**slicer.get_params()).fit([volume.volume], brain_masks=[volume.brain_mask])
        needed = np.maximum(needed, one.shape_)
        spacings.append(one.spacing_mm_)
    if not np.allclose(spacings, spacings[0], rtol=TOLERANCE):
        raise ValueError(
            f"spacing_mm must be given where volumes differ, got pixels of {sorted(set(spacings))} mm. "
            "Give --spacing-mm 1."
        )
    slicer.shape_, slicer.spacing_mm_ = tuple(int(n) for n in needed), spacings[0]
    return slicer


def _train(
    detector: MaskedDiffusionAnomalyDetector, slices: _Slices, subjects: Sequence[str]
) -> tuple[list[int], dict[str, float]]:
    """Fit the detector; the volumes that it holds out, and what plain intensity has as thresholds."""
    images, masks = slices.mapped()
    groups = np.asarray(subjects)[slices.owners]
    detector.fit(images, brain_mask=masks, groups=groups)
    held_out = list(dict.fromkeys(slices.owners[detector.calibration_rows_].tolist()))
    return held_out, _intensity_thresholds(images, masks, groups, detector)


def _counts(subjects: Sequence[str], slices: _Slices, held_out: list[int]) -> dict[str, int]:
    """How much data there was, for the card."""
    return {
        "subjects": len(set(subjects)),
        "volumes": len(subjects),
        "slices": len(slices.owners),
        "slices_with_lesion_left_out": slices.n_with_lesion,
        "held_out_volumes": len(held_out),
    }


def _calibrated(
    model: VolumeModel, healthy: list[int], read: Read, over: Progress, team: Team
) -> VolumeModel:
    """The model with thresholds from held-out healthy volumes, of which each process maps a share."""
    share = team.shares(len(healthy))[team.rank]
    found = []
    for i in over(healthy[share.start : share.stop], "thresholds"):
        volume = read(i)
        prediction = model.predict(volume.contrasts)
        found.append((prediction.score, prediction.anomaly_map[_judged(model, volume.contrasts[0])]))
    found = list(chain.from_iterable(team.gather(found)))
    if not found:
        return model
    scores, pixels = zip(*found, strict=True)
    detector = model.detector
    threshold = healthy_threshold(np.concatenate(pixels), detector.pixel_specificity)
    offset = float(np.quantile(scores, 1 - detector.image_specificity))
    return VolumeModel(detector, replace(model.card, volume_threshold=threshold, volume_offset=offset))


def _judged(model: VolumeModel, volume: PreprocessedVolume) -> np.ndarray:
    """Voxels of the brain in the slices of the model: elsewhere a map is 0, which says nothing."""
    assert model.card.slicer is not None
    _, masks, geometry = model.card.slicer.slices_of(volume.volume, volume.brain_mask)
    return volume.brain_mask & geometry.to_volume(masks)


def _intensity_thresholds(
    images: np.ndarray, masks: np.ndarray, groups: np.ndarray, detector: MaskedDiffusionAnomalyDetector
) -> dict[str, float]:
    """The thresholds of `INTENSITY`, from slices held out as the detector's are."""
    names = ("random_state", "pixel_specificity", "calibration_fraction")
    shared = {name: getattr(detector, name) for name in names}
    return {
        name: IntensityThreshold(**parameters, **shared)
        .fit(images, brain_mask=masks, groups=groups)
        .map_threshold_
        for name, parameters in INTENSITY.items()
    }
