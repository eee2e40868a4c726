"""The yardstick of `benchmarks.speed`: the published pipeline as written, with our networks.

Test slices are encoded, go through every step of the sampler and are decoded twice, whatever was flagged;
maps are made slice by slice. Training encodes its images at every step. All in float32, as plainly as it can
be said: this is also a second implementation that `madad` is compared with.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from madad import MaskedDiffusionAnomalyDetector
from madad.diffusion import NoiseSchedule
from madad.maps.differences import SPREAD_UNIT, SPREAD_WIDTH
from madad.maps.smoothing import GUIDE_VARIANCE, GUIDE_WIDTH, smoothing_width

PUBLISHED_BATCH = 16
"""What the published evaluation script loads at a time if it is not told otherwise."""


@torch.no_grad()
def published_maps(
    detector: MaskedDiffusionAnomalyDetector, images: np.ndarray, batch_size: int = 1
) -> np.ndarray:
    """Image maps of slices (n, H, W) in 0..1, brain where they are above 0; (n, H, W).

    Parameters
    ----------
    detector : MaskedDiffusionAnomalyDetector
        Fitted; its ``reference`` must be ``"reconstruction"``.
    images : ndarray of shape (n, H, W), float32 in 0..1
    batch_size : int
        1 = slice by slice.
    """
    knobs, autoencoder, unet = detector._map_settings(), detector.autoencoder_, detector.denoiser_
    device = autoencoder.to_device()
    unet.to(device).eval()
    maps = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size, None]
        x = 2 * torch.from_numpy(part).to(device) - 1
        z, _ = autoencoder.encode(autoencoder.pad(x))
        inside = autoencoder.brain_fraction(part > 0, device) > 0
        z_restored = _restored(detector, knobs, z, inside)
        pairs = zip(autoencoder.decode(z_restored), autoencoder.decode(z), x, strict=True)
        maps += [_map(*(image.cpu().numpy()[0] for image in images), knobs) for images in pairs]
    return np.stack(maps)


def _restored(detector, knobs: dict, z: Tensor, inside: Tensor) -> Tensor:
    schedule, unet = NoiseSchedule.cosine(detector.n_timesteps_), detector.denoiser_
    generator = torch.Generator().manual_seed(detector.sampler_seed_)
    times = schedule.timesteps(knobs["n_steps"], knobs["step_spacing"])
    z_t, probabilities = z, []
    for t, before in zip(times, [*times[1:], 0], strict=True):
        z0_hat, logit = unet(z_t, torch.full((len(z),), t, device=z.device))
        f_m = torch.sigmoid(logit.double()).float() * inside
        ab, ab_before = schedule.alpha_bar[t], schedule.alpha_bar[before]
        sigma = knobs["eta"] * ((1 - ab_before) / (1 - ab) * (1 - ab / ab_before)).sqrt()
        eps_hat = (z_t - ab.sqrt() * z0_hat) / (1 - ab).sqrt()
        noise = torch.randn((1, *z.shape[1:]), generator=generator).to(z)
        moved = (
            ab_before.sqrt() * z0_hat
            + (1 - ab_before - sigma**2).clamp_min(0).sqrt() * eps_hat
            + sigma * noise
        )
        z_t = torch.where(f_m > knobs["mask_threshold"], moved, z_t)
        probabilities.append(f_m)
    if knobs["repaint"] == 0:
        return z_t
    mean = torch.stack(probabilities).mean(dim=0)
    erased = mean > knobs["mask_threshold"]
    for i in range(len(z)):  # no more than a share of each brain, what is flagged most
        allowed = int(knobs["repaint"] * int(inside[i].sum()))
        order = mean[i].flatten().argsort(descending=True, stable=True)
        erased[i].view(-1)[order[allowed:]] = False
    z0_hat, _ = unet(
        torch.where(erased, 0.0, z), torch.full((len(z),), schedule.n_timesteps, device=z.device)
    )
    return torch.where(erased, z0_hat, z)


def _map(restored: np.ndarray, reconstruction: np.ndarray, x: np.ndarray, knobs: dict) -> np.ndarray:
    """The map of one slice, all (H, W) on the network's scale of -1..1."""
    brain = x > -1

    def blurred(values: np.ndarray, width: float) -> np.ndarray:
        return gaussian_filter(values, width, mode="constant")

    difference = np.abs(restored - reconstruction)
    if knobs["map_difference"] == "relative":
        width = SPREAD_WIDTH * max(x.shape)
        share = np.maximum(blurred(brain.astype(np.float32), width), 1e-3)
        mean = blurred(restored * brain, width) / share
        spread = np.sqrt(np.maximum(blurred(restored**2 * brain, width) / share - mean**2, 0))
        difference = difference / (1 + spread / SPREAD_UNIT)
    clipped = np.minimum(difference, knobs["gamma"]) / knobs["gamma"] * brain
    sigma = smoothing_width(knobs["smoothing_px"], *x.shape)
    smooth = blurred(clipped, sigma)
    if knobs["smoothing"] == "guided":
        guide, width = (x + 1) / 2 * brain, GUIDE_WIDTH * sigma
        mean_guide, mean = blurred(guide, width), blurred(clipped, width)
        slope = blurred(guide * clipped, width) - mean_guide * mean
        slope = slope / (np.maximum(blurred(guide**2, width) - mean_guide**2, 0) + GUIDE_VARIANCE)
        guided = blurred(slope, width) * guide + blurred(mean - slope * mean_guide, width)
        smooth = np.minimum(smooth, guided)
    return np.clip(smooth, 0, 1) * brain


def published_training(
    detector: MaskedDiffusionAnomalyDetector, images: np.ndarray, *, batch_size: int, n_steps: int
) -> list[float]:
    """Steps of the second stage that encode their images anew; the loss of each, as the script prints it.

    Parameters
    ----------
    detector : MaskedDiffusionAnomalyDetector
        Fitted; its denoiser is trained on, in place.
    images : ndarray of shape (n, H, W), float32 in 0..1
    batch_size, n_steps : int
    """
    autoencoder, unet = detector.autoencoder_, detector.denoiser_
    device = autoencoder.to_device()
    unet.to(device).train()
    objective = detector._objective()
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(n_steps):
        part = images[torch.randint(len(images), (batch_size,), generator=generator).numpy(), None]
        x = 2 * torch.from_numpy(part).to(device) - 1
        with torch.no_grad():
            mean, logvar = autoencoder.encode(autoencoder.pad(x))
        z0 = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        loss, _ = objective(unet, z0, autoencoder.brain_fraction(part > 0, device), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    unet.eval()
    return losses
