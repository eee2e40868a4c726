"""Models of format 1 are read, mean what they meant, and are saved anew in today's format."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator

from madad import MaskedDiffusionAnomalyDetector
from madad.testing import tiny_detector

GOLDEN = Path(__file__).parents[1] / "golden"
X = np.random.default_rng(0).random((12, 16, 16), dtype=np.float32)


@pytest.fixture
def saved(tmp_path):
    tiny_detector().fit(X).save(tmp_path / "model")
    return tmp_path / "model"


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
        if name not in ("autoencoder", "trainer", "autoencoder__trainer"):
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
