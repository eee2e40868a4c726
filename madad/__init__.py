"""Masked latent diffusion for unsupervised anomaly detection in brain MRI."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from madad._runtime.version import __version__

if TYPE_CHECKING:
    from madad.detector import MaskedDiffusionAnomalyDetector
    from madad.stages import LatentAutoencoder, SliceAugmentation
    from madad.training import Trainer
    from madad.volumes import VolumeModel

__all__ = [
    "LatentAutoencoder",
    "MaskedDiffusionAnomalyDetector",
    "SliceAugmentation",
    "Trainer",
    "VolumeModel",
    "__version__",
]

# Loaded when they are asked for (PEP 562), so that one room does not wait for all the others.
_HOMES = {
    "LatentAutoencoder": "madad.stages",
    "MaskedDiffusionAnomalyDetector": "madad.detector",
    "SliceAugmentation": "madad.stages",
    "Trainer": "madad.training",
    "VolumeModel": "madad.volumes",
}
_ROOMS = (
    *("base", "baselines", "datasets", "detector", "diffusion", "maps", "metrics", "mri", "nn", "plotting"),
    *("presets", "pretrained", "saving", "stages", "testing", "training", "volumes"),
)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"madad.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
