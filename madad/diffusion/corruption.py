"""What fills the masked latents during training: noise (the paper), or something more like a lesion.

A corruption is a small frozen object with one method, ``fill(z0, generator)``, that returns a tensor of the
shape of ``z0``: it stands where the forward process has its Gaussian noise (``docs/method.md``). Latents have
unit variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from madad._runtime.portable import PortableDataclass
from madad.diffusion.masking import smooth_field

SAME_TISSUE = 1e-3  # standard deviations of a latent value


class Corruption(Protocol):
    """Anything with this method can be the ``corruption`` of a detector.

    A detector with one of your own works; only those of this file can be saved with it.
    """

    def fill(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """What the forward process mixes into the masked positions.

        Parameters
        ----------
        z0 : Tensor of shape (batch, c, h, w)
            Clean latents, of about unit variance; they are left as they are.
        generator : torch.Generator
            The only source of randomness, on the CPU.

        Returns
        -------
        Tensor of shape (batch, c, h, w)
            The fill of each position, masked or not, of the type and on the device of ``z0``.
        """


@dataclass(frozen=True)
class GaussianNoise(PortableDataclass):
    """The paper's: independent standard normal values."""

    def fill(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise of the shape of ``z0``, drawn by ``generator``."""
        return torch.randn(z0.shape, generator=generator, dtype=z0.dtype).to(z0.device)


@dataclass(frozen=True)
class ErasedLatents(PortableDataclass):
    """Nothing: zero, the mean of healthy latents. Teaches to paint what is missing from what is around it."""

    def fill(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros of the shape of ``z0``; nothing is drawn by ``generator``."""
        return torch.zeros_like(z0)


@dataclass(frozen=True)
class ForeignLatents(PortableDataclass):
    """Healthy texture in the wrong place: another sample of the batch, flipped and shifted."""

    def fill(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """Each sample's fill is one other of ``z0``, mirrored or not, rolled by at least an eighth.

        Which other, how far and whether mirrored is drawn by ``generator``.
        """
        n, _, h, w = z0.shape
        other = (torch.arange(n) + torch.randint(1, max(n, 2), (n,), generator=generator)) % n
        quarter = (h // 4 or 1, w // 4 or 1)
        shift = [
            side // 8 + torch.randint(0, q, (n,), generator=generator)
            for side, q in zip((h, w), quarter, strict=True)
        ]
        sign = torch.randint(0, 2, (2, n), generator=generator) * 2 - 1
        mirror = torch.randint(0, 2, (n,), generator=generator).bool()
        rows = (torch.arange(h) + (sign[0] * shift[0])[:, None]) % h  # (n, h)
        columns = (torch.arange(w) + (sign[1] * shift[1])[:, None]) % w
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
        taken = z0.permute(0, 2, 3, 1)[other[:, None, None], rows[:, :, None], columns[:, None, :]]
        return taken.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class SmoothOffset(PortableDataclass):
    """Tissue moved in one direction of latent space, as a smooth lesion moves it.

    Parameters
    ----------
    magnitude : (float, float)
        Range of the offset's length (Euclidean, over channels), in standard deviations of a latent value.
    noise : float
        Standard deviation of the noise added to the moved tissue, 0 or more.
    flatten : float
        Largest share, 0..1, by which the tissue's own texture is replaced by zero, the mean of healthy
        latents.
    tissue_share : float
        Probability, 0..1, that the direction is one in which tissues differ from each other (the difference
        of two latents averaged over 5 x 5 positions, either sign) instead of a random one. Averaging leaves
        what an intensity shift moves and takes out texture. Where the two hardly differ (both background),
        the direction is random.
    patchy : float
        Probability, 0..1, that two offsets share the tissue between them in patches, as the core and the rim
        of a tumour do.
    """

    magnitude: tuple[float, float] = (0.7, 4.0)
    noise: float = 0.05
    flatten: float = 0.6
    tissue_share: float = 1.0
    patchy: float = 0.5

    def fill(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """The tissue ``z0``, flattened towards zero, plus slowly varying offsets and little noise.

        One offset or two to a sample; all is drawn by ``generator``.
        """
        n, _, h, w = z0.shape
        offset, other = self._offset(z0, generator), self._offset(z0, generator)
        balance = 0.5 * torch.randn(n, 1, 1, 1, generator=generator)
        patches = torch.sigmoid(4 * (smooth_field(n, 1, h, w, generator, cells=6) + balance))
        is_patchy = torch.rand(n, 1, 1, 1, generator=generator) < self.patchy
        share = torch.where(is_patchy, patches, 0.0).to(z0)
        noise = self.noise * torch.randn(z0.shape, generator=generator)
        kept = 1 - self.flatten * torch.rand(n, 1, 1, 1, generator=generator)
        return kept.to(z0) * z0 + (1 - share) * offset + share * other + noise.to(z0)

    def _offset(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """One direction per sample times a slowly varying length."""
        n, c, h, w = z0.shape
        direction = torch.randn(n, c, 1, 1, generator=generator).to(z0)
        by_tissue = (torch.rand(n, 1, 1, 1, generator=generator) < self.tissue_share).to(z0.device)
        between = self._between_tissues(z0, generator)
        by_tissue &= between.norm(dim=1, keepdim=True) > SAME_TISSUE
        direction = torch.where(by_tissue, between, direction)
        direction = direction / direction.norm(dim=1, keepdim=True)
        low, high = self.magnitude
        length = low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)
        slow = 1 + 0.3 * smooth_field(n, 1, h, w, generator)
        return direction * (length * slow).to(z0)

    def _between_tissues(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """Differences of the averaged latents at two random places of each sample, (n, c, 1, 1)."""
        n, c, h, w = z0.shape
        averaged = F.avg_pool2d(z0, 5, stride=1, padding=2, count_include_pad=False).flatten(2)
        places = torch.randint(0, h * w, (2, n), generator=generator)
        here, there = (averaged[torch.arange(n), :, place] for place in places)
        return (here - there)[:, :, None, None]


@dataclass(frozen=True)
class Mixture(PortableDataclass):
    """For each sample one of several corruptions.

    Parameters
    ----------
    corruptions : tuple of Corruption
        Those that are drawn from.
    probabilities : tuple of float or None
        How likely each of them is, 0 or more, in any unit. None = all are equally likely.
    """

    corruptions: tuple[Corruption, ...] = (ErasedLatents(), ForeignLatents(), SmoothOffset())
    probabilities: tuple[float, ...] | None = None

    def fill(self, z0: Tensor, generator: torch.Generator) -> Tensor:
        """The fill of one corruption for each sample of ``z0``, drawn by ``generator``."""
        weights = torch.tensor(self.probabilities or [1.0] * len(self.corruptions))
        choice = torch.multinomial(weights, len(z0), True, generator=generator)
        fills = torch.stack([corruption.fill(z0, generator) for corruption in self.corruptions])
        return fills[choice, torch.arange(len(z0))]


def teaches_repainting(corruption) -> bool:
    """Whether a network trained with ``corruption`` learns to repaint.

    It does with `ErasedLatents`, alone or in a `Mixture` that draws them.
    """
    if isinstance(corruption, Mixture):
        weights = corruption.probabilities or [1.0] * len(corruption.corruptions)
        drawn = [part for part, w in zip(corruption.corruptions, weights, strict=True) if w > 0]
        return any(map(teaches_repainting, drawn))
    return isinstance(corruption, ErasedLatents)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian": GaussianNoise(),
    "mixture": Mixture(probabilities=(0.2, 0.15, 0.65)),
}
