"""Repair a latent by repainting: find with a sampler's steps, erase what they found, predict it anew."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from madad._runtime.tensors import fixed_parts
from madad.diffusion.sampler import MaskedDDIM, MaskedDDPM, Repair, Restoration, inside_brain
from madad.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Repainting:
    """Erase what a sampler's steps flag on average, and let the network paint it from what is around it.

    Parameters
    ----------
    sampler : MaskedDDIM or MaskedDDPM
        Its steps only find what is not normal; where they move to is not used.
    repaint : float
        Largest share of a brain's positions that is erased, above 0 and up to 1: those with the highest mean
        f_M. It keeps something to paint from where a network flags all of a brain, one from another scanner
        for example.

    Notes
    -----
    Ours. The steps of the paper can only shift tissue back by what the network takes for its corruption, and
    much of a lesion stays. Repainting takes away all of it:
    ``z_0 = B(mean f_M) f_z0((1 - B(mean f_M)) z_T, T) + (1 - B(mean f_M)) z_T``, where 0 is the mean of
    healthy latents. The network must have been trained with `madad.diffusion.ErasedLatents`.
    """

    sampler: MaskedDDIM | MaskedDDPM
    repaint: float = 1.0

    def __post_init__(self):
        if not (isinstance(self.repaint, Real) and 0 < float(self.repaint) <= 1):
            raise ValueError(
                f"repaint must be above 0 and at most 1, got {self.repaint!r}. make_repair(sampler, 0), and "
                f"repaint=0 of a detector, repair step by step."
            )

    def restore(
        self,
        unet: nn.Module,
        z: Tensor,
        schedule: NoiseSchedule,
        generator: torch.Generator | None = None,
        *,
        brain_fraction: Tensor | None = None,
        repaint_size: int | None = None,
        early_exit: bool = False,
        return_trajectory: bool = False,
    ) -> Restoration:
        """Find, erase and repaint; see `madad.diffusion.Repair`."""
        inside = inside_brain(z, brain_fraction)
        total, probabilities, trajectory = torch.zeros_like(z[:, :1]), [], [z]
        for z_t, noise_probability, _ in self.sampler.steps(unet, z, schedule, generator, brain_fraction):
            probabilities.append(noise_probability)
            trajectory.append(z_t)
            total = total + noise_probability  # in one order for all batches
            may_leave = early_exit and not return_trajectory
            if may_leave and not self._can_erase(total, len(probabilities), inside):
                nothing = torch.zeros(len(z), dtype=torch.bool, device=z.device)
                return Restoration(z, torch.stack(probabilities), nothing, None)
        erased = self._erased(total / self.sampler.n_steps, inside)
        z_restored = _repainted(unet, z, erased, schedule, repaint_size or len(z))
        return Restoration(
            z_restored,
            torch.stack(probabilities),
            erased.flatten(1).any(dim=1),
            torch.stack([*trajectory, z_restored]) if return_trajectory else None,
        )

    def _can_erase(self, total: Tensor, n_done: int, inside: Tensor) -> bool:
        """Whether the mean of f_M may still exceed the threshold anywhere: if it is 1 from now on."""
        n_steps, threshold = self.sampler.n_steps, self.sampler.mask_threshold
        n_left = n_steps - n_done
        if n_left / n_steps > threshold:
            return True  # certain where there is brain, without a look at the values
        for _ in range(n_left):  # added one by one, as f_M would be: rounding keeps the order of two sums
            total = total + inside
        return bool((total / n_steps > threshold).any())

    def _erased(self, f_m: Tensor, inside: Tensor) -> Tensor:
        """Positions with a mean f_M above the threshold, the highest first, up to the largest share."""
        allowed = (self.repaint * inside.flatten(1).sum(dim=1).double()).long()
        order = f_m.flatten(1).argsort(dim=1, descending=True, stable=True)  # of equals the first come first
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        return (f_m > self.sampler.mask_threshold) & (rank < allowed[:, None]).view_as(f_m)


def make_repair(sampler: MaskedDDIM | MaskedDDPM, repaint: float) -> Repair:
    """The paper's repair, the steps of ``sampler``, where ``repaint`` is 0; else `Repainting`."""
    return sampler if repaint == 0 else Repainting(sampler, repaint)


def _repainted(unet: nn.Module, z: Tensor, erased: Tensor, schedule: NoiseSchedule, size: int) -> Tensor:
    """Latents whose erased positions the network predicts at t = T; only of samples that have some."""
    repainted, last = z.clone(), torch.full((size,), schedule.n_timesteps, device=z.device)
    for rows, n_valid in fixed_parts(erased.flatten(1).any(dim=1).nonzero()[:, 0], size):
        z0_hat, _ = unet(z[rows].masked_fill(erased[rows], 0.0), last)
        repainted[rows[:n_valid]] = torch.where(erased[rows], z0_hat.to(z.dtype), z[rows])[:n_valid]
    return repainted
