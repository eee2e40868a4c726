import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from madad.datasets import make_brain_slices
from madad.metrics import reconstruction_errors

RNG = np.random.default_rng(0)
BRAINS = make_brain_slices(3, size=32, random_state=0).images
MASKS = BRAINS > 0


def blurred(images, sigma=1.0):
    return gaussian_filter(images, (*(0,) * (images.ndim - 2), sigma, sigma))


def slow_high_frequency_energy(images, brain_masks):
    offsets = np.arange(-4, 5)
    kernel = np.exp(-0.5 * offsets**2)
    kernel /= kernel.sum()
    total = 0.0
    for image, brain in zip(images.astype(np.float64), brain_masks, strict=True):
        padded = np.pad(image, 4, mode="symmetric")
        for axis in (0, 1):
            padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="same")
        total += ((image - padded[4:-4, 4:-4])[brain] ** 2).sum()
    return total


# Values


def test_a_perfect_copy():
    errors = reconstruction_errors(BRAINS, BRAINS.copy(), MASKS)
    assert errors == {"mae": 0, "psnr": np.inf, "ssim": pytest.approx(1), "high_frequency_ratio": 1}
    assert all(type(value) is float for value in errors.values())


def test_a_known_error():
    noisy = BRAINS + np.where(MASKS, 0.1, 0.7) * RNG.choice([-1, 1], BRAINS.shape)
    errors = reconstruction_errors(BRAINS, noisy, MASKS)
    assert errors["mae"] == pytest.approx(0.1) and errors["psnr"] == pytest.approx(20)

    x_hat = np.zeros((2, 4, 4))
    x_hat[0, 0, :3] = 0.3, -0.6, 0.9
    brain = np.zeros((2, 4, 4), dtype=bool)
    brain[0, 0, :2] = brain[1, 0, 0] = True
    errors = reconstruction_errors(np.zeros((2, 4, 4)), x_hat, brain)
    assert errors["mae"] == pytest.approx(0.9 / 3)
    assert errors["psnr"] == pytest.approx(10 * np.log10(1 / ((0.09 + 0.36) / 3)))


@pytest.mark.parametrize(
    ("shape", "window"), [((9, 12), 7), ((7, 20), 7), ((6, 9), 5), ((5, 5), 5), ((8, 4), 3), ((3, 3), 3)]
)
def test_ssim_is_scikit_images_inside_the_brain(shape, window):
    x, x_hat = RNG.random((2, 4, *shape))
    brain = RNG.random((4, *shape)) < 0.6
    options = {"win_size": window, "data_range": 1.0, "full": True}
    similarity = [structural_similarity(*pair, **options)[1] for pair in zip(x, x_hat, strict=True)]
    assert reconstruction_errors(x, x_hat, brain)["ssim"] == pytest.approx(np.array(similarity)[brain].mean())


def test_ssim_of_flat_images_by_hand():
    flat = np.full((1, 8, 8), 0.5)
    ssim = reconstruction_errors(flat, flat + 0.25, np.ones((1, 8, 8)))["ssim"]
    assert ssim == pytest.approx((2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4))


def test_high_frequency_ratio_is_the_ratio_of_energies_in_the_brain():
    x_hat = blurred(BRAINS, 0.6)
    ratio = slow_high_frequency_energy(x_hat, MASKS) / slow_high_frequency_energy(BRAINS, MASKS)
    errors = reconstruction_errors(BRAINS, x_hat, MASKS)
    assert errors["high_frequency_ratio"] == pytest.approx(ratio, rel=1e-6)


# Properties


def test_blur_takes_detail_away_and_noise_adds_some():
    previous = reconstruction_errors(BRAINS, BRAINS, MASKS)
    for sigma in (0.5, 1.0, 2.0):
        errors = reconstruction_errors(BRAINS, blurred(BRAINS, sigma), MASKS)
        for name in ("ssim", "psnr", "high_frequency_ratio"):
            assert errors[name] < previous[name]
        assert errors["mae"] > previous["mae"]
        previous = errors
    noisy = BRAINS + 0.05 * RNG.normal(size=BRAINS.shape)
    assert reconstruction_errors(BRAINS, noisy, MASKS)["high_frequency_ratio"] > 1
    darker = reconstruction_errors(BRAINS, 0.5 * BRAINS, MASKS)
    assert darker["high_frequency_ratio"] == pytest.approx(0.25)


def test_channels_are_images_of_their_own():
    x_hat = blurred(BRAINS)
    expected = reconstruction_errors(BRAINS, x_hat, MASKS)
    one = reconstruction_errors(BRAINS[:, None], x_hat[:, None], MASKS)
    assert one == expected
    pair = (np.stack([images, images], axis=1) for images in (BRAINS, x_hat))
    assert reconstruction_errors(*pair, MASKS) == pytest.approx(expected)

    x, x_hat = RNG.random((2, 3, 2, 8, 8))
    brain = RNG.random((3, 8, 8)) < 0.5
    flat = (images.reshape(6, 8, 8) for images in (x, x_hat))
    expected = reconstruction_errors(*flat, np.repeat(brain, 2, axis=0))
    assert reconstruction_errors(x, x_hat, brain) == pytest.approx(expected)


