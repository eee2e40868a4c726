"""The masked U-Net: one trunk and two heads, for the clean latent and for where it is not clean."""

from __future__ import annotations

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
    pad_to_multiple,
    sinusoidal_embedding,
)


@dataclass(frozen=True)
class UNetConfig(PortableDataclass):
    """Shape of a `MaskedUNet`.

    Parameters
    ----------
    latent_channels : int
        Channels of the latent that is read and of ``z0_hat``.
    base_channels : int
        Width of the first level; level ``i`` has ``base_channels * channel_multipliers[i]``.
    channel_multipliers : tuple of int
        One entry per level; each level after the first halves height and width.
    n_res_blocks : int
        Residual blocks per level on the way down; one more on the way up.
    attention_levels : tuple of int
        Levels whose residual blocks are each followed by attention; the middle always has one.
    n_heads : int
        Attention heads; must divide every width that has attention.
    dropout : float
        Dropout rate of the residual blocks.
    patch_size : int
        Side of the blocks of latent positions that the stem folds into channels.
    norm_groups : int
        Groups of every group norm; must divide every width.
    """

    latent_channels: int = 4
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    n_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    n_heads: int = 4
    dropout: float = 0.0
    patch_size: int = 1
    norm_groups: int = 32

    @property
    def multiple(self) -> int:
        """What the network pads latent height and width to."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)


# XS to XL are the original's (docs/method.md, "Where the code differs", row 15): attention everywhere. Its
# 12 heads for XL divide none of that network's widths; 10 do, and the number of heads changes no parameter
# count.
UNET_SIZES: dict[str, UNetConfig] = {
    "tiny": UNetConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        n_res_blocks=1,
        attention_levels=(),
        n_heads=2,
        norm_groups=4,
    ),
    "small": UNetConfig(
        channel_multipliers=(1, 2), n_res_blocks=1, attention_levels=(1,), patch_size=2, base_channels=64
    ),
    "medium": UNetConfig(
        channel_multipliers=(1, 2), n_res_blocks=2, attention_levels=(1,), patch_size=2, base_channels=96
    ),
    "XS": UNetConfig(base_channels=64, n_heads=4),
    "S": UNetConfig(base_channels=128, n_heads=4),
    "M": UNetConfig(base_channels=192, n_heads=6),
    "L": UNetConfig(base_channels=256, n_heads=8),
    "XL": UNetConfig(base_channels=320, n_heads=10),
}


class _Block(nn.Module):
    """A residual block, followed by attention where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, *, attention: bool, config: UNetConfig):
        super().__init__()
        self.residual = ResidualBlock(
            in_channels,
            out_channels,
            time_channels=4 * config.base_channels,
            dropout=config.dropout,
            norm_groups=config.norm_groups,
        )
        self.attention = (
            SelfAttention(out_channels, n_heads=config.n_heads, norm_groups=config.norm_groups)
            if attention
            else nn.Identity()
        )

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, time_embedding))


class MaskedUNet(PortableNetwork):
    """Time-conditioned U-Net with two heads (MAD-AD, section 2): ``f_z0`` and ``f_M``.

    Parameters
    ----------
    config : UNetConfig
        The shape; `UNET_SIZES` names some. ``network.config`` gives it back.

    Notes
    -----
    The trunk is that of Dhariwal & Nichol (NeurIPS 2021) without scale-shift norm, as the original code
    uses it. Latents of any height and width: they are padded to ``config.multiple`` inside, by repeating
    the border, and the answers are cropped. The original's mask head gives P(clean); ours P(noised).
    """

    def __init__(self, config: UNetConfig = UNET_SIZES["XS"]):
        super().__init__(config)
        widths = [config.base_channels * m for m in config.channel_multipliers]
        base, time_channels = config.base_channels, 4 * config.base_channels

        self.time_embedding = nn.Sequential(
            nn.Linear(base, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.stem = SpaceToDepthConv(config.latent_channels, base, config.patch_size)

        self.down = nn.ModuleList()
        channels, skip_channels = base, [base]
        for i, width in enumerate(widths):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(config.n_res_blocks):
                block = _Block(channels, width, attention=i in config.attention_levels, config=config)
                level["blocks"].append(block)
                channels = width
                skip_channels.append(channels)
            if i < len(widths) - 1:
                level["resample"] = Downsample(channels)
                skip_channels.append(channels)
            self.down.append(level)

        self.middle1 = _Block(channels, channels, attention=True, config=config)
        self.middle2 = _Block(channels, channels, attention=False, config=config)

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(config.n_res_blocks + 1):
                inputs = channels + skip_channels.pop()
                block = _Block(inputs, width, attention=i in config.attention_levels, config=config)
                level["blocks"].append(block)
                channels = width
            if i > 0:
                level["resample"] = Upsample(channels)
            self.up.append(level)

        groups = {"norm_groups": config.norm_groups}
        self.z0_head = DepthToSpaceHead(base, config.latent_channels, config.patch_size, **groups)
        self.noise_head = DepthToSpaceHead(base, 1, config.patch_size, activate=False, **groups)

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the clean latent and where ``z_t`` is not clean.

        Parameters
        ----------
        z_t : Tensor of shape (batch, latent_channels, h, w)
            A partly noised latent.
        t : Tensor of shape (batch,)
            Time of each sample, 1..T.

        Returns
        -------
        z0_hat : Tensor of shape (batch, latent_channels, h, w)
        noise_logit : Tensor of shape (batch, 1, h, w)
            Its sigmoid is P(noised).
        """
        h, w = z_t.shape[-2:]
        x = self.stem(pad_to_multiple(z_t, self.config.multiple))
        time_embedding = self.time_embedding(sinusoidal_embedding(t - 1, self.config.base_channels))

        skips = [x]
        for level in self.down:
            for block in level["blocks"]:
                x = block(x, time_embedding)
                skips.append(x)
            if "resample" in level:
                x = level["resample"](x)
                skips.append(x)

        x = self.middle2(self.middle1(x, time_embedding), time_embedding)

        for level in self.up:
            for block in level["blocks"]:
                x = block(torch.cat([x, skips.pop()], dim=1), time_embedding)
            if "resample" in level:
                x = level["resample"](x)

        return self.z0_head(x)[..., :h, :w], self.noise_head(x)[..., :h, :w]
