import os
from pathlib import Path

import numpy as np
import pytest

import madad.base.slice_stack
from madad.base.check_slices import check_slices

RNG = np.random.default_rng(0)
X3 = RNG.random((5, 4, 6)).astype(np.float32)
X4 = RNG.random((5, 2, 4, 6)).astype(np.float32)


@pytest.mark.parametrize("n_features, image_shape", [(24, (4, 6)), (25, None), (23, None), (48, (2, 4, 6))])
def test_unfold_gives_maps_in_the_layout_of_flat_rows(n_features, image_shape):
    stack = check_slices(RNG.random((3, n_features)), image_shape=image_shape)
    channels, height, width = stack.image_shape
    maps = RNG.random((3, height, width))
    unfolded = stack.unfold(maps)
    assert unfolded.shape == (3, n_features // channels)
    np.testing.assert_array_equal(unfolded, maps.reshape(3, -1)[:, : n_features // channels])


def test_unfold_leaves_maps_of_images():
    maps = RNG.random((5, 4, 6))
    assert check_slices(X4).unfold(maps) is maps


def test_subset_of_a_subset_counts_from_the_subset():
    stack = check_slices(X3, brain_mask=X3 > 0.5)
    twice = stack.subset(np.array([4, 2, 1])).subset(np.array([2, 0]))
    assert len(twice) == 2
    np.testing.assert_array_equal(twice.images([0, 1])[:, 0], X3[[1, 4]])
    np.testing.assert_array_equal(twice.brain([0, 1])[:, 0], X3[[1, 4]] > 0.5)


# Files


def in_file(array, path, mode="r"):
    array.tofile(path)
    return np.memmap(path, array.dtype, mode, shape=array.shape)


@pytest.mark.parametrize("rows_per_check", [1, 3, 256])
def test_equal_samples_have_one_digest_whatever_holds_them(tmp_path, monkeypatch, rows_per_check):
    monkeypatch.setattr(madad.base.slice_stack, "ROWS_PER_CHECK", rows_per_check)
    X = np.random.default_rng(0).random((7, 4, 6), dtype=np.float32)
    mask = X > 0.3
    expected = check_slices(X, brain_mask=mask).digest
    rows = np.array([4, 0, 5])
    for values in (in_file(X, tmp_path / "X"), np.asfortranarray(X), np.repeat(X, 2, axis=2)[:, :, ::2]):
        assert check_slices(values, brain_mask=mask).digest == expected
        assert check_slices(values, brain_mask=np.asfortranarray(mask.astype(np.uint8))).digest == expected
        part = check_slices(values).subset(rows)
        assert part.digest == check_slices(X[rows]).digest


def test_whatever_is_read_differently_has_another_digest():
    X = np.random.default_rng(0).random((7, 4, 6), dtype=np.float32)
    mask = X > 0.3
    others = [
        check_slices(X),
        check_slices(X, brain_mask=mask),
        check_slices(X, brain_mask=~mask),
        check_slices(X[::-1]),
        check_slices(X[:6]),
        check_slices(np.where(X == X[6, 3, 5], np.float32(0.5), X)),
        check_slices(X.astype(np.float64)),
        check_slices(X.reshape(7, 6, 4)),
        check_slices(X.reshape(7, 1, 4, 6)),
        check_slices(X, intensity_range=(0.0, 2.0)),
        check_slices(X.reshape(7, 24)),
        check_slices(X.reshape(7, 24), image_shape=(4, 6)),
    ]
    assert len({stack.digest for stack in others}) == len(others)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs smaps")
@pytest.mark.parametrize("view", [lambda X: X, lambda X: X[::-1, 2:], np.asarray])
def test_a_file_that_was_read_is_not_in_memory(tmp_path, view):
    X = in_file(np.full((600, 64, 64), 100, np.uint8), tmp_path / "X")
    stack = check_slices(view(X))
    for read in (stack.images, stack.brain, lambda rows: stack.digest):
        assert read(np.arange(600)) is not None
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if line.endswith(str(tmp_path / "X")))
        resident = next(line for line in lines[start:] if line.startswith("Rss:"))
        assert int(resident.split()[1]) < 100  # KiB of 2400


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_changes_of_a_map_are_kept(tmp_path, mode):
    X = in_file(np.zeros((300, 8, 8), np.uint8), tmp_path / "X", mode)
    X[7] = 255
    stack = check_slices(X, intensity_range="data")
    for _ in range(2):
        assert stack.images(np.array([7, 8])).sum() == 64 and stack.digest
    assert X[7].sum() == 64 * 255
