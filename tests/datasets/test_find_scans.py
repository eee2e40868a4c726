import os
from pathlib import Path

import pytest

from madad.datasets import Scan, find_bids, find_scans, scan_name


@pytest.fixture
def touch(tmp_path, monkeypatch):
    """Make empty files, for names alone decide, and go to their folder."""
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.chdir(root)

    def make(*names):
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return make


@pytest.fixture
def write(touch):
    def table(name, *rows, encoding="utf-8"):
        path = touch(name) / name
        path.write_text("\n".join(rows), encoding=encoding)
        return path

    return table


def names(scans):
    """Each scan as plain text, its files relative to the working directory."""

    def relative(path):
        return path and Path(os.path.relpath(path)).as_posix()

    return [
        (
            scan_name(scan),
            {contrast: relative(path) for contrast, path in scan.images.items()},
            relative(scan.brain_mask),
            relative(scan.lesion_mask),
        )
        for scan in scans
    ]


def message_of(inputs, error=ValueError, **options):
    with pytest.raises(error) as raised:
        find_scans(inputs, **options)
    return str(raised.value)


def test_real_names(touch):
    ms, brats, ixi = "lesion_ms_patient07", "lesion_Brats18_TCIA10_639_1", "healthy_IXI012-HH-1211_T1_2mm"
    root = touch(
        *(f"{ms}_{role}.nii.gz" for role in ("FLAIR", "T1", "T2", "brainmask", "lesion")),
        *(f"{brats}_{role}.nii.gz" for role in ("flair", "t1", "t2", "seg")),
        f"{ixi}.nii.gz",
        f"{ixi}_DLMUSE_labels.nii.gz",
        "readme.md",
    )
    expected = [
        ("sub-healthyIXI012HH12112mm", {"T1": f"{ixi}.nii.gz"}, None, None),
        (
            "sub-lesionBrats18TCIA106391",
            {contrast: f"{brats}_{contrast.lower()}.nii.gz" for contrast in ("FLAIR", "T1", "T2")},
            None,
            f"{brats}_seg.nii.gz",
        ),
        (
            "sub-lesionmspatient07",
            {contrast: f"{ms}_{contrast}.nii.gz" for contrast in ("FLAIR", "T1", "T2")},
            f"{ms}_brainmask.nii.gz",
            f"{ms}_lesion.nii.gz",
        ),
    ]
    assert names(find_scans(root)) == expected
    files = sorted(root.glob("*.nii.gz"), reverse=True)
    assert names(find_scans(files)) == expected
    assert names(find_scans([root, *files], contrast="FLAIR")) == expected


@pytest.mark.parametrize(
    ("word", "contrast"),
    [
        *(("t1", "T1"), ("T1w", "T1"), ("T2", "T2"), ("t2w", "T2"), ("PD", "PD"), ("PDw", "PD")),
        *(("Flair", "FLAIR"), ("t1ce", "T1CE"), ("T1c", "T1CE"), ("T1Gd", "T1CE")),
    ],
)
def test_contrasts_in_names(touch, word, contrast):
    file = f"p_1_{word}.nii"
    touch(file)
    assert names(find_scans(file)) == [("sub-p1", {contrast: file}, None, None)]


@pytest.mark.parametrize("name", ["IXI002-Guys-0828-T1", "IXI002-Guys_T1_0828", "IXI002_T2_Guys-T1-0828"])
def test_the_last_contrast_of_a_name_counts_wherever_it_is(touch, name):
    touch(f"{name}.nii.gz")
    (scan,) = find_scans(f"{name}.nii.gz")
    assert set(scan.images) == {"T1"}
    assert scan.subject == ("IXI002T2Guys0828" if "T2" in name else "IXI002Guys0828")


