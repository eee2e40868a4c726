import nibabel as nib
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from scipy.spatial.transform import Rotation
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from madad.datasets import Scan, load_scans
from madad.mri.nifti import read_volume, write_like
from madad.mri.volume_slicer import VolumeSlicer

PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}  # slices, rows, columns
SHAPE = (12, 14, 10)
MM = (1.0, 1.5, 3.0)
ORIGIN_MM = (-13.5, 21.25, 7.0)
TOWARDS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
GRIDS = {
    "RAS": ("RAS", (0, 0, 0)),
    "LAS": ("LAS", (0, 0, 0)),
    "LPS": ("LPS", (0, 0, 0)),
    "PSR": ("PSR", (0, 0, 0)),
    "SLP": ("SLP", (0, 0, 0)),
    "oblique RAS": ("RAS", (20, -15, 10)),
    "oblique ASL": ("ASL", (-12, 25, 30)),
}


def grid_affine(grid="RAS", mm=MM):
    axes, degrees = GRIDS[grid]
    turned = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turned @ np.array([TOWARDS[axis] for axis in axes], dtype=float).T * mm
    matrix[:3, 3] = ORIGIN_MM
    return matrix


def ball(shape, center, radius):
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    return sum(((axis - at) / size) ** 2 for axis, at, size in zip(axes, center, radius, strict=True)) <= 1


BRAIN = ball(SHAPE, (6, 6, 4), (5, 5, 4))  # off the middle of the array
LESION = ball(SHAPE, (8, 4, 5), (1, 2, 1)) & BRAIN  # away from every plane of symmetry


def anatomy(shape=SHAPE):
    return np.random.default_rng(0).uniform(0.5, 1, shape).astype(np.float32)


def image_of(array=None, grid="RAS", mm=MM):
    return nib.Nifti1Image(anatomy() * BRAIN if array is None else array, grid_affine(grid, mm))


def world_mm(affine, mask):
    """World coordinates of a mask's voxels, as a sorted table."""
    points = nib.affines.apply_affine(affine, np.argwhere(mask))
    return points[np.lexsort(np.round(points, 6).T)]


@pytest.mark.parametrize(
    ("plane", "grid"), [("axial", "RAS"), ("axial", "SLP"), ("coronal", "PSR"), ("sagittal", "LPS")]
)
@pytest.mark.parametrize("axis", range(3), ids=["right", "front", "up"])
def test_slices_look_as_documented(plane, grid, axis):
    affine = grid_affine(grid)
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices(SHAPE), 0, -1))
    image = nib.Nifti1Image(points[..., axis].astype(np.float32), affine)
    images, _, geometry = VolumeSlicer(plane, spacing_mm=None).fit([image]).slices_of(image)
    images = images[:, (images != 0).any(axis=(0, 2))][:, :, (images != 0).any(axis=(0, 1))]
    slices, rows, columns = PLANES[plane]
    mm = read_volume(image).spacing_mm[axis]
    steps = [np.unique(np.diff(images, axis=along).round(4)).tolist() for along in range(3)]
    expected = [[mm if axis == slices else 0], [-mm if axis == rows else 0], [mm if axis == columns else 0]]
    assert steps == expected
    if axis == slices:
        np.testing.assert_allclose(images[:, 0, 0], geometry.positions_mm, rtol=1e-5)


def test_axial_slices_lie_as_those_of_load_scans(tmp_path):
    nib.save(image_of((100 * anatomy() * BRAIN).astype(np.int16), "PSR"), tmp_path / "t1.nii")
    nib.save(image_of(BRAIN.astype(np.uint8), "PSR"), tmp_path / "brain.nii")
    scan = Scan("a", {"T1": tmp_path / "t1.nii"}, brain_mask=tmp_path / "brain.nii")
    expected = load_scans([scan], contrast="T1").brain_masks
    slicer = VolumeSlicer(spacing_mm=None).fit([tmp_path / "t1.nii"])
    _, masks, _ = slicer.slices_of(tmp_path / "t1.nii", tmp_path / "brain.nii")

    def cropped(brain):
        return brain[:, brain.any(axis=(0, 2))][:, :, brain.any(axis=(0, 1))]

    np.testing.assert_array_equal(cropped(masks), cropped(expected))


