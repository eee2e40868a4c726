import errno
import itertools
import os
import pickle
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from madad.mri.nifti import Volume, check_same_grid, read_volume, same_grid, write_like

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


def grid_affine(axes="RAS", degrees=(0, 0, 0), mm=MM):
    """Where voxels are whose axes point as `axes` says, then turned."""
    turned = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turned @ np.array([TOWARDS[axis] for axis in axes], dtype=float).T * mm
    matrix[:3, 3] = ORIGIN_MM
    return matrix


def numbered(shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(dtype)


def image_of(grid="RAS", array=None, **options):
    return nib.Nifti1Image(numbered() if array is None else array, grid_affine(*GRIDS[grid]), **options)


def full_header(image):
    """Fill every field that a map of the image should keep."""
    sform = image.affine
    image.set_sform(sform, code=4)
    shifted = sform.copy()
    shifted[:3, 3] += 5
    image.header.set_qform(shifted, code=1)  # disagrees with the sform, as after a registration
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_dim_info(slice=2, phase=1, freq=0)
    image.header["descrip"] = b"scanner 3"
    image.header["aux_file"] = b"aux"
    image.header["intent_name"] = b"name"
    image.header["slice_code"] = 2
    image.header["toffset"] = 7
    image.header["cal_max"] = 900
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"seen by a reader"))
    return image


RESET = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"}


def stored_header(path):
    """The header as it is in the file; nibabel.load changes slope and intercept."""
    kind = type(nib.load(path).header)
    with nib.openers.ImageOpener(path) as file:
        return kind.from_fileobj(file, check=False)


def assert_same_header(path, original, but=()):
    found, expected = stored_header(path), stored_header(original)
    for field in expected:
        if field not in RESET | set(but):
            np.testing.assert_array_equal(found[field], expected[field], err_msg=field)
    assert [(one.get_code(), one.get_content()) for one in found.extensions] == [
        (one.get_code(), one.get_content()) for one in expected.extensions
    ]
    np.testing.assert_array_equal(nib.load(path).affine, nib.load(original).affine)


def save(image, path):
    nib.save(image, path)
    return path


@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_keep_their_place_in_the_world(grid):
    image = image_of(grid)
    volume = read_volume(image)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    ijk = np.indices(SHAPE).reshape(3, -1)
    world = image.affine[:3, :3] @ ijk + image.affine[:3, 3:]
    found = np.linalg.solve(volume.affine, np.vstack([world, np.ones_like(world[:1])]))[:3]
    np.testing.assert_allclose(found, np.round(found), atol=1e-9)
    x, y, z = np.round(found).astype(int)
    assert min(x.min(), y.min(), z.min()) == 0
    np.testing.assert_array_equal(volume.values[x, y, z], image.get_fdata().ravel())
    np.testing.assert_array_equal(volume.in_file_order(volume.values), image.get_fdata())
    assert volume.values.dtype == np.float32 and volume.values.flags.c_contiguous
    assert sorted(volume.spacing_mm) == pytest.approx(sorted(MM))


def test_values_do_not_depend_on_the_stored_axes():
    image = image_of("PSR")
    ras = nib.as_closest_canonical(image)
    np.testing.assert_array_equal(read_volume(image).values, read_volume(ras).values)
    np.testing.assert_allclose(read_volume(image).affine, read_volume(ras).affine, atol=1e-12)


def test_slope_and_intercept_are_applied(tmp_path):
    image = image_of()
    image.header.set_slope_inter(0.5, -3)
    path = save(image, tmp_path / "scaled.nii.gz")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.values, numbered() * np.float32(0.5) - 3)
    assert volume.stored_dtype == np.float64 and read_volume(image).stored_dtype == np.int16
    assert read_volume(save(image_of(), tmp_path / "plain.nii")).stored_dtype == np.int16


def test_a_volume_shares_no_memory_and_needs_no_file(tmp_path):
    array = numbered(dtype=np.float32)
    image = nib.Nifti1Image(array, np.eye(4))
    volume = read_volume(image)
    image.header["descrip"] = b"later"
    array[:] = 0
    assert volume.values.max() > 0 and volume.header["descrip"] == b""
    path = save(image_of(), tmp_path / "a.nii")
    volume = read_volume(path)
    path.unlink()
    np.testing.assert_array_equal(volume.values, numbered())
    assert volume.path == path and volume.name == str(path)
    assert read_volume(volume) is volume
    assert read_volume(str(save(image_of(), path))).path == path


