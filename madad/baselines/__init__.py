"""What MAD-AD is compared with: detectors with the same contract, data path, networks and trainer."""

from madad.baselines.autoencoder import AutoencoderResidual
from madad.baselines.denoising import DenoisingAutoencoder
from madad.baselines.diffusion import ImplicitGuidanceDiffusion, PartialDiffusion
from madad.baselines.features import PatchFeatureDistance
from madad.baselines.intensity import TAILS, IntensityThreshold

__all__ = [
    "TAILS",
    "AutoencoderResidual",
    "DenoisingAutoencoder",
    "ImplicitGuidanceDiffusion",
    "IntensityThreshold",
    "PartialDiffusion",
    "PatchFeatureDistance",
]
