from functools import partial

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from madad.maps.smoothing import PAPER_SMOOTHING, blur, finish_map, guided_filter, smoothing_width

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 7), 2.5), ((5, 1), 0.4), ((24, 31), 20.0), ((2, 3, 16, 9), 2.5)]
)
def test_blur_is_a_gaussian_filter_over_the_last_two_axes(shape, width):
    values = RNG.normal(size=shape).astype(np.float32)
    axes = (0,) * (len(shape) - 2) + (width, width)
    expected = gaussian_filter(values.astype(np.float64), axes, mode="constant")
    np.testing.assert_allclose(blur(values, width), expected, atol=1e-6)
    assert blur(values, width).dtype == np.float32


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
