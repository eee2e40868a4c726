"""Models on disk: JSON for what they are, safetensors for what they learnt; written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from madad._runtime.distributed import is_first_process
from madad._runtime.files import read_json, write_json, write_text

FORMAT = "madad"
FORMAT_VERSION = 2
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
        What the model is, as values that JSON holds; the format's name and number are added.
    calibration : dict or None
        Thresholds, as values that JSON holds. None = a network alone has none, and no such file.
    tensors : dict of dict of ndarray
        Arrays by name, for one ``<name>.safetensors`` each.
    card : dict or None
        How its images were made, as values that JSON holds. None = no such file.
    readme : str or None
        What people read, in Markdown. None = no such file.

    Raises
    ------
    FileExistsError
        If ``path`` is a file, or a directory with anything but a model in it.

    Notes
    -----
    Everything is written into a temporary directory beside ``path`` and renamed: an interrupted call
    leaves what was there.
    """
    if not is_first_process():
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
        _replace(path, new, scratch / "old")
    finally:
        if path.exists() or not (scratch / "old").exists():
            shutil.rmtree(scratch, ignore_errors=True)


def _replace(path: Path, new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``path``, which goes to ``old``; whatever fails, one of them is left."""
    try:
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException as error:
        if old.exists() and not path.exists():
            try:
                old.rename(path)
            except OSError:
                error.add_note(f"The model that was in {path} is in {old} now. Move it back.")
        raise


def write_card(path, card: dict, readme: str) -> None:
    """Write anew how the images of the model at ``path`` were made, and touch nothing else of it.

    Parameters
    ----------
    path : path-like
        The directory of a model.
    card : dict
        As in `write_model`.
    readme : str
        As in `write_model`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no model at ``path``.
    """
    if not is_first_process():
        return
    read_config(path)
    write_json(Path(path) / CARD, card)
    write_text(Path(path) / README, readme)


def refuse_foreign(path: Path) -> None:
    """Raise FileExistsError if a model may not be written to ``path`` because something else is there."""
    if path.exists() and not _replaceable(path):
        raise FileExistsError(
            f"path must be new, empty or a madad model, got {path}, which holds something else. "
            f"Choose another directory."
        )


def read_model(path, names: tuple[str, ...]) -> tuple[dict, dict, dict[str, Tensors]]:
    """Read what `write_model` wrote.

    Parameters
    ----------
    path : path-like
        The directory of the model.
    names : tuple of str
        Which tensor files to read, without their suffix.

    Returns
    -------
    config, calibration : dict
        What was written, with the format's name and number.
    tensors : dict of dict of ndarray
        The arrays of each file.

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
    """Read what the model at ``path`` is, and look at no other file. Errors as `read_model`."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"path must be a model directory with {CONFIG}, got {path}. Give what save() was given."
        )
    config = read_json(path / CONFIG, _REMEDY)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path / CONFIG} must describe a madad model, got format {config.get('format')!r}. "
            f"Give a directory that save() wrote; foreign weights are read by madad.pretrained."
        )
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"format_version must be at most {FORMAT_VERSION}, got {version!r} in {path / CONFIG}. "
            f"Upgrade madad."
        )
    return config


def read_card(path) -> dict:
    """Read how the images of the model at ``path`` were made. Errors as `read_model`."""
    return read_json(Path(path) / CARD, _REMEDY)


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