@pytest.mark.parametrize(
    ("ending", "attribute"),
    [
        *((ending, "brain_mask") for ending in ("brainmask", "brain_mask", "BrainMask", "T1_brain_mask")),
        *((ending, "lesion_mask") for ending in ("lesion", "lesions", "seg", "Tumor", "lesion_mask")),
        *((ending, None) for ending in ("mask", "labels", "label", "dseg", "ROI", "parcellation", "T1_mask")),
    ],
)
def test_masks_and_labels_in_names(touch, ending, attribute):
    root = touch("p-1_T1.nii.gz", f"p-1_{ending}.nii.gz", f"p-2_{ending}.nii.gz")
    (scan,) = find_scans(root)
    found = {name: getattr(scan, name) for name in ("brain_mask", "lesion_mask") if getattr(scan, name)}
    assert found == ({attribute: root / f"p-1_{ending}.nii.gz"} if attribute else {})
    assert scan.images == {"T1": root / "p-1_T1.nii.gz"}


def test_of_masks_for_several_contrasts_one_is_taken(touch):
    def taken(**options):
        (scan,) = find_scans(root, **options)
        return scan.brain_mask.name

    root = touch(*(f"p-{contrast}{end}.nii" for contrast in ("T2", "PD") for end in ("", "_brain_mask")))
    assert taken() == "p-PD_brain_mask.nii"
    assert taken(contrast="t2w") == "p-T2_brain_mask.nii"
    touch("p_brainmask.nii")
    assert taken() == "p_brainmask.nii"
    assert taken(contrast="PD") == "p-PD_brain_mask.nii"


def test_contrast_is_for_names_without_one(touch):
    root = touch("a.nii.gz", "b_T2.nii.gz", "a_seg.nii.gz")
    assert names(find_scans(root, contrast="flair")) == [
        ("sub-a", {"FLAIR": "a.nii.gz"}, None, "a_seg.nii.gz"),
        ("sub-b", {"T2": "b_T2.nii.gz"}, None, None),
    ]
    assert set(find_scans("a.nii.gz", contrast="swi")[0].images) == {"SWI"}


def test_names_without_a_contrast_are_listed(touch):
    root = touch(*(f"{letter}.nii.gz" for letter in "abcdefg"), "h_T1.nii.gz")
    message = message_of(root)
    for part in ("inputs must tell", "contrast", "a.nii.gz", "e.nii.gz' and 2 more", "..._T1w.nii.gz"):
        assert part in message
    for part in ("pass --contrast", "table"):
        assert part in message
    assert "f.nii.gz" not in message and "h_T1" not in message


def test_subjects_by_folder(touch):
    root = touch(
        *(f"{folder}/{file}" for folder in ("p_02", "sub-01") for file in ("T1.nii.gz", "lesion_mask.nii")),
        "p_02/FLAIR.nii.gz",
        "T2.nii.gz",
    )
    expected = [
        ("sub-01", {"T1": "sub-01/T1.nii.gz"}, None, "sub-01/lesion_mask.nii"),
        ("sub-data", {"T2": "T2.nii.gz"}, None, None),
        ("sub-p02", {"T1": "p_02/T1.nii.gz", "FLAIR": "p_02/FLAIR.nii.gz"}, None, "p_02/lesion_mask.nii"),
    ]
    found = names(find_scans(root))
    assert sorted(found) == sorted(expected) and [scan[0] for scan in found] == [scan[0] for scan in expected]
    assert names(find_scans("T2.nii.gz")) == expected[1:2]  # relative, as a command is given it


def test_a_subject_must_be_told(touch):
    touch("脳/T1.nii.gz")
    message = message_of("脳/T1.nii.gz", contrast="T1")
    assert "inputs must tell subject" in message and "'脳/T1.nii.gz'" in message and "Name it" in message


def test_folders_hide_some_files(touch):
    root = touch(
        "a/b/p_T1.nii.gz",
        "a/derivatives/p_T1.nii.gz",
        "derivatives/q_T1.nii.gz",
        ".cache/r_T1.nii.gz",
        "a/._p_T1.nii.gz",
        "a/p_T2.nii.gz.part",
    )
    assert names(find_scans(root)) == [("sub-p", {"T1": "a/b/p_T1.nii.gz"}, None, None)]
    assert [scan.subject for scan in find_scans(root / "derivatives")] == ["q"]


