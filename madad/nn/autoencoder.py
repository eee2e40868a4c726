"""The KL autoencoder: slices to the mean and variance of a small latent image, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madad._runtime.portable import PortableDataclass, PortableNetwork
from madad.nn.layers import (
    DepthToSpaceHead,
    Downsample,
    ResidualBlock,
    SelfAttention,
    SpaceToDepthConv,
    Upsample,
)

NORM_EPS = 1e-6
ACTIVATIONS_AT_A_TIME = 12  # before and after a block, normalised, widened by the decoder's last upsampling


@dataclass(frozen=True)
class AutoencoderConfig(PortableDataclass):
    """Shape of an `AutoencoderKL`.

    Parameters
    ----------
    image_channels, latent_channels : int
        Channels of the image and of the latent.
    base_channels : int
        Width of the first level; level ``i`` has ``base_channels * channel_multipliers[i]``.
    channel_multipliers : tuple of int
        One entry per level; each level after the first halves height and width.
    n_res_blocks : int
        Residual blocks per encoder level; the decoder has one more.
    patch_size : int
        Side of the blocks that the stem folds into channels (1 = a plain convolution).
    mid_attention : bool
        One-head attention in the middle.
    norm_groups : int
        Groups of every group norm; must divide every width.
    linear_shortcut : bool
        Add a linear map between blocks of ``factor`` x ``factor`` pixels and latents to both directions; the
        convolutions then learn what is not linear, and training starts from a principal component
        analysis instead of from nothing.
    """

    image_channels: int = 1
    latent_channels: int = 4
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    n_res_blocks: int = 2
    patch_size: int = 1
    mid_attention: bool = True
    norm_groups: int = 32
    linear_shortcut: bool = False

    @property
    def factor(self) -> int:
        """Image pixels per latent position, along height and along width."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    def bytes_per_slice(self, height: int, width: int) -> int:
        """About the memory of ``height`` x ``width`` pixels: float32 activations around the widest layer."""
        pixels = math.ceil(height / self.patch_size) * math.ceil(width / self.patch_size)
        levels = [self.base_channels * m * pixels / 4**i for i, m in enumerate(self.channel_multipliers)]
        return math.ceil(4 * ACTIVATIONS_AT_A_TIME * max(levels))


KL_F8 = AutoencoderConfig()


def _fast(factor: int, latent_channels: int, base_channels: int, norm_groups: int = 32) -> AutoencoderConfig:
    """One level behind a space-to-depth stem: no convolution at full resolution, no attention."""
    return AutoencoderConfig(
        latent_channels=latent_channels,
        base_channels=base_channels,
        channel_multipliers=(1,),
        n_res_blocks=1,
        patch_size=factor,
        mid_attention=False,
        norm_groups=norm_groups,
        linear_shortcut=True,
    )


AUTOENCODER_SIZES: dict[str, AutoencoderConfig] = {
    "kl-f8": KL_F8,
    "fast-f2": _fast(2, latent_channels=3, base_channels=32),
    "fast-f4": _fast(4, latent_channels=8, base_channels=32),
    "fast-f8": _fast(8, latent_channels=16, base_channels=64),
    "tiny": _fast(4, latent_channels=2, base_channels=8, norm_groups=4),
}


class DiagonalGaussian:
    """The encoder's answer: an independent normal distribution for every latent value.

    Attributes
    ----------
    mean, logvar : Tensor of shape (batch, latent_channels, h, w)
        ``logvar`` is clamped to [-30, 20] as in CompVis' code.
    """

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw one latent, of the shape of ``mean``."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to the standard normal, per sample: (batch,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class _Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, attention: bool, norm: dict):
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, **norm)
        self.attention = SelfAttention(channels, **norm) if attention else nn.Identity()
        self.block2 = ResidualBlock(channels, channels, **norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nn.Module):
    """Images to twice the latent channels (mean and log-variance before the quant convolution).

    Parameters
    ----------
    config : AutoencoderConfig
        The shape of the autoencoder that it is a part of.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        norm = {"norm_groups": config.norm_groups, "norm_eps": NORM_EPS}
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.stem = SpaceToDepthConv(config.image_channels, config.base_channels, config.patch_size)

        self.levels = nn.ModuleList()
        channels = config.base_channels
        for i, width in enumerate(widths):
            blocks = []
            for _ in range(config.n_res_blocks):
                blocks.append(ResidualBlock(channels, width, **norm))
                channels = width
            if i < len(widths) - 1:
                blocks.append(Downsample(channels, asymmetric=True))
            self.levels.append(nn.Sequential(*blocks))

        self.middle = _Middle(channels, config.mid_attention, norm)
        self.head = DepthToSpaceHead(channels, 2 * config.latent_channels, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, image_channels, H, W) -> (batch, 2 latent_channels, H / factor, W / factor)."""
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        return self.head(self.middle(x))


