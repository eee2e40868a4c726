"""A fitted detector as the parts that `madad.saving.model_folder` writes, and back."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from sklearn.frozen import FrozenEstimator

from madad._runtime.random import isolated_seed
from madad._runtime.tensors import state_from_numpy, state_to_numpy
from madad.diffusion import ErasedLatents, ForeignLatents, GaussianNoise, Mixture, SmoothOffset
from madad.nn import AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig
from madad.saving.format_1 import from_format_1
from madad.saving.model_card import ModelCard
from madad.saving.model_folder import (
    CONFIG,
    from_json,
    read_card,
    read_config,
    read_model,
    refuse_foreign,
    to_json,
    write_model,
)
from madad.stages.augmentation import SliceAugmentation
from madad.stages.autoencoder import LATENT_STATISTICS, LatentAutoencoder
from madad.training import Trainer

FITTED_AUTOENCODER = ("n_features_in_", "image_shape_", "intensity_range_", "history_")
HEALTHY = "healthy"
CALIBRATED = ("offset_", "map_threshold_", "calibrated_with_")
NOT_SAVED = {"memory": None, "device": "auto", "verbose": False}
SAVED_CLASSES: dict[str, type] = {
    allowed.__name__: allowed
    for allowed in (
        LatentAutoencoder,
        Trainer,
        SliceAugmentation,
        AutoencoderConfig,
        UNetConfig,
        GaussianNoise,
        ErasedLatents,
        ForeignLatents,
        SmoothOffset,
        Mixture,
    )
}
SAVED_CLASSES["FrozenEstimator"] = FrozenEstimator
# Of directories with a network alone, what to do with them.
NETWORK_USES = {
    "AutoencoderKL": "autoencoder=LatentAutoencoder(init=path)",
    "MaskedUNet": "denoiser=madad.pretrained.loading.load_unet(path)",
}


def save_detector(detector: Any, path, card: ModelCard | None = None) -> None:
    """Write a fitted `madad.base.map_detector.AnomalyMapDetector` and its card; see its ``save``."""
    parts = {
        name: _describe(name.rstrip("_"), getattr(detector, name), kind)
        for name, kind in detector._saved_parts.items()
    }
    config = {
        "class": type(detector).__name__,
        "parameters": to_json(_portable_parameters(detector)),
        "fitted": {name: to_json(getattr(detector, name)) for name in detector._saved_attributes},
    }
    config |= {name.rstrip("_"): description for name, (description, _) in parts.items()}
    calibration = {name: to_json(getattr(detector, name)) for name in CALIBRATED}
    tensors = {name.rstrip("_"): arrays for name, (_, arrays) in parts.items()}
    card = ModelCard() if card is None else card
    if card.healthy:
        tensors[HEALTHY] = card.to_tensors()
    readme = card.to_markdown(Path(path).name, _facts(detector))
    write_model(path, config, calibration, tensors, card=card.to_json(), readme=readme)


def load_card(path) -> ModelCard:
    """Read the card beside a saved detector.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, as of models of earlier versions, or damaged.
    """
    content = read_card(path)
    has_healthy = (Path(path) / f"{HEALTHY}.safetensors").is_file()
    tensors = read_model(path, (HEALTHY,))[2][HEALTHY] if has_healthy else None
    return ModelCard.from_json(content, tensors)


def _facts(detector: Any) -> dict:
    """What a card says of the model itself."""
    names = ("preset_", "image_shape_", "intensity_range_", "map_threshold_", "offset_")
    known = {name.rstrip("_"): getattr(detector, name) for name in names if hasattr(detector, name)}
    return {"class": type(detector).__name__} | known


def load_detector(cls: Any, path) -> Any:
    """Read what `save_detector` wrote; see the detector's ``load``."""
    found = read_config(path).get("class")
    if found in list(NETWORK_USES):
        raise ValueError(
            f"{path} must hold a {cls.__name__}, got a network alone, {found!r}. Fit a detector with it: "
            f"{NETWORK_USES[found]}."
        )
    if found != cls.__name__:
        raise ValueError(f"{path} must hold a {cls.__name__}, got {found!r}. Load it as that.")
    config, calibration, tensors = read_model(path, tuple(name.rstrip("_") for name in cls._saved_parts))
    if config["format_version"] == 1:
        config = from_format_1(config)
    try:
        with isolated_seed(0):  # building a network draws weights
            return _from_parts(cls, config, calibration, tensors)
    except (KeyError, TypeError, RuntimeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(
            f"{path} must hold the config and tensors that save() wrote, got parts that do not fit "
            f"({type(error).__name__}: {shorten(str(error), 400)}). Save the model again."
        ) from error


def save_network(network: AutoencoderKL | MaskedUNet, path) -> None:
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
    if type(network) not in (AutoencoderKL, MaskedUNet):
        raise TypeError(f"network must be one of {sorted(NETWORK_USES)}, got {kind}. Save its state_dict.")
    check_network_path(path)
    name, description = "denoiser", to_json(network.config)
    if isinstance(network, AutoencoderKL):
        name, description = "autoencoder", {"network": description}
    write_model(path, {"class": kind, name: description}, None, {name: state_to_numpy(network)})


def check_network_path(path) -> None:
    """Raise FileExistsError if `save_network` may not write to ``path``."""
    path = Path(path)
    refuse_foreign(path)
    if (path / CONFIG).is_file() and (found := read_config(path).get("class")) not in list(NETWORK_USES):
        raise FileExistsError(
            f"path must be new, empty or hold a network alone, got {path} with a {found!r}. "
            f"Choose another directory."
        )


def _from_parts(cls: Any, config: dict, calibration: dict, tensors: dict) -> Any:
    detector: Any = cls(**from_json(config["parameters"], SAVED_CLASSES))
    for attribute, kind in detector._saved_parts.items():
        name = attribute.rstrip("_")
        setattr(detector, attribute, _rebuild(kind, config[name], tensors[name]))
    if isinstance(getattr(detector, "autoencoder", None), FrozenEstimator):
        detector.autoencoder = FrozenEstimator(detector.autoencoder_)
    _set_from_json(detector, detector._saved_attributes, config["fitted"])
    _set_from_json(detector, CALIBRATED, calibration)
    return detector


def _describe(name: str, part: Any, kind: type) -> tuple[Any, dict[str, np.ndarray]]:
    """A fitted part as JSON and tensors: an autoencoder, a U-Net, or an array."""
    if type(part) is not kind:  # a subclass may do something else
        raise TypeError(
            f"{name} must be a {kind.__name__} to be saved, got {type(part).__name__}. "
            f"Pickle the estimator with joblib instead."
        )
    if isinstance(part, LatentAutoencoder):
        description = {
            "parameters": to_json(_portable_parameters(part)),
            "fitted": {fitted: to_json(getattr(part, fitted)) for fitted in FITTED_AUTOENCODER},
            "network": to_json(part.config_),
        }
        latents = {statistic: getattr(part, statistic) for statistic in LATENT_STATISTICS}
        return description, state_to_numpy(part.network_) | latents
    if isinstance(part, MaskedUNet):
        return to_json(part.config), state_to_numpy(part)
    return None, {"values": np.asarray(part)}


def _rebuild(kind: type, description: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What `_describe` was given."""
    if kind is MaskedUNet:
        return state_from_numpy(MaskedUNet(from_json(description, SAVED_CLASSES)), arrays).eval()
    if kind is not LatentAutoencoder:
        return arrays["values"]
    autoencoder = LatentAutoencoder(**from_json(description["parameters"], SAVED_CLASSES))
    for statistic in LATENT_STATISTICS:
        setattr(autoencoder, statistic, arrays.pop(statistic))
    _set_from_json(autoencoder, FITTED_AUTOENCODER, description["fitted"])
    network = AutoencoderKL(from_json(description["network"], SAVED_CLASSES))
    autoencoder.network_ = state_from_numpy(network, arrays).eval()
    return autoencoder


def _set_from_json(estimator: Any, names: tuple[str, ...], values: dict) -> None:
    for name in names:
        setattr(estimator, name, from_json(values[name], SAVED_CLASSES))


def _portable_parameters(estimator: Any) -> dict:
    """Constructor parameters for ``config.json``, without what belongs to one machine or one run."""
    parameters = estimator.get_params(deep=False)
    parameters |= {name: value for name, value in NOT_SAVED.items() if name in parameters}
    autoencoder, trainer = parameters.get("autoencoder"), parameters.get("trainer")
    if isinstance(autoencoder, FrozenEstimator):
        parameters["autoencoder"] = FrozenEstimator(None)  # the fitted one is saved beside it
    if isinstance(autoencoder, LatentAutoencoder):
        parameters["autoencoder"] = LatentAutoencoder(**_portable_parameters(autoencoder))
    if isinstance(parameters.get("denoiser"), MaskedUNet):
        parameters["denoiser"] = parameters["denoiser"].config
    if isinstance(parameters.get("init"), os.PathLike):
        parameters["init"] = os.fspath(parameters["init"])
    if not isinstance(parameters.get("perceptual"), str | None):
        parameters["perceptual"] = None  # of training only
    if isinstance(parameters["random_state"], np.random.RandomState):
        parameters["random_state"] = None
    if isinstance(trainer, Trainer):
        parameters["trainer"] = trainer.portable()
    return parameters
