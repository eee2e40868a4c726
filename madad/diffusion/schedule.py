"""How much of the clean latent is left at each time."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

MAX_BETA = 0.999
STEP_SPACINGS = ("leading", "trailing")


class NoiseSchedule:
    """Variances of the forward process for t = 1..T, with ``alpha_bar[0] = 1`` for the clean latent.

    Parameters
    ----------
    beta : sequence of float
        beta_1..beta_T, each in (0, 1).

    Attributes
    ----------
    n_timesteps : int
        Number of times, T in the paper.
    beta, alpha, alpha_bar : Tensor of shape (T + 1,), float64
        Indexed by t; ``beta[0] = 0`` and ``alpha[0] = alpha_bar[0] = 1``, so that the last step needs no
        special case. ``alpha = 1 - beta``, ``alpha_bar[t] = prod(alpha[:t + 1])``.

    Raises
    ------
    ValueError
        If any beta leaves (0, 1): a schedule meant for 1000 steps and scaled to 10 does.
    """

    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) == 0 or not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(
                f"beta must hold at least one value and stay inside (0, 1), got {beta.tolist()}. "
                f"Use NoiseSchedule.cosine(n_timesteps)."
            )
        self.n_timesteps = len(beta)
        self.beta = torch.cat([beta.new_zeros(1), beta])
        self.alpha = 1.0 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)

    @classmethod
    def cosine(cls, n_timesteps: int = 10) -> NoiseSchedule:
        """Nichol & Dhariwal (ICML 2021), the original's choice: alpha_bar falls as a squared cosine.

        ``beta_t = min(1 - g(t / T) / g((t - 1) / T), 0.999)``, ``g(u) = cos((u + 0.008) / 1.008 pi / 2)^2``,
        where T is ``n_timesteps``, 1 or more.
        """
        _check_n_timesteps(n_timesteps)

        def remaining(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        T = n_timesteps
        return cls([min(1 - remaining(t / T) / remaining((t - 1) / T), MAX_BETA) for t in range(1, T + 1)])

    @classmethod
    def linear(cls, n_timesteps: int = 1000, first: float | None = None, last: float | None = None):
        """Ho et al. (NeurIPS 2020): beta from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T for other T.

        Parameters
        ----------
        n_timesteps : int
            Number of times, T in the paper.
        first, last : float or None
            beta_1 and beta_T, between which beta is linear. None = those above, scaled.

        Raises
        ------
        ValueError
            Where the scaling pushes beta out of (0, 1), that is for T of 20 and below.
        """
        _check_n_timesteps(n_timesteps)
        scale = 1000 / n_timesteps
        first = scale * 1e-4 if first is None else first
        last = scale * 0.02 if last is None else last
        return cls(torch.linspace(first, last, n_timesteps, dtype=torch.float64))

    def timesteps(self, n_steps: int, step_spacing: str = "leading") -> list[int]:
        """The times that a sampler of ``n_steps`` steps visits, descending.

        A ``step_spacing`` of ``"leading"`` is the original's choice (T = 10, five steps: 9 7 5 3 1);
        ``"trailing"`` starts at T (10 8 6 4 2), as taking the test latent for z_T suggests.
        """
        T = self.n_timesteps
        if not 1 <= n_steps <= T:
            raise ValueError(
                f"n_steps must lie in 1..{T}, the number of timesteps, got {n_steps}. Take fewer steps."
            )
        check_step_spacing(step_spacing)
        if step_spacing == "leading":
            return [1 + i * T // n_steps for i in reversed(range(n_steps))]
        return [-(-i * T // n_steps) for i in range(n_steps, 0, -1)]

    def add_noise(self, z0: Tensor, fill: Tensor, noise_mask: Tensor, t: Tensor) -> Tensor:
        """The masked forward process: docs/method.md, "The masked forward process".

        ``z_t = M (sqrt(ab_t) z0 + sqrt(1 - ab_t) fill) + (1 - M) z0``; with Gaussian ``fill`` it is the
        paper's.

        Parameters
        ----------
        z0, fill : Tensor of shape (batch, c, h, w)
            Clean latents, and what the masked positions are mixed with.
        noise_mask : Tensor of shape (batch, 1, h, w)
            1 = noised, 0 = kept as it is.
        t : Tensor of shape (batch,), integers in 1..T
            Time of each sample; the later, the less is left of ``z0``.
        """
        ab = self.alpha_bar.to(z0.device)[t].to(z0.dtype)[:, None, None, None]
        return torch.where(noise_mask.bool(), ab.sqrt() * z0 + (1 - ab).sqrt() * fill, z0)


def _check_n_timesteps(n_timesteps: int) -> None:
    if not (isinstance(n_timesteps, numbers.Integral) and n_timesteps >= 1):
        raise ValueError(f"n_timesteps must be a positive integer, got {n_timesteps!r}. The paper's is 10.")


def check_step_spacing(step_spacing: str) -> None:
    """Raise ValueError for a spacing that `NoiseSchedule.timesteps` does not know."""
    if step_spacing not in STEP_SPACINGS:
        raise ValueError(
            f"step_spacing must be 'leading' or 'trailing', got {step_spacing!r}. Use 'leading'."
        )
