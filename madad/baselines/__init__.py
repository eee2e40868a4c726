"""What MAD-AD is compared with: detectors with the same contract, data path, networks and trainer."""

from madad.baselines.autoencoder_residual import AutoencoderResidual
from madad.baselines.denoising_autoencoder import DenoisingAutoencoder
from madad.baselines.intensity_threshold import TAILS, IntensityThreshold
from madad.baselines.partial_diffusion import ImplicitGuidanceDiffusion, PartialDiffusion
from madad.baselines.patch_features import PatchFeatureDistance

__all__ = [
    "TAILS",
    "AutoencoderResidual",
    "DenoisingAutoencoder",
    "ImplicitGuidanceDiffusion",
    "IntensityThreshold",
    "PartialDiffusion",
    "PatchFeatureDistance",
]
