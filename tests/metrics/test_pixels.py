import numpy as np
import pytest

from madad.metrics import _pixels
from madad.metrics._pixels import as_bool, as_threshold, check_classes, predicted_masks, validated

MAPS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
LESION = MAPS > 20
BRAIN = MAPS != 23


def test_pixels_are_flat_and_lesions_end_where_the_brain_does():
    pixels = validated(LESION, MAPS, BRAIN)
    assert all(array.shape == (2, 12) for array in pixels)
    np.testing.assert_array_equal(pixels.lesion, (LESION & BRAIN).reshape(2, 12))
    np.testing.assert_array_equal(pixels.brain, BRAIN.reshape(2, 12))
    assert np.shares_memory(pixels.score, MAPS)  # nothing is copied that need not be


def test_without_brain_masks_all_is_brain():
    assert validated(LESION, MAPS, None).brain.all()


@pytest.mark.parametrize(("given", "found"), [(np.float16, np.float64), (int, np.float64), (np.float64,) * 2])
def test_maps_have_one_of_two_precisions(given, found):
    assert validated(LESION, MAPS.astype(given), None).score.dtype == found


def test_what_is_not_finite_counts_in_the_brain_alone():
    maps = np.where(BRAIN, MAPS, np.nan)
    assert np.isnan(validated(LESION, maps, BRAIN).score[1, 11])
    with pytest.raises(ValueError, match=r"^anomaly_maps must be finite in the brain, got nan in 1 pixels"):
        validated(LESION, maps, None)


def test_a_lesion_is_asked_for_where_it_is_needed():
    nothing = np.zeros_like(LESION)
    assert not validated(nothing, MAPS, None).lesion.any()
    with pytest.raises(ValueError, match="^lesion_masks must have lesion pixels in the brain, got none in 2"):
        validated(nothing, MAPS, None, needs_lesion=True)


def test_masks_are_booleans_or_zeros_and_ones():
    for dtype in (bool, np.uint8, np.float32):
        found = as_bool("mask", np.array([0, 1], dtype))
        assert found.dtype == bool and found.tolist() == [False, True]
    with pytest.raises(ValueError, match="^mask must hold only 0 and 1, got the value 2. Binarise it"):
        as_bool("mask", [0, 2])
    with pytest.raises(TypeError, match="^mask must hold booleans or 0 and 1, got dtype <U1. Ask"):
        as_bool("mask", ["a"], "Ask.")


def test_both_classes_are_asked_for():
    check_classes(np.array([0, 1]), np.array([2, 0]))
    with pytest.raises(
        ValueError, match="^lesion_masks must leave healthy pixels, got lesion in all 3 pixels"
    ):
        check_classes(np.array([1, 2]), np.array([0, 0]))


def test_a_threshold_is_reached_in_the_precision_of_the_maps():
    maps = np.full((1, 2, 2), 0.1, np.float32)  # as a double it is a little above 0.1
    pixels = validated(np.zeros((1, 2, 2)), maps, [[[1, 1], [1, 0]]])
    assert as_threshold(0.1, maps.dtype).dtype == np.float32
    assert predicted_masks(pixels, 0.1).tolist() == [[True, True, True, False]]
    assert not predicted_masks(pixels, np.nextafter(np.float32(0.1), np.float32(1))).any()


@pytest.mark.parametrize(("threshold", "error"), [("0.1", TypeError), (np.nan, ValueError)])
def test_a_threshold_is_a_number(threshold, error):
    with pytest.raises(error, match="^threshold must "):
        _pixels.as_threshold(threshold, np.dtype(np.float32))
