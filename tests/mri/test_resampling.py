import sys

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from madad.mri.resampling import (
    check_brain_mask,
    check_volume,
    largest_part,
    resample_mask,
    resample_to,
    simpleitk_on_one_thread,
    to_isotropic,
)

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-2.0, 2.5, 3.0]), [20.0, -30.0, -10.0]
)


def noise(shape=(14, 12, 10), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("order", [0, 1])
def test_same_grid_gives_the_same_array(order):
    values = noise()
    np.testing.assert_allclose(
        resample_to(values, OBLIQUE, values.shape, OBLIQUE, order=order), values, atol=1e-5
    )


@pytest.mark.parametrize("order", [0, 1])
def test_agrees_with_nibabel(order):
    values, target = (
        noise((20, 18, 16)),
        OBLIQUE @ nib.affines.from_matvec(np.diag([0.9, 0.8, 0.7]), [2.3, 2.2, 3.1]),
    )
    expected = resample_from_to(nib.Nifti1Image(values, OBLIQUE), ((15, 13, 11), target), order=order)
    resampled = resample_to(values, OBLIQUE, (15, 13, 11), target, order=order)
    np.testing.assert_allclose(resampled, expected.get_fdata(), atol=1e-5)


def test_matrix_moves_a_voxel_to_its_place_and_its_inverse_back():
    matrix = nib.affines.from_matvec(1.1 * nib.eulerangles.euler2mat(0.1, 0.2, 0.3), [5.0, 3.0, -2.0])
    labels = np.zeros((14, 12, 10), dtype=np.uint8)
    labels[3, 7, 5] = 7
    place_mm = nib.affines.apply_affine(matrix @ OBLIQUE, [3, 7, 5])
    shape, target = (80, 80, 80), nib.affines.from_matvec(np.eye(3), np.round(place_mm) - 40)
    there = resample_to(labels, OBLIQUE, shape, target, matrix, order=0)
    assert there.dtype == np.uint8
    assert set(np.unique(there)) == {0, 7}
    center = nib.affines.apply_affine(target, np.argwhere(there).mean(axis=0))
    np.testing.assert_allclose(center, place_mm, atol=0.3)
    back = resample_to(there, target, labels.shape, OBLIQUE, np.linalg.inv(matrix), order=0)
    np.testing.assert_array_equal(back, labels)


def test_outermost_voxels_reach_to_their_faces():
    ones = np.ones((4, 4, 4), dtype=bool)
    shifted = nib.affines.from_matvec(np.eye(3), [-0.4, 0.4, 0.4])
    assert resample_to(ones, np.eye(4), ones.shape, shifted, order=0).all()
    assert resample_mask(ones, np.eye(4), ones.shape, nib.affines.from_matvec(np.eye(3), [0.4, 0, 0])).all()
    assert not resample_to(ones, np.eye(4), ones.shape, nib.affines.from_matvec(np.eye(3), [9, 0, 0])).any()


@pytest.mark.parametrize("margin_mm", [0, 6])
def test_cubes_hold_the_region_at_its_place(margin_mm):
    values = np.zeros((14, 12, 10), dtype=np.float32)
    region = np.zeros(values.shape, dtype=bool)
    region[4:10, 3:9, 2:8] = True
    values[region] = 1
    cubes, affine = to_isotropic(values, OBLIQUE, region, 1.0, margin_mm=margin_mm)
    np.testing.assert_array_equal(affine[:3, :3], np.eye(3))
    center_mm = nib.affines.apply_affine(affine, np.argwhere(cubes > 0.5).mean(axis=0))
    np.testing.assert_allclose(center_mm, nib.affines.apply_affine(OBLIQUE, [6.5, 5.5, 4.5]), atol=0.1)
    litres = cubes.sum() / abs(np.linalg.det(OBLIQUE))
    assert litres == pytest.approx(region.sum(), rel=0.15 if margin_mm == 0 else 0.02)
    assert (cubes[0] < 0.5).all() and (cubes[:, :, -1] < 0.5).all()


def test_fine_noise_is_smoothed_before_it_is_thinned_out():
    values = noise((60, 60, 60))
    cubes, _ = to_isotropic(values, np.eye(4), np.ones(values.shape, dtype=bool), 4.0)
    assert cubes.std() < 0.2


def test_largest_part_and_none():
    mask = np.zeros((8, 8, 8), dtype=bool)
    mask[0, 0, :3] = mask[2:5, 2:5, 2:5] = True
    mask[1, 1, 3] = True  # touches neither by a face
    expected = np.zeros_like(mask)
    expected[2:5, 2:5, 2:5] = True
    np.testing.assert_array_equal(largest_part(mask), expected)
    assert not largest_part(np.zeros((3, 3, 3), dtype=bool)).any()


@pytest.mark.parametrize(
    ("values", "affine", "words"),
    [
        (np.ones((4, 4)), np.eye(4), ["values", "(4, 4)", "one volume"]),
        (np.full((2, 2, 2), 5.0), np.eye(4), ["values", "5 everywhere"]),
        (np.zeros((0, 2, 2)), np.eye(4), ["values", "no voxel"]),
        (np.array([[[1, np.nan, np.inf]]]), np.eye(4), ["values", "finite", "2 voxels"]),
        (noise(), np.eye(3), ["affine", "(3, 3)"]),
        (noise(), np.zeros((4, 4)), ["affine", "invertible"]),
        (noise(), np.full((4, 4), np.nan), ["affine", "finite"]),
    ],
)
def test_bad_volumes_are_named(values, affine, words):
    with pytest.raises(ValueError) as error:
        check_volume(values, affine)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((2, 2, 2)), ["brain_mask", "(2, 2, 2)", "(14, 12, 10)"]),
        (np.zeros((14, 12, 10)), ["brain_mask", "none"]),
    ],
)
def test_bad_masks_are_named(mask, words):
    with pytest.raises(ValueError) as error:
        check_brain_mask(mask, noise())
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": 3}, ["order", "3"]),
        ({"values": np.ones((3, 3))}, ["values", "(3, 3)"]),
        ({"target_shape": (3, 3)}, ["target_shape", "(3, 3)"]),
        ({"target_affine": np.zeros((4, 4))}, ["target_affine", "invertible"]),
        ({"matrix": np.eye(3)}, ["matrix", "(3, 3)"]),
    ],
)
def test_bad_arguments_of_resampling_are_named(change, words):
    arguments = {
        "values": noise(),
        "affine": np.eye(4),
        "target_shape": (3, 3, 3),
        "target_affine": np.eye(4),
    }
    with pytest.raises(ValueError) as error:
        resample_to(**(arguments | change))
    assert all(word in str(error.value) for word in words)


def test_threads_are_given_back():
    SimpleITK = pytest.importorskip("SimpleITK", reason="needs the extra mri")
    ask = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads
    before = ask()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
    try:
        with pytest.raises(KeyError), simpleitk_on_one_thread():
            assert ask() == 1
            raise KeyError
        assert ask() == 3
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def test_missing_simpleitk_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with (
        pytest.raises(ImportError, match=r'SimpleITK.*pip install "madad\[mri\]"'),
        simpleitk_on_one_thread(),
    ):
        pass
