"""How well brains are found and registered: healthy heads against labels, patients against their masks.

    python -m benchmarks.brain --data ../shared/data

For each volume and each way to find its brain: Dice overlap with the reference, seconds, and of the
registration to the MNI152 template the overlap of the brains and the similarity. The labels of the healthy
heads name regions of the brain, which together, with their holes filled, are the reference. Needs the extras
``mri`` and, for its row, ``deepbet``.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from madad.mri import find_brain, read_volume, register_affine
from madad.mri.brain import clean_mask

HEAD, METHODS = "healthy_*_T1_2mm.nii.gz", ("deepbet", "template")


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with volumes/")
    folder = parser.parse_args().data / "volumes"
    print("| volume | brain found by | Dice with the reference | template overlap | similarity | s |")
    print("|---|---|---|---|---|---|")
    for path in sorted(folder.glob(HEAD)):
        labels = read_volume(path.with_name(path.name.replace(".nii.gz", "_DLMUSE_labels.nii.gz")))
        for method in METHODS:
            report(path, clean_mask(labels.values > 0), method)
    for path in sorted(folder.glob("lesion_ms_*_T1.nii.gz")):
        mask = read_volume(path.with_name(path.name.replace("_T1.nii.gz", "_brainmask.nii.gz")))
        report(path, mask.values > 0, "template")
        report(path, mask.values > 0, "given")
    for path in sorted(folder.glob("lesion_Brats*_t1.nii.gz")):
        report(path, None, "stripped")


def report(path, reference, method):
    """One row."""
    volume = read_volume(path)
    start = time.perf_counter()
    try:
        if method == "given":
            brain, made_by = find_brain(volume.values, volume.affine, brain_mask=reference)
        else:
            brain, made_by = find_brain(volume.values, volume.affine, method=method)
    except (ImportError, ValueError) as error:
        print(f"| {path.name} | {method}: {error} | | | | |")
        return
    registration = register_affine(volume.values, volume.affine, brain)
    seconds = time.perf_counter() - start
    dice = "" if reference is None else f"{overlap(brain, reference):.3f}"
    print(
        f"| {path.name} | {made_by} | {dice} | {registration.overlap:.3f} | {registration.similarity:.3f} "
        f"| {seconds:.1f} |",
        flush=True,
    )


def overlap(one, other):
    """Dice of two masks."""
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


if __name__ == "__main__":
    main()
