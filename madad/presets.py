"""Presets are data: for each name the value of every knob that the user left at None.

``"autoencoder_training"`` and ``"denoiser_training"`` are what the two stages' `madad.training.Trainer` has
where the user's has None. ``"autoencoder_time_share"`` is the first stage's share of the detector's
``max_time``; with 0.4 the maps were worse than with 0.1.
"""

from __future__ import annotations

import math
from dataclasses import replace

from madad.nn import UNET_SIZES

INFERENCE_KNOBS = (
    "n_steps",
    "eta",
    "step_spacing",
    "mask_threshold",
    "repaint",
    "anomaly_map",
    "reference",
    "map_difference",
    "gamma",
    "smoothing",
    "smoothing_px",
)

# The paper's choices; where it is silent the original code's (docs/method.md, "What the paper leaves open").
_PAPER = {
    "autoencoder": "kl-f8",
    "autoencoder_training": {"max_epochs": 100, "learning_rate": 1e-4},
    "autoencoder_time_share": 0.1,
    "denoiser": "L",
    "denoiser_training": {"max_epochs": 300, "batch_size": 96, "learning_rate": 5e-4, "ema_decay": 0.0},
    "corruption": "gaussian",
    "mask_shape": "patches",
    "mask_ratio": 0.4,
    "mask_patch_sizes": (1, 2, 4, 8),
    "mask_patch_probabilities": None,
    "brain_rule": "paper",
    "mask_loss": "bce",
    "mask_loss_weight": 0.001,
    "n_timesteps": 10,
    "n_steps": 10,
    "eta": 0.0,
    "step_spacing": "leading",
    "mask_threshold": 0.5,
    "repaint": 0.0,
    "anomaly_map": "image",
    "reference": "input",
    "map_difference": "squared",
    "gamma": 0.2,
    "smoothing": "gaussian",
    "smoothing_px": None,
}

# What the published code does instead (docs/method.md, "Where the code differs").
_ORIGINAL = _PAPER | {
    "denoiser": replace(UNET_SIZES["L"], dropout=0.4),
    "denoiser_training": {"max_epochs": 200, "batch_size": 96, "learning_rate": 4e-5, "ema_decay": 0.0},
    "mask_patch_probabilities": (0.2, 0.3, 0.3, 0.2),
    "brain_rule": "original",
    "mask_loss": "mse",
    "eta": 0.5,
    "reference": "reconstruction",
    "map_difference": "absolute",
    "gamma": 0.25,
}

# Ours: masks and fills that look more like disease, more weight on the mask head, repainting of what it
# flags, and networks that a CPU can train. benchmarks/README.md says on which subjects each was chosen.
_SMALL = _PAPER | {
    "autoencoder": "auto",
    "autoencoder_training": {"max_epochs": math.inf, "max_steps": 600, "learning_rate": 2e-3},
    "denoiser": "small",
    "denoiser_training": {
        "max_epochs": math.inf,
        "max_steps": 4500,
        "batch_size": 16,
        "learning_rate": 1e-3,
    },
    "corruption": "mixture",
    "mask_shape": "blobs",
    "mask_loss_weight": 0.1,
    "step_spacing": "trailing",
    "n_steps": 5,
    "mask_threshold": 0.1,
    "repaint": 0.3,
    "reference": "reconstruction",
    "map_difference": "relative",
    "gamma": 0.2,
    "smoothing": "guided",
}

_TINY = _SMALL | {
    "autoencoder": "tiny",
    "autoencoder_training": {"max_epochs": 2, "max_steps": 20},
    "denoiser": "tiny",
    "denoiser_training": {"max_epochs": 2, "max_steps": 20},
    "n_steps": 2,
}

PRESETS: dict[str, dict] = {
    "tiny": _TINY,
    "small": _SMALL,
    "original": _ORIGINAL,
    "paper": _PAPER,
}


def choose_preset(preset: str) -> str:
    """The preset's name; ``"auto"`` is ``"small"``.

    Raises
    ------
    ValueError
        If there is no preset of that name.
    """
    if preset == "auto":
        return "small"
    if preset not in PRESETS:
        raise ValueError(f"preset must be 'auto' or one of {sorted(PRESETS)}, got {preset!r}. Use 'auto'.")
    return preset
