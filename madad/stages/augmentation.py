"""Healthy variation that other brains and scanners add: seen in training, it is not taken for disease."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from madad._runtime.portable import PortableDataclass
from madad.diffusion.masking import smooth_field


@dataclass(frozen=True)
class SliceAugmentation(PortableDataclass):
    """Further copies of the healthy slices: moved, slightly deformed, with another contrast and bias field.

    Widths are standard deviations, 0 or more, where nothing else is said; 0 switches a part off. The
    left-right flip is the autoencoder's ``flip``.

    Parameters
    ----------
    n_copies : int
        Copies of each slice beside the original, 0 or more.
    rotation : float
        Largest angle in degrees, uniform in both directions.
    log_scale : float
        Width of the logarithm of the size, which is drawn for height and width apart.
    shear : float
        Width of the shear of the rows, in columns per row.
    translation : float
        Width of the shift, as a share of the larger side.
    deformation : float
        Width of a smooth displacement field, as a share of the larger side.
    log_gamma : float
        Width of the logarithm of the exponent, taken about the slice's mean brain intensity.
    log_gain : float
        Width of the logarithm of the overall factor of the intensities.
    log_bias : float
        Width of the logarithm of a smooth multiplicative field, as a scanner's coil makes one.
    noise : float
        Width of independent noise, on images in 0..1.

    Notes
    -----
    Images in 0..1 with mean brain intensity ``m`` become ``m (x / m)^gamma * gain * exp(log_bias * field) +
    noise``, clipped to 0..1; then they are resampled once, bicubically (the brain mask: nearest).
    """

    n_copies: int = 8
    rotation: float = 8.0
    log_scale: float = 0.05
    shear: float = 0.04
    translation: float = 0.015
    deformation: float = 0.012
    log_gamma: float = 0.1
    log_gain: float = 0.03
    log_bias: float = 0.04
    noise: float = 0.0

    def __call__(self, x: Tensor, brain: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One augmented copy of network images and of their brain masks.

        Parameters
        ----------
        x : Tensor of shape (batch, C, H, W), in -1..1
            Network images; intensities change in the brain alone, places everywhere.
        brain : Tensor of shape (batch, 1, H, W), bool
            Their brain masks, on the device of ``x``.
        generator : torch.Generator
            The only source of randomness, on the CPU.

        Returns
        -------
        x : Tensor of shape (batch, C, H, W), in -1..1
            A new copy of each image.
        brain : Tensor of shape (batch, 1, H, W), bool
            Where the brain is in it.
        """
        images = (x + 1) / 2
        images = torch.where(brain, self._recolour(images, brain, generator), images)
        grid = self._grid(images, generator)
        if grid is not None:
            images = F.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1)
            brain = F.grid_sample(brain.to(images), grid, mode="nearest", align_corners=False) > 0.5
        return images * 2 - 1, brain

    def _recolour(self, images: Tensor, brain: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape

        def factor(spread: float) -> Tensor:
            return torch.exp(spread * torch.randn(n, 1, 1, 1, generator=generator)).to(images)

        inside = brain.to(images)
        area = inside.sum(dim=(2, 3), keepdim=True).clamp_min(1)
        mean = ((images * inside).sum(dim=(2, 3), keepdim=True) / area).clamp_min(1e-3)
        field = smooth_field(n, 1, height, width, generator, cells=2).to(images)
        contrast = mean * (images.clamp_min(0) / mean) ** factor(self.log_gamma)
        recoloured = contrast * factor(self.log_gain) * torch.exp(self.log_bias * field)
        if self.noise > 0:
            recoloured = recoloured + self.noise * torch.randn(images.shape, generator=generator).to(images)
        return recoloured.clamp(0, 1)

    def _grid(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """Where each pixel of the copy comes from, (batch, H, W, 2) in -1..1; None = from itself."""
        if not any((self.rotation, self.log_scale, self.shear, self.translation, self.deformation)):
            return None
        n, _, height, width = images.shape
        side = torch.tensor([width, height], dtype=torch.float32)  # in pixels, so that angles stay angles
        rows, columns = torch.meshgrid(
            torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
        )
        place = torch.stack([columns, rows], dim=-1).reshape(1, -1, 2).float()

        angle = math.radians(self.rotation) * (2 * torch.rand(n, generator=generator) - 1)
        scale = torch.exp(self.log_scale * torch.randn(n, 2, generator=generator))
        shear = self.shear * torch.randn(n, generator=generator)
        one, nothing = torch.ones(n), torch.zeros(n)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
        slant = torch.stack([one, shear, nothing, one], dim=1).view(n, 2, 2)
        shift = self.translation * side.max() * torch.randn(n, 1, 2, generator=generator)
        source = place @ (turn @ slant @ torch.diag_embed(scale)).mT + shift
        bend = smooth_field(n, 2, height, width, generator, cells=5).permute(0, 2, 3, 1)
        source = source.view(n, height, width, 2) + self.deformation * side.max() * bend
        return ((2 * source) / side).to(images)
