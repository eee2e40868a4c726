"""Masked latent diffusion for unsupervised anomaly detection in brain MRI."""

from madad._version import __version__
from madad.augmentation import IntensityAugmentation
from madad.autoencoding import LatentAutoencoder
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.training import Trainer

__all__ = [
    "IntensityAugmentation",
    "LatentAutoencoder",
    "MaskedDiffusionAnomalyDetector",
    "Trainer",
    "__version__",
]
