"""A detector with all it needs to judge volumes: preprocessing, slices, thresholds, healthy intensities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madad._runtime.distributed import alone
from madad._runtime.tensors import resolve_device
from madad.baselines import IntensityThreshold
from madad.datasets import Scan
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.mri import PreprocessedVolume
from madad.mri.healthy_intensities import MIN_TISSUE_CONTRAST
from madad.saving.model_card import ModelCard
from madad.saving.model_folder import CALIBRATION, CONFIG, read_card
from madad.saving.saved_detector import load_card, save_card
from madad.volumes.prediction import VolumePrediction, predict_volume, slices_of_contrasts
from madad.volumes.preparation import preprocess_scan, registration_warnings

INTENSITY: dict[str, dict[str, Any]] = {
    "intensity, bright": {"tail": "bright"},
    "intensity, dark": {"tail": "dark"},
    "equalised, bright": {"tail": "bright", "equalize": True},
    "equalised, dark": {"tail": "dark", "equalize": True},
}
"""What costs nothing, by name: parameters of `IntensityThreshold`."""


@dataclass(frozen=True, eq=False)
class VolumeModel:
    """A fitted detector and its card.

    Attributes
    ----------
    detector : MaskedDiffusionAnomalyDetector
        Fitted; it maps the slices.
    card : ModelCard
        How slices are made of volumes, and the thresholds of volumes.

    Examples
    --------
    >>> model = VolumeModel.load("t1-model")  # doctest: +SKIP
    >>> prediction = model.predict(model.prepare(Scan("01", {"T1": "sub-01_T1w.nii.gz"})))  # doctest: +SKIP
    >>> write_like("map.nii.gz", prediction.on_source()[0], prediction.preprocessed.source)  # doctest: +SKIP
    """

    detector: MaskedDiffusionAnomalyDetector
    card: ModelCard

    @classmethod
    def load(cls, path, device="auto") -> VolumeModel:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path-like
            Directory of a model that was fitted to volumes.
        device : str, default="auto"
            Where the networks run: "auto", "cpu", "cuda", "cuda:1", ...

        Returns
        -------
        VolumeModel
            A model that predicts the same as the one that was saved.

        Raises
        ------
        FileNotFoundError, ValueError
            If something is missing or damaged, or the model was trained on arrays, so that it is not known
            how volumes become its slices.
        """
        resolve_device(device)
        detector = MaskedDiffusionAnomalyDetector.load(path).set_params(device=device)
        card = load_card(path)
        if card.preprocessor is None or card.slicer is None:
            raise ValueError(
                f"MODEL must know how volumes become slices, got {path}, which was fitted to arrays. "
                "Train it by madad fit, or use predict_maps in Python."
            )
        return cls(detector, card)

    def save(self, path) -> None:
        """Write detector and card to a directory; see `MaskedDiffusionAnomalyDetector.save`.

        Parameters
        ----------
        path : path-like
            A new directory, or one that holds a model already, which is replaced.
        """
        self.detector.save(path, card=self.card)

    def save_card(self, path) -> None:
        """Write the card anew beside a model that `save` wrote, such as after a change of its ``metrics``.

        Networks, thresholds and the model's hash stay as they are.

        Parameters
        ----------
        path : path-like
            The directory of this model.
        """
        save_card(self.detector, path, self.card)

    def prepare(self, scan: Scan) -> list[PreprocessedVolume]:
        """Preprocess a scan as the training data were.

        Parameters
        ----------
        scan : Scan
            Files of one person, the model's contrasts among them.

        Returns
        -------
        list of PreprocessedVolume
            One for each of the model's contrasts, in their order.

        Raises
        ------
        ValueError, FileNotFoundError, ImportError
            See `madad.volumes.preprocess_scan`.
        """
        assert self.card.preprocessor is not None
        return list(preprocess_scan(self.card.preprocessor, scan, self.card.contrasts).values())

    def predict(
        self, volumes: Sequence[PreprocessedVolume], threshold: float | None = None
    ) -> VolumePrediction:
        """Map, components and score of a volume; see `madad.volumes.predict_volume`.

        Parameters
        ----------
        volumes : sequence of PreprocessedVolume
            The model's contrasts, from `prepare` or `madad.volumes.prepared_folder.read_preprocessed`.
        threshold : float or None, default=None
            Value of the map, in 0..1, at which a voxel is anomalous. None = the card's.

        Returns
        -------
        VolumePrediction
            Map, components and score on the grid of the first volume.
        """
        assert self.card.slicer is not None
        threshold = self.threshold if threshold is None else threshold
        return predict_volume(
            self.detector, volumes, self.card.slicer, threshold=threshold, **self.card.aggregation
        )

    def predict_from_intensity(self, volumes: Sequence[PreprocessedVolume], name: str) -> VolumePrediction:
        """Predict by plain intensity, which learns nothing.

        Parameters
        ----------
        volumes : sequence of PreprocessedVolume
            The model's contrasts, as for `predict`.
        name : str
            Name of the variant, one of `INTENSITY`.

        Returns
        -------
        VolumePrediction
            What `predict` would give, with the map of `IntensityThreshold` and its threshold in the card.
        """
        assert self.card.slicer is not None
        images, masks, _ = slices_of_contrasts(self.card.slicer, volumes)
        two = [0, -1]  # it learns nothing, but wants two slices
        with alone():
            baseline = IntensityThreshold(**INTENSITY[name]).fit(images[two], brain_mask=masks[two])
        threshold = self.card.intensity_thresholds[name]
        return predict_volume(
            baseline, volumes, self.card.slicer, threshold=threshold, **self.card.aggregation
        )

    @property
    def threshold(self) -> float:
        """Voxels of a map that reach it are anomalous: a float in 0..1."""
        of_volumes = self.card.volume_threshold
        return self.detector.map_threshold_ if of_volumes is None else of_volumes

    @property
    def offset(self) -> float:
        """Scores of volumes below it are anomalous: a float."""
        return self.detector.offset_ if self.card.volume_offset is None else self.card.volume_offset

    def doubts(self, volumes: Sequence[PreprocessedVolume]) -> list[str]:
        """Say why a prediction may mean little: a poor registration, or intensities of another contrast.

        Parameters
        ----------
        volumes : sequence of PreprocessedVolume
            The model's contrasts, as for `predict`.

        Returns
        -------
        list of str
            A sentence or two for each doubt; empty without.
        """
        found = []
        for contrast, volume in zip(self.card.contrasts, volumes, strict=True):
            found += registration_warnings(volume)
            healthy = self.card.healthy.get(contrast)
            ratio = None if healthy is None else healthy.tissue_contrast(volume)
            if ratio is not None and ratio < MIN_TISSUE_CONTRAST:
                found.append(
                    f"Intensities unlike those of healthy {contrast}: light and dark tissue differ "
                    f"{ratio:.2f} times as much. Check that it is the contrast the model was trained on."
                )
        return found


def model_hash(path) -> str:
    """SHA-256 of all that a prediction depends on in a saved model: not of its readme and metrics.

    Parameters
    ----------
    path : path-like
        Directory that ``save`` wrote.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix == ".safetensors" or file.name in (CONFIG, CALIBRATION):
            digest.update(file.name.encode())
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    card = {name: value for name, value in read_card(path).items() if name != "metrics"}
    digest.update(json.dumps(card, sort_keys=True).encode())
    return digest.hexdigest()
