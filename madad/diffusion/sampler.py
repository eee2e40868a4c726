"""Repair a latent: both samplers move only the positions that the mask head flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from madad._runtime.tensors import fixed_parts
from madad.diffusion.schedule import NoiseSchedule


class Restoration(NamedTuple):
    """What a sampler gives back.

    Attributes
    ----------
    z_restored : Tensor of shape (batch, c, h, w)
    noise_probability : Tensor of shape (n_steps, batch, 1, h, w), in 0..1
        f_M at each step, in the order of the steps (t descending); of fewer steps after an early exit.
    flagged : Tensor of shape (batch,), bool
        Whether any position was moved; where False, ``z_restored`` equals the input.
    trajectory : Tensor of shape (n_steps + 1, batch, c, h, w) or None
        z_T, ..., z_0 on request; with ``repaint`` one more, the repainted latent.
    """

    z_restored: Tensor
    noise_probability: Tensor
    flagged: Tensor
    trajectory: Tensor | None


@dataclass(frozen=True)
class _MaskedSampler:
    """The loop that both samplers share; they differ in the step from t to the time before it."""

    n_steps: int = 10
    eta: float = 0.0
    mask_threshold: float = 0.5
    spacing: str = "leading"
    repaint: float = 0.0

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
        """Take ``z`` as z_T and repair what ``unet`` flags.

        Parameters
        ----------
        unet : callable (z_t, t) -> (z0_hat, noise_logit)
        z : Tensor of shape (batch, c, h, w)
            The latent of an image; no noise is added to it first.
        schedule : NoiseSchedule
        generator : torch.Generator on the CPU, optional
            Noise of the steps. One draw of shape (1, c, h, w) serves the whole batch, so that a slice's
            result depends neither on its batch nor on its place in it. None = seed 0.
        brain_fraction : Tensor of shape (batch, 1, h, w), optional
            Positions without any brain are never flagged.
        repaint_size : int or None
            Samples with something to repaint are repainted so many at a time, padded by repetition; None =
            together with all others.
        early_exit : bool
            Where repainting follows, leave out the steps after which no position of the batch can reach the
            threshold any more, whatever f_M says there. The restored latents are the same, bit by bit.
        return_trajectory : bool
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        times = schedule.timesteps(self.n_steps, self.spacing)
        z_t, probabilities, trajectory = z, [], [z]
        flagged = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        total = torch.zeros_like(z[:, :1])
        inside = torch.ones_like(total) if brain_fraction is None else brain_fraction > 0
        for t, t_before in zip(times, [*times[1:], 0], strict=True):
            z0_hat, noise_logit = unet(z_t, torch.full((len(z),), t, device=z.device))
            # in float64: the vectorised float32 sigmoid rounds by the place in the batch
            noise_probability = torch.sigmoid(noise_logit.double()).to(z.dtype)
            if brain_fraction is not None:
                noise_probability = noise_probability * inside
            noise_mask = noise_probability > self.mask_threshold  # B(f_M)
            flagged |= noise_mask.flatten(1).any(dim=1)
            noise = torch.randn((1, *z.shape[1:]), generator=generator).to(z)
            moved = self._step(schedule, z_t, z0_hat.to(z.dtype), t, t_before, noise)
            z_t = torch.where(noise_mask, moved, z_t)
            probabilities.append(noise_probability)
            total = total + noise_probability  # in one order for all batches
            if return_trajectory:
                trajectory.append(z_t)
            elif early_exit and not self._can_erase(total, len(probabilities), inside):
                return Restoration(z, torch.stack(probabilities), torch.zeros_like(flagged), None)
        if self.repaint > 0:
            erased = _highest(total / len(times), self.mask_threshold, inside, self.repaint)
            flagged = erased.flatten(1).any(dim=1)
            z_t = _repaint(unet, z, erased, schedule, repaint_size or len(z))
            trajectory.append(z_t)
        f_m = torch.stack(probabilities)
        return Restoration(z_t, f_m, flagged, torch.stack(trajectory) if return_trajectory else None)

    def _can_erase(self, total: Tensor, n_done: int, inside: Tensor) -> bool:
        """Whether the mean of f_M may still exceed the threshold anywhere: if it is 1 from now on."""
        n_left = self.n_steps - n_done
        if self.repaint == 0 or n_left / self.n_steps > self.mask_threshold:
            return True  # certain where there is brain, without a look at the values
        for _ in range(n_left):  # added one by one, as f_M would be: rounding keeps the order of two sums
            total = total + inside
        return bool((total / self.n_steps > self.mask_threshold).any())

    def _step(self, schedule, z_t: Tensor, z0_hat: Tensor, t: int, t_before: int, noise: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class MaskedDDIM(_MaskedSampler):
    """Masked DDIM (`docs/method.md`, "Masked DDIM"; Song et al., ICLR 2021).

    Parameters
    ----------
    n_steps : int
        Number of times visited, 1..T.
    eta : float
        0 = deterministic; the original code uses 0.5.
    mask_threshold : float
        Positions with f_M above it are moved.
    spacing : {"leading", "trailing"}
        See `NoiseSchedule.timesteps`.
    repaint : float
        Ours, above 0: the steps only find what is not normal. Positions whose mean f_M over the steps is over
        the threshold are then erased and predicted anew from what is around them, at most this share of the
        brain's positions, those with the highest; all others are left as they were. 0 = the paper's steps.

    Notes
    -----
    ``eps_hat = (z_t - sqrt(ab_t) z0_hat) / sqrt(1 - ab_t)``;
    ``sigma_t = eta sqrt((1 - ab_{t-1}) / (1 - ab_t)) sqrt(1 - ab_t / ab_{t-1})``;
    ``z_{t-1} = sqrt(ab_{t-1}) z0_hat + sqrt(1 - ab_{t-1} - sigma_t^2) eps_hat + sigma_t eps`` where flagged.
    As in the original code, a position flagged early but not later keeps a partly noised latent
    (`docs/method.md`, "Where the code differs", row 11).
    The steps can only shift tissue back by what the network takes for its corruption, and much of a lesion
    stays. Repainting takes away all of it: ``z_0 = B(mean f_M) f_z0((1 - B(mean f_M)) z_T, T) + (1 -
    B(mean f_M)) z_T``, where 0 is the mean of healthy latents. The network must have been trained with
    `madad.diffusion.ErasedLatents`. The largest share keeps something to paint from where a network flags
    all of a brain, one from another scanner for example.
    """

    def _step(self, schedule, z_t, z0_hat, t, t_before, noise):
        ab, ab_before = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t_before])
        sigma = self.eta * ((1 - ab_before) / (1 - ab)) ** 0.5 * (1 - ab / ab_before) ** 0.5
        eps_hat = (z_t - ab**0.5 * z0_hat) / (1 - ab) ** 0.5
        direction = max(1 - ab_before - sigma**2, 0.0) ** 0.5
        return ab_before**0.5 * z0_hat + direction * eps_hat + sigma * noise


