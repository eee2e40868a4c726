import sys

import numpy as np
import pytest

from madad.mri.intensity import (
    FOREGROUND_FLOOR,
    brain_deciles,
    correct_bias,
    normalize_intensity,
)


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


def brain_volume(shape=(24, 28, 22), seed=0):
    """Return two tissues with noise in a ball, and the ball."""
    rng = np.random.default_rng(seed)
    place = np.moveaxis(np.indices(shape), 0, -1) / (np.array(shape) - 1) - 0.5
    brain_mask = np.linalg.norm(place, axis=-1) < 0.45
    tissue = np.where(np.linalg.norm(place, axis=-1) < 0.3, 300.0, 200.0) + rng.normal(0, 4, shape)
    return (tissue * brain_mask).astype(np.float32), brain_mask, place


class TestCorrectBias:
    @pytest.fixture(autouse=True)
    def simpleitk(self):
        return pytest.importorskip("SimpleITK", reason="needs the extra mri")

    def test_planted_field_is_removed_and_the_unit_stays(self):
        values, brain_mask, place = brain_volume()
        field = np.exp(0.6 * place[..., 0] - 0.5 * place[..., 2])
        corrected = correct_bias(values * field, np.diag([5, 5, 6, 1]), brain_mask)
        assert corrected.dtype == np.float32
        assert corrected.shape == values.shape

        def unevenness(image):
            return np.std(np.log(image[brain_mask] / values[brain_mask]))

        assert unevenness(values * field) > 0.12
        assert unevenness(corrected) < 0.04
        log_ratio = np.log(corrected[brain_mask] / (values * field)[brain_mask])
        assert log_ratio.mean() == pytest.approx(0, abs=1e-5)
        np.testing.assert_array_equal(corrected == 0, values == 0)

    def test_axes_do_not_change_places(self):
        values, brain_mask, place = brain_volume()
        field = np.exp(0.8 * place[..., 1])
        corrected = correct_bias(values * field, np.diag([5, 5, 6, 1]), brain_mask)
        divisor = (values * field)[brain_mask] / corrected[brain_mask]
        assert np.corrcoef(divisor, field[brain_mask])[0, 1] > 0.95

    def test_unit_does_not_matter_and_threads_do_not(self, simpleitk):
        values, brain_mask, place = brain_volume()
        values = values * np.exp(0.6 * place[..., 0])
        once = correct_bias(values, np.diag([5, 5, 6, 1]), brain_mask)
        np.testing.assert_allclose(
            correct_bias(0.001 * values, np.diag([5, 5, 6, 1]), brain_mask), 0.001 * once, rtol=1e-3
        )
        threads = simpleitk.ProcessObject
        before = threads.GetGlobalDefaultNumberOfThreads()
        threads.SetGlobalDefaultNumberOfThreads(3)
        try:
            np.testing.assert_array_equal(correct_bias(values, np.diag([5, 5, 6, 1]), brain_mask), once)
        finally:
            threads.SetGlobalDefaultNumberOfThreads(before)

    def test_grid_is_in_millimetres(self):
        values, brain_mask, place = brain_volume()
        values = values * np.exp(0.6 * place[..., 0])
        every_voxel = correct_bias(values, np.diag([4, 4, 4, 1]), brain_mask)
        every_second = correct_bias(values, np.diag([4, 4, 4, 1]), brain_mask, grid_mm=8)
        smaller = correct_bias(values, np.diag([2, 2, 2, 1]), brain_mask)
        np.testing.assert_allclose(smaller, every_second, rtol=1e-3)
        assert np.abs(every_voxel - every_second).max() > 1
        thick = correct_bias(values, np.diag([4, 4, 8, 1]), brain_mask, grid_mm=8)
        assert np.abs(thick - every_second).max() > 1

    def test_voxels_not_above_zero_do_not_spoil_the_field(self):
        values, brain_mask, place = brain_volume()
        values = values * np.exp(0.6 * place[..., 0])
        holed = values.copy()
        holed[::3, ::3, ::3] *= -1
        holed[1::6, ::3, ::3] = 0
        corrected = correct_bias(holed, np.diag([5, 5, 6, 1]), brain_mask)
        assert np.isfinite(corrected).all()
        np.testing.assert_array_equal(np.sign(corrected), np.sign(holed))
        both = brain_mask & (holed > 0)
        whole = correct_bias(values, np.diag([5, 5, 6, 1]), brain_mask)
        assert np.std(np.log(corrected[both] / whole[both])) < 0.02

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"values": np.full((24, 28, 22), 3.0)}, ["values", "3 everywhere"]),
            ({"values": brain_volume()[0] - 260}, ["values", "above 0", "%"]),
            ({"affine": np.eye(3)}, ["affine", "(3, 3)"]),
            ({"brain_mask": np.zeros((24, 28, 22))}, ["brain_mask", "none"]),
            ({"grid_mm": 0}, ["grid_mm", "0"]),
        ],
    )
    def test_bad_arguments_are_named(self, change, words):
        values, brain_mask, _ = brain_volume()
        with pytest.raises(ValueError) as error:
            correct_bias(**({"values": values, "affine": np.eye(4), "brain_mask": brain_mask} | change))
        assert all(word in str(error.value) for word in words)


def test_bias_correction_without_simpleitk_names_the_extra(monkeypatch):
    values, brain_mask, _ = brain_volume()
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r'SimpleITK.*pip install "madad\[mri\]"'):
        correct_bias(values, np.eye(4), brain_mask)


def test_deciles_are_of_the_brain_alone():
    values, brain_mask, _ = brain_volume()
    changed = np.where(brain_mask, values, np.nan)
    ranked = np.sort(values[brain_mask])
    for share, decile in zip(np.arange(1, 10) / 10, brain_deciles(changed, brain_mask), strict=True):
        assert np.mean(ranked <= decile) == pytest.approx(share, abs=1 / len(ranked))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": np.full((24, 28, 22), np.nan)}, ["values", "NaN"]),
        ({"brain_mask": np.zeros((24, 28, 22))}, ["brain_mask", "none"]),
    ],
)
def test_bad_arguments_of_deciles_are_named(change, words):
    values, brain_mask, _ = brain_volume()
    with pytest.raises(ValueError) as error:
        brain_deciles(**({"values": values, "brain_mask": brain_mask} | change))
    assert all(word in str(error.value) for word in words)
