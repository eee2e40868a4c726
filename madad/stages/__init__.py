"""The two trainings and the repair: slices to latents, a denoiser of latents, patients restored by both."""

from madad.stages.augmentation import SliceAugmentation
from madad.stages.autoencoder import LatentAutoencoder
from madad.stages.autoencoder_loss import ReconstructionObjective
from madad.stages.denoiser import train_denoiser
from madad.stages.latent_cache import LatentCache, cache_latents
from madad.stages.restoration import restore_batches

__all__ = [
    "LatentAutoencoder",
    "LatentCache",
    "ReconstructionObjective",
    "SliceAugmentation",
    "cache_latents",
    "restore_batches",
    "train_denoiser",
]
