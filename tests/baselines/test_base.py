"""What all baselines share, on the smallest ones of each kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from madad.baselines.base import IMAGE_PATCH, Baseline, RestoringBaseline
from madad.baselines.denoising_autoencoder import DenoisingAutoencoder
from madad.maps.smoothing import finish_map
from madad.nn import UNET_SIZES
from madad.testing import tiny_detector
from madad.training import Trainer

RNG = np.random.default_rng(0)
HEALTHY = np.where(RNG.random((24, 16, 12)) < 0.8, RNG.uniform(0.01, 0.6, (24, 16, 12)), 0).astype(np.float32)
GROUPS = np.repeat(np.arange(8), 3)


class _Small:
    def __init__(
        self,
        smoothing_px=0.0,
        contamination="auto",
        image_specificity=0.95,
        pixel_specificity=0.99,
        calibration_fraction=0.25,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        batch_size=4,
        device="cpu",
        random_state=0,
        verbose=False,
    ):
        for name, value in locals().items():
            if name != "self":
                setattr(self, name, value)


class Raw(_Small, Baseline):
    """Its raw map is the slice itself."""

    def _train(self, stack, groups, seed):
        self.trained_on_ = len(stack), groups, seed

    def _raw_maps(self, x, brain):
        self.sizes_ = [*getattr(self, "sizes_", []), len(x)]
        return (x[:, 0].numpy() + 1) / 2


class Half(_Small, RestoringBaseline):
    """It takes half of every intensity for healthy."""

    def _restored(self, x, brain):
        return (x + 1) / 2 - 1


def test_the_held_out_rows_are_those_of_the_detector_and_are_not_trained_on():
    baseline = Raw().fit(HEALTHY, groups=GROUPS)
    detector = tiny_detector(calibration_fraction=0.25).fit(HEALTHY, groups=GROUPS)
    np.testing.assert_array_equal(baseline.calibration_rows_, detector.calibration_rows_)
    n_trained, groups, _ = baseline.trained_on_
    assert n_trained == len(HEALTHY) - len(baseline.calibration_rows_)
    assert not set(groups) & set(GROUPS[baseline.calibration_rows_])


def test_every_batch_has_one_size_and_only_what_counts_is_kept():
    baseline = Raw(smoothing_px=1.0).fit(HEALTHY)
    baseline.sizes_ = []
    maps = baseline.predict_maps(HEALTHY[:6])
    assert baseline.sizes_ == [4, 4]
    np.testing.assert_allclose(maps, finish_map(HEALTHY[:6], HEALTHY[:6] > 0, 1.0), atol=1e-6)


def test_a_failed_fit_leaves_no_fitted_baseline():
    baseline = Raw().fit(HEALTHY)
    baseline.set_params(smoothing_px=-1.0)
    with pytest.raises(ValueError, match="smoothing_px must be finite and 0 or more, got -1.0"):
        baseline.fit(HEALTHY)
    assert not baseline.__sklearn_is_fitted__()


def test_a_restoring_baseline_maps_the_difference_to_what_it_restores():
    channels = np.stack([HEALTHY, 0.5 * HEALTHY], axis=1)
    baseline = Half().fit(channels)
    np.testing.assert_allclose(baseline.restore(channels[:6]), channels[:6] / 2, atol=1e-6)
    np.testing.assert_allclose(baseline.predict_maps(channels[:6]), HEALTHY[:6] * 0.375, atol=1e-6)


def denoising(**parameters):
    return DenoisingAutoencoder(denoiser="tiny", device="cpu", random_state=0, **parameters)


def test_a_named_unet_folds_pixels_and_has_the_channels_of_the_slices():
    channels = np.stack([HEALTHY, HEALTHY], axis=1)
    config = denoising(trainer=Trainer(1, max_steps=1)).fit(channels).denoiser_.config
    assert (config.patch_size, config.latent_channels) == (IMAGE_PATCH, 2)
    own = replace(UNET_SIZES["tiny"], patch_size=2)
    fitted = denoising(trainer=Trainer(1, max_steps=1)).set_params(denoiser=own).fit(HEALTHY)
    assert fitted.denoiser_.config.patch_size == 2
    with pytest.raises(ValueError, match=r"denoiser must be one of \[.*\] or a UNetConfig, got 5"):
        denoising().set_params(denoiser=5).fit(HEALTHY)


def test_a_checkpoint_is_found_again_by_data_and_settings(tmp_path):
    trainer = Trainer(2, max_steps=4, checkpoint_dir=tmp_path)
    first = denoising(trainer=trainer).fit(HEALTHY)
    assert len(list(tmp_path.iterdir())) == 1
    again = denoising(trainer=trainer).fit(HEALTHY)
    assert again.history_ == first.history_ and len(list(tmp_path.iterdir())) == 1
    for name, value in first.denoiser_.state_dict().items():
        assert torch.equal(value, again.denoiser_.state_dict()[name])
    denoising(trainer=trainer, noise_std=0.3).fit(HEALTHY)
    denoising(trainer=trainer).fit(0.5 * HEALTHY)
    assert len(list(tmp_path.iterdir())) == 3


def test_validation_holds_out_subjects_of_its_own():
    trainer = Trainer(2, max_steps=4, validation_fraction=0.3)
    history = denoising(trainer=trainer).fit(HEALTHY, groups=GROUPS).history_
    assert any("validation_loss" in record for record in history)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    denoising(trainer=Trainer(1, max_steps=2)).fit(HEALTHY).predict_maps(HEALTHY[:2])
    assert torch.equal(torch.rand(1), expected)
