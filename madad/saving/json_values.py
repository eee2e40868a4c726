"""What parts say of themselves as JSON, and back. A file names classes; only those listed here are built.

Tuples, numbers that are not finite, and parts are objects with a tag, ``__tuple__``, ``__float__`` or
``__class__``; `madad._runtime.portable` says what a part is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from textwrap import shorten
from typing import Any

import numpy as np

# The module of each class that a file may name. None is imported before a file names it.
PARTS = {
    "AutoencoderConfig": "madad.nn.autoencoder",
    "ErasedLatents": "madad.diffusion.corruption",
    "ForeignLatents": "madad.diffusion.corruption",
    "GaussianNoise": "madad.diffusion.corruption",
    "LatentAutoencoder": "madad.stages.autoencoder",
    "Mixture": "madad.diffusion.corruption",
    "SliceAugmentation": "madad.stages.augmentation",
    "SmoothOffset": "madad.diffusion.corruption",
    "Trainer": "madad.training.trainer",
    "UNetConfig": "madad.nn.unet",
}

LONGEST_SHOWN = 300  # characters of a value in an error: a network's are thousands


def to_json(value: Any, name: str) -> Any:
    """A value as plain JSON.

    Parameters
    ----------
    value : object
        A number, text, tuple, list, dict or part, or None.
    name : str
        What an error calls it.

    Raises
    ------
    TypeError
        If `from_json` could not give it back: it, or something in it, is of another kind.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [to_json(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("__"):
                raise TypeError(
                    f"the keys of {name} must be texts that do not begin with __ to be saved, got {key!r}. "
                    f"Rename it."
                )
        return {key: to_json(item, _inside(name, key)) for key, item in value.items()}
    kind = type(value)
    if not is_listed(kind, PARTS):
        raise TypeError(
            f"{name} must be a number, text, tuple, list, dict or one of {list(PARTS)} to be saved, got "
            f"{shorten(repr(value), LONGEST_SHOWN)}. Use one of these, "
            f"None where that is possible, or keep the estimator with joblib."
        )
    return {"__class__": kind.__name__, "fields": to_json(value.to_config(), name)}


def from_json(value: Any) -> Any:
    """The value that `to_json` was given; parts only of the classes in `PARTS`.

    Raises
    ------
    ValueError
        If a part's class is not listed there.
    """
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__float__" in value:
        return float(value["__float__"])
    if "__tuple__" in value:
        return tuple(from_json(item) for item in value["__tuple__"])
    if "__class__" in value:
        name = value["__class__"]
        if name not in list(PARTS):
            raise ValueError(
                f"classes in config.json must be among {list(PARTS)}, got {name!r}. The file is of a newer "
                f"version, or has an object of your own: keep such an estimator with joblib."
            )
        return getattr(import_module(PARTS[name]), name).from_config(from_json(value["fields"]))
    return {key: from_json(item) for key, item in value.items()}


def is_listed(kind: type, modules: Mapping[str, str]) -> bool:
    """Whether ``kind`` is what its name stands for in ``modules``, and no subclass or namesake of it."""
    return modules.get(kind.__qualname__) == kind.__module__


def _inside(name: str, key: str) -> str:
    """What users call an entry: parameters are named without ``parameters``."""
    if key == "parameters":
        return name
    return f"{name}.{key}" if name else key
