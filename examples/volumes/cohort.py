"""Write a small cohort as a hospital has it, NIfTI files and two tables, from the project's real scans.

Healthy T1: three heads as they came from the scanner, and 43 people of whom the slices of half a brain's
height are known, with a brain mask, written as volumes of 2 mm. Patients: a glioma and two with multiple
sclerosis, in T1, T2 and FLAIR, with the experts' lesion masks.

    python examples/volumes/cohort.py ../shared/data cohort
"""

import argparse
import csv
from pathlib import Path

import nibabel as nib
import numpy as np

COLUMNS = ("subject", "contrast", "image", "brain_mask", "lesion_mask")


def main():
    """Write ``healthy.tsv``, ``patients.tsv`` and the volumes that exist only as slices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with ixi_t1_2mm.npz and volumes/")
    parser.add_argument("out", type=Path, help="folder to write to")
    options = parser.parse_args()
    (options.out / "ixi").mkdir(parents=True, exist_ok=True)
    heads = sorted((options.data / "volumes").resolve().glob("healthy_*_T1_2mm.nii.gz"))
    healthy = [{"subject": path.name.split("_")[1], "contrast": "T1", "image": path} for path in heads]
    known = {row["subject"] for row in healthy}
    healthy += [
        row for row in stacks(options.data / "ixi_t1_2mm.npz", options.out) if row["subject"] not in known
    ]
    write_table(options.out / "healthy.tsv", healthy)
    write_table(options.out / "patients.tsv", patients((options.data / "volumes").resolve()))


def stacks(file, out):
    """Write the slices of each person of an .npz file as a volume; anterior is at the top of a slice."""
    with np.load(file) as arrays:
        data = {name: arrays[name] for name in ("image", "brain_mask", "subject", "spacing_mm")}
    affine = np.diag([*data["spacing_mm"], 1.0])
    affine[:3, 3] = -64 * data["spacing_mm"]
    for subject in np.unique(data["subject"]):
        rows = np.flatnonzero(data["subject"] == subject)
        row = {"subject": str(subject), "contrast": "T1"}
        for name, column, ending in (("image", "image", "T1"), ("brain_mask", "brain_mask", "brainmask")):
            values = np.ascontiguousarray(data[name][rows][:, ::-1].transpose(2, 1, 0))
            row[column] = Path("ixi") / f"{subject}_{ending}.nii.gz"
            image = nib.Nifti1Image(values, affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, out / row[column])
        yield row


def patients(folder):
    """Rows of the glioma and of the two with multiple sclerosis."""
    contrasts = ("T1", "T2", "FLAIR")
    glioma = folder / "lesion_Brats18_TCIA10_639_1"
    rows = [
        {
            "subject": "TCIA10639",
            "contrast": contrast,
            "image": f"{glioma}_{contrast.lower()}.nii.gz",
            "lesion_mask": f"{glioma}_seg.nii.gz",
        }
        for contrast in contrasts
    ]
    for number in ("07", "19"):
        of_patient = folder / f"lesion_ms_patient{number}"
        masks = {"brain_mask": f"{of_patient}_brainmask.nii.gz", "lesion_mask": f"{of_patient}_lesion.nii.gz"}
        rows += [
            {"subject": f"ms{number}", "contrast": name, "image": f"{of_patient}_{name}.nii.gz"} | masks
            for name in contrasts
        ]
    return rows


def write_table(path, rows):
    """One row per image; n/a where there is no mask."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="n/a", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
