"""Diffusion in image space: noise a slice half way, denoise it, and look at what changed."""

from __future__ import annotations

from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, grey_closing, grey_dilation
from torch import Tensor, nn

from madad._runtime.random import generator_from
from madad._runtime.tensors import inference
from madad.base.slice_stack import SliceStack
from madad.baselines.base import UNetBaseline
from madad.baselines.simplex import simplex_noise
from madad.diffusion import NoiseSchedule
from madad.diffusion.sampler import ddim_step
from madad.training import Trainer

NOISES = ("gaussian", "simplex")
LEAST_TIMESTEPS = 21  # with fewer, the last beta of the linear schedule is 1 or more
GUIDANCE_SMOOTHING = 2 / 128  # of the difference before it guides, as a share of the slice's larger side
GUIDANCE_REACH = 13 / 128  # side of the squares by which it is closed and dilated


class PartialDiffusion(UNetBaseline):
    """AnoDDPM: a slice is noised to a middle time and denoised; what does not come back is anomalous.

    Parameters
    ----------
    denoiser, trainer, flip :
        As in `madad.baselines.denoising_autoencoder.DenoisingAutoencoder`.
    noise : {"gaussian", "simplex"}
        Kind of noise, in training and at test time. Octave simplex noise (`madad.baselines.simplex`) hides
        structures of many sizes, Gaussian noise fine ones only.
    n_timesteps : int
        Number of times in training, T in the paper; 21 or more.
    t_start : int
        Time that a test slice is noised to, 1..T: later ones take away larger anomalies, and more of what
        is healthy.
    n_steps : int
        Steps from there to 0, 1..t_start, evenly spaced; each is a pass through the U-Net.
    eta : float
        Noise of each step: 0 = deterministic DDIM, 1 = as noisy as DDPM. It is seeded, and of the kind
        ``noise``.
    smoothing_px, contamination, image_specificity, pixel_specificity, calibration_fraction, image_shape, \
intensity_range, batch_size, device, random_state, verbose :
        As in `madad.MaskedDiffusionAnomalyDetector`.

    Attributes
    ----------
    denoiser_, history_ :
        As in `madad.baselines.base.UNetBaseline`; the first output of the network is ``eps_hat``.
    n_timesteps_, noise_ :
        What the network was trained with, and goes on to be used with.
    offset_, map_threshold_, calibration_rows_, image_shape_, intensity_range_, n_features_in_ :
        As in `madad.MaskedDiffusionAnomalyDetector`.

    Notes
    -----
    With the linear schedule (`madad.diffusion.NoiseSchedule.linear`) and ``t`` drawn uniformly from 1..T, the
    loss of a slice ``x`` is ::

        || eps - eps_hat(x_t, t) ||^2        x_t = sqrt(ab_t) x + sqrt(1 - ab_t) eps

    At test time ``x_t`` is made at ``t_start``, all slices with the same ``eps``. A step goes from ``t`` to
    the time ``s`` before it by DDIM (Song et al., ICLR 2021) ::

        x0_hat = clip((x_t - sqrt(1 - ab_t) eps_hat(x_t, t)) / sqrt(ab_t), -1, 1)
        e = (x_t - sqrt(ab_t) x0_hat) / sqrt(1 - ab_t)
        sigma = eta sqrt((1 - ab_s) / (1 - ab_t)) sqrt(1 - ab_t / ab_s)
        x_s = sqrt(ab_s) x0_hat + sqrt(1 - ab_s - sigma^2) e + sigma eps'

    and the map is the mean over channels of ``|x - x_0| / 2``.

    The network has to let the noise of every pixel through: its first level should be wider than the 16
    pixels of a block, and that of ``"tiny"`` is not.

    Differs from the paper: a few of the ``t_start`` steps of DDPM, all of them with ``n_steps = t_start``;
    ``x0_hat`` is clipped, and is ``x`` outside the brain; the difference is absolute, not squared; the noise
    of a field has unit variance (see `madad.baselines.simplex.simplex_noise`); the U-Net is ours, on blocks
    of pixels.

    References
    ----------
    Wyatt, Leach, Schmon, Willcocks: AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models
    using Simplex Noise, CVPR Workshops 2022.

    Examples
    --------
    >>> from madad import Trainer
    >>> from madad.datasets import make_brain_slices
    >>> healthy = make_brain_slices(40, size=32, random_state=0)
    >>> baseline = PartialDiffusion(denoiser="tiny", trainer=Trainer(2), n_steps=2, random_state=0)
    >>> baseline.fit(healthy.images, groups=healthy.subjects).predict_maps(healthy.images[:2]).shape
    (2, 32, 32)
    """

    _training_parameters = ("n_timesteps", "noise")
    _map_parameters: ClassVar[tuple[str, ...]] = ("t_start", "n_steps", "eta")
    _saved_attributes = (*UNetBaseline._saved_attributes, "n_timesteps_", "noise_")

    def __init__(
        self,
        *,
        denoiser="small",
        trainer: Trainer | None = None,
        flip: bool = True,
        noise: str = "simplex",
        n_timesteps: int = 1000,
        t_start: int = 250,
        n_steps: int = 25,
        eta: float = 1.0,
        smoothing_px: float | None = None,
        contamination="auto",
        image_specificity: float = 0.95,
        pixel_specificity: float = 0.99,
        calibration_fraction: float = 0.15,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        batch_size: int | None = None,
        device="auto",
        random_state=None,
        verbose: bool = False,
    ):
        self.denoiser = denoiser
        self.trainer = trainer
        self.flip = flip
        self.noise = noise
        self.n_timesteps = n_timesteps
        self.t_start = t_start
        self.n_steps = n_steps
        self.eta = eta
        self.smoothing_px = smoothing_px
        self.contamination = contamination
        self.image_specificity = image_specificity
        self.pixel_specificity = pixel_specificity
        self.calibration_fraction = calibration_fraction
        self.image_shape = image_shape
        self.intensity_range = intensity_range
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {NOISES}, got {self.noise!r}. Use {NOISES[0]!r}.")
        if not isinstance(self.n_timesteps, Integral) or self.n_timesteps < LEAST_TIMESTEPS:
            raise ValueError(
                f"n_timesteps must be an integer of {LEAST_TIMESTEPS} or more, got {self.n_timesteps!r}. "
                f"The paper's is 1000."
            )
        is_fitted = self.__sklearn_is_fitted__()
        longest = self.n_timesteps_ if is_fitted else self.n_timesteps
        _check_count("t_start", self.t_start, longest, "n_timesteps", "The paper's is 250 of 1000.")
        _check_count("n_steps", self.n_steps, self.t_start, "t_start", "Take fewer steps.")
        if not isinstance(self.eta, Real) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in 0..1, got {self.eta!r}. Use 1 for DDPM.")

    def _train(self, stack: SliceStack, groups: np.ndarray | None, seed: int) -> None:
        super()._train(stack, groups, seed)
        self.n_timesteps_, self.noise_ = int(self.n_timesteps), self.noise

    def _loss(self, unet: nn.Module, x: Tensor, brain: Tensor, generator: torch.Generator) -> Tensor:
        schedule = NoiseSchedule.linear(self.n_timesteps)
        t = torch.randint(1, self.n_timesteps + 1, (len(x),), generator=generator).to(x.device)
        noise = _draw(self.noise, x.shape, generator).to(x.device)
        x_t = schedule.add_noise(x, noise, torch.ones_like(brain), t)
        return (unet(x_t, t)[0].float() - noise).square().mean()

    def _raw_maps(self, x: Tensor, brain: np.ndarray) -> np.ndarray:
        return _harmonic_mean(self._denoise(x, brain)[1])

    def _restored(self, x: Tensor, brain: np.ndarray) -> Tensor:
        return self._denoise(x, brain)[0]

    def _denoise(self, x: Tensor, brain: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """x_0, and the differences (looks, n, H, W) of the estimates that are looked at."""
        unet, generator = self.denoiser_.to(x.device), generator_from(self.map_seed_)
        inside = torch.from_numpy(brain)[:, None].to(x.device)
        schedule = NoiseSchedule(NoiseSchedule.linear(self.n_timesteps_).beta[1 : self.t_start + 1])
        times = schedule.timesteps(self.n_steps, "trailing")
        eps = _draw(self.noise_, (1, *x.shape[1:]), generator).to(x.device)
        looks, differences = self._looks(), []
        with inference(unet):
            x_t = _noised(x, eps, float(schedule.alpha_bar[-1]))
            for step, (t, t_before) in enumerate(zip(times, [*times[1:], 0], strict=True), start=1):
                ab, ab_before = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t_before])
                eps_hat = unet(x_t, torch.full((len(x),), t, device=x.device))[0].float()
                x0_hat = ((x_t - (1 - ab) ** 0.5 * eps_hat) / ab**0.5).clamp(-1.0, 1.0)
                x0_hat = torch.where(inside, x0_hat, x)
                if step in looks:
                    differences.append(_difference(x, x0_hat))
                if step in looks and t_before > 0:
                    m = torch.from_numpy(guidance(differences[-1]))[:, None].to(x)
                    x_t = _noised(m * x0_hat + (1 - m) * x, eps, ab_before)
                else:
                    x_t, sigma = ddim_step(x_t, x0_hat, ab, ab_before, self.eta)
                    if sigma > 0:
                        x_t = x_t + sigma * _draw(self.noise_, (1, *x.shape[1:]), generator).to(x.device)
        return x_t, np.stack(differences)

    def _looks(self) -> tuple[int, ...]:
        """Steps, counted from 1, whose estimate is compared with the slice; all but the last are guided."""
        return (self.n_steps,)


