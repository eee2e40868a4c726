"""Repair a latent step by step: both samplers move only the positions that the mask head flags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from madad.diffusion.schedule import NoiseSchedule, check_step_spacing


class Restoration(NamedTuple):
    """What a repair gives back.

    Attributes
    ----------
    z_restored : Tensor of shape (batch, c, h, w)
        The repaired latents, z_0.
    noise_probability : Tensor of shape (n_steps, batch, 1, h, w), in 0..1
        f_M at each step, in the order of the steps (t descending); of fewer steps after an early exit.
    flagged : Tensor of shape (batch,), bool
        Whether any position was moved; where False, ``z_restored`` equals the input.
    trajectory : Tensor of shape (n_steps + 1, batch, c, h, w) or None
        z_T, ..., z_0 on request; with repainting one more, the repainted latent.
    """

    z_restored: Tensor
    noise_probability: Tensor
    flagged: Tensor
    trajectory: Tensor | None


class Repair(Protocol):
    """How latents are repaired: a sampler's steps (the paper), or `madad.diffusion.Repainting`."""

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
            The denoiser, as `madad.nn.MaskedUNet` is called.
        z : Tensor of shape (batch, c, h, w)
            The latent of an image; no noise is added to it first.
        schedule : NoiseSchedule
            The one that the denoiser was trained with.
        generator : torch.Generator on the CPU, optional
            Source of the steps' noise. One draw of shape (1, c, h, w) serves the whole batch, so that a
            slice's result depends neither on its batch nor on its place in it. None = seed 0.
        brain_fraction : Tensor of shape (batch, 1, h, w), in 0..1, optional
            Share of brain in each position. Positions without any are never flagged.
        repaint_size : int or None
            Samples with something to repaint are repainted so many at a time, padded by repetition; None =
            together with all others. Steps alone have no use for it.
        early_exit : bool
            Where repainting follows, leave out the steps after which no position of the batch can reach the
            threshold any more, whatever f_M says there. The restored latents are the same, bit by bit.
        return_trajectory : bool
            Keep the latent after each step.
        """


class Step(NamedTuple):
    """One step of a sampler.

    Attributes
    ----------
    z_t : Tensor of shape (batch, c, h, w)
        The latents that it led to, z_{t-1}.
    noise_probability, noise_mask : Tensor of shape (batch, 1, h, w)
        The f_M and B(f_M) that led there.
    """

    z_t: Tensor
    noise_probability: Tensor
    noise_mask: Tensor


@dataclass(frozen=True)
class _MaskedSampler:
    """The loop that both samplers share; they differ in the step from t to the time before it."""

    n_steps: int = 10
    eta: float = 0.0
    mask_threshold: float = 0.5
    step_spacing: str = "leading"

    def __post_init__(self):
        if not (isinstance(self.n_steps, Integral) and self.n_steps >= 1):
            raise ValueError(f"n_steps must be an integer of 1 or more, got {self.n_steps!r}. Use 10.")
        if not (isinstance(self.eta, Real) and 0 <= float(self.eta) <= 1):
            raise ValueError(f"eta must lie in 0..1, got {self.eta!r}. 0 is deterministic.")
        if not (isinstance(self.mask_threshold, Real) and 0 <= float(self.mask_threshold) <= 1):
            raise ValueError(
                f"mask_threshold must lie in 0..1, got {self.mask_threshold!r}. The paper's is 0.5."
            )
        check_step_spacing(self.step_spacing)

    def steps(
        self,
        unet: nn.Module,
        z: Tensor,
        schedule: NoiseSchedule,
        generator: torch.Generator | None = None,
        brain_fraction: Tensor | None = None,
    ) -> Iterator[Step]:
        """Walk from z_T, the latent as it is, to z_0. Parameters as `Repair.restore`.

        Yields
        ------
        Step
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        inside = inside_brain(z, brain_fraction)
        times, z_t = schedule.timesteps(self.n_steps, self.step_spacing), z
        for t, t_before in zip(times, [*times[1:], 0], strict=True):
            z0_hat, noise_logit = unet(z_t, torch.full((len(z),), t, device=z.device))
            # in float64: the vectorised float32 sigmoid rounds by the place in the batch
            noise_probability = torch.sigmoid(noise_logit.double()).to(z.dtype) * inside  # f_M
            noise_mask = noise_probability > self.mask_threshold  # B(f_M)
            noise = torch.randn((1, *z.shape[1:]), generator=generator).to(z)
            mean, sigma = self.step(z_t, z0_hat.to(z.dtype), schedule, t, t_before)
            z_t = torch.where(noise_mask, mean + sigma * noise, z_t)
            yield Step(z_t, noise_probability, noise_mask)

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
        """Take ``z`` as z_T and move what ``unet`` flags, step by step; see `Repair.restore`."""
        steps = list(self.steps(unet, z, schedule, generator, brain_fraction))
        flagged = torch.stack([step.noise_mask.flatten(1).any(dim=1) for step in steps]).any(dim=0)
        trajectory = torch.stack([z, *(step.z_t for step in steps)]) if return_trajectory else None
        f_m = torch.stack([step.noise_probability for step in steps])
        return Restoration(steps[-1].z_t, f_m, flagged, trajectory)

    def step(
        self, z_t: Tensor, z0_hat: Tensor, schedule: NoiseSchedule, t: int, t_before: int
    ) -> tuple[Tensor, float]:
        """Mean and standard deviation of the latent at the time before t.

        Parameters
        ----------
        z_t, z0_hat : Tensor of shape (batch, c, h, w)
            The latents at t, and what the network takes for the clean ones.
        schedule : NoiseSchedule
            The one that the denoiser was trained with.
        t, t_before : int
            The time, 1..T, and the one that the step leads to, 0..t-1.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class MaskedDDIM(_MaskedSampler):
    """Masked DDIM (docs/method.md, "Masked DDIM"; Song et al., ICLR 2021).

    Parameters
    ----------
    n_steps : int
        Number of times visited, 1..T.
    eta : float
        Noise of each step, 0..1: 0 = deterministic, 1 = as noisy as DDPM; the original code uses 0.5.
    mask_threshold : float
        Positions with f_M above it are moved, 0..1.
    step_spacing : {"leading", "trailing"}
        Which times fewer than T steps visit; see `NoiseSchedule.timesteps`.

    Notes
    -----
    ``z_{t-1} = sqrt(ab_{t-1}) z0_hat + sqrt(1 - ab_{t-1} - sigma_t^2) eps_hat + sigma_t eps`` where flagged;
    see `ddim_step`. As in the original code, a position flagged early but not later keeps a partly noised
    latent (docs/method.md, "Where the code differs", row 11).
    """

    def step(self, z_t, z0_hat, schedule, t, t_before):
        """Mean and standard deviation of z_{t-1}; see `ddim_step`."""
        ab, ab_before = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t_before])
        return ddim_step(z_t, z0_hat, ab, ab_before, self.eta)


@dataclass(frozen=True)
class MaskedDDPM(_MaskedSampler):
    """Masked ancestral sampling from the DDPM posterior (docs/method.md, "Masked DDPM").

    Parameters
    ----------
    n_steps, mask_threshold, step_spacing :
        See `MaskedDDIM`.
    eta : float
        Multiplies the posterior's standard deviation; 1 = the paper's variance beta_t, 0 = its mean.

    Notes
    -----
    The posterior mean is `posterior_mean`. Where times are skipped, ``alpha_t = ab_t / ab_before``. The
    last step adds no noise.
    """

    eta: float = 1.0

    def step(self, z_t, z0_hat, schedule, t, t_before):
        """Mean and standard deviation of z_{t-1}; see `posterior_mean`."""
        ab, ab_before = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t_before])
        beta = 1 - ab / ab_before
        return posterior_mean(z_t, z0_hat, ab, ab_before), self.eta * beta**0.5 if t_before > 0 else 0.0


def ddim_step(z_t: Tensor, z0_hat: Tensor, ab: float, ab_before: float, eta: float) -> tuple[Tensor, float]:
    """One DDIM step: mean and standard deviation ``sigma_t`` of z_{t-1}.

    ``sqrt(ab_{t-1}) z0_hat + sqrt(1 - ab_{t-1} - sigma_t^2) eps_hat``, with
    ``eps_hat = (z_t - sqrt(ab_t) z0_hat) / sqrt(1 - ab_t)`` and
    ``sigma_t = eta sqrt((1 - ab_{t-1}) / (1 - ab_t)) sqrt(1 - ab_t / ab_{t-1})``.

    Parameters
    ----------
    z_t, z0_hat : Tensor of one shape
        Where the step starts from, and the clean latent (or image) that is predicted there.
    ab, ab_before : float
        alpha_bar at t and at the time before it, in 0..1.
    eta : float
        0 = no noise, 1 = as much as DDPM.
    """
    sigma = eta * ((1 - ab_before) / (1 - ab)) ** 0.5 * (1 - ab / ab_before) ** 0.5
    eps_hat = (z_t - ab**0.5 * z0_hat) / (1 - ab) ** 0.5
    direction = max(1 - ab_before - sigma**2, 0.0) ** 0.5
    return ab_before**0.5 * z0_hat + direction * eps_hat, sigma


def posterior_mean(z_t: Tensor, z0_hat: Tensor, ab: float, ab_before: float) -> Tensor:
    """Mean of q(z_{t-1} | z_t, z0_hat).

    ``sqrt(ab_{t-1}) beta_t / (1 - ab_t) z0_hat + sqrt(alpha_t) (1 - ab_{t-1}) / (1 - ab_t) z_t``

    Parameters
    ----------
    z_t, z0_hat, ab, ab_before :
        See `ddim_step`.
    """
    alpha = ab / ab_before
    of_z0 = ab_before**0.5 * (1 - alpha) / (1 - ab)
    of_z_t = alpha**0.5 * (1 - ab_before) / (1 - ab)
    return of_z0 * z0_hat + of_z_t * z_t


def inside_brain(z: Tensor, brain_fraction: Tensor | None) -> Tensor:
    """Positions that may be flagged, (batch, 1, h, w) bool: those with some brain, or all."""
    return torch.ones_like(z[:, :1], dtype=torch.bool) if brain_fraction is None else brain_fraction > 0