@pytest.mark.parametrize(
    ("plane", "grid", "kind"),
    [
        ("axial", "RAS", "float.nii"),
        ("coronal", "LAS", "scaled.nii.gz"),
        ("sagittal", "LPS", "four.nii.gz"),
        ("axial", "PSR", "scaled.nii.gz"),
        ("coronal", "SLP", "four.nii.gz"),
        ("sagittal", "oblique RAS", "scaled.nii.gz"),
        ("axial", "oblique ASL", "four.nii.gz"),
        ("coronal", "oblique ASL", "float.nii"),
    ],
)
def test_a_lesion_returns_to_the_same_place_in_the_file(tmp_path, plane, grid, kind):
    painted = np.where(LESION, 4, anatomy() * BRAIN)
    if kind == "scaled.nii.gz":
        image = image_of((100 * painted).astype(np.int16), grid)
        image.header.set_slope_inter(0.01, 0)
    else:
        image = image_of(painted if kind == "float.nii" else painted[..., None], grid)
    image.set_sform(image.affine, code=4)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / kind)

    slicer = VolumeSlicer(plane, spacing_mm=None)
    images = slicer.fit_transform([tmp_path / kind])
    maps = (images > 2).astype(np.float32)  # a detector
    [values] = slicer.inverse_transform(maps)
    [mask] = slicer.inverse_transform(maps > 0)
    volume = read_volume(tmp_path / kind)
    write_like(tmp_path / "map.nii.gz", values, volume)
    write_like(tmp_path / "mask.nii.gz", mask, volume, dtype=np.uint8)

    original = nib.load(tmp_path / kind)
    for name in ("map.nii.gz", "mask.nii.gz"):
        found = nib.load(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(found.dataobj).reshape(SHAPE), LESION)
        np.testing.assert_array_equal(
            world_mm(found.affine, found.get_fdata().reshape(SHAPE) > 0), world_mm(original.affine, LESION)
        )
        assert found.shape == original.shape
        for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "dim"):
            np.testing.assert_array_equal(found.header[field], original.header[field], err_msg=field)
        np.testing.assert_array_equal(found.get_sform(), original.get_sform())
        np.testing.assert_array_equal(found.get_qform(), original.get_qform())


@pytest.mark.parametrize(
    ("plane", "spacing_mm", "grid"),
    [
        ("axial", 0.7, "RAS"),
        ("coronal", 1.0, "PSR"),
        ("sagittal", 1.9, "oblique ASL"),
        ("axial", 1.9, "oblique ASL"),
    ],
)
def test_resampling_leaves_a_lesion_where_it_was(plane, spacing_mm, grid):
    shape = (26, 30, 24)
    brain = ball(shape, (12, 14, 11), (11, 13, 10))
    lesion = ball(shape, (15, 10, 13), (4, 5, 3))
    image = image_of(np.where(lesion, 2, 1) * brain.astype(np.float32), grid, mm=(1.2, 1.5, 2.0))
    slicer = VolumeSlicer(plane, spacing_mm=spacing_mm)
    images = slicer.fit_transform([image])
    volume = read_volume(image)
    original = world_mm(image.affine, lesion)
    # Labels move by up to half a pixel, twice.
    for maps, atol, rtol in ((images.clip(1) - 1, 0.05, 0.02), (images > 1.5, 0.4, 0.25)):
        [values] = slicer.inverse_transform(maps)
        weights = values / values.sum()
        where = np.tensordot(weights, np.moveaxis(np.indices(values.shape), 0, -1), 3)
        found = nib.affines.apply_affine(volume.affine, where)
        np.testing.assert_allclose(found, original.mean(axis=0), rtol=0, atol=atol)
        assert values.sum() == pytest.approx(lesion.sum(), rel=rtol)
        assert values.dtype == (bool if maps.dtype == bool else np.float32)


