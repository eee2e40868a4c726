"""Simplex noise: smooth random fields that corrupt an image at many scales at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SKEW = (math.sqrt(3) - 1) / 2  # takes the triangular lattice to the square one
UNSKEW = (3 - math.sqrt(3)) / 6
N_DIRECTIONS = 8
ANGLES = (torch.arange(N_DIRECTIONS, dtype=torch.float64) + 0.5) * (math.tau / N_DIRECTIONS)


def simplex_noise(
    n: int,
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    octaves: int = 6,
    persistence: float = 0.8,
    frequency: float = 1 / 64,
) -> Tensor:
    """Independent fields of octave simplex noise, each of zero mean and unit variance.

    Parameters
    ----------
    n : int
        Number of fields.
    height, width : int
        Sides of a field in pixels.
    generator : torch.Generator
        Source of the draws, on the CPU: for each octave two offsets, then all directions.
    octaves : int
        Number of noises that are summed, each of half the wavelength of the one before.
    persistence : float
        Amplitude of an octave, as a factor of the one before.
    frequency : float
        Lattice coordinates per pixel in the first octave: about its cycles per pixel.

    Returns
    -------
    Tensor of shape (n, height, width), float32
        0 everywhere where all pixels are equal, as on a single one.

    Notes
    -----
    At a point ``p``, with the corners ``v`` of the triangle that it lies in and a unit vector ``g_v`` at
    each, one of eight ::

        s(p) = sum over v of max(0, 1/2 - |p - v|^2)^4 g_v . (p - v)

    The field is ``sum over k of persistence^k s_k(2^k frequency p + offset_k)``. The directions are drawn
    for each corner and not taken from a permutation table, whose noise repeats after 256 of them; offsets
    are shared by the fields of a call, directions are not.

    Differs from AnoDDPM: that uses OpenSimplex noise in three dimensions, the time being the third, whose
    cells are larger at equal frequency and whose variance is left as it is; every octave starts at the
    image's corner; and all slices of a batch, and all their channels, get one field.

    References
    ----------
    Perlin: Noise hardware, SIGGRAPH course notes 2001. Gustavson: Simplex noise demystified, 2005.
    Wyatt, Leach, Schmon, Willcocks: AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models
    using Simplex Noise, CVPR Workshops 2022.
    """
    field = torch.zeros(height * width, n)
    for k in range(octaves):
        offset = torch.rand(2, generator=generator, dtype=torch.float64)
        corners, towards, n_corners = _corners(height, width, 2**k * frequency, offset)
        drawn = torch.randint(N_DIRECTIONS, (n_corners, n), generator=generator)
        directions = torch.cat([ANGLES.cos().float()[drawn], ANGLES.sin().float()[drawn]])
        rows = torch.cat([corners, corners + n_corners], dim=1)
        # what a corner adds is linear in its direction: a weighted sum of rows
        noise = F.embedding_bag(rows, directions, per_sample_weights=towards, mode="sum")
        field = field + persistence**k * noise
    field = field.T.reshape(n, height, width)
    field = field - field.mean(dim=(1, 2), keepdim=True)
    deviation = field.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return field / deviation.clamp_min(torch.finfo(torch.float32).tiny)


def _corners(height: int, width: int, frequency: float, offset: Tensor) -> tuple[Tensor, Tensor, int]:
    """The triangles around all pixels, in the coordinates of a lattice.

    Returns
    -------
    corners : Tensor of shape (height * width, 3), int64
        Of each pixel, counted over the part of the lattice that the image covers.
    towards : Tensor of shape (height * width, 6), float32
        ``max(0, 1/2 - |d|^2)^4 d`` for ``d`` from the corners to the pixel: three times across, three times
        down.
    n_corners : int
    """
    across = torch.arange(width, dtype=torch.float64).mul(frequency) + offset[0]
    down = torch.arange(height, dtype=torch.float64).mul(frequency) + offset[1]
    p = torch.stack([across.repeat(height), down.repeat_interleave(width)])  # (2, pixels)
    first = (p + SKEW * p.sum(dim=0)).floor()
    d = p - first + UNSKEW * first.sum(dim=0)
    is_lower = d[0] > d[1]  # which of the square's two triangles
    second = torch.stack([is_lower, ~is_lower]).double()
    steps = torch.stack([torch.zeros_like(second), second, torch.ones_like(second)])  # (3, 2, pixels)
    d = d - steps + UNSKEW * steps.sum(dim=1, keepdim=True)
    falloff = (0.5 - d.square().sum(dim=1, keepdim=True)).clamp_min(0).square().square()
    vertices = (first + steps).long()
    vertices -= vertices.amin(dim=(0, 2), keepdim=True)
    n_columns, n_rows = (int(count) + 1 for count in vertices.amax(dim=(0, 2)))
    corners = vertices[:, 1] * n_columns + vertices[:, 0]
    towards = (falloff * d).float().permute(2, 1, 0).flatten(1)
    return corners.T.contiguous(), towards.contiguous(), n_columns * n_rows