class Decoder(nn.Module):
    """Latents to images, the encoder mirrored.

    Parameters
    ----------
    config : AutoencoderConfig
        The shape of the autoencoder that it is a part of.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        norm = {"norm_groups": config.norm_groups, "norm_eps": NORM_EPS}
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        channels = widths[0]
        self.stem = SpaceToDepthConv(config.latent_channels, channels)
        self.middle = _Middle(channels, config.mid_attention, norm)

        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            blocks = []
            for _ in range(config.n_res_blocks + 1):
                blocks.append(ResidualBlock(channels, width, **norm))
                channels = width
            if i < len(widths) - 1:
                blocks.append(Upsample(channels))
            self.levels.append(nn.Sequential(*blocks))

        self.head = DepthToSpaceHead(channels, config.image_channels, config.patch_size, **norm)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, latent_channels, h, w) -> (batch, image_channels, factor h, factor w)."""
        z = self.middle(self.stem(z))
        for level in self.levels:
            z = level(z)
        return self.head(z)


class AutoencoderKL(PortableNetwork):
    """Variational autoencoder with a spatial latent, as in latent diffusion models.

    With the defaults it is CompVis' and diffusers' ``kl-f8`` (Rombach et al., CVPR 2022) exactly, except
    for one image channel; `madad.pretrained` loads their weights. `AUTOENCODER_SIZES` also names small
    ones whose stem folds blocks of 2, 4 or 8 pixels into channels, for CPUs.

    Parameters
    ----------
    config : AutoencoderConfig
        The shape; ``network.config`` gives it back.

    Notes
    -----
    Height and width must be multiples of ``config.factor``: `madad.LatentAutoencoder` pads and crops.
    """

    def __init__(self, config: AutoencoderConfig = KL_F8):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        if config.linear_shortcut:
            c, image_channels, factor = config.latent_channels, config.image_channels, config.factor
            self.to_latent = nn.Conv2d(image_channels, c, factor, stride=factor)
            self.to_image = nn.ConvTranspose2d(c, image_channels, factor, stride=factor)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of the latent of images ``x`` in -1..1, (batch, image_channels, H, W).

        Raises
        ------
        ValueError
            If height or width is not a multiple of ``config.factor``, or the channels disagree.
        """
        channels, factor = self.config.image_channels, self.config.factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must have shape (batch, {channels}, height, width) with height and width divisible by "
                f"{factor}, got {tuple(x.shape)}. Pad the images with background."
            )
        mean, logvar = self.quant(self.encoder(x)).chunk(2, dim=1)
        if self.config.linear_shortcut:
            mean = mean + self.to_latent(x)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents ``z``, (batch, latent_channels, h, w) -> (batch, image_channels, H, W)."""
        x = self.decoder(self.post_quant(z))
        return x + self.to_image(z) if self.config.linear_shortcut else x

    @torch.no_grad()
    def start_from_components(self, blocks: Tensor) -> None:
        """Set the linear shortcut to the whitened principal components of image blocks.

        The convolutions start at zero and the posterior's standard deviation at ``exp(-4)``, so that the
        network begins as the principal component analysis and ends, trained, better than it.

        Parameters
        ----------
        blocks : Tensor of shape (n, image_channels, factor, factor), in -1..1
            Blocks of training images, on the CPU.
        """
        c = self.config.latent_channels
        flat = blocks.double().flatten(1)
        centre = flat.mean(dim=0)
        variance, axes = torch.linalg.eigh((flat - centre).T @ (flat - centre) / len(flat))
        order = variance.argsort(descending=True)[:c]
        axes, spread = axes[:, order].T, variance[order].clamp_min(1e-8).sqrt()  # (components, pixels)
        missing = c - len(order)  # more latent channels than pixels in a block
        axes = torch.cat([axes, axes.new_zeros(missing, axes.shape[1])])
        spread = torch.cat([spread, spread.new_ones(missing)])[:, None]
        self.to_latent.weight.copy_((axes / spread).view_as(self.to_latent.weight))
        self.to_latent.bias.copy_(-(axes @ centre) / spread[:, 0])
        self.to_image.weight.copy_((axes * spread).view_as(self.to_image.weight))
        self.to_image.bias.copy_(centre.view(self.config.image_channels, -1).mean(dim=1))
        for convolution in (self.quant, self.decoder.head.conv):
            convolution.weight.zero_()
            convolution.bias.zero_()
        self.quant.bias[c:] = -8.0

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction and posterior of ``x``: of a sample by ``generator``, or without one of the mean."""
        posterior = self.encode(x)
        z = posterior.mean if generator is None else posterior.sample(generator)
        return self.decode(z), posterior
