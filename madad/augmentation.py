"""Healthy variation that a scanner adds: seen in training, it is not taken for disease."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from madad.diffusion.masking import smooth_field


@dataclass(frozen=True)
class IntensityAugmentation:
    """Further copies of the healthy slices with another contrast, brightness and bias field.

    Parameters
    ----------
    n_copies : int
        Copies of each slice beside the original.
    log_gamma : float
        Standard deviation of the logarithm of the exponent, taken about the slice's mean brain intensity.
    log_gain : float
        Standard deviation of the logarithm of the overall factor.
    log_bias : float
        Standard deviation of the logarithm of a smooth multiplicative field.

    Notes
    -----
    ``y = m (x / m)^gamma * gain * exp(log_bias * field)`` for images in 0..1 with mean brain intensity ``m``,
    clipped to 0..1. Meant for models that are used on scanners they were not trained on; the one trial so far
    (benchmarks/README.md, T1) shows no clear gain.
    """

    n_copies: int = 3
    log_gamma: float = 0.2
    log_gain: float = 0.05
    log_bias: float = 0.08

    def __call__(self, x: Tensor, brain: Tensor, generator: torch.Generator) -> Tensor:
        """One augmented copy of network images.

        Parameters
        ----------
        x : Tensor of shape (batch, C, H, W), in -1..1
        brain : Tensor of shape (batch, 1, H, W), bool
        generator : torch.Generator
        """
        n, _, height, width = x.shape

        def factor(spread: float, *shape: int) -> Tensor:
            return torch.exp(spread * torch.randn(n, 1, *shape, generator=generator)).to(x)

        images = (x + 1) / 2
        inside = brain.to(images)
        area = inside.sum(dim=(2, 3), keepdim=True).clamp_min(1)
        mean = ((images * inside).sum(dim=(2, 3), keepdim=True) / area).clamp_min(1e-3)
        field = smooth_field(n, 1, height, width, generator, cells=2).to(x)
        contrast = mean * (images.clamp_min(0) / mean) ** factor(self.log_gamma, 1, 1)
        varied = contrast * factor(self.log_gain, 1, 1) * torch.exp(self.log_bias * field)
        return torch.where(brain, varied.clamp(0, 1), images) * 2 - 1
