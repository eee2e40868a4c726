"""Weights of others, read without running anything in them: KL autoencoders and the original U-Net."""

from madad.pretrained.kl_autoencoders import (
    load_compvis_autoencoder,
    load_diffusers_autoencoder,
    to_image_channels,
)
from madad.pretrained.loading import load_autoencoder, load_unet
from madad.pretrained.original_unet import load_original_unet
from madad.pretrained.weight_files import read_weights

__all__ = [
    "load_autoencoder",
    "load_compvis_autoencoder",
    "load_diffusers_autoencoder",
    "load_original_unet",
    "load_unet",
    "read_weights",
    "to_image_channels",
]
