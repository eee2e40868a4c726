import contextlib
import gzip
import io

import nibabel as nib
import numpy as np
import pytest

from madad import cli


def _run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def run():
    """``run(*arguments)``: exit status, stdout and stderr of the command."""
    return _run


@pytest.fixture(scope="session")
def write_slices():
    """``write_slices(path)``: twelve subjects with four slices each in the layout of the real scans."""

    def write(path, *, without=(), lesions=True):
        rng = np.random.default_rng(0)
        n, height, width = 48, 40, 32
        y, x = np.mgrid[:height, :width]
        brain = np.broadcast_to(((y - 19.5) / 17) ** 2 + ((x - 15.5) / 13) ** 2 < 1, (n, height, width))
        tissue = 90 + 30 * np.sin(x / 4 + rng.uniform(0, 6, (n, 1, 1))) + 8 * rng.standard_normal(brain.shape)
        lesion = np.zeros(brain.shape, np.uint8)
        if lesions:
            lesion[::2, 14:20, 12:17] = 4
        arrays = {
            "image": np.where(brain, np.where(lesion > 0, 230, tissue.clip(1, 200)), 0).astype(np.uint8),
            "brain_mask": brain.astype(np.uint8),
            "lesion_mask": lesion,
            "subject": np.repeat([f"s{i:02d}" for i in range(12)], 4),
            "z_frac": np.tile(np.linspace(0.4, 0.7, 4), 12),
            "modality": "FLAIR",
        }
        np.savez(path, **{name: values for name, values in arrays.items() if name not in without})
        return path

    return write


SHAPE, SPACING_MM = (36, 44, 36), 4.0


def _brain(seed, *, contrast="T1", lesion=False):
    """A stripped brain of 4 mm voxels, 0.9 litres: an ellipsoid with a light core and a darker rim."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij"))
    radius = np.sqrt(sum((axis / half) ** 2 for axis, half in zip(places, (14, 17, 14), strict=True)))
    inside = radius < 1
    light, dark = (110, 80) if contrast == "T1" else (80, 110)
    values = np.where(radius < 0.7, light, dark) + rng.normal(0, 4, SHAPE)
    mask = np.zeros(SHAPE, bool)
    if lesion:
        mask[14:20, 20:27, 15:21] = True
        values = np.where(mask, 30, values)
    return np.where(inside, values.clip(1), 0), inside, mask & inside


def _save(path, values, *, affine=None, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    if affine is None:
        affine = np.diag([SPACING_MM] * 3 + [1.0])
        affine[:3, 3] = [-70, -90, -60]
    image = nib.Nifti1Image(np.asarray(values, dtype), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def _write_table(path, rows):
    columns = ("subject", "contrast", "image", "brain_mask", "lesion_mask")
    lines = [columns, *([str(row.get(column, "n/a")) for column in columns] for row in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def brain():
    """``brain(seed)``: values, brain mask and lesion mask of a small stripped volume."""
    return _brain


@pytest.fixture(scope="session")
def save():
    """``save(path, values)``: write a NIfTI file."""
    return _save


@pytest.fixture(scope="session")
def write_table():
    """``write_table(path, rows)``: a table of scans."""
    return _write_table


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """A table of five healthy T1 volumes."""
    folder = tmp_path_factory.mktemp("healthy")
    rows = [
        {"subject": f"h{i}", "contrast": "T1", "image": _save(folder / f"h{i}.nii.gz", _brain(i)[0])}
        for i in range(5)
    ]
    return _write_table(folder / "healthy.tsv", rows)


@pytest.fixture(scope="session")
def patients(tmp_path_factory):
    """A table of three T1 volumes with lesion masks."""
    folder = tmp_path_factory.mktemp("patients")
    rows = []
    for i in range(3):
        values, _, lesion = _brain(50 + i, lesion=True)
        image, mask = folder / f"p{i}.nii.gz", folder / f"p{i}_lesion.nii.gz"
        rows.append({"subject": f"p{i}", "contrast": "T1"})
        rows[-1] |= {"image": _save(image, values), "lesion_mask": _save(mask, lesion, dtype=np.uint8)}
    return _write_table(folder / "patients.tsv", rows)


@pytest.fixture(scope="session")
def cohort(healthy, patients):
    """A table of both, eight volumes."""
    table = patients.parent / "all.tsv"
    _, *rows = healthy.read_text().splitlines(keepends=True)
    table.write_text(patients.read_text() + "".join(rows))
    return table


@pytest.fixture(scope="session")
def prepared(healthy, tmp_path_factory):
    """The healthy volumes, preprocessed on their own grids."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert _run("preprocess", healthy, out, "--no-template", "--quiet")[0] == 0
    return out


@pytest.fixture(scope="session")
def model(prepared, tmp_path_factory):
    """A tiny model of the healthy volumes."""
    path = tmp_path_factory.mktemp("model") / "t1"
    status, _, errors = _run("fit", prepared, path, *TINY)
    assert status == 0, errors
    return path