def test_bids_folder(touch):
    stem = "sub-01/ses-2/anat/sub-01_ses-2"
    root = touch(
        f"{stem}_run-1_T1w.nii.gz",
        f"{stem}_run-2_T1w.nii.gz",
        "sub-01/ses-2/func/sub-01_ses-2_task-rest_bold.nii.gz",
        f"derivatives/x/{stem}_desc-brain_mask.nii.gz",
        f"derivatives/x/{stem}_label-lesion_mask.nii.gz",
        "extra_T1.nii.gz",
    )
    assert find_scans(root) == find_bids(root)
    assert names(find_scans(str(root))) == [
        (
            "sub-01_ses-2",
            {"T1": f"{stem}_run-1_T1w.nii.gz"},
            f"derivatives/x/{stem}_desc-brain_mask.nii.gz",
            f"derivatives/x/{stem}_label-lesion_mask.nii.gz",
        )
    ]


def test_a_bids_derivative_goes_by_names(touch):
    stem = "sub-01/anat/sub-01_space-MNI"
    root = touch(
        *(f"{stem}_{end}.nii.gz" for end in ("desc-preproc_T1w", "desc-brain_mask", "label-GM_mask", "dseg")),
    )
    assert names(find_scans(root)) == [
        ("sub-01", {"T1": f"{stem}_desc-preproc_T1w.nii.gz"}, f"{stem}_desc-brain_mask.nii.gz", None)
    ]


def test_bids_names_of_files(touch):
    stem = "sub-01_ses-2"
    files = [
        *(f"{stem}_acq-T2_run-1_T1w.nii.gz", f"{stem}_ce-gd_T1w.nii.gz", f"{stem}_t2_2mm.nii"),
        *(f"{stem}_desc-brain_mask.nii.gz", f"{stem}_lesion.nii.gz", f"{stem}_space-T1w_dseg.nii.gz"),
        "sub-01_ses-10_FLAIR.nii.gz",
        "sub-01_PDw.nii.gz",
    ]
    touch(*files)
    assert names(find_scans(files)) == [
        ("sub-01", {"PD": files[7]}, None, None),
        ("sub-01_ses-10", {"FLAIR": files[6]}, None, None),
        ("sub-01_ses-2", {"T1": files[0], "T1CE": files[1], "T2": files[2]}, files[3], files[4]),
    ]
    touch("sub-01_space-T1w_bold.nii.gz")
    assert "sub-01_space-T1w_bold.nii.gz" in message_of("sub-01_space-T1w_bold.nii.gz")


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("p_1_T1.nii.gz", "p1_T1w.nii.gz", "T1 image"),
        ("a/p_T1.nii.gz", "b/p_T1.nii.gz", "T1 image"),
        ("a/anat/T1.nii.gz", "b/anat/T1.nii.gz", "T1 image"),
        ("p_T1.nii", "p_T1.nii.gz", "T1 image"),
        ("p_lesion.nii", "p_seg.nii", "lesion mask"),
        ("p_T1_brainmask.nii", "p_T1_brain_mask.nii", "T1 brain mask"),
    ],
)
def test_two_files_for_one_place_are_named(touch, first, second, what):
    root = touch(first, second, "p_FLAIR.nii.gz")
    message = message_of(root)
    for part in (f"inputs must hold one {what} per subject", str(root / first), str(root / second), "table"):
        assert part in message


def test_masks_without_an_image_do_not_matter(touch):
    root = touch("p_lesion.nii", "p_seg.nii", "q_T1.nii")
    assert names(find_scans(root)) == [("sub-q", {"T1": "q_T1.nii"}, None, None)]
    message = message_of([root / "p_lesion.nii", root / "p_seg.nii"])
    for part in ("inputs must hold an image", "p_lesion.nii", "p_seg.nii", "Add images"):
        assert part in message
    touch("labels/p_dseg.nii")
    assert "inputs must hold an image, got none" in message_of(root / "labels")


