"""Models of format 1 are read, mean what they meant, and are saved anew in today's format."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator

from madad import MaskedDiffusionAnomalyDetector
from madad.presets import INFERENCE_KNOBS, PRESETS
from madad.saving.format_1 import from_format_1
from madad.saving.json_values import from_json
from madad.testing import tiny_detector
from madad.training.settings import DEFAULTS

GOLDEN = Path(__file__).parents[1] / "golden"
X = np.random.default_rng(0).random((12, 16, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_detector().fit(X).save(path)
    return path


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(saved_once, tmp_path / "model")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_model_of_format_1_is_saved_anew_as_format_2_with_equal_maps(tmp_path):
    before = contents(GOLDEN / "model")
    old = MaskedDiffusionAnomalyDetector.load(GOLDEN / "model").set_params(device="cpu")
    old.save(tmp_path / "model")
    new = MaskedDiffusionAnomalyDetector.load(tmp_path / "model").set_params(device="cpu")
    formats = [
        json.loads((model / "config.json").read_text())["format_version"]
        for model in (GOLDEN / "model", tmp_path / "model")
    ]
    assert formats == [1, 2] and contents(GOLDEN / "model") == before
    with np.load(GOLDEN / "maps.npz", allow_pickle=False) as stored:
        images, brain_masks = stored["images"][:2], stored["brain_masks"][:2]
    for kind in ("image", "latent", "mask"):
        maps = [
            one.set_params(anomaly_map=kind).predict_maps(images, brain_mask=brain_masks)
            for one in (old, new)
        ]
        np.testing.assert_array_equal(*maps)
    assert (new.offset_, new.map_threshold_, new.history_) == (old.offset_, old.map_threshold_, old.history_)
    for name, value in old.get_params().items():
        of_one_run = name.endswith("callbacks")
        if not of_one_run and name not in ("autoencoder", "trainer", "autoencoder__trainer"):
            assert new.get_params()[name] == value, name


def test_a_trainer_of_format_1_keeps_what_it_meant():
    old = MaskedDiffusionAnomalyDetector.load(GOLDEN / "model")
    config = json.loads((GOLDEN / "model" / "config.json").read_text())
    for trainer, fields in (
        (old.trainer, config["parameters"]["trainer"]["fields"]),
        (old.autoencoder.trainer, config["parameters"]["autoencoder"]["fields"]["trainer"]["fields"]),
    ):
        given = {name: value for name, value in fields.items() if value is not None and name != "callbacks"}
        assert len(given) > 10 and {name: getattr(trainer, name) for name in given} == given


def test_an_autoencoder_that_was_shared_in_format_1_is_shared(saved):
    detector = MaskedDiffusionAnomalyDetector.load(saved)
    config = json.loads((saved / "config.json").read_text())
    config["parameters"]["autoencoder"] = {"__class__": "FrozenEstimator", "fields": {"estimator": None}}
    del config["shared"]
    (saved / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    loaded = MaskedDiffusionAnomalyDetector.load(saved)
    assert isinstance(loaded.autoencoder, FrozenEstimator)
    assert loaded.autoencoder.estimator is loaded.autoencoder_
    np.testing.assert_array_equal(loaded.predict_maps(X), detector.predict_maps(X))


def test_the_trainers_of_a_model_of_format_1_leave_nothing_to_a_preset():
    loaded = MaskedDiffusionAnomalyDetector.load(GOLDEN / "model")
    stages = ((loaded.autoencoder, 300, "auto"), (loaded, 1500, 16))
    for estimator, steps, batch_size in stages:
        given = estimator.trainer.resolved(max_epochs=1, max_steps=7, batch_size=3, learning_rate=9.0)
        expected = {"max_epochs": 10**6, "max_steps": steps, "batch_size": batch_size, "learning_rate": 2e-3}
        assert given.get_params() == {**DEFAULTS, **expected}


def test_none_was_no_bound_no_clipping_and_no_patience():
    was = {"max_epochs": 2, "max_steps": None, "max_time": None, "gradient_clip": None, "patience": None}
    part = {"__class__": "Trainer", "fields": was | {"batch_size": None, "validate_every": None}}
    config = {"parameters": {"trainers": [part], "gamma": None}, "fitted": {}}
    parameters = from_json(from_format_1(config))["parameters"]
    assert parameters["gamma"] is None
    known = {
        name: value for name, value in parameters["trainers"][0].get_params().items() if value is not None
    }
    assert known == {
        **{"max_epochs": 2, "max_steps": math.inf, "max_time": math.inf, "gradient_clip": math.inf},
        **{"patience": math.inf, "batch_size": "auto", "validate_every": "epoch"},
    }


def test_an_autoencoder_without_a_trainer_had_the_defaults_of_that_time():
    part = {"__class__": "LatentAutoencoder", "fields": {"size": "tiny", "trainer": None}}
    config = {"parameters": {"autoencoder": part, "trainer": None}, "fitted": {}}
    parameters = from_json(from_format_1(config))["parameters"]
    assert parameters["trainer"] is None
    assert parameters["autoencoder"].trainer.resolved(max_steps=7).get_params() == dict(DEFAULTS)


def test_a_later_preset_table_moves_no_map_of_a_saved_model(saved, monkeypatch):
    of_format_1 = MaskedDiffusionAnomalyDetector.load(GOLDEN / "model").set_params(device="cpu")
    of_today = MaskedDiffusionAnomalyDetector.load(saved)
    with np.load(GOLDEN / "maps.npz", allow_pickle=False) as stored:
        images, brain_masks = stored["images"][:2], stored["brain_masks"][:2]
    before = of_format_1.predict_maps(images, brain_mask=brain_masks), of_today.predict_maps(X)
    later = {
        "n_steps": 1,
        "mask_threshold": 0.9,
        "repaint": 0.0,
        "anomaly_map": "latent",
        "smoothing_px": 9.0,
    }
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | later)
    of_format_1 = MaskedDiffusionAnomalyDetector.load(GOLDEN / "model").set_params(device="cpu")
    of_today = MaskedDiffusionAnomalyDetector.load(saved)
    after = of_format_1.predict_maps(images, brain_mask=brain_masks), of_today.predict_maps(X)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_parameter_that_is_left_open_is_the_presets_of_that_time_and_not_what_it_was_calibrated_with():
    for preset, steps, gamma, repaint in (
        ("tiny", 2, 0.2, 0.3),
        ("base", 5, 0.2, 0.3),
        ("original", 10, 0.25, 0.0),
    ):
        config = {"parameters": {"gamma": None}, "fitted": {"preset_": preset}}
        values = from_format_1(config)["fitted"]["preset_values_"]
        assert (values["n_steps"], values["gamma"], values["repaint"]) == (steps, gamma, repaint)
        assert set(values) == set(INFERENCE_KNOBS)