@pytest.fixture(scope="session")
def of_contrasts(tmp_path_factory):
    """A table of three people in T1, T2 and FLAIR, and a tiny model of these as channels."""
    folder = tmp_path_factory.mktemp("contrasts")
    rows = [
        {
            "subject": f"s{i}",
            "contrast": name,
            "image": _save(folder / f"s{i}_{name}.nii.gz", _brain(i, contrast=name)[0]),
        }
        for i in range(3)
        for name in ("FLAIR", "T1", "T2")
    ]
    table = _write_table(folder / "contrasts.tsv", rows)
    assert _run("preprocess", table, folder / "prepared", "--no-template", "--quiet")[0] == 0
    command = ("fit", folder / "prepared", folder / "model", *TINY, "--contrasts", "T1", "T2", "FLAIR")
    assert _run(*command)[0] == 0
    return table, folder / "model"


@pytest.fixture(scope="session")
def on_template(healthy, tmp_path_factory):
    """A table of two healthy volumes, and these preprocessed on the template."""
    folder = tmp_path_factory.mktemp("template")
    lines = healthy.read_text().splitlines(keepends=True)
    (folder / "two.tsv").write_text("".join(lines[:3]))
    assert _run("preprocess", folder / "two.tsv", folder / "out", "--quiet")[0] == 0
    return folder / "two.tsv", folder / "out"


TINY = ("--preset", "tiny", "--spacing-mm", "4", "--device", "cpu", "--quiet")


def _tree(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def tree():
    """``tree(folder)``: the bytes of each file below it, by relative path."""
    return _tree


@pytest.fixture(scope="session")
def rows_of():
    """``rows_of(path)``: a table as one dict for each row."""

    def read(path):
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        names = header.split("\t")
        return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]

    return read


@pytest.fixture
def bad_cohort(tmp_path):
    """A table of four good scans among bad ones, and of each bad one how it is mended and what is said."""
    folder = tmp_path / "bad"
    good = _save(folder / "good.nii.gz", _brain(60)[0])
    values = _brain(61)[0]
    paths = {}

    def mended(name):
        def mend():
            whole = good.read_bytes()
            paths[name].write_bytes(gzip.decompress(whole) if paths[name].suffix == ".nii" else whole)

        return mend

    whole = good.read_bytes()
    paths["truncated"] = folder / "truncated.nii.gz"
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["text"] = folder / "text.nii.gz"
    paths["text"].write_bytes(gzip.compress(b"no image at all" * 50))
    paths["dicom"] = folder / "dicom.nii.gz"
    paths["dicom"].write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 400)
    paths["named"] = folder / "named.nii"
    paths["named"].write_bytes(bytes(range(256)) * 20)  # a DICOM file without preamble
    paths["series"] = _save(folder / "series.nii.gz", np.stack([values] * 3, axis=-1))
    paths["allnan"] = _save(folder / "allnan.nii.gz", np.full(SHAPE, np.nan))
    paths["constant"] = _save(folder / "constant.nii.gz", np.full(SHAPE, 7.0))
    paths["below"] = _save(folder / "below.nii.gz", -1 - values)
    paths["zeros"] = _save(folder / "zeros.nii.gz", np.zeros(SHAPE))
    paths["missing"] = folder / "missing.nii.gz"
    paths["maskgrid"] = _save(folder / "maskgrid.nii.gz", values)
    other_grid = _save(folder / "maskgrid_brain.nii.gz", np.ones((9, 9, 9)), dtype=np.uint8)
    said = dict.fromkeys(paths, "") | {
        **dict.fromkeys(("truncated", "text", "named"), "whole NIfTI file"),
        **dict.fromkeys(("constant", "zeros"), "brain"),
        **{"dicom": "dcm2niix", "series": "one volume", "allnan": "finite", "below": "positive median"},
        **{"missing": "existing file", "maskgrid": "one grid"},
    }
    somenan = values.copy()
    somenan[0, 0, :5] = np.nan
    paths |= {
        "good": good,
        "zgood": good,
        "somenan": _save(folder / "somenan.nii.gz", somenan),
        "negative": _save(folder / "negative.nii.gz", np.where(np.indices(SHAPE)[:2].any(0), values, -3)),
    }
    rows = [{"subject": name, "contrast": "T1", "image": path} for name, path in sorted(paths.items())]
    inside = _save(folder / "inside.nii.gz", values > 0, dtype=np.uint8)
    for row in rows:
        row |= {"below": {"brain_mask": inside}, "maskgrid": {"brain_mask": other_grid}}.get(
            row["subject"], {}
        )
    table = _write_table(tmp_path / "bad.tsv", rows)
    repair = {name: (mended(name), text) for name, text in said.items()}
    repair["maskgrid"] = (lambda: other_grid.write_bytes(inside.read_bytes()), said["maskgrid"])
    return table, repair