def test_order_precision_layout_and_type_of_the_mask_do_not_matter():
    x_hat = blurred(BRAINS)
    before = BRAINS.copy(), x_hat.copy(), MASKS.copy()
    expected = reconstruction_errors(BRAINS, x_hat, MASKS)
    assert reconstruction_errors(BRAINS[::-1], x_hat[::-1], MASKS[::-1]) == pytest.approx(expected)
    assert reconstruction_errors(BRAINS.astype(np.float64), x_hat, MASKS.astype(np.uint8)) == expected
    assert reconstruction_errors(BRAINS.tolist(), x_hat.tolist(), MASKS.astype(int).tolist()) == expected
    for array, copy in zip((BRAINS, x_hat, MASKS), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_background_far_from_the_brain_does_not_matter():
    x, brain = np.zeros((1, 40, 40)), np.zeros((1, 40, 40), dtype=bool)
    x[0, :16, :16], brain[0, :16, :16] = RNG.random((16, 16)), True
    x_hat = blurred(x)
    changed = x_hat.copy()
    changed[0, 24:, 24:] = 1
    expected = reconstruction_errors(x, x_hat, brain)
    assert reconstruction_errors(x, changed, brain) == pytest.approx(expected)


def test_a_flat_image_has_no_detail_to_compare_with():
    flat, brain = np.full((1, 12, 12), 0.3), np.ones((1, 12, 12), dtype=bool)
    assert np.isnan(reconstruction_errors(flat, flat, brain)["high_frequency_ratio"])
    detailed = flat + 0.1 * RNG.random(flat.shape)
    assert reconstruction_errors(flat, detailed, brain)["high_frequency_ratio"] == np.inf
    assert reconstruction_errors(detailed, flat, brain)["high_frequency_ratio"] == 0


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reconstructions": np.zeros((3, 32, 31))},
            "reconstructions must have the shape of images, (n, H, W) ... got (3, 32, 31) and (3, 32, 32)",
        ),
        (
            {"images": np.zeros((32, 32)), "reconstructions": np.zeros((32, 32))},
            "reconstructions must have ... (n, H, W) or (n, C, H, W), got (32, 32) and (32, 32)",
        ),
        (
            {"images": np.zeros((3, 2, 9)), "reconstructions": np.zeros((3, 2, 9))},
            "images must hold slices with sides of at least 3, got shape (3, 2, 9)",
        ),
        (
            {"images": np.zeros((3, 0, 9, 9)), "reconstructions": np.zeros((3, 0, 9, 9))},
            "images must hold slices ... got shape (3, 0, 9, 9)",
        ),
        ({"brain_masks": MASKS[:2]}, "brain_masks must have shape (3, 32, 32) ... got (2, 32, 32)"),
        ({"brain_masks": MASKS[:, None]}, "brain_masks must have shape (3, 32, 32) ... got (3, 1, 32, 32)"),
        ({"brain_masks": MASKS & False}, "and hold some brain, got (3, 32, 32) with 0 pixels"),
        ({"brain_masks": 2 * MASKS}, "brain_masks must hold only 0 and 1, got the value 2"),
        (
            {"images": np.where(BRAINS > 0.5, np.nan, BRAINS)},
            f"images must be finite, got {(BRAINS > 0.5).sum()} pixels",
        ),
        ({"reconstructions": np.where(MASKS, BRAINS, np.inf)}, "reconstructions must be finite, got"),
    ],
)
def test_wrong_values_raise_value_errors(change, message, as_pattern):
    arguments = {"images": BRAINS, "reconstructions": BRAINS, "brain_masks": MASKS}
    with pytest.raises(ValueError, match=as_pattern(message)):
        reconstruction_errors(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": (255 * BRAINS).astype(np.uint8)},
            "images and reconstructions must hold floats, got dtypes uint8 and float32",
        ),
        ({"reconstructions": MASKS}, "must hold floats, got dtypes float32 and bool"),
        ({"brain_masks": None}, "brain_masks must hold booleans or 0 and 1, got dtype object"),
    ],
)
def test_wrong_types_raise_type_errors(change, message, as_pattern):
    arguments = {"images": BRAINS, "reconstructions": BRAINS, "brain_masks": MASKS}
    with pytest.raises(TypeError, match=as_pattern(message)):
        reconstruction_errors(**(arguments | change))


def test_missing_scikit_image_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match=r'scikit-image must be installed .* pip install "madad\[report\]"'):
        reconstruction_errors(BRAINS, BRAINS, MASKS)