@pytest.mark.parametrize(
    ("grid", "ending"), list(zip(GRIDS, itertools.cycle([".nii", ".nii.gz"]), strict=False))
)
def test_written_on_the_grid_of_the_file(tmp_path, grid, ending):
    image = full_header(image_of(grid))
    image.header.set_slope_inter(0.5, -3)
    original = save(image, tmp_path / f"original{ending}")
    volume = read_volume(original)
    path = tmp_path / f"map{ending}"
    write_like(path, volume.values, volume)
    assert_same_header(path, original)
    np.testing.assert_array_equal(nib.load(path).get_fdata(), nib.load(original).get_fdata())
    header = stored_header(path)
    assert header.get_data_dtype() == np.float32
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
    assert (header["cal_min"], header["cal_max"]) == (0, 0)


@pytest.mark.parametrize("trailing", [(1,), (1, 1)])
def test_axes_of_length_one_are_kept(tmp_path, trailing):
    image = image_of("LPS", numbered().reshape(*SHAPE, *trailing))
    image.header["pixdim"][4] = 2.5
    original = save(image, tmp_path / "original.nii")
    volume = read_volume(original)
    assert volume.shape == SHAPE
    write_like(tmp_path / "map.nii", volume.values, volume)
    assert_same_header(tmp_path / "map.nii", original)
    assert nib.load(tmp_path / "map.nii").shape == (*SHAPE, *trailing)
    np.testing.assert_array_equal(nib.load(tmp_path / "map.nii").get_fdata(), image.get_fdata())


def test_masks_as_uint8(tmp_path):
    volume = read_volume(image_of("PSR"))
    lesion = volume.values > 1000
    write_like(tmp_path / "mask.nii.gz", lesion, volume, dtype=np.uint8)
    stored = nib.load(tmp_path / "mask.nii.gz")
    assert np.asarray(stored.dataobj).dtype == stored.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(stored.dataobj), numbered() > 1000)


def test_a_header_without_sform_and_qform_stays_without(tmp_path):
    image = image_of()
    image.header.set_sform(None, code=0)
    image.header.set_qform(None, code=0)
    image = nib.Nifti1Image(numbered(), None, image.header)
    original = save(image, tmp_path / "original.nii")
    volume = read_volume(original)
    write_like(tmp_path / "map.nii", volume.values, volume)
    assert_same_header(tmp_path / "map.nii", original)
    assert int(stored_header(tmp_path / "map.nii")["sform_code"]) == 0


def test_other_kinds_of_nifti(tmp_path):
    second = full_header(nib.Nifti2Image(numbered(), grid_affine("LPS")))
    big_endian = full_header(
        nib.Nifti1Image(numbered(), grid_affine("LPS"), nib.Nifti1Header(endianness=">"))
    )
    pair = full_header(nib.Nifti1Pair(numbered(), grid_affine("LPS")))
    for name, image, but in [
        ("second.nii", second, ()),
        ("big.nii.gz", big_endian, ()),
        ("pair.img", pair, {"magic"}),
        ("other.hdr", pair, {"magic"}),
    ]:
        original = save(image, tmp_path / name)
        volume = read_volume(original)
        write_like(tmp_path / "map.nii.gz", volume.values, volume)
        assert_same_header(tmp_path / "map.nii.gz", original.with_suffix(".hdr") if but else original, but)
        assert stored_header(tmp_path / "map.nii.gz").endianness == image.header.endianness
        np.testing.assert_array_equal(nib.load(tmp_path / "map.nii.gz").get_fdata(), numbered())


def test_a_slope_in_the_header_of_an_image_in_memory_is_not_written(tmp_path):
    image = image_of(array=numbered(dtype=np.float32))
    image.header.set_slope_inter(0.5, -3)
    write_like(tmp_path / "map.nii", image.get_fdata(), read_volume(image))
    np.testing.assert_array_equal(nib.load(tmp_path / "map.nii").get_fdata(), numbered())


def test_equal_values_give_equal_bytes(tmp_path, monkeypatch):
    volume = read_volume(image_of("LAS"))
    write_like(tmp_path / "a.nii.gz", volume.values, volume)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_like(tmp_path / "another.nii.gz", volume.values, pickle.loads(pickle.dumps(volume)))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "another.nii.gz").read_bytes()


