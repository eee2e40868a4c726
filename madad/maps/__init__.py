"""Restored images, latents and flags in, anomaly maps in 0..1 out; and what a map says of a slice."""

from madad.maps.differences import image_map, latent_map, mask_map, upsample_map
from madad.maps.pooling import healthy_threshold, pool_map
from madad.maps.recipe import MapRecipe, RestoredBatch
from madad.maps.smoothing import blur, finish_map, guided_filter

__all__ = [
    "MapRecipe",
    "RestoredBatch",
    "blur",
    "finish_map",
    "guided_filter",
    "healthy_threshold",
    "image_map",
    "latent_map",
    "mask_map",
    "pool_map",
    "upsample_map",
]
