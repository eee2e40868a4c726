import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from madad import MaskedDiffusionAnomalyDetector
from madad.diffusion import CORRUPTIONS, NoiseSchedule
from madad.nn import AUTOENCODER_SIZES, UNET_SIZES
from madad.presets import INFERENCE_KNOBS, PRESETS, check_inference_knobs, choose_preset
from madad.stages.denoiser import OBJECTIVE_KNOBS, check_denoiser, make_objective
from madad.training import Trainer

NETWORKS = {"autoencoder", "autoencoder_training", "denoiser", "denoiser_training"}
every_preset = pytest.mark.parametrize("name", PRESETS)


@every_preset
def test_every_preset_has_every_knob_and_no_other(name):
    assert set(PRESETS[name]) == NETWORKS | set(OBJECTIVE_KNOBS) | set(INFERENCE_KNOBS)


@every_preset
def test_every_knob_is_a_parameter_of_the_detector_that_defaults_to_none(name):
    parameters = inspect.signature(MaskedDiffusionAnomalyDetector).parameters
    for knob in set(PRESETS[name]) - {"autoencoder_training", "denoiser_training"}:
        assert parameters[knob].default is None


@every_preset
def test_every_preset_can_be_built(name):
    preset = PRESETS[name]
    assert preset["autoencoder"] in {"auto", *AUTOENCODER_SIZES}
    check_denoiser(preset["denoiser"])
    assert preset["corruption"] in CORRUPTIONS
    for stage in ("autoencoder_training", "denoiser_training"):
        Trainer(**preset[stage]).check()
    make_objective(**{knob: preset[knob] for knob in OBJECTIVE_KNOBS})
    check_inference_knobs(preset)
    NoiseSchedule.cosine(preset["n_timesteps"]).timesteps(preset["n_steps"], preset["step_spacing"])


def test_the_papers_values():
    """docs/method.md, "Training as published" and "What the paper leaves open"."""
    expected = {
        "mask_shape": "patches",
        "mask_ratio": 0.4,
        "mask_patch_sizes": (1, 2, 4, 8),
        "mask_patch_probabilities": None,
        "corruption": "gaussian",
        "brain_rule": "paper",
        "mask_loss": "bce",
        "mask_loss_weight": 0.001,
        "n_timesteps": 10,
        "n_steps": 10,
        "eta": 0.0,
        "mask_threshold": 0.5,
        "repaint": 0.0,
        "anomaly_map": "image",
        "reference": "input",
        "map_difference": "squared",
        "gamma": 0.2,
        "smoothing_px": None,
        "autoencoder": "kl-f8",
        "denoiser": "L",
    }
    assert {knob: PRESETS["paper"][knob] for knob in expected} == expected
    training = {"learning_rate": 5e-4, "batch_size": 96, "max_epochs": 300}
    assert PRESETS["paper"]["denoiser_training"].items() >= training.items()


def test_the_original_differs_where_the_method_page_says_so_and_nowhere_else():
    """docs/method.md, "Where the code differs", rows 2, 4, 5, 7, 8 and 9."""
    paper, original = PRESETS["paper"], PRESETS["original"]
    assert {knob: original[knob] for knob in paper if original[knob] != paper[knob]} == {
        "denoiser": replace(UNET_SIZES["L"], dropout=0.4),
        "mask_loss": "mse",
        "mask_patch_probabilities": (0.2, 0.3, 0.3, 0.2),
        "brain_rule": "original",
        "eta": 0.5,
        "denoiser_training": paper["denoiser_training"] | {"max_epochs": 200, "learning_rate": 4e-5},
        "reference": "reconstruction",
        "map_difference": "absolute",
        "gamma": 0.25,
    }


def test_sizes_are_the_methods():
    """docs/method.md, "Symbols" (8 x 8 pixels) and "Where the code differs", row 15."""
    assert AUTOENCODER_SIZES[PRESETS["paper"]["autoencoder"]].factor == 8
    size = UNET_SIZES[PRESETS["paper"]["denoiser"]]
    assert (size.base_channels, size.n_heads, size.n_res_blocks) == (256, 8, 2)
    assert tuple(size.channel_multipliers) == (1, 2, 4) and tuple(size.attention_levels) == (0, 1, 2)


def test_tiny_is_the_smallest():
    for name in ("autoencoder_training", "denoiser_training"):
        assert PRESETS["tiny"][name]["max_steps"] <= 20
    assert PRESETS["tiny"]["autoencoder"] == PRESETS["tiny"]["denoiser"] == "tiny"


def test_the_automatic_choice_goes_by_device():
    assert choose_preset("auto", torch.device("cpu")) == "small"
    assert choose_preset("auto", torch.device("cuda", 0)) == "base"
    for name in PRESETS:
        assert choose_preset(name, torch.device("cpu")) == name


@pytest.mark.parametrize("value", ["huge", None, ""])
def test_a_preset_that_does_not_exist_is_refused(value):
    with pytest.raises(ValueError, match="preset must be 'auto' or one of .*'paper'") as caught:
        choose_preset(value, torch.device("cpu"))
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "knob, value",
    [
        *[(knob, value) for knob in ("mask_threshold", "eta", "repaint") for value in (-0.1, 1.1, math.nan)],
        *[("gamma", value) for value in (0, -0.2, math.nan)],
    ],
)
def test_inference_knobs_out_of_range_are_refused(knob, value):
    with pytest.raises(ValueError, match=f"^{knob} must ") as caught:
        check_inference_knobs(PRESETS["small"] | {knob: value})
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "knob, value",
    [
        ("mask_threshold", 0),
        ("mask_threshold", 1),
        ("eta", 1),
        ("repaint", 1),
        ("eta", np.float32(0.5)),
        ("gamma", math.inf),
    ],
)
def test_inference_knobs_at_the_ends_are_taken(knob, value):
    check_inference_knobs(PRESETS["small"] | {knob: value})
