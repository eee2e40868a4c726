import pickle

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.estimator_checks import parametrize_with_checks

from madad import LatentAutoencoder, Trainer
from madad.baselines.autoencoder_residual import AutoencoderResidual
from madad.datasets import make_brain_slices
from madad.testing import tiny_autoencoder


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0.05, 1, (4, 12, 10)).astype(np.float32)


@pytest.fixture
def brain_masks(images):
    masks = np.zeros(images.shape, bool)
    masks[:, 2:10, 1:9] = True
    masks[3] = False  # a slice without brain
    return masks


@pytest.fixture(scope="module")
def healthy():
    return make_brain_slices(24, size=32, random_state=0)


@pytest.fixture(scope="module")
def fitted(healthy):
    """Never change it: take a copy."""
    return tiny_baseline().fit(healthy.images, groups=healthy.subjects)


def tiny_baseline(**overrides):
    defaults = {
        "autoencoder": tiny_autoencoder(trainer=Trainer(10**6, max_steps=30)),
        "batch_size": 4,
        "random_state": 0,
    }
    return AutoencoderResidual(**(defaults | overrides))


@parametrize_with_checks(
    [
        AutoencoderResidual(
            autoencoder=tiny_autoencoder(trainer=Trainer(1, max_steps=2)),
            intensity_range="data",
            random_state=0,
        )
    ]
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_its_maps_are_the_residual_of_its_autoencoder(fitted, healthy):
    X, brain = healthy.images, healthy.images > 0
    reconstruction = fitted.autoencoder_.inverse_transform(fitted.autoencoder_.transform(X))
    baseline = pickle.loads(pickle.dumps(fitted)).set_params(smoothing_px=0)
    expected = np.where(brain, np.abs(X.astype(np.float64) - reconstruction), 0)
    np.testing.assert_allclose(baseline.predict_maps(X), expected, atol=1e-6)
    smoothed = pickle.loads(pickle.dumps(fitted)).set_params(smoothing_px=5 * 32 / 256)  # as the detector's
    np.testing.assert_array_equal(fitted.predict_maps(X), smoothed.predict_maps(X))
    assert not np.allclose(fitted.predict_maps(X), expected)


def test_channels_are_averaged(healthy):
    X = np.stack([healthy.images, healthy.images[..., ::-1]], axis=1)
    baseline = tiny_baseline(smoothing_px=0).fit(X)
    reconstruction = baseline.autoencoder_.inverse_transform(baseline.autoencoder_.transform(X))
    expected = np.where(X.any(axis=1), np.abs(X - reconstruction).mean(axis=1), 0)
    np.testing.assert_allclose(baseline.predict_maps(X), expected, atol=1e-6)


def test_maps_do_not_depend_on_company_or_order(fitted, healthy, two_threads):
    X = healthy.images
    maps = fitted.predict_maps(X)
    for rows in (np.array([7]), np.arange(24)[::-1], np.array([3, 3, 20, 1, 0])):
        np.testing.assert_array_equal(fitted.predict_maps(X[rows]), maps[rows])
    assert 0 < maps.max() <= 1 and maps.min() == 0 and not maps[X == 0].any()


def test_one_seed_one_result_and_another_seed_another(fitted, healthy):
    before = torch.get_rng_state()
    twin, other = (
        tiny_baseline(random_state=seed).fit(healthy.images, groups=healthy.subjects) for seed in (0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(twin.predict_maps(healthy.images), fitted.predict_maps(healthy.images))
    assert not np.array_equal(other.predict_maps(healthy.images), twin.predict_maps(healthy.images))


@pytest.mark.parametrize("variational", [False, True])
def test_the_default_has_a_narrow_bottleneck_and_finds_a_pasted_square(variational, healthy):
    trainer = Trainer(10**6, max_steps=30, batch_size=8)
    baseline = AutoencoderResidual(variational=variational, trainer=trainer, random_state=0)
    X = healthy.images.copy()
    X[:, 12:19, 12:19] = 1
    baseline.fit(healthy.images, groups=healthy.subjects)
    autoencoder = baseline.autoencoder_
    assert autoencoder.latent_shape_ == (4, 2, 2) and not autoencoder.config_.linear_shortcut
    assert (autoencoder.kl_weight > 0) == variational and autoencoder.history_[-1]["step"] == 30
    assert (baseline.score_samples(X) < baseline.score_samples(healthy.images)).all()


def test_a_given_autoencoder_is_cloned_and_a_frozen_one_is_shared(fitted, healthy, tmp_path):
    unfitted = tiny_autoencoder(latent_channels=3)
    baseline = tiny_baseline(autoencoder=unfitted).fit(healthy.images)
    assert not hasattr(unfitted, "network_") and baseline.autoencoder_.config_.latent_channels == 3
    shared = FrozenEstimator(fitted.autoencoder_)
    baseline = tiny_baseline(autoencoder=shared).fit(healthy.images, groups=healthy.subjects)
    assert baseline.autoencoder_ is fitted.autoencoder_
    np.testing.assert_array_equal(baseline.predict_maps(healthy.images), fitted.predict_maps(healthy.images))
    baseline.save(tmp_path / "model")
    loaded = AutoencoderResidual.load(tmp_path / "model")
    assert loaded.autoencoder.estimator is loaded.autoencoder_
    np.testing.assert_array_equal(loaded.predict_maps(healthy.images), fitted.predict_maps(healthy.images))


def test_save_and_load(healthy, tmp_path):
    trainer = Trainer(1, max_steps=2)
    baseline = AutoencoderResidual(variational=True, trainer=trainer, random_state=0)
    baseline.fit(healthy.images, groups=healthy.subjects).save(tmp_path / "model")
    loaded = AutoencoderResidual.load(tmp_path / "model")
    before, after = baseline.get_params(), loaded.get_params()
    assert before.pop("trainer").get_params() == after.pop("trainer").get_params() and before == after
    for call in ("predict_maps", "predict_masks", "decision_function", "predict"):
        np.testing.assert_array_equal(
            getattr(loaded, call)(healthy.images), getattr(baseline, call)(healthy.images)
        )
    refitted = loaded.fit(healthy.images, groups=healthy.subjects)
    np.testing.assert_array_equal(
        refitted.predict_maps(healthy.images), baseline.predict_maps(healthy.images)
    )


def test_parameters_that_do_not_fit_are_named(fitted, healthy):
    X = healthy.images
    for value in ("fast-f4", FrozenEstimator(None), FrozenEstimator(Trainer())):
        with pytest.raises(TypeError, match="autoencoder must be a LatentAutoencoder.* Use Lat") as error:
            tiny_baseline(autoencoder=value).fit(X)
        assert f"got {value!r}" in str(error.value)
    with pytest.raises(ValueError, match=r"variational must be False .* got True\. Set .* kl_weight"):
        tiny_baseline(variational=True).fit(X)
    with pytest.raises(ValueError, match="learning_rate must"):
        AutoencoderResidual(trainer=Trainer(learning_rate=-1)).fit(X)
    with pytest.raises(NotFittedError):
        tiny_baseline(autoencoder=FrozenEstimator(LatentAutoencoder())).fit(X)


def test_a_shared_autoencoder_of_other_slices_is_named(fitted, healthy):
    shared, X = FrozenEstimator(fitted.autoencoder_), healthy.images
    with pytest.raises(ValueError, match=r"autoencoder must .*shape \(1, 24, 32\), got \(1, 32, 32\)"):
        tiny_baseline(autoencoder=shared).fit(X[:, 4:28])
    with pytest.raises(
        ValueError, match=r"with intensity_range \(0\.0, 0\.3\d+\), got \(0\.0, 1\.0\)\. Give"
    ):
        tiny_baseline(autoencoder=shared, intensity_range="data").fit(X / 2)
