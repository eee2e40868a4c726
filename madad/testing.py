"""The smallest useful configurations, for our tests and for those of projects that build on madad."""

from __future__ import annotations

from madad.detector import MaskedDiffusionAnomalyDetector
from madad.stages.autoencoder import LatentAutoencoder
from madad.training import Trainer


def tiny_autoencoder(**overrides) -> LatentAutoencoder:
    """A `LatentAutoencoder` that trains in well under a second on small slices.

    Values of any range are accepted: ``intensity_range="data"``.
    """
    defaults = {
        "size": "tiny",
        "trainer": Trainer(2, max_steps=10, learning_rate=3e-3),
        "intensity_range": "data",
        "random_state": 0,
    }
    return LatentAutoencoder(**(defaults | overrides))


def tiny_detector(**overrides) -> MaskedDiffusionAnomalyDetector:
    """A `MaskedDiffusionAnomalyDetector` that trains in about a second on small slices.

    It passes scikit-learn's ``check_estimator``. Values of any range are accepted:
    ``intensity_range="data"``. Its maps are only good enough to test a pipeline.
    """
    defaults = {"preset": "tiny", "anomaly_map": "mask", "intensity_range": "data", "random_state": 0}
    return MaskedDiffusionAnomalyDetector(**(defaults | overrides))
