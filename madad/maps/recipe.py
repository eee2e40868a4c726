"""Which map is made of restored slices: checked once, where the recipe is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from madad.maps.differences import (
    ANOMALY_MAPS,
    DIFFERENCES,
    REFERENCES,
    check_choice,
    check_gamma,
    image_map,
    latent_map,
    mask_map,
    upsample_map,
)
from madad.maps.smoothing import SMOOTHINGS, finish_map, smoothing_width


class RestoredBatch(NamedTuple):
    """One batch of slices with all that a map is made of; images on the network's scale of -1..1.

    Attributes
    ----------
    brain : ndarray of shape (n, H, W), bool
        True = brain, where maps are above 0.
    x : ndarray of shape (n, C, H, W)
        The slices as they came.
    z, z_restored : ndarray of shape (n, c, h, w)
        Their latents, and these repaired.
    noise_probability : ndarray of shape (n_steps, n, 1, h, w)
        f_M at each step.
    decoded : ndarray of int, (m,)
        Which of the n slices are decoded.
    reconstruction, restored : ndarray of shape (m, C, H, W)
        D(z) and D(z_restored) of these; nothing, (0,), where it was not asked for.
    """

    brain: np.ndarray
    x: np.ndarray
    z: np.ndarray
    z_restored: np.ndarray
    noise_probability: np.ndarray
    decoded: np.ndarray
    reconstruction: np.ndarray
    restored: np.ndarray


@dataclass(frozen=True)
class MapRecipe:
    """How an anomaly map is made of a restored slice.

    Parameters
    ----------
    anomaly_map : {"image", "latent", "mask"}
        Difference of images, difference of latents, or the mean of f_M over the steps.
    reference : {"reconstruction", "input"}
        What the restored image is compared with: D(E(x)) (the original code) or x (the paper).
    map_difference : {"absolute", "squared", "relative"}
        Kind of the difference of images; see `image_map`.
    gamma : float
        Differences of images are clipped at it, on the network's scale of -1..1; infinity = no clipping.
    smoothing : {"gaussian", "guided"}
        A Gaussian over the map, or the smaller of it and a guided filter; see `finish_map`.
    smoothing_px : float or None
        Standard deviation of the Gaussian in pixels; 0 = none, None = 5 px at 256, scaled to the slice's
        size.

    Raises
    ------
    ValueError
        If a choice is unknown, ``gamma`` is not positive, or ``smoothing_px`` is negative or not finite.
    """

    anomaly_map: str = "image"
    reference: str = "reconstruction"
    map_difference: str = "absolute"
    gamma: float = 0.2
    smoothing: str = "gaussian"
    smoothing_px: float | None = None

    def __post_init__(self):
        check_choice("anomaly_map", self.anomaly_map, ANOMALY_MAPS)
        check_choice("reference", self.reference, REFERENCES)
        check_choice("map_difference", self.map_difference, DIFFERENCES)
        check_choice("smoothing", self.smoothing, SMOOTHINGS)
        check_gamma(self.gamma)
        smoothing_width(self.smoothing_px, 1, 1)

    @property
    def decode(self) -> str:
        """Which images the map needs, as `madad.stages.restore_batches` takes it."""
        if self.anomaly_map != "image":
            return "nothing"
        return "changed" if self.reference == "reconstruction" else "restored"

    @property
    def needs_probability(self) -> bool:
        """Whether the map is made of f_M itself."""
        return self.anomaly_map == "mask"

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Names of the parameters that change nothing as the others are."""
        return () if self.anomaly_map == "image" else ("reference", "map_difference", "gamma")

    def maps_of(self, batch: RestoredBatch, factor: int) -> np.ndarray:
        """The finished anomaly maps of a batch, (n, H, W) float32 in 0..1.

        Parameters
        ----------
        batch : RestoredBatch
            Decoded as ``decode`` says.
        factor : int
            Pixels per latent position, along each axis.
        """
        rows = batch.decoded if self.anomaly_map == "image" else np.arange(len(batch.brain))
        guides = (batch.x[rows] + 1) / 2 if self.smoothing == "guided" else None
        maps = np.zeros(batch.brain.shape, np.float32)  # what stays: slices without any difference
        raw = self._raw_maps(batch, rows, factor)
        maps[rows] = finish_map(raw, batch.brain[rows], self.smoothing_px, guides)
        return maps

    def _raw_maps(self, batch: RestoredBatch, rows: np.ndarray, factor: int) -> np.ndarray:
        """Maps of some rows before they are smoothed, (len(rows), H, W)."""
        height, width = batch.brain.shape[1:]
        if self.anomaly_map == "latent":
            return upsample_map(latent_map(batch.z_restored, batch.z), factor, height, width)
        if self.anomaly_map == "mask":
            return upsample_map(mask_map(batch.noise_probability), factor, height, width)
        shape = (len(rows), *batch.x.shape[1:])  # of no rows too
        reference = batch.x[rows] if self.reference == "input" else batch.reconstruction
        return image_map(
            batch.restored.reshape(shape),
            reference.reshape(shape),
            gamma=self.gamma,
            difference=self.map_difference,
            brain_mask=batch.brain[rows],
        )
