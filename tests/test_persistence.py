"""What `save` and `load` keep is tested with the detector; here what they refuse, part by part."""

import json

import numpy as np
import pytest
import torch

from madad import MaskedDiffusionAnomalyDetector, SliceAugmentation
from madad.diffusion import ForeignLatents, Mixture, SmoothOffset
from madad.testing import tiny_autoencoder, tiny_detector

X = np.random.default_rng(0).random((12, 16, 16), dtype=np.float32)


@pytest.fixture
def saved(tmp_path):
    tiny_detector().fit(X).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "part, wrong",
    [
        (("denoiser",), 5),
        (("denoiser", "fields", "norm_groups"), 0),
        (("denoiser", "fields", "base_channels"), 12),
        (("autoencoder", "network"), None),
        (("autoencoder", "fitted"), {}),
        (("fitted", "image_shape_"), {"__class__": "Popen", "fields": {}}),
        (("parameters", "no_such_parameter"), 1),
    ],
)
def test_parts_that_do_not_fit_raise_one_clear_error(part, wrong, saved):
    config = json.loads((saved / "config.json").read_text())
    place = config
    for name in part[:-1]:
        place = place[name]
    place[part[-1]] = wrong
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model|Popen") as error:
        MaskedDiffusionAnomalyDetector.load(saved)
    assert len(str(error.value)) < 2000


def test_nested_parameters_lose_their_device_and_generator_but_nothing_else(tmp_path):
    autoencoder = tiny_autoencoder(
        device=torch.device("cpu"), random_state=np.random.RandomState(0), kl_weight=1e-3
    )
    corruption = Mixture((ForeignLatents(), SmoothOffset(noise=0.5)), (0.25, 0.75))
    detector = tiny_detector(
        autoencoder=autoencoder, corruption=corruption, augmentation=SliceAugmentation(n_copies=1)
    ).fit(X)
    detector.save(tmp_path / "model")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    assert loaded.corruption == corruption and loaded.augmentation == SliceAugmentation(n_copies=1)
    assert (loaded.autoencoder.device, loaded.autoencoder.random_state) == ("auto", None)
    assert loaded.autoencoder.kl_weight == 1e-3
    np.testing.assert_array_equal(loaded.predict_maps(X), detector.predict_maps(X))
    assert detector.autoencoder is autoencoder and autoencoder.device == torch.device("cpu")