class ImplicitGuidanceDiffusion(PartialDiffusion):
    """THOR: as `PartialDiffusion`, but on its way back the slice is put back where it seems healthy.

    Training is that of `PartialDiffusion`: with the same trainer, whose ``checkpoint_dir`` is set, and the
    same ``random_state`` one run serves both.

    Parameters
    ----------
    denoiser, trainer, flip, noise, n_timesteps, t_start, n_steps, eta :
        As in `PartialDiffusion`.
    n_guidance : int
        How often the estimate is compared with the slice, 1..n_steps, at evenly spaced steps; the last
        comparison is at the last step and guides nothing. 1 = `PartialDiffusion`.
    smoothing_px, contamination, image_specificity, pixel_specificity, calibration_fraction, image_shape, \
intensity_range, batch_size, device, random_state, verbose :
        As in `madad.MaskedDiffusionAnomalyDetector`.

    Attributes
    ----------
    denoiser_, history_, offset_, map_threshold_, calibration_rows_, image_shape_, intensity_range_, \
n_features_in_ :
        As in `PartialDiffusion`.

    Notes
    -----
    At a guided step from ``t`` to the time ``s`` before it, the difference makes a mask ``m`` of the slice,
    and the step is replaced by ::

        d_t = mean over channels of |x - x0_hat| / 2
        m = (dilate(close(n)) + n) / 2        n = G * d_t / max(G * d_t)
        x_s = sqrt(ab_s) (m x0_hat + (1 - m) x) + sqrt(1 - ab_s) eps

    with the ``eps`` of the beginning, G a Gaussian of 2 px and closing and dilation by squares of 13 px on
    slices of 128 px, and in proportion on others. The map is the harmonic mean of the ``d_t``.

    Differs from the paper: its differences are multiplied with a smoothed perceptual one (LPIPS) and divided
    by the largest of the batch before they guide and are averaged; here the difference alone is smoothed
    where it guides, and averaged as it is, so that the maps of slices compare. The original code noises
    again to ``t``, not ``s``, and takes all steps of DDPM; from 1000 of them, guides at 700, 600, ... with
    Gaussian noise and every 50 with simplex noise. What `PartialDiffusion` says holds here too.

    References
    ----------
    Bercea, Wiestler, Rueckert, Schnabel: Diffusion Models with Implicit Guidance for Medical Anomaly
    Detection, MICCAI 2024, arXiv 2403.08464.

    Examples
    --------
    >>> from madad import Trainer
    >>> from madad.datasets import make_brain_slices
    >>> healthy = make_brain_slices(40, size=32, random_state=0)
    >>> baseline = ImplicitGuidanceDiffusion(denoiser="tiny", trainer=Trainer(2), n_steps=5, random_state=0)
    >>> baseline.fit(healthy.images, groups=healthy.subjects).predict_maps(healthy.images[:2]).shape
    (2, 32, 32)
    """

    _map_parameters = (*PartialDiffusion._map_parameters, "n_guidance")

    def __init__(
        self,
        *,
        denoiser="small",
        trainer: Trainer | None = None,
        flip: bool = True,
        noise: str = "simplex",
        n_timesteps: int = 1000,
        t_start: int = 250,
        n_steps: int = 25,
        n_guidance: int = 5,
        eta: float = 1.0,
        smoothing_px: float | None = None,
        contamination="auto",
        image_specificity: float = 0.95,
        pixel_specificity: float = 0.99,
        calibration_fraction: float = 0.15,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        batch_size: int | None = None,
        device="auto",
        random_state=None,
        verbose: bool = False,
    ):
        super().__init__(
            denoiser=denoiser,
            trainer=trainer,
            flip=flip,
            noise=noise,
            n_timesteps=n_timesteps,
            t_start=t_start,
            n_steps=n_steps,
            eta=eta,
            smoothing_px=smoothing_px,
            contamination=contamination,
            image_specificity=image_specificity,
            pixel_specificity=pixel_specificity,
            calibration_fraction=calibration_fraction,
            image_shape=image_shape,
            intensity_range=intensity_range,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            verbose=verbose,
        )
        self.n_guidance = n_guidance

    def _check_parameters(self) -> None:
        super()._check_parameters()
        _check_count("n_guidance", self.n_guidance, self.n_steps, "n_steps", "Compare less often.")

    def _looks(self) -> tuple[int, ...]:
        return tuple(-(-i * self.n_steps // self.n_guidance) for i in range(1, self.n_guidance + 1))


def guidance(difference: np.ndarray) -> np.ndarray:
    """Where the estimate is kept (1) and where the slice is put back (0).

    Parameters
    ----------
    difference : ndarray of shape (n, H, W), 0 or more
        Between the slices and what the network estimates; its scale does not matter.

    Returns
    -------
    ndarray of shape (n, H, W), float32 in 0..1
        See `ImplicitGuidanceDiffusion`; 0 for slices without any difference.
    """
    side = max(difference.shape[1:])
    sigma, reach = GUIDANCE_SMOOTHING * side, 1 + 2 * round(GUIDANCE_REACH * side / 2 - 0.5)
    smooth = gaussian_filter(difference, (0, sigma, sigma), mode="constant")
    largest = smooth.max(axis=(1, 2), keepdims=True)
    share = np.divide(smooth, largest, out=np.zeros_like(smooth), where=largest > 0)
    square = (1, reach, reach)
    region = grey_dilation(grey_closing(share, square), square)
    return ((region + share) / 2).clip(0.0, 1.0).astype(np.float32)


def _draw(noise: str, shape, generator: torch.Generator) -> Tensor:
    """Noise of unit variance, (n, C, H, W), of one of `NOISES`."""
    if noise == "gaussian":
        return torch.randn(tuple(shape), generator=generator)
    n, channels, height, width = shape
    return simplex_noise(n * channels, height, width, generator).view(n, channels, height, width)


def _noised(x: Tensor, eps: Tensor, ab: float) -> Tensor:
    return ab**0.5 * x + (1 - ab) ** 0.5 * eps


def _difference(x: Tensor, x0_hat: Tensor) -> np.ndarray:
    """Mean over channels of |x - x0_hat|, from network images to 0..1."""
    return ((x - x0_hat).abs() / 2).clamp(max=1.0).mean(dim=1).cpu().numpy()


def _harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis; 0 where any is 0."""
    if len(values) == 1:
        return values[0]
    with np.errstate(divide="ignore", over="ignore"):
        return len(values) / (1 / values).sum(axis=0)


def _check_count(name: str, value, largest: int, of: str, advice: str) -> None:
    if not isinstance(value, Integral) or not 1 <= int(value) <= largest:
        raise ValueError(f"{name} must be an integer in 1..{largest}, {of}, got {value!r}. {advice}")
