import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from madad.baselines import TAILS, intensity_maps, residual_maps
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


FORMULAS = {
    "bright": lambda x, brain: x,
    "dark": lambda x, brain: 1 - x,
    "both": lambda x, brain: np.abs(x - np.median(x[brain])) if brain.any() else x,
}


@pytest.mark.parametrize("tail", TAILS)
def test_intensity_maps(tail, images, brain_masks):
    maps = intensity_maps(images, brain_masks, tail=tail)
    assert maps.dtype == np.float32
    for x, brain, found in zip(images, brain_masks, maps, strict=True):
        expected = np.where(brain, FORMULAS[tail](x.astype(np.float64), brain), 0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bright_and_dark_rank_in_opposite_order(images, brain_masks):
    bright, dark = (intensity_maps(images, brain_masks, tail=tail)[0] for tail in ("bright", "dark"))
    inside = brain_masks[0]
    np.testing.assert_array_equal(np.argsort(bright[inside]), np.argsort(dark[inside])[::-1])


def test_smoothing_is_gaussian_inside_the_brain(images, brain_masks):
    maps = intensity_maps(images, brain_masks, tail="bright", smoothing_px=1.5)
    for x, brain, found in zip(images, brain_masks, maps, strict=True):
        expected = gaussian_filter(np.where(brain, x, 0).astype(np.float64), 1.5, mode="constant")
        np.testing.assert_allclose(found, np.where(brain, expected, 0), atol=1e-5)


def test_another_tail_raises(images, brain_masks):
    with pytest.raises(ValueError, match="tail must be one of .* got 'left'"):
        intensity_maps(images, brain_masks, tail="left")


class Dimmer:
    """Loses half of the intensity."""

    def transform(self, images):
        return images / 4

    def inverse_transform(self, latents):
        return latents * 2


def test_residual_maps(images, brain_masks):
    maps = residual_maps(Dimmer(), images, brain_masks, smoothing_px=0)
    np.testing.assert_allclose(maps, np.where(brain_masks, images / 2, 0), rtol=1e-6)
    default = residual_maps(Dimmer(), images, brain_masks)  # smoothed as the detector's maps
    expected = residual_maps(Dimmer(), images, brain_masks, smoothing_px=5 * 12 / 256)
    np.testing.assert_allclose(default, expected, rtol=1e-6)
    assert not np.allclose(default, maps)


def test_residual_maps_of_a_fitted_autoencoder(images, brain_masks):
    autoencoder = tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(images)
    reconstruction = autoencoder.inverse_transform(autoencoder.transform(images))
    maps = residual_maps(autoencoder, images, brain_masks, smoothing_px=0)
    expected = np.where(brain_masks, np.abs(reconstruction.astype(np.float64) - images), 0)
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    assert maps[:3].any(axis=(1, 2)).all() and not maps[3].any()