@pytest.mark.parametrize("plane", PLANES)
def test_without_resampling_the_inverse_is_exact(plane):
    array = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)  # signs and no background
    volume = read_volume(image_of(array, "LPS"))
    brain = ball(SHAPE, (6, 6, 4), (4, 5, 3))
    slicer = VolumeSlicer(plane, spacing_mm=None, shape=(32, 32)).fit([volume])
    images, masks, geometry = slicer.slices_of(volume, brain)
    assert geometry.is_copy
    covered = brain.any(axis=tuple({0, 1, 2} - {PLANES[plane][0]}))
    expected = np.moveaxis(volume.values.copy(), PLANES[plane][0], 0)
    expected[~covered] = 0
    np.testing.assert_array_equal(np.moveaxis(geometry.to_volume(images), PLANES[plane][0], 0), expected)
    np.testing.assert_array_equal(geometry.to_volume(masks), brain)
    labels = (10 * array).astype(np.int16)
    np.testing.assert_array_equal(geometry.to_volume(geometry.to_slices(labels * brain)), labels * brain)
    assert geometry.n_slices == len(images) == covered.sum() < SHAPE[PLANES[plane][0]]


def ramp(values, mm):
    """World coordinates of a volume without rotation, as three arrays."""
    return np.meshgrid(
        *(o + step * np.arange(n) for o, step, n in zip(ORIGIN_MM, mm, values, strict=True)), indexing="ij"
    )


