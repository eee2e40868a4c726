from functools import partial

import numpy as np
import pytest
from scipy.ndimage import center_of_mass, gaussian_filter
from sklearn.metrics import roc_auc_score

from madad.maps.differences import image_map, latent_map, mask_map, upsample_map
from madad.maps.pooling import pool_map
from madad.maps.smoothing import PAPER_SMOOTHING, blur, finish_map, guided_filter, smoothing_width

RNG = np.random.default_rng(0)
RESTORED, REFERENCE = (RNG.uniform(-1, 1, (3, 2, 8, 6)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 7), 2.5), ((5, 1), 0.4), ((24, 31), 20.0), ((2, 3, 16, 9), 2.5)]
)
def test_blur_is_a_gaussian_filter_over_the_last_two_axes(shape, width):
    values = RNG.normal(size=shape).astype(np.float32)
    axes = (0,) * (len(shape) - 2) + (width, width)
    expected = gaussian_filter(values.astype(np.float64), axes, mode="constant")
    np.testing.assert_allclose(blur(values, width), expected, atol=1e-6)
    assert blur(values, width).dtype == np.float32


# Image map


@pytest.mark.parametrize(
    ("difference", "gamma"),
    [("absolute", 0.05), ("absolute", 7.0), ("absolute", None), ("squared", 0.25), ("squared", np.inf)],
)
def test_image_map_is_the_clipped_difference(difference, gamma):
    """``min(d, gamma) / gamma`` with d = |x_restored - x| or its square; without clip, by the largest."""
    got = image_map(RESTORED, REFERENCE, gamma=gamma, difference=difference)
    d = np.abs(RESTORED.astype(np.float64) - REFERENCE)
    d, largest = (d, 2) if difference == "absolute" else (d**2, 4)
    limit = largest if gamma in (None, np.inf) else gamma
    expected = np.where(d < limit, d / limit, 1).mean(axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32 and got.max() > 0.01


def test_equal_images_have_no_difference_and_opposite_ones_the_largest():
    white, black = np.ones((1, 1, 4, 4), np.float32), -np.ones((1, 1, 4, 4), np.float32)
    for difference in ("absolute", "squared"):
        for gamma in (0.2, None):
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
        with pytest.raises(ValueError, match=f"gamma must be positive or None, got {gamma!r}"):
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


# Finishing


def test_finished_maps_are_zero_outside_the_brain_whatever_is_there():
    raw = RNG.random((3, 16, 16)).astype(np.float32)
    brain_mask = RNG.random((3, 16, 16)) < 0.6
    finished = finish_map(raw, brain_mask, 2.0)
    assert not finished[~brain_mask].any()
    assert (finished[brain_mask] > 0).all() and finished.max() <= 1 and finished.dtype == np.float32
    elsewhere = np.where(brain_mask, raw, 1 - raw)
    np.testing.assert_array_equal(finish_map(elsewhere, brain_mask, 2.0), finished)


@pytest.mark.parametrize("smoothing_px", [0.5, 1.3, 4])
def test_smoothing_is_a_gaussian_within_each_slice(smoothing_px):
    raw = RNG.random((3, 16, 12))
    finished = finish_map(raw, np.ones(raw.shape, bool), smoothing_px)
    expected = [gaussian_filter(one, smoothing_px, mode="constant", cval=0) for one in raw]
    np.testing.assert_allclose(finished, expected, atol=1e-6)


def test_no_smoothing_is_the_identity_inside_the_brain():
    raw = RNG.random((3, 16, 12)).astype(np.float32)
    brain_mask = RNG.random(raw.shape) < 0.5
    np.testing.assert_array_equal(finish_map(raw, brain_mask, 0), np.where(brain_mask, raw, 0))


def test_default_smoothing_is_the_originals_scaled_to_the_slice():
    assert smoothing_width(None, 256, 256) == 5 == PAPER_SMOOTHING * 256
    assert smoothing_width(None, 64, 128) == 2.5
    assert smoothing_width(1, 64, 128) == 1.0 and smoothing_width(0, 64, 128) == 0.0
    raw, brain_mask = RNG.random((2, 64, 64)).astype(np.float32), np.ones((2, 64, 64), bool)
    np.testing.assert_array_equal(finish_map(raw, brain_mask, None), finish_map(raw, brain_mask, 1.25))


@pytest.mark.parametrize("value", [-1, -0.5, np.nan, np.inf])
def test_smoothing_must_be_a_width(value):
    with pytest.raises(ValueError, match=f"smoothing_px must be finite and 0 or more, got {value!r}"):
        finish_map(np.zeros((1, 4, 4)), np.ones((1, 4, 4), bool), value)


# Pooling


@pytest.mark.parametrize("top_share, k", [(0.01, 1), (0.1, 8), (0.5, 38), (1.0, 77)])
def test_pooling_is_the_mean_of_the_largest_values_in_the_brain(top_share, k):
    maps = RNG.random((3, 10, 10))
    brain_mask = np.zeros(100, bool)
    brain_mask[RNG.permutation(100)[:77]] = True
    brain_mask = np.broadcast_to(brain_mask.reshape(10, 10), maps.shape)
    expected = [np.sort(one[brain])[::-1][:k].mean() for one, brain in zip(maps, brain_mask, strict=True)]
    np.testing.assert_allclose(pool_map(maps, brain_mask, top_share), expected, rtol=1e-12)


def test_a_slice_without_brain_scores_zero():
    brain_mask = np.stack([np.zeros((4, 4), bool), np.ones((4, 4), bool)])
    np.testing.assert_array_equal(pool_map(np.ones((2, 4, 4), np.float32), brain_mask), [0, 1])


def test_pooling_separates_small_lesions_from_noise_better_than_the_mean_does():
    """Smooth noise whose level differs between slices, and a lesion of 4 x 4 pixels in every other one."""
    has_lesion = np.arange(80) % 2 == 1
    gains = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        maps = gaussian_filter(rng.random((80, 48, 48)), (0, 1, 1)) * rng.uniform(0.85, 1.15, (80, 1, 1))
        for one in maps[1::2]:
            row, column = rng.integers(8, 36, 2)
            one[row : row + 4, column : column + 4] += 0.4
        brain_mask = np.zeros(maps.shape, bool)
        brain_mask[:, 4:44, 6:42] = True
        by_pooling = roc_auc_score(has_lesion, pool_map(maps, brain_mask))
        by_mean = roc_auc_score(has_lesion, pool_map(maps, brain_mask, top_share=1.0))
        gains.append(by_pooling - by_mean)
        assert by_pooling > 0.9
    assert min(gains) > 0.2 and np.mean(gains) > 0.3


@pytest.mark.parametrize("value", [0, -0.1, 1.5, np.nan])
def test_the_share_of_pooled_values_must_be_one(value):
    with pytest.raises(ValueError, match=f"top_share must be above 0 and at most 1, got {value!r}"):
        pool_map(np.zeros((1, 4, 4)), np.ones((1, 4, 4), bool), value)


# Guided smoothing


def test_guided_filter_is_its_formula_in_every_window():
    values, guide = RNG.random((2, 3, 9, 8))
    blur = partial(gaussian_filter, sigma=1.3, mode="constant")
    expected = []
    for p, i in zip(values, guide, strict=True):
        a = (blur(i * p) - blur(i) * blur(p)) / (np.maximum(blur(i * i) - blur(i) ** 2, 0) + 1e-3)
        expected.append(blur(a) * i + blur(blur(p) - a * blur(i)))
    np.testing.assert_allclose(guided_filter(values, guide, 1.3), expected, atol=1e-9)


def test_a_guided_map_ends_where_the_slice_has_its_edge():
    brain = np.ones((1, 32, 32), bool)
    guide = np.full((1, 32, 32), 0.3, np.float32)
    guide[:, 10:22, 10:22] = 0.7
    rough = np.zeros_like(guide)
    rough[:, 9:23, 9:23] = 1.0  # a pixel too far on each side
    plain, guided = finish_map(rough, brain, 1.5), finish_map(rough, brain, 1.5, guide[:, None])
    assert (guided <= plain).all()
    inside, beyond = (slice(0, 1), slice(13, 19), 20), (slice(0, 1), slice(13, 19), 23)
    assert guided[inside].mean() / guided[beyond].mean() > 1.4 * (plain[inside] / plain[beyond]).mean()


def test_without_smoothing_a_guide_changes_nothing():
    maps, guide = RNG.random((2, 3, 8, 8)).astype(np.float32)
    brain = RNG.random((3, 8, 8)) < 0.7
    np.testing.assert_array_equal(finish_map(maps, brain, 0, guide[:, None]), finish_map(maps, brain, 0))


def test_an_edge_in_any_channel_guides():
    brain = np.ones((1, 32, 32), bool)
    edge = np.full((1, 32, 32), 0.3, np.float32)
    edge[:, 10:22, 10:22] = 0.7
    rough = np.zeros_like(edge)
    rough[:, 9:23, 9:23] = 1.0
    flat = np.full_like(edge, 0.5)
    alone = finish_map(rough, brain, 1.5, edge[:, None])
    for guides in ([edge, 1 - edge], [flat, edge]):  # their mean has no edge, or a weak one
        got = finish_map(rough, brain, 1.5, np.stack(guides, axis=1))
        assert got[0, 13:19, 20].mean() > 0.9 * alone[0, 13:19, 20].mean()
        np.testing.assert_array_equal(got, finish_map(rough, brain, 1.5, np.stack(guides[::-1], axis=1)))
    opposite = finish_map(rough, brain, 1.5, np.stack([edge, 1 - edge], axis=1))
    np.testing.assert_allclose(opposite, alone, atol=1e-2)
