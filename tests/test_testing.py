import numpy as np
import pytest

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad.testing import tiny_autoencoder, tiny_detector


@pytest.fixture
def slices():
    """Of no particular range."""
    return np.random.default_rng(0).normal(5, 100, (12, 16, 20)).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(tiny_detector, MaskedDiffusionAnomalyDetector), (tiny_autoencoder, LatentAutoencoder)],
)
def test_overrides_replace_defaults_and_nothing_else(make, kind):
    default = make()
    assert type(default) is kind and default.random_state == 0
    changed = make(random_state=7, verbose=True)
    differing = {
        name
        for name, value in changed.get_params(deep=False).items()
        if name != "trainer" and value != default.get_params(deep=False)[name]
    }
    assert differing == {"random_state", "verbose"}
    with pytest.raises(TypeError, match="wings"):
        make(wings=2)


def test_tiny_autoencoder_learns_the_mean_at_least(slices):
    autoencoder = tiny_autoencoder().fit(slices)
    latents = autoencoder.transform(slices)
    assert latents.shape == (12, 2, 4, 5)
    scaled = (slices - slices.min()) / (slices.max() - slices.min())
    restored = autoencoder.inverse_transform(latents)
    assert np.abs(restored - scaled).mean() < np.abs(scaled - 0).mean() / 2


def test_each_call_makes_a_new_estimator(slices):
    assert tiny_detector() is not tiny_detector()
    trainer = Trainer(1, max_steps=1)
    first, second = tiny_autoencoder(trainer=trainer), tiny_autoencoder()
    assert first.trainer is trainer and second.trainer is not trainer
    assert len(first.fit(slices).history_) == 1


def test_tiny_detector_takes_what_the_detector_takes(slices):
    detector = tiny_detector(anomaly_map="latent", autoencoder=tiny_autoencoder(latent_channels=3)).fit(
        slices
    )
    assert detector.autoencoder_.latent_shape_ == (3, 4, 5)
    assert detector.denoiser_.config.latent_channels == 3
    np.testing.assert_array_equal(
        detector.predict_maps(slices) >= np.float32(detector.map_threshold_), detector.predict_masks(slices)
    )