@pytest.mark.parametrize("spacing_mm", [0.8, 1.0, 2.5])
def test_pixels_lie_where_the_geometry_says(spacing_mm):
    shape, mm = (20, 24, 18), (1.2, 1.0, 1.5)
    x, y, z = (array.astype(np.float32) for array in ramp(shape, mm))
    brain = ball(shape, (9, 11, 8), (6, 7, 5))
    slicer = VolumeSlicer(spacing_mm=spacing_mm, slice_mm=2.0, shape=(32, 32)).fit([image_of(x, mm=mm)])
    cut = {}
    for name, array in {"x": x, "y": y, "z": z}.items():
        cut[name], masks, geometry = slicer.slices_of(image_of(array, mm=mm), brain)
        cut[name] = geometry.to_slices(array)
    inner = np.zeros_like(masks)
    inner[:, 12:20, 12:20] = masks[:, 12:20, 12:20]
    assert inner.sum() > 100
    atol = 1e-3 if spacing_mm < 1.2 else 0.04  # a triangle over few voxels is not quite balanced
    np.testing.assert_allclose(np.diff(cut["x"], axis=2)[inner[:, :, 1:]], spacing_mm, rtol=0, atol=atol)
    np.testing.assert_allclose(np.diff(cut["y"], axis=1)[inner[:, 1:]], -spacing_mm, rtol=0, atol=atol)
    np.testing.assert_allclose(np.diff(geometry.positions_mm), 2)
    positions = np.broadcast_to(np.array(geometry.positions_mm)[:, None, None], masks.shape)
    np.testing.assert_allclose(cut["z"][inner], positions[inner], atol=1e-3)
    middle = [array[brain].min() / 2 + array[brain].max() / 2 for array in (x, y)]
    found = [cut[name][len(masks) // 2, 15:17, 15:17].mean() for name in "xy"]
    np.testing.assert_allclose(found, middle, atol=0.75)


def test_linear_where_pixels_are_smaller():
    volume = read_volume(image_of(anatomy(), "RAS"))
    slicer = VolumeSlicer(spacing_mm=0.8, slice_mm=2.0, range_mm=(13.0, 30.0)).fit([volume])
    images, _, geometry = slicer.slices_of(volume)
    frame = volume.values.transpose(2, 1, 0)[:, ::-1]
    exact = RegularGridInterpolator([np.arange(n) for n in frame.shape], frame, bounds_error=False)
    places = [
        start + step * np.arange(n)
        for start, step, n in zip(geometry.starts, geometry.steps, images.shape, strict=True)
    ]
    expected = exact(np.stack(np.meshgrid(*places, indexing="ij"), axis=-1))
    inside = np.isfinite(expected)
    assert inside.sum() > 1000
    np.testing.assert_allclose(images[inside], expected[inside], atol=1e-5)


@pytest.mark.parametrize("spacing_mm", [0.8, 2.2])
def test_resampling_makes_no_rim(spacing_mm):
    shape = (26, 30, 24)
    brain = ball(shape, (12, 14, 11), (9, 11, 8))
    image = image_of(np.where(brain, 3, -1).astype(np.float32), "LPS", mm=(1.0, 1.1, 1.3))
    slicer = VolumeSlicer(spacing_mm=spacing_mm, slice_mm=2.0).fit([image], brain_masks=[brain[::-1, ::-1]])
    images, masks, _ = slicer.slices_of(image, brain[::-1, ::-1])
    np.testing.assert_allclose(images[masks], 3, rtol=1e-5)
    assert set(np.unique(images[~masks].round(4))) <= {-1.0, 0.0}
    stripped = image_of(np.where(brain, 3, 0).astype(np.float32), "LPS", mm=(1.0, 1.1, 1.3))
    images, masks, _ = slicer.slices_of(stripped)
    np.testing.assert_array_equal(images > 0, masks)


def test_distance_between_slices():
    values = np.zeros((8, 8, 21), np.float32)
    values[2:6, 2:6, 1:] = np.arange(1, 21)
    volume = read_volume(image_of(values, mm=(1, 1, 1.5)))  # z = 7 + 1.5 k mm

    def slices(**parameters):
        images, _, geometry = VolumeSlicer(shape=(8, 8), **parameters).fit([volume]).slices_of(volume)
        return images[:, 3, 3], np.array(geometry.positions_mm), geometry, images

    found, at_mm, _, _ = slices()
    np.testing.assert_array_equal(found, np.arange(1, 21))
    np.testing.assert_allclose(at_mm, 7 + 1.5 * np.arange(1, 21))

    found, at_mm, geometry, images = slices(slice_mm=3.0)  # every second one, from the lowest
    np.testing.assert_array_equal(found, np.arange(2, 21, 2))
    np.testing.assert_allclose(at_mm, 7 + 1.5 * np.arange(2, 21, 2))
    back = geometry.to_volume(images)[3, 3]
    np.testing.assert_allclose(back, [0, 2, *range(2, 21)], rtol=1e-6)  # linear, and flat up to half a step

    found, at_mm, geometry, images = slices(slice_mm=2.0, range_mm=(10.0, 33.5))
    np.testing.assert_allclose(at_mm, np.arange(10, 33, 2))  # counted from the low end
    np.testing.assert_allclose(found, (at_mm - 7) / 1.5, rtol=1e-5)
    back = geometry.to_volume(images)[3, 3]
    np.testing.assert_allclose(back, [0, 0, *range(2, 17), 50 / 3, 0, 0, 0], rtol=1e-5)

    found, at_mm, geometry, images = slices(slice_mm=1.5, range_mm=(10.75, 20.0))  # halfway between its own
    np.testing.assert_allclose(found, [2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5], rtol=1e-6)
    assert not geometry.is_copy
    np.testing.assert_allclose(geometry.to_volume(images)[3, 3, 3:9], np.arange(3, 9), rtol=1e-6)

    _, at_mm, _, _ = slices(slice_mm=2.0, range_mm=(-100.0, 14.0))
    np.testing.assert_allclose(at_mm, [8, 10, 12, 14])


def test_spacing_equal_but_for_rounding_is_not_resampled():
    volume = read_volume(image_of(mm=(0.9997, 1.0002, 3.0)))
    assert VolumeSlicer(spacing_mm=1.0).fit([volume]).slices_of(volume)[2].is_copy
    volume = read_volume(image_of(mm=(0.99, 1.0, 3.0)))
    assert not VolumeSlicer(spacing_mm=1.0).fit([volume]).slices_of(volume)[2].is_copy


def test_maps_of_small_pixels_are_averaged_over_a_voxel():
    volume = read_volume(image_of(anatomy(), mm=(5.0, 5.0, 5.0)))
    slicer = VolumeSlicer(spacing_mm=1.0).fit([volume])
    _, _, geometry = slicer.slices_of(volume)
    stripes = np.zeros(geometry.shape, np.float32)
    stripes[:, :, ::2] = 1
    [values] = slicer.inverse_transform(stripes, geometry)
    np.testing.assert_allclose(values, 0.5, atol=0.05)


def test_range_in_world_millimetres():
    volume = read_volume(image_of(grid="PSR"))
    z_mm = volume.affine[2, 3] + volume.affine[2, 2] * np.arange(volume.shape[2])
    for low in (z_mm[4], z_mm[3] + 0.2):
        slicer = VolumeSlicer(range_mm=(low, z_mm[6] + 0.2)).fit([volume])
        _, _, geometry = slicer.slices_of(volume)
        np.testing.assert_allclose(geometry.positions_mm, z_mm[4:7])
    with pytest.raises(
        ValueError, match=r"range_mm must hold a slice with brain, got \(500, 600\) where an im"
    ):
        VolumeSlicer(range_mm=(500, 600)).fit([volume])


def test_positions_in_an_oblique_volume():
    volume = read_volume(image_of(grid="oblique RAS"))
    middle = nib.affines.apply_affine(volume.affine, (np.array(volume.shape) - 1) / 2)
    _, _, geometry = VolumeSlicer("coronal", spacing_mm=None).fit([volume]).slices_of(volume)
    filled = np.flatnonzero(volume.values.any(axis=(0, 2)))
    expected = middle[1] + (filled - (volume.shape[1] - 1) / 2) * volume.spacing_mm[1]
    np.testing.assert_allclose(geometry.positions_mm, expected)


def test_shape_is_the_smallest_that_holds_every_brain():
    def box(x, y, z):
        array = np.zeros((40, 44, 36), np.float32)
        array[3 : 3 + x, 30 - y : 30, 2 : 2 + z] = 1
        return image_of(array, mm=(1, 1, 1))

    volumes = [box(16, 17, 5), box(15, 9, 30)]
    assert VolumeSlicer().fit(volumes).shape_ == (32, 16)
    assert VolumeSlicer("coronal").fit(volumes).shape_ == (32, 16)
    assert VolumeSlicer("sagittal").fit(volumes).shape_ == (32, 32)
    assert VolumeSlicer(spacing_mm=2.0).fit(volumes).shape_ == (16, 16)
    joined = nib.Nifti1Image(sum(volume.get_fdata() for volume in volumes), volumes[0].affine)
    assert VolumeSlicer(range_mm=(20, 60)).fit([joined]).shape_ == (16, 16)  # it is broad further down
    for width in (15, 16):  # nothing is lost at either parity
        slicer = VolumeSlicer(shape=(16, 16)).fit(volumes)
        _, masks, _ = slicer.slices_of(box(width, width, 4))
        assert masks.sum() == 4 * width * width
    slicer = VolumeSlicer().fit([box(16, 17, 5)])
    with pytest.raises(
        ValueError, match=r"got \(32, 16\) where an image in memory needs \(20, 17\) pixels of 1"
    ):
        slicer.transform([box(17, 20, 5)])


def test_a_brain_is_never_cut_and_the_file_is_named(tmp_path):
    nib.save(image_of(anatomy()), tmp_path / "sub-07_T1w.nii.gz")
    slicer = VolumeSlicer(shape=(16, 16)).fit([tmp_path / "sub-07_T1w.nii.gz"])
    with pytest.raises(
        ValueError, match=r"hold the brain, got \(16, 16\) where .*sub-07_T1w.* needs \(21, 12\)"
    ):
        slicer.transform([tmp_path / "sub-07_T1w.nii.gz"])


def test_brain_masks_in_any_form(tmp_path):
    image = image_of(anatomy(), "LPS")
    mask = image_of(BRAIN.astype(np.uint8), "LPS")
    turned = nib.as_closest_canonical(mask)
    nib.save(turned, tmp_path / "mask.nii.gz")
    canonical = np.asarray(turned.dataobj) > 0
    slicer = VolumeSlicer().fit([image], brain_masks=[mask])
    expected, masks, geometry = slicer.slices_of(image, mask)
    assert geometry.to_volume(masks).sum() == BRAIN.sum()
    for form in (
        turned,
        read_volume(mask),
        tmp_path / "mask.nii.gz",
        str(tmp_path / "mask.nii.gz"),
        canonical,
    ):
        found, found_masks, _ = slicer.slices_of(image, form)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_masks, masks)
    whole = VolumeSlicer().fit([image])
    assert whole.slices_of(image)[2].n_slices == SHAPE[2] > geometry.n_slices


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            [BRAIN[:-1]],
            r"shapes of their volumes, got \(11, 14, 10\) and \(12, 14, 10\) for an image in memory",
        ),
        ([np.zeros(SHAPE, bool)], r"must have a brain voxel in each volume, got none for an image in memory"),
        ([BRAIN, BRAIN], r"one entry for each of 1 volumes, got 2"),
        (
            [image_of(BRAIN.astype(np.uint8), "LPS")],
            r"must lie on one grid, got 2?\d+\.\d\d mm between corners",
        ),
    ],
)
def test_brain_masks_that_do_not_fit(masks, message):
    with pytest.raises(ValueError, match=message):
        VolumeSlicer().fit([image_of(anatomy())], brain_masks=masks)


