import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from madad.datasets import Scan, load_scans, load_slices

SHAPE = (40, 50, 30)  # voxels to the right, to the front, up
MM = (2.0, 2.5, 3.0)
ORIGIN_MM = (-41.0, -70.0, -45.0)
LESION_MM = (17.0, 5.0, 9.0)  # right, anterior, superior: away from every plane of symmetry


def voxel(point_mm):
    return tuple(round((at - start) / step) for at, start, step in zip(point_mm, ORIGIN_MM, MM, strict=True))


def volumes(shape=SHAPE):
    """An ellipsoid of 100 with a 5 x 5 x 3 lesion of 150 and label 4, in axes R, A, S; and the brain."""
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    radius = sum(((axis - (n - 1) / 2) / (0.42 * n)) ** 2 for axis, n in zip(axes, shape, strict=True))
    brain = radius <= 1
    lesion = np.zeros(shape, np.uint8)
    x, y, z = voxel(LESION_MM)
    lesion[x - 2 : x + 3, y - 2 : y + 3, z - 1 : z + 2] = 4
    return np.where(lesion, 150, 100 * brain).astype(np.int16), brain.astype(np.uint8), lesion


def affine(mm=MM):
    matrix = np.diag([*mm, 1.0])
    matrix[:3, 3] = ORIGIN_MM
    return matrix


def write(path, array, axes="RAS", matrix=None):
    """Store the array so that its axes point as `axes` says, with the affine that says so."""
    image = nib.Nifti1Image(array, affine() if matrix is None else matrix)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    nib.save(image.as_reoriented(turn), path)
    return path


@pytest.fixture
def make(tmp_path):
    def scan(subject="a", axes="RAS", mask_axes=None, without=(), matrix=None, arrays=None, **changes):
        arrays = dict(zip(("image", "brain", "lesion"), arrays or volumes(), strict=True)) | changes
        paths = {
            name: write(
                tmp_path / f"{subject}-{name}.nii.gz",
                array,
                axes if name == "image" else mask_axes or axes,
                matrix,
            )
            for name, array in arrays.items()
            if name not in without
        }
        return Scan(subject, {"T1": paths["image"]}, paths.get("lesion"), paths.get("brain"))

    return scan


@pytest.mark.parametrize(("axes", "mask_axes"), [("RAS", None), ("LPS", None), ("PSR", None), ("ASL", "RPI")])
def test_a_point_of_the_world_is_where_it_belongs(make, axes, mask_axes):
    data = load_scans([make(axes=axes, mask_axes=mask_axes)], contrast="t1")
    x, y, z = voxel(LESION_MM)
    image, brain, lesion = volumes()
    heights = np.flatnonzero(brain.any(axis=(0, 1)))
    np.testing.assert_array_equal(data.z_index, heights)
    np.testing.assert_allclose(data.z_frac, np.linspace(0, 1, len(heights)), atol=1e-6)
    assert data.z_frac.dtype == np.float32 and data.images.dtype == np.float32
    k, rows, columns = np.nonzero(data.lesion_masks)
    assert {*data.z_index[k]} == {z - 1, z, z + 1}
    assert {*rows} == {*range(SHAPE[1] - 1 - y - 2, SHAPE[1] - 1 - y + 3)}  # in front: in the upper half
    assert {*columns} == {*range(x - 2, x + 3)}  # on the right of the person: in the right half
    assert rows.max() < SHAPE[1] / 2 and columns.min() > SHAPE[0] / 2
    np.testing.assert_allclose(data.images[data.lesion_masks], 0.6, rtol=1e-6)
    np.testing.assert_allclose(data.images[data.brain_masks & ~data.lesion_masks], 0.4, rtol=1e-6)
    np.testing.assert_array_equal(data.images > 0, data.brain_masks)
    assert data.brain_masks.sum() == brain.sum() and data.lesion_masks.sum() == (lesion > 0).sum()
    assert data.spacing_mm == pytest.approx((2.5, 2.0))
    assert data.subjects.tolist() == ["a"] * len(heights) and data.modality == "T1" and data.has_lesion_masks


