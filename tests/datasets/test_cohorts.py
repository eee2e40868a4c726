import nibabel as nib
import numpy as np
import pytest

from madad.datasets import find_atlas, find_bids, find_brats, find_ixi, load_scans


@pytest.fixture
def touch(tmp_path):
    """Make empty files: names alone decide."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def names(root, scans):
    """Each scan as plain text, its files relative to the root."""

    def relative(path):
        return path and path.relative_to(root).as_posix()

    return [
        (
            scan.subject,
            scan.session,
            {contrast: relative(path) for contrast, path in scan.images.items()},
            relative(scan.lesion_mask),
            relative(scan.brain_mask),
        )
        for scan in scans
    ]


def test_ixi(touch):
    root = touch(
        "IXI-T1/IXI012-HH-1211-T1.nii.gz",
        "IXI-T1/IXI002-Guys-0828-T1.nii.gz",
        "IXI-T1/IXI002-Guys-0828-T1_brain_mask.nii.gz",
        "IXI-T2/IXI002-Guys-0828-T2.nii.gz",
        "IXI-T2/IXI002-Guys-0828-T2_mask.nii.gz",
        "IXI-PD/IXI002-Guys-0828-PD.nii",
        "IXI-PD/IXI012-HH-1211-PD.nii.gz",
        "IXI-PD/IXI012-HH-1211-PD_mask.nii.gz",
        "IXI-DTI/IXI002-Guys-0828-DTI-00.nii.gz",
        "IXI-MRA/IXI002-Guys-0828-MRA.nii.gz",
        "IXI-T1/IXI013-HH-1212-T1.nii.gz.part",
        "IXI.xls",
    )
    assert names(root, find_ixi(root)) == [
        (
            "IXI002",
            None,
            {
                "T1": "IXI-T1/IXI002-Guys-0828-T1.nii.gz",
                "T2": "IXI-T2/IXI002-Guys-0828-T2.nii.gz",
                "PD": "IXI-PD/IXI002-Guys-0828-PD.nii",
            },
            None,
            "IXI-T1/IXI002-Guys-0828-T1_brain_mask.nii.gz",
        ),
        (
            "IXI012",
            None,
            {"T1": "IXI-T1/IXI012-HH-1211-T1.nii.gz", "PD": "IXI-PD/IXI012-HH-1211-PD.nii.gz"},
            None,
            "IXI-PD/IXI012-HH-1211-PD_mask.nii.gz",
        ),
    ]


def test_brats(touch):
    kinds = ("flair", "t1", "t1ce", "t2", "seg")
    root = touch(
        *(f"b/BraTS2021_00002/BraTS2021_00002_{kind}.nii.gz" for kind in kinds),
        *(f"BraTS2021_00000/BraTS2021_00000_{kind}.nii.gz" for kind in kinds[:-1]),
        *(f"HGG/Brats18_TCIA10_639_1/Brats18_TCIA10_639_1_{kind}.nii" for kind in kinds),
        "BraTS20_Training_001/BraTS20_Training_001_t1.nii",
        "BraTS20_Training_001/W39_1998.09.19_Segm.nii",
        "name_mapping.csv",
    )
    found = names(root, find_brats(root))
    assert [scan[0] for scan in found] == [
        "BraTS2021_00000",
        "BraTS2021_00002",
        "BraTS20_Training_001",
        "Brats18_TCIA10_639_1",
    ]
    _, session, images, lesion_mask, brain_mask = found[1]
    stem = "b/BraTS2021_00002/BraTS2021_00002"
    assert images == {kind.upper(): f"{stem}_{kind}.nii.gz" for kind in kinds[:-1]}
    assert (session, lesion_mask, brain_mask) == (None, f"{stem}_seg.nii.gz", None)
    assert [scan[3] for scan in found[::2]] == [None, None]
    assert found[3][3] == "HGG/Brats18_TCIA10_639_1/Brats18_TCIA10_639_1_seg.nii"


@pytest.mark.parametrize("part", ["", "Training"])
def test_atlas(touch, part):
    def stem(site, subject):
        folder = f"R{site}/sub-r{site}s{subject}/ses-1/anat"
        return f"{folder}/sub-r{site}s{subject}_ses-1_space-MNI152NLin2009aSym"

    first, second = f"Training/{stem('009', '002')}", f"Training/{stem('001', '001')}"
    root = touch(
        f"{first}_T1w.nii.gz",
        f"{first}_label-L_desc-T1lesion_mask.nii.gz",
        f"{first}_desc-brain_mask.nii.gz",
        f"{second}_T1w.nii.gz",
        f"{second}_T1w.json",
        f"{second}_label-L_desc-T1lesion_mask.nii.gz",
        f"Testing/{stem('002', '001')}_T1w.nii.gz",
    )
    assert names(root, find_atlas(root / part)) == [
        (
            "r001s001",
            "1",
            {"T1": f"{second}_T1w.nii.gz"},
            f"{second}_label-L_desc-T1lesion_mask.nii.gz",
            None,
        ),
        (
            "r009s002",
            "1",
            {"T1": f"{first}_T1w.nii.gz"},
            f"{first}_label-L_desc-T1lesion_mask.nii.gz",
            f"{first}_desc-brain_mask.nii.gz",
        ),
    ]
    assert [scan.subject for scan in find_atlas(root / "Testing")] == ["r002s001"]


def test_bids_raw_with_derivatives(touch):
    root = touch(
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w.json",
        "sub-02/anat/sub-02_ce-gd_T1w.nii.gz",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
        "sub-02/anat/sub-02_label-lesion_roi.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_run-2_FLAIR.nii",
        "sub-01/ses-b/anat/sub-01_ses-b_run-1_FLAIR.nii",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_acq-low_T2w.nii.gz",
        "derivatives/labels/sub-01/ses-a/anat/sub-01_ses-a_label-L_mask.nii.gz",
        "derivatives/labels/sub-01/ses-b/sub-01_ses-b_label-lesion_desc-rater1_mask.nii.gz",
        "derivatives/labels/sub-01/ses-b/sub-01_ses-b_label-lesion_mask.nii.gz",
        "derivatives/prep/sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-01/ses-a/anat/sub-01_ses-a_space-MNI_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-01/ses-a/anat/sub-01_ses-a_label-GM_mask.nii.gz",
        "derivatives/prep/sub-02/anat/sub-02_space-orig_label-brain_mask.nii.gz",
        "derivatives/prep/sub-02/func/sub-02_desc-brain_mask.nii.gz",
    )
    a = "sub-01/ses-a/anat/sub-01_ses-a"
    assert names(root, find_bids(root)) == [
        (
            "01",
            "a",
            {"T2": f"{a}_T2w.nii.gz"},
            f"derivatives/labels/{a}_label-L_mask.nii.gz",
            f"derivatives/prep/{a}_desc-brain_mask.nii.gz",
        ),
        (
            "01",
            "b",
            {"FLAIR": "sub-01/ses-b/anat/sub-01_ses-b_run-1_FLAIR.nii"},
            "derivatives/labels/sub-01/ses-b/sub-01_ses-b_label-lesion_mask.nii.gz",
            None,
        ),
        (
            "02",
            None,
            {"T1": "sub-02/anat/sub-02_T1w.nii.gz", "T1CE": "sub-02/anat/sub-02_ce-gd_T1w.nii.gz"},
            "sub-02/anat/sub-02_label-lesion_roi.nii.gz",
            "derivatives/prep/sub-02/anat/sub-02_space-orig_label-brain_mask.nii.gz",
        ),
    ]


def test_bids_derivative_in_a_space(touch):
    root = touch(
        "sub-01/anat/sub-01_space-MNI_desc-preproc_T1w.nii.gz",
        "sub-01/anat/sub-01_space-MNI_desc-brain_mask.nii.gz",
        "sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    )
    with pytest.raises(ValueError) as error:
        find_bids(root)
    for word in ("root must hold", "space=None", "images for space='MNI' only", "another space"):
        assert word in str(error.value)
    assert names(root, find_bids(root, space="MNI")) == [
        (
            "01",
            None,
            {"T1": "sub-01/anat/sub-01_space-MNI_desc-preproc_T1w.nii.gz"},
            None,
            "sub-01/anat/sub-01_space-MNI_desc-brain_mask.nii.gz",
        )
    ]


@pytest.mark.parametrize("find", [find_atlas, find_bids, find_brats, find_ixi])
def test_other_folders_are_named(touch, find):
    root = touch("reports/one.txt", "sub-01.nii.gz")
    with pytest.raises(
        FileNotFoundError, match=r"root must name an existing folder, got .*nowhere.*spelling"
    ):
        find(root / "nowhere")
    with pytest.raises(
        ValueError, match=r"root must hold .*, got .*'reports', 'sub-01.nii.gz'.*Give the folder"
    ):
        find(root)


def test_what_is_found_can_be_loaded(tmp_path):
    brain = np.zeros((24, 24, 16), np.int16)
    brain[4:20, 4:20, 2:14] = 100
    lesion = np.zeros(brain.shape, np.uint8)
    lesion[14:18, 15:18, 8] = 1
    folder = tmp_path / "Training/R001/sub-r001s001/ses-1/anat"
    folder.mkdir(parents=True)
    files = {"T1w": brain, "label-L_desc-T1lesion_mask": lesion}
    for name, array in files.items():
        path = folder / f"sub-r001s001_ses-1_space-MNI152NLin2009aSym_{name}.nii.gz"
        nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    data = load_scans(find_atlas(tmp_path), contrast="T1", largest_lesion_only=True)
    assert data.subjects.tolist() == ["r001s001"] and data.z_index.tolist() == [8]
    _, rows, columns = np.nonzero(data.lesion_masks)
    assert {*rows} == {15, 16, 17} and {*columns} == {6, 7, 8, 9}  # the file runs to the left and to the back
