import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label

from madad.datasets.painted_lesions import paint_lesion, smooth_noise


def disc_brain(size=96):
    """White matter with a grey rim, a dark middle and some noise."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = np.hypot(y, x) / (0.4 * size)
    brain_mask = radius < 1
    image = np.where(radius > 0.8, 0.33, 0.46)
    image[radius < 0.15] = 0.12
    image += np.random.default_rng(0).normal(0, 0.01, image.shape)
    return np.where(brain_mask, image, 0).astype(np.float32), brain_mask


@pytest.mark.parametrize("mass_effect", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_lesion_lies_in_the_brain_in_one_piece_and_is_seen(seed, mass_effect):
    image, brain_mask = disc_brain()
    rng = np.random.default_rng(seed)
    lesioned, lesion_mask = paint_lesion(image, brain_mask, rng, radius_px=7, mass_effect=mass_effect)
    assert lesioned.dtype == np.float32 and lesion_mask.dtype == bool
    assert label(lesion_mask)[1] == 1
    assert not (lesion_mask & ~brain_mask).any()
    np.testing.assert_array_equal(lesioned > 0, brain_mask)
    assert lesioned.max() <= 1
    assert 0.4 < lesion_mask.sum() / (np.pi * 7**2) < 1.8

    ring = (
        brain_mask & binary_dilation(lesion_mask, iterations=7) & ~binary_dilation(lesion_mask, iterations=2)
    )
    assert abs(lesioned[lesion_mask].mean() - lesioned[ring].mean()) > 0.07
    low, high = np.percentile(image[brain_mask], (1, 99))
    assert low - 0.05 < lesioned[lesion_mask].mean() < high + 0.05


@pytest.mark.parametrize(("mass_effect", "reach_px"), [(False, 7), (True, 30)])
def test_image_far_from_the_lesion_is_untouched(mass_effect, reach_px):
    image, brain_mask = disc_brain()
    lesioned, lesion_mask = paint_lesion(
        image, brain_mask, np.random.default_rng(3), radius_px=7, mass_effect=mass_effect
    )
    far = ~binary_dilation(lesion_mask, iterations=reach_px, structure=np.ones((3, 3)))
    np.testing.assert_array_equal(lesioned[far], image[far])


def test_mass_effect_pushes_tissue_outwards():
    image, brain_mask = disc_brain()
    still, lesion_mask = paint_lesion(image, brain_mask, np.random.default_rng(3), radius_px=7)
    pushed, same_mask = paint_lesion(
        image, brain_mask, np.random.default_rng(3), radius_px=7, mass_effect=True
    )
    np.testing.assert_array_equal(lesion_mask, same_mask)
    beside = binary_dilation(lesion_mask, iterations=10) & ~binary_dilation(lesion_mask, iterations=3)
    assert np.abs(pushed - still)[beside].mean() > 0.005


def test_rim_is_soft():
    image, brain_mask = disc_brain()
    lesioned, lesion_mask = paint_lesion(image, brain_mask, np.random.default_rng(5), radius_px=12)
    changed = np.abs(lesioned - image) > 0.02
    assert (changed & ~lesion_mask).sum() > 0.05 * lesion_mask.sum()


def test_smooth_noise_has_unit_variance_and_does_not_depend_on_resolution():
    draws = np.stack([smooth_noise(np.random.default_rng(i), (40, 60), 5.0) for i in range(400)])
    np.testing.assert_allclose(draws.std(axis=0), 1, atol=0.2)
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=0.25)
    coarse = smooth_noise(np.random.default_rng(0), (40, 40), 5.0)
    fine = smooth_noise(np.random.default_rng(0), (80, 80), 10.0)
    np.testing.assert_allclose(fine.reshape(40, 2, 40, 2).mean(axis=(1, 3)), coarse, atol=0.03)


@pytest.mark.parametrize("radius_px", [0.5, 60])
def test_impossible_radius_is_named(radius_px):
    image, brain_mask = disc_brain()
    with pytest.raises(ValueError, match=f"radius_px must be at least 1 and below.*got {radius_px}"):
        paint_lesion(image, brain_mask, np.random.default_rng(0), radius_px=radius_px)


def test_mask_of_another_shape_is_named():
    image, brain_mask = disc_brain()
    with pytest.raises(ValueError, match=r"brain_mask must have .*got \(90, 96\) and \(96, 96\)"):
        paint_lesion(image, brain_mask[:90], np.random.default_rng(0), radius_px=5)
