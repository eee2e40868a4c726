"""A fitted detector, or a network alone, as the files that `madad.saving.model_folder` writes, and back."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

from madad.saving.format_1 import from_format_1
from madad.saving.json_values import from_json, is_listed, to_json
from madad.saving.model_card import ModelCard
from madad.saving.model_folder import (
    CONFIG,
    read_card,
    read_config,
    read_model,
    refuse_foreign,
    write_card,
    write_model,
)

HEALTHY = "healthy"
NETWORKS = {"AutoencoderKL": "madad.nn.autoencoder", "MaskedUNet": "madad.nn.unet"}
# Of directories with a network alone, what to do with them.
NETWORK_USES = {
    "AutoencoderKL": "autoencoder=LatentAutoencoder(init=path)",
    "MaskedUNet": "denoiser=madad.pretrained.load_unet(path)",
}


def save_detector(detector: Any, path, card: ModelCard | None = None) -> None:
    """Write a fitted detector and its card.

    Parameters
    ----------
    detector : AnomalyMapDetector
        A fitted one; its ``to_saved`` says what is written.
    path : path-like
        A new directory, an empty one, or one with a model already, which is replaced.
    card : ModelCard or None
        How its images were made. None = not known.

    Raises
    ------
    FileExistsError
        If something else is at ``path``.
    TypeError
        If the detector has something that `load_detector` could not rebuild; nothing is written then.
    """
    description, tensors = detector.to_saved()
    written = to_json(description, "")
    calibration = written.pop("calibration")
    card = ModelCard() if card is None else card
    if card.healthy:
        tensors = tensors | {HEALTHY: card.to_tensors()}
    readme = _readme(detector, path, card)
    config = {"class": type(detector).__name__} | written
    write_model(path, config, calibration, tensors, card=card.to_json(), readme=readme)


def save_card(detector: Any, path, card: ModelCard) -> None:
    """Write the card of a saved detector anew, its ``healthy`` excepted, which belong to the model.

    Parameters
    ----------
    detector : AnomalyMapDetector
        The one that was saved.
    path : path-like
        The directory that its ``save`` wrote.
    card : ModelCard
        How its images were made, and what was measured.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no model at ``path``.
    """
    write_card(path, card.to_json(), _readme(detector, path, card))


def load_detector(kind: Any, path) -> Any:
    """Read what `save_detector` wrote.

    Parameters
    ----------
    kind : type
        Class of the detector; a directory with another one is refused.
    path : path-like
        The directory that was written, of this format or an earlier one.

    Raises
    ------
    FileNotFoundError, ValueError
        If something is missing, damaged, of a newer format, or no such detector.
    """
    found = read_config(path).get("class")
    if found in list(NETWORK_USES):
        raise ValueError(
            f"{path} must hold a {kind.__name__}, got a network alone, {found!r}. Fit a detector with it: "
            f"{NETWORK_USES[found]}."
        )
    if found != kind.__name__:
        raise ValueError(f"{path} must hold a {kind.__name__}, got {found!r}. Load it as that.")
    config, calibration, tensors = read_model(path, kind.tensor_files())
    try:
        if config["format_version"] == 1:
            config = from_format_1(config)
        return kind.from_saved(from_json(config | {"calibration": calibration}), tensors)
    except (KeyError, TypeError, RuntimeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(
            f"{path} must hold the config and tensors that save() wrote, got parts that do not fit "
            f"({type(error).__name__}: {shorten(str(error), 400)}). Save the model again."
        ) from error


def load_card(path) -> ModelCard:
    """Read the card beside a saved detector.

    Parameters
    ----------
    path : path-like
        The directory that a detector's ``save`` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, as of models of earlier versions, or damaged.
    """
    content = read_card(path)
    has_healthy = (Path(path) / f"{HEALTHY}.safetensors").is_file()
    tensors = read_model(path, (HEALTHY,))[2][HEALTHY] if has_healthy else None
    return ModelCard.from_json(content, tensors)


def save_network(network: Any, path) -> None:
    """Write a network alone, for `madad.pretrained.load_autoencoder` or `madad.pretrained.load_unet`.

    Parameters
    ----------
    network : AutoencoderKL or MaskedUNet
        Its weights come back bit by bit.
    path : path-like
        A new directory, an empty one, or one with such a network already, which is replaced.

    Raises
    ------
    FileExistsError
        If something else is at ``path``, a detector too.
    TypeError
        If it is another network.
    """
    kind = type(network).__name__
    if not is_listed(type(network), NETWORKS):
        raise TypeError(f"network must be one of {sorted(NETWORK_USES)}, got {kind}. Save its state_dict.")
    check_network_path(path)
    description, tensors = network.to_saved()
    name, written = "denoiser", to_json(description, "network")
    if kind == "AutoencoderKL":
        name, written = "autoencoder", {"network": written}
    write_model(path, {"class": kind, name: written}, None, {name: tensors})


def check_network_path(path) -> None:
    """Raise FileExistsError if `save_network` may not write to ``path``."""
    path = Path(path)
    refuse_foreign(path)
    if (path / CONFIG).is_file() and (found := read_config(path).get("class")) not in list(NETWORK_USES):
        raise FileExistsError(
            f"path must be new, empty or hold a network alone, got {path} with a {found!r}. "
            f"Choose another directory."
        )


def _readme(detector: Any, path, card: ModelCard) -> str:
    return card.to_markdown(Path(path).name, _facts(detector))


def _facts(detector: Any) -> dict:
    """What a card says of the model itself."""
    names = ("preset_", "image_shape_", "intensity_range_", "map_threshold_", "offset_")
    known = {name.rstrip("_"): getattr(detector, name) for name in names if hasattr(detector, name)}
    return {"class": type(detector).__name__} | known
