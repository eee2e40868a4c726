import warnings

import numpy as np
import pytest

from madad.metrics._sorted_images import SortedImages


def drawn(seed, n=9, n_values=30):
    """Lesion and healthy values of images, with ties; some images lack one or both."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 40, (n, 2)) * (rng.random((n, 2)) < 0.8)
    sizes[0] = 25
    return [tuple(rng.integers(0, n_values, size).astype(np.float32) for size in pair) for pair in sizes]


@pytest.fixture(params=["memory", "folder"])
def kept(request, tmp_path):
    images = SortedImages(tmp_path if request.param == "folder" else None)
    yield images
    images.close()


@pytest.mark.parametrize("seed", range(2))
def test_images_come_back_sorted(seed, kept):
    images = drawn(seed)
    kept.add(images[:4])
    kept.add(images[4:])
    assert kept.n_lesion.tolist() == [len(lesion) for lesion, _ in images]
    assert kept.n_healthy.tolist() == [len(healthy) for _, healthy in images]
    for i, (lesion, healthy) in reversed(list(enumerate(images))):
        np.testing.assert_array_equal(kept.lesion(i), np.sort(lesion))
        np.testing.assert_array_equal(kept.healthy(i), np.sort(healthy))
        n_overlap, n_predicted = kept.counts_at(i, np.arange(5, dtype=np.float32))
        for at in range(5):
            assert n_overlap[at] == (lesion >= at).sum()
            assert n_predicted[at] == n_overlap[at] + (healthy >= at).sum()


def test_images_of_two_precisions_come_back_in_the_finer_one(kept):
    kept.add([(np.float32([0.1]), np.float32([0.3, 0.2, 0.4]))])
    assert kept.lesion(0).dtype == np.float32
    kept.add([(np.array([0.1]), np.array([]))])
    assert kept.lesion(0).dtype == kept.healthy(1).dtype == np.float64
    assert kept.lesion(0)[0] == np.float32(0.1) and kept.lesion(1)[0] == 0.1


@pytest.mark.parametrize(("size", "n_values"), [(1, 30), (5, 2), (40, 10**6), (10**6, 30)])
def test_lesion_levels_are_all_values_in_ranges_of_bounded_size(size, n_values, kept):
    images = drawn(3, n_values=n_values)
    kept.add(images)
    values, counts = np.unique(np.concatenate([lesion for lesion, _ in images]), return_counts=True)
    ranges = list(kept.lesion_levels(size))
    np.testing.assert_array_equal(np.concatenate([levels.values for levels in ranges[::-1]]), values)
    np.testing.assert_array_equal(np.concatenate([levels.counts for levels in ranges[::-1]]), counts)
    assert [levels.high for levels in ranges] == [np.inf, *(levels.values[0] for levels in ranges[:-1])]
    for levels in ranges:  # but for the pixels of one value, which never part
        assert levels.counts[1:].sum() <= max(size, len(images))


def test_after_an_error_no_image_is_in(kept):
    images = drawn(1)

    def broken():
        yield images[0]
        raise RuntimeError("no more")

    kept.add(images[1:3])
    with pytest.raises(RuntimeError, match="no more"):
        kept.add(broken())
    kept.add(images[3:])
    assert len(kept) == 8
    for i, (lesion, _) in enumerate(images[1:]):
        np.testing.assert_array_equal(kept.lesion(i), np.sort(lesion))


def test_the_file_is_gone_with_the_images(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = SortedImages(tmp_path)
        images.add(drawn(0))
        del images  # closes the file: one left open would warn
    assert not list(tmp_path.iterdir())


def test_folder_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"directory must be a folder, got '.*missing'\. Create it"):
        SortedImages(tmp_path / "missing")
