import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.utils.estimator_checks import parametrize_with_checks

from madad.baselines.intensity_threshold import TAILS, IntensityThreshold
from madad.datasets import make_brain_slices


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0.05, 1, (4, 12, 10)).astype(np.float32)


@pytest.fixture
def brain_masks(images):
    masks = np.zeros(images.shape, bool)
    masks[:, 2:10, 1:9] = True
    masks[3] = False  # a slice without brain
    return masks


@pytest.fixture(scope="module")
def healthy():
    return make_brain_slices(24, size=32, random_state=0)


FORMULAS = {
    "bright": lambda x, brain: x,
    "dark": lambda x, brain: 1 - x,
    "both": lambda x, brain: np.abs(x - np.median(x[brain])) if brain.any() else x,
}


def maps_of(images, brain_masks, **parameters):
    baseline = IntensityThreshold(random_state=0, **parameters).fit(images, brain_mask=brain_masks)
    return baseline.predict_maps(images, brain_mask=brain_masks)


@pytest.mark.parametrize("tail", TAILS)
def test_its_maps_are_intensities_smoothed_by_a_pixel(tail, images, brain_masks):
    maps = maps_of(images, brain_masks, tail=tail)
    assert maps.dtype == np.float32
    for x, brain, found in zip(images, brain_masks, maps, strict=True):
        raw = np.where(brain, FORMULAS[tail](x.astype(np.float64), brain), 0)
        expected = np.where(brain, gaussian_filter(raw, 1.0, mode="constant"), 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bright_and_dark_rank_in_opposite_order(images, brain_masks):
    bright, dark = (maps_of(images, brain_masks, tail=tail, smoothing_px=0)[0] for tail in ("bright", "dark"))
    inside = brain_masks[0]
    np.testing.assert_array_equal(np.argsort(bright[inside]), np.argsort(dark[inside])[::-1])


def test_another_tail_raises(images, brain_masks):
    with pytest.raises(ValueError, match=r"tail must be one of .* got 'left'. Use 'both'"):
        maps_of(images, brain_masks, tail="left")


@parametrize_with_checks([IntensityThreshold(tail="both", intensity_range="data", random_state=0)])
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("tail", TAILS)
def test_equalized_intensities_are_mid_ranks(tail, images, brain_masks):
    images = np.round(images, 1)  # with many ties
    baseline = IntensityThreshold(tail=tail, equalize=True, smoothing_px=0, random_state=0)
    maps = baseline.fit(images, brain_mask=brain_masks).predict_maps(images, brain_mask=brain_masks)
    for x, brain, found in zip(images[:3], brain_masks, maps, strict=False):
        values = x[brain]
        below = (values[None] < values[:, None]).mean(axis=1)  # the distribution function, ties half below
        equal = (values[None] == values[:, None]).mean(axis=1)
        ranks = np.zeros(x.shape)
        ranks[brain] = below + equal / 2
        np.testing.assert_allclose(found, np.where(brain, FORMULAS[tail](ranks, brain), 0), atol=1e-6)
    assert not maps[3].any()


def test_equalized_maps_do_not_change_with_contrast(images, brain_masks):
    baseline = IntensityThreshold(tail="both", equalize=True, random_state=0).fit(
        images, brain_mask=brain_masks
    )
    maps = [baseline.predict_maps(x, brain_mask=brain_masks) for x in (images, images**2)]
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize("equalize", [False, True])
def test_channels_are_averaged(equalize, images, brain_masks):
    channels = np.stack([images, images[:, ::-1]], axis=1)
    parameters = {"tail": "both", "equalize": equalize, "random_state": 0}
    joint = IntensityThreshold(**parameters).fit(channels, brain_mask=brain_masks)
    single = IntensityThreshold(**parameters).fit(images, brain_mask=brain_masks)
    expected = np.mean(
        [single.predict_maps(channels[:, i], brain_mask=brain_masks) for i in range(2)], axis=0
    )
    found = joint.predict_maps(channels, brain_mask=brain_masks)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("equalize", [False, True])
def test_maps_do_not_depend_on_company_or_order(equalize, healthy):
    baseline = IntensityThreshold(tail="both", equalize=equalize, batch_size=4, random_state=0)
    X = healthy.images
    maps = baseline.fit(X, groups=healthy.subjects).predict_maps(X)
    for rows in (np.array([7]), np.arange(24)[::-1], np.array([3, 3, 20, 1, 0])):
        np.testing.assert_array_equal(baseline.predict_maps(X[rows]), maps[rows])
    np.testing.assert_array_equal(baseline.set_params(batch_size=16).predict_maps(X), maps)
    assert 0 < maps.max() <= 1 and maps.min() == 0 and not maps[X == 0].any()


@pytest.mark.parametrize("equalize", [False, True])
def test_a_bright_square_is_found(equalize, healthy):
    X = healthy.images.copy()
    X[:, 13:18, 13:18] = 1
    baseline = IntensityThreshold(equalize=equalize, random_state=0).fit(healthy.images)
    assert baseline.score_samples(X).mean() < baseline.score_samples(healthy.images).mean()
    maps = baseline.predict_maps(X)
    assert (maps[:, 15, 15] >= 0.9 * maps.max(axis=(1, 2))).all()


def test_save_and_load(healthy, tmp_path):
    baseline = IntensityThreshold(tail="both", equalize=True, contamination=0.1, random_state=0)
    baseline.fit(healthy.images, groups=healthy.subjects).save(tmp_path / "model")
    loaded = IntensityThreshold.load(tmp_path / "model")
    assert loaded.get_params() == baseline.get_params()
    for call in ("predict_maps", "predict_masks", "decision_function", "predict"):
        np.testing.assert_array_equal(
            getattr(loaded, call)(healthy.images), getattr(baseline, call)(healthy.images)
        )


def test_another_tail_needs_new_thresholds(healthy):
    baseline = IntensityThreshold(random_state=0).fit(healthy.images).set_params(tail="dark")
    with pytest.warns(UserWarning, match=r"calibrated with \{'tail': 'bright'\}, now \{'tail': 'dark'\}"):
        baseline.predict(healthy.images)
    baseline.calibrate(healthy.images).predict(healthy.images)


def test_parameters_outside_their_ranges_are_named(healthy):
    for name, value in (("tail", "left"), ("smoothing_px", -1)):
        with pytest.raises(ValueError, match=rf"{name} must .* got {value!r}\. Use") as error:
            IntensityThreshold(**{name: value}).fit(healthy.images)
        assert "\n" not in str(error.value)
    fitted = IntensityThreshold(random_state=0).fit(healthy.images)
    with pytest.raises(ValueError, match="tail must be one of"):
        fitted.set_params(tail="left").predict_maps(healthy.images)
