"""Models of format 1: the same content as it is written today."""

from __future__ import annotations

from typing import Any


def from_format_1(config: dict) -> dict:
    """A ``config.json`` of format 1 in today's words.

    There, an autoencoder that several detectors share was a class of its own among the parameters.
    """
    parameters = config["parameters"]
    shared = [name for name, value in parameters.items() if _is_frozen(value)]
    return config | {"parameters": parameters | dict.fromkeys(shared), "shared": shared}


def _is_frozen(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__class__") == "FrozenEstimator"
