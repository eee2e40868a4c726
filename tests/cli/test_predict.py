import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from madad.cli import predict
from madad.mri.registration import TEMPLATE_SPACE

MAP, MASK = "stat-anomaly_statmap", "label-L_desc-madad_mask"


@pytest.fixture(scope="module")
def maps(run, model, patients, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps") / "out"
    assert run("predict", model, patients, out, "--quiet")[0] == 0
    return out


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
def test_in_template_space_and_another_contrast_is_doubted(
    run, on_template, brain, save, write_table, tmp_path, rows_of
):
    table, prepared = on_template
    model = tmp_path / "model"
    options = ("--preset", "tiny", "--spacing-mm", "4", "--slice-mm", "8", "--quiet")
    assert run("fit", prepared, model, *options)[0] == 0
    wrong = save(tmp_path / "wrong.nii.gz", brain(9, contrast="FLAIR")[0])
    right = table.read_text().splitlines()[1].split("\t")[2]
    rows = [
        {"subject": subject, "contrast": "T1", "image": image}
        for subject, image in (("right", right), ("wrong", wrong))
    ]
    patients = write_table(tmp_path / "p.tsv", rows)
    out = tmp_path / "orig"
    status, _, errors = run("predict", model, patients, out, "--quiet")
    assert status == 0
    assert "sub-wrong: warning:" in errors and "unlike those of healthy T1" in errors
    warned = {row["participant_id"]: row["warning"] for row in rows_of(out / "scores.tsv")}
    assert "unlike those of healthy T1" in warned["sub-wrong"]
    assert "unlike" not in warned["sub-right"]
    assert nib.load(out / "sub-wrong" / "anat" / f"sub-wrong_{MAP}.nii.gz").shape == (36, 44, 36)
    command = ("predict", model, prepared, tmp_path / "template", "--space", "template", "--shard", "1/2")
    assert run(*command, "--quiet")[0] == 0
    anat = tmp_path / "template" / "sub-h0" / "anat"
    for ending in (MAP, MASK):
        written = nib.load(anat / f"sub-h0_space-{TEMPLATE_SPACE}_{ending}.nii.gz")
        assert written.shape == (197, 233, 189) and written.header["sform_code"] == 4
    sidecar = json.loads((anat / f"sub-h0_space-{TEMPLATE_SPACE}_{MAP}.json").read_text())
    assert sidecar["SpatialReference"] == TEMPLATE_SPACE and sidecar["Sources"][0].startswith("bids:raw:")
    status, _, errors = run("predict", model, patients, tmp_path / "orig", "--space", "template")
    assert status == 2 and f"space 'orig', not '{TEMPLATE_SPACE}'" in errors


def test_contrasts_are_channels_in_the_models_order(run, of_contrasts, tmp_path):
    table, model = of_contrasts
    header, *rows = table.read_text().splitlines(keepends=True)
    assert run("predict", model, table, tmp_path / "maps", "--quiet")[0] == 0
    turned = table.with_name("turned.tsv")
    turned.write_text(header + "".join(rows[::-1]))
    assert run("predict", model, turned, tmp_path / "turned", "--quiet")[0] == 0
    assert run("predict", model, table.parent / "prepared", tmp_path / "prepared", "--quiet")[0] == 0
    maps = sorted((tmp_path / "maps").rglob("*.nii.gz"))
    assert len(maps) == 6
    for path in maps:
        for other in ("turned", "prepared"):
            same = tmp_path / other / path.relative_to(tmp_path / "maps")
            assert same.read_bytes() == path.read_bytes()
    sidecar = json.loads((tmp_path / "maps" / "sub-s1" / "anat" / f"sub-s1_{MAP}.json").read_text())
    assert [Path(uri).name for uri in sidecar["Sources"]] == [
        f"s1_{name}.nii.gz" for name in ("T1", "T2", "FLAIR")
    ]


def test_contrasts_on_other_grids_and_missing_ones(run, of_contrasts, brain, save, tmp_path, rows_of):
    _, model = of_contrasts
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = np.array([-70, -90, -60]) + 4.0 * np.array([2, 1, 3])
    for subject, part in (("whole", np.s_[2:-1, 1:, 3:]), ("slab", np.s_[2:-1, 1:, 3:15])):
        for name in ("T1", "T2"):
            save(tmp_path / "raw" / subject / f"{name}.nii.gz", brain(4, contrast=name)[0])
        flair = brain(4, contrast="FLAIR")[0][part]
        save(tmp_path / "raw" / subject / "FLAIR.nii.gz", flair, affine=affine)
    save(tmp_path / "raw" / "lacking" / "T1.nii.gz", brain(4)[0])
    assert run("predict", model, tmp_path / "raw", tmp_path / "out", "--quiet")[0] == 1
    messages = {row["participant_id"]: row["message"] for row in rows_of(tmp_path / "out" / "errors.tsv")}
    assert set(messages) == {"sub-lacking", "sub-slab"}
    assert "['T2', 'FLAIR']" in messages["sub-lacking"]
    assert str(Path("slab", "FLAIR.nii.gz")) in messages["sub-slab"]
    (path,) = (tmp_path / "out").rglob(f"*_{MAP}.nii.gz")
    first = nib.load(tmp_path / "raw" / "whole" / "T1.nii.gz")
    assert nib.load(path).shape == first.shape
    np.testing.assert_array_equal(nib.load(path).affine, first.affine)


def test_another_model_or_threshold_wants_a_new_start(run, model, patients, maps, tmp_path, tree):
    out, other = tmp_path / "out", tmp_path / "model"
    shutil.copytree(maps, out)
    shutil.copytree(model, other)
    card = json.loads((other / "card.json").read_text())
    card["volume_threshold"] /= 2
    (other / "card.json").write_text(json.dumps(card))
    status, _, errors = run("predict", other, patients, out, "--quiet")
    assert status == 2 and "same parameters" in errors and "model '" in errors and "--overwrite" in errors
    assert tree(out) == tree(maps)
    command = ("predict", other, patients, out, "--quiet")
    assert run(*command, "--overwrite", "--shard", "1/2")[0] == 0
    assert not (out / "sub-p1" / "anat" / f"sub-p1_{MAP}.json").exists()  # that of the other model
    assert run(*command)[0] == 0
    assert run("predict", other, patients, tmp_path / "new", "--quiet")[0] == 0
    assert tree(out) == tree(tmp_path / "new")


def test_how_the_brain_was_found_does_not_matter(run, model, patients, maps, tmp_path):
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert run("preprocess", patients, prepared, "--no-template", "--brain", "stripped", "--quiet")[0] == 0
    assert run("predict", model, prepared, out, "--quiet")[0] == 0
    assert (out / "scores.tsv").read_bytes() == (maps / "scores.tsv").read_bytes()


def test_the_raw_scan_is_needed_for_its_grid(run, model, brain, save, tmp_path, rows_of):
    image = save(tmp_path / "raw" / "p_T1.nii.gz", brain(5)[0])
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert run("preprocess", image, prepared, "--no-template", "--quiet")[0] == 0
    image.rename(tmp_path / "elsewhere.nii.gz")
    assert run("predict", model, prepared, out, "--quiet")[0] == 1
    (row,) = rows_of(out / "errors.tsv")
    assert str(image) in row["message"] and "still exist" in row["message"]
    save(image, brain(5)[0][:-1])
    assert run("predict", model, prepared, out, "--quiet")[0] == 1
    (row,) = rows_of(out / "errors.tsv")
    assert "must not have changed" in row["message"] and str(image) in row["message"]
    (tmp_path / "elsewhere.nii.gz").rename(image)
    assert run("predict", model, prepared, out, "--quiet")[0] == 0
    assert rows_of(out / "errors.tsv") == []


@pytest.mark.parametrize("what", ["missing", "config.json", "card.json", "denoiser.safetensors"])
def test_a_damaged_model_is_one_error(run, model, patients, tmp_path, what):
    path = tmp_path / "model"
    if what != "missing":
        shutil.copytree(model, path)
        (path / what).write_bytes((path / what).read_bytes()[:40])
    status, _, errors = run("predict", path, patients, tmp_path / "out")
    assert status == 2 and errors.count("madad: error:") == 1 and str(path) in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "cores", "n"), [("cpu", 16, 0), ("cuda", 16, 4), ("cuda", 3, 2), ("cuda", 1, 0)]
)
def test_readers_beside_a_gpu_alone(monkeypatch, device, cores, n):
    monkeypatch.setattr(predict, "resolve_device", torch.device)
    monkeypatch.setattr(predict, "cpu_count", lambda: cores)
    assert predict._default_readers(device) == n
