"""Where latents lie and spread over healthy brain: what brings them to zero mean and unit variance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from madad._runtime.distributed import Team

LEAST_SPREAD = 1e-6  # of a channel that says nothing


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Shift and scale of each latent channel: ``z = (mean - shift) * scale``.

    Parameters
    ----------
    shift : ndarray of shape (latent_channels,), float32
        Mean of the posterior's mean over healthy brain, in the network's own units.
    scale : ndarray of shape (latent_channels,), float32
        One over its standard deviation there, above 0.
    """

    shift: np.ndarray
    scale: np.ndarray

    def scaled(self, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """``mean`` and ``logvar`` (batch, c, h, w) of scaled latents, from those of the encoder."""
        shift, scale = self._columns(mean)
        return (mean - shift) * scale, logvar + 2 * scale.log()

    def unscaled(self, z: Tensor) -> Tensor:
        """What the decoder takes, of scaled latents ``z``, (batch, c, h, w)."""
        shift, scale = self._columns(z)
        return z / scale + shift

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = (torch.as_tensor(v).to(like.device)[:, None, None] for v in (self.shift, self.scale))
        return shift, scale


class LatentMoments:
    """Running sums over latent positions, batch by batch: what `LatentStatistics` come from.

    Sums over the positions with brain, and over all of them, which serve where no slice has brain.

    Parameters
    ----------
    latent_channels : int
        How many channels are measured; a process that has no slice to add is to know it too.
    """

    def __init__(self, latent_channels: int):
        self.count = torch.zeros(2, 1).double()
        self.total = torch.zeros(2, latent_channels).double()
        self.squares = torch.zeros(2, latent_channels).double()

    def add(self, mean: Tensor, brain: Tensor) -> None:
        """Count a batch.

        Parameters
        ----------
        mean : Tensor of shape (batch, latent_channels, h, w)
            The posterior's mean, in the network's own units.
        brain : Tensor of shape (batch, h, w), bool
            The latent positions that hold some brain.
        """
        everywhere = mean.double().permute(0, 2, 3, 1)
        groups = (everywhere[brain], everywhere.flatten(0, 2))
        self.count += torch.tensor([[len(values)] for values in groups])
        self.total = self.total.to(mean.device) + torch.stack([values.sum(0) for values in groups])
        squares = torch.stack([values.square().sum(0) for values in groups])
        self.squares = self.squares.to(mean.device) + squares

    def statistics(self, team: Team) -> LatentStatistics:
        """Of all that the processes of ``team`` counted, the same in each."""
        own = torch.cat([self.count, self.total.cpu(), self.squares.cpu()], dim=1)
        sums = torch.stack(team.gather(own)).sum(0)
        count, (total, squares) = sums[:, 0], sums[:, 1:].chunk(2, dim=1)
        row = 0 if count[0] > 0 else 1
        shift = total[row] / float(count[row])
        spread = (squares[row] / float(count[row]) - shift.square()).clamp_min(0).sqrt()
        scale = 1 / spread.clamp_min(LEAST_SPREAD)
        return LatentStatistics(shift.float().cpu().numpy(), scale.float().cpu().numpy())


def latent_report(z: Tensor, variance: Tensor) -> dict[str, float]:
    """How good scaled latents are.

    Parameters
    ----------
    z : Tensor of shape (n_positions, latent_channels), float64
        Posterior means at the latent positions that hold brain.
    variance : Tensor of shape (n_positions, latent_channels), float64
        The posterior's variances there.

    Returns
    -------
    dict
        ``latent_mean`` and ``latent_std`` over positions and channels, 0 and 1 on the slices that the
        statistics come from; ``dead_channels``, the share of channels, 0..1, that vary less between positions
        than the posterior itself: they say nothing about the slice.
    """
    return {
        "latent_mean": float(z.mean()),
        "latent_std": float(z.std()),
        "dead_channels": float((z.var(dim=0) < variance.mean(dim=0)).double().mean()),
    }
