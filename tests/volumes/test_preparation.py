from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from madad.datasets import Scan
from madad.mri import AffineRegistration, VolumePreprocessor
from madad.volumes.preparation import NAMES, bids_name, lesion_on_grid, preprocess_scan, registration_warnings

OWN_GRID = VolumePreprocessor(template=False)
LESION = np.s_[9:14, 12:18, 8:12]


def save(path, values, shift_mm=0.0):
    nib.save(nib.Nifti1Image(values, nib.affines.from_matvec(6 * np.eye(3), [shift_mm, -90, -60])), path)
    return path


def save_brain(path, *, seed=0, shift_mm=0.0):
    values = np.zeros((26, 30, 22), np.float32)
    values[4:22, 4:26, 4:18] = np.random.default_rng(seed).uniform(200, 900, (18, 22, 14))
    return save(path, values, shift_mm)


def save_lesion(path, shift_mm=0.0):
    mask = np.zeros((26, 30, 22), np.uint8)
    mask[LESION] = 7
    return save(path, mask, shift_mm)


@pytest.fixture
def scan(tmp_path):
    images = {"FLAIR": save_brain(tmp_path / "flair.nii", seed=1), "T1": save_brain(tmp_path / "t1.nii")}
    return Scan("01", images, lesion_mask=save_lesion(tmp_path / "lesion.nii"))


def test_contrasts_have_names_in_bids_and_unknown_ones_are_named():
    assert [bids_name(name)[1] for name in NAMES] == ["T1w", "T2w", "PDw", "FLAIR", "T1w"]
    with pytest.raises(ValueError, match=r"contrast must be one of \['FLAIR', .*got 'SWI'"):
        bids_name("SWI")


def test_only_the_contrasts_that_are_asked_for(scan):
    assert list(preprocess_scan(OWN_GRID, scan)) == ["T1", "FLAIR"]
    assert list(preprocess_scan(OWN_GRID, scan, ["FLAIR"])) == ["FLAIR"]
    assert list(preprocess_scan(OWN_GRID, scan, ["FLAIR", "T1"])) == ["FLAIR", "T1"]
    message = r"contrasts must be among those of sub-01, got \['T2'\], with \['FLAIR', 'T1'\] there"
    with pytest.raises(ValueError, match=message):
        preprocess_scan(OWN_GRID, scan, ["T1", "T2"])


def test_a_lesion_mask_may_be_drawn_on_any_contrast(scan, tmp_path):
    volumes = preprocess_scan(OWN_GRID, scan)
    moved = replace(scan, images={"FLAIR": save_brain(tmp_path / "moved.nii", shift_mm=30)})
    source = preprocess_scan(OWN_GRID, moved)["FLAIR"].source
    back = AffineRegistration(nib.affines.from_matvec(np.eye(3), [-30, 0, 0]), 0.2, 0.99)
    volumes["FLAIR"] = replace(volumes["FLAIR"], source=source, registration=back)
    expected = np.zeros((26, 30, 22), bool)
    expected[LESION] = True
    for shift_mm in (0, 30):  # drawn on T1, and on FLAIR
        save_lesion(scan.lesion_mask, shift_mm)
        np.testing.assert_array_equal(lesion_on_grid(scan, volumes.values()), expected)
    save_lesion(scan.lesion_mask, 12)
    with pytest.raises(ValueError, match="volumes must lie on one grid, got .*lesion.nii"):
        lesion_on_grid(scan, volumes.values())


def test_a_poor_registration_is_told(scan):
    volume = preprocess_scan(OWN_GRID, scan)["T1"]
    assert registration_warnings(volume) == []
    assert registration_warnings(replace(volume, registration=AffineRegistration(np.eye(4), 0.1, 0.96))) == []
    poor = replace(volume, registration=AffineRegistration(np.eye(4), 0.01, 0.5))
    message = "Poor registration: overlap of the brains 0.500, similarity 0.010; look at it before use."
    assert registration_warnings(poor) == [message]
    unknown = replace(volume, registration=AffineRegistration(np.eye(4), 0.01, None))
    assert "overlap of the brains unknown" in registration_warnings(unknown)[0]
