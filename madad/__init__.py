"""Masked latent diffusion for unsupervised anomaly detection in brain MRI."""

from madad._version import __version__
from madad.augmentation import SliceAugmentation
from madad.autoencoding import LatentAutoencoder
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.training import Trainer

__all__ = [
    "SliceAugmentation",
    "LatentAutoencoder",
    "MaskedDiffusionAnomalyDetector",
    "Trainer",
    "__version__",
]