def test_the_result_is_that_of_load_slices(make, tmp_path):
    image, brain, lesion = (array[:, ::-1].transpose(2, 1, 0) for array in volumes())
    keep = brain.any(axis=(1, 2))
    np.savez(
        tmp_path / "a.npz",
        image=image[keep],
        brain_mask=brain[keep],
        lesion_mask=lesion[keep],
        subject=np.full(keep.sum(), "a"),
        z_frac=np.linspace(0, 1, keep.sum()),
        spacing_mm=np.array([2.5, 2.0]),
    )
    options = {"z_range": (0.3, 0.8), "size": 64, "spacing_mm": 2.0, "center": "mode"}
    data, expected = (
        load_scans([make()], contrast="T1", **options),
        load_slices(tmp_path / "a.npz", **options),
    )
    for key in ("images", "brain_masks", "lesion_masks", "subjects"):
        np.testing.assert_array_equal(data[key], expected[key])
    assert data.spacing_mm == expected.spacing_mm
    assert set(data) == set(expected) | {"z_index"}


def test_slices_are_chosen_by_height_step_and_lesion(make):
    scan = make(axes="LPS")
    all_ = load_scans([scan], contrast="T1")
    some = load_scans([scan], contrast="T1", z_range=(0.25, 0.75), every=3)
    inside = all_.z_index[(all_.z_frac >= 0.25) & (all_.z_frac <= 0.75)]
    np.testing.assert_array_equal(some.z_index, inside[::3])
    _, brain, lesion = volumes()
    z = voxel(LESION_MM)[2]
    lesion[:, :, z + 1] = 0
    lesion[2:6, 2:6, z - 1] = 1  # a larger one, but outside the brain
    lesion[voxel(LESION_MM)[0] + 3, voxel(LESION_MM)[1], z] = 1
    one = load_scans([make("b", lesion=lesion)], contrast="T1", largest_lesion_only=True)
    assert one.z_index.tolist() == [z] and one.images.shape[0] == 1
    assert one.lesion_masks.sum() == 26


def test_the_largest_lesion_does_not_set_the_scale(make):
    image, brain, lesion = volumes()
    z = voxel(LESION_MM)[2]
    lesion[:, :, z] = brain[:, :, z]  # fills its slice
    scan = make(image=np.where(lesion, 150, image).astype(np.int16), lesion=lesion)
    data = load_scans([scan], contrast="T1", largest_lesion_only=True)
    np.testing.assert_allclose(data.images[data.brain_masks], 0.6, rtol=1e-6)


def test_scans_without_a_lesion_in_reach_are_left_out(make):
    empty = make("b", lesion=np.zeros(SHAPE, np.uint8))
    data = load_scans([make("a"), empty, make("c")], contrast="T1", largest_lesion_only=True)
    assert data.subjects.tolist() == ["a", "c"]
    with pytest.raises(ValueError, match=r"scans must have a lesion.*1 scans and z_range \(0, 0.2\).*Widen"):
        load_scans([make("a")], contrast="T1", largest_lesion_only=True, z_range=(0, 0.2))


def test_a_stripped_volume_is_its_own_brain_mask(make):
    masked, stripped = make("a"), make("b", without=("brain",))
    data = load_scans([masked, stripped], contrast="T1")
    half = len(data.images) // 2
    np.testing.assert_array_equal(data.images[:half], data.images[half:])


def test_grids_are_brought_together(make):
    coarse = volumes()
    fine = tuple(np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)[:, 1:] for array in coarse)
    scans = [make("a"), make("b", arrays=fine, matrix=affine((1.0, 1.25, 3.0)))]
    with pytest.raises(ValueError) as error:
        load_scans(scans, contrast="T1")
    for word in ("size and spacing_mm", "(50, 40)", "2.5 x 2 mm", "'b'", "(99, 80)", "Set both"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match=r"size and spacing_mm .*None and 2\.0"):
        load_scans(scans, contrast="T1", spacing_mm=2.0)
    data = load_scans(scans, contrast="T1", spacing_mm=2.0, size=72)
    assert data.images.shape[1:] == (72, 72) and data.spacing_mm == pytest.approx((2.0, 2.0))
    area = [data.brain_masks[data.subjects == subject].sum() for subject in "ab"]
    assert area[0] == pytest.approx(area[1], rel=0.03)
    same_pixel_count = load_scans(scans, contrast="T1", size=32)
    assert same_pixel_count.images.shape[1:] == (32, 32) and same_pixel_count.spacing_mm is None


def test_equal_shapes_with_other_pixels_are_no_common_grid(make):
    scans = [make("a"), make("b", matrix=affine((1.0, 1.0, 3.0)))]
    with pytest.raises(ValueError, match=r"one grid, got None and None .*2.5 x 2 mm.*'b'.*1 x 1 mm"):
        load_scans(scans, contrast="T1")


