"""Where the time and the memory of ``madad predict`` go, stage by stage, for one volume after the other.

    python -m benchmarks.volumes MODEL SCAN.nii.gz [...] [--brain auto] [--bias-field] [--json FILE]

MODEL is what ``madad fit`` wrote; each scan is prepared as its card says, and judged. Every scan has a
process of its own, so that the peak of its memory can be read. ``--millimetre`` first brings scans to voxels
of 1 mm, for timing alone. Needs the extra ``mri``.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

STAGES = (
    "read",
    "brain",
    "bias field",
    "registration",
    "resampling",
    "slices",
    "networks",
    "components",
    "write",
)
PREPROCESSING = STAGES[:5]


def main():
    """Measure each scan and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("scans", type=Path, nargs="+")
    parser.add_argument("--brain", default="auto", help="how the brain is found")
    parser.add_argument("--bias-field", action="store_true", help="with N4, whatever the model's card says")
    parser.add_argument("--millimetre", action="store_true", help="bring scans to voxels of 1 mm first")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.scans[0])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scan in options.scans:
            scan = at_one_millimetre(scan, Path(folder)) if options.millimetre else scan
            flags = ["--bias-field"] if options.bias_field else []
            command = [sys.executable, "-m", "benchmarks.volumes", options.model, scan, "--one", "--brain"]
            ran = subprocess.run(
                [*command, options.brain, *flags], capture_output=True, text=True, check=True
            )
            rows.append({"scan": scan.name, **json.loads(ran.stdout)})
    print(table(rows))
    if options.json is not None:
        facts = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "scans": rows,
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def measure(options, path):
    """Seconds of each stage, megabytes at the peak, and what the volume is."""
    import numpy as np
    import torch

    from madad.mri import find_brain, read_volume, write_like
    from madad.mri.intensity import correct_bias
    from madad.mri.registration import mni_template, register_affine
    from madad.mri.volume_preprocessor import VolumePreprocessor
    from madad.volumes.model import VolumeModel
    from madad.volumes.prediction import predict_volume

    model = VolumeModel.load(options.model, "cpu")
    mni_template()  # read once in a cohort
    start_mb = peak_mb()
    seconds = dict.fromkeys(STAGES, 0.0)
    with timed(seconds, "read"):
        volume = read_volume(path)
    with timed(seconds, "brain"):
        brain, made_by = find_brain(volume.values, volume.affine, method=options.brain)
    values = volume.values
    if options.bias_field:
        with timed(seconds, "bias field"):
            values = correct_bias(values, volume.affine, brain)
    preprocessor = VolumePreprocessor(**model.card.preprocessing)
    registration = None
    if preprocessor.template:
        with timed(seconds, "registration"):
            registration = register_affine(values, volume.affine, brain)
    with timed(seconds, "resampling"):
        place = preprocessor._place(volume, values, brain, made_by, registration)
    with timed(seconds, "slices"):
        images, masks, _ = model.card.slicer.slices_of(place.volume, place.brain_mask)
    with timed(seconds, "networks"):
        maps = model.detector.predict_maps(images, brain_mask=masks)
    with timed(seconds, "components"):
        known = KnownMaps(maps, model.threshold)
        prediction = predict_volume(known, place, model.card.slicer, **model.card.aggregation)
    seconds["components"] = max(0.0, seconds["components"] - seconds["slices"])
    with timed(seconds, "write"), tempfile.TemporaryDirectory() as folder:
        anomaly_map, labels = prediction.on_source()
        write_like(Path(folder, "map.nii.gz"), anomaly_map, volume)
        write_like(Path(folder, "mask.nii.gz"), labels > 0, volume, dtype=np.uint8)
    return {
        "shape": list(volume.shape),
        "spacing_mm": list(volume.spacing_mm),
        "brain_made_by": made_by,
        "slices": list(images.shape),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_mb": peak_mb(),
        "peak_mb_before": start_mb,
    }


class KnownMaps:
    """Gives maps that are known already, so that what comes after the networks is timed alone."""

    def __init__(self, maps, threshold):
        self.maps, self.map_threshold_ = maps, threshold

    def predict_maps(self, images, *, brain_mask=None):
        """The maps."""
        return self.maps


@contextmanager
def timed(seconds, stage):
    """Note how long the block took."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def peak_mb():
    """The most memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def at_one_millimetre(path, folder):
    """The scan on a grid of 1 mm, in a file of its own."""
    import nibabel as nib
    from nibabel.processing import resample_to_output

    out = folder / f"1mm_{path.name}"
    nib.save(resample_to_output(nib.load(path), 1.0, order=1), out)
    return out


def table(rows):
    """Markdown: a row for each stage, a column for each scan."""
    lines = ["| | " + " | ".join(row["scan"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]

    def line(name, cells):
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    line("voxels", ["x".join(map(str, row["shape"])) for row in rows])
    line("brain found by", [row["brain_made_by"] for row in rows])
    line("slices", ["x".join(map(str, row["slices"])) for row in rows])
    for stage in STAGES:
        line(f"{stage}, s", [f"{row['seconds'][stage]:.2f}" for row in rows])
    totals = [sum(row["seconds"].values()) for row in rows]
    line("all, s", [f"{total:.1f}" for total in totals])
    shares = [sum(row["seconds"][stage] for stage in PREPROCESSING) for row in rows]
    line(
        "share of preprocessing", [f"{part / total:.0%}" for part, total in zip(shares, totals, strict=True)]
    )
    line("peak, MB", [f"{row['peak_mb']:.0f}" for row in rows])
    line("of these before the scan, MB", [f"{row['peak_mb_before']:.0f}" for row in rows])
    return "\n".join(lines)


if __name__ == "__main__":
    main()
