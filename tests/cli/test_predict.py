import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from madad import derivatives
from madad.mri import nifti

MAP, MASK = "stat-anomaly_statmap", "label-L_desc-madad_mask"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def maps(run, model, patients, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps") / "out"
    assert run("predict", model, patients, out, "--quiet")[0] == 0
    return out


def command(*arguments):
    """The same command as a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-m", "madad", *map(str, arguments)]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def test_outputs_are_a_bids_derivative(maps, model, tree, rows_of):
    names = set(tree(maps))
    for ending in (f"{MAP}.nii.gz", f"{MAP}.json", f"{MASK}.nii.gz", f"{MASK}.json"):
        assert f"sub-p1/anat/sub-p1_{ending}" in names
    description = json.loads((maps / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    sidecar = json.loads((maps / "sub-p1" / "anat" / f"sub-p1_{MAP}.json").read_text())
    assert len(sidecar["madad"]["settings"]["model"]) == 64
    assert sidecar["madad"]["settings"] == description["madad"]["parameters"]
    assert sidecar["madad"]["versions"]["madad"] == description["GeneratedBy"][0]["Version"]
    assert sidecar["SpatialReference"] == "orig"
    assert sidecar["Sources"][0].endswith("/p1.nii.gz")
    rows = rows_of(maps / "scores.tsv")
    assert [row["participant_id"] for row in rows] == ["sub-p0", "sub-p1", "sub-p2"]
    assert float(rows[1]["score"]) == pytest.approx(sidecar["madad"]["score"], rel=1e-5)
    assert {row["prediction"] for row in rows} <= {"-1", "1"}


def test_masks_are_where_maps_reach_the_threshold(maps):
    for subject in ("p0", "p1", "p2"):
        anat = maps / f"sub-{subject}" / "anat"
        sidecar = json.loads((anat / f"sub-{subject}_{MAP}.json").read_text())["madad"]
        values = np.asarray(nib.load(anat / f"sub-{subject}_{MAP}.nii.gz").dataobj)
        mask = np.asarray(nib.load(anat / f"sub-{subject}_{MASK}.nii.gz").dataobj) > 0
        assert 0 <= values.min() and values.max() <= 1
        np.testing.assert_array_equal(mask, values >= np.float32(sidecar["settings"]["threshold"]))
        found = sum(component["volume_ml"] for component in sidecar["components"])
        assert found == pytest.approx(np.count_nonzero(mask) * 4**3 / 1000)


def test_a_threshold_of_ones_own(run, maps, model, patients, tmp_path):
    out = tmp_path / "out"
    assert run("predict", model, patients, out, "--threshold", "0", "--quiet")[0] == 0
    name = f"sub-p0/anat/sub-p0_{MASK}.nii.gz"
    assert np.asarray(nib.load(out / name).dataobj).sum() >= np.asarray(nib.load(maps / name).dataobj).sum()
    status, _, errors = run("predict", model, patients, maps, "--threshold", "0", "--quiet")
    assert status == 2 and "same parameters" in errors and "threshold" in errors


def test_two_processes_leave_the_bytes_of_one_run(maps, model, patients, tmp_path, tree):
    out = tmp_path / "out"
    shards = [command("predict", model, patients, out, "--shard", f"{i}/2", "--quiet") for i in (1, 2)]
    assert [process.wait(120) for process in shards] == [0, 0]
    assert tree(out) == tree(maps)


def test_killed_in_the_middle_the_rerun_completes(run, model, patients, maps, tmp_path, tree):
    out, deadline = tmp_path / "out", time.monotonic() + 120
    process = command("predict", model, patients, out, "--quiet")
    while not list(out.rglob(f"*_{MAP}.nii.gz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    for path in out.rglob("sub-*.nii.gz"):
        gzip.decompress(path.read_bytes())
    for path in out.rglob("sub-*.json"):
        json.loads(path.read_text())
        assert path.name.endswith(f"{MASK}.json") or path.with_suffix("").with_suffix(".nii.gz").exists()
    # What a kill while a file is written would leave:
    leftover = out / "sub-p2" / "anat" / f".sub-p2_{MAP}.nii.gz.0123abcd.tmp"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_bytes(b"half")
    assert run("predict", model, patients, out, "--quiet")[0] == 0
    assert tree(out) == tree(maps)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_error_and_nothing_is_half_written(
    run, model, patients, maps, tmp_path, tree, monkeypatch, number
):
    out = tmp_path / "out"
    replace, written = os.replace, []

    def full(source, target):
        if f"sub-p1_{MAP}.nii" in str(target):
            raise OSError(number, os.strerror(number))
        written.append(str(target))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(nifti.os, "replace", full)
        status, _, errors = run("predict", model, patients, out, "--quiet")
    assert status == 2
    assert errors.count("madad: error:") == 1 and f"sub-p1_{MAP}.nii.gz" in errors
    assert not [path for path in out.rglob("*") if path.name.startswith(".sub")]
    assert not (out / "sub-p1" / "anat" / f"sub-p1_{MAP}.json").exists()
    assert (out / "sub-p0" / "anat" / f"sub-p0_{MAP}.json").exists()
    assert run("predict", model, patients, out, "--quiet")[0] == 0
    assert tree(out) == tree(maps)


def test_a_read_only_folder_is_one_error(run, model, patients, tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(derivatives.os, "replace", refused)
    status, _, errors = run("predict", model, patients, tmp_path / "out", "--quiet")
    assert status == 2
    assert "can be written to" in errors and str(tmp_path / "out") in errors
    assert not list((tmp_path / "out").rglob("*.json"))


def test_bad_scans_cost_a_row_each_and_a_rerun_completes(run, model, bad_cohort, tmp_path, rows_of):
    table, repair = bad_cohort
    out = tmp_path / "out"
    assert run("predict", model, table, out, "--quiet")[0] == 1
    rows = {row["participant_id"]: row["message"] for row in rows_of(out / "errors.tsv")}
    assert set(rows) == {f"sub-{name}" for name in repair}
    for name, (_, message) in repair.items():
        assert message in rows[f"sub-{name}"]
        assert name in rows[f"sub-{name}"]  # the file's
    for mend, _ in repair.values():
        mend()
    assert run("predict", model, table, out, "--quiet")[0] == 0
    assert rows_of(out / "errors.tsv") == []
    assert len(rows_of(out / "scores.tsv")) == 4 + len(repair)


def test_maps_are_on_the_files_own_grid_header_kept(run, brain, save, write_table, model, tmp_path):
    values = brain(70)[0]
    turned = np.ascontiguousarray(values.transpose(1, 2, 0)[:, ::-1])
    angle = np.deg2rad(8)
    affine = np.zeros((4, 4))
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (0, 4, 0), (0, 0, -4), (4, 0, 0)
    affine[:3, :3] = affine[:3, :3] @ [
        [np.cos(angle), -np.sin(angle), 0],
        [np.sin(angle), np.cos(angle), 0],
        [0, 0, 1],
    ]
    affine[:, 3] = (-70, -90, 84, 1)
    image = nib.Nifti1Image((turned * 10).astype(np.int16)[..., None], affine)
    image.header.set_slope_inter(0.1, 0)
    image.header["descrip"] = b"scanner"
    image.set_qform(affine, code=1)
    nib.save(image, tmp_path / "raw.nii.gz")
    table = write_table(tmp_path / "t.tsv", [{"subject": "o", "contrast": "T1", "image": "raw.nii.gz"}])
    assert run("predict", model, table, tmp_path / "out", "--quiet")[0] == 0
    raw = nib.load(tmp_path / "raw.nii.gz")
    for ending, dtype in ((MAP, np.float32), (MASK, np.uint8)):
        written = nib.load(tmp_path / "out" / "sub-o" / "anat" / f"sub-o_{ending}.nii.gz")
        assert written.shape == raw.shape and written.get_data_dtype() == dtype
        for field in ("pixdim", "qform_code", "sform_code", "srow_x", "quatern_b", "xyzt_units", "descrip"):
            np.testing.assert_array_equal(written.header[field], raw.header[field], err_msg=field)
        assert np.all(written.get_fdata()[raw.get_fdata() == 0] == 0)


def test_what_was_preprocessed_alike_gives_the_same_maps(run, model, patients, maps, tmp_path):
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert run("preprocess", patients, prepared, "--no-template", "--quiet")[0] == 0
    assert run("predict", model, prepared, out, "--quiet")[0] == 0
    for path in maps.rglob("*.nii.gz"):
        assert (out / path.relative_to(maps)).read_bytes() == path.read_bytes(), path.name


def test_what_was_preprocessed_otherwise_is_refused(run, model, patients, tmp_path):
    prepared = tmp_path / "prepared"
    assert run("preprocess", patients, prepared, "--no-template", "--center", "mode", "--quiet")[0] == 0
    status, _, errors = run("predict", model, prepared, tmp_path / "out", "--quiet")
    assert status == 2
    assert "center 'mode', not 'median'" in errors
    assert not (tmp_path / "out").exists()


def test_skips_what_is_done_and_runs_dry(run, model, patients, maps, tmp_path, tree):
    out = tmp_path / "out"
    shutil.copytree(maps, out)
    (out / "sub-p1" / "anat" / f"sub-p1_{MAP}.json").unlink()
    dry = json.loads(run("predict", model, patients, out, "--dry-run", "--json")[1])
    assert dry["done"] == ["sub-p1"] and dry["skipped"] == ["sub-p0", "sub-p2"]
    done = json.loads(run("predict", model, patients, out, "--json")[1])
    assert done["done"] == ["sub-p1"] and done["failed"] == {}
    assert tree(out) == tree(maps)


def test_the_template_is_no_space_of_a_model_without_one(run, model, patients, tmp_path):
    status, _, errors = run("predict", model, patients, tmp_path / "out", "--space", "template")
    assert status == 2 and "--space must be orig" in errors


def test_a_model_of_arrays_does_not_know_volumes(run, tmp_path, patients):
    from madad.testing import tiny_detector

    detector = tiny_detector().fit(np.random.default_rng(0).uniform(0.1, 1, (8, 16, 16)))
    detector.save(tmp_path / "model")
    status, _, errors = run("predict", tmp_path / "model", patients, tmp_path / "out")
    assert status == 2 and "fitted to arrays" in errors and "madad fit" in errors


@pytest.mark.slow
def test_in_template_space_and_another_contrast_is_doubted(run, brain, save, write_table, tmp_path, rows_of):
    rows = [
        {"subject": f"h{i}", "contrast": "T1", "image": save(tmp_path / f"h{i}.nii.gz", brain(i)[0])}
        for i in range(4)
    ]
    table = write_table(tmp_path / "healthy.tsv", rows)
    prepared, model = tmp_path / "prepared", tmp_path / "model"
    assert run("preprocess", table, prepared, "--quiet")[0] in (0,)
    options = ("--preset", "tiny", "--spacing-mm", "4", "--slice-mm", "8", "--quiet")
    assert run("fit", prepared, model, *options)[0] == 0
    wrong = {"subject": "w", "contrast": "T1"}
    wrong["image"] = save(tmp_path / "w.nii.gz", brain(9, contrast="FLAIR")[0])
    patients = write_table(tmp_path / "p.tsv", [rows[0], wrong])
    for space, name in (("template", "space-MNI152NLin2009aSym_"), ("orig", "")):
        out = tmp_path / space
        status, _, errors = run("predict", model, patients, out, "--space", space, "--quiet")
        assert status == 0
        written = nib.load(out / "sub-w" / "anat" / f"sub-w_{name}{MAP}.nii.gz")
        assert written.shape == ((197, 233, 189) if space == "template" else (36, 44, 36))
        assert "sub-w: warning:" in errors and "unlike those of healthy T1" in errors
        warned = {row["participant_id"]: row["warning"] for row in rows_of(out / "scores.tsv")}
        assert "unlike those of healthy T1" in warned["sub-w"]
        assert "unlike" not in warned["sub-h0"]


@pytest.mark.parametrize("step", ["preprocess", "predict"])
def test_the_bids_validator_accepts_the_outputs(run, brain, save, model, tmp_path, step):
    validator = shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("bids-validator-deno is missing: pip install bids-validator-deno")
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    for subject in ("01", "02"):
        for session in ("1", "2"):
            anat = raw / f"sub-{subject}" / f"ses-{session}" / "anat"
            values, _, lesion = brain(int(subject), lesion=True)
            save(anat / f"sub-{subject}_ses-{session}_T1w.nii.gz", values)
            masks = raw / "derivatives" / "raters" / f"sub-{subject}" / f"ses-{session}" / "anat"
            save(masks / f"sub-{subject}_ses-{session}_label-L_mask.nii.gz", lesion, dtype=np.uint8)
    arguments = (raw, out, "--no-template") if step == "preprocess" else (model, raw, out)
    assert run(step, *arguments, "--quiet")[0] == 0
    ran = subprocess.run([validator, out, "--format", "json"], capture_output=True, text=True, check=False)
    issues = json.loads(ran.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert ran.returncode == 0