def test_eight_bit_volumes_keep_their_values(make):
    image = volumes()[0].astype(np.uint8)
    data = load_scans([make(image=image)], contrast="T1", center=None)
    np.testing.assert_allclose(data.images[data.lesion_masks], 150 / 255, rtol=1e-6)
    with pytest.raises(ValueError, match="center must be .* unless images are uint8, got None with int16"):
        load_scans([make()], contrast="T1", center=None)


def test_values_around_the_brain_may_be_anything(make):
    image, brain, _ = volumes()
    image = np.where(brain, image, np.nan).astype(np.float32)
    for scan in (make(image=image[..., None]), make("b", image=image, without=("brain",))):
        with pytest.warns(UserWarning, match="image.nii.gz' should be finite, got NaN"):
            data = load_scans([scan], contrast="T1")
        assert np.isfinite(data.images).all() and data.brain_masks.sum() == brain.sum()


def with_skull():
    return np.maximum(volumes()[0], 20)


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ({}, {"contrast": "T2"}, ["contrast", "'T2'", "'a'", "['T1']", "Leave out"]),
        ({}, {"every": 0}, ["every", "0", "1 keeps all"]),
        ({}, {"every": 1.5}, ["every", "1.5"]),
        ({}, {"z_range": (2, 3)}, ["z_range", "(2, 3)", "'a'", "Widen"]),
        ({}, {"size": 8, "spacing_mm": 2.0}, ["size", "got 8", "'a'", "larger"]),
        ({}, {"spacing_mm": -1.0}, ["spacing_mm", "-1.0"]),
        ({}, {"center": "mean"}, ["center", "'mean'"]),
        ({"image": with_skull(), "without": ["brain"]}, {}, ["brain_mask", "None for 'a'", "0%", "strip"]),
        ({"image": np.ones((*SHAPE, 2))}, {}, ["one volume", "(40, 50, 30, 2)", "a-image", "Save"]),
        ({"lesion": np.ones((9, 50, 30))}, {}, ["a-lesion", "(9, 50, 30)", str(SHAPE), "a-image", "nearest"]),
        ({"brain": np.ones((9, 50, 30))}, {}, ["a-brain", "(9, 50, 30)", str(SHAPE), "a-image", "nearest"]),
        ({"brain": np.zeros(SHAPE)}, {}, ["brain_mask", "'a'", "Leave it out"]),
        ({"without": ["lesion"]}, {"largest_lesion_only": True}, ["largest_lesion_only", "True", "'a'"]),
    ],
)
def test_bad_scans_and_arguments_are_named(make, content, arguments, words):
    with pytest.raises(ValueError) as error:
        load_scans([make(**content)], **{"contrast": "T1"} | arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_head_whose_air_is_zero_is_not_taken_for_a_brain(make):
    scan = make(matrix=affine((5.5, 5.5, 5.5)), without=("brain",))
    with pytest.raises(ValueError, match=r"brain_mask .*above 0 in 3\.\d+ litres.*69% background"):
        load_scans([scan], contrast="T1")
    z_scores = (volumes()[0] - 100.0) * volumes()[1]
    with pytest.raises(ValueError, match=r"brain_mask .*below 0 in \d+ voxels"):
        load_scans([make(image=z_scores - 5 * volumes()[1], without=("brain",))], contrast="T1")


def test_a_mask_of_equal_shape_elsewhere_is_refused(make, tmp_path):
    matrix = affine()
    matrix[1, 3] += 10
    moved = write(tmp_path / "moved.nii.gz", volumes()[2], matrix=matrix)
    scan = dataclasses.replace(make(), lesion_mask=moved)
    with pytest.raises(ValueError, match=r"one grid, got 10\.00 mm .*a-image.*moved\.nii\.gz\. Resample"):
        load_scans([scan], contrast="T1")


def test_mixed_cohorts_and_missing_files_are_named(make, tmp_path):
    with pytest.raises(ValueError, match=r"scans must hold a Scan, got none.*find_bids"):
        load_scans([], contrast="T1")
    with pytest.raises(ValueError, match=r"lesion mask or none, got 1 of 2 without, such as 'b'.*apart"):
        load_scans([make("a"), make("b", without=("lesion",))], contrast="T1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_scans([Scan("a", {"T1": tmp_path / "nowhere.nii.gz"})], contrast="T1")
    (tmp_path / "text.nii.gz").write_text("text")
    with pytest.raises(ValueError, match=r"must name a whole NIfTI file, got .*text\.nii\.gz"):
        load_scans([Scan("a", {"T1": tmp_path / "text.nii.gz"})], contrast="T1")


def test_a_scan_without_lesion_mask_is_healthy_or_unknown(make):
    data = load_scans([make(without=("lesion",))], contrast="T1")
    assert not data.has_lesion_masks and not data.lesion_masks.any()


def crop(images, rows, columns):
    return images[:, rows : rows + 192, columns : columns + 160]


def test_brats_volume_gives_the_slices_of_the_npz_file(data_dir):
    stem = data_dir / "volumes" / "lesion_Brats18_TCIA10_639_1"
    scan = Scan("Brats18_TCIA10_639_1", {"flair": Path(f"{stem}_flair.nii.gz")}, Path(f"{stem}_seg.nii.gz"))
    data = load_scans([scan], contrast="FLAIR")
    with np.load(data_dir / "brats_multicontrast.npz") as file:
        mine = file["subject"] == scan.subject
        expected = {key: file[key][mine] for key in ("brain_mask", "lesion_mask", "z_index", "z_frac")}
        expected["image"] = file["image_flair"][mine].astype(np.float32)
    at = np.searchsorted(data.z_index, expected["z_index"])
    np.testing.assert_array_equal(data.z_index[at], expected["z_index"])
    np.testing.assert_allclose(data.z_frac[at], expected["z_frac"], atol=1e-6)
    corner = (33, 40)
    np.testing.assert_array_equal(crop(data.lesion_masks[at], *corner), expected["lesion_mask"] > 0)
    np.testing.assert_array_equal(crop(data.brain_masks[at], *corner), expected["brain_mask"] > 0)
    image, unclipped = crop(data.images[at], *corner), expected["image"] < 255
    inside = (expected["brain_mask"] > 0) & unclipped & (image < 1)
    assert np.corrcoef(image[inside], expected["image"][inside])[0, 1] > 0.9999


def test_healthy_head_gives_the_slices_of_the_npz_file(data_dir):
    stem = data_dir / "volumes" / "healthy_IXI012-HH-1211_T1_2mm"
    scan = Scan(
        "IXI012-HH-1211",
        {"T1": Path(f"{stem}.nii.gz")},
        brain_mask=Path(f"{stem}_DLMUSE_labels.nii.gz"),
    )
    options = {"z_range": (0.35, 0.9), "size": 128, "spacing_mm": 2.0}
    data = load_scans([scan], contrast="T1", **options)
    expected = load_slices(data_dir / "ixi_t1_2mm.npz", **options)
    mine = expected.subjects == scan.subject
    np.testing.assert_allclose(data.z_frac, expected.z_frac[mine], atol=1e-6)
    both = data.brain_masks & expected.brain_masks[mine]
    assert 2 * both.sum() / (data.brain_masks.sum() + expected.brain_masks[mine].sum()) > 0.99
    both &= expected.images[mine] < 0.7  # brighter pixels are clipped at 255 in the file
    np.testing.assert_allclose(data.images[both], expected.images[mine][both], atol=0.005)
    with pytest.raises(ValueError, match="strip the skull"):
        load_scans([dataclasses.replace(scan, brain_mask=None)], contrast="T1")


@pytest.mark.parametrize("patient", ["patient07", "patient19"])
def test_stripped_ms_volumes_need_no_brain_mask(data_dir, patient):
    stem = data_dir / "volumes" / f"lesion_ms_{patient}"
    scan = Scan(
        patient,
        {"FLAIR": Path(f"{stem}_FLAIR.nii.gz")},
        Path(f"{stem}_lesion.nii.gz"),
        Path(f"{stem}_brainmask.nii.gz"),
    )
    data = load_scans([scan], contrast="FLAIR", every=8)
    alone = load_scans([dataclasses.replace(scan, brain_mask=None)], contrast="FLAIR", every=8)
    overlap = (data.brain_masks & alone.brain_masks).sum() / data.brain_masks.sum()
    assert overlap > 0.99
    lesion = nib.load(scan.lesion_mask).get_fdata()
    assert data.lesion_masks.sum() == pytest.approx((lesion[:, :, data.z_index] > 0).sum(), rel=0.01)
