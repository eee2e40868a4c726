import dataclasses
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from madad._runtime.files import read_json
from madad.datasets import Scan
from madad.mri import AffineRegistration, PreprocessedVolume, VolumePreprocessor, VolumeSlicer, read_volume
from madad.mri.registration import TEMPLATE_SPACE
from madad.volumes.bids_derivative import Derivative
from madad.volumes.prediction import predict_volume
from madad.volumes.preparation import preprocess_scan, registration_warnings
from madad.volumes.prepared_folder import (
    STEP,
    TABLE,
    find_preprocessed,
    is_preprocessed_whole,
    read_preprocessed,
    write_preprocessed,
    write_preprocessing_table,
)

SHAPE = (26, 30, 22)


class Mirror:
    """A detector whose maps are the slices themselves."""

    map_threshold_ = 0.6

    def predict_maps(self, images, *, brain_mask):
        images = images if images.ndim == 3 else images[:, -1]
        return np.where(brain_mask, images, 0)


def save_scan(path, *, seed=0, shift_mm=0.0, header_of="oblique"):
    """A stripped brain of 1 litre as int16 with a slope, on an oblique left-handed grid."""
    rng = np.random.default_rng(seed)
    values = np.zeros(SHAPE, np.int16)
    inside = np.linalg.norm((np.indices(SHAPE).T - [13, 15, 11]) / [10, 12, 9], axis=-1).T < 1
    values[inside] = rng.integers(200, 900, inside.sum())
    linear = nib.eulerangles.euler2mat(z=0.2, x=-0.1) @ np.diag([-6.0, 6, 6.5])
    image = nib.Nifti1Image(values, nib.affines.from_matvec(linear, [70 + shift_mm, -90, -60]))
    image.header.set_slope_inter(0.5, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def save_mask(path, like, place):
    image = nib.load(like)
    mask = np.zeros(image.shape, np.uint8)
    mask[place] = 7
    nib.save(nib.Nifti1Image(mask, image.affine), path)
    return path


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw data"


@pytest.fixture
def scan(raw):
    first = save_scan(raw / "p1" / "t1.nii.gz")
    second = save_scan(raw / "p1" / "flair.nii", seed=1)
    lesion = save_mask(raw / "p1" / "lesion.nii.gz", first, np.s_[9:14, 12:18, 8:12])
    return Scan("01", {"FLAIR": second, "T1": first}, lesion_mask=lesion, session="a")


@pytest.fixture
def folder(tmp_path, raw):
    raw.mkdir(exist_ok=True)
    folder = Derivative(tmp_path / "prepared")
    folder.start(name="Preprocessed", step=STEP, parameters={"template": False}, source=raw)
    return folder


OWN_GRID = VolumePreprocessor(template=False)


def in_template(volumes, *, similarity=0.1, overlap=0.96):
    """The same as if registered to a template of 5 mm, 5 % larger and turned."""
    linear = nib.eulerangles.euler2mat(y=0.1) * 1.05
    matrix = nib.affines.from_matvec(linear, [3.0, -2.0, 1 / 3])
    grid = nib.Nifti1Image(
        np.zeros((38, 42, 34), np.float32), nib.affines.from_matvec(5 * np.eye(3), [-95, -110, -80])
    )
    grid.set_sform(grid.affine, "mni")
    registration, grid = AffineRegistration(matrix, similarity, overlap), read_volume(grid)
    moved = {}
    for name, volume in volumes.items():
        empty = PreprocessedVolume(grid, volume.source, volume.brain_made_by, registration)
        inside = empty.from_source(volume.brain_mask.astype(np.float32)) > 0.5
        values = np.where(inside, empty.from_source(volume.volume.values), np.float32(0))
        moved[name] = dataclasses.replace(empty, volume=dataclasses.replace(grid, values=values))
    return moved


def prepared(scan, template):
    volumes = preprocess_scan(OWN_GRID, scan)
    return in_template(volumes) if template else volumes


on_either_grid = pytest.mark.parametrize("template", [False, True])


# What is written comes back


@on_either_grid
def test_maps_on_the_scans_grid_are_those_of_what_was_written(template, folder, scan):
    volumes = prepared(scan, template)
    assert list(volumes) == ["T1", "FLAIR"]
    assert write_preprocessed(folder, scan, volumes) == []
    (files,) = find_preprocessed(Derivative(folder.root))
    back = read_preprocessed(folder, files, ["T1", "FLAIR"])
    slicer = VolumeSlicer(spacing_mm=None).fit([volumes["T1"].volume])
    before, after = (predict_volume(Mirror(), list(one), slicer) for one in (volumes.values(), back))
    for one, other in zip(before.on_source(), after.on_source(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert before.score == after.score and before.components == after.components
    assert before.on_source()[0].max() > 0.5
    for one, other in zip(volumes.values(), back, strict=True):
        np.testing.assert_array_equal(one.volume.values, other.volume.values)
        np.testing.assert_array_equal(one.brain_mask, other.brain_mask)
        np.testing.assert_array_equal(one.source.values, other.source.values)
        assert one.source.path == other.source.path and one.brain_made_by == other.brain_made_by
        if template:
            np.testing.assert_array_equal(one.registration.matrix, other.registration.matrix)
            assert other.registration.overlap == one.registration.overlap


@on_either_grid
def test_without_the_source_the_same_maps_in_the_same_space(template, folder, scan):
    volumes = prepared(scan, template)
    write_preprocessed(folder, scan, volumes)
    for path in scan.images.values():
        path.unlink()
    (files,) = find_preprocessed(folder)
    with pytest.raises(FileNotFoundError, match=r"must still exist, got no .*t1\.nii\.gz"):
        read_preprocessed(folder, files, ["T1"])
    (back,) = read_preprocessed(folder, files, ["T1"], needs_source=False)
    np.testing.assert_array_equal(back.volume.values, volumes["T1"].volume.values)
    slicer = VolumeSlicer(spacing_mm=None).fit([back.volume])
    expected = predict_volume(Mirror(), volumes["T1"], slicer)
    assert predict_volume(Mirror(), back, slicer).components == expected.components


@on_either_grid
def test_masks_are_on_the_grid_of_the_images(template, folder, scan):
    volumes = prepared(scan, template)
    write_preprocessed(folder, scan, volumes)
    (files,) = find_preprocessed(folder)
    assert files.scan.subject == "01" and files.scan.session == "a"
    assert files.expert_mask == scan.lesion_mask
    lesion = read_volume(files.scan.lesion_mask).values
    expert = read_volume(scan.lesion_mask).values > 0
    np.testing.assert_array_equal(lesion > 0, volumes["T1"].from_source(expert))
    assert set(np.unique(lesion)) == {0, 1}
    (brain,) = folder.root.rglob("*desc-brain_mask.nii.gz")
    np.testing.assert_array_equal(read_volume(brain).values > 0, volumes["T1"].brain_mask)
    if not template:
        assert nib.load(files.scan.images["T1"]).header["qoffset_x"] == pytest.approx(70)
        np.testing.assert_allclose(nib.load(brain).affine, nib.load(scan.images["T1"]).affine)


def test_writing_twice_leaves_the_same_bytes(folder, scan):
    volumes = prepared(scan, True)
    write_preprocessed(folder, scan, volumes)
    before = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    write_preprocessed(folder, scan, volumes)
    assert {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()} == before


@on_either_grid
def test_names_and_sidecars(template, folder, scan):
    scan = dataclasses.replace(scan, images={"T1CE": scan.images["T1"]}, session=None)
    volumes = prepared(scan, template)
    write_preprocessed(folder, scan, volumes, ["a note"])
    space = f"space-{TEMPLATE_SPACE}_" if template else ""
    anat = folder.root / "sub-01" / "anat"
    names = {path.name for path in anat.iterdir()}
    expected = {
        f"sub-01_{space}desc-brain_mask",
        f"sub-01_{space}label-L_desc-expert_mask",
        f"sub-01_ce-gadolinium_{space}desc-preproc_T1w",
    }
    table = f"sub-01_ce-gadolinium_from-T1w_to-{TEMPLATE_SPACE}_mode-image_xfm.txt"
    assert names == {f"{name}{end}" for name in expected for end in (".json", ".nii.gz")} | (
        {table} if template else set()
    )
    if template:
        np.testing.assert_allclose(
            np.loadtxt(anat / table), volumes["T1CE"].registration.matrix, rtol=1e-8, atol=1e-12
        )
    sidecar = read_json(anat / f"sub-01_ce-gadolinium_{space}desc-preproc_T1w.json")
    assert sidecar["Sources"] == ["bids:raw:p1/t1.nii.gz"] and sidecar["SkullStripped"] is True
    assert sidecar["SpatialReference"] == (TEMPLATE_SPACE if template else "orig")
    facts = sidecar["madad"]
    assert facts["contrast"] == "T1CE" and facts["warnings"] == ["a note"]
    source = volumes["T1CE"].source
    litres = np.count_nonzero(source.values) * np.prod(source.spacing_mm) / 1e6
    assert facts["brain_ml"] / 1000 == pytest.approx(litres, rel=0.05 if template else 1e-3)  # of the scan


def test_the_table_has_a_row_for_each_contrast(folder, scan, raw):
    volumes = prepared(scan, True)
    write_preprocessed(folder, scan, volumes, ["two\tnotes\nhere"])
    other = Scan("00", {"T1": save_scan(raw / "p0.nii", seed=3)})
    write_preprocessed(folder, other, prepared(other, False))
    write_preprocessing_table(folder)
    header, *rows = [line.split("\t") for line in (folder.root / TABLE).read_text().splitlines()]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["participant_id"], row["session_id"], row["contrast"]) for row in rows] == [
        ("sub-00", "n/a", "T1"),
        ("sub-01", "ses-a", "T1"),
        ("sub-01", "ses-a", "FLAIR"),
    ]
    assert [row["registration_overlap"] for row in rows] == ["n/a", "0.96", "0.96"]
    assert [row["warning"] for row in rows] == ["n/a", "two notes here", "two notes here"]


def test_a_poor_registration_is_told(folder, scan):
    volumes = in_template(preprocess_scan(OWN_GRID, scan), overlap=0.5, similarity=0.01)
    message = "Poor registration: overlap of the brains 0.500, similarity 0.010; look at it before use."
    assert write_preprocessed(folder, scan, volumes, ["a note"]) == ["a note", message, message]
    (files,) = find_preprocessed(folder)
    assert files.sidecars["T1"]["madad"]["warnings"] == ["a note", message]
    (back,) = read_preprocessed(folder, files, ["T1"])
    assert registration_warnings(back) == [message]


# What is done


@on_either_grid
def test_a_scan_is_whole_with_all_its_contrasts_and_its_mask(template, folder, scan):
    volumes = prepared(scan, template)
    assert not is_preprocessed_whole(folder, scan, template=template)
    healthy = dataclasses.replace(scan, images={"T1": scan.images["T1"]}, lesion_mask=None)
    write_preprocessed(folder, healthy, {"T1": volumes["T1"]})
    assert is_preprocessed_whole(folder, healthy, template=template)
    assert not is_preprocessed_whole(folder, healthy, template=not template)
    assert not is_preprocessed_whole(folder, scan, template=template)
    write_preprocessed(folder, scan, volumes)
    assert is_preprocessed_whole(folder, scan, template=template)
    for path in folder.root.rglob("*_label-L_*.json"):
        path.unlink()
    assert not is_preprocessed_whole(folder, scan, template=template)


def test_an_interrupted_scan_is_not_whole(folder, scan, monkeypatch):
    volumes = prepared(scan, False)
    done = []

    def interrupted(path, content):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        Path(path).write_text(json.dumps(content))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("madad.volumes.prepared_folder.write_json", interrupted)
        write_preprocessed(folder, scan, volumes)
    assert not is_preprocessed_whole(folder, scan, template=False)
    write_preprocessed(folder, scan, volumes)
    assert is_preprocessed_whole(folder, scan, template=False)


def test_contrasts_come_in_the_order_asked_for(folder, scan):
    volumes = prepared(scan, False)
    write_preprocessed(folder, scan, volumes)
    (files,) = find_preprocessed(folder)
    for names in (["T1", "FLAIR"], ["FLAIR", "T1"]):
        for name, volume in zip(names, read_preprocessed(folder, files, names), strict=True):
            np.testing.assert_array_equal(volume.volume.values, volumes[name].volume.values)


def test_a_mask_drawn_on_the_second_contrast_is_written_on_the_grid_of_the_first(folder, scan):
    volumes = dict(prepared(scan, False))
    moved = save_scan(scan.images["T1"].parent / "moved.nii", shift_mm=30)
    source = preprocess_scan(OWN_GRID, dataclasses.replace(scan, images={"FLAIR": moved}))["FLAIR"].source
    back = AffineRegistration(nib.affines.from_matvec(np.eye(3), [-30, 0, 0]), 0.2, 0.99)
    volumes["FLAIR"] = dataclasses.replace(volumes["FLAIR"], source=source, registration=back)
    mask = save_mask(scan.lesion_mask, moved, np.s_[9:14, 12:18, 8:12])
    write_preprocessed(folder, scan, volumes)
    (files,) = find_preprocessed(folder)
    written = read_volume(files.scan.lesion_mask).values > 0
    np.testing.assert_array_equal(written, read_volume(mask).values > 0)


# What cannot be used


def test_contrasts_that_are_not_there_are_named(folder, scan):
    write_preprocessed(folder, scan, prepared(scan, False))
    (files,) = find_preprocessed(folder)
    message = r"contrasts must be among those of sub-01, got \['T2'\], with \['FLAIR', 'T1'\] there"
    with pytest.raises(ValueError, match=message):
        read_preprocessed(folder, files, ["T1", "T2"])


def test_a_scan_that_changed_since_is_refused(folder, scan):
    write_preprocessed(folder, scan, prepared(scan, False))
    save_scan(scan.images["T1"], shift_mm=1.0)
    (files,) = find_preprocessed(folder)
    with pytest.raises(ValueError, match=r"must not have changed, got another grid in .*t1\.nii\.gz"):
        read_preprocessed(folder, files, ["T1"])


def test_damaged_files_are_named(folder, scan):
    with pytest.raises(ValueError, match="DATA must hold preprocessed volumes, got none in .*prepared"):
        find_preprocessed(folder)
    write_preprocessed(folder, scan, prepared(scan, False))
    (files,) = find_preprocessed(folder)
    image = files.scan.images["T1"]
    image.write_bytes(image.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"whole NIfTI file, got .*desc-preproc_T1w\.nii\.gz"):
        read_preprocessed(folder, files, ["T1"])
    with gzip.open(image, "wb") as file:
        file.write(b"no NIfTI")
    with pytest.raises(ValueError, match=r"desc-preproc_T1w\.nii\.gz"):
        read_preprocessed(folder, files, ["T1"])
    sidecar = next(folder.root.rglob("*preproc_T1w.json"))
    for text, message in (("{", "must be JSON, got a damaged file"), ("{}", "must be of madad preprocess")):
        sidecar.write_text(text)
        with pytest.raises(ValueError, match=rf"preproc_T1w\.json {message}"):
            find_preprocessed(folder)
