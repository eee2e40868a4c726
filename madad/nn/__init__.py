"""The two networks: images to latents and back, and noised latents to clean ones."""

from madad.nn.autoencoder import AUTOENCODER_SIZES, AutoencoderConfig, AutoencoderKL
from madad.nn.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from madad.nn.perceptual import EfficientNetLite0Features, PerceptualDistance, make_perceptual
from madad.nn.unet import UNET_SIZES, MaskedUNet, UNetConfig

__all__ = [
    "AUTOENCODER_SIZES",
    "UNET_SIZES",
    "AutoencoderConfig",
    "AutoencoderKL",
    "EfficientNetLite0Features",
    "MaskedUNet",
    "PatchDiscriminator",
    "PerceptualDistance",
    "UNetConfig",
    "adaptive_weight",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "make_perceptual",
]
