"""Masked diffusion: schedule, masks, what fills them, the loss, and the repair by steps or by repainting."""

from madad.diffusion.corruption import (
    CORRUPTIONS,
    Corruption,
    ErasedLatents,
    ForeignLatents,
    GaussianNoise,
    Mixture,
    SmoothOffset,
    teaches_repainting,
)
from madad.diffusion.masking import EitherMask, RandomBlobs, RandomPatches
from madad.diffusion.objective import MaskedDiffusionObjective, masked_diffusion_loss
from madad.diffusion.repainting import Repainting, make_repair
from madad.diffusion.sampler import MaskedDDIM, MaskedDDPM, Repair, Restoration
from madad.diffusion.schedule import NoiseSchedule

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "EitherMask",
    "ErasedLatents",
    "ForeignLatents",
    "GaussianNoise",
    "MaskedDDIM",
    "MaskedDDPM",
    "MaskedDiffusionObjective",
    "Mixture",
    "NoiseSchedule",
    "RandomBlobs",
    "RandomPatches",
    "Repainting",
    "Repair",
    "Restoration",
    "SmoothOffset",
    "teaches_repainting",
    "make_repair",
    "masked_diffusion_loss",
]
