import numpy as np
import pytest
from scipy import ndimage

from madad import metrics


def slow_lesion_detection(lesion_masks, predicted_masks, min_size_px, structure):
    n_lesions = n_found = n_detections = n_confirmed = 0
    for lesion, predicted in zip(lesion_masks, predicted_masks, strict=True):
        lesion_labels, n_lesion_labels = ndimage.label(lesion, structure)
        detection_labels, n_detection_labels = ndimage.label(predicted, structure)
        detections = [detection_labels == i for i in range(1, n_detection_labels + 1)]
        detections = [detection for detection in detections if detection.sum() >= min_size_px]
        lesions = [lesion_labels == i for i in range(1, n_lesion_labels + 1)]
        lesions = [component for component in lesions if component.sum() >= min_size_px]
        n_lesions += len(lesions)
        n_detections += len(detections)
        detected = np.any([np.zeros_like(lesion), *detections], axis=0)
        n_found += sum((component & detected).any() for component in lesions)
        n_confirmed += sum((detection & lesion).any() for detection in detections)
    return n_found / n_lesions, n_confirmed / n_detections, n_lesions, n_detections


@pytest.mark.parametrize(
    ("min_size_px", "connectivity", "corner"), [(1, 1, 0), (3, 1, 0), (1, 2, 1), (3, None, 1)]
)
def test_lesion_detection_equals_a_loop_over_components(min_size_px, connectivity, corner, random_case):
    lesion_masks, anomaly_maps, brain_masks = random_case(0, n=20, shape=(15, 15))
    structure = np.array([[corner, 1, corner], [1, 1, 1], [corner, 1, corner]])
    predicted = (anomaly_maps >= 0.8) & brain_masks
    expected = slow_lesion_detection(lesion_masks & brain_masks, predicted, min_size_px, structure)
    found = metrics.lesion_detection(
        lesion_masks, anomaly_maps, 0.8, brain_masks, min_size_px=min_size_px, connectivity=connectivity
    )
    assert found == pytest.approx(expected)


def test_lesion_detection_by_hand():
    lesion_masks, anomaly_maps = np.zeros((2, 8, 8), dtype=bool), np.zeros((2, 8, 8))
    lesion_masks[:, :2, :2] = True  # one lesion in each slice: slices are not joined
    lesion_masks[0, 6:, 6:] = True
    anomaly_maps[0, 1, 1] = anomaly_maps[0, 4, 4] = 1  # one hit, one false alarm, two lesions missed
    assert metrics.lesion_detection(lesion_masks, anomaly_maps, 0.5) == (1 / 3, 1 / 2, 3, 2)
    nothing = metrics.lesion_detection(np.zeros_like(lesion_masks), anomaly_maps, 2.0)
    assert np.isnan(nothing.recall) and np.isnan(nothing.precision)
    assert nothing.n_lesions == nothing.n_detections == 0


def masks_of_area(areas, size):
    masks = np.zeros((len(areas), size * size), dtype=bool)
    for mask, area in zip(masks, areas, strict=True):
        mask[:area] = True
    return masks.reshape(-1, size, size)


@pytest.mark.parametrize(("size", "factor"), [(64, 0.25), (128, 1), (256, 4)])
def test_size_strata_scale_with_the_area(size, factor):
    areas = np.array([0, 3, 4, 71, 72, 570, 571]) * max(factor, 1)
    expected = ["none", "none", "small", "small", "medium", "medium", "large"]
    if factor < 1:  # 0.75, 17.75 and 142.5 pixels
        areas = np.array([0, 0, 1, 17, 18, 142, 143])
    np.testing.assert_array_equal(metrics.size_strata(masks_of_area(areas, size)), expected)


def test_size_strata_takes_other_edges_and_reference():
    masks = masks_of_area([1, 2, 5, 9], size=8)
    strata = metrics.size_strata(masks, edges_px=(1, 4, 8), reference_size=8)
    assert strata.tolist() == ["none", "small", "medium", "large"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lesions, maps: metrics.lesion_detection(lesions, maps, 0, min_size_px=0),
            "min_size_px must ... got 0",
        ),
        (
            lambda lesions, maps: metrics.lesion_detection(lesions, maps, 0, connectivity=3),
            "connectivity must ... got 3",
        ),
        (
            lambda lesions, maps: metrics.size_strata(lesions[0]),
            "lesion_masks must have shape (n, H, W), got (6, 5)",
        ),
        (
            lambda lesions, maps: metrics.size_strata(lesions, edges_px=(3, 2, 9)),
            "edges_px must ... got (3, 2, 9)",
        ),
        (
            lambda lesions, maps: metrics.size_strata(lesions, reference_size=0),
            "reference_size must ... got 0",
        ),
    ],
)
def test_wrong_values_raise_value_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(ValueError, match=as_pattern(message)):
        call(lesions, maps)