def text(path):
    path.write_text("patient,age\n" * 200)


def dicom(path):
    path.write_bytes(bytes(128) + b"DICM" + bytes(500))


def cut(path, share=0.5):
    save(image_of(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def damaged(path):
    save(image_of(), path)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.nii.gz", cut, r"image must name a whole NIfTI file, got '.*a\.nii\.gz' \(.*\)\. Copy"),
        ("b.nii.gz", lambda path: cut(path, 0.02), r"whole NIfTI file, got '.*b\.nii\.gz'"),
        ("c.nii", cut, r"whole NIfTI file, got '.*c\.nii'"),
        ("d.nii", lambda path: cut(path, 0.05), r"whole NIfTI file, got '.*d\.nii'"),
        ("e.nii.gz", damaged, r"whole NIfTI file, got '.*e\.nii\.gz'"),
        ("f.nii.gz", text, r"whole NIfTI file, got '.*f\.nii\.gz'"),
        ("g.nii", text, r"whole NIfTI file, got '.*g\.nii'"),
        ("h.nii", lambda path: path.touch(), r"whole NIfTI file, got '.*h\.nii' \(Empty"),
        ("i.dcm", dicom, r"got the DICOM file '.*i\.dcm'. Convert its series with dcm2niix"),
        ("j.nii.gz", dicom, r"got the DICOM file '.*j\.nii\.gz'"),
        ("k", lambda path: path.mkdir(), r"got the folder '.*k'.*dcm2niix"),
        (
            "l.mgz",
            lambda path: save(nib.MGHImage(numbered(), np.eye(4)), path),
            r"got MGHImage in '.*l\.mgz'",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / name)


def flat_affine():
    matrix = grid_affine()
    matrix[:3, 2] = matrix[:3, 0]
    return matrix


def with_affine(matrix):
    image = image_of()
    image.set_sform(matrix, code=1)
    return image


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: image_of(array=numbered((*SHAPE, 2))),
            r"one volume, got a series of shape \(12, 14, 10, 2\)",
        ),
        (lambda: image_of(array=numbered((12, 14))), r"3 dimensions, got shape \(12, 14\)"),
        (lambda: image_of(array=np.zeros((12, 0, 10), np.int16)), r"have voxels, got shape \(12, 0, 10\)"),
        (lambda: image_of(array=numbered().astype(np.complex64)), r"real numbers, got complex numbers"),
        (lambda: image_of(array=np.zeros(SHAPE, [(c, "u1") for c in "RGB"])), r"real numbers, got colours"),
        (lambda: with_affine(flat_affine()), r"affine that spans space, got \[\["),
        (lambda: with_affine(np.diag([1, 1, 0, 1])), r"affine that spans space"),
        (lambda: nib.Nifti1Image(numbered(), None), r"affine that spans space, got None"),
        (
            lambda: image_of(array=np.full(SHAPE, np.nan, np.float32)),
            r"finite values, got NaN or infinity thr",
        ),
    ],
)
def test_images_that_are_no_volume(tmp_path, make, message):
    with pytest.raises(ValueError, match=f"image must .*{message}"):
        read_volume(make())


def test_messages_name_the_file(tmp_path):
    path = save(image_of(array=numbered((*SHAPE, 2))), tmp_path / "bold.nii")
    with pytest.raises(ValueError, match=r"image '.*bold\.nii' must be one volume"):
        read_volume(path)


def test_missing_files_and_other_types(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"existing file, got '.*none\.nii'"):
        read_volume(tmp_path / "none.nii")
    save(nib.Nifti1Pair(numbered(), np.eye(4)), tmp_path / "pair.img")
    (tmp_path / "pair.img").unlink()
    with pytest.raises(FileNotFoundError, match=r"pair\.img"):
        read_volume(tmp_path / "pair.hdr")
    with pytest.raises(TypeError, match="must be a path or a nibabel NIfTI image, got ndarray"):
        read_volume(numbered())


