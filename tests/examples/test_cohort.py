import csv
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "volumes" / "cohort.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("examples_volumes_cohort", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_slices_become_volumes_with_anterior_to_the_front_and_left_to_the_left(example, tmp_path):
    image = np.zeros((6, 128, 128), np.uint8)
    image[1, 3, 100] = 7  # second slice from below, far to the front and to the right
    brain = np.ones_like(image)
    subject = np.array(["A-1"] * 3 + ["B-2"] * 3)
    np.savez(tmp_path / "s.npz", image=image, brain_mask=brain, subject=subject, spacing_mm=np.full(3, 2.0))
    (tmp_path / "ixi").mkdir()
    rows = list(example.stacks(tmp_path / "s.npz", tmp_path))
    assert [row["subject"] for row in rows] == ["A-1", "B-2"]
    volume = nib.load(tmp_path / rows[0]["image"])
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.shape == (128, 128, 3) and volume.header.get_xyzt_units()[0] == "mm"
    assert np.argwhere(np.asarray(volume.dataobj)).tolist() == [[100, 124, 1]]
    assert np.asarray(nib.load(tmp_path / rows[1]["brain_mask"]).dataobj).all()


def test_tables_have_a_row_for_each_image_and_say_what_is_missing(example, tmp_path):
    rows = example.patients(Path("/scans"))
    assert len(rows) == 9 and {row["contrast"] for row in rows} == {"T1", "T2", "FLAIR"}
    example.write_table(tmp_path / "t.tsv", rows)
    with open(tmp_path / "t.tsv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file, delimiter="\t"))
    assert read[0]["brain_mask"] == "n/a" and read[0]["lesion_mask"].endswith("_seg.nii.gz")
    assert read[-1] == {
        "subject": "ms19",
        "contrast": "FLAIR",
        "image": "/scans/lesion_ms_patient19_FLAIR.nii.gz",
        "brain_mask": "/scans/lesion_ms_patient19_brainmask.nii.gz",
        "lesion_mask": "/scans/lesion_ms_patient19_lesion.nii.gz",
    }