@pytest.mark.parametrize(("name", "separator"), [("scans.tsv", "\t"), ("scans.CSV", ",")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_table(write, name, separator, encoding):
    rows = [
        ["image", "age", " subject", "session", "contrast", "brain_mask", "lesion_mask"],
        ["a/one.nii.gz", "40", "sub-p-02", "ses-1", "T1w", "brain.nii", "n/a"],
        ["/elsewhere/one.nii", "", "p-02", "1", "swi", "brain.nii", "lesion.nii"],
        ["", "", "", "", "", "", ""],
        ["x_seg_FLAIR.nii.gz", "30", "01", "N/A", "", "", ""],
        ["../y_t1gd.nii.gz", "30", "01", "", "n/a"],
    ]
    table = write(f"tables/{name}", *(separator.join(row) for row in rows), "", encoding=encoding)
    one, two = find_scans(table)
    assert one == Scan(
        "01",
        {"FLAIR": table.parent / "x_seg_FLAIR.nii.gz", "T1CE": table.parent / "../y_t1gd.nii.gz"},
    )
    assert two == Scan(
        "p02",
        {"T1": table.parent / "a/one.nii.gz", "SWI": Path("/elsewhere/one.nii")},
        lesion_mask=table.parent / "lesion.nii",
        brain_mask=table.parent / "brain.nii",
        session="1",
    )


def test_a_table_with_few_columns(write):
    table = write("scans.csv", "subject,image", '1,"one, two.nii"', "2,b_T2.nii")
    found = find_scans(table, contrast="t1")
    assert [(scan.subject, *scan.images) for scan in found] == [("1", "T1"), ("2", "T2")]
    assert found[0].images["T1"] == table.parent / "one, two.nii"
    message = message_of(table)
    for part in ("inputs must tell", "'one, two.nii' in", "scans.csv', line 2, column 'image'", "--contrast"):
        assert part in message
    assert "b_T2" not in message


HEADER = "image,subject,session,contrast,brain_mask,lesion_mask"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            "b.nii,sub-01,2,t1,,",
            [
                "one T1 image per",
                "'T1w' in",
                "line 2",
                "'t1' in",
                "line 3, column 'contrast'",
                "Leave one out",
            ],
        ),
        (
            "b_T1.nii,01,2,,,",
            ["one T1 image per", "'b_T1.nii' in", "line 3, column 'image'", "Leave one out"],
        ),
        ("a.nii,01,2,T1,,", ["one T1 image per", "line 3, column 'contrast'", "Leave one out"]),
        (
            "b.nii,01,2,T2,x.nii,",
            ["one brain mask", "'x.nii' in", "line 3, column 'brain_mask'", "Leave one"],
        ),
        ("b.nii,01,2,T2,,x.nii", ["one lesion mask", "'x.nii' in", "line 3, column 'lesion_mask'", "Leave"]),
        ("b.nii,,2,T2,,", ["letters or digits in a subject", "'' in", "line 3, column 'subject'", "Name it"]),
        ("b.nii,n/a,2,T2,,", ["letters or digits in a subject", "line 3, column 'subject'", "Name it"]),
        ("b.nii,sub-,2,T2,,", ["letters or digits in a subject", "'sub-' in", "column 'subject'", "Name it"]),
        ("b.nii,01,--,T2,,", ["letters or digits in a session", "'--' in", "column 'session'", "Name it"]),
        (
            "b.nii,0-1,2,T2,,",
            ["subjects that differ", "'0-1' in", "line 3, column 'subject'", "'01'", "rename"],
        ),
        (
            "b.nii,01,2.,T2,,",
            ["sessions that differ", "'2.' in", "line 3, column 'session'", "'2'", "rename"],
        ),
        (",01,2,T2,,", ["NIfTI files", "'' in", "line 3, column 'image'"]),
        ("b.dcm,01,2,T2,,", ["NIfTI files", "'b.dcm' in", "line 3, column 'image'", "dcm2niix"]),
        ("b.nii,01,2,T2,,c.png", ["NIfTI files", "'c.png' in", "line 3, column 'lesion_mask'", "Convert"]),
        ("b.nii,03,2,,,", ["contrast", "'b.nii' in", "line 3, column 'image'", "--contrast"]),
    ],
)
def test_errors_in_rows_are_located(write, row, parts):
    table = write("scans.csv", HEADER, "a.nii,01,2,T1w,brain.nii,lesion.nii", row)
    message = message_of(table)
    for part in ("inputs must", str(table), *parts):
        assert part in message


