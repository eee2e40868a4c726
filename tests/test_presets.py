import inspect
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from madad import MaskedDiffusionAnomalyDetector
from madad.diffusion import CORRUPTIONS, MaskedDDIM, NoiseSchedule, make_repair
from madad.maps import MapRecipe
from madad.nn import AUTOENCODER_SIZES, UNET_SIZES
from madad.presets import INFERENCE_KNOBS, PRESETS, choose_preset
from madad.stages.denoiser import OBJECTIVE_KNOBS, check_denoiser, make_objective
from madad.training import Trainer

TRAINING = {"autoencoder_training", "denoiser_training", "autoencoder_time_share"}
NETWORKS = {"autoencoder", "denoiser"}
STEPS = [field.name for field in fields(MaskedDDIM)]
MAP = [field.name for field in fields(MapRecipe)]
every_preset = pytest.mark.parametrize("name", PRESETS)


def check_knobs(knobs):
    """Make all that the knobs of inference describe."""
    make_repair(MaskedDDIM(**{name: knobs[name] for name in STEPS}), knobs["repaint"])
    MapRecipe(**{name: knobs[name] for name in MAP})


def test_the_knobs_of_inference_are_those_of_the_repair_and_of_the_map():
    assert set(INFERENCE_KNOBS) == {*STEPS, "repaint", *MAP}


@every_preset
def test_every_preset_has_every_knob_and_no_other(name):
    assert set(PRESETS[name]) == NETWORKS | TRAINING | set(OBJECTIVE_KNOBS) | set(INFERENCE_KNOBS)


@every_preset
def test_every_knob_is_a_parameter_of_the_detector_that_defaults_to_none(name):
    parameters = inspect.signature(MaskedDiffusionAnomalyDetector).parameters
    for knob in set(PRESETS[name]) - TRAINING:
        assert parameters[knob].default is None


@every_preset
def test_every_preset_can_be_built(name):
    preset = PRESETS[name]
    assert preset["autoencoder"] in {"auto", *AUTOENCODER_SIZES}
    check_denoiser(preset["denoiser"])
    assert preset["corruption"] in CORRUPTIONS
    for stage in ("autoencoder_training", "denoiser_training"):
        Trainer().resolved(**preset[stage])
    assert preset["autoencoder_time_share"] == 0.1  # 0.4 was measured to be worse
    make_objective(**{knob: preset[knob] for knob in OBJECTIVE_KNOBS})
    check_knobs(preset)
    NoiseSchedule.cosine(preset["n_timesteps"]).timesteps(preset["n_steps"], preset["step_spacing"])


def test_the_papers_values():
    """docs/method.md, "Training as published" and "What the paper leaves open"."""
    paper = PRESETS["paper"]
    masks = (paper["mask_shape"], paper["mask_ratio"], paper["mask_patch_sizes"], paper["brain_rule"])
    assert masks == ("patches", 0.4, (1, 2, 4, 8), "paper") and paper["mask_patch_probabilities"] is None
    assert (paper["corruption"], paper["mask_loss"], paper["mask_loss_weight"]) == ("gaussian", "bce", 0.001)
    steps = (paper["n_timesteps"], paper["n_steps"], paper["eta"], paper["mask_threshold"], paper["repaint"])
    assert steps == (10, 10, 0.0, 0.5, 0.0)
    a_map = (paper["anomaly_map"], paper["reference"], paper["map_difference"], paper["gamma"])
    assert a_map == ("image", "input", "squared", 0.2)
    assert paper["smoothing"] == "gaussian" and paper["smoothing_px"] is None
    assert (paper["autoencoder"], paper["denoiser"]) == ("kl-f8", "L")
    training = {"learning_rate": 5e-4, "batch_size": 96, "max_epochs": 300, "ema_decay": 0.0}
    assert paper["denoiser_training"] == training


def test_the_original_differs_from_the_paper_where_its_code_does_and_nowhere_else():
    paper, original = PRESETS["paper"], PRESETS["original"]
    assert {knob for knob in paper if original[knob] != paper[knob]} == {
        *("denoiser", "denoiser_training", "mask_loss", "mask_patch_probabilities", "brain_rule"),
        *("eta", "reference", "map_difference", "gamma"),
    }
    assert original["denoiser"] == replace(UNET_SIZES[paper["denoiser"]], dropout=0.4)
    assert original["mask_patch_probabilities"] == (0.2, 0.3, 0.3, 0.2)
    assert (original["mask_loss"], original["eta"], original["gamma"]) == ("mse", 0.5, 0.25)
    others = (original["brain_rule"], original["reference"], original["map_difference"])
    assert others == ("original", "reconstruction", "absolute")
    training = original["denoiser_training"]
    assert training == paper["denoiser_training"] | {"max_epochs": 200, "learning_rate": 4e-5}


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


def test_the_automatic_choice_is_small():
    assert choose_preset("auto") == "small"
    assert [choose_preset(name) for name in PRESETS] == list(PRESETS)


@pytest.mark.parametrize("value", ["huge", None, ""])
def test_a_preset_that_does_not_exist_is_refused(value):
    with pytest.raises(ValueError, match="preset must be 'auto' or one of .*'paper'") as caught:
        choose_preset(value)
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
        check_knobs(PRESETS["small"] | {knob: value})
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
    check_knobs(PRESETS["small"] | {knob: value})
