"""Models on disk: JSON for what they are, safetensors for what they learnt; written whole or not at all."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.base import BaseEstimator

from madad._runtime.distributed import leads
from madad._runtime.files import read_json, write_json

FORMAT = "madad"
FORMAT_VERSION = 1
CONFIG, CALIBRATION = "config.json", "calibration.json"
CARD, README = "card.json", "README.md"
_REMEDY = "Save the model again."

Tensors = dict[str, np.ndarray]


def write_model(
    path,
    config: dict,
    calibration: dict | None,
    tensors: Mapping[str, Tensors],
    *,
    card: dict | None = None,
    readme: str | None = None,
) -> None:
    """Write a model directory, of the processes of torch.distributed in that of rank 0 alone.

    Parameters
    ----------
    path : path-like
        A new directory, or one that holds a model already, which is replaced.
    config : dict
        What the model is, ready for JSON; the format's name and number are added.
    calibration : dict or None
        Thresholds, ready for JSON. None = a network alone has none, and no such file.
    tensors : dict of dict of ndarray
        One ``<name>.safetensors`` each.
    card : dict or None
        How its images were made, ready for JSON.
    readme : str or None
        What people read.

    Raises
    ------
    FileExistsError
        If ``path`` is a file, or a directory with anything but a model in it.

    Notes
    -----
    Everything is written into a temporary directory beside ``path`` and renamed: an interrupted call
    leaves what was there.
    """
    if not leads():
        return
    path = Path(path)
    refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        header = {"format": FORMAT, "format_version": FORMAT_VERSION}
        write_json(new / CONFIG, header | config)
        if calibration is not None:
            write_json(new / CALIBRATION, calibration)
        if card is not None:
            write_json(new / CARD, card)
        if readme is not None:
            (new / README).write_text(readme, encoding="utf-8")
        for name, arrays in tensors.items():
            contiguous = {key: np.asarray(value, order="C") for key, value in arrays.items()}
            save_file(contiguous, new / f"{name}.safetensors")
            shutil.copymode(new / CONFIG, new / f"{name}.safetensors")  # safetensors lets nobody else read it
        old = scratch / "old"
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """Raise FileExistsError if a model may not be written to ``path`` because something else is there."""
    if path.exists() and not _replaceable(path):
        raise FileExistsError(
            f"path must be new, empty or a madad model, got {path}, which holds something else. "
            f"Choose another directory."
        )


def read_model(path, names: tuple[str, ...]) -> tuple[dict, dict, dict[str, Tensors]]:
    """Read what `write_model` wrote: config, calibration and the named tensor files.

    Raises
    ------
    FileNotFoundError
        If there is no model at ``path``, or a file of it is missing.
    ValueError
        If a file is damaged, of a newer format, or no model of ours.
    """
    path = Path(path)
    config, calibration = read_config(path), read_json(path / CALIBRATION, _REMEDY)
    return config, calibration, {name: _read_tensors(path / f"{name}.safetensors") for name in names}


def read_config(path) -> dict:
    """Read what a model is. Parameters and errors as `read_model`; no other file is looked at."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"path must be a model directory with {CONFIG}, got {path}. Give what save() was given."
        )
    config = read_json(path / CONFIG, _REMEDY)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path / CONFIG} must describe a madad model, got format {config.get('format')!r}. "
            f"Give a directory that save() wrote; foreign weights are read by madad.pretrained.loading."
        )
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"format_version must be at most {FORMAT_VERSION}, got {version!r} in {path / CONFIG}. "
            f"Upgrade madad."
        )
    return config


def read_card(path) -> dict:
    """Read how a model's images were made. Errors as `read_model`."""
    return read_json(Path(path) / CARD, _REMEDY)


def to_json(value: Any) -> Any:
    """A parameter value as plain JSON; tuples and objects carry a tag.

    Raises
    ------
    TypeError
        If the value is of a kind that a file cannot hold.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"__tuple__": [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, BaseEstimator):
        fields = value.get_params(deep=False)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        raise TypeError(
            f"a saved parameter must be a number, text, tuple, list, estimator or dataclass, got {value!r}. "
            f"Pickle the estimator with joblib instead."
        )
    return {"__class__": type(value).__name__, "fields": to_json(fields)}


def from_json(value: Any, classes: dict[str, type]) -> Any:
    """What `to_json` was given; objects only of the classes allowed by name.

    Raises
    ------
    ValueError
        If an object's class is not among ``classes``.
    """
    if isinstance(value, list):
        return [from_json(item, classes) for item in value]
    if not isinstance(value, dict):
        return value
    if "__float__" in value:
        return float(value["__float__"])
    if "__tuple__" in value:
        return tuple(from_json(item, classes) for item in value["__tuple__"])
    if "__class__" in value:
        name = value["__class__"]
        if name not in classes:
            raise ValueError(
                f"classes in {CONFIG} must be among {sorted(classes)}, got {name!r}. The file is of a newer "
                f"version, or has an object of your own: pickle such an estimator with joblib."
            )
        return classes[name](**from_json(value["fields"], classes))
    return {key: from_json(item, classes) for key, item in value.items()}


def _replaceable(path: Path) -> bool:
    if not path.is_dir():
        return False
    entries = {entry.name for entry in path.iterdir()}
    if not entries:
        return True
    ours = {CONFIG, CALIBRATION, CARD, README}
    foreign = {name for name in entries - ours if not name.endswith(".safetensors")}
    try:
        return not foreign and read_json(path / CONFIG).get("format") == FORMAT
    except (FileNotFoundError, ValueError):
        return False


def _read_tensors(path: Path) -> Tensors:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must exist, got no such file. The model is incomplete: save it again."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be a safetensors file, got a damaged one ({error}). Save the model again."
        ) from error
