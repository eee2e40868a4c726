"""Which latent positions are noised: random patches (the paper) and random blobs, inside the brain."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

ORIGINAL_BRAIN_FRACTION = 0.9
BRAIN_RULES = ("paper", "original")
ORIGINAL_BLOCK = 2  # latent positions: the original's 16 pixels at a factor of 8


@dataclass(frozen=True)
class RandomPatches:
    """Rectangles on a grid: each cell is noised with a probability that is drawn per sample.

    Parameters
    ----------
    ratio : float or (float, float)
        The share of noised positions, drawn uniformly per sample; one number means (0, number).
    sizes : tuple of int
        Heights and widths of the cells, in latent positions, drawn independently of each other.
    size_probabilities : tuple of float or None
        How likely each size is; None = equal, as in the paper. The original code has .2 .3 .3 .2.

    Notes
    -----
    The original draws one cell size per batch, we one per sample.
    """

    ratio: float | tuple[float, float] = 0.4
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    size_probabilities: tuple[float, ...] | None = None

    def __post_init__(self):
        _ratio_range(self.ratio)
        _check_sizes(self.sizes, self.size_probabilities)

    def draw(
        self, n: int, h: int, w: int, generator: torch.Generator, weight: Tensor | None = None
    ) -> Tensor:
        """Noise masks, float (n, 1, h, w), 1 = noised.

        Parameters
        ----------
        n, h, w : int
            Number of masks, and their height and width in latent positions.
        generator : torch.Generator
            Source of the draws, on the CPU.
        weight : Tensor of shape (n, 1, h, w), 0 or more, optional
            Ignored: a grid has no centres to be drawn.
        """
        sizes = torch.tensor(self.sizes)
        weights = torch.tensor(self.size_probabilities or [1.0] * len(self.sizes))
        height, width = sizes[torch.multinomial(weights, 2 * n, True, generator=generator)].view(2, n)
        rows = torch.arange(h) // height[:, None]  # (n, h): the cell of each row
        columns = torch.arange(w) // width[:, None]
        chance = torch.rand(n, h, w, generator=generator)
        chance = chance[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return (chance < _draw_ratio(self.ratio, n, generator)[:, None, None])[:, None].float()


@dataclass(frozen=True)
class RandomBlobs:
    """Smooth irregular regions, as lesions are: a thresholded random field under a random disc.

    Parameters
    ----------
    radius : (float, float)
        Range of the blob's radius, as a share of the smaller latent side.
    n_blobs : (int, int)
        Range of the number of blobs per sample.
    roughness : float
        How far the random field bends the outline, as a share of the radius.
    """

    radius: tuple[float, float] = (0.05, 0.28)
    n_blobs: tuple[int, int] = (1, 3)
    roughness: float = 0.5

    @classmethod
    def of_ratio(cls, ratio: float | tuple[float, float]) -> RandomBlobs:
        """Blobs whose area goes with the upper end of ``ratio``, a mask ratio; 0.4 gives the default."""
        scale = max(_ratio_range(ratio)[1] / 0.4, 1e-6) ** 0.5
        return cls(radius=(cls.radius[0] * scale, cls.radius[1] * scale))

    def draw(
        self, n: int, h: int, w: int, generator: torch.Generator, weight: Tensor | None = None
    ) -> Tensor:
        """Noise masks, float (n, 1, h, w), 1 = noised.

        Parameters
        ----------
        n, h, w : int
            Number of masks, and their height and width in latent positions.
        generator : torch.Generator
            Source of the draws, on the CPU.
        weight : Tensor of shape (n, 1, h, w), 0 or more, optional
            How likely the centre of a blob is at each position, up to a factor. None = the same everywhere.
        """
        low, high = self.n_blobs
        count = torch.randint(low, high + 1, (n, 1, 1), generator=generator)
        rows, columns = torch.arange(h).float()[:, None], torch.arange(w).float()[None, :]
        flat = torch.ones(n, h * w) if weight is None else weight.reshape(n, h * w) + 1e-6
        noise_mask = torch.zeros(n, h, w, dtype=torch.bool)
        for k in range(high):
            centre = torch.multinomial(flat, 1, generator=generator)[:, :, None]
            u = torch.rand(n, 1, 1, generator=generator)
            stretch = torch.exp(0.8 * (torch.rand(n, 1, 1, generator=generator) - 0.5))
            r = min(h, w) * self.radius[0] * (self.radius[1] / self.radius[0]) ** u  # log-uniform
            distance = torch.hypot((rows - centre // w) * stretch, (columns - centre % w) / stretch) / r
            field = smooth_field(n, 1, h, w, generator)[:, 0]
            noise_mask |= (distance + self.roughness * field < 1) & (k < count)
        return noise_mask[:, None].float()


@dataclass(frozen=True)
class EitherMask:
    """For each sample the mask of `RandomPatches` or that of `RandomBlobs`.

    Parameters
    ----------
    patches : RandomPatches
        What draws the mask of patches.
    blobs : RandomBlobs
        What draws the mask of blobs.
    blob_share : float
        Probability of a blob mask, 0..1.
    """

    patches: RandomPatches = field(default_factory=RandomPatches)
    blobs: RandomBlobs = field(default_factory=RandomBlobs)
    blob_share: float = 0.5

    def draw(
        self, n: int, h: int, w: int, generator: torch.Generator, weight: Tensor | None = None
    ) -> Tensor:
        """Noise masks, float (n, 1, h, w), 1 = noised.

        Parameters
        ----------
        n, h, w, generator, weight :
            As in `RandomBlobs.draw`.
        """
        patches = self.patches.draw(n, h, w, generator)
        blobs = self.blobs.draw(n, h, w, generator, weight)
        choose_blob = torch.rand(n, 1, 1, 1, generator=generator) < self.blob_share
        return torch.where(choose_blob, blobs, patches)


def restrict_to_brain(noise_mask: Tensor, brain_fraction: Tensor, rule: str = "paper") -> Tensor:
    """Take away what is not brain.

    Parameters
    ----------
    noise_mask : Tensor of shape (batch, 1, h, w)
        1 = noised, as a mask's ``draw`` gives it.
    brain_fraction : Tensor of shape (batch, 1, h, w), in 0..1
        The share of each latent position's pixels that are brain.
    rule : {"paper", "original"}
        ``"paper"`` keeps every position that holds some brain; ``"original"`` keeps only blocks of 2 x 2
        positions (16 pixels at a factor of 8) of which 90 % is brain, so that the cortical rim is never
        noised (docs/method.md, "Where the code differs", row 5).
    """
    check_brain_rule(rule)
    if rule == "paper":
        return noise_mask * (brain_fraction > 0)
    h, w = brain_fraction.shape[-2:]
    padded = F.pad(brain_fraction, (0, w % ORIGINAL_BLOCK, 0, h % ORIGINAL_BLOCK))
    blocks = F.avg_pool2d(padded, ORIGINAL_BLOCK) >= ORIGINAL_BRAIN_FRACTION
    inside = F.interpolate(blocks.float(), scale_factor=ORIGINAL_BLOCK, mode="nearest")[..., :h, :w]
    return noise_mask * inside


def check_brain_rule(rule: str) -> None:
    """Raise ValueError for a rule that `restrict_to_brain` does not know."""
    if rule not in BRAIN_RULES:
        raise ValueError(f"brain_rule must be 'paper' or 'original', got {rule!r}. Use 'paper'.")


def smooth_field(n: int, c: int, h: int, w: int, generator: torch.Generator, cells: int = 4) -> Tensor:
    """Random fields (n, c, h, w) that vary over about ``1 / cells`` of the image, deviation near 1."""
    coarse = torch.randn(n, c, cells + 1, cells + 1, generator=generator)
    return F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)


def _ratio_range(ratio) -> tuple[float, float]:
    low, high = (0.0, float(ratio)) if isinstance(ratio, numbers.Real) else ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"mask_ratio must be one number in 0..1 or a range (low, high) inside it, got {ratio!r}. "
            f"The paper's is 0.4, which means (0, 0.4)."
        )
    return float(low), float(high)


def _draw_ratio(ratio, n: int, generator: torch.Generator) -> Tensor:
    low, high = _ratio_range(ratio)
    return low + (high - low) * torch.rand(n, generator=generator)


def _check_sizes(sizes, probabilities) -> None:
    if not sizes or any(int(size) != size or size < 1 for size in sizes):
        raise ValueError(
            f"mask_patch_sizes must be positive integers, got {sizes!r}. The paper's are (1, 2, 4, 8)."
        )
    if probabilities is not None and (
        len(probabilities) != len(sizes) or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6
    ):
        raise ValueError(
            f"mask_patch_probabilities must be {len(sizes)} numbers that sum to 1, one per patch size, "
            f"got {probabilities!r}. None makes the sizes equally likely."
        )
