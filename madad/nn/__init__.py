"""The two networks: images to latents and back, and noised latents to clean ones."""

from madad.nn.autoencoder import AUTOENCODER_SIZES, AutoencoderConfig, AutoencoderKL
from madad.nn.unet import UNET_SIZES, MaskedUNet, UNetConfig

__all__ = [
    "AUTOENCODER_SIZES",
    "UNET_SIZES",
    "AutoencoderConfig",
    "AutoencoderKL",
    "MaskedUNet",
    "UNetConfig",
]