def test_values_that_are_not_finite_become_zero_with_a_warning(tmp_path):
    array = numbered(dtype=np.float64)
    array[0, 0, :3] = np.nan, np.inf, -1e300  # beyond float32
    path = save(image_of(array=array), tmp_path / "spm.nii")
    with pytest.warns(
        UserWarning, match=r"spm\.nii' should be finite, got NaN or infinity in 3 of 1680 vox"
    ) as w:
        volume = read_volume(path)
    assert len(w) == 1 and w[0].filename == __file__
    assert volume.n_not_finite == 3
    np.testing.assert_array_equal(volume.values, np.where(np.abs(array) < 1e300, array, 0))
    assert read_volume(image_of()).n_not_finite == 0


@pytest.fixture
def volume():
    return read_volume(image_of("LPS"))


def bad_values(**changes):
    values = np.zeros(SHAPE, np.float32)
    values[1, 2, 3] = changes["one"]
    return values


@pytest.mark.parametrize(
    ("name", "values", "dtype", "message"),
    [
        ("map.nrrd", np.zeros(SHAPE), np.float32, r"path must end in \.nii or \.nii\.gz, got '.*map\.nrrd'"),
        (
            "m.nii",
            np.zeros((12, 14, 9)),
            np.float32,
            r"got \(12, 14, 9\) and \(12, 14, 10\) for an image in mem",
        ),
        ("m.nii", bad_values(one=np.nan), np.float32, r"values must be finite, got NaN"),
        ("m.nii", bad_values(one=0.5), np.uint8, r"whole numbers that fit dtype, got 0 to 0\.5 for uint8"),
        ("m.nii", bad_values(one=256), np.uint8, r"whole numbers that fit dtype, got 0 to 256 for uint8"),
        ("m.nii", np.zeros(SHAPE), np.float16, r"dtype must be one that NIfTI has, got float16"),
    ],
)
def test_values_that_cannot_be_written(tmp_path, volume, name, values, dtype, message):
    with pytest.raises(ValueError, match=message):
        write_like(tmp_path / name, values, volume, dtype=dtype)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_full_disk_leaves_what_was_there(tmp_path, ending):
    resource = pytest.importorskip("resource")
    big = read_volume(nib.Nifti1Image(np.random.default_rng(0).normal(size=(64, 64, 64)), np.eye(4)))
    path = tmp_path / f"map{ending}"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"written to, got '.*map\.nii.*\(File too large\)") as caught:
            write_like(path, big.values, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "before"


def test_folders_that_cannot_be_written_to(tmp_path, volume, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder .*got '.*none/map\.nii'"):
        write_like(tmp_path / "none" / "map.nii", volume.values, volume)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="path must be in a folder"):
        write_like(tmp_path / "file" / "map.nii", volume.values, volume)

    def read_only(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(PermissionError, match=r"Permission denied\)\. Create the folder, change its permiss"):
        write_like(tmp_path / "map.nii", volume.values, volume)
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_nothing(tmp_path, volume, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_like(tmp_path / "map.nii", volume.values, volume)
    assert os.listdir(tmp_path) == []


def test_same_grid_whatever_the_stored_axes(tmp_path):
    a = read_volume(save(image_of("RAS"), tmp_path / "a.nii"))
    b = read_volume(save(nib.as_closest_canonical(image_of("RAS")), tmp_path / "b.nii"))
    assert same_grid(a, b)
    check_same_grid(a, b)
    turned = nib.orientations.axcodes2ornt("PSR")
    assert same_grid(a, read_volume(image_of("RAS").as_reoriented(turned)), 1e-6)


def test_other_grids_are_told_by_both_names(tmp_path, volume):
    a = replace(read_volume(save(image_of(), tmp_path / "a.nii")))
    moved = a.affine.copy()
    moved[0, 3] += 0.4
    b = replace(a, affine=moved, path=tmp_path / "b.nii")
    assert same_grid(a, b)
    assert not same_grid(a, b, 0.3)
    with pytest.raises(
        ValueError, match=r"0\.40 mm between corners, above 0\.30 mm, for .*a\.nii and .*b\.nii"
    ):
        check_same_grid(a, b, 0.3)
    stretched = replace(a, affine=a.affine @ np.diag([1, 1, 1.05, 1]))
    with pytest.raises(ValueError, match=r"1\.35 mm between corners, above 0\.50"):
        check_same_grid(a, stretched)
    smaller = Volume(a.values[:-1], a.affine, a.header, a.orientation)
    with pytest.raises(
        ValueError, match=r"shapes \(12, 14, 10\) and \(11, 14, 10\) for .*a\.nii and an image in"
    ):
        check_same_grid(a, smaller)
