"""What a trainer leaves at None, in each of the stages that it trains."""

import math

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad._runtime.tensors import state_to_numpy
from madad.baselines import AutoencoderResidual, DenoisingAutoencoder
from madad.baselines.base import TRAINING
from madad.presets import PRESETS
from madad.testing import tiny_autoencoder
from madad.training.settings import DEFAULTS

X = np.random.default_rng(0).uniform(0.1, 1, (12, 16, 16)).astype(np.float32)


def ignore(state):
    pass


@pytest.fixture
def recipes(monkeypatch):
    """The parameters that each stage is trained with; no stage is trained."""
    seen = {}

    def noting(self, *arguments, description, **options):
        seen[description] = self.get_params()
        return []

    monkeypatch.setattr(Trainer, "optimise", noting)
    return seen


def of_preset(preset, stage, **given):
    return {**DEFAULTS, **PRESETS[preset][f"{stage}_training"], **given}


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("given", [{}, {"callbacks": (ignore,)}, {"precision": "bfloat16", "clock": "cpu"}])
def test_a_detectors_stages_keep_the_presets_recipe(recipes, preset, given):
    trainer = Trainer(**given) if given else None
    MaskedDiffusionAnomalyDetector(preset, trainer=trainer, random_state=0).fit(X)
    assert recipes == {stage: of_preset(preset, stage, **given) for stage in ("autoencoder", "denoiser")}


def test_a_detectors_own_autoencoder_has_the_presets_recipe_where_it_says_nothing(recipes):
    trainer = Trainer(max_steps=50, callbacks=(ignore,))
    for given in (None, Trainer(), Trainer(7, clock="cpu", callbacks=())):
        autoencoder = LatentAutoencoder("tiny", trainer=given)
        MaskedDiffusionAnomalyDetector("tiny", autoencoder=autoencoder, trainer=trainer).fit(X)
        own = {"callbacks": (ignore,)} | ({} if given is None else given._given())
        assert recipes["autoencoder"] == of_preset("tiny", "autoencoder", **own)
        assert recipes["denoiser"] == of_preset("tiny", "denoiser", max_steps=50, callbacks=(ignore,))
        assert autoencoder.trainer is given


def test_an_autoencoder_alone_has_the_trainers_defaults(recipes):
    LatentAutoencoder("tiny", trainer=Trainer(max_steps=3)).fit(X)
    assert recipes["autoencoder"] == {**DEFAULTS, "max_steps": 3}


def test_baselines_have_their_own(recipes):
    for given in ({}, {"max_epochs": 2, "callbacks": (ignore,)}):
        trainer = Trainer(**given)
        DenoisingAutoencoder(denoiser="tiny", trainer=trainer, random_state=0).fit(X)
        AutoencoderResidual(trainer=trainer, random_state=0).fit(X)
        assert recipes["denoiser"] == recipes["autoencoder"] == {**DEFAULTS, **TRAINING, **given}


def test_a_callback_changes_no_weight():
    weights = []
    for trainer in (None, Trainer(callbacks=(ignore,))):
        detector = MaskedDiffusionAnomalyDetector("tiny", trainer=trainer, random_state=0).fit(X)
        networks = (detector.autoencoder_.network_, detector.denoiser_)
        weights.append([values for network in networks for values in state_to_numpy(network).values()])
    for plain, watched in zip(*weights, strict=True):
        np.testing.assert_array_equal(plain, watched)


@pytest.mark.parametrize("own", [None, 3, 1e6, math.inf])
@pytest.mark.parametrize("of_autoencoder", [None, 2, 1e6])
def test_both_stages_share_the_detectors_time_and_the_smaller_bound_holds(recipes, own, of_autoencoder):
    MaskedDiffusionAnomalyDetector(
        "tiny",
        autoencoder=LatentAutoencoder("tiny", trainer=Trainer(max_time=of_autoencoder)),
        trainer=Trainer(math.inf, max_steps=math.inf, max_time=own),
        max_time=100,
    ).fit(X)
    share = PRESETS["tiny"]["autoencoder_time_share"]
    assert recipes["autoencoder"]["max_time"] == min(100 * share, of_autoencoder or math.inf)
    assert recipes["denoiser"]["max_time"] == min(100 * (1 - share), own or math.inf)


def test_where_the_autoencoder_is_frozen_the_denoiser_has_all_the_time(recipes):
    frozen = FrozenEstimator(tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(X))
    MaskedDiffusionAnomalyDetector("tiny", autoencoder=frozen, max_time=100).fit(X)
    assert recipes["denoiser"] == of_preset("tiny", "denoiser", max_time=100)


def test_the_detectors_time_ends_both_stages():
    endless = Trainer(math.inf, max_steps=math.inf, clock="cpu")
    detector = MaskedDiffusionAnomalyDetector(
        "tiny", autoencoder=LatentAutoencoder("tiny", trainer=endless), trainer=endless, max_time=0.5
    ).fit(X)
    assert detector.history_[-1]["step"] > 1 and detector.autoencoder_.trainer.clock == "cpu"


@pytest.mark.parametrize("value", [0, -1, math.nan, "an hour"])
def test_a_detectors_time_must_be_positive(recipes, value):
    with pytest.raises(ValueError, match=r"^max_time must be positive or None") as caught:
        MaskedDiffusionAnomalyDetector("tiny", max_time=value).fit(X)
    assert f"got {value!r}" in str(caught.value) and not recipes