def test_the_same_session_name_may_be_spelled_anew_for_another_subject(write):
    table = write("scans.csv", HEADER, "a.nii,1,v-1,T1,,", "b.nii,2,v1,T1,,")
    assert [scan_name(scan) for scan in find_scans(table)] == ["sub-1_ses-v1", "sub-2_ses-v1"]


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (["image;subject", "a.nii;1"], "['image;subject']"),
        (["image,subject"], "['image', 'subject'] and 0 rows"),
        (["image,session", "a.nii,1"], "['image', 'session']"),
        ([], "[] and 0 rows"),
    ],
)
def test_other_tables_are_named(write, rows, got):
    table = write("scans.csv", *rows)
    message = message_of(table)
    for part in (
        "inputs must be tables with columns 'image' and 'subject'",
        str(table),
        got,
        "tabs",
        "commas",
    ):
        assert part in message


def test_tables_must_be_utf_8(write):
    table = write("scans.tsv", "image\tsubject", encoding="utf-16")
    message = message_of(table)
    assert "inputs must be tables of text in UTF-8" in message and str(table) in message and "Save" in message


def test_inputs_of_several_kinds_are_joined(touch, write):
    bids = touch("bids/sub-02/anat/sub-02_T1w.nii.gz", "more/sub-02_FLAIR.nii", "sub-02_lesion.nii") / "bids"
    table = write("t/scans.csv", "image,subject,contrast", "x.nii,1,T1", "y.nii,02,T2")
    inputs = (path for path in [bids, table, "more", "sub-02_lesion.nii", "more/sub-02_FLAIR.nii", str(bids)])
    two, one = names(find_scans(inputs))
    assert one == ("sub-1", {"T1": "t/x.nii"}, None, None)
    images = {
        "T1": "bids/sub-02/anat/sub-02_T1w.nii.gz",
        "T2": "t/y.nii",
        "FLAIR": "more/sub-02_FLAIR.nii",
    }
    assert two == ("sub-02", images, None, "sub-02_lesion.nii")


@pytest.mark.parametrize("inputs", ["nowhere", ["a_T1.nii", Path("nowhere")]])
def test_missing_paths_are_named(touch, inputs):
    touch("a_T1.nii")
    message = message_of(inputs, FileNotFoundError)
    assert "inputs must exist, got 'nowhere'" in message and "spelling" in message


@pytest.mark.parametrize("file", ["image.dcm", "notes.txt", "image.mgz", "IM00001"])
def test_other_formats_are_named(touch, file):
    touch(f"scanner/{file}")
    for inputs in ("scanner", f"scanner/{file}"):
        message = message_of(inputs)
        assert "inputs must be NIfTI files" in message and f"got 'scanner/{file}'" in message
        assert "tables (.tsv, .csv)" in message and "dcm2niix" in message


def test_empty_folders_and_lists_are_named(touch):
    (touch() / "empty").mkdir()
    assert "inputs must be NIfTI files" in message_of("empty") and "empty folder 'empty'" in message_of(
        "empty"
    )
    assert "inputs must hold an image, got none" in message_of([])


def test_contrast_must_be_a_name(touch):
    touch("a.nii")
    message = message_of("a.nii", contrast="")
    assert "contrast must be a name like 'T1', got ''. Use None" in message


def test_t2_flair_is_one_contrast_of_the_same_person(tmp_path):
    for name in ("p01_T1", "p01_T2", "p01_T2_FLAIR"):
        (tmp_path / f"{name}.nii.gz").touch()
    (scan,) = find_scans(tmp_path)
    assert scan.subject == "p01" and set(scan.images) == {"T1", "T2", "FLAIR"}


def test_names_of_brats_2023(tmp_path):
    for name in ("t1n", "t1c", "t2w", "t2f", "seg"):
        (tmp_path / f"BraTS-GLI-00000-000-{name}.nii.gz").touch()
    (scan,) = find_scans(tmp_path)
    assert set(scan.images) == {"T1", "T1CE", "T2", "FLAIR"} and scan.lesion_mask is not None
