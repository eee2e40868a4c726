"""The training loss: repair the masked latent and say where it was masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madad.diffusion.corruption import Corruption, GaussianNoise
from madad.diffusion.masking import RandomPatches, check_brain_rule, restrict_to_brain
from madad.diffusion.schedule import NoiseSchedule


def _bce(noise_logit: Tensor, noise_mask: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(noise_logit, noise_mask, reduction="none")


def _mse(noise_logit: Tensor, noise_mask: Tensor) -> Tensor:
    return (torch.sigmoid(noise_logit) - noise_mask).square()


MASK_LOSSES = {"bce": _bce, "mse": _mse}
"""Losses of the mask head at each position: the paper's, and the original code's."""


def masked_diffusion_loss(
    z0: Tensor, z0_hat: Tensor, noise_mask: Tensor, noise_logit: Tensor, mask_loss: str = "bce"
) -> tuple[Tensor, Tensor]:
    """The two terms of the loss, per sample (docs/method.md, "The loss").

    ``|| z0 - z0_hat ||^2`` as a mean over values, and the mask term between M and f_M: ``"bce"`` is binary
    cross-entropy (the paper), ``"mse"`` the squared error of the probability (the original code).

    Parameters
    ----------
    z0, z0_hat : Tensor of shape (batch, c, h, w)
        The clean latents, and what the network takes them to be.
    noise_mask, noise_logit : Tensor of shape (batch, 1, h, w)
        Where they are noised (1 = noised), and the mask head's answer before the sigmoid.
    mask_loss : {"bce", "mse"}
        Which of the two terms above the mask head has.

    Returns
    -------
    z0_loss, mask_loss : Tensor of shape (batch,)
    """
    z0_loss = (z0 - z0_hat).square().mean(dim=(1, 2, 3))
    mask_term = _mask_loss_called(mask_loss)(noise_logit, noise_mask)
    return z0_loss, mask_term.mean(dim=(1, 2, 3))


def _mask_loss_called(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name not in MASK_LOSSES:
        raise ValueError(
            f"mask_loss must be one of {tuple(MASK_LOSSES)}, got {name!r}. The paper's is 'bce'."
        )
    return MASK_LOSSES[name]


@dataclass
class MaskedDiffusionObjective:
    """Draw masks, times and fills for clean latents, noise them and score the network's answer.

    Parameters
    ----------
    schedule : NoiseSchedule
        How much of the clean latent is left at each time.
    masking : RandomPatches, RandomBlobs or EitherMask
        Anything with ``draw(n, h, w, generator, weight)``; ``weight`` (n, 1, h, w) is the share of brain.
    corruption : Corruption
        What fills the masked positions.
    brain_rule : {"paper", "original"}
        Which positions may be noised; see `restrict_to_brain`.
    mask_loss : {"bce", "mse"}
        Loss of the mask head; see `masked_diffusion_loss`.
    mask_loss_weight : float
        Weight of the mask head's loss, lambda in the paper; 0 or more.
    """

    schedule: NoiseSchedule
    masking: Any = RandomPatches()
    corruption: Corruption = GaussianNoise()
    brain_rule: str = "paper"
    mask_loss: str = "bce"
    mask_loss_weight: float = 0.001

    def __post_init__(self):
        _mask_loss_called(self.mask_loss)
        check_brain_rule(self.brain_rule)
        if not self.mask_loss_weight >= 0:
            raise ValueError(f"mask_loss_weight must be 0 or more, got {self.mask_loss_weight!r}. Use 0.001.")

    def noise(self, z0: Tensor, brain_fraction: Tensor, generator: torch.Generator):
        """Noise clean latents.

        Parameters
        ----------
        z0 : Tensor of shape (batch, c, h, w)
            Clean latents of unit variance.
        brain_fraction : Tensor of shape (batch, 1, h, w), in 0..1
            The share of each latent position's pixels that are brain.
        generator : torch.Generator
            Source of masks, times and fills, on the CPU.

        Returns
        -------
        z_t, noise_mask, t : Tensor of shape (batch, c, h, w), (batch, 1, h, w) and (batch,)
        """
        n, _, h, w = z0.shape
        drawn = self.masking.draw(n, h, w, generator, brain_fraction.cpu())
        noise_mask = restrict_to_brain(drawn.to(z0.device), brain_fraction, self.brain_rule)
        t = torch.randint(1, self.schedule.n_timesteps + 1, (n,), generator=generator).to(z0.device)
        fill = self.corruption.fill(z0, generator)
        return self.schedule.add_noise(z0, fill, noise_mask, t), noise_mask, t

    def __call__(
        self, unet: nn.Module, z0: Tensor, brain_fraction: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch of clean latents, and its two terms by name.

        Parameters
        ----------
        unet : callable (z_t, t) -> (z0_hat, noise_logit)
            The network that is trained, `madad.nn.MaskedUNet` for one.
        z0, brain_fraction, generator :
            As in `noise`, which is called first.
        """
        z_t, noise_mask, t = self.noise(z0, brain_fraction, generator)
        z0_hat, noise_logit = unet(z_t, t)
        z0_loss, mask_term = masked_diffusion_loss(
            z0, z0_hat.float(), noise_mask, noise_logit.float(), self.mask_loss
        )
        loss = (z0_loss + self.mask_loss_weight * mask_term).mean()
        return loss, {"z0": z0_loss.mean().detach(), "mask": mask_term.mean().detach()}