@dataclass(frozen=True)
class MaskedDDPM(_MaskedSampler):
    """Masked ancestral sampling from the DDPM posterior (`docs/method.md`, "The DDPM posterior").

    Parameters
    ----------
    n_steps, mask_threshold, spacing, repaint :
        As in `MaskedDDIM`.
    eta : float
        Multiplies the posterior's standard deviation; 1 = the paper's variance beta_t, 0 = its mean.

    Notes
    -----
    The posterior mean is `posterior_mean`. Where times are skipped, ``alpha_t = ab_t / ab_before``. The
    last step adds no noise.
    """

    eta: float = 1.0

    def _step(self, schedule, z_t, z0_hat, t, t_before, noise):
        ab, ab_before = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t_before])
        beta = 1 - ab / ab_before
        spread = self.eta * beta**0.5 if t_before > 0 else 0.0
        return posterior_mean(z_t, z0_hat, ab, ab_before) + spread * noise


def _highest(f_m: Tensor, threshold: float, inside: Tensor, share: float) -> Tensor:
    """Positions above a threshold, and of each sample's no more than a share of those inside the brain."""
    allowed = (share * inside.flatten(1).sum(dim=1).double()).long()
    order = f_m.flatten(1).argsort(dim=1, descending=True, stable=True)  # of equal ones the first come first
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return (f_m > threshold) & (rank < allowed[:, None]).view_as(f_m)


def _repaint(unet: nn.Module, z: Tensor, erased: Tensor, schedule: NoiseSchedule, size: int) -> Tensor:
    """Erase positions and let the network predict them, at t = T; only of samples that have some."""
    repainted, last = z.clone(), torch.full((size,), schedule.n_timesteps, device=z.device)
    for rows, n_valid in fixed_parts(erased.flatten(1).any(dim=1).nonzero()[:, 0], size):
        z0_hat, _ = unet(z[rows].masked_fill(erased[rows], 0.0), last)
        repainted[rows[:n_valid]] = torch.where(erased[rows], z0_hat.to(z.dtype), z[rows])[:n_valid]
    return repainted


def posterior_mean(z_t: Tensor, z0_hat: Tensor, ab: float, ab_before: float) -> Tensor:
    """Mean of q(z_{t-1} | z_t, z0_hat).

    ``sqrt(ab_{t-1}) beta_t / (1 - ab_t) z0_hat + sqrt(alpha_t) (1 - ab_{t-1}) / (1 - ab_t) z_t``
    """
    alpha = ab / ab_before
    of_z0 = ab_before**0.5 * (1 - alpha) / (1 - ab)
    of_z_t = alpha**0.5 * (1 - ab_before) / (1 - ab)
    return of_z0 * z0_hat + of_z_t * z_t
