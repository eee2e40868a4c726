"""Models of format 1: the same content as it is written today."""

from __future__ import annotations

from typing import Any

TRAINER = {
    "max_epochs": 100,
    "max_steps": {"__float__": "inf"},
    "max_time": {"__float__": "inf"},
    "clock": "wall",
    "batch_size": "auto",
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "warmup_fraction": 0.05,
    "ema_decay": 0.995,
    "gradient_clip": 1.0,
    "precision": "auto",
    "validation_fraction": 0.0,
    "validate_every": "epoch",
    "patience": {"__float__": "inf"},
    "checkpoint_every_s": 300.0,
    "resume": "auto",
    "compile": False,
    "channels_last": False,
    "accumulate": 1,
    "activation_checkpointing": False,
}
"""What ``Trainer()`` was then. Today its parameters are None, and the stage that is trained decides."""

_PAPER = {
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
_OURS = _PAPER | {
    "n_steps": 5,
    "step_spacing": "trailing",
    "mask_threshold": 0.1,
    "repaint": 0.3,
    "reference": "reconstruction",
    "map_difference": "relative",
    "smoothing": "guided",
}
PRESETS = {
    "tiny": _OURS | {"n_steps": 2},
    "small": _OURS,
    "base": _OURS,
    "paper": _PAPER,
    "original": _PAPER
    | {"eta": 0.5, "reference": "reconstruction", "map_difference": "absolute", "gamma": 0.25},
}
"""What presets had for the parameters of the maps then; models of format 1 name theirs and do not hold it."""

NONE_MEANT = {"gradient_clip": {"__float__": "inf"}}
"""What None meant in a trainer's parameter whose default was something else."""


def from_format_1(config: dict) -> dict:
    """A ``config.json`` of format 1 in today's words.

    An autoencoder that several detectors share was a class of its own among the parameters. A trainer's None
    meant none. What a preset had for the parameters of the maps stood in madad, not in the model.

    Parameters
    ----------
    config : dict
        What ``config.json`` holds.
    """
    parameters = config["parameters"]
    shared = [name for name, value in parameters.items() if _is(value, "FrozenEstimator")]
    renewed = _renewed(config | {"parameters": parameters | dict.fromkeys(shared)})
    fitted = renewed["fitted"]
    if "preset_" in fitted:
        fitted = fitted | {"preset_values_": PRESETS[fitted["preset_"]]}
    return renewed | {"shared": shared, "fitted": fitted}


def _renewed(value: Any) -> Any:
    """Trainers wherever they stand, and those of autoencoders that had none of their own."""
    if isinstance(value, list):
        return [_renewed(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _renewed(item) for key, item in value.items()}
    if _is(value, "Trainer"):
        given = {name: field for name, field in value["fields"].items() if field is not None}
        open_ones = {name: (TRAINER | NONE_MEANT).get(name) for name in value["fields"] if name not in given}
        return value | {"fields": open_ones | given}
    if _is(value, "LatentAutoencoder") and value["fields"].get("trainer") is None:
        return value | {"fields": value["fields"] | {"trainer": {"__class__": "Trainer", "fields": TRAINER}}}
    return value


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, dict) and value.get("__class__") == kind and "fields" in value
