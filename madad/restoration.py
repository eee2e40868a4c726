"""From slices to restored latents, to maps: what both prediction and calibration run through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from madad._random import generator_from
from madad._tensors import autocast, fixed_batches, fixed_parts, inference, to_network
from madad._validation import SliceStack
from madad.anomaly_map import (
    ANOMALY_MAPS,
    REFERENCES,
    finish_map,
    image_map,
    latent_map,
    mask_map,
    upsample_map,
)
from madad.diffusion import MaskedDDIM, NoiseSchedule

DECODED = ("nothing", "changed", "restored")
BYTES_AT_A_TIME = 2**24
"""Of activations while slices are repainted and decoded on a CPU: enough to keep its cores busy."""


class RestoredBatch(NamedTuple):
    """One batch of slices with all that a map is made of; images on the network's scale of -1..1."""

    brain: np.ndarray  # (n, H, W) bool
    x: np.ndarray  # (n, C, H, W)
    z: np.ndarray  # (n, c, h, w)
    z_restored: np.ndarray  # (n, c, h, w)
    noise_probability: np.ndarray  # (n_steps, n, 1, h, w)
    decoded: np.ndarray  # (m,): which of the n slices are decoded
    reconstruction: np.ndarray  # (m, C, H, W): D(z); nothing, (0,), where it was not asked for
    restored: np.ndarray  # (m, C, H, W): D(z_restored), or nothing


def restore_batches(
    autoencoder,
    denoiser: nn.Module,
    stack: SliceStack,
    sampler: MaskedDDIM,
    schedule: NoiseSchedule,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    decode: str = "changed",
    needs_probability: bool = True,
    precision: str = "float32",
) -> Iterator[RestoredBatch]:
    """Encode slices, repair their latents and, if asked to, decode them.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
        Fitted.
    denoiser : nn.Module
    stack : SliceStack
    sampler : MaskedDDIM
    schedule : NoiseSchedule
    batch_size : int
        Every forward pass has exactly this many slices (repainting and decoding: `few_at_a_time`), so that a
        slice's result is bitwise the same in any company.
    seed : int
        Of the sampler's noise, which is the same for every slice.
    device : torch.device
        Both networks are moved there.
    decode : {"nothing", "changed", "restored"}
        ``"changed"``: D(z) and D(z_restored) of the slices in which something was flagged; of the others both
        are the same. ``"restored"``: D(z_restored) of all.
    needs_probability : bool
        False = f_M is not needed for itself, and steps that cannot change the latents are left out.
    precision : {"float32", "bfloat16"}
        Of the networks; latents and images stay float32.
    """
    if decode not in DECODED:
        raise ValueError(f"decode must be one of {DECODED}, got {decode!r}. Use 'changed'.")
    autoencoder.network_.to(device)
    denoiser.to(device)
    needed = autoencoder.config_.bytes_per_slice(*stack.image_shape[1:])
    size = few_at_a_time(batch_size, device, needed)
    for index, n_valid in fixed_batches(len(stack), batch_size):
        brain = stack.brain(index)
        x = to_network(stack.images(index), device)
        with inference(autoencoder.network_, denoiser), autocast(device, precision):
            z = autoencoder.encode(autoencoder.pad(x))[0].float()
            restoration = sampler.restore(
                denoiser,
                z,
                schedule,
                generator_from(seed),
                brain_fraction=autoencoder.brain_fraction(brain, device),
                repaint_size=size,
                early_exit=not needs_probability,
            )
            chosen = restoration.flagged[:n_valid] & (decode == "changed") | (decode == "restored")
            rows = chosen.nonzero()[:, 0]
            restored = _decoded(autoencoder, restoration.z_restored, rows, size)
            reconstruction = _decoded(autoencoder, z, rows if decode == "changed" else rows[:0], size)
        yield RestoredBatch(
            brain[:n_valid, 0],
            _array(x[:n_valid]),
            _array(z[:n_valid]),
            _array(restoration.z_restored[:n_valid]),
            _array(restoration.noise_probability[:, :n_valid]),
            rows.cpu().numpy(),
            reconstruction,
            restored,
        )


def few_at_a_time(batch_size: int, device: torch.device, bytes_per_slice: int) -> int:
    """How many of the flagged slices are repainted and decoded at a time, padded up to this number.

    Where one slice keeps the device busy, more at a time would only add padding.
    """
    if device.type == "cpu":
        return max(1, min(batch_size, 2 ** (max(1, BYTES_AT_A_TIME // bytes_per_slice).bit_length() - 1)))
    return max(1, batch_size // 4)


def _decoded(autoencoder, z: Tensor, rows: Tensor, size: int) -> np.ndarray:
    """Images of some of a batch's latents, (len(rows), C, H, W); (0,) of none."""
    parts = fixed_parts(rows, size)
    images = [_array(autoencoder.decode(z[part])[:n_valid]) for part, n_valid in parts]
    return np.concatenate(images) if images else np.empty(0, np.float32)


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def maps_of(batch: RestoredBatch, knobs: dict, factor: int) -> np.ndarray:
    """The finished anomaly maps of a batch, (n, H, W) float32 in 0..1.

    Parameters
    ----------
    batch : RestoredBatch
        Decoded as `decoding_for` says.
    knobs : dict
        ``anomaly_map``, ``reference``, ``map_difference``, ``gamma``, ``smoothing`` and ``smoothing_px``.
    factor : int
        Pixels per latent position.
    """
    decoded, kind, (height, width) = decoding_for(knobs), knobs["anomaly_map"], batch.brain.shape[1:]
    rows = batch.decoded if kind == "image" else np.arange(len(batch.brain))
    if kind == "image":
        reference = batch.x[rows] if decoded == "restored" else batch.reconstruction
        raw = image_map(
            batch.restored.reshape(len(rows), *batch.x.shape[1:]),
            reference.reshape(len(rows), *batch.x.shape[1:]),
            gamma=knobs["gamma"],
            difference=knobs["map_difference"],
            brain_mask=batch.brain[rows],
        )
    elif kind == "latent":
        raw = upsample_map(latent_map(batch.z_restored, batch.z), factor, height, width)
    else:
        raw = upsample_map(mask_map(batch.noise_probability), factor, height, width)
    guides = (batch.x[rows] + 1) / 2 if knobs["smoothing"] == "guided" else None
    maps = np.zeros(batch.brain.shape, np.float32)  # what stays: slices without any difference
    maps[rows] = finish_map(raw, batch.brain[rows], knobs["smoothing_px"], guides)
    return maps


def decoding_for(knobs: dict) -> str:
    """Which images the maps need: ``decode`` of `restore_batches`."""
    kind, reference = knobs["anomaly_map"], knobs["reference"]
    if kind not in ANOMALY_MAPS:
        raise ValueError(f"anomaly_map must be one of {ANOMALY_MAPS}, got {kind!r}. Use 'image'.")
    if kind != "image":
        return "nothing"
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {REFERENCES}, got {reference!r}. Use 'reconstruction'.")
    return "changed" if reference == "reconstruction" else "restored"
