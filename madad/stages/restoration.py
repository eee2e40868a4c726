"""From slices to restored latents and images: what both prediction and calibration run through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from madad._runtime.random import generator_from
from madad._runtime.tensors import autocast, fixed_parts, inference
from madad.base.network_batches import network_batches
from madad.base.slice_stack import SliceStack
from madad.diffusion import NoiseSchedule, Repair
from madad.maps.differences import check_choice
from madad.maps.recipe import RestoredBatch

DECODED = ("changed", "restored", "nothing")
REPAIR_BYTES_ON_CPU = 2**24
"""Of activations while slices are repainted and decoded on a CPU: enough to keep its cores busy."""


def restore_batches(
    autoencoder,
    denoiser: nn.Module,
    stack: SliceStack,
    repair: Repair,
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
        The first stage, fitted.
    denoiser : nn.Module
        The second stage's network, trained.
    stack : SliceStack
        Slices to be repaired.
    repair : Repair
        A sampler, or `madad.diffusion.Repainting`.
    schedule : NoiseSchedule
        The one that the denoiser was trained with.
    batch_size : int
        Every forward pass has exactly this many slices (repainting and decoding: `repair_batch_size`), so
        that a slice's result is bitwise the same in any company.
    seed : int
        Seed of the sampler's noise, which is the same for every slice.
    device : torch.device
        Both networks are moved there.
    decode : {"changed", "restored", "nothing"}
        ``"changed"``: D(z) and D(z_restored) of the slices in which something was flagged; of the others both
        are the same. ``"restored"``: D(z_restored) of all.
    needs_probability : bool
        False = f_M is not needed for itself, and steps that cannot change the latents are left out.
    precision : {"float32", "bfloat16"}
        Arithmetic of the networks; latents and images stay float32.

    Yields
    ------
    RestoredBatch
    """
    check_choice("decode", decode, DECODED)
    autoencoder.network_.to(device)
    denoiser.to(device)
    size = repair_batch_size(batch_size, device, autoencoder.config_.bytes_per_slice(*stack.image_shape[1:]))
    for _, x, brain, n_valid in network_batches(stack, batch_size, device):
        with inference(autoencoder.network_, denoiser), autocast(device, precision):
            z = autoencoder.encode(autoencoder.pad(x))[0].float()
            restoration = repair.restore(
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


def repair_batch_size(batch_size: int, device: torch.device, bytes_per_slice: int) -> int:
    """How many of the flagged slices are repainted and decoded at a time, padded up to this number.

    Where one slice keeps the device busy, more at a time would only add padding.

    Parameters
    ----------
    batch_size : int
        Slices that are encoded at a time.
    device : torch.device
        Where the networks run.
    bytes_per_slice : int
        Memory that a network needs for each slice.
    """
    if device.type == "cpu":
        fitting = max(1, REPAIR_BYTES_ON_CPU // bytes_per_slice)
        return max(1, min(batch_size, 2 ** (fitting.bit_length() - 1)))
    return max(1, batch_size // 4)


def _decoded(autoencoder, z: Tensor, rows: Tensor, size: int) -> np.ndarray:
    """Images of some of a batch's latents, (len(rows), C, H, W); (0,) of none."""
    parts = fixed_parts(rows, size)
    images = [_array(autoencoder.decode(z[part])[:n_valid]) for part, n_valid in parts]
    return np.concatenate(images) if images else np.empty(0, np.float32)


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
