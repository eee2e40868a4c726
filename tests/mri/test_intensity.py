import numpy as np
import pytest

from madad.mri.intensity import FOREGROUND_FLOOR, normalize_intensity


def tissue_slices(n_slices=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(100, 12, (n_slices, 32, 32)).clip(1)
    brain_masks = np.zeros(images.shape, dtype=bool)
    brain_masks[:, 4:28, 6:26] = True
    return images, brain_masks


def test_median_lands_on_target_and_background_is_zero():
    images, brain_masks = tissue_slices()
    normalized = normalize_intensity(images, brain_masks, target=0.3)
    assert normalized.dtype == np.float32
    np.testing.assert_array_equal(normalized > 0, brain_masks)
    assert normalized.max() <= 1
    for image, brain in zip(normalized, brain_masks, strict=True):
        assert np.median(image[brain]) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("center", ["median", "mode"])
def test_scale_of_the_input_does_not_matter(center):
    images, brain_masks = tissue_slices()
    once = normalize_intensity(images, brain_masks, center=center)
    np.testing.assert_allclose(normalize_intensity(37 * images, brain_masks, center=center), once, rtol=1e-5)


@pytest.mark.parametrize("center", ["median", "mode"])
def test_bright_lesion_does_not_set_the_scale_but_would_bend_a_percentile(center):
    images, brain_masks = tissue_slices()
    lesion = np.zeros_like(brain_masks)
    lesion[:, 4:28, 6:10] = True  # 20 % of the brain, three times as bright
    lesioned = np.where(lesion, 3 * images, images)
    healthy = brain_masks & ~lesion

    before = normalize_intensity(images, brain_masks, center=center)[healthy]
    after = normalize_intensity(lesioned, brain_masks, center=center)[healthy]
    assert np.median(after / before) == pytest.approx(1, abs=0.05)

    bent = np.percentile(images[brain_masks], 99.5) / np.percentile(lesioned[brain_masks], 99.5)
    assert bent < 0.5


def test_mode_follows_one_tissue():
    images, brain_masks = tissue_slices()
    images[:, 4:13] = np.random.default_rng(1).normal(30, 8, (3, 9, 32))  # fluid in 9 of 24 rows
    normalized = normalize_intensity(images, brain_masks, center="mode")
    assert np.median(normalized[:, 13:28, 6:26]) == pytest.approx(0.4, rel=0.05)
    assert np.median(normalized[brain_masks]) < 0.39


def test_mode_survives_few_grey_levels():
    images, brain_masks = tissue_slices()
    coarse = np.round(images / 10)
    normalized = normalize_intensity(coarse, brain_masks, center="mode")
    assert np.median(normalized[brain_masks]) == pytest.approx(0.4, rel=0.1)


def test_slices_of_a_subject_share_one_scale():
    images, brain_masks = tissue_slices(4)
    images[1::2] *= 3
    normalized = normalize_intensity(images, brain_masks, subjects=["a", "b", "a", "b"])
    for members in ([0, 2], [1, 3]):
        assert np.median(normalized[members][brain_masks[members]]) == pytest.approx(0.4, rel=1e-6)
        ratio = normalized[members][brain_masks[members]] / images[members][brain_masks[members]]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_matches_the_formula_with_floor_and_ceiling():
    images = np.array([[[0.0, 10.0, 20.0, 30.0, 90.0]]])
    brain_masks = np.array([[[True, True, True, True, True]]])
    expected = [FOREGROUND_FLOOR, 0.2, 0.4, 0.6, 1.0]
    np.testing.assert_allclose(normalize_intensity(images, brain_masks)[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.ones((8, 8))}, ["images", "(8, 8)"]),
        ({"brain_masks": np.ones((3, 8, 8))}, ["brain_masks", "(3, 8, 8)", "(3, 32, 32)"]),
        ({"subjects": ["a", "b"]}, ["subjects", "(2,)"]),
        ({"center": "percentile"}, ["center", "'percentile'"]),
        ({"target": 1.5}, ["target", "1.5"]),
        ({"images": np.full((3, 32, 32), -2.0)}, ["images", "-2", "positive"]),
        ({"images": np.full((3, 32, 32), np.nan)}, ["images", "NaN", "finite"]),
    ],
)
def test_bad_arguments_are_named(change, words):
    images, brain_masks = tissue_slices()
    arguments = {"images": images, "brain_masks": brain_masks, **change}
    with pytest.raises(ValueError) as error:
        normalize_intensity(**arguments)
    assert all(word in str(error.value) for word in words)


def test_subject_without_brain_is_named():
    images, brain_masks = tissue_slices()
    brain_masks[1] = False
    with pytest.raises(ValueError, match=r"brain_masks must have a brain pixel.*'IXI007'"):
        normalize_intensity(images, brain_masks, subjects=["IXI002", "IXI007", "IXI009"])
