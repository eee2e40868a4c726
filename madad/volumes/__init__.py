"""From scans to maps on their own grid: prepare, cut into slices, predict, put back, write."""

from madad.volumes.fitting import HealthyVolume, fit_volumes
from madad.volumes.model import VolumeModel
from madad.volumes.prediction import VolumePrediction, predict_volume
from madad.volumes.preparation import preprocess_scan

__all__ = [
    "HealthyVolume",
    "VolumeModel",
    "VolumePrediction",
    "fit_volumes",
    "predict_volume",
    "preprocess_scan",
]
