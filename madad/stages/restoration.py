"""From slices to restored latents, to maps: what both prediction and calibration run through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from madad._runtime.random import generator_from
from madad._runtime.tensors import autocast, fixed_batches, fixed_parts, inference, to_network
from madad.base.slice_stack import SliceStack
from madad.diffusion import MaskedDDIM, NoiseSchedule
from madad.maps.recipe import RestoredBatch

DECODED = ("nothing", "changed", "restored")
BYTES_AT_A_TIME = 2**24
"""Of activations while slices are repainted and decoded on a CPU: enough to keep its cores busy."""


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
