"""A fitted detector as the parts that `madad.checkpoint` writes, and back."""

from __future__ import annotations

import os
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np
from sklearn.frozen import FrozenEstimator

from madad._random import isolated_seed
from madad._tensors import state_from_numpy, state_to_numpy
from madad.augmentation import SliceAugmentation
from madad.autoencoding import LATENT_STATISTICS, LatentAutoencoder
from madad.checkpoint import from_json, read_model, to_json, write_model
from madad.diffusion import ErasedLatents, ForeignLatents, GaussianNoise, Mixture, SmoothOffset
from madad.nn import AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig
from madad.training import Trainer

Detector = TypeVar("Detector")

FITTED_AUTOENCODER = ("n_features_in_", "image_shape_", "intensity_range_", "history_")
FITTED = (*FITTED_AUTOENCODER, "preset_", "sampler_seed_", "n_timesteps_")
CALIBRATED = ("offset_", "map_threshold_", "calibrated_with_")
NOT_SAVED = {"memory": None, "device": "auto", "verbose": False}
NOT_SAVED_OF_TRAINER = {"checkpoint_dir": None, "callbacks": ()}
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


def save_detector(detector: Any, path) -> None:
    """Write a fitted `madad.MaskedDiffusionAnomalyDetector`; see its ``save``."""
    if not isinstance(detector.denoiser_, MaskedUNet):
        raise TypeError(
            f"denoiser must be a MaskedUNet to be saved, got {type(detector.denoiser_).__name__}. "
            f"Pickle the estimator with joblib instead."
        )
    autoencoder = detector.autoencoder_
    config = {
        "class": type(detector).__name__,
        "parameters": to_json(_portable_parameters(detector)),
        "fitted": {name: to_json(getattr(detector, name)) for name in FITTED},
        "denoiser": to_json(detector.denoiser_.config),
        "autoencoder": {
            "parameters": to_json(_portable_parameters(autoencoder)),
            "fitted": {name: to_json(getattr(autoencoder, name)) for name in FITTED_AUTOENCODER},
            "network": to_json(autoencoder.config_),
        },
    }
    latents = {name: getattr(autoencoder, name) for name in LATENT_STATISTICS}
    tensors = {
        "autoencoder": state_to_numpy(autoencoder.network_) | latents,
        "denoiser": state_to_numpy(detector.denoiser_),
    }
    calibration = {name: to_json(getattr(detector, name)) for name in CALIBRATED}
    write_model(path, config, calibration, tensors)


def load_detector(cls: type[Detector], path) -> Detector:
    """Read what `save_detector` wrote; see the detector's ``load``."""
    config, calibration, tensors = read_model(path, ("autoencoder", "denoiser"))
    if config.get("class") != cls.__name__:
        raise ValueError(f"{path} must hold a {cls.__name__}, got {config.get('class')!r}. Load it as that.")
    try:
        with isolated_seed(0):  # building a network draws weights
            return _from_parts(cls, config, calibration, tensors)
    except (KeyError, TypeError, RuntimeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(
            f"{path} must hold the config and tensors that save() wrote, got parts that do not fit "
            f"({type(error).__name__}: {shorten(str(error), 400)}). Save the model again."
        ) from error


def _from_parts(cls: type[Detector], config: dict, calibration: dict, tensors: dict) -> Detector:
    saved, arrays = config["autoencoder"], tensors["autoencoder"]
    autoencoder = LatentAutoencoder(**from_json(saved["parameters"], SAVED_CLASSES))
    for name in LATENT_STATISTICS:
        setattr(autoencoder, name, arrays.pop(name))
    _set_from_json(autoencoder, FITTED_AUTOENCODER, saved["fitted"])
    network = AutoencoderKL(from_json(saved["network"], SAVED_CLASSES))
    autoencoder.network_ = state_from_numpy(network, arrays).eval()

    detector: Any = cls(**from_json(config["parameters"], SAVED_CLASSES))
    if isinstance(detector.autoencoder, FrozenEstimator):
        detector.autoencoder = FrozenEstimator(autoencoder)
    detector.autoencoder_ = autoencoder
    denoiser = MaskedUNet(from_json(config["denoiser"], SAVED_CLASSES))
    detector.denoiser_ = state_from_numpy(denoiser, tensors["denoiser"]).eval()
    _set_from_json(detector, FITTED, config["fitted"])
    _set_from_json(detector, CALIBRATED, calibration)
    return detector


def _set_from_json(estimator: Any, names: tuple[str, ...], values: dict) -> None:
    for name in names:
        setattr(estimator, name, from_json(values[name], SAVED_CLASSES))


def _portable_parameters(estimator: Any) -> dict:
    """Constructor parameters for ``config.json``, without what belongs to one machine or one run."""
    parameters = estimator.get_params(deep=False)
    parameters |= {name: value for name, value in NOT_SAVED.items() if name in parameters}
    autoencoder, trainer = parameters.get("autoencoder"), parameters["trainer"]
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
        parameters["trainer"] = type(trainer)(**(trainer.get_params(deep=False) | NOT_SAVED_OF_TRAINER))
    return parameters
