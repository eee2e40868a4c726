"""Masked latent diffusion for unsupervised anomaly detection in brain MRI."""

from madad.autoencoding import LatentAutoencoder
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.training import Trainer

__version__ = "0.1.0"

__all__ = ["LatentAutoencoder", "MaskedDiffusionAnomalyDetector", "Trainer", "__version__"]