def test_several_volumes_and_their_groups():
    volumes = [image_of(), image_of(grid="PSR"), image_of(2 * anatomy() * LESION, "LAS")]
    masks = [None, None, read_volume(image_of(BRAIN.astype(np.uint8), "LAS"))]
    slicer = VolumeSlicer(spacing_mm=1.5)
    assert clone(slicer).get_params() == slicer.get_params()
    images = slicer.fit_transform(volumes, brain_masks=masks)
    parts = [slicer.slices_of(volume, mask) for volume, mask in zip(volumes, masks, strict=True)]
    np.testing.assert_array_equal(images, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(slicer.brain_masks_, np.concatenate([part[1] for part in parts]))
    assert slicer.geometry_ == [part[2] for part in parts]
    np.testing.assert_array_equal(slicer.groups_, np.repeat([0, 1, 2], [len(part[0]) for part in parts]))
    assert images.dtype == np.float32 and slicer.brain_masks_.dtype == bool

    back = slicer.inverse_transform(images)
    assert [values.shape for values in back] == [read_volume(volume).shape for volume in volumes]
    [alone] = slicer.inverse_transform(images[slicer.groups_ == 1], slicer.geometry_[1])
    np.testing.assert_array_equal(alone, back[1])
    assert "geometry_" not in vars(clone(slicer).fit(volumes))


def test_maps_must_fit_the_slices():
    slicer = VolumeSlicer()
    with pytest.raises(NotFittedError):
        slicer.slices_of(image_of())
    slicer.fit([image_of()])
    with pytest.raises(NotFittedError):
        slicer.inverse_transform(np.zeros((1, 16, 16)))
    images = slicer.transform([image_of()])
    with pytest.raises(ValueError, match=r"one map for each of 9 slices, got \(8, 32, 16\)"):
        slicer.inverse_transform(images[1:])
    with pytest.raises(ValueError, match=r"shape of the slices, got \(9, 32, 15\) and \(9, 32, 16\)"):
        slicer.inverse_transform(images[:, :, 1:])
    with pytest.raises(
        ValueError, match=r"values must have the shape of the volume, got \(2, 2, 2\) and \(12,"
    ):
        slicer.geometry_[0].to_slices(np.zeros((2, 2, 2)))


def test_spacing_of_the_volumes_must_agree():
    a, b = image_of(), image_of(mm=(1.0, 1.4, 3.0))
    slicer = VolumeSlicer(spacing_mm=None).fit([a, image_of(mm=(1.0004, 1.5, 2.0))])
    assert slicer.spacing_mm_ == pytest.approx((1.5, 1.0))
    assert slicer.slices_of(b)[2].steps == pytest.approx((1, 1.5 / 1.4, 1))  # at the learnt spacing
    with pytest.raises(
        ValueError, match=r"got None for 1\.5 x 1 mm pixels and, in an image in memory, 1\.4 x 1"
    ):
        VolumeSlicer(spacing_mm=None).fit([a, b])


def test_nothing_is_read_when_nothing_is_to_learn(tmp_path):
    slicer = VolumeSlicer(shape=(32, 48), spacing_mm=2).fit([tmp_path / "missing.nii"])
    assert slicer.shape_ == (32, 48) and slicer.spacing_mm_ == (2.0, 2.0)
    with pytest.raises(FileNotFoundError, match=r"missing\.nii"):
        slicer.transform([tmp_path / "missing.nii"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"plane": "oblique"}, r"plane must be one of \['axial', 'coronal', 'sagittal'\], got 'oblique'"),
        ({"spacing_mm": 0}, r"spacing_mm must be a positive number or None, got 0"),
        ({"spacing_mm": "1"}, r"spacing_mm must be a positive number or None, got '1'"),
        ({"slice_mm": -1.0}, r"slice_mm must be a positive number or None, got -1\.0"),
        ({"range_mm": (10, 0)}, r"range_mm must be \(low, high\) with finite low <= high, got \(10, 0\)"),
        ({"range_mm": 10}, r"range_mm must be .* got 10"),
        ({"range_mm": (0, np.inf)}, r"range_mm must be .* got \(0, inf\)"),
        ({"shape": (0, 16)}, r"shape must be two positive integers \(H, W\), got \(0, 16\)"),
        ({"shape": (16.0, 16)}, r"shape must be two positive integers \(H, W\), got \(16\.0, 16\)"),
        ({"shape": 16}, r"shape must be two positive integers \(H, W\), got 16"),
    ],
)
def test_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        VolumeSlicer(**parameters).fit([image_of()])


