"""The blocks both networks are made of: written once, for the autoencoder and for the U-Net."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class RecomputedBlock(nn.Module):
    """A block that can be told to forget its activations until the backward pass needs them again.

    Subclasses implement ``compute``. With ``recompute`` training takes less memory and about a third more
    time; gradients are the same bits.
    """

    recompute = False

    def forward(self, *inputs: Tensor) -> Tensor:
        """`compute`, once or, while training with ``recompute``, twice."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)


class ResidualBlock(RecomputedBlock):
    """Norm, SiLU, 3x3 convolution, twice, beside a shortcut; optionally shifted by a time embedding.

    Parameters
    ----------
    in_channels, out_channels : int
        The shortcut is a 1x1 convolution where they differ and the identity where they agree.
    time_channels : int or None
        Width of the time embedding that is projected and added between the two convolutions.
    dropout : float
        Dropout rate before the second convolution.
    norm_groups, norm_eps :
        Group norm's number of groups and epsilon.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None = None,
        dropout: float = 0.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def compute(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            hidden = hidden + self.time(F.silu(time_embedding))[:, :, None, None]
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(x) + hidden


class SelfAttention(RecomputedBlock):
    """Residual multi-head attention of every position to every other one.

    ``qkv`` keeps queries, keys and values in three blocks, each ordered by head; foreign weights are
    brought into this order when they are loaded (`madad.pretrained`).

    Parameters
    ----------
    channels : int
        Channels of input and output.
    n_heads : int
        Number of heads; must divide ``channels``.
    norm_groups, norm_eps :
        Group norm's number of groups and epsilon.
    """

    def __init__(self, channels: int, *, n_heads: int = 1, norm_groups: int = 32, norm_eps: float = 1e-5):
        super().__init__()
        if channels % n_heads:
            raise ValueError(
                f"n_heads must divide the number of channels {channels}, got {n_heads}. "
                f"Choose a divisor of {channels}."
            )
        self.n_heads = n_heads
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> the same shape."""
        batch, channels, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.n_heads, channels // self.n_heads, h * w)
        # contiguous, or PyTorch has no fused kernel for them on a CPU
        query, key, value = (
            qkv.transpose(-1, -2).contiguous().unbind(dim=1)
        )  # (batch, heads, tokens, channels)
        # PyTorch gives each thread a buffer whose size goes with the number of queries. Unless that is a
        # multiple of 8, buffers are aligned differently, and last digits depend on the thread.
        query = F.pad(query, (0, 0, 0, -h * w % 8))
        attended = F.scaled_dot_product_attention(query, key, value)[:, :, : h * w]
        return x + self.out(attended.transpose(-1, -2).reshape(batch, channels, h, w))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution.

    ``asymmetric`` pads one row below and one column to the right, as CompVis' autoencoders do; otherwise
    the padding is one on each side, as in the original MAD-AD U-Net.

    Parameters
    ----------
    channels : int
        Channels of input and output.
    asymmetric : bool
        Which of the two paddings.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, channels, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width by repetition, then smooth with a convolution.

    Of the nine taps of the kernel several meet the same repeated pixel. They are added up first: each pixel's
    four children are four 2x2 convolutions of it and its neighbours, with 4/9 of the multiplications.

    Parameters
    ----------
    channels : int
        Channels of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, channels, 2 h, 2 w)."""
        h, w = x.shape[-2:]
        # of all four kinds of children at all corners, those that belong to the pixel below and right of one
        corners = F.conv2d(x, self._kernels(), self.conv.bias.repeat(4), padding=1).unflatten(1, (2, 2, -1))
        children = x.new_empty(len(x), self.conv.out_channels, h, 2, w, 2, dtype=corners.dtype)
        for a, b in itertools.product((0, 1), repeat=2):
            children[:, :, :, a, :, b] = corners[:, a, b, :, a : a + h, b : b + w]
        return children.flatten(4, 5).flatten(2, 3)

    def _kernels(self) -> Tensor:
        """(4 channels, channels, 2, 2): for the upper left, upper right, lower left and lower right child."""
        first, second, third = self.conv.weight.unbind(dim=2)  # rows
        pairs = (first, second + third), (first + second, third)
        return torch.cat([_of_columns(torch.stack(pair, dim=2)) for pair in pairs])


class SpaceToDepthConv(nn.Module):
    """A stem: fold ``patch_size`` x ``patch_size`` blocks into channels, then a 3x3 convolution.

    With ``patch_size=1`` it is the plain convolution. Larger blocks spare a CPU the convolutions at full
    resolution, which cost most there.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before the folding and after the convolution.
    patch_size : int
        Side of a block in positions.
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int = 1):
        super().__init__()
        self.fold = nn.PixelUnshuffle(patch_size) if patch_size > 1 else nn.Identity()
        self.conv = nn.Conv2d(in_channels * patch_size**2, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, h / patch_size, w / patch_size)."""
        return self.conv(self.fold(x))


class DepthToSpaceHead(nn.Module):
    """Norm, SiLU, 3x3 convolution, then unfold channels into blocks: the stem's inverse.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before the norm and after the unfolding.
    patch_size : int
        Side of a block in positions.
    activate : bool
        False leaves the SiLU out.
    norm_groups, norm_eps :
        Group norm's number of groups and epsilon.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int = 1,
        *,
        activate: bool = True,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.activate = activate
        self.norm = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv = nn.Conv2d(in_channels, out_channels * patch_size**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(patch_size) if patch_size > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, patch_size h, patch_size w)."""
        x = self.norm(x)
        return self.unfold(self.conv(F.silu(x) if self.activate else x))


def _of_columns(weight: Tensor) -> Tensor:
    """(channels, channels, 2, 3) -> (2 channels, channels, 2, 2): for the left and for the right children."""
    first, second, third = weight.unbind(dim=3)
    pairs = (first, second + third), (first + second, third)
    return torch.cat([torch.stack(pair, dim=3) for pair in pairs])


def sinusoidal_embedding(position: Tensor, channels: int) -> Tensor:
    """Embed positions (batch,) as cosines and sines of geometric frequencies, (batch, channels)."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=position.device) / half
    angles = position[:, None].float() * torch.exp(-math.log(10_000.0) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples of ``multiple``."""
    below, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x
