import json
import sys

import nibabel as nib
import numpy as np

from madad.mri.registration import TEMPLATE_SPACE

PREPROC = "desc-preproc_T1w"


def test_outputs_are_a_bids_derivative(prepared, tree, rows_of):
    names = set(tree(prepared))
    assert {"dataset_description.json", "README.md", ".bidsignore", "errors.tsv"} <= names
    assert {f"sub-h0/anat/sub-h0_{PREPROC}.nii.gz", f"sub-h0/anat/sub-h0_{PREPROC}.json"} <= names
    assert "sub-h0/anat/sub-h0_desc-brain_mask.nii.gz" in names
    assert not [name for name in names if name.endswith(".tmp")]
    description = json.loads((prepared / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "madad"
    assert description["madad"]["parameters"]["template"] is False
    rows = rows_of(prepared / "preprocessing.tsv")
    assert [row["participant_id"] for row in rows] == [f"sub-h{i}" for i in range(5)]
    assert {row["brain_made_by"] for row in rows} == {"stripped"}
    assert all(800 < float(row["brain_ml"]) < 1000 for row in rows)
    assert rows_of(prepared / "errors.tsv") == []


def test_intensities_are_scaled_and_stay_on_the_grid(prepared, healthy):
    image = nib.load(prepared / "sub-h0" / "anat" / f"sub-h0_{PREPROC}.nii.gz")
    raw = nib.load(healthy.parent / "h0.nii.gz")
    values, before = image.get_fdata(), raw.get_fdata()
    np.testing.assert_array_equal(image.affine, raw.affine)
    np.testing.assert_array_equal(values > 0, before > 0)
    inside = before > 0
    expected = (0.4 * before / np.median(before[inside])).clip(1 / 255, 1)
    np.testing.assert_allclose(values[inside], expected[inside], rtol=1e-5)


def test_existing_outputs_are_skipped_and_overwritten_on_request(run, healthy, tmp_path, tree):
    out = tmp_path / "out"
    command = ("preprocess", healthy, out, "--no-template", "--json")
    first = json.loads(run(*command)[1])
    assert (len(first["done"]), len(first["skipped"])) == (5, 0)
    before = tree(out)
    image = out / "sub-h1" / "anat" / f"sub-h1_{PREPROC}.nii.gz"
    image.write_bytes(b"mine")
    second = json.loads(run(*command)[1])
    assert (len(second["done"]), len(second["skipped"])) == (0, 5)
    assert image.read_bytes() == b"mine"
    third = json.loads(run(*command, "--overwrite")[1])
    assert len(third["done"]) == 5
    assert tree(out) == before


def test_other_parameters_are_not_mixed_in(run, prepared, healthy, tree):
    before = tree(prepared)
    status, _, errors = run("preprocess", healthy, prepared, "--no-template", "--center", "mode")
    assert status == 2
    assert "same parameters" in errors and "center 'median', not 'mode'" in errors and "--overwrite" in errors
    assert tree(prepared) == before


def test_a_folder_with_something_else_is_refused(run, healthy, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, errors = run("preprocess", healthy, tmp_path, "--no-template")
    assert status == 2 and "something else" in errors and str(tmp_path) in errors
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_dry_run_writes_nothing(run, healthy, tmp_path):
    status, printed, _ = run("preprocess", healthy, tmp_path / "out", "--dry-run")
    assert status == 0 and printed.startswith("5 to do, 0 skipped")
    assert not (tmp_path / "out").exists()


def test_bids_folder_with_sessions_and_contrasts(run, brain, save, tmp_path, tree):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for session in ("1", "2"):
        anat = raw / "sub-01" / f"ses-{session}" / "anat"
        save(anat / f"sub-01_ses-{session}_T1w.nii.gz", brain(int(session))[0])
        save(anat / f"sub-01_ses-{session}_FLAIR.nii.gz", brain(int(session), contrast="FLAIR")[0])
    (raw / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    assert run("preprocess", raw, out, "--no-template", "--quiet")[0] == 0
    names = set(tree(out))
    for contrast in ("T1w", "FLAIR"):
        assert f"sub-01/ses-2/anat/sub-01_ses-2_desc-preproc_{contrast}.nii.gz" in names
    sidecar = json.loads((out / "sub-01/ses-2/anat/sub-01_ses-2_desc-preproc_T1w.json").read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"]
    assert sidecar["SkullStripped"] is True


def test_template_space_keeps_the_matrix_and_the_lesion_mask(run, brain, save, write_table, tmp_path):
    values, _, lesion = brain(3, lesion=True)
    row = {"subject": "01", "contrast": "T1", "image": save(tmp_path / "a.nii.gz", values)}
    row["lesion_mask"] = save(tmp_path / "l.nii.gz", lesion, dtype=np.uint8)
    table = write_table(tmp_path / "scans.tsv", [row])
    assert run("preprocess", table, tmp_path / "out", "--quiet")[0] == 0
    anat = tmp_path / "out" / "sub-01" / "anat"
    image = nib.load(anat / f"sub-01_space-{TEMPLATE_SPACE}_{PREPROC}.nii.gz")
    assert image.shape == (197, 233, 189) and image.header["sform_code"] == 4
    matrix = np.loadtxt(anat / f"sub-01_from-T1w_to-{TEMPLATE_SPACE}_mode-image_xfm.txt")
    moved = nib.load(anat / f"sub-01_space-{TEMPLATE_SPACE}_label-L_desc-expert_mask.nii.gz")
    raw = nib.load(tmp_path / "l.nii.gz")
    before = raw.affine @ [*np.argwhere(lesion).mean(axis=0), 1]
    after = moved.affine @ [*np.argwhere(np.asarray(moved.dataobj)).mean(axis=0), 1]
    np.testing.assert_allclose(matrix @ before, after, atol=1.0)


def test_an_unknown_contrast_costs_a_row(run, brain, save, write_table, tmp_path, rows_of):
    rows = [
        {"subject": "a", "contrast": "SWI", "image": save(tmp_path / "a.nii.gz", brain(0)[0])},
        {"subject": "b", "contrast": "T1", "image": save(tmp_path / "b.nii.gz", brain(1)[0])},
    ]
    out = tmp_path / "out"
    assert run("preprocess", write_table(tmp_path / "t.tsv", rows), out, "--no-template", "--quiet")[0] == 1
    (row,) = rows_of(out / "errors.tsv")
    assert row["participant_id"] == "sub-a" and "'SWI'" in row["message"] and "FLAIR" in row["message"]


def test_a_missing_extra_is_one_error_that_names_it(run, healthy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    status, _, errors = run("preprocess", healthy, tmp_path / "out", "--quiet")
    assert status == 2
    assert errors.count("madad: error:") == 1 and "madad[mri]" in errors


def test_several_contrasts_end_on_one_grid_though_scanned_on_others(run, brain, save, write_table, tmp_path):
    values = brain(1)[0]
    flair = brain(1, contrast="FLAIR")[0][2:-1, 1:, 3:]
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = np.array([-70, -90, -60]) + 4.0 * np.array([2, 1, 3])
    rows = [
        {"subject": "01", "contrast": "FLAIR", "image": save(tmp_path / "f.nii.gz", flair, affine=affine)},
        {"subject": "01", "contrast": "T1", "image": save(tmp_path / "t.nii.gz", values)},
    ]
    out = tmp_path / "out"
    assert run("preprocess", write_table(tmp_path / "t.tsv", rows), out, "--no-template", "--quiet")[0] == 0
    one, other = (
        nib.load(out / "sub-01" / "anat" / f"sub-01_desc-preproc_{name}.nii.gz") for name in ("T1w", "FLAIR")
    )
    assert one.shape == other.shape == values.shape
    np.testing.assert_array_equal(one.affine, other.affine)
    np.testing.assert_array_equal(one.get_fdata() > 0, other.get_fdata() > 0)


def test_done_again_nothing_is_left_of_what_is_gone(run, brain, save, tmp_path, tree):
    raw = tmp_path / "raw"
    values, _, lesion = brain(1, lesion=True)
    save(raw / "p1" / "T1.nii.gz", values)
    before = tmp_path / "before"
    assert run("preprocess", raw, before, "--no-template", "--quiet")[0] == 0
    flair = save(raw / "p1" / "FLAIR.nii.gz", brain(1, contrast="FLAIR")[0])
    mask = save(raw / "p1" / "lesion.nii.gz", lesion, dtype=np.uint8)
    out = tmp_path / "out"
    assert run("preprocess", raw, out, "--no-template", "--quiet")[0] == 0
    assert {"sub-p1_desc-preproc_FLAIR.nii.gz", "sub-p1_label-L_desc-expert_mask.nii.gz"} <= {
        path.name for path in out.rglob("*")
    }
    flair.unlink()
    mask.unlink()
    assert run("preprocess", raw, out, "--no-template", "--quiet", "--overwrite")[0] == 0
    assert tree(out) == tree(before)


def test_a_contrast_that_comes_later_is_added(run, brain, save, tmp_path, tree):
    raw = tmp_path / "raw"
    save(raw / "p1" / "T1.nii.gz", brain(1)[0])
    assert run("preprocess", raw, tmp_path / "out", "--no-template", "--quiet")[0] == 0
    save(raw / "p1" / "T2.nii.gz", brain(1, contrast="T2")[0])
    for out in ("out", "expected"):
        printed = run("preprocess", raw, tmp_path / out, "--no-template", "--quiet")[1]
        assert printed.startswith("1 done, 0 skipped")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_a_lesion_mask_on_another_grid_costs_a_row(run, brain, save, tmp_path, rows_of):
    values, _, lesion = brain(1, lesion=True)
    for name, mask in (("bad", lesion[1:]), ("good", lesion)):
        save(tmp_path / "raw" / name / "T1.nii.gz", values)
        save(tmp_path / "raw" / name / "lesion.nii.gz", mask, dtype=np.uint8)
    out = tmp_path / "out"
    assert run("preprocess", tmp_path / "raw", out, "--no-template", "--quiet")[0] == 1
    (row,) = rows_of(out / "errors.tsv")
    assert row["participant_id"] == "sub-bad" and "one grid" in row["message"]
    assert str(tmp_path / "raw" / "bad" / "lesion.nii.gz") in row["message"]
    assert [row["participant_id"] for row in rows_of(out / "preprocessing.tsv")] == ["sub-good"]