def test_volumes_must_be_a_list():
    with pytest.raises(ValueError, match="volumes must hold a volume, got none"):
        VolumeSlicer().fit([])
    for one in ("a.nii", image_of(), read_volume(image_of())):
        with pytest.raises(TypeError, match=r"volumes must be a list of volumes, got \w+\. Use \[volume\]"):
            VolumeSlicer().fit(one)


@pytest.mark.parametrize(
    ("plane", "name", "mask"),
    [
        ("axial", "lesion_Brats18_TCIA10_639_1_flair", "lesion_Brats18_TCIA10_639_1_seg"),
        ("coronal", "healthy_IXI012-HH-1211_T1_2mm", "healthy_IXI012-HH-1211_T1_2mm_DLMUSE_labels"),
        ("sagittal", "lesion_Brats18_TCIA10_639_1_flair", "lesion_Brats18_TCIA10_639_1_seg"),
    ],
)
def test_real_volumes(tmp_path, data_dir, plane, name, mask):
    path, mask = (data_dir / "volumes" / f"{file}.nii.gz" for file in (name, mask))
    if not path.exists():
        pytest.skip(f"{path} is missing: set MADAD_DATA to a directory that holds it")
    original, marked = nib.load(path), np.asarray(nib.load(mask).dataobj) > 0
    slicer = VolumeSlicer(plane, spacing_mm=None).fit([path], brain_masks=[mask])
    images, masks, geometry = slicer.slices_of(path, mask)
    assert geometry.is_copy and masks.sum() == marked.sum()
    write_like(tmp_path / "map.nii.gz", geometry.to_volume(images * masks), read_volume(path))
    found = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(
        found.get_fdata(), np.where(marked, original.get_fdata(dtype=np.float32), 0)
    )
    np.testing.assert_array_equal(found.affine, original.affine)
