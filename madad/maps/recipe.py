"""Which map is made of a restored batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from madad.maps.differences import ANOMALY_MAPS, REFERENCES, image_map, latent_map, mask_map, upsample_map
from madad.maps.smoothing import finish_map


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
