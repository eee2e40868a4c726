import numpy as np
import pytest
from scipy.ndimage import center_of_mass, gaussian_filter

from madad.maps.differences import image_map, latent_map, mask_map, upsample_map

RNG = np.random.default_rng(0)
RESTORED, REFERENCE = (RNG.uniform(-1, 1, (3, 2, 8, 6)).astype(np.float32) for _ in range(2))


# Image map


@pytest.mark.parametrize(
    ("difference", "gamma"),
    [("absolute", 0.05), ("absolute", 7.0), ("absolute", np.inf), ("squared", 0.25), ("squared", np.inf)],
)
def test_image_map_is_the_clipped_difference(difference, gamma):
    """``min(d, gamma) / gamma`` with d = |x_restored - x| or its square; without clip, by the largest."""
    got = image_map(RESTORED, REFERENCE, gamma=gamma, difference=difference)
    d = np.abs(RESTORED.astype(np.float64) - REFERENCE)
    d, largest = (d, 2) if difference == "absolute" else (d**2, 4)
    limit = largest if gamma == np.inf else gamma
    expected = np.where(d < limit, d / limit, 1).mean(axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32 and got.max() > 0.01


def test_equal_images_have_no_difference_and_opposite_ones_the_largest():
    white, black = np.ones((1, 1, 4, 4), np.float32), -np.ones((1, 1, 4, 4), np.float32)
    for difference in ("absolute", "squared"):
        for gamma in (0.2, np.inf):
            assert not image_map(white, white, gamma=gamma, difference=difference).any()
            assert (image_map(white, black, gamma=gamma, difference=difference) == 1).all()


def test_relative_difference_is_the_absolute_one_over_the_local_spread_of_the_restored_brain():
    brain = RNG.random((4, 12, 10)) < 0.8
    restored, reference = (RNG.uniform(-1, 1, (4, 2, 12, 10)) for _ in range(2))
    got = image_map(restored, reference, gamma=0.2, difference="relative", brain_mask=brain)
    width = 2.5 / 256 * 12
    expected = np.zeros(brain.shape)
    for i in range(4):
        share = np.maximum(gaussian_filter(brain[i].astype(float), width, mode="constant"), 1e-3)
        for x, y in zip(restored[i], reference[i], strict=True):
            first, second = (
                gaussian_filter(values * brain[i], width, mode="constant") / share for values in (x, x * x)
            )
            spread = np.sqrt(np.maximum(second - first**2, 0))
            expected[i] += np.minimum(np.abs(x - y) / (1 + spread / 0.06), 0.2) / 0.2 / 2
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_relative_difference_is_the_absolute_one_where_the_restored_image_is_flat_and_less_where_it_is_not():
    flat = np.full((1, 1, 128, 128), -0.2, np.float32)
    busy = flat + 0.3 * (np.indices((128, 128)).sum(axis=0) % 2 - 0.5).astype(np.float32)
    for restored, is_flat in ((flat, True), (busy, False)):
        maps = {
            difference: image_map(restored, restored + 0.1, gamma=0.2, difference=difference)
            for difference in ("absolute", "relative")
        }
        if is_flat:  # the float32 variance of a constant is 0 up to rounding
            np.testing.assert_allclose(maps["relative"], maps["absolute"], rtol=0.01)
        else:
            assert (maps["relative"] < 0.5 * maps["absolute"]).all()


def test_image_map_errors():
    for gamma in (0, -0.2, np.nan):
        with pytest.raises(ValueError, match=f"gamma must be positive, got {gamma!r}"):
            image_map(RESTORED, REFERENCE, gamma=gamma)
    message = r"map_difference must be one of \('absolute', 'squared', 'relative'\), got 'cubed'"
    with pytest.raises(ValueError, match=message):
        image_map(RESTORED, REFERENCE, gamma=0.2, difference="cubed")


# Latent and mask map


def test_latent_map_is_the_squashed_distance_and_keeps_its_order():
    z, noise = RNG.normal(size=(2, 4, 3, 5, 5))
    z_restored = z + noise * 10.0 ** RNG.uniform(-3, 3, (4, 1, 5, 5))
    got = latent_map(z_restored, z)
    distance = np.linalg.norm(z_restored - z, axis=1) / np.sqrt(3)
    np.testing.assert_allclose(got, distance / (1 + distance), rtol=1e-5)
    np.testing.assert_array_equal(np.argsort(got.ravel()), np.argsort(distance.ravel()))
    assert got.dtype == np.float32 and got.min() > 0 and got.max() < 1
    assert not latent_map(z, z).any()


def test_mask_map_is_the_mean_over_the_steps():
    probability = RNG.random((5, 3, 1, 4, 6))
    expected = sum(probability[i, :, 0] for i in range(5)) / 5
    np.testing.assert_allclose(mask_map(probability), expected, rtol=1e-6)
    assert mask_map(probability).dtype == np.float32


# To pixels


@pytest.mark.parametrize("factor, height, width", [(1, 5, 6), (4, 20, 24), (8, 37, 43), (3, 13, 16)])
def test_upsampling_keeps_constants_and_crops(factor, height, width):
    grid = np.broadcast_to(np.float32([0.25, 1.0])[:, None, None], (2, 5, 6))
    pixels = upsample_map(grid, factor, height, width)
    assert pixels.shape == (2, height, width)
    np.testing.assert_allclose(pixels, np.broadcast_to(grid[:, :1, :1], pixels.shape), atol=1e-6)


@pytest.mark.parametrize(("factor", "cell"), [(2, (2, 3)), (4, (3, 2)), (8, (2, 2))])
def test_a_hot_cell_ends_up_centred_over_its_pixels(factor, cell):
    grid = np.zeros((1, 6, 6), np.float32)
    grid[0][cell] = 1
    pixels = upsample_map(grid, factor, 6 * factor, 6 * factor)[0]
    expected = [(side + 0.5) * factor - 0.5 for side in cell]
    np.testing.assert_allclose(center_of_mass(pixels), expected, atol=1e-3)
    inside = pixels[tuple(slice(side * factor, (side + 1) * factor) for side in cell)]
    assert inside.min() > 0.25 and pixels.max() == inside.max()


def test_upsampling_is_linear_between_centres():
    pixels = upsample_map(np.float32([[[0.0, 1.0, 0.5]]]), 4, 4, 12)[0]
    expected = np.interp(np.arange(12), [1.5, 5.5, 9.5], [0, 1, 0.5])
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (4, 12)), atol=1e-6)


def test_upsampling_a_map_does_not_depend_on_its_company():
    grid = RNG.random((4, 7, 5)).astype(np.float32)
    together = upsample_map(grid, 4, 28, 20)
    for i in range(4):
        np.testing.assert_array_equal(upsample_map(grid[i : i + 1], 4, 28, 20)[0], together[i])
